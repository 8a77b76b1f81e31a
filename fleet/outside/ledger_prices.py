"""Dates a price back in the ledger, and records the times of which it can say nothing."""

import sqlite3

from fleet.journal import PriceChange

LOOKED_AT = "looked_at"
"""The name under which it is noted when the cloud was looked at last."""

UNWATCHED_S = 10.0
"""Seconds between two looks, of two processes, from which on what happened between is not known."""


def change_price(db: sqlite3.Connection, change: PriceChange) -> None:
    """Let the intervals of that label have the price from then on, splitting the one in which it began.

    They are written anew, since intervals of a label stand in the order of their time.
    """
    label, since, usd_h = change.label, change.since, change.usd_h
    rows = db.execute(
        "SELECT rowid, label, instance, machine, state, from_s, to_s, usd_h, running_usd_h, why FROM stretch"
        " WHERE label = ? AND (to_s IS NULL OR to_s > ?) ORDER BY rowid",
        (label, since),
    ).fetchall()
    if all(row[7] == usd_h for row in rows):
        return
    db.executemany("DELETE FROM stretch WHERE rowid = ?", [row[:1] for row in rows])
    for _, *head, from_s, to_s, before, running_usd_h, why in rows:
        if from_s < since:
            _insert(db, head, from_s, since, before, running_usd_h, why)
        _insert(db, head, max(from_s, since), to_s, usd_h, running_usd_h, why)


def _insert(db: sqlite3.Connection, head: list[object], *rest: object) -> None:
    db.execute("INSERT INTO stretch VALUES (?,?,?,?,?,?,?,?,?)", (*head, *rest))


def note_unwatched(db: sqlite3.Connection, now: float) -> None:
    """Record the time since the last look, if it was long: the process before wrote nothing of it."""
    row = db.execute("SELECT value FROM noted WHERE name = ?", (LOOKED_AT,)).fetchone()
    if row is not None and now - float(row[0]) > UNWATCHED_S:
        db.execute("INSERT INTO unwatched VALUES (?,?)", (float(row[0]), now))
        db.execute("UPDATE noted SET value = ? WHERE name = ?", (repr(now), LOOKED_AT))
