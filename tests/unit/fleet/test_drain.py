"""Draining: no request is broken off, and none keeps an instance for ever."""

from fleet.commands import Drain, Stop
from fleet.demand import Demand
from fleet.states import State
from policies import Fixed
from tests.fleet_world import TURN_S, World, make_offer


def test_what_is_not_needed_is_drained_and_stopped_and_keeps_its_disk() -> None:
    w = World().with_pool(hot=3, total=3)
    w.policy = Fixed(1, 3)
    w.tick(60)
    assert w.states() == {"hot": 1, "cold": 2}
    assert sorted(w.kinds()) == ["Drain", "Drain", "Stop", "Stop"]


def test_the_dearest_idle_instance_is_drained_first() -> None:
    w = World()
    w.offers = [make_offer(1, 0.40), make_offer(2, 0.60), make_offer(3, 0.50)]
    w.with_pool(hot=3, total=3)
    dearest = next(c.label for c in w.contracts.values() if c.usd_h == 0.60)
    second = next(c.label for c in w.contracts.values() if c.usd_h == 0.50)
    w.busy.add(dearest)
    w.tick(20)  # a check has seen that the dearest is busy
    w.policy = Fixed(2, 3)
    w.tick()
    assert [c for c in w.ordered if isinstance(c, Drain)] == [
        Drain(second, w.contracts[second].id, "not needed; the worst price for its throughput")
    ]


def test_a_busy_instance_is_not_stopped_before_its_last_request_has_ended() -> None:
    w = World().with_pool(hot=1, total=1)
    w.busy.add(w.only())
    w.policy = Fixed(0, 1)
    w.tick(120)
    assert w.states() == {"draining": 1}
    w.busy.clear()
    w.tick(20)
    assert w.states() == {"cold": 1}


def test_a_lease_that_is_out_keeps_an_idle_instance_from_being_stopped() -> None:
    """The instance says it is idle, but a client that holds a lease may be about to come."""
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.policy = Fixed(0, 1)
    w.busy.add(label)
    w.tick(10)
    assert w.states() == {"draining": 1}
    w.check(label, in_flight=0)
    assert w.fleet.decide(w.demand, w.policy, w.now).commands == ()


def test_draining_ends_at_its_deadline_even_when_busy() -> None:
    w = World().with_pool(hot=1, total=1)
    w.busy.add(w.only())
    w.policy = Fixed(0, 1)
    w.tick(w.deadlines.draining_s + 30)
    assert w.states() == {"cold": 1}
    assert any(isinstance(c, Stop) and "still busy" in c.why for c in w.ordered)


def test_a_drain_is_taken_back_when_the_instance_is_needed_again() -> None:
    w = World().with_pool(hot=2, total=2)
    for i in w.fleet:
        w.busy.add(i.label)
    w.policy = Fixed(1, 2)
    w.tick(10)
    assert w.states() == {"hot": 1, "draining": 1}
    w.policy = Fixed(2, 2)
    w.tick(5)
    assert w.states() == {"hot": 2}
    assert w.kinds() == ["Drain", "Undrain"]


def test_with_no_loadbalancer_a_drain_waits_until_leases_have_expired() -> None:
    w = World().with_pool(hot=1, total=1)
    w.loadbalancer = False
    w.policy = Fixed(0, 1)
    w.tick(w.deadlines.lease_s - 5)
    assert w.states() == {"draining": 1}
    w.tick(60)
    assert w.states() == {"cold": 1}


def test_a_drain_waits_for_a_lease_that_a_loadbalancer_counts_however_long_it_was_given_ago() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.busy.add(label)
    w.policy = Fixed(0, 1)
    w.tick(10)
    w.now += w.deadlines.lease_s + 20
    w.report()
    w.check(label, in_flight=0)
    assert w.fleet.decide(w.demand, w.policy, w.now).commands == ()


def test_with_no_loadbalancer_idle_must_be_said_after_the_last_lease_has_expired() -> None:
    """What was idle after ten seconds may have been given a request in the eleventh."""
    w = World().with_pool(hot=1, total=1)
    w.loadbalancer = False
    w.demand = Demand("e1")
    w.policy = Fixed(0, 1)
    label = w.only()
    w.tick(10)
    i = w.fleet[label]
    assert i.state is State.DRAINING
    w.now = i.since + w.deadlines.lease_s + 20
    assert w.fleet.decide(w.demand, w.policy, w.now).commands == ()
    w.check(label, in_flight=0)
    assert [type(c) for c in w.fleet.decide(w.demand, w.policy, w.now).commands] == [Stop]


def test_the_dearest_for_its_work_is_drained_and_not_the_dearest() -> None:
    w = World().with_pool(hot=3, total=3)
    first, *_ = w.fleet
    w.reprice(0.5, 2.0, 0.4)
    w.measure(500.0, 4000.0, 950.0)
    w.policy = Fixed(2, 3)
    w.tick(TURN_S)
    assert [c.label for c in w.ordered if isinstance(c, Drain)] == [first.label]
