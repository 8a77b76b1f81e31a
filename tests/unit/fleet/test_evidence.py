"""What it takes to call a machine broken: a fault of ours is never a verdict on it."""

from dataclasses import replace

import pytest

from fleet.accusations import final_accusation
from fleet.commands import Create, Destroy, Start
from fleet.evidence import Accusation, Circumstances, Health, Source, weigh
from fleet.health_check import HealthCheck, Verdict
from fleet.instance_messages import Hearing
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World
from web.messages.reports import ReadyBody

CHECK, LISTING, WORD = Source.CHECK, Source.LISTING, Source.WORD
ALONE = Circumstances(believed=True, others_well=False, reach=Health.WELL, together_s=600.0)
OTHERS_WELL = replace(ALONE, others_well=True)
BLIND = replace(OTHERS_WELL, believed=False)
CUT_OFF = replace(ALONE, reach=Health.UNKNOWN)

FATAL = Accusation("a fatal line", frozenset({CHECK, WORD}), 1.0, 180.0, final=True)
ENDED = Accusation("ended", frozenset({LISTING}), 1.0, 10.0, final=True)
SLOW = Accusation("not hot", frozenset({CHECK}), 181.0, 180.0)
SILENT = Accusation("silent", frozenset({CHECK}), 181.0, 180.0, silent=True, silent_s=181.0)


@pytest.mark.parametrize(
    ("accusation", "around", "health"),
    [
        (FATAL, ALONE, Health.BROKEN),  # two kinds
        (FATAL, BLIND, Health.UNKNOWN),
        (ENDED, ALONE, Health.UNKNOWN),  # one kind
        (ENDED, OTHERS_WELL, Health.BROKEN),  # one kind, while others are well
        (replace(ENDED, against=frozenset({LISTING, CHECK})), ALONE, Health.BROKEN),
        (replace(ENDED, lasts_s=11.0), ALONE, Health.BROKEN),  # its deadline has passed
        (SLOW, ALONE, Health.BROKEN),
        (replace(SLOW, lasts_s=179.0), OTHERS_WELL, Health.UNKNOWN),
        (SILENT, OTHERS_WELL, Health.BROKEN),
        (SILENT, ALONE, Health.UNKNOWN),  # it may be our own network
        (replace(SILENT, silent_s=601.0), ALONE, Health.BROKEN),  # a fleet of one must not bill for ever
        (replace(SILENT, silent_s=6e9), CUT_OFF, Health.UNKNOWN),  # until our own check says so
        (replace(SILENT, against=frozenset({CHECK, LISTING})), CUT_OFF, Health.BROKEN),
        (SILENT, BLIND, Health.UNKNOWN),
    ],
)
def test_broken_needs_two_kinds_or_others_that_are_well_or_a_deadline(
    accusation: Accusation, around: Circumstances, health: Health
) -> None:
    ruling = weigh(accusation, around)
    assert ruling.health is health
    assert accusation.why in ruling.evidence


def all_silent(_: str) -> Verdict:
    return Verdict.FAILED


def test_checks_that_all_fail_together_destroy_ban_and_rent_nothing() -> None:
    """Field fault C1: ports dropped and ssh hanging for 130 s, and for ten minutes."""
    w = World().with_pool(hot=2, total=4)
    w.check_hook = all_silent
    w.tick(w.deadlines.together_s - 60)
    assert w.states().get("hot", 0) == 0, "out of the queue"
    assert not any(isinstance(c, Create | Destroy) for c in w.ordered)
    assert w.fleet.market.bad_machines == {}
    assert len(w.contracts) == 4
    w.check_hook = lambda _: None
    w.tick(120)
    assert w.states() == {"hot": 2, "cold": 2}
    assert not any(isinstance(c, Create | Destroy) for c in w.ordered)


@pytest.mark.parametrize("reach", [Health.UNKNOWN, Health.BROKEN])
def test_while_our_own_network_is_not_known_to_work_silence_destroys_nothing(reach: Health) -> None:
    w = World(reach=reach).with_pool(hot=2, total=2)
    w.check_hook = all_silent
    w.tick(6 * 3600)
    assert w.ordered == []
    assert w.states() == {"running": 2}


def test_a_fleet_of_one_that_is_silent_for_ever_does_not_bill_for_ever() -> None:
    w = World().with_pool(hot=1, total=1)
    (label,) = w.contracts
    w.check_hook = lambda at: Verdict.FAILED if at == label else None
    w.tick(w.deadlines.together_s - 30)
    assert w.ordered == []
    w.tick(120)
    assert label not in w.contracts
    [destroy] = [c for c in w.ordered if isinstance(c, Destroy)]
    assert "nobody answered" in destroy.evidence


def test_one_silent_machine_is_replaced_by_a_cold_one_which_then_accuses_it() -> None:
    w = World().with_pool(hot=1, total=2)
    sick = w.only()
    w.check_hook = lambda at: Verdict.FAILED if at == sick else None
    w.tick(w.deadlines.recover_s + 20)
    assert [type(c) for c in w.ordered] == [Start]
    assert sick in w.contracts
    w.tick(w.start_s + w.reload_s + 30)
    assert sick not in w.contracts
    assert w.states()["hot"] == 1


def test_the_first_machine_that_answers_again_accuses_none_whose_check_had_begun_before() -> None:
    """Our own network comes back after a minute: one is looked at a moment before the other."""
    w = World().with_pool(hot=2, total=2)
    first, second = w.contracts
    w.check_hook = all_silent
    w.tick(w.deadlines.recover_s + 20)
    began = w.now
    w.now += 1.0
    w.fleet.judge(HealthCheck(first, w.now, Verdict.PASSED, "ok"), w.now)
    w.now += 1.0
    w.fleet.judge(HealthCheck(second, began, Verdict.FAILED, "no answer"), w.now)
    w.fleet.observe(w.listing(), (), w.now)
    w.check_hook = lambda _: None
    w.tick(20)
    assert {first, second} == set(w.contracts)
    assert w.states() == {"hot": 2}


def test_a_check_that_began_before_our_network_failed_accuses_nobody() -> None:
    """One machine was seen well a moment before both became silent: that is no evidence against the other."""
    w = World().with_pool(hot=2, total=2)
    first, second = w.contracts
    w.check_hook = lambda at: Verdict.FAILED if at == first else None
    w.tick(5)
    w.check_hook = all_silent
    w.tick(w.deadlines.recover_s + 60)
    assert {first, second} == set(w.contracts)


@pytest.mark.parametrize("verdict", [Verdict.UNKNOWN])
def test_a_fault_of_ours_takes_machines_out_of_the_queue_and_never_out_of_the_fleet(verdict: Verdict) -> None:
    w = World().with_pool(hot=2, total=2)
    w.check_hook = lambda _: verdict
    w.tick(w.deadlines.recover_s + 120)
    assert w.states() == {"running": 2}
    assert w.ordered == []
    w.check_hook = lambda _: None
    w.tick(20)
    assert w.states() == {"hot": 2}


def test_a_computer_that_slept_gives_every_machine_time_to_be_looked_at() -> None:
    w = World().with_pool(hot=1, total=2)
    w.policy = Fixed(2, 2)
    w.tick(w.start_s + 10)
    assert w.states()["running"] == 1
    w.check_hook = lambda _: Verdict.LOADING
    w.now += 3600.0
    w.turn()
    assert not any(isinstance(c, Destroy) for c in w.ordered)


def test_a_listing_that_says_ended_while_the_machine_answers_destroys_nothing_at_once() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.contracts[label].status = "exited"
    w.check_hook = lambda _: Verdict.PASSED
    w.turn()
    assert w.fleet[label].state is State.RUNNING
    assert w.ordered == []


def test_what_destroys_and_creates_says_its_evidence() -> None:
    w = World().with_pool(hot=1, total=1)
    w.check_hook = lambda _: Verdict.FATAL
    w.tick(600)
    destroys = [c for c in w.ordered if isinstance(c, Destroy)]
    creates = [c for c in w.ordered if isinstance(c, Create)]
    assert destroys
    assert creates
    assert all("broken: " in c.evidence or "asked for before" in c.evidence for c in destroys)
    assert all("wanted 1 hot and 1 in all" in c.evidence for c in creates)
    assert all(w.fleet.market.bad_reasons[m] for m in w.fleet.market.bad_machines)


def without_gpu(w: World, *labels: str) -> None:
    """Starts of these wait for a GPU for ever."""
    for label in labels:
        w.contracts[label].up_at = None if w.contracts[label].status == "exited" else w.contracts[label].up_at


def tick_without_gpu(w: World, seconds: float, *labels: str) -> None:
    end = w.now + seconds
    while w.now < end:
        w.tick()
        without_gpu(w, *(label for label in labels if label in w.contracts))


def test_a_machine_whose_gpu_is_taken_is_given_up_once_another_has_started() -> None:
    w = World().with_pool(hot=0, total=2)
    taken, other = w.contracts
    w.reprice(0.1, 0.9)  # it is tried first
    w.policy = Fixed(1, 2)
    tick_without_gpu(w, 3600, taken)
    assert w.states()["hot"] == 1
    assert other in w.contracts
    w.policy = Fixed(2, 2)
    tick_without_gpu(w, 3600, taken)
    assert taken not in w.contracts
    (given_up,) = [c for c in w.ordered if isinstance(c, Destroy)]
    assert given_up.evidence.startswith("broken: 3 starts found no GPU (the listing, while others are well)")
    assert w.fleet.market.bad_machines == {}, "another customer has it; the machine is well"


def test_a_cloud_in_which_nothing_starts_gives_up_nothing_for_an_hour() -> None:
    """All starts of the fleet fail together: that is the cloud, and not each of its machines."""
    w = World().with_pool(hot=0, total=3)
    pool = set(w.contracts)
    w.policy = Fixed(3, 3)
    tick_without_gpu(w, 6 * (w.deadlines.starting_s + w.deadlines.no_gpu_rest_s) - 60, *pool)
    assert [i.boot.failed_starts >= 4 for i in w.fleet] == [True] * 3
    assert set(w.contracts) == pool
    assert w.fleet.market.bad_machines == {}
    w.tick(3600)
    assert w.states() == {"hot": 3}
    assert set(w.contracts) == pool
    assert all(i.boot.failed_starts == 0 and i.boot.no_gpu_since is None for i in w.fleet)


def test_a_fleet_of_one_whose_gpu_is_taken_for_good_is_replaced() -> None:
    w = World().with_pool(hot=0, total=1)
    (taken,) = w.contracts
    w.policy = Fixed(1, 1)
    tick_without_gpu(w, 3 * 3600, taken)
    assert taken not in w.contracts
    assert w.states() == {"hot": 1}


def test_what_the_cloud_stops_while_it_loads_is_replaced_and_its_machine_not_banned() -> None:
    """Stopped by hand, as there is credit (test_credit.py has the other case): that is not the machine."""
    w = World(policy=Fixed(1, 1))
    w.tick(w.boot_s + 30)
    (label,) = w.contracts
    w.contracts[label].status, w.contracts[label].intended = "exited", "stopped"
    w.tick()
    w.fleet.note_credit(9.0, w.now)
    assert w.states() == {"cold": 1}
    assert w.fleet[label].why.startswith("stopped without our asking before its model was loaded")
    w.tick(w.deadlines.repeat_s + 10)
    assert label not in w.contracts
    (ended,) = [c for c in w.ordered if isinstance(c, Destroy)]
    assert "with nothing on its disk" in ended.evidence
    assert w.fleet.market.bad_machines == {}
    assert w.fleet.market.failed_creates == 1, "the next is rented after a pause"
    w.tick(1800)
    assert w.states() == {"hot": 1}
    assert not any(isinstance(c, Start) for c in w.ordered)


def test_a_listing_that_shows_a_loading_machine_as_stopped_for_a_turn_destroys_nothing() -> None:
    w = World(policy=Fixed(1, 1))
    w.tick(w.boot_s + 30)
    (label,) = w.contracts
    w.contracts[label].status, w.contracts[label].intended = "exited", "stopped"
    w.tick()
    w.contracts[label].status, w.contracts[label].intended = "running", "running"
    w.tick(1800)
    assert set(w.contracts) == {label}
    assert w.states() == {"hot": 1}


def says_failed(w: World, label: str, number: int = 1) -> None:
    said = ReadyBody("failed", "boot", number, "the model server ended 3 times")
    assert w.fleet.record_message(label, said, w.now) is Hearing.NEWS


def test_its_own_signed_word_and_a_failed_check_are_two_kinds() -> None:
    """It said that it had given up, and was waited for until its deadline."""
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.check_hook = lambda _: Verdict.FAILED
    says_failed(w, label)
    w.tick(10)
    assert label not in w.contracts
    (destroy,) = [c for c in w.ordered if isinstance(c, Destroy)]
    assert destroy.evidence == (
        "broken: it says: failed: the model server ended 3 times (its own word and our check)"
    )


def test_its_own_word_alone_is_one_kind() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.check_hook = lambda _: Verdict.UNKNOWN
    says_failed(w, label)
    w.fleet[label].trouble.failing = False
    ruling = weigh(final(w, label), ALONE)
    assert (ruling.health, ruling.evidence) == (
        Health.UNKNOWN,
        "it says: failed: the model server ended 3 times (its own word)",
    )
    assert weigh(final(w, label), OTHERS_WELL).health is Health.BROKEN


def final(w: World, label: str) -> Accusation:
    found = final_accusation(w.fleet[label], w.deadlines, w.now)
    assert found is not None
    return found


def test_a_check_that_passes_takes_back_what_was_said_and_met() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    says_failed(w, label)
    w.tick(60)
    w.fleet.record_report({}, [w.fleet[label].id or 0], w.now)
    w.tick(60)
    assert w.states() == {"hot": 1}
    assert final_accusation(w.fleet[label], w.deadlines, w.now) is None
    assert w.fleet[label].trouble.clients_since is None


def test_a_listing_that_says_ended_and_clients_that_met_failures_are_two_kinds() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.contracts[label].status = "exited"
    w.fleet.observe(w.listing(), (), w.now)
    assert weigh(final(w, label), ALONE).health is Health.UNKNOWN
    w.fleet.record_report({}, [w.fleet[label].id or 0], w.now)
    ruling = weigh(final(w, label), ALONE)
    assert ruling.health is Health.BROKEN
    assert ruling.evidence == "its container ended by itself (its clients and the listing)"


def test_what_clients_met_is_no_evidence_against_our_own_network() -> None:
    """They may sit beside us: with the network gone they meet failures everywhere."""
    w = World(reach=Health.BROKEN).with_pool(hot=2, total=2)
    w.check_hook = all_silent
    for _ in range(60):
        w.fleet.record_report({}, [i.id or 0 for i in w.fleet], w.now)
        w.tick(60)
    assert w.ordered == []
