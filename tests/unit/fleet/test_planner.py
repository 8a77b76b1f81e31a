"""Which orders a decision gives. `World` (fleet_world.py) is the cloud and the clock."""

import pickle
from dataclasses import replace

from fleet.commands import Command, Create, Destroy, Performed, Reply, Start, Stop
from fleet.health_check import HealthCheck, Verdict
from fleet.limits import Limits
from fleet.planner import decide
from policies import Busy, Fixed, FleetSnapshot, Targets
from tests.fleet_world import TURN_S, World, make_offer


def test_an_order_counts_as_capacity_until_it_is_seen() -> None:
    """While an instance boots, no second one is ordered in its place."""
    w = World(policy=Fixed(2, 2)).tick(300)
    assert w.kinds() == ["Create", "Create"]


def test_growing_starts_stopped_instances_before_it_rents_new_ones() -> None:
    w = World().with_pool(hot=1, total=3)
    w.policy = Fixed(3, 3)
    w.tick(10)
    assert w.kinds() == ["Start", "Start"]
    w.tick(120)
    assert w.states() == {"hot": 3}


def test_the_start_with_the_best_price_for_its_throughput_comes_first() -> None:
    w = World()
    w.offers = [make_offer(1, 0.40), make_offer(2, 0.90, gpu="A100 SXM4"), make_offer(3, 0.30)]
    w.with_pool(hot=0, total=3)
    w.policy = Fixed(1, 3)
    w.tick()
    (start,) = w.ordered
    # 0.30/900 < 0.40/900 < 0.90/1700 would be 0.00033 < 0.00044 < 0.00053
    assert isinstance(start, Start)
    assert w.contracts[start.label].usd_h == 0.30


def test_the_cheapest_offer_per_work_is_rented() -> None:
    w = World()
    w.offers = [make_offer(1, 0.50), make_offer(2, 0.80, gpu="A100 SXM4"), make_offer(3, 0.70)]
    w.tick()
    w.tick()
    (create,) = [c for c in w.ordered if isinstance(c, Create)]
    assert create.offer.id == 2  # 0.80 $ for 1700 work/s


def test_starting_instances_are_cancelled_before_hot_ones_are_drained() -> None:
    w = World(start_s=50).with_pool(hot=1, total=3)
    w.policy = Fixed(3, 3)
    w.tick(10)
    assert w.states() == {"hot": 1, "starting": 2}
    w.policy = Fixed(1, 3)
    w.tick(5)
    assert w.kinds() == ["Start", "Start", "Stop", "Stop"]
    w.tick(60)
    assert w.states() == {"hot": 1, "cold": 2}


def test_no_manage_orders_nothing_new_but_finishes_what_was_begun() -> None:
    w = World().with_pool(hot=2, total=2)
    w.policy = Fixed(1, 2)
    w.tick(5)
    w.fleet.set_manage(False)
    w.policy = Fixed(5, 5)
    w.tick(120)
    assert w.states() == {"hot": 1, "cold": 1}
    assert w.kinds() == ["Drain", "Stop"]


def test_too_many_stopped_instances_are_destroyed_the_dearest_first() -> None:
    w = World()
    w.offers = [make_offer(1, 0.40), make_offer(2, 0.60), make_offer(3, 0.50)]
    w.with_pool(hot=0, total=3)
    w.policy = Fixed(0, 2)
    w.tick(60)
    assert w.states() == {"cold": 2}
    assert sorted(c.usd_h for c in w.contracts.values()) == [0.40, 0.50]


def test_a_policy_that_asks_for_a_billion_is_clamped_and_said_so() -> None:
    w = World(policy=Fixed(10**9, 10**9), limits=Limits(max_instances=3, max_usd_h=100)).tick(60)
    assert len(w.contracts) == 3
    decision = w.fleet.decide(w.demand, w.policy, w.now)
    assert "the policy wanted 1000000000 hot: clamped to 3" in decision.notes


def test_a_policy_that_asks_for_minus_one_gets_none() -> None:
    class Minus(Fixed):
        def targets(self, seen: FleetSnapshot) -> Targets:
            return Targets(-1, -1, "broken")

    w = World(policy=Minus()).tick(60)
    assert w.contracts == {}


def test_on_a_failed_listing_nothing_is_decided() -> None:
    w = World().with_pool(hot=1, total=2)
    w.policy = Fixed(2, 3)
    w.listing_works = False
    w.tick(300)
    assert w.ordered == []
    w.listing_works = True
    w.tick(300)
    assert w.states()["hot"] == 2


def test_a_destroy_is_repeated_until_the_listing_no_longer_shows_the_instance() -> None:
    w = World().with_pool(hot=0, total=1)
    refused: list[object] = []

    def lose_two(c: object) -> Reply | None:
        if isinstance(c, Destroy) and len(refused) < 2:
            refused.append(c)
            return Reply.REFUSED
        return None

    w.reply_hook = lose_two
    w.policy = Fixed(0, 0)
    w.tick(120)
    assert w.kinds() == ["Destroy"] * 3
    assert list(w.fleet) == []
    assert w.contracts == {}


def test_a_stop_without_effect_is_repeated() -> None:
    w = World().with_pool(hot=1, total=1)
    lost: list[object] = []

    def lose_one(c: object) -> Reply | None:
        if isinstance(c, Stop) and not lost:
            lost.append(c)
            return Reply.REFUSED
        return None

    w.reply_hook = lose_one
    w.policy = Fixed(0, 1)
    w.tick(120)
    assert w.kinds() == ["Drain", "Stop", "Stop"]
    assert w.states() == {"cold": 1}


def test_busy_policy_grows_and_shrinks_the_fleet() -> None:
    w = World(policy=Busy(min_hot=1, spare=1, remove_after_s=60)).with_pool(hot=1, total=3)
    w.policy = Busy(min_hot=1, spare=0, remove_after_s=60)
    w.load = 1.9
    w.tick(120)
    assert w.states() == {"hot": 3}
    w.load = 0.1
    w.tick(300)
    assert w.states() == {"hot": 1, "cold": 2}
    assert TURN_S == 5.0


def test_an_order_that_waits_to_be_sent_is_not_ordered_again() -> None:
    """Destroying fifty takes minutes at one in three seconds; the queue must not grow meanwhile."""
    w = World().with_pool(hot=0, total=1)
    (i,) = w.fleet
    assert i.id is not None
    destroy = Destroy(i.label, i.id, "test")
    w.fleet.begin(destroy, w.now)
    for later in (20.0, 200.0):
        assert w.fleet.decide(w.demand, Fixed(0, 0), w.now + later).commands == ()
    w.fleet.finish(destroy, Performed(Reply.UNKNOWN), w.now + 200.0)
    assert w.fleet.decide(w.demand, Fixed(0, 0), w.now + 205.0).commands == ()
    assert [type(c) for c in w.fleet.decide(w.demand, Fixed(0, 0), w.now + 220.0).commands] == [Destroy]


def test_a_start_that_was_lost_is_sent_again() -> None:
    w = World().with_pool(hot=0, total=1)
    apply, lost = w.apply, list[object]()

    def lose_one(c: Command) -> int | None:
        if isinstance(c, Start) and not lost:
            lost.append(c)
            return None
        return apply(c)

    w.apply = lose_one  # type: ignore[method-assign, assignment]
    w.policy = Fixed(1, 1)
    w.tick(120)
    assert w.kinds() == ["Start", "Start"]
    assert w.states() == {"hot": 1}


def test_a_start_while_an_earlier_stop_waits_to_be_sent_waits_too() -> None:
    """Sent in that order the stop would follow the start."""
    w = World().with_pool(hot=1, total=1)
    w.policy = Fixed(0, 1)
    w.tick(5)
    (contract,) = w.contracts.values()
    stop = Stop(contract.label, contract.id, "its drain has ended")
    w.fleet.begin(stop, w.now)
    contract.status, contract.intended = "exited", "stopped"  # by other means
    w.fleet.observe(w.listing(), (), w.now)
    assert w.states() == {"cold": 1}
    assert w.fleet.decide(w.demand, Fixed(1, 1), w.now).commands == ()
    w.fleet.finish(stop, Performed(Reply.UNKNOWN), w.now)
    assert [type(c) for c in w.fleet.decide(w.demand, Fixed(1, 1), w.now).commands] == [Start]


def test_an_instance_that_may_have_requests_from_before_a_restart_is_drained_not_cancelled() -> None:
    """It had just failed a check when the process was killed, and its clients still read their answers."""
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.fleet.judge(HealthCheck(label, w.now, Verdict.FAILED, "once"), w.now)
    assert w.states() == {"running": 1}
    w.restart()
    w.fleet.observe(w.listing(), (), w.now)
    assert w.fleet.decide(w.demand, Fixed(0, 1), w.now).commands == ()


def test_a_burst_that_lasts_as_long_as_a_load_orders_one_set_and_not_a_second() -> None:
    w = World(limits=Limits(max_instances=40, max_usd_h=100.0)).with_pool(hot=1, total=1)
    w.policy = Fixed(6, 6)
    w.tick(400.0)  # boot and load take 360 s
    assert w.kinds().count("Create") == 5
    assert w.states() == {"hot": 6}
    assert w.kinds() == ["Create"] * 5


def test_what_is_loaded_when_the_burst_is_over_becomes_the_pool() -> None:
    w = World().with_pool(hot=1, total=1)
    w.policy = Fixed(4, 4)
    w.tick(100.0)
    w.policy = Fixed(1, 4)
    w.tick(400.0)
    assert w.states() == {"hot": 1, "cold": 3}
    assert w.kinds().count("Create") == 3


def test_while_new_ones_load_the_loaded_ones_are_started_and_neither_is_ordered_twice() -> None:
    w = World(limits=Limits(max_instances=40, max_usd_h=100.0)).with_pool(hot=1, total=3)
    w.policy = Fixed(5, 5)
    w.tick(TURN_S)
    assert sorted(w.kinds()) == ["Start", "Start"], "the market is looked at first"
    w.tick(150.0)
    assert sorted(w.kinds()) == ["Create", "Create", "Start", "Start"]
    assert w.states()["hot"] == 3
    w.tick(400.0)
    assert sorted(w.kinds()) == ["Create", "Create", "Start", "Start"]
    assert w.states() == {"hot": 5}


def test_when_a_start_is_refused_the_next_cold_one_is_started_in_the_next_turn() -> None:
    w = World().with_pool(hot=1, total=4)
    refused: list[str] = []

    def first_is_refused(command: object) -> Reply | None:
        if isinstance(command, Start) and len(refused) < 1:
            refused.append(command.label)
            return Reply.REFUSED
        return None

    w.reply_hook = first_is_refused
    w.policy = Fixed(2, 4)
    w.tick(TURN_S)
    w.tick(TURN_S)
    assert w.kinds() == ["Start", "Start"]
    assert w.ordered[-1].label != refused[0]  # type: ignore[union-attr]
    w.tick(120.0)
    assert w.states() == {"hot": 2, "cold": 2}


def test_when_starts_find_no_gpu_one_after_another_each_cold_one_is_tried() -> None:
    """The first two GPUs are taken for good; the third is free."""
    w = World().with_pool(hot=1, total=4)
    tried: list[str] = []

    def two_are_taken(command: object) -> Reply | None:
        if isinstance(command, Start) and len(tried) < 2:
            tried.append(command.label)
            return Reply.REFUSED if len(tried) == 1 else Reply.UNKNOWN
        return None

    w.reply_hook = two_are_taken
    w.listing_hook = lambda rows: [
        replace(r, actual_status="exited", intended_status="running", cur_state="stopped")
        if r.label in tried[1:2]
        else r
        for r in rows
    ]
    w.policy = Fixed(2, 4)
    w.tick(200.0)
    started = [c.label for c in w.ordered if isinstance(c, Start)]
    assert len(set(started)) == 3
    assert w.states()["hot"] == 2


def test_a_decision_is_replayed_from_its_situation() -> None:
    """A situation is plain data: written down before the turn, it gives the same decision afterwards."""
    w = World().with_pool(hot=2, total=4)
    w.policy = Fixed(4, 6)
    written: list[bytes] = []
    for _ in range(60):
        w.fleet.observe(w.listing(), (), w.now)
        situation = w.fleet.situation(w.demand, w.now, w.policy.memory_s)
        written.append(pickle.dumps((situation, decide(situation, w.policy))))
        w.tick()
    assert sorted(w.kinds()) == ["Create", "Create", "Start", "Start"]
    ordered = 0
    for one in written:
        situation, decision = pickle.loads(one)  # noqa: S301 written by this test
        assert decide(situation, w.policy) == decision
        ordered += len(decision.commands)
    assert ordered > 0
