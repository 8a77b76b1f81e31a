"""What others ask of an InstanceSet and tell it: health checks, messages, reports, the hot set."""

import time
from collections import Counter

from autoscaler import InstanceSet
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.health_check import HealthCheck, Verdict
from fleet.instance_messages import Hearing
from fleet.limits import Limits
from fleet.states import State
from policies import Fixed
from tests.fleet_world import Contract, World
from web.messages.reports import ReadyBody


def test_what_was_hot_before_a_restart_is_not_told_before_it_was_checked() -> None:
    """Else the loadbalancer would be handed an empty set while everything works."""
    w = World().with_pool(hot=2, total=2)
    w.restart()
    w.fleet.observe(w.listing(), (), w.now)
    assert not w.fleet.knows_hot_set()
    for c in w.contracts.values():
        w.fleet.judge(HealthCheck(c.label, w.now, Verdict.PASSED, "ok"), w.now)
    assert w.fleet.knows_hot_set()
    assert len(w.fleet.serving()) == 2


def test_a_turn_over_500_instances_in_which_nothing_changes_is_quick() -> None:
    """Compared with the same turn over 50, in one run, so that a slow machine cannot fail it: linear cost."""

    def turn_seconds(count: int) -> float:
        fleet = InstanceSet("fleet", World().fleet.profile, Limits(1000, 1000.0), Deadlines())
        rows = [
            Contract(n, f"fleet/{n}", n, 0.4, status="running" if n % 2 else "exited").row()
            for n in range(count)
        ]
        fleet.observe(rows, (), 1000.0)
        fleet.observe(
            rows, [HealthCheck(f"fleet/{n}", 1000.0, Verdict.PASSED, "ok") for n in range(count)], 1000.0
        )
        demand = Demand("e")
        best = float("inf")
        for n in range(5):
            begun = time.perf_counter()
            fleet.observe(rows, (), 1001.0 + n)
            decision = fleet.decide(demand, Fixed(count // 2, count), 1001.0 + n)
            best = min(best, time.perf_counter() - begun)
            assert decision.commands == ()
        return best

    small, large = turn_seconds(50), turn_seconds(500)
    assert large < 40 * small
    assert large < 0.5, "ten times the target of 50 ms: something is quadratic"


def test_nothing_is_checked_before_a_listing_said_where_it_is() -> None:
    """Else the check finds no address, and an empty hot set is told a second after every restart."""
    w = World().with_pool(hot=1, total=1).restart()
    assert w.fleet.checks_due(w.now) == []
    w.fleet.observe(w.listing(), (), w.now)
    assert [order.label for order in w.fleet.checks_due(w.now)] == list(w.contracts)


def test_a_hot_set_is_not_told_while_the_first_listings_lack_what_was_hot() -> None:
    w = World(pages_work=False).with_pool(hot=2, total=2).restart()
    w.listing_hook = lambda rows: []
    w.tick(60)
    assert not w.fleet.knows_hot_set()
    w.listing_hook = lambda rows: rows
    w.tick(10)
    assert w.fleet.knows_hot_set()
    assert len(w.fleet.serving()) == 2


def test_one_instance_has_one_check_at_a_time() -> None:
    w = World().with_pool(hot=2, total=2)
    one, other = w.contracts
    assert [order.label for order in w.fleet.checks_due(w.now + 60, {one})] == [other]


def test_what_is_gone_can_be_asked_why() -> None:
    w = World(policy=Fixed(1, 1)).tick(80)
    w.check_hook = lambda _: Verdict.FATAL
    w.tick(10)
    w.policy = Fixed(0, 0)
    w.tick(60)
    _, (gone, *_) = w.fleet.describe(w.now)
    assert (gone["state"], gone["why"]) == ("gone", "destroyed (was destroying: fatal)")


def test_what_an_instance_says_of_itself_makes_it_neither_hot_nor_failed() -> None:
    w = World(policy=Fixed(1, 1)).tick(80)
    label = w.only(State.RUNNING)
    for said in (ReadyBody("ready", "boot", 1), ReadyBody("failed", "boot", 2, "no such model")):
        assert w.fleet.record_message(label, said, w.now) is Hearing.NEWS
        assert w.fleet[label].state is State.RUNNING
        assert w.fleet[label].why == f"it says: {said.state}" + (f": {said.why}" if said.why else "")
        assert [order.label for order in w.fleet.checks_due(w.now)] == [label]
        assert w.fleet.record_message(label, said, w.now) is Hearing.HEARD
    assert w.fleet.record_message("fleet/unknown", ReadyBody("ready", "boot", 9), w.now) is Hearing.HEARD


def test_an_instance_may_say_little_and_what_it_repeats_is_no_news() -> None:
    """`POST /ready` came 1,530 times in 75 s, and each was logged (field fault A8)."""
    w = World(policy=Fixed(1, 1)).tick(80)
    label = w.only(State.RUNNING)
    heard = Counter(
        w.fleet.record_message(label, ReadyBody("loading", "boot", n), w.now + n * 75 / 1530)
        for n in range(1530)
    )
    assert heard == {Hearing.NEWS: 1, Hearing.AGAIN: 56, Hearing.TOO_MANY: 1473}
    copies = [w.fleet.record_message(label, ReadyBody("loading", "boot", 1), w.now + 75) for _ in range(99)]
    assert set(copies) == {Hearing.HEARD}
    later = ReadyBody("ready", "boot", 2000)
    assert w.fleet.record_message(label, later, w.now + 80) is Hearing.NEWS, "copies took nothing from it"


def test_a_measured_rate_that_hardly_changed_is_not_written_down_again() -> None:
    w = World().with_pool(hot=1, total=1)
    (i,) = w.fleet
    assert i.id is not None
    w.fleet.journal.take()
    w.fleet.record_report({i.id: i.throughput_work_s * 1.01, 99: 5.0}, (), w.now)
    assert w.fleet.journal.take().instances == {}
    w.fleet.record_report({i.id: 500.0}, (), w.now)
    assert [r.throughput for r in w.fleet.journal.take().instances.values()] == [500.0]
