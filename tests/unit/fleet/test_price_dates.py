"""Dollars are counted from when the cloud charges them, not from when a listing shows it."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.commands import Performed, Reply
from fleet.costs import CostBreakdown
from fleet.health_check import Verdict
from fleet.outside.ledger import Ledger
from fleet.outside.ledger_prices import LOOKED_AT, UNWATCHED_S
from fleet.states import State
from policies import Fixed
from tests.fleet_world import TURN_S, Contract, World

LATE_S = 60.0
"""Seconds for which no listing comes in these tests."""

STORAGE = 0.01


@pytest.fixture
def ledger(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def costs(w: World, ledger: Ledger) -> CostBreakdown:
    ledger.write(w.fleet.journal.take())
    return ledger.costs(0.0, w.now)


def usd_of(contract: Contract, hot_s: float, stored_s: float) -> float:
    return (contract.usd_h * hot_s + STORAGE * stored_s) / 3600.0


def test_a_new_machine_costs_storage_from_its_start_date_and_its_gpu_for_its_uptime(ledger: Ledger) -> None:
    w = World(policy=Fixed(1, 1)).tick(2 * TURN_S)
    (contract,) = w.contracts.values()
    ordered_at = next(iter(w.fleet)).ordered_at
    w.now += LATE_S
    contract.status = "running"
    row = replace(contract.row(), start_date=ordered_at + 2.0, up_s=10.0)
    w.fleet.observe([row], (), w.now)
    expected = usd_of(contract, 10.0, w.now - ordered_at - 12.0)
    assert costs(w, ledger).total == pytest.approx(expected)


@pytest.mark.parametrize("said", [-1e9, 1e9, 0.0])
def test_what_the_cloud_says_of_its_dates_moves_no_dollar_out_of_the_time_between_two_looks(
    ledger: Ledger, said: float
) -> None:
    w = World(policy=Fixed(1, 1)).tick(2 * TURN_S)
    (contract,) = w.contracts.values()
    ordered_at = next(iter(w.fleet)).ordered_at
    w.now += LATE_S
    contract.status = "running"
    w.fleet.observe([replace(contract.row(), start_date=said, up_s=abs(said))], (), w.now)
    found = costs(w, ledger)
    assert 0.0 <= found.total <= usd_of(contract, w.now - ordered_at, 0.0) + 1e-9
    assert all(i.from_s >= ordered_at for i in found.intervals)


def test_a_machine_that_went_down_unseen_is_charged_until_the_first_check_that_met_nobody(
    ledger: Ledger,
) -> None:
    w = World().with_pool(hot=1, total=1)
    costs(w, ledger)
    (contract,) = w.contracts.values()
    begun, (i,) = w.now, w.fleet
    looked_at = i.looked_at or 0.0
    silent_at = begun + 4.0
    i.trouble.note_pass(begun)
    i.trouble.note_trouble(begun + 3.0, silent_at, met=False)
    w.now = begun + LATE_S
    contract.status, contract.intended = "exited", "stopped"
    before = ledger.costs(0.0, begun).total
    w.fleet.observe([contract.row()], (), w.now)
    down_at = (begun + silent_at) / 2.0
    assert looked_at <= begun
    expected = usd_of(contract, down_at - begun, w.now - down_at)
    assert costs(w, ledger).total - before == pytest.approx(expected)


def test_a_machine_whose_stop_was_answered_costs_storage_from_then_on(ledger: Ledger) -> None:
    """Also when no listing comes for a minute."""
    w = World().with_pool(hot=1, total=1)
    (contract,) = w.contracts.values()
    w.policy = Fixed(0, 1)
    while "Stop" not in w.kinds():
        w.tick(1)
    costs(w, ledger)
    stopped_at, usd = w.now, ledger.costs(0.0, w.now).total
    w.now += LATE_S
    contract.status, contract.intended = "exited", "stopped"
    w.fleet.observe([contract.row()], (), w.now)
    assert costs(w, ledger).total - usd == pytest.approx(usd_of(contract, 0.0, w.now - stopped_at))


def test_an_answer_that_was_long_in_coming_dates_its_order_in_the_middle() -> None:
    assert Performed(Reply.DONE, sent_at=100.0).done_at(160.0) == 130.0
    assert Performed(Reply.DONE).done_at(160.0) == 160.0
    assert Performed(Reply.UNKNOWN, sent_at=100.0).done_at(160.0) is None


def test_a_machine_whose_end_the_cloud_confirms_costs_nothing_from_then_on(ledger: Ledger) -> None:
    w = World().with_pool(hot=1, total=1)
    (contract,) = w.contracts.values()
    w.check_hook = lambda _: Verdict.FATAL
    w.policy = Fixed(0, 0)
    while "Destroy" not in w.kinds():
        w.tick(1)
    costs(w, ledger)
    assert contract.label not in w.contracts
    ended, usd = w.now, ledger.costs(0.0, w.now).total
    w.tick(30)
    assert costs(w, ledger).total == pytest.approx(usd, abs=usd_of(contract, TURN_S, 0.0))
    assert not [s for s in ledger.costs(ended + TURN_S, w.now).intervals if s.usd_h]


def test_a_price_that_is_dated_back_splits_the_interval_in_which_it_began(ledger: Ledger) -> None:
    w = World().with_pool(hot=1, total=1).tick(30)
    (i,) = w.fleet
    begun = w.now
    costs(w, ledger)
    w.fleet.journal.change_price(i.label, begun - 5.0, 7.2)
    ledger.write(w.fleet.journal.take())
    rows = [s for s in ledger.costs(begun - 20.0, begun + 10.0).intervals if s.label == i.label]
    assert [(s.from_s, s.to_s) for s in rows][-1] == (begun - 5.0, None)
    assert rows[-1].usd_h == 7.2
    assert rows[-1].state == State.HOT
    assert rows[-2].to_s == begun - 5.0
    w.fleet.journal.change_price(i.label, begun - 5.0, 7.2)
    ledger.write(w.fleet.journal.take())
    assert [s for s in ledger.costs(begun - 20.0, begun + 10.0).intervals if s.label == i.label] == rows


def test_a_time_that_no_process_watched_is_shown_as_such(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as first:
        first.note({LOOKED_AT: 1000.0})
        first.mend(1000.0 + UNWATCHED_S)
        assert first.unwatched(0.0, 1e9) == []
        first.mend(1100.0)
        assert first.unwatched(0.0, 1e9) == [(1000.0, 1100.0)]
        assert first.unwatched(1050.0, 1060.0) == [(1050.0, 1060.0)]
        first.mend(1101.0)
        assert len(first.unwatched(0.0, 1e9)) == 1
