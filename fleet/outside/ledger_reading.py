"""What is read from the ledger: the fleet as it was last known, arrivals, durations, and what it cost."""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator

from fleet.arrivals import Arrived
from fleet.costs import CostBreakdown, break_down
from fleet.durations import KEPT
from fleet.history import FleetSample
from fleet.journal import BillingInterval, BytesBilled, SavedFleet, SavedInstance
from fleet.outside.ledger_charges import SPENT
from fleet.outside.ledger_file import is_damage
from fleet.outside.ledger_prices import LOOKED_AT
from fleet.reconciled import ReconciledDay
from fleet.states import State

log = logging.getLogger("autoscaler")

BUCKET_S = 15.0
"""Width of a `worked` bucket: fine enough to clip to a run of a minute, 5,760 rows an instance and day."""

DAY_S = 86_400.0

CREDIT_GONE, USED_UP = "credit_gone", "budgets_used_up"
"""Names of single values: that the account has no credit; keys of budgets that are used up, one a line."""


class LedgerReading:
    """Reads a ledger over a connection of its own, which waits for nobody who writes."""

    _reader: sqlite3.Connection
    _reading: threading.Lock
    _damage: str | None  # why the file cannot be gone on with

    def _note_damage(self, error: BaseException | None) -> None:
        """Note what a reader or writer met."""
        if isinstance(error, sqlite3.DatabaseError) and is_damage(error):
            self._damage = f"is damaged ({error})"

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._reading:
            try:
                yield self._reader
            except sqlite3.DatabaseError as e:
                self._note_damage(e)
                raise

    def saved_fleet(self, now: float) -> SavedFleet:
        """Return the fleet as the last process knew it.

        Of the instances those that were not gone when it ended, and the condemned ones.
        """
        with self._read() as db:
            instances = db.execute(
                "SELECT f.label, f.instance, f.machine, f.loaded, f.doomed, f.ordered_s, f.throughput,"
                " s.state, s.from_s, COALESCE(s.usd_h, 0.0), COALESCE(s.running_usd_h, 0.0)"
                " FROM fleet f LEFT JOIN stretch s ON s.label = f.label AND s.to_s IS NULL"
                " WHERE s.state IS NOT NULL OR f.doomed"
            ).fetchall()
            bad = db.execute("SELECT machine, until_s FROM bad_machine WHERE until_s > ?", (now,))
            vanished = db.execute("SELECT label, until_s, usd_h FROM mourned WHERE until_s > ?", (now,))
            noted = dict(db.execute("SELECT name, value FROM noted").fetchall())
            since = noted.get("lacking_since")
            looked_at = float(noted[LOOKED_AT]) if LOOKED_AT in noted else None
            return SavedFleet(
                [
                    SavedInstance(*(*r[:3], bool(r[3]), bool(r[4]), *r[5:], looked_at))
                    for r in filter(_sound, instances)
                ],
                dict(bad.fetchall()),
                {label: (until_s, usd_h) for label, until_s, usd_h in vanished},
                _last_durations(db, "boot"),
                _last_durations(db, "load"),
                (None if since is None else float(since), float(noted.get("lacking_seen_at", "-inf"))),
                dict(db.execute("SELECT label, key FROM host_key").fetchall()),
                credit_gone=CREDIT_GONE in noted,
                used_up=noted.get(USED_UP, "").split("\n") if USED_UP in noted else (),
            )

    def noted(self, name: str) -> str | None:
        """Return the value that `note` wrote under that name; None when there is none."""
        with self._read() as db:
            row = db.execute("SELECT value FROM noted WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def begins_at(self) -> float | None:
        """Return when the first interval begins, before which costs are not known; None without intervals."""
        with self._read() as db:
            return db.execute("SELECT MIN(from_s) FROM stretch").fetchone()[0]  # type: ignore[no-any-return]

    def unwatched(self, from_s: float, to_s: float) -> list[tuple[float, float]]:
        """Return the times inside the window of which nothing was written."""
        with self._read() as db:
            return db.execute(
                "SELECT MAX(from_s, ?1), MIN(to_s, ?2) FROM unwatched WHERE from_s < ?2 AND to_s > ?1",
                (from_s, to_s),
            ).fetchall()

    def durations(self, from_s: float, to_s: float) -> list[tuple[str, float, float]]:
        """Return (kind, at, seconds) of each duration that ended inside the window."""
        with self._read() as db:
            return db.execute(
                "SELECT kind, at_s, seconds FROM took WHERE at_s >= ? AND at_s < ? ORDER BY at_s",
                (from_s, to_s),
            ).fetchall()

    def arrived(self, from_s: float, to_s: float) -> list[Arrived]:
        """Return what arrived in the seconds that begin in the window, oldest first, empty ones omitted."""
        with self._read() as db:
            rows = db.execute(
                "SELECT second, requests, work, prompt_tokens FROM arrived"
                " WHERE second >= ? AND second < ? ORDER BY second",
                (from_s, to_s),
            ).fetchall()
        return [Arrived(*row) for row in rows]

    def samples(self, from_s: float, to_s: float) -> list[FleetSample]:
        """Return the samples of the fleet that were taken inside the window, oldest first."""
        with self._read() as db:
            rows = db.execute(
                "SELECT * FROM sampled WHERE at_s >= ? AND at_s < ? ORDER BY at_s", (from_s, to_s)
            ).fetchall()
        return [FleetSample(*row) for row in rows]

    def spent(self, from_s: float, to_s: float) -> float:
        """Return the dollars that the fleet cost inside the window, as a budget counts them."""
        with self._read() as db:
            [(usd,)] = db.execute(SPENT, (from_s, to_s)).fetchall()
        return float(usd)

    def reconciled(self, from_s: float) -> list[ReconciledDay]:
        """Return the days since then that were held against the account's charges, oldest first."""
        with self._read() as db:
            rows = db.execute(
                "SELECT day_s, at_s, charged_usd, ledger_usd FROM reconciled WHERE day_s >= ? ORDER BY day_s",
                (from_s,),
            ).fetchall()
        return [ReconciledDay(*row) for row in rows]

    def costs(self, from_s: float, to_s: float) -> CostBreakdown:
        """Return what the fleet cost inside the window; to_s is at most now."""
        with self._read() as db:
            rows = db.execute(
                "SELECT label, instance, machine, state, from_s, to_s, usd_h, running_usd_h, why FROM stretch"
                " WHERE from_s < ? AND (to_s IS NULL OR to_s > ?) ORDER BY from_s",
                (to_s, from_s),
            ).fetchall()
            worked = dict(
                db.execute(
                    "SELECT label,"
                    " SUM(seconds * MAX(0.0, MIN(from_s + wide_s, ?2) - MAX(from_s, ?1)) / wide_s) FROM ("
                    "SELECT label, bucket * ?3 AS from_s, ?3 AS wide_s, seconds FROM worked"
                    " WHERE (bucket + 1) * ?3 > ?1 AND bucket * ?3 < ?2"
                    " UNION ALL"
                    " SELECT label, day * ?4, ?4, seconds FROM worked_day"
                    " WHERE (day + 1) * ?4 > ?1 AND day * ?4 < ?2) GROUP BY label",
                    (from_s, to_s, BUCKET_S, DAY_S),
                ).fetchall()
            )
            traffic = db.execute(
                "SELECT label, instance, at_s, usd, gb, source FROM traffic WHERE at_s >= ? AND at_s <= ?"
                " ORDER BY at_s",
                (from_s, to_s),
            ).fetchall()
        intervals, bytes_billed = (
            [BillingInterval(*row) for row in rows],
            [BytesBilled(*row) for row in traffic],
        )
        return break_down(intervals, worked, from_s, to_s, bytes_billed)


def _last_durations(db: sqlite3.Connection, kind: str) -> list[float]:
    """Return the last durations of a kind in seconds, oldest first."""
    rows = db.execute(
        "SELECT seconds FROM took WHERE kind = ? ORDER BY at_s DESC LIMIT ?", (kind, KEPT)
    ).fetchall()
    return [float(seconds) for (seconds,) in reversed(rows)]


def _sound(row: tuple[object, ...]) -> bool:
    """Return whether a row of the fleet is valid; the instance of one that is not is found by its label."""
    label, instance, machine, _, _, ordered_s, throughput, state, since, *prices = row
    wholes = all(value is None or isinstance(value, int) for value in (instance, machine))
    numbers = [value for value in (ordered_s, throughput, since, *prices) if value is not None]
    known = state is None or (state in set(State) and since is not None)
    sound = isinstance(label, str) and wholes and known and ordered_s is not None
    if not sound or not all(isinstance(value, int | float) for value in numbers):
        log.warning("a row of the ledger left out, it cannot be: %.100r", label)
        return False
    return True
