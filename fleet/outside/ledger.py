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
    host_key     the ssh host key that an instance showed first
    sampled      the fleet over time, as the page draws it (fleet/history.py), kept as long as arrivals
    noted        single values by name: since when listings lack most of the fleet, the clock's offset
    clock_step   when the wall clock was set, and by how many seconds
    unwatched    times in which nobody looked at the cloud, or nobody could write what was seen

Times are epoch seconds. Any thread may call.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from fleet.arrivals import Arrived
from fleet.costs import CostBreakdown, break_down
from fleet.durations import KEPT
from fleet.history import NAMES, FleetSample
from fleet.journal import BillingInterval, Entries, PriceChange, SavedFleet, SavedInstance
from fleet.outside.ledger_file import Transaction, is_damage, loss, set_aside
from fleet.outside.ledger_mending import in_order
from fleet.outside.ledger_prices import LOOKED_AT, change_price, note_unwatched
from fleet.outside.ledger_schema import check_tables, migrate
from fleet.states import State
from process.safe_text import safe_text

log = logging.getLogger("autoscaler")

BUCKET_S = 15.0
"""Width of a `worked` bucket: fine enough to clip to a run of a minute, 5,760 rows an instance and day."""

DAY_S = 86_400.0

KEPT_S = 8 * DAY_S
"""Seconds for which arrivals and buckets of work are kept: a week for comparisons, and the day before."""

PRUNE_EVERY_S = 3600.0
"""Seconds between two prunes: each then deletes an hour, in milliseconds."""

BUSY_S = 2.0
"""Seconds for which somebody else's lock is waited for: a backup of a small file is over by then, and a turn
may not wait for long."""


class Ledger:
    """The ledger's file. All methods raise sqlite3.Error: without a ledger nothing may be rented."""

    def __init__(self, path: Path) -> None:
        """Open or make the ledger's file (0600) and bring it to the newest version.

        A damaged file is kept beside it, and a new one begun: what is rented is found again by its label.
        Raises OSError too, and ConfigError when a newer autoscaler wrote it.
        """
        self._path = path
        self._lock = threading.Lock()
        # Readers have a connection of their own: they wait for nobody who writes.
        self._reading = threading.Lock()
        self._prune_at = float("-inf")
        self._notes: dict[str, str | float | None] = {}  # that this process has made
        self._damage: str | None = None  # why the file cannot be gone on with
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
            self._db.executemany("INSERT OR IGNORE INTO host_key VALUES (?,?)", entries.host_keys.items())
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

    # -- reading ------------------------------------------------------------------------------------

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
        return break_down([BillingInterval(*row) for row in rows], worked, from_s, to_s)

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


def _last_durations(db: sqlite3.Connection, kind: str) -> list[float]:
    """Return the last durations of a kind in seconds, oldest first."""
    rows = db.execute(
        "SELECT seconds FROM took WHERE kind = ? ORDER BY at_s DESC LIMIT ?", (kind, KEPT)
    ).fetchall()
    return [float(seconds) for (seconds,) in reversed(rows)]


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
