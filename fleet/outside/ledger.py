"""What the fleet was and cost, in SQLite, so that a restarted autoscaler knows both.

One row per stretch of time an instance spent in one state at one price. A row is opened when the
stretch begins and closed when it ends, so after `kill -9` the open rows are the fleet as it was
last seen: the next process goes on from them, and no dollar between is lost.

    stretch      instance, machine, label, state, from, to (NULL while it lasts), $/h now, $/h if running
    worked       seconds an instance had at least one request in flight, in buckets of 15 s
    worked_day   the same by day, of what is older than a week
    arrived      what arrived in each second: requests, work, prompt tokens; nothing of what was asked
    fleet        one row an instance: what must be known again after a restart
    mourned      instances that vanished: they count against the limits until then
    bad_machine  machine_id and until when it is not rented again
    host_key     the ssh host key an instance showed first

Times are epoch seconds. Any thread may call.
"""

import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from fleet.demand import Arrived
from fleet.journal import BOOT_STATES, BUCKET_S, HOT_STATES, BillingInterval, Costs, SavedInstance
from process.errors import ConfigError

DAY_S = 86_400.0

KEPT_S = 8 * DAY_S
"""So long seconds of arrivals and buckets of work are kept: a week for comparisons, and the day before."""

PRUNE_EVERY_S = 3600.0
"""A prune deletes an hour then, in milliseconds."""

_VERSION_1 = """
CREATE TABLE IF NOT EXISTS stretch(
  label TEXT NOT NULL, instance INTEGER, machine INTEGER, state TEXT NOT NULL,
  from_s REAL NOT NULL, to_s REAL, usd_h REAL NOT NULL, running_usd_h REAL NOT NULL, why TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS open_stretch ON stretch(label) WHERE to_s IS NULL;
CREATE INDEX IF NOT EXISTS stretch_to ON stretch(to_s);
CREATE TABLE IF NOT EXISTS worked(
  label TEXT NOT NULL, bucket INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY(label, bucket));
CREATE TABLE IF NOT EXISTS worked_day(
  label TEXT NOT NULL, day INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY(label, day));
CREATE INDEX IF NOT EXISTS worked_bucket ON worked(bucket);
CREATE TABLE IF NOT EXISTS arrived(
  second INTEGER PRIMARY KEY, requests REAL NOT NULL, work REAL NOT NULL, prompt_tokens REAL NOT NULL);
CREATE TABLE IF NOT EXISTS fleet(
  label TEXT PRIMARY KEY, instance INTEGER, machine INTEGER, loaded INTEGER NOT NULL,
  doomed INTEGER NOT NULL, ordered_s REAL NOT NULL, throughput REAL);
CREATE TABLE IF NOT EXISTS bad_machine(machine INTEGER PRIMARY KEY, until_s REAL NOT NULL, why TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS mourned(label TEXT PRIMARY KEY, until_s REAL NOT NULL, usd_h REAL NOT NULL);
CREATE TABLE IF NOT EXISTS host_key(label TEXT PRIMARY KEY, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS took(kind TEXT NOT NULL, at_s REAL NOT NULL, seconds REAL NOT NULL);
CREATE INDEX IF NOT EXISTS took_at ON took(at_s);
"""

MIGRATIONS = ((1, _VERSION_1),)
"""(version, SQL that brings a ledger of the version before to it), oldest first; released ones never change.

Version 0 is an empty file, or a ledger from before versions (commit 0abccd6), which has these tables, or all
but the youngest of them.
"""


class Ledger:
    """The file. Raises sqlite3.Error when it cannot be written: without a ledger nothing may be rented."""

    def __init__(self, path: Path) -> None:
        """Open or make the file (0600) and bring it to the newest version.

        Raises OSError too, and ConfigError when a newer autoscaler wrote it.
        """
        path.touch(mode=0o600, exist_ok=True)
        self._lock = threading.Lock()
        self._prune_at = float("-inf")
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._migrate(path)
            # WAL with NORMAL survives kill -9 of the process; only a power cut may lose the last transaction.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; the open intervals stay open."""
        with self._lock:
            self._db.close()

    # -- writing ------------------------------------------------------------------------------------

    def write(
        self,
        *,
        intervals: Iterable[BillingInterval] = (),
        fleet: Iterable[SavedInstance] = (),
        durations: Iterable[tuple[str, float, float]] = (),
        bad_machines: Mapping[int, tuple[float, str]] | None = None,
        vanished: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Record what changed, in one transaction.

        A stretch with to_s None closes the label's open one at its from_s and opens itself; one with state
        "gone" closes only. durations holds (kind, at, seconds): "create", "start", "stop",
        "destroy" from order to effect, "load" from create to hot, "boot" from start to hot. vanished holds
        (until when, $/h) by label.
        """
        with self._lock, self._transaction():
            for s in intervals:
                self._db.execute(
                    "UPDATE stretch SET to_s = ? WHERE label = ? AND to_s IS NULL", (s.from_s, s.label)
                )
                if s.state != "gone":
                    self._db.execute(
                        "INSERT INTO stretch VALUES (?,?,?,?,?,?,?,?,?)",
                        (
                            s.label,
                            s.instance,
                            s.machine,
                            s.state,
                            s.from_s,
                            s.to_s,
                            s.usd_h,
                            s.running_usd_h,
                            s.why,
                        ),
                    )
            for r in fleet:
                self._db.execute(
                    "INSERT OR REPLACE INTO fleet VALUES (?,?,?,?,?,?,?)",
                    (r.label, r.instance, r.machine, r.loaded, r.condemned, r.ordered_s, r.throughput),
                )
            self._db.executemany("INSERT INTO took VALUES (?,?,?)", durations)
            for machine, (until_s, why) in (bad_machines or {}).items():
                self._db.execute("INSERT OR REPLACE INTO bad_machine VALUES (?,?,?)", (machine, until_s, why))
            for label, (until_s, usd_h) in (vanished or {}).items():
                self._db.execute("INSERT OR REPLACE INTO mourned VALUES (?,?,?)", (label, until_s, usd_h))

    def add_counts(
        self, worked: Mapping[tuple[str, int], float], arrived: Iterable[Arrived], now: float
    ) -> None:
        """Both in one transaction, worked by (label, number of the bucket); once an hour also a prune."""
        seconds = [(label, bucket, s) for (label, bucket), s in worked.items() if s > 0.0]
        arrivals = [(a.second, a.requests, a.work, a.prompt_tokens) for a in arrived]
        if not seconds and not arrivals:
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
            if now >= self._prune_at:
                self._prune(now - KEPT_S)
                self._prune_at = now + PRUNE_EVERY_S

    def _prune(self, before_s: float) -> None:
        """Forget older arrivals, and make days of older buckets of work: no dollar changes its kind."""
        self._db.execute("DELETE FROM arrived WHERE second < ?", (before_s,))
        old = int(before_s // DAY_S * DAY_S // BUCKET_S)  # whole days only
        self._db.execute(
            "INSERT INTO worked_day SELECT label, CAST(bucket * ?1 / ?2 AS INTEGER) AS day, SUM(seconds)"
            " FROM worked WHERE bucket < ?3 GROUP BY label, day"
            " ON CONFLICT(label, day) DO UPDATE SET seconds = seconds + excluded.seconds",
            (BUCKET_S, DAY_S, old),
        )
        self._db.execute("DELETE FROM worked WHERE bucket < ?", (old,))

    def remember_host_key(self, label: str, key: str) -> str:
        """The host key first seen for that label; stores this one when there was none."""
        with self._lock, self._transaction():
            self._db.execute("INSERT OR IGNORE INTO host_key VALUES (?,?)", (label, key))
            row = self._db.execute("SELECT key FROM host_key WHERE label = ?", (label,)).fetchone()
        return str(row[0])

    # -- reading ------------------------------------------------------------------------------------

    def saved_instances(self) -> list[SavedInstance]:
        """The instances that were not gone when the last process ended, and those once condemned."""
        with self._lock:
            rows = self._db.execute(
                "SELECT f.label, f.instance, f.machine, f.loaded, f.doomed, f.ordered_s, f.throughput,"
                " s.state, s.from_s, COALESCE(s.usd_h, 0.0), COALESCE(s.running_usd_h, 0.0)"
                " FROM fleet f LEFT JOIN stretch s ON s.label = f.label AND s.to_s IS NULL"
                " WHERE s.state IS NOT NULL OR f.doomed"
            ).fetchall()
        return [SavedInstance(r[0], r[1], r[2], bool(r[3]), bool(r[4]), *r[5:]) for r in rows]

    def bad_machines(self, now: float) -> dict[int, float]:
        """Machines not to be rented, each with the time until when."""
        with self._lock:
            return dict(
                self._db.execute(
                    "SELECT machine, until_s FROM bad_machine WHERE until_s > ?", (now,)
                ).fetchall()
            )

    def vanished(self, now: float) -> dict[str, tuple[float, float]]:
        """What vanished lately, by label: until when it counts against the limits, and its $/h."""
        with self._lock:
            rows = self._db.execute(
                "SELECT label, until_s, usd_h FROM mourned WHERE until_s > ?", (now,)
            ).fetchall()
        return {label: (until_s, usd_h) for label, until_s, usd_h in rows}

    def durations(self, from_s: float, to_s: float) -> list[tuple[str, float, float]]:
        """(kind, at, seconds) of what finished inside the window."""
        with self._lock:
            return self._db.execute(
                "SELECT kind, at_s, seconds FROM took WHERE at_s >= ? AND at_s < ? ORDER BY at_s",
                (from_s, to_s),
            ).fetchall()

    def last_durations(self, kind: str, count: int) -> list[float]:
        """The seconds of the last so many of a kind, newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT seconds FROM took WHERE kind = ? ORDER BY at_s DESC LIMIT ?", (kind, count)
            ).fetchall()
        return [float(r[0]) for r in rows]

    def arrived(self, from_s: float, to_s: float) -> list[Arrived]:
        """What arrived in the seconds that begin in the window, oldest first; an empty second has none."""
        with self._lock:
            rows = self._db.execute(
                "SELECT second, requests, work, prompt_tokens FROM arrived"
                " WHERE second >= ? AND second < ? ORDER BY second",
                (from_s, to_s),
            ).fetchall()
        return [Arrived(*row) for row in rows]

    def costs(self, from_s: float, to_s: float, *, with_intervals: bool = True) -> Costs:
        """What was spent inside the window, to_s being at most now.

        Hot dollars are split by the seconds with at least one request in flight. usd_if_all_hot prices every
        instance at its running price for as long as it existed inside the window.
        """
        with self._lock:
            rows = self._db.execute(
                "SELECT label, instance, machine, state, from_s, to_s, usd_h, running_usd_h, why FROM stretch"
                " WHERE from_s < ? AND (to_s IS NULL OR to_s > ?) ORDER BY from_s",
                (to_s, from_s),
            ).fetchall()
            worked = dict(
                self._db.execute(
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
        intervals = [BillingInterval(*row) for row in rows]
        hot_s: dict[str, float] = {}
        hot_usd: dict[str, float] = {}
        loading = stopped = lost = all_hot = 0.0
        for s in intervals:
            seconds = s.seconds_within(from_s, to_s)
            usd = s.usd_h * seconds / 3600.0
            all_hot += s.running_usd_h * seconds / 3600.0
            if s.state in HOT_STATES:
                hot_s[s.label] = hot_s.get(s.label, 0.0) + seconds
                hot_usd[s.label] = hot_usd.get(s.label, 0.0) + usd
            elif s.state in BOOT_STATES:
                loading += usd
            elif s.state in {"failed", "destroying"}:
                lost += usd
            else:
                stopped += usd
        share = {
            label: min(1.0, worked.get(label, 0.0) / seconds) if seconds > 0 else 0.0
            for label, seconds in hot_s.items()
        }
        working = sum(usd * share[label] for label, usd in hot_usd.items())
        hot = sum(hot_usd.values())
        return Costs(
            hot_working=working,
            hot_idle=hot - working,
            loading=loading,
            stopped=stopped,
            lost=lost,
            usd_if_all_hot=all_hot,
            utilisation=working / hot if hot > 0 else None,
            intervals=tuple(intervals) if with_intervals else (),
        )

    # -- inside -------------------------------------------------------------------------------------

    def _migrate(self, path: Path) -> None:
        """Run the migrations that the file has not had, each in one transaction with its version."""
        [(version,)] = self._db.execute("PRAGMA user_version").fetchall()
        newest = MIGRATIONS[-1][0]
        if version > newest:
            raise ConfigError(
                f"{path} was written by a newer autoscaler: it has version {version}, and this one knows "
                f"versions up to {newest}"
            )
        for to_version, sql in MIGRATIONS:
            if to_version > version:
                self._db.executescript(f"BEGIN IMMEDIATE;{sql}PRAGMA user_version={to_version};COMMIT;")

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            # Also after a COMMIT that failed: else no transaction could ever begin again.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
