"""A machine that lets clients wait: another serves on their word, and two kinds of evidence give it up."""

import pytest

from fleet.commands import Create, Destroy, Drain, Start, Stop
from fleet.demand import Demand
from fleet.health_check import HealthCheck, Verdict
from fleet.slowness import CONFIRMED_S, HEARD_S, STOP_AFTER_S, ProbePace
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World
from tests.messages import busy_report
from web.messages.busy import InstanceUse

WHY = "its answers begin after 12.0 s, 22.9 times what is due there; those of its peers 0.4 times"
FAST, SLOW = ProbePace(0.6, 20), ProbePace(14.0, 20)


def tick(w: World, seconds: float, slow: str, why: str = WHY) -> World:
    """Let so much time pass, in which the loadbalancer says that of one machine while it serves."""
    end = w.now + seconds
    while w.now < end:
        said = {i.id or 0: why for i in w.fleet if i.label == slow and i.state is State.HOT}
        w.fleet.record_report({}, (), w.now, said)
        w.tick()
    return w


def kinds(w: World) -> set[type]:
    return {type(c) for c in w.ordered}


def test_on_clients_word_a_cold_one_takes_its_place_and_it_is_stopped_and_not_destroyed() -> None:
    w = World().with_pool(hot=2, total=3)
    slow, other = (i.label for i in w.fleet if i.state is State.HOT)
    tick(w, 10, slow)
    assert [type(c) for c in w.ordered] == [Start], "it does not count as hot"
    tick(w, w.start_s + w.reload_s + STOP_AFTER_S + 30, slow)
    (drain,) = [c for c in w.ordered if isinstance(c, Drain)]
    assert (drain.label, drain.why) == (slow, f"slow, and others serve: {WHY}")
    tick(w, 6 * 3600, slow)
    assert w.states() == {"hot": 2, "cold": 1}
    assert set(w.contracts) >= {slow, other}
    assert kinds(w) == {Start, Drain, Stop}
    assert w.fleet.market.bad_machines == {}


def test_where_there_is_no_other_it_stays_and_the_decision_says_so() -> None:
    w = World().with_pool(hot=2, total=2)
    slow = next(iter(w.contracts))
    tick(w, 3600, slow)
    assert w.states() == {"hot": 2}
    assert w.ordered == []
    decision = w.fleet.decide(w.demand, w.policy, w.now)
    assert decision.notes == (f"{w.fleet[slow].id} is slow, and does not count as hot: {WHY}",)
    (row,) = [row for row in w.fleet.describe(w.now)[0] if row["slow"]]
    assert (row["label"], row["slow"]) == (slow, WHY)


def given_up(w: World, slow: str) -> str:
    """The evidence on which it was destroyed."""
    assert slow not in w.contracts
    (destroy,) = [c for c in w.ordered if isinstance(c, Destroy)]
    assert len(w.fleet.market.bad_machines) == 1
    return destroy.evidence


def test_with_our_own_check_it_is_replaced() -> None:
    w = World().with_pool(hot=3, total=3)
    slow = next(iter(w.contracts))
    w.pace_hook = lambda label: SLOW if label == slow else FAST
    w.tick(60)
    assert w.ordered == [], "our own check alone gives nothing up"
    tick(w, CONFIRMED_S + 30, slow)
    times = SLOW.each_s / FAST.each_s
    assert given_up(w, slow) == (
        f"broken: slow: {WHY}; a test prompt took 14.0 s, {times:.1f} times its peers' "
        "(its clients and our check)"
    )
    w.tick(1800)
    assert w.states() == {"hot": 3}


@pytest.mark.parametrize("peers", [ProbePace(13.0, 20), None])
def test_a_check_that_is_as_slow_elsewhere_or_is_alone_says_nothing(peers: ProbePace | None) -> None:
    w = World().with_pool(hot=2, total=2)
    slow = next(iter(w.contracts))
    w.pace_hook = lambda label: SLOW if label == slow else peers
    tick(w, 3600, slow)
    assert set(w.contracts) >= {slow}
    assert w.ordered == []


def test_a_check_that_is_in_time_says_nothing_however_fast_the_peers_are() -> None:
    w = World().with_pool(hot=2, total=2)
    slow = next(iter(w.contracts))
    w.pace_hook = lambda label: ProbePace(4.0, 20) if label == slow else ProbePace(0.2, 20)
    tick(w, 3600, slow)
    assert w.ordered == []


def stall(w: World, label: str, started_at: float) -> None:
    found = HealthCheck(label, started_at, Verdict.FAILED, "took over 15 s", stalled=True)
    w.fleet.judge(found, w.now)


def test_a_test_prompt_that_is_taken_and_not_answered_is_a_second_kind() -> None:
    w = World().with_pool(hot=2, total=2)
    slow = next(iter(w.contracts))
    stall(w, slow, w.now)
    w.tick(10)
    assert set(w.contracts) >= {slow}, "without clients' word it is a failed check"
    tick(w, CONFIRMED_S + 10, slow)
    stall(w, slow, w.now)
    w.tick()
    assert given_up(w, slow) == (
        f"broken: slow: {WHY}; a test prompt was taken and not answered (its clients and our check)"
    )


def test_its_own_counters_are_a_second_kind() -> None:
    w = World().with_pool(hot=3, total=3)
    slow, *others = w.contracts
    w.measure(90.0, 900.0, 950.0)
    tick(w, CONFIRMED_S + 10, slow)
    assert given_up(w, slow) == (
        f"broken: slow: {WHY}; by its own counters it does 9% of what its GPU should, its peers 97% "
        "(its clients and its own word)"
    )
    assert set(others) <= set(w.contracts)


def test_counters_of_an_older_gpu_are_no_evidence() -> None:
    w = World().with_pool(hot=3, total=3)
    slow = next(iter(w.contracts))
    w.contracts[slow].gpu = "RTX 3090"
    w.tick(10)
    w.measure(600.0, 3000.0, 3100.0)
    w.contracts[slow].gpu = "RTX 3090"
    for one in list(w.contracts)[1:]:
        w.contracts[one].gpu = "H100 SXM"
    w.tick(10)
    tick(w, 600, slow)
    assert not any(isinstance(c, Destroy | Create) for c in w.ordered)


def test_it_is_as_others_once_no_loadbalancer_says_so_any_more() -> None:
    w = World().with_pool(hot=2, total=2)
    slow = next(iter(w.contracts))
    tick(w, 30, slow)
    assert w.fleet.snapshot(w.demand, w.now).hot == 1
    tick(w, HEARD_S + 10, "nobody")
    assert w.fleet.snapshot(w.demand, w.now).hot == 2
    assert w.fleet[slow].trouble.slow.said is None
    assert w.fleet.decide(w.demand, w.policy, w.now).notes == ()


def test_a_new_boot_begins_with_a_clean_record_and_comes_after_others() -> None:
    w = World().with_pool(hot=2, total=4)
    slow = next(i.label for i in w.fleet if i.state is State.HOT)
    tick(w, w.start_s + w.reload_s + STOP_AFTER_S + 60, slow)
    assert w.fleet[slow].state is State.COLD
    w.reprice(0.1, 0.9, 0.9, 0.9)
    w.policy = Fixed(3, 4)
    w.tick(w.start_s + w.reload_s + 30)
    assert w.states() == {"hot": 3, "cold": 1}
    assert w.fleet[slow].state is State.COLD, "the cheapest, and slow in its last boot"
    w.policy = Fixed(4, 4)
    w.tick(w.start_s + w.reload_s + 30)
    assert w.states() == {"hot": 4}
    assert w.fleet[slow].trouble.slow.said is None


def test_what_all_loadbalancers_say_is_put_together_and_made_safe() -> None:
    demand = Demand("e1")
    for name, row in (
        ("a", InstanceUse(0, 0.0, 0.0, 0.0, 0, slow="late\x1b[2J")),
        ("b", InstanceUse(0, 0.0, 0.0, 0.0, 0)),
    ):
        report = busy_report(name=name)
        report.instances[7] = row  # type: ignore[index]
        demand.add_report(report, 100.0)
    assert list(demand.slow()) == [7]
    assert "\x1b" not in demand.slow()[7]
