"""What the fleet does, sentence by sentence. `World` (fleet_world.py) is the cloud and the clock."""

import contextlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscaler import InstanceSet
from fleet.commands import (
    Command,
    Create,
    Destroy,
    Drain,
    LookForOffers,
    Performed,
    Reply,
    Start,
    Stop,
    with_label,
)
from fleet.deadlines import Deadlines
from fleet.demand import Arrived, Demand, Report
from fleet.health_check import HealthCheck, Verdict
from fleet.journal import Entries, SavedFleet, SavedInstance
from fleet.limits import Commitment, Limits
from fleet.outside.ledger import Ledger
from fleet.outside.order_queue import OrderQueue
from fleet.outside.turns import COUNTS_EVERY_S, Autoscaler
from fleet.states import FROM_ANYWHERE, TRANSITIONS, IllegalTransition, State, check_transition
from policies import Busy, Capacity, Fixed, FleetSnapshot, Targets
from process.clock import steady_clock
from process.errors import CloudError
from tests.fleet_world import TURN_S, Contract, FakeVast, World, make_offer

# -- growing and shrinking -----------------------------------------------------------------------------


def test_an_instance_is_hot_only_after_boot_load_and_a_passed_check() -> None:
    w = World(policy=Fixed(1, 1)).tick(10)
    assert w.states() == {"ordered": 1} or w.states() == {"loading": 1}
    w.tick(60)
    assert w.states() == {"running": 1}
    w.tick(w.load_s - 20)
    assert w.states() == {"running": 1}
    w.tick(40)
    assert w.states() == {"hot": 1}
    assert w.kinds() == ["Create"]


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


# -- hard limits ---------------------------------------------------------------------------------------


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


def test_the_dollar_limit_holds_and_its_refusal_can_be_read() -> None:
    w = World(policy=Fixed(5, 5), limits=Limits(max_instances=9, max_usd_h=1.0)).tick(900)
    assert len(w.contracts) == 2  # 0.4 $/h each
    notes = w.fleet.decide(w.demand, w.policy, w.now).notes
    assert any("create refused" in n and "is over 1" in n for n in notes)


def test_a_start_that_would_break_the_dollar_limit_is_refused() -> None:
    w = World(limits=Limits(max_instances=9, max_usd_h=10)).with_pool(hot=1, total=3)
    w.limits = Limits(max_instances=9, max_usd_h=0.9)
    w.restart()
    w.policy = Fixed(3, 3)
    w.tick(120)
    assert w.states() == {"hot": 2, "cold": 1}


def test_an_instance_that_vanished_still_counts_against_the_limits_for_a_while() -> None:
    """A listing that loses rows must not make us rent twice (invariant 6)."""
    w = World(limits=Limits(max_instances=3, max_usd_h=10)).with_pool(hot=3, total=3)
    hidden = next(iter(w.contracts.values()))
    hidden.hidden = True
    w.tick(w.deadlines.vanished_s - 10)
    assert "Create" not in w.kinds()
    hidden.hidden = False
    w.tick(60)
    assert w.states() == {"hot": 3}


# -- listings that lie ---------------------------------------------------------------------------------


def test_on_a_failed_listing_nothing_is_decided() -> None:
    w = World().with_pool(hot=1, total=2)
    w.policy = Fixed(2, 3)
    w.listing_works = False
    w.tick(300)
    assert w.ordered == []
    w.listing_works = True
    w.tick(300)
    assert w.states()["hot"] == 2


def test_an_empty_listing_is_not_believed_when_a_fleet_was_there() -> None:
    w = World().with_pool(hot=2, total=3)
    w.listing_hook = lambda rows: []
    w.tick(25)
    assert w.ordered == []
    assert w.states() == {"hot": 2, "cold": 1}
    w.listing_hook = lambda rows: rows
    w.tick(10)
    assert w.states() == {"hot": 2, "cold": 1}


def test_an_instance_that_stays_away_from_believable_listings_is_gone_and_replaced() -> None:
    w = World().with_pool(hot=3, total=3)
    label = next(iter(w.contracts))
    del w.contracts[label]
    w.tick(60)
    assert label not in w.fleet
    assert "Create" in w.kinds()


def test_rows_of_other_fleets_and_unlabelled_ones_are_never_touched() -> None:
    w = World(policy=Fixed(0, 0))
    for n, label in enumerate(["fleet2/a", "", "someone", "fleet"]):
        w.contracts[f"x{n}"] = Contract(500 + n, label, 7, 0.1, status="running")
    w.limits = Limits(max_instances=8, max_usd_h=10)
    w.tick(600)
    assert w.ordered == []
    assert list(w.fleet) == []


def test_a_lost_reply_is_recognised_by_its_label_and_not_ordered_twice() -> None:
    w = World(policy=Fixed(1, 1))
    w.reply_hook = lambda c: Reply.UNKNOWN if isinstance(c, Create) else None
    w.tick(600)
    assert w.kinds() == ["Create"]
    assert w.states() == {"hot": 1}


def test_an_order_that_never_shows_up_is_given_up_after_its_deadline_and_repeated() -> None:
    w = World(policy=Fixed(1, 1))
    swallowed: list[str] = []

    def swallow(c: object) -> Reply | None:
        if isinstance(c, Create) and not swallowed:
            swallowed.append(c.label)
            return Reply.UNKNOWN
        return None

    w.reply_hook = swallow
    apply = w.apply
    w.apply = lambda c: None if getattr(c, "label", "") in swallowed else apply(c)  # type: ignore[method-assign, assignment]
    w.tick(w.deadlines.ordered_s - 10)
    assert w.kinds() == ["Create"]
    w.tick(60 + w.deadlines.create_rest_s)
    assert w.kinds() == ["Create", "Create"]


def test_an_order_that_appears_after_it_was_given_up_is_destroyed() -> None:
    w = World(policy=Fixed(1, 1))
    late: list[Contract] = []
    w.reply_hook = lambda c: Reply.UNKNOWN if isinstance(c, Create) and not late else None
    w.tick(10)
    (contract,) = w.contracts.values()
    contract.hidden = True
    late.append(contract)
    w.tick(w.deadlines.ordered_s + 60)
    contract.hidden = False
    w.tick(60)
    assert contract.label not in w.contracts
    assert any(isinstance(c, Destroy) and c.label == contract.label for c in w.ordered)


def test_a_second_row_with_one_label_is_destroyed_and_the_first_kept() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.contracts["twin"] = replace(w.contracts[label], id=4711)
    apply = w.apply

    def destroy_twin(c: object) -> int | None:
        if isinstance(c, Destroy) and c.id == 4711:
            w.contracts.pop("twin", None)
            return None
        return apply(c)  # type: ignore[arg-type]

    w.apply = destroy_twin  # type: ignore[method-assign, assignment]
    w.tick(60)
    assert w.states() == {"hot": 1}
    assert [c.id for c in w.ordered if isinstance(c, Destroy)] == [4711]


# -- machines that fail --------------------------------------------------------------------------------


def test_a_machine_that_never_becomes_ready_is_given_back_after_its_deadline() -> None:
    w = World(policy=Fixed(1, 1), load_s=1e9)
    w.tick(w.boot_s + w.deadlines.first_load_s + 30)
    assert "Destroy" in w.kinds()
    assert w.fleet.market.bad_machines != {}


def test_a_machine_stuck_in_loading_is_given_back_after_its_deadline() -> None:
    w = World(policy=Fixed(1, 1), boot_s=1e9)
    w.tick(w.deadlines.loading_s + 30)
    assert "Destroy" in w.kinds()


def test_a_docker_error_that_stays_gives_the_machine_back() -> None:
    w = World(policy=Fixed(1, 1), boot_s=1e9).tick(10)
    (c,) = w.contracts.values()
    c.status_msg = "Error response from daemon: OCI runtime create failed"
    w.tick(w.deadlines.broken_host_s + 10)
    assert "Destroy" in w.kinds()


def test_a_machine_that_failed_is_not_rented_again() -> None:
    w = World(policy=Fixed(1, 1), load_s=1e9)
    w.offers = [make_offer(n, machine=7) for n in range(1, 5)]
    w.tick(w.boot_s + w.deadlines.first_load_s + 600)
    assert [c.offer.machine_id for c in w.ordered if isinstance(c, Create)] == [7]


def test_creates_that_fail_one_after_another_come_ever_slower() -> None:
    w = World(policy=Fixed(1, 1))
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Create) else None
    w.tick(600)
    creates = w.kinds().count("Create")
    assert 3 <= creates <= 6  # 30 + 60 + 120 + 240 s of rest between them


def test_a_fatal_log_line_gives_the_machine_back_at_once() -> None:
    w = World(policy=Fixed(1, 1)).tick(w_boot := 80)
    w.check_hook = lambda _: Verdict.FATAL
    w.tick(15)
    assert "Destroy" in w.kinds()
    assert w_boot == 80


def test_a_failed_check_takes_an_instance_out_of_the_hot_set_and_it_must_earn_hot_again() -> None:
    w = World().with_pool(hot=1, total=1)
    label, version = w.only(), w.fleet.hot_version
    w.check_hook = lambda _: Verdict.FAILED
    w.tick(20)
    assert w.states() == {"running": 1}
    assert w.fleet.hot_version > version
    w.check_hook = lambda _: None
    w.tick(10)
    assert w.states() == {"hot": 1}
    assert w.only() == label


def test_an_instance_that_does_not_recover_is_destroyed_and_replaced_from_the_pool() -> None:
    w = World().with_pool(hot=1, total=2)
    sick = w.only()
    w.check_hook = lambda label: Verdict.FAILED if label == sick else None
    w.tick(w.deadlines.recover_s + 120)
    assert sick not in w.contracts
    assert w.states()["hot"] == 1


def test_a_check_from_before_the_boot_says_nothing_about_it() -> None:
    w = World().with_pool(hot=0, total=1)
    w.policy = Fixed(1, 1)
    old = w.now
    w.tick(w.start_s + 10)
    assert w.states() == {"running": 1}
    w.fleet.judge(HealthCheck(w.only(State.RUNNING), old, Verdict.PASSED, "stale"), w.now)
    assert w.states() == {"running": 1}


def test_a_container_that_ends_by_itself_is_a_failure() -> None:
    w = World().with_pool(hot=1, total=1)
    w.contracts[w.only()].status = "exited"
    w.tick(5)
    assert w.kinds() == ["Destroy"]


def test_an_outbid_instance_is_cold_and_another_is_started() -> None:
    w = World().with_pool(hot=1, total=2)
    outbid = w.only()
    w.contracts[outbid].status, w.contracts[outbid].intended = "exited", "stopped"
    w.tick(10)
    assert w.kinds() == ["Start"]
    w.contracts[outbid].status, w.contracts[outbid].intended = "running", "running"
    w.contracts[outbid].ready_at = w.now
    w.policy = Fixed(2, 2)
    w.tick(120)
    assert w.states() == {"hot": 2}


def test_a_start_whose_gpu_is_taken_is_stopped_and_another_is_started() -> None:
    w = World().with_pool(hot=0, total=2)
    w.start_s = 1e9
    w.policy = Fixed(1, 2)
    w.tick(5)
    (first,) = [c.label for c in w.ordered if isinstance(c, Start)]
    w.start_s = 20
    w.tick(w.deadlines.starting_s + 60)
    starts = [c.label for c in w.ordered if isinstance(c, Start)]
    assert len(starts) == 2
    assert starts[1] != first
    assert any(isinstance(c, Stop) and c.label == first for c in w.ordered)


def test_a_refused_start_leaves_the_instance_cold_and_rests_before_the_next_try() -> None:
    w = World().with_pool(hot=0, total=1)
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Start) else None
    w.policy = Fixed(1, 1)
    w.tick(20)
    assert w.kinds() == ["Start"]
    w.reply_hook = lambda c: None
    w.tick(120)
    assert w.states() == {"hot": 1}


def test_an_offline_host_leaves_the_hot_set_at_once_and_is_replaced_after_its_grace() -> None:
    w = World().with_pool(hot=1, total=2)
    label = w.only()
    w.contracts[label].status = "offline"
    w.check_hook = lambda at: Verdict.FAILED if at == label else None
    w.tick(5)
    assert w.fleet[label].state is State.RUNNING
    w.tick(w.deadlines.lost_s + 10)
    assert label not in w.contracts
    w.tick(120)
    assert w.states()["hot"] == 1


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


# -- restart -------------------------------------------------------------------------------------------


def test_a_restarted_autoscaler_finds_its_fleet_in_one_turn_and_rents_nothing_twice() -> None:
    w = World().with_pool(hot=2, total=4)
    since = {i.label: i.since for i in w.fleet}
    w.restart()
    assert not w.fleet.knows_hot_set()
    w.tick(5)
    assert w.fleet.knows_hot_set()
    assert w.states() == {"hot": 2, "cold": 2}
    w.tick(120)
    assert w.ordered == []
    assert {i.label: i.since for i in w.fleet if i.state is State.COLD} == {
        label: at for label, at in since.items() if w.fleet[label].state is State.COLD
    }


def test_without_its_ledger_it_still_finds_every_instance_by_label() -> None:
    w = World().with_pool(hot=2, total=4)
    w.fleet = w.new_set()
    w.tick(30)
    assert w.states() == {"hot": 2, "cold": 2}
    assert w.ordered == []


def test_an_order_begun_before_a_kill_is_found_again_and_not_repeated() -> None:
    w = World(policy=Fixed(1, 1)).tick(15)
    assert w.kinds() == ["Create"]
    w.restart()
    w.tick(600)
    assert w.kinds() == ["Create"]
    assert w.states() == {"hot": 1}


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


# -- rules as data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frm", State)
@pytest.mark.parametrize("to", State)
def test_only_the_moves_of_the_table_are_possible(frm: State, to: State) -> None:
    legal = to is not frm and (to in TRANSITIONS[frm] or to in FROM_ANYWHERE)
    if legal:
        check_transition(frm, to)
    else:
        with pytest.raises(IllegalTransition):
            check_transition(frm, to)


def test_an_illegal_order_raises_and_changes_nothing() -> None:
    w = World().with_pool(hot=1, total=1)
    before = repr(list(w.fleet))
    label = w.only()
    with pytest.raises(IllegalTransition):
        w.fleet.begin(Start(label, w.contracts[label].id, "hot already"), w.now)
    with pytest.raises(IllegalTransition):
        w.fleet.begin(Stop(label, 99, "another id"), w.now)
    assert repr(list(w.fleet)) == before


def test_deadlines_of_a_sped_up_cloud_leave_room_for_the_command_line() -> None:
    d = Deadlines.for_profile(World().fleet.profile, 1000.0)
    assert min(d.ordered_s, d.loading_s, d.starting_s, d.stopping_s) >= 20


def test_every_state_is_reached_from_somewhere_and_can_be_left() -> None:
    reached = {to for edges in TRANSITIONS.values() for to in edges} | set(FROM_ANYWHERE)
    assert reached == set(State) - {State.ORDERED}


# -- speed ---------------------------------------------------------------------------------------------


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


# -- restart, once more: what must not be concluded from knowing little ---------------------------------


def test_what_was_hot_for_hours_is_not_given_up_by_a_restart_before_it_was_checked() -> None:
    """The first turn comes before the first check: it must not find that nothing was hot for hours."""
    w = World().with_pool(hot=2, total=3).tick(4 * 3600)
    w.restart()
    w.fleet.observe(w.listing(), (), w.now + 2)
    assert w.states() == {"running": 2, "cold": 1}
    assert w.fleet.decide(w.demand, w.policy, w.now + 2).commands == ()
    w.tick(10)
    assert w.states() == {"hot": 2, "cold": 1}
    assert w.ordered == []


def test_nothing_is_checked_before_a_listing_said_where_it_is() -> None:
    """Else the check finds no address, and an empty hot set is told a second after every restart."""
    w = World().with_pool(hot=1, total=1).restart()
    assert w.fleet.checks_due(w.now) == []
    w.fleet.observe(w.listing(), (), w.now)
    assert [order.label for order in w.fleet.checks_due(w.now)] == list(w.contracts)


def test_a_hot_set_is_not_told_while_the_first_listings_lack_what_was_hot() -> None:
    w = World().with_pool(hot=2, total=2).restart()
    w.listing_hook = lambda rows: []
    w.tick(60)
    assert not w.fleet.knows_hot_set()
    w.listing_hook = lambda rows: rows
    w.tick(10)
    assert w.fleet.knows_hot_set()
    assert len(w.fleet.serving()) == 2


def test_a_slow_start_of_ours_gives_an_instance_time_to_be_looked_at() -> None:
    """It waited for its first check for an hour because we were away, not because it is broken."""
    w = World().with_pool(hot=0, total=1)
    w.policy = Fixed(1, 1)
    w.tick(w.start_s + 10)
    assert w.states() == {"running": 1}
    held = w.saved()
    w.now += 3600
    w.restart(held)
    w.fleet.observe(w.listing(), (), w.now)
    assert w.states() == {"running": 1}


def test_a_clock_set_back_between_two_processes_makes_no_instance_come_from_the_future() -> None:
    w = World().with_pool(hot=1, total=2)
    held = w.saved()
    w.now -= 500
    w.restart(held)
    assert all(i.since <= w.now for i in w.fleet)


def test_instances_of_another_fleet_in_the_same_ledger_are_left_alone() -> None:
    w = World(policy=Fixed(0, 0))
    theirs = SavedInstance("other/1", 7, 1, True, True, 0.0, 1.0, "destroying", 5.0)
    w.restart(SavedFleet([theirs]))
    w.contracts["other/1"] = Contract(7, "other/1", 1, 0.4, status="running")
    w.tick(300)
    assert w.ordered == []
    assert list(w.fleet) == []


def test_after_a_restart_an_order_not_yet_listed_still_costs_what_was_agreed() -> None:
    w = World(policy=Fixed(1, 1), limits=Limits(max_instances=9, max_usd_h=1.0)).tick(10)
    for c in w.contracts.values():
        c.hidden = True
    held = w.saved().instances
    assert [r.state for r in held] == ["ordered"] or [r.state for r in held] == ["loading"]
    w.restart(SavedFleet([replace(held[0], state="ordered")]))
    assert w.fleet.committed().usd_h == pytest.approx(0.4)


def test_what_vanished_counts_against_the_limits_after_a_restart_too() -> None:
    w = World()
    w.fleet.restore(SavedFleet(vanished={"fleet/x": (w.now + 100, 0.7)}), w.now)
    assert w.fleet.committed() == Commitment(1, 0.7)
    w.policy = Fixed(0, 0)
    w.tick(110)
    assert w.fleet.committed().instances == 0


# -- views that lie, once more --------------------------------------------------------------------------


def test_an_empty_listing_for_a_minute_takes_nothing_out_of_service() -> None:
    w = World().with_pool(hot=2, total=3)
    version = w.fleet.hot_version
    w.listing_hook = lambda rows: []
    w.tick(90)
    assert w.ordered == []
    assert (w.states(), w.fleet.hot_version) == ({"hot": 2, "cold": 1}, version)


def test_what_answers_a_test_prompt_exists_whatever_the_listing_says() -> None:
    w = World().with_pool(hot=3, total=3)
    hidden = next(iter(w.contracts.values()))
    hidden.hidden = True
    w.tick(3600)
    assert w.states() == {"hot": 3}
    assert w.ordered == []


def test_what_is_neither_listed_nor_answers_counts_for_a_while_and_is_then_replaced() -> None:
    w = World(limits=Limits(max_instances=3, max_usd_h=10)).with_pool(hot=3, total=3)
    hidden = next(iter(w.contracts.values()))
    hidden.hidden = True
    w.check_hook = lambda label: Verdict.FAILED if label == hidden.label else None
    w.tick(120)
    assert w.states() == {"hot": 2}
    assert w.kinds() == [], "it may still exist, so the limit is reached"
    del w.contracts[hidden.label]
    w.tick(w.deadlines.vanished_s)
    assert w.kinds() == ["Create"]


def test_a_whole_fleet_destroyed_by_hand_is_replaced() -> None:
    w = World().with_pool(hot=1, total=2)
    w.contracts.clear()
    w.check_hook = lambda label: Verdict.FAILED if label not in w.contracts else None
    w.tick(w.deadlines.disbelief_s - 10)
    assert w.ordered == []
    w.tick(60)
    assert "Create" in w.kinds()


def test_an_offline_host_is_not_hot_although_a_test_prompt_came_back() -> None:
    """Hot needs actual_status running; else it would go in and out of the hot set at every check."""
    w = World().with_pool(hot=1, total=1)
    w.contracts[w.only()].status = "offline"
    w.tick(30)
    assert w.states() == {"running": 1}


def test_a_stop_that_met_an_outage_costs_no_loaded_disk() -> None:
    w = World().with_pool(hot=1, total=1)
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Stop) else None
    w.policy = Fixed(0, 1)
    w.tick(20)
    assert w.states() == {"stopping": 1}
    w.listing_works = False
    w.tick(4 * w.deadlines.stopping_s)
    w.listing_works, w.reply_hook = True, lambda c: None
    w.tick(60)
    assert w.states() == {"cold": 1}
    assert "Destroy" not in w.kinds()


def test_destroyed_is_what_the_cloud_says_is_destroyed() -> None:
    """A listing that lacks it is not enough when the order itself was lost."""
    w = World().with_pool(hot=0, total=1)
    (label,) = w.contracts
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Destroy) else None
    w.policy = Fixed(0, 0)
    w.tick(5)
    w.contracts[label].hidden = True
    w.tick(20)
    assert w.states() == {"destroying": 1}
    w.contracts[label].hidden = False
    w.reply_hook = lambda c: None
    w.tick(60)
    assert w.contracts == {}
    assert list(w.fleet) == []


# -- orders on their way --------------------------------------------------------------------------------


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


def test_the_market_is_searched_once_at_a_time() -> None:
    w = World(policy=Fixed(1, 1))
    w.fleet.observe([], (), w.now)
    (look,) = w.fleet.decide(w.demand, w.policy, w.now).commands
    assert isinstance(look, LookForOffers)
    w.fleet.begin(look, w.now)
    assert w.fleet.decide(w.demand, w.policy, w.now + 5).commands == ()
    w.fleet.finish(look, Performed(Reply.UNKNOWN), w.now + 20)
    assert w.fleet.decide(w.demand, w.policy, w.now + 25).commands == (look,)


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


def test_starts_that_are_refused_for_an_hour_are_tried_again_within_minutes() -> None:
    w = World().with_pool(hot=0, total=1)
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Start) else None
    w.policy = Fixed(1, 1)
    w.tick(4 * 3600)
    w.reply_hook = lambda c: None
    w.tick(w.deadlines.no_gpu_rest_s + 60)
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


def test_creates_that_fail_together_count_as_one_failure() -> None:
    w = World(policy=Fixed(4, 4))
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Create) else None
    w.tick(10)
    assert w.kinds() == ["Create"] * 4
    w.reply_hook = lambda c: None
    w.tick(w.deadlines.create_rest_s + 10)
    assert w.kinds() == ["Create"] * 8


def test_an_offer_that_somebody_else_took_costs_no_rest() -> None:
    w = World(policy=Fixed(1, 1))
    w.fleet.observe([], (), w.now)
    w.fleet.finish(LookForOffers(""), Performed(Reply.DONE, offers=tuple(w.offers)), w.now)
    (create,) = w.fleet.decide(w.demand, w.policy, w.now).commands
    assert isinstance(create, Create)
    create = with_label(create, "fleet/a")
    w.fleet.begin(create, w.now)
    w.fleet.finish(create, Performed(Reply.REFUSED, "no_such_ask", offer_gone=True), w.now)
    assert [type(c) for c in w.fleet.decide(w.demand, w.policy, w.now).commands] == [LookForOffers]


# -- draining, once more --------------------------------------------------------------------------------


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


def test_requests_are_given_their_time_to_end_on_a_sped_up_cloud_too() -> None:
    profile = World().fleet.profile
    fast, real = Deadlines.for_profile(profile, 1000.0), Deadlines.for_profile(profile)
    assert (fast.draining_s, fast.lease_s, fast.disbelief_s) == (
        real.draining_s,
        real.lease_s,
        real.disbelief_s,
    )


# -- limits, checks and reasons -------------------------------------------------------------------------


def test_a_start_is_no_new_instance_for_the_limit() -> None:
    w = World().with_pool(hot=0, total=3)
    w.limits = Limits(max_instances=2, max_usd_h=10)
    w.restart().fleet.observe(w.listing(), (), w.now)
    commands = w.fleet.decide(w.demand, Fixed(1, 3), w.now).commands
    assert [type(c) for c in commands if isinstance(c, Start)] == [Start]


def test_a_failed_order_that_was_never_listed_counts_with_its_price() -> None:
    w = World(policy=Fixed(1, 1)).tick(10)
    (c,) = w.contracts.values()
    c.hidden = True
    w.fleet.set_manage(False)
    w.tick(w.deadlines.ordered_s + 10)
    assert w.states() == {"failed": 1}
    assert w.fleet.committed().usd_h == pytest.approx(c.usd_h)


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
    (gone, *_) = w.fleet.describe_gone(w.now)
    assert (gone["state"], gone["why"]) == ("gone", "destroyed (was destroying: fatal)")


def test_what_an_instance_says_of_itself_makes_it_neither_hot_nor_failed() -> None:
    w = World(policy=Fixed(1, 1)).tick(80)
    label = w.only(State.RUNNING)
    for number, said in enumerate(("ready", "failed: no such model")):
        assert w.fleet.record_message(label, "boot", number, said)
        assert w.fleet[label].state is State.RUNNING
        assert w.fleet[label].why == f"it says: {said}"
        assert [order.label for order in w.fleet.checks_due(w.now)] == [label]
        assert not w.fleet.record_message(label, "boot", number, said), "heard before"
    assert not w.fleet.record_message("fleet/unknown", "boot", 9, "ready")


def test_a_measured_rate_that_hardly_changed_is_not_written_down_again() -> None:
    w = World().with_pool(hot=1, total=1)
    (i,) = w.fleet
    assert i.id is not None
    w.fleet.journal.take()
    w.fleet.record_report({i.id: i.throughput_work_s * 1.01, 99: 5.0}, ())
    assert w.fleet.journal.take().instances == {}
    w.fleet.record_report({i.id: 500.0}, ())
    assert [r.throughput for r in w.fleet.journal.take().instances.values()] == [500.0]


# -- the loop -------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


class Loop:
    """An Autoscaler on a fake cloud whose listing is the world's, with a clock that stands still."""

    def __init__(
        self,
        ledger: Ledger,
        world: World | None = None,
        policy: Fixed | None = None,
        new_label: Callable[[], str] = lambda: secrets.token_hex(6),
    ) -> None:
        self.world = world or World()
        self.cloud = FakeVast(lambda: self.world.listing())
        self.scaler = Autoscaler(
            self.world.new_set(),
            policy or Fixed(0, 0),
            Demand("e1"),
            self.cloud,  # type: ignore[arg-type]
            self.cloud,  # type: ignore[arg-type]
            ledger,
            lambda: self.world.now,
            new_label,
        )

    def send_all(self) -> None:
        """Perform what is queued."""
        while self.scaler.orders.first() is not None:
            self.scaler.perform_next()


def test_an_order_is_in_the_ledger_before_it_is_sent(ledger: Ledger) -> None:
    """kill -9 in between: the next process counts it, and looks for its label."""
    loop = Loop(ledger, policy=Fixed(1, 1))
    loop.scaler.turn()
    loop.send_all()
    loop.scaler.turn()  # ordered, not sent
    assert [type(c) for c in loop.cloud.sent] == [LookForOffers]
    again = Loop(ledger, loop.world, Fixed(1, 1))
    (i,) = again.scaler.instances
    assert i.state is State.ORDERED
    assert i.running_usd_h == pytest.approx(0.4)
    again.scaler.turn()
    again.send_all()
    assert again.cloud.sent == []


def test_what_cannot_be_written_down_is_not_sent_and_is_written_later(ledger: Ledger) -> None:
    loop = Loop(ledger, policy=Fixed(1, 1))
    loop.scaler.turn()
    loop.send_all()
    write, ledger.write = ledger.write, full_disk  # type: ignore[method-assign]
    with pytest.raises(sqlite3.Error):
        loop.scaler.turn()
    loop.send_all()
    assert [type(c) for c in loop.cloud.sent] == [LookForOffers]
    assert list(loop.scaler.instances) == []
    ledger.write = write  # type: ignore[method-assign]
    loop.scaler.turn()
    assert [s.state for s in ledger.costs(0.0, 1e12).intervals] == ["ordered"]


def full_disk(entries: Entries) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_the_ledger_learns_in_the_order_things_happened(ledger: Ledger) -> None:
    """Two threads at once: the one that took its part first also writes it first."""
    w = World().with_pool(hot=1, total=1)
    loop = Loop(ledger, w)
    loop.scaler.set_policy(Fixed(1, 1))
    loop.scaler.turn()
    label = next(iter(w.contracts))
    write, entered, go_on = ledger.write, threading.Event(), threading.Event()

    def slow_once(entries: Entries) -> None:
        ledger.write = write  # type: ignore[method-assign]
        entered.set()
        assert go_on.wait(10)
        write(entries)

    ledger.write = slow_once  # type: ignore[method-assign]
    w.now += 1
    first = threading.Thread(
        target=loop.scaler.judge, args=(HealthCheck(label, w.now, Verdict.PASSED, "first"),)
    )
    first.start()
    assert entered.wait(10)
    second = threading.Thread(
        target=loop.scaler.judge, args=(HealthCheck(label, w.now, Verdict.FAILED, "second"),)
    )
    second.start()
    while loop.scaler.instances[label].state is not State.RUNNING:
        time.sleep(0.001)
    go_on.set()
    first.join(10)
    second.join(10)
    assert [r.state for r in ledger.saved_fleet(w.now).instances] == ["running"]


def test_a_fault_of_ours_in_sending_answers_the_order_and_the_loop_goes_on(ledger: Ledger) -> None:
    loop = Loop(ledger, World().with_pool(hot=1, total=1))
    loop.scaler.turn()
    (i,) = loop.scaler.instances
    loop.cloud.error = KeyError("a bug")
    loop.scaler.destroy_all("a person asked")
    loop.send_all()
    assert i.orders.out == 0
    assert [(f.reply, "KeyError" in f.why) for f in loop.scaler.failures] == [(Reply.UNKNOWN, True)]


def test_stops_are_sent_before_creates() -> None:
    """A create waits for the one before; what costs money or serves must not wait behind it."""
    orders = OrderQueue()
    create = Create(make_offer(1), "more", "fleet/a")
    for command in (create, LookForOffers("more"), Destroy("fleet/b", 2, ""), Stop("fleet/c", 3, "")):
        orders.put(command)
    orders.put(Drain("fleet/d", 4, "nothing is asked of the cloud"))
    orders.end()
    sent = [type(taken) for taken in iter(orders.take, None)]
    assert sent == [Stop, Destroy, Create, LookForOffers]


def test_an_autoscaler_that_ends_rents_nothing_more_but_stops_what_it_meant_to_stop(ledger: Ledger) -> None:
    w = World().with_pool(hot=1, total=1)
    (label,) = w.contracts
    loop = Loop(ledger, w, Fixed(1, 1))
    loop.scaler.turn()
    loop.scaler.judge(HealthCheck(label, w.now, Verdict.PASSED, "ok"))
    loop.scaler.set_policy(Fixed(0, 1))
    loop.scaler.turn()  # begins the drain
    w.now += w.deadlines.lease_s + 20
    loop.scaler.judge(HealthCheck(label, w.now, Verdict.PASSED, "idle", in_flight=0))
    loop.scaler.instances.finish(LookForOffers(""), Performed(Reply.DONE, offers=(make_offer(1),)), w.now)
    loop.scaler.set_policy(Fixed(0, 2))
    assert [type(c) for c in loop.scaler.turn().commands] == [Stop, Create]
    loop.scaler.stop_performing()
    while loop.scaler.perform_next():
        pass
    assert [type(c) for c in loop.cloud.sent] == [Stop]
    assert [i.label for i in loop.scaler.instances] == [label], "what was not sent was not ordered"


def test_why_a_listing_failed_stands_in_the_decisions(ledger: Ledger) -> None:
    loop = Loop(ledger)
    loop.cloud.listing_error = CloudError("vastai show instances: expected JSON, got nothing")
    loop.scaler.turn()
    assert "vastai show instances: expected JSON, got nothing" in loop.scaler.decisions[-1].notes
    assert loop.scaler.last_good_turn is None


def test_only_rows_of_the_fleet_are_read(ledger: Ledger) -> None:
    """An odd row of somebody else in the account must not stop everything."""
    loop = Loop(ledger)
    loop.scaler.turn()
    assert loop.cloud.prefixes == ["fleet/"]


def test_a_step_of_the_machines_clock_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour at once would pass every deadline and give the whole fleet up."""
    clock = steady_clock()
    before = clock()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
    assert clock() - before < 60.0


def test_a_turn_whose_listing_is_not_believed_is_not_a_good_one(ledger: Ledger) -> None:
    loop = Loop(ledger, World().with_pool(hot=1, total=2))
    loop.scaler.turn()
    good = loop.scaler.last_good_turn
    loop.world.now += 5
    for c in loop.world.contracts.values():
        c.hidden = True
    assert loop.scaler.turn().commands == ()
    assert (loop.scaler.last_good_turn, loop.scaler.last_error) == (
        good,
        "the listing lacks most of the fleet",
    )


def test_an_instance_that_may_have_requests_from_before_a_restart_is_drained_not_cancelled() -> None:
    """It had just failed a check when the process was killed, and its clients still read their answers."""
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.fleet.judge(HealthCheck(label, w.now, Verdict.FAILED, "once"), w.now)
    assert w.states() == {"running": 1}
    w.restart()
    w.fleet.observe(w.listing(), (), w.now)
    assert w.fleet.decide(w.demand, Fixed(0, 1), w.now).commands == ()


# -- what a policy sees ----------------------------------------------------------------------------------


def said(world: World, at: float, requests: int) -> None:
    """A loadbalancer has counted so many requests of 500 tokens to read and 150 to answer."""
    world.demand.add_report(
        Report(
            *("lb", "e1", 0, 0.0, 0.0, 0, requests, 200.0 * requests),
            arrived_prompt_tokens=500 * requests,
            arrived_output_tokens=150.0 * requests,
        ),
        at,
    )


def test_the_capacity_is_that_of_the_median_hot_instance_with_the_requests_there_are() -> None:
    w = World(loadbalancer=False).with_pool(hot=3, total=5)
    w.measure(900.0, 1000.0, 5000.0, state=State.HOT)
    said(w, w.now - 1.0, 0)
    said(w, w.now, 10)
    seen = w.fleet.snapshot(w.demand, w.now)
    # 200 work each, held for 6 s; an answer of 150 tokens is half there.
    assert seen.capacity == Capacity(1000.0, 5.0, 30.0, 30.0 * 575.0)
    assert seen.traffic.requests_total == 10
    assert list(seen.arriving) == []
    assert (seen.hot, seen.cold) == (3, 2)


def test_with_nothing_hot_the_capacity_is_that_of_what_is_loaded_and_then_the_profiles() -> None:
    w = World().with_pool(hot=0, total=2)
    w.measure(700.0, 700.0)
    capacity = w.fleet.snapshot(w.demand, w.now).capacity
    assert capacity is not None
    assert capacity.work_s == 700.0
    assert World().fleet.snapshot(Demand("e"), 0.0).capacity == Capacity(
        620.0, 620.0 / 210.0, 620.0 * 6.0 / 210.0, 620.0 * 6.0 / 210.0 * 390.0
    ), "300 tokens to read and 180 to answer, until something has arrived"


def test_prices_are_those_of_the_median_instance() -> None:
    w = World().with_pool(hot=1, total=3)
    w.reprice(0.3, 0.5, 9.0)
    seen = w.fleet.snapshot(w.demand, w.now)
    assert (seen.running_usd_h, seen.stopped_usd_h) == (0.5, 0.01)
    empty = World().fleet.snapshot(Demand("e"), 0.0)
    assert (empty.running_usd_h, empty.stopped_usd_h) == (0.0, 0.0)


class LooksBack(Fixed):
    """Remembers what it was shown; looks back for a minute."""

    seen: FleetSnapshot

    @property
    def memory_s(self) -> float:
        return 60.0

    def targets(self, seen: FleetSnapshot) -> Targets:
        object.__setattr__(self, "seen", seen)
        return super().targets(seen)


def test_a_policy_sees_as_far_back_as_it_looks() -> None:
    w = World()
    w.policy = policy = LooksBack(0, 0)
    w.demand.add_report(Report("lb", "e1", 0, 0.0, 0.0, 0, 0, 0.0), w.now)
    w.tick(300.0)
    seen = policy.seen
    assert [t for t, _ in seen.demand] == [w.now - 60.0 + 5.0 * n for n in range(13)]
    assert len(seen.arriving) == 12


# -- bursts, markets and GPUs ----------------------------------------------------------------------------


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


def test_a_market_with_no_offers_leaves_what_there_is_managed() -> None:
    w = World().with_pool(hot=1, total=3)
    w.offers = []
    w.fleet.finish(LookForOffers(""), Performed(Reply.DONE, offers=()), w.now)
    w.policy = Fixed(3, 8)
    w.tick(300.0)
    assert w.states() == {"hot": 3}
    decision = w.fleet.decide(w.demand, w.policy, w.now)
    assert "no suitable offer on the market" in decision.notes or "looking at the market" in decision.notes
    w.policy = Fixed(1, 8)
    w.tick(120.0)
    assert w.states() == {"hot": 1, "cold": 2}
    w.offers = [make_offer(n) for n in range(50, 60)]
    w.tick(130.0)
    assert w.kinds().count("Create") == 5, "and it goes on when there are offers again"


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
        replace(r, actual_status="exited", intended_status="running") if r.label in tried[1:2] else r
        for r in rows
    ]
    w.policy = Fixed(2, 4)
    w.tick(200.0)
    started = [c.label for c in w.ordered if isinstance(c, Start)]
    assert len(set(started)) == 3
    assert w.states()["hot"] == 2


def test_the_dearest_for_its_work_is_drained_and_not_the_dearest() -> None:
    w = World().with_pool(hot=3, total=3)
    first, *_ = w.fleet
    w.reprice(0.5, 2.0, 0.4)
    w.measure(500.0, 4000.0, 950.0)
    w.policy = Fixed(2, 3)
    w.tick(TURN_S)
    assert [c.label for c in w.ordered if isinstance(c, Drain)] == [first.label]


# -- what is counted -------------------------------------------------------------------------------------


def test_turns_in_which_the_policy_was_clamped_are_counted(ledger: Ledger) -> None:
    loop = Loop(ledger, policy=Fixed(-1, 10**9))
    for _ in range(3):
        loop.world.now += TURN_S
        decision = loop.scaler.turn()
    assert decision.clamped == ("hot", "total")
    assert loop.scaler.clamps == {"hot": 3, "total": 3}
    loop.scaler.set_policy(Fixed(0, 1))
    loop.world.now += TURN_S
    assert loop.scaler.turn().clamped == ()
    assert loop.scaler.clamps == {"hot": 3, "total": 3}


def test_what_new_instances_are_called_can_be_given(ledger: Ledger) -> None:
    names = iter(["one", "two"])
    loop = Loop(ledger, policy=Fixed(0, 2), new_label=lambda: next(names))
    loop.scaler.turn()
    loop.send_all()
    loop.world.now += TURN_S
    loop.scaler.turn()
    assert [i.label for i in loop.scaler.instances] == ["fleet/one"]


def counted(loop: Loop, at: float, requests: int, working_s: float = 0.0) -> None:
    loop.world.now = at
    loop.scaler.record_report(
        Report(
            *("lb", "e1", 0, 0.0, 0.0, 0, requests, 200.0 * requests),
            arrived_prompt_tokens=500 * requests,
            working_s={1001: working_s},
        ),
        {},
    )


def test_arrivals_survive_a_restart(ledger: Ledger) -> None:
    loop = Loop(ledger)
    for n in range(61):
        counted(loop, 2000.0 + n, 3 * n)
        if n % 5 == 0:
            loop.scaler.turn()
    loop.world.now = 2065.0
    loop.scaler.turn()
    again = Loop(ledger, loop.world)
    counted(again, 2066.0, 500)
    counted(again, 2067.0, 502)
    seen = again.scaler.demand.arriving(2067.0, 3600.0)
    assert list(seen) == pytest.approx([600.0] * 11 + [360.0, 80.0], abs=121.0)
    assert seen.sum() * 5.0 == pytest.approx(60 * 600.0 + 2 * 200.0, abs=2 * 600.0)
    assert again.scaler.demand.mix is not None
    assert again.scaler.demand.mix.work == pytest.approx(200.0)


def test_counts_are_written_every_half_minute_and_what_fails_is_written_later(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(ledger, World().with_pool(hot=1, total=1), policy=Fixed(1, 1))
    loop.scaler.turn()
    start = loop.world.now
    counted(loop, start + 1.0, 0)
    counted(loop, start + 2.0, 3, working_s=1.0)
    loop.scaler.turn()
    assert ledger.arrived(0.0, 1e9) == []
    add, broken = ledger.add_counts, True

    def fails(*what: Any) -> None:
        if broken:
            raise sqlite3.OperationalError("disk full")
        add(*what)

    monkeypatch.setattr(ledger, "add_counts", fails)
    loop.world.now = start + COUNTS_EVERY_S
    with pytest.raises(sqlite3.OperationalError):
        loop.scaler.turn()
    broken = False
    loop.scaler.write_counts()
    assert ledger.arrived(0.0, 1e9) == [Arrived(int(start + 1.0), 3.0, 600.0, 1500.0)]
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("SELECT SUM(seconds) FROM worked").fetchone() == (1.0,)


def test_the_range_of_start_times_is_that_of_the_measured_ones() -> None:
    fleet = World().new_set()
    assert fleet.durations.start_range_s == pytest.approx((60.0, 120.0)), (
        "90 s by the profile, a third less and more"
    )
    fleet.restore(SavedFleet(start_times_s=[80.0, 130.0, 70.0], load_times_s=[500.0]), 0.0)
    assert fleet.durations.start_range_s == (70.0, 130.0)
    assert (fleet.durations.start_s, fleet.durations.load_s) == (80.0, 500.0)
