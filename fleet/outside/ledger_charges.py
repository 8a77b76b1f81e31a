"""Holds the ledger against the account's own charges, day by day, and takes over what they say of bytes.

GPU and storage we see by the listing, to some seconds; bytes nobody tells us of, so the account's count. What
a day under way was charged for bytes may still grow: it corrects the ledger upwards only.
"""

import sqlite3
from collections.abc import Sequence

from fleet.budget import DAY_S
from fleet.journal import CHARGED
from vast.rows import Charges

LEAST_USD = 0.0005
"""Dollars by which bytes must differ to be corrected."""


def reconcile(db: sqlite3.Connection, day_s: float, charges: Sequence[Charges], now: float) -> None:
    """Write down what the account was charged for each instance on a day, and correct the traffic by it."""
    is_whole = now >= day_s + DAY_S
    at_s = min(now, day_s + DAY_S - 1.0)
    for c in charges:
        row = db.execute("SELECT label FROM stretch WHERE instance = ? LIMIT 1", (c.instance,)).fetchone()
        label = c.label or (row[0] if row else "")
        db.execute(
            "INSERT OR REPLACE INTO charged VALUES (?,?,?,?,?,?)",
            (day_s, c.instance, label, c.gpu, c.storage, c.traffic),
        )
        [(ours,)] = db.execute(
            "SELECT TOTAL(usd) FROM traffic WHERE (instance = ?1 OR label = ?2) AND at_s >= ?3 AND at_s < ?4",
            (c.instance, label, day_s, day_s + DAY_S),
        ).fetchall()
        more = c.traffic - ours
        if more > LEAST_USD or (is_whole and more < -LEAST_USD):
            db.execute(
                "INSERT INTO traffic VALUES (?,?,?,?,?,?)", (label, c.instance, at_s, more, None, CHARGED)
            )
    if charges:
        charged = sum(c.gpu + c.storage + c.traffic for c in charges)
        db.execute(
            "INSERT OR REPLACE INTO reconciled VALUES (?,?,?,?)",
            (day_s, now, charged, _ledger_usd(db, day_s, min(now, day_s + DAY_S))),
        )


def _ledger_usd(db: sqlite3.Connection, from_s: float, to_s: float) -> float:
    [(usd,)] = db.execute(SPENT, (from_s, to_s)).fetchall()
    return float(usd)


SPENT = (
    "SELECT (SELECT TOTAL(usd_h * MAX(0.0, MIN(COALESCE(to_s, ?2), ?2) - MAX(from_s, ?1))) / 3600.0"
    " FROM stretch WHERE from_s < ?2 AND (to_s IS NULL OR to_s > ?1))"
    " + (SELECT TOTAL(usd) FROM traffic WHERE at_s >= ?1 AND at_s <= ?2)"
)
"""The dollars of a window, from ?1 to ?2."""
