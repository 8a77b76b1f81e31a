"""Intervals that a clock which was set has left in the ledger."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from fleet.journal import BillingInterval, Entries
from fleet.outside.ledger import Ledger
from fleet.outside.ledger_mending import in_order


def test_a_clock_set_forth_and_back_leaves_the_time_that_was() -> None:
    """100 to 130 hot, then five hours forth, 20 s cold, then back: 50 s in all."""
    rows = [
        (1, "f/a", 100.0, 18_130.0),
        (2, "f/a", 18_130.0, 150.0),
        (3, "f/a", 150.0, None),
        (4, "f/b", 90.0, 170.0),
    ]
    changed = in_order(rows)
    assert changed == {1: (100.0, 150.0), 2: (150.0, 150.0)}


def test_between_forth_and_back_intervals_keep_their_length() -> None:
    rows = [
        (1, "f/a", 100.0, 18_130.0),
        (2, "f/a", 18_130.0, 18_140.0),
        (3, "f/a", 18_140.0, 160.0),
    ]
    assert in_order(rows) == {1: (100.0, 150.0), 2: (150.0, 160.0), 3: (160.0, 160.0)}


def test_a_clock_only_set_back_costs_the_one_interval() -> None:
    rows = [(1, "f/a", 5000.0, 5100.0), (2, "f/a", 5100.0, 1500.0), (3, "f/a", 1500.0, 1600.0)]
    assert in_order(rows) == {2: (5100.0, 5100.0)}


def test_a_sound_ledger_stays_as_it_is() -> None:
    assert in_order([(1, "f/a", 1.0, 2.0), (2, "f/a", 2.0, 2.0), (3, "f/a", 2.0, None)]) == {}


def test_a_ledger_with_negative_intervals_mends_itself(tmp_path: Path) -> None:
    """Field fault C7: dollars of hours that never were, arrivals of a time that has not come."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for from_s, to_s in ((100.0, 18_130.0), (18_130.0, 150.0), (150.0, 200.0)):
            db.execute(
                "INSERT INTO stretch VALUES ('f/a', 1, 7, 'hot', ?, ?, 3600.0, 3600.0, '')", (from_s, to_s)
            )
        db.execute("INSERT INTO arrived VALUES (18000, 5, 5, 5)")
        db.execute("INSERT INTO took VALUES ('boot', 120.0, -3000.0)")
    ledger = Ledger(path)
    try:
        assert ledger.mend(300.0) == 2
        assert ledger.costs(0.0, 1e9).total == pytest.approx(100.0)
        assert ledger.arrived(0.0, 1e9) == []
        assert ledger.durations(0.0, 1e9) == []
        assert ledger.mend(300.0) == 0
    finally:
        ledger.close()


def test_no_interval_that_is_written_is_negative(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")

    def hot(at: float) -> BillingInterval:
        return BillingInterval("f/a", 1, 7, "hot", at, None, 1.0, 1.0, "")

    try:
        ledger.write(Entries([hot(500.0)]))
        ledger.write(Entries([hot(100.0)]))
        assert all((i.to_s or 1e9) >= i.from_s for i in ledger.costs(0.0, 1e9).intervals)
    finally:
        ledger.close()
