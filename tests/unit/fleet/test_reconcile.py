"""How instances move from state to state: boots, checks, failures, lost orders, restarts."""

from dataclasses import replace

import pytest

from fleet.commands import Create, Destroy, Reply, Start, Stop
from fleet.health_check import HealthCheck, Verdict
from fleet.journal import SavedFleet, SavedInstance
from fleet.states import GIVEN_UP, IllegalTransition, State
from policies import Fixed
from tests.fleet_world import Contract, World


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


def test_a_start_whose_gpu_is_there_gets_the_time_that_a_slow_docker_takes() -> None:
    """The service schedules for 30 s, and then the host starts the container."""
    w = World().with_pool(hot=0, total=1)
    w.start_s = 200.0
    w.policy = Fixed(1, 1)
    w.tick(10)
    w.listing_hook = lambda rows: [
        replace(r, actual_status="loading", cur_state="running") if r.actual_status != "running" else r
        for r in rows
    ]
    w.tick(w.deadlines.starting_s + 60)
    assert w.states() == {"starting": 1}
    w.tick(300)
    assert (w.states(), w.kinds().count("Start")) == ({"hot": 1}, 1)


def test_a_host_that_gives_up_loading_is_seen_in_two_listings_and_avoided() -> None:
    """It was noticed after 1,805 s: `actual_status` loading and `intended_status` stopped."""
    w = World(policy=Fixed(1, 1)).tick(20)
    label = w.only(State.LOADING)
    (contract,) = w.contracts.values()
    contract.status, contract.intended, contract.up_at = "loading", "stopped", None
    w.turn()
    w.fleet.note_credit(100.0, w.now)  # it is looked at because of that
    assert w.fleet[label].state is State.LOADING, "once may be a slip"
    w.tick()
    assert label not in w.fleet or w.fleet[label].state in GIVEN_UP
    assert w.fleet.market.bad_machines.keys() == {contract.machine_id}
    assert "gave up" in w.fleet.market.bad_reasons[contract.machine_id]


def test_without_credit_no_host_is_blamed_for_giving_up() -> None:
    w = World(policy=Fixed(1, 1)).tick(20)
    (contract,) = w.contracts.values()
    contract.status, contract.intended, contract.up_at = "loading", "stopped", None
    w.turn()
    w.fleet.note_credit(0.0, w.now)
    w.tick(120)
    assert w.fleet.market.bad_machines == {}


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


def test_an_illegal_order_raises_and_changes_nothing() -> None:
    w = World().with_pool(hot=1, total=1)
    before = repr(list(w.fleet))
    label = w.only()
    with pytest.raises(IllegalTransition):
        w.fleet.begin(Start(label, w.contracts[label].id, "hot already"), w.now)
    with pytest.raises(IllegalTransition):
        w.fleet.begin(Stop(label, 99, "another id"), w.now)
    assert repr(list(w.fleet)) == before


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


def test_an_offline_host_is_not_hot_although_a_test_prompt_came_back() -> None:
    """Hot needs actual_status running; else it would go in and out of the hot set at every check."""
    w = World().with_pool(hot=1, total=1)
    w.contracts[w.only()].status = "offline"
    w.tick(30)
    assert w.states() == {"running": 1}


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


def test_starts_that_are_refused_for_an_hour_are_tried_again_within_minutes() -> None:
    w = World().with_pool(hot=0, total=1)
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Start) else None
    w.policy = Fixed(1, 1)
    w.tick(4 * 3600)
    w.reply_hook = lambda c: None
    w.tick(w.deadlines.no_gpu_rest_s + 60)
    assert w.states() == {"hot": 1}
