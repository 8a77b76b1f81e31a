"""The work that an instance has left, by the estimate, and the prompts it has to read. Time is a number."""

from collections import Counter

import pytest

from engine.slo import Slo
from engine.step_time_constants import TIMINGS
from tests.dispatch_world import instance, world
from tests.messages import request_end
from web.messages.reports import PushedReport


def test_between_reports_work_drains_at_the_throughput_but_never_below_half_of_what_is_unfinished() -> None:
    b = world(instance(1))
    b.lease(400.0)
    seen = []
    for _ in range(4):
        seen.append(b.work(1))
        b.now += 1.0
    assert seen == pytest.approx([400.0, 300.0, 200.0, 200.0])


def test_what_has_drained_by_the_estimate_makes_room() -> None:
    b = world(instance(1))
    b.lease(1000.0)
    assert b.ask(300.0) is None
    b.now += 3.0
    assert b.lease(300.0)


def test_an_overdue_instance_is_not_mistaken_for_an_idle_one() -> None:
    b = world(instance(1), instance(2))
    late = b.lease(400.0)
    b.now += 60.0
    assert {b.lease(1.0).instance_id for _ in range(2)} == {3 - late.instance_id}


def test_a_report_sets_the_work_to_that_of_the_unfinished_leases() -> None:
    b = world(instance(1))
    one, two = b.lease(400.0), b.lease(100.0)
    b.now += 4.0
    b.report(1, started=(one.request_id, two.request_id), ended=(request_end(two.request_id),), running=1)
    assert b.work(1) == pytest.approx(400.0)
    assert b.row(1)["unfinished"] == 1


def test_requests_of_others_count_until_a_report_says_they_are_gone() -> None:
    b = world(instance(1), instance(2))
    b.report(1, running=3)
    assert b.work(1) > 0.0
    b.report(1, running=0)
    assert b.work(1) == 0.0


def test_when_all_of_the_others_have_gone_an_instance_is_idle() -> None:
    """To the last bit: sums of sizes that are no binary fractions."""
    b = world(instance(1))
    own = b.lease(100.0, prompt_tokens=9000)
    b.report(1, started=(own.request_id,), started_bytes=(27_001,), running=1)
    b.end(own)
    names = [f"other{n}" for n in range(9)]
    for number, (names_in, names_out) in enumerate([(names, []), ([], names[3:] + names[:3])], start=1):
        sizes = tuple(1000 + 37 * n for n in range(len(names_in)))
        ended = tuple(request_end(name) for name in names_out)
        told = PushedReport("boot1", number, number - 1, number, False, tuple(names_in), ended, True, sizes)
        b.balancer.pushed(1, told, b.now)
        assert (b.ask(50_000.0) is not None) is (number == 2), "only an idle one takes any size"


# -- what an instance has to read ----------------------------------------------------------------------


def test_an_instance_with_a_second_of_prompts_to_read_is_given_no_other() -> None:
    """At 100 work/s 1,000 tokens are read in a second: a request behind two of them would wait for both."""
    b = world(instance(1, hold_s=100.0))
    assert b.lease(110.0, prompt_tokens=1000)
    assert b.lease(110.0, prompt_tokens=1000), "a second is not more than a second"
    assert b.ask(20.0, prompt_tokens=10) is None
    b.now += 1.0
    assert b.lease(20.0, prompt_tokens=10)


def test_prompts_are_spread_over_the_instances_before_any_has_too_much_to_read() -> None:
    b = world(*(instance(i, hold_s=100.0) for i in range(1, 5)))
    assert Counter(b.lease(300.0, prompt_tokens=2500).instance_id for _ in range(4)) == Counter(range(1, 5))
    assert b.ask(1.0) is None


def test_an_idle_instance_is_given_a_prompt_of_any_length() -> None:
    b = world(instance(1, hold_s=1000.0))
    b.lease(10_000.0, prompt_tokens=100_000)
    assert b.ask(1.0) is None


def test_an_instance_without_requests_has_nothing_to_read() -> None:
    """Its client did not use the lease, or it was booted: the next ones need not wait for that prompt."""
    b = world(instance(1, hold_s=1000.0))
    lease = b.lease(10_000.0, prompt_tokens=100_000)
    b.end(lease, "unused")
    assert b.lease(10.0)
    assert b.lease(10.0)


def test_room_that_appears_because_prompts_have_been_read_is_given_to_who_waits() -> None:
    b = world(instance(1, hold_s=100.0))
    b.lease(250.0, prompt_tokens=2500)
    waiter = b.hold(10.0)
    assert b.served() == []
    b.now += 1.5
    assert b.served() == [waiter]


@pytest.mark.parametrize("late_bound_s", [None, 300.0])
def test_prompts_are_paced_so_that_answers_flow_but_not_for_who_is_late_in_one_line(
    late_bound_s: float | None,
) -> None:
    """Forty answers are being made; with a lane of their own the late leave those their pace."""

    def given(first_token_s: float) -> int:
        slo = Slo(first_token_s, 0.0, 0.1)
        b = world(slo=slo, late_bound_s=late_bound_s)
        b.hot(instance(1, 1000.0, 1e3, timing=TIMINGS["13B", "awq4", "L40S", 1]))
        for _ in range(40):
            assert b.lease(500.0, prompt_tokens=10)
            b.now += 0.1
        for _ in range(20):
            b.request(300.0, 100.0, prompt_tokens=1500)
        count = 0
        for _ in range(40):
            b.now += 0.1
            count += len(b.grant())
        return count

    paced, hurried = given(1000.0), given(0.01)
    assert hurried > 1.2 * paced if late_bound_s is None else hurried == paced
