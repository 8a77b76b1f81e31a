"""The autoscaler's turns: the ledger before the cloud, and nothing lost when either fails."""

import contextlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.arrivals import Arrived
from fleet.commands import Create, Destroy, LookForOffers, Performed, Reply, Start, Stop
from fleet.demand import Demand
from fleet.health_check import HealthCheck, Verdict
from fleet.journal import Entries
from fleet.outside.ledger import Ledger
from fleet.outside.own_health import Reason, keep_alive
from fleet.outside.reasons import OwnReasons
from fleet.outside.turns import COUNTS_EVERY_S, Autoscaler
from fleet.states import State
from policies import Fixed
from process.clock import steady_clock
from process.errors import CloudError
from tests.fleet_world import TURN_S, FakeVast, World, make_offer
from tests.messages import busy_report


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
        began: float = float("-inf"),
    ) -> None:
        self.world = world or World()
        self.cloud = FakeVast(lambda: self.world.listing())
        self.scaler = Autoscaler(
            self.world.new_set(),
            policy or Fixed(0, 0),
            Demand("e1", began=began),
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
    loop.scaler.destroy("a person asked")
    loop.send_all()
    assert i.orders.out == 0
    assert [(f.reply, "KeyError" in f.why) for f in loop.scaler.failures] == [(Reply.UNKNOWN, True)]


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
    """An odd row of another user of the account must not stop everything."""
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
        busy_report(
            arrivals=requests,
            arrived_work=200.0 * requests,
            prompt_tokens=500 * requests,
            working_s={1001: working_s},
        )
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
    seen = again.scaler.demand.history.work_s(2067.0, 3600.0)
    assert list(seen) == pytest.approx([600.0] * 11 + [360.0, 80.0], abs=121.0)
    assert seen.sum() * 5.0 == pytest.approx(60 * 600.0 + 2 * 200.0, abs=2 * 600.0)
    assert again.scaler.demand.history.mix is not None
    assert again.scaler.demand.history.mix.work == pytest.approx(200.0)


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


# -- faults of ours --------------------------------------------------------------------------------------


def hot_loop(ledger: Ledger) -> tuple[Loop, str]:
    """One hot instance, as its process knows it."""
    world = World().with_pool(hot=1, total=1)
    (label,) = world.contracts
    loop = Loop(ledger, world, Fixed(1, 1))
    loop.scaler.turn()
    loop.world.now += 1.0
    loop.scaler.judge(HealthCheck(label, loop.world.now, Verdict.PASSED, "ok"))
    assert loop.scaler.instances[label].state is State.HOT
    return loop, label


@contextlib.contextmanager
def locked(tmp_path: Path) -> Iterator[None]:
    """Somebody else holds the ledger, as a backup or a sqlite shell does."""
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_a_locked_ledger_is_no_verdict_on_a_machine(tmp_path: Path, ledger: Ledger) -> None:
    """Field fault C2: 40 s of a backup destroyed healthy machines, because a check wrote."""
    loop, label = hot_loop(ledger)
    with locked(tmp_path):
        for _ in range(3):
            loop.world.now += 15.0
            assert loop.scaler.remember_host_key(label, "ssh-ed25519 AAA") == "ssh-ed25519 AAA"
            loop.scaler.judge(HealthCheck(label, loop.world.now, Verdict.PASSED, "ok"))
            with contextlib.suppress(sqlite3.Error):
                loop.scaler.turn()
        assert loop.scaler.instances[label].state is State.HOT
        assert [r.code for r in loop.scaler.own.reasons(0, "", loop.world.now)] == ["ledger_not_writable"]
        assert ledger.costs(0.0, loop.world.now).total >= 0.0, "who reads does not wait for who writes"
    loop.world.now += 5.0
    loop.scaler.turn()
    loop.send_all()
    assert loop.cloud.sent == []
    assert loop.scaler.own.reasons(0, "", loop.world.now) == []
    assert ledger.saved_fleet(loop.world.now).host_keys == {label: "ssh-ed25519 AAA"}


def test_with_a_full_disk_what_is_drained_is_stopped_and_nothing_fails(ledger: Ledger) -> None:
    """Field fault C3: the stop was not sent, and the machine was destroyed for it afterwards."""
    loop, label = hot_loop(ledger)
    loop.scaler.set_policy(Fixed(0, 1))
    loop.world.now += 5.0
    loop.scaler.turn()
    loop.world.now += loop.world.deadlines.lease_s + 20.0
    write, note = ledger.write, ledger.note
    ledger.write = ledger.note = full_disk  # type: ignore[method-assign, assignment]
    loop.scaler.judge(HealthCheck(label, loop.world.now, Verdict.PASSED, "idle", in_flight=0))
    with pytest.raises(sqlite3.Error):
        loop.scaler.turn()
    loop.send_all()
    assert [type(c) for c in loop.cloud.sent] == [Stop]
    loop.world.contracts[label].status = "exited"
    loop.world.contracts[label].intended = "stopped"
    for _ in range(24):
        loop.world.now += 5.0
        with pytest.raises(sqlite3.Error):
            loop.scaler.turn()
    ledger.write, ledger.note = write, note  # type: ignore[method-assign]
    loop.world.now += 5.0
    loop.scaler.turn()
    loop.send_all()
    assert loop.scaler.instances[label].state is State.COLD
    assert not any(isinstance(c, Destroy) for c in loop.cloud.sent)


def test_a_disk_that_fails_is_a_line_a_minute_and_no_traceback(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    loop, label = hot_loop(ledger)
    ledger.write = ledger.note = full_disk  # type: ignore[method-assign, assignment]
    for _ in range(20):
        loop.world.now += 5.0
        loop.scaler.judge(HealthCheck(label, loop.world.now, Verdict.FAILED, "no answer"))
        loop.scaler.judge(HealthCheck(label, loop.world.now, Verdict.PASSED, "ok"))
        try:
            loop.scaler.turn()
        except sqlite3.Error as e:
            loop.scaler.own.complain("a turn failed", e, loop.world.now)
    told = [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert 1 <= len(told) <= 2
    assert not any(r.exc_info for r in told)
    assert "full" in told[0].getMessage()


def test_a_fault_of_our_own_code_is_told_with_its_traceback(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    Loop(ledger).scaler.own.complain("a turn failed", KeyError("x"), 0.0)
    assert caplog.records[-1].exc_info


def test_with_a_full_disk_nothing_is_started_and_the_machine_is_not_blamed(ledger: Ledger) -> None:
    world = World().with_pool(hot=0, total=1)
    (label,) = world.contracts
    loop = Loop(ledger, world, Fixed(0, 1))
    loop.scaler.turn()
    loop.scaler.set_policy(Fixed(1, 1))
    write = ledger.write
    ledger.write = full_disk  # type: ignore[method-assign]
    with pytest.raises(sqlite3.Error):
        loop.scaler.turn()
    loop.send_all()
    assert loop.cloud.sent == []
    i = loop.scaler.instances[label]
    assert (i.state, i.boot.refused_starts) == (State.COLD, 0)
    ledger.write = write  # type: ignore[method-assign]
    loop.world.now += 5.0
    loop.scaler.turn()
    loop.send_all()
    assert [type(c) for c in loop.cloud.sent] == [Start]


def broken_write(entries: Entries) -> None:
    raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")


def test_any_fault_in_writing_keeps_the_journal_and_answers_what_was_begun(ledger: Ledger) -> None:
    """Field fault A1: an error that was no sqlite3.Error left orders for ever begun."""
    loop, label = hot_loop(ledger)
    write = ledger.write
    ledger.write = broken_write  # type: ignore[method-assign]
    with pytest.raises(UnicodeEncodeError):
        loop.scaler.destroy("a person asked")
    i = loop.scaler.instances[label]
    assert (i.state, i.orders.out) == (State.DESTROYING, 0)
    ledger.write = write  # type: ignore[method-assign]
    loop.world.now += loop.world.deadlines.repeat_s + 1.0
    loop.scaler.turn()
    loop.send_all()
    assert [type(c) for c in loop.cloud.sent if not isinstance(c, LookForOffers)] == [Destroy]
    assert "destroying" in {s.state for s in ledger.costs(0.0, 1e12).intervals}


def test_a_text_that_cannot_be_encoded_stops_no_write(ledger: Ledger) -> None:
    loop, label = hot_loop(ledger)
    loop.world.now += 5.0
    loop.scaler.judge(HealthCheck(label, loop.world.now, Verdict.FAILED, "engine: \ud800"))
    loop.scaler.turn()
    assert "engine: \ufffd" in {s.why for s in ledger.costs(0.0, 1e12).intervals}


def test_an_order_that_got_lost_is_sent_again(ledger: Ledger) -> None:
    """Its thread ended with it: the instance must not be destroying, and billed, for ever."""
    loop, label = hot_loop(ledger)
    loop.scaler.instances.set_manage(False)
    loop.scaler.destroy("a person asked")
    assert loop.scaler.orders.take() is not None  # and never performed
    loop.world.now += 120.0
    loop.scaler.turn()
    loop.send_all()
    assert loop.cloud.sent == [], "it may be on its way"
    loop.world.now += 240.0
    loop.scaler.turn()
    loop.send_all()
    assert [type(c) for c in loop.cloud.sent] == [Destroy]
    assert loop.scaler.instances[label].orders.out == 0


def test_a_thread_that_dies_begins_again_and_that_is_said(ledger: Ledger) -> None:
    loop = Loop(ledger)
    runs: list[int] = []

    def dies_twice() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise KeyError("a bug")

    keep_alive(dies_twice, "turns", loop.scaler.own, loop.scaler.clock, threading.Event(), rest_s=0.0)
    assert len(runs) == 3
    assert loop.scaler.own.restarts == {"turns": 2}


def test_a_loadbalancer_that_is_there_and_not_understood_is_a_reason(ledger: Ledger) -> None:
    own = Loop(ledger).scaler.own
    for n in range(40):
        own.note_contact("one", 1000.0 + n)
    assert [r.code for r in own.reasons(0, "", 1040.0)] == ["no_reports"]
    own.note_report("one", 1041.0)
    assert own.reasons(0, "", 1042.0) == []
    assert own.reasons(0, "", 2000.0) == [], "one that has gone is no fault of ours"


def test_a_loadbalancer_that_is_understood_hides_no_other(ledger: Ledger) -> None:
    """Any report ended the silence of all."""
    own = Loop(ledger).scaler.own
    for n in range(40):
        for name in ("one", "other", ""):
            own.note_contact(name, 1000.0 + n)
        own.note_report("one", 1000.0 + n)
    (reason,) = own.reasons(0, "", 1040.0)
    assert reason == Reason(
        "no_reports",
        "no report was understood for 40 s from 1 of 3 loadbalancers that are there: other",
    )
    own.note_contact("one", 1100.0)
    assert own.reasons(0, "", 1100.0) == [], "the other has gone"


def test_no_credit_and_creates_that_all_fail_are_reasons(ledger: Ledger) -> None:
    scaler = Loop(ledger).scaler
    found = scaler.own.reasons(3, "spend_rate_limit", 0.0)
    assert [r.code for r in found] == ["creates_fail"]
    assert "spend_rate_limit" in found[0].message
    scaler.instances.note_credit(-0.1, scaler.clock())
    scaler.turn()
    (reason,) = OwnReasons(scaler, 5.0).now()
    assert reason.code == "no_credit"
    assert "pay in" in reason.message


def test_a_fleet_found_hot_stays_hot_until_demand_was_heard(ledger: Ledger) -> None:
    """Field fault C8: without a ledger two of three were drained 2 s after the start, and needed again."""
    world = World().with_pool(hot=3, total=3)
    loop = Loop(ledger, world, Fixed(1, 3), began=world.now)
    loop.scaler.turn()
    for label in world.contracts:
        loop.scaler.judge(HealthCheck(label, world.now, Verdict.PASSED, "ok"))
    world.now += 5.0
    assert loop.scaler.turn().commands == ()
    for _ in range(3):
        loop.scaler.record_report(busy_report(demand=0.5))
        world.now += 6.0
    assert len(loop.scaler.turn().commands) == 2


def test_without_any_loadbalancer_the_fleet_does_not_stay_hot_for_ever(ledger: Ledger) -> None:
    world = World().with_pool(hot=2, total=2)
    loop = Loop(ledger, world, Fixed(0, 2), began=world.now)
    loop.scaler.turn()
    for _ in range(30):
        world.now += 5.0
        for label in world.contracts:
            loop.scaler.judge(HealthCheck(label, world.now, Verdict.PASSED, "ok"))
        loop.scaler.turn()
    assert {str(i.state) for i in loop.scaler.instances} == {"draining"}


def test_a_ledger_that_was_lost_while_in_use_learns_the_fleet_again(ledger: Ledger, tmp_path: Path) -> None:
    loop, label = hot_loop(ledger)
    loop.scaler.remember_host_key(label, "ssh-ed25519 AAAA")
    loop.scaler.instances.market.avoid(7, "three starts found no GPU", loop.world.now)
    (tmp_path / "ledger.sqlite").unlink()
    loop.world.now += 5.0
    loop.scaler.turn()
    before = loop.scaler.instances[label]
    again = Ledger(tmp_path / "ledger.sqlite")
    saved = again.saved_fleet(loop.world.now)
    assert [(s.label, s.instance, s.state, s.loaded) for s in saved.instances] == [
        (label, before.id, before.state, before.loaded)
    ]
    assert (saved.host_keys, list(saved.bad_machines)) == ({label: "ssh-ed25519 AAAA"}, [7])
    assert again.costs(0.0, loop.world.now + 3600.0).total > 0.0, "it bills on"
    again.close()
