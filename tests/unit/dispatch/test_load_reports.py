"""When instances are asked for load reports, and what is learned from reports. Time is a number."""

from collections import Counter

import pytest

from engine.forward import LEFT
from tests.dispatch_world import DispatchWorld, instance, world
from tests.messages import load_report, request_end
from web.messages.reports import PushedReport


def test_a_request_of_others_is_as_long_as_its_instance_says() -> None:
    """Prompts of 250 tokens take 1,000 bytes here; an instance with a long one is asked last."""
    b = world(instance(1), instance(2))  # where there is no majority, each is believed at once
    own = b.lease(100.0, prompt_tokens=250)
    other = b.lease(100.0, prompt_tokens=9000)
    b.report(own.instance_id, started=(own.request_id,), started_bytes=(1000,), running=1)
    b.report(other.instance_id, started=(other.request_id,), started_bytes=(36_000,), running=1)
    for lease in (own, other):
        b.end(lease)
    b.hot(instance(1), instance(2), instance(3))
    for id, size in ((1, 400), (2, 20_000), (3, 0)):
        b.report(id, started=(f"stranger{id}",), started_bytes=(size,), running=1)
    work = [b.work(id) for id in (1, 2, 3)]
    assert work == pytest.approx([100 * 0.1 + 200.0, 5000 * 0.1 + 200.0, 1 * 0.1 + 200.0]), "3: as usual"


def test_answers_without_tokens_teach_nothing_of_those_to_come() -> None:
    """Refusals, embeddings and the like end with 0 tokens; other answers are expected as before."""
    b = world(instance(1))
    expected = b.lease(210.0, prompt_tokens=100).row[LEFT]
    for _ in range(5):
        lease = b.lease(210.0, prompt_tokens=100)
        b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, output_tokens=0),))
    assert b.lease(210.0, prompt_tokens=100).row[LEFT] == expected


def test_what_others_do_counts_from_push_to_push() -> None:
    b = world(instance(1), instance(2))
    for id in (1, 2):
        b.report(id)
    told = PushedReport("boot1", 1, 0, 1, False, ("stranger",), (), True)
    assert b.balancer.pushed(1, told, b.now) == pytest.approx(0.02)
    assert b.work(1) > 0.0
    assert b.lease(10.0).instance_id == 2
    ended = PushedReport("boot1", 2, 1, 2, False, (), (request_end("stranger"),), True)
    assert b.balancer.pushed(1, ended, b.now) == pytest.approx(0.1)
    assert b.work(1) == 0.0


def test_a_start_that_comes_after_its_end_is_no_strangers() -> None:
    """The client was first to say that it has its answer."""
    b = world(instance(1))
    lease = b.lease(10.0)
    b.end(lease)
    told = PushedReport("boot1", 1, 0, 1, False, (lease.request_id,), (), True)
    assert b.balancer.pushed(1, told, b.now) == pytest.approx(0.1)
    assert b.work(1) == 0.0


# -- polls ---------------------------------------------------------------------------------------------


def polled(b: DispatchWorld, seconds: float) -> Counter[int]:
    """How often each instance is asked in that time when each answers at once."""
    asked: Counter[int] = Counter()
    for _ in range(round(seconds / 0.02)):
        b.now += 0.02
        due = b.balancer.polls(b.now)
        unfinished = {row["id"]: row["unfinished"] for row in b.describe()["instances"]} if due else {}
        for poll in due:
            asked[poll.instance_id] += 1
            b.balancer.complete_poll(poll, load_report(running=unfinished[poll.instance_id]), b.now)
    return asked


def test_a_working_instance_is_asked_every_second_and_an_idle_one_every_five() -> None:
    b = world(instance(1), instance(2), lease_s=600.0)
    working = b.lease().instance_id
    asked = polled(b, 60.0)
    assert asked[working] == pytest.approx(55, abs=6)
    assert asked[3 - working] == pytest.approx(12, abs=2)


def test_however_many_work_there_are_no_more_than_200_reports_a_second() -> None:
    b = world(*(instance(i) for i in range(1, 601)), lease_s=600.0)
    for _ in range(600):
        b.lease(800.0)
    asked = polled(b, 12.0)
    assert asked.total() <= 12 * 200
    assert len(asked) == 600


def test_nobody_is_asked_again_before_he_has_answered() -> None:
    b = world(instance(1))
    b.lease()
    b.now += 5.0
    asked = [p for _ in range(50) for p in b.balancer.polls(b.now)]
    assert [p.instance_id for p in asked] == [1]
