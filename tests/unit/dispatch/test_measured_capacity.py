"""Throughput and capacity are learned from the counters of load reports. Time is a number."""

from typing import Any

import pytest

from dispatch.measured_capacity import CAPACITY_RANGE
from tests.dispatch_world import DispatchWorld, instance, world


def rates(b: DispatchWorld, per_s: float, seconds: int = 200, **more: object) -> float:
    """The measured throughput after so many reports, one a second, of that rate."""
    total = 10_000.0
    for _ in range(seconds):
        b.now += 1.0
        total += per_s
        b.report(1, generation_tokens_total=round(total), **more)
    rate: float = b.row(1)["throughput_work_s"]
    return rate


def kept_full(b: DispatchWorld, per_s: float, seconds: int = 30, **more: Any) -> dict[str, Any]:
    """How it is described after so many reports, when it always has all the work that it may hold."""
    total = 10_000.0
    for _ in range(seconds):
        while b.ask(10.0):
            b.refill()
        b.now += 1.0
        total += per_s
        running = more.get("running", len(b.unfinished) - more.get("waiting", 0))
        started = tuple(lease.request_id for lease in b.unfinished)
        b.report(1, generation_tokens_total=round(total), started=started, **{**more, "running": running})
    return b.row(1)


def test_a_rate_above_the_estimate_raises_it() -> None:
    assert rates(world(instance(1)), 170.0) == pytest.approx(170.0, rel=0.02)


def test_a_rate_that_is_high_for_a_moment_says_nothing_of_one_that_is_not_full() -> None:
    """Between two reports many answers may happen to go on and no prompt to be read."""
    b = world(instance(1))
    total = 10_000.0
    for n in range(60):
        b.now += 1.0
        total += 250.0 if n % 5 == 0 else 50.0  # 90 on average
        b.report(1, generation_tokens_total=round(total))
    assert b.row(1)["throughput_work_s"] == 100.0


def test_a_rate_below_the_estimate_says_nothing_when_there_was_little_to_do() -> None:
    assert rates(world(instance(1)), 20.0, running=1) == 100.0


def test_a_rate_below_the_estimate_lowers_it_when_requests_were_waiting() -> None:
    assert rates(world(instance(1)), 60.0, running=5, waiting=2) == pytest.approx(60.0, rel=0.02)


def test_a_rate_below_the_estimate_lowers_it_when_it_had_all_it_can_hold() -> None:
    b = world(instance(1))
    assert kept_full(b, 60.0)["throughput_work_s"] == pytest.approx(60.0, rel=0.05)


def test_leases_that_no_client_uses_do_not_make_an_instance_look_slow() -> None:
    b = world(instance(1), lease_s=600.0)
    b.lease(980.0)
    assert rates(b, 0.0, running=0) == 100.0


def test_prompt_tokens_count_by_their_weight() -> None:
    b = world(instance(1))
    for n in range(200):
        b.now += 1.0
        b.report(1, prompt_tokens_total=2000 * n)
    assert b.row(1)["throughput_work_s"] == pytest.approx(200.0, rel=0.02)


def test_a_counter_that_starts_again_is_no_rate() -> None:
    b = world(instance(1))
    b.report(1, generation_tokens_total=1_000_000)
    b.now += 1.0
    b.report(1, generation_tokens_total=0, waiting=3, running=3)
    b.now += 1.0
    b.report(1, generation_tokens_total=100, waiting=3, running=3)
    assert b.row(1)["throughput_work_s"] == 100.0


def test_no_counter_takes_the_throughput_beyond_eight_times_what_was_told() -> None:
    assert rates(world(instance(1)), 1e6) == 800.0


# -- how much an instance may hold ---------------------------------------------------------------------


def test_a_rate_says_nothing_of_how_much_an_instance_may_hold() -> None:
    b = world(instance(1))
    rates(b, 200.0)
    assert b.row(1)["capacity_work"] == 1000.0


def test_an_instance_in_which_requests_wait_may_hold_less() -> None:
    b = world(instance(1))
    rates(b, 100.0, seconds=5, running=8, waiting=2)
    assert 600.0 < b.row(1)["capacity_work"] < 1000.0
    rates(b, 100.0, seconds=60, running=8, waiting=2)
    assert b.row(1)["capacity_work"] == pytest.approx(1000.0 / CAPACITY_RANGE, abs=0.1)


def test_a_few_that_wait_for_a_moment_are_not_too_many() -> None:
    b = world(instance(1))
    rates(b, 100.0, running=8, waiting=1)
    for n in range(20):
        rates(b, 100.0, seconds=1, running=8, waiting=4 * (n % 2))
    assert b.row(1)["capacity_work"] >= 1000.0


def test_an_instance_that_is_full_and_well_may_hold_more() -> None:
    """20 requests of 10 tokens a second each: the objective is a tenth of a second, and 0.08 are near it."""
    assert kept_full(world(instance(1)), 4000.0)["capacity_work"] > 1500.0
    most = kept_full(world(instance(1)), 1e6, seconds=100)["capacity_work"]
    assert most == pytest.approx(1000.0 * CAPACITY_RANGE, rel=0.01)


def test_an_instance_whose_tokens_come_too_slowly_may_hold_less() -> None:
    """100 requests want 1,000 tokens a second at the objective; they get 500."""
    assert kept_full(world(instance(1)), 500.0, seconds=20)["capacity_work"] < 900.0


def test_an_instance_that_is_not_full_learns_nothing_about_how_much_it_may_hold() -> None:
    b = world(instance(1))
    b.lease(500.0)
    rates(b, 500.0, running=1)
    assert b.row(1)["capacity_work"] == 1000.0


def test_a_hot_set_does_not_undo_what_was_measured_but_corrects_what_was_not() -> None:
    b = world(instance(1), instance(2))
    rates(b, 200.0)
    b.hot(instance(1, throughput=120.0), instance(2, throughput=120.0))
    assert b.row(1)["throughput_work_s"] == pytest.approx(200.0, rel=0.02)
    assert b.row(2)["throughput_work_s"] == 120.0
