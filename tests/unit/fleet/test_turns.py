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
from fleet.commands import Create, LookForOffers, Performed, Reply, Stop
from fleet.demand import Demand
from fleet.health_check import HealthCheck, Verdict
from fleet.journal import Entries
from fleet.outside.ledger import Ledger
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
