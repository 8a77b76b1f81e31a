"""The ledger: what the fleet was and cost, in SQLite, so that a restarted autoscaler knows both.

One row for each interval that an instance spent in one state at one price. A row is opened when the interval
begins and closed when it ends, so after `kill -9` the open rows are the fleet as it was last seen: the next
process goes on from them, and no dollar between is lost.

    stretch      intervals: label, instance, machine, state, from, to (NULL while it lasts), $/h now, $/h hot
    worked       seconds in which an instance had at least one request in flight, in buckets of 15 s
    worked_day   the same by day, of what is older than a week
    arrived      what arrived in each second: requests, work, prompt tokens; nothing of what was asked
    fleet        one row an instance: what must be known again after a restart; doomed: it is condemned
    mourned      instances that vanished, and until when they count against the limits
    bad_machine  machine_id, and until when it is not rented again
    took         how long orders, starts and loads took
    host_key     the ssh host key that is believed of an instance
    sampled      the fleet over time, as the page draws it (fleet/history.py), kept as long as arrivals
    noted        single values by name: since when listings lack most of the fleet, the clock's offset
    clock_step   when the wall clock was set, and by how many seconds
    unwatched    times in which nobody looked at the cloud, or nobody could write what was seen
    traffic      dollars for bytes by instance: estimated when it is rented, corrected by what was charged
    charged      what the account was charged for each instance on each day (UTC)
    reconciled   what a day came to by the account and by this ledger, and when they were compared

Times are epoch seconds. Any thread may call.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from fleet.arrivals import Arrived
from fleet.history import NAMES, FleetSample
from fleet.journal import Entries, PriceChange
from fleet.outside.ledger_charges import reconcile
from fleet.outside.ledger_file import Transaction, is_damage, loss, set_aside
from fleet.outside.ledger_mending import in_order
from fleet.outside.ledger_prices import change_price, note_unwatched
from fleet.outside.ledger_reading import BUCKET_S, DAY_S, LedgerReading
from fleet.outside.ledger_schema import check_tables, migrate
from process.safe_text import safe_text
from vast.rows import Charges

log = logging.getLogger("autoscaler")

KEPT_S = 8 * DAY_S
"""Seconds for which arrivals and buckets of work are kept: a week for comparisons, and the day before."""

PRUNE_EVERY_S = 3600.0
"""Seconds between two prunes: each then deletes an hour, in milliseconds."""

BUSY_S = 2.0
"""Seconds for which somebody else's lock is waited for: a backup of a small file is over by then, and a turn
may not wait for long."""


class Ledger(LedgerReading):
    """The ledger's file. All methods raise sqlite3.Error: without a ledger nothing may be rented."""

    def __init__(self, path: Path) -> None:
        """Open or make the ledger's file (0600) and bring it to the newest version.

        A damaged file is kept beside it, and a new one begun: what is rented is found again by its label.
        Raises OSError too, and ConfigError when a newer autoscaler wrote it.
        """
        self._path = path
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._prune_at = float("-inf")
        self._notes: dict[str, str | float | None] = {}  # that this process has made
        self._damage = None
        self._open()

    def _open(self) -> None:
        """Open the file, or a new one where it is damaged."""
        path = self._path
        path.touch(mode=0o600, exist_ok=True)
        try:
            self._db = _opened(path)
        except sqlite3.DatabaseError as e:
            if not is_damage(e):
                raise
            kept = set_aside(path)
            log.warning("%s is damaged (%s): kept as %s, a new one begins", path, e, kept.name)
            path.touch(mode=0o600, exist_ok=True)
            self._db = _opened(path)
        self._reader = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
        self._inode = path.stat().st_ino

    def begin_anew(self) -> bool:
        """Open another file where this one was found damaged, or was taken away; return whether that was so.

        The caller then writes down all that it knows. Raises sqlite3.Error and OSError, and is called again.
        """
        why = self._damage or loss(self._path, self._inode)
        if why is None:
            return False
        with self._lock, self._reading:
            self._damage = why  # until there is another
            log.warning("%s %s while it was in use: the fleet is written down anew", self._path, why)
            for db in (self._reader, self._db):
                with contextlib.suppress(sqlite3.Error):
                    db.close()
            self._open()
            self._damage = None
        self.note(dict(self._notes))
        return True

    def close(self) -> None:
        """Close the ledger's file; open intervals stay open."""
        with self._reading:
            self._reader.close()
        with self._lock:
            self._db.close()

    # -- writing ------------------------------------------------------------------------------------

    def write(self, entries: Entries) -> None:
        """Write what happened to the fleet into the ledger, in one transaction.

        An interval ends the open one of its label at its from_s, and opens itself unless its state is "gone".
        Kinds of durations: "create", "start", "stop", "destroy" from order to effect, "destroyed" until the
        listing lacks it, "load" from create to hot, "boot" from start to hot.
        """
        with self._lock, self._transaction():
            for i in entries.intervals:
                if isinstance(i, PriceChange):
                    change_price(self._db, i)
                    continue
                self._db.execute(
                    "UPDATE stretch SET to_s = MAX(from_s, ?) WHERE label = ? AND to_s IS NULL",
                    (i.from_s, i.label),
                )
                if i.state != "gone":
                    written = replace(i, why=safe_text(i.why))  # the last gate: a text never stops a write
                    self._db.execute("INSERT INTO stretch VALUES (?,?,?,?,?,?,?,?,?)", astuple(written))
            self._db.executemany(
                "INSERT OR REPLACE INTO fleet VALUES (?,?,?,?,?,?,?)",
                [
                    (s.label, s.instance, s.machine, s.loaded, s.condemned, s.ordered_s, s.throughput)
                    for s in entries.instances.values()
                ],
            )
            self._db.executemany("INSERT INTO took VALUES (?,?,?)", entries.durations)
            self._db.executemany(
                "INSERT OR REPLACE INTO bad_machine VALUES (?,?,?)",
                [(m, until_s, safe_text(why)) for m, (until_s, why) in entries.bad_machines.items()],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO mourned VALUES (?,?,?)",
                [(label, until_s, usd_h) for label, (until_s, usd_h) in entries.vanished.items()],
            )
            self._db.executemany("INSERT OR REPLACE INTO host_key VALUES (?,?)", entries.host_keys.items())
            self._db.executemany("INSERT INTO traffic VALUES (?,?,?,?,?,?)", map(astuple, entries.traffic))
            if entries.lacking is not None:
                since, seen_at = entries.lacking
                self._note({"lacking_since": since, "lacking_seen_at": seen_at})

    def add_counts(
        self,
        worked: Mapping[tuple[str, int], float],
        arrived: Iterable[Arrived],
        now: float,
        samples: Sequence[FleetSample] = (),
    ) -> None:
        """Add seconds worked, by (label, number of the bucket), arrivals and samples of the fleet.

        Once an hour drop old ones.
        """
        seconds = [(label, bucket, s) for (label, bucket), s in worked.items() if s > 0.0]
        arrivals = [(a.second, a.requests, a.work, a.prompt_tokens) for a in arrived]
        if not seconds and not arrivals and not samples:
            return
        with self._lock, self._transaction():
            self._db.executemany(
                "INSERT INTO worked VALUES (?,?,?) "
                "ON CONFLICT(label, bucket) DO UPDATE SET seconds = seconds + excluded.seconds",
                seconds,
            )
            self._db.executemany(
                "INSERT INTO arrived VALUES (?,?,?,?) ON CONFLICT(second) DO UPDATE SET"
                " requests = requests + excluded.requests, work = work + excluded.work,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens",
                arrivals,
            )
            self._db.executemany(
                f"INSERT OR REPLACE INTO sampled VALUES ({','.join('?' * len(NAMES))})",  # noqa: S608 no data
                [astuple(sample) for sample in samples],
            )
            if now >= self._prune_at:
                _prune(self._db, now - KEPT_S)
                self._prune_at = now + PRUNE_EVERY_S

    def reconcile(self, day_s: float, charges: Sequence[Charges], now: float) -> None:
        """Hold a day (UTC) against what the account was charged on it; traffic is corrected by that."""
        with self._lock, self._transaction():
            reconcile(self._db, day_s, charges, now)

    def note(self, values: Mapping[str, str | float | None]) -> None:
        """Write single values by name; None removes the value of a name."""
        with self._lock, self._transaction():
            self._note(values)
        self._notes.update(values)

    def _note(self, values: Mapping[str, str | float | None]) -> None:
        for name, value in values.items():
            if value is None:
                self._db.execute("DELETE FROM noted WHERE name = ?", (name,))
            else:
                self._db.execute("INSERT OR REPLACE INTO noted VALUES (?,?)", (name, str(value)))

    def add_clock_step(self, at_s: float, by_s: float) -> None:
        """Record that the wall clock was set at that time, by so many seconds."""
        with self._lock, self._transaction():
            self._db.execute("INSERT INTO clock_step VALUES (?,?)", (at_s, by_s))

    def mend(self, now: float) -> int:
        """Repair rows that were written while the clock was wrong; return how many intervals were changed.

        These are intervals that end before they begin, arrivals and durations of a time that has not come.
        """
        with self._lock, self._transaction():
            rows = self._db.execute(
                "SELECT rowid, label, from_s, to_s FROM stretch ORDER BY rowid"
            ).fetchall()
            changed = in_order(rows)
            self._db.executemany(
                "UPDATE stretch SET from_s = ?, to_s = ? WHERE rowid = ?",
                [(from_s, to_s, rowid) for rowid, (from_s, to_s) in changed.items()],
            )
            note_unwatched(self._db, now)
            self._db.execute("DELETE FROM arrived WHERE second > ?", (now,))
            self._db.execute("DELETE FROM sampled WHERE at_s > ?", (now,))
            self._db.execute("DELETE FROM took WHERE seconds < 0 OR at_s > ?", (now,))
        return len(changed)

    def _transaction(self) -> Transaction:
        return Transaction(self._db, self._note_damage)


def _prune(db: sqlite3.Connection, before_s: float) -> None:
    """Drop older arrivals, and sum up older buckets of work by day, so that costs stay the same."""
    db.execute("DELETE FROM arrived WHERE second < ?", (before_s,))
    db.execute("DELETE FROM sampled WHERE at_s < ?", (before_s,))
    old = int(before_s // DAY_S * DAY_S // BUCKET_S)  # whole days only
    db.execute(
        "INSERT INTO worked_day SELECT label, CAST(bucket * ?1 / ?2 AS INTEGER) AS day, SUM(seconds)"
        " FROM worked WHERE bucket < ?3 GROUP BY label, day"
        " ON CONFLICT(label, day) DO UPDATE SET seconds = seconds + excluded.seconds",
        (BUCKET_S, DAY_S, old),
    )
    db.execute("DELETE FROM worked WHERE bucket < ?", (old,))


def _opened(path: Path) -> sqlite3.Connection:
    """Return a connection to a ledger's file, after checking it and bringing it to the newest version."""
    db = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
    try:
        [(found,)] = db.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise sqlite3.DatabaseError(str(found)[:200])  # noqa: TRY301 as a damaged page raises it
        migrate(db, path)
        check_tables(db)
        # WAL with NORMAL survives kill -9 of the process; only a power cut may lose the last transaction.
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        db.close()
        raise
    return db
