"""Whether this autoscaler process can do its job, and why not where it cannot: what `GET /health` says."""

import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from process.safe_text import safe_text

log = logging.getLogger("autoscaler")

LEDGER_FAILS_S = 5.0
"""Seconds for which the ledger may be locked by somebody else before it is a reason."""

DEAF_S = 30.0
"""Seconds without a report from a loadbalancer that is heard otherwise."""

REPORTS_S = 5.0
"""Seconds for which a loadbalancer counts as reporting; it does so each second."""

MOST_HEARD = 100
"""Loadbalancers that are kept apart; there are a few."""

REFUSED_CREATES = 3
"""Creates in a row that failed, from which on nothing can be rented."""

CRASH_LOOP = 3, 60.0
"""Ends of one thread, within so many seconds, from which on its work is not done."""

COMPLAIN_EVERY_S = 60.0
"""Seconds between two lines of log about the same trouble."""


REASONS = (
    "no_good_turn",
    "ledger_not_writable",
    "no_reports",
    "no_credit",
    "creates_fail",
    "thread_dies",
    "held",
)
"""Every word that a Reason may have."""


@dataclass(frozen=True)
class Reason:
    """One reason why the autoscaler cannot do its job: a word for programs, and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class Heard:
    """When a loadbalancer was heard of last, and since when none of its reports was understood."""

    contact_at: float
    deaf_since: float
    url: str = ""  # where it takes the hot set, if it does


def _named(name: str, heard: Heard) -> str:
    return f"{name or 'unnamed'} (takes the hot set at {heard.url})" if heard.url else name or "unnamed"


class OwnHealth:
    """What went wrong in this autoscaler process. Any thread may call; times are the caller's seconds."""

    def __init__(self) -> None:
        """Begin a process in which nothing went wrong."""
        self.restarts: Counter[str] = Counter()  # of threads that ended by an error
        self.clock_steps: list[tuple[float, float]] = []  # when, and by how many seconds
        self._lock = threading.Lock()
        self._ledger: tuple[float, float, str] | None = None  # since, last seen, why
        self._heard: dict[str, Heard] = {}  # loadbalancers, by name
        self._reported: dict[str, float] = {}  # by loadbalancer, when its last report was understood
        self._deaths: dict[str, list[float]] = {}
        self._last_death = ""
        self._complained: dict[str, float] = {}

    # -- what is noted ---------------------------------------------------------------------------------

    def note_unwritten(self, error: Exception, now: float) -> None:
        """Note that the ledger could not be written, with the error."""
        with self._lock:
            since = now if self._ledger is None else self._ledger[0]
            self._ledger = since, now, f"{type(error).__name__}: {error}"

    def note_written(self) -> bool:
        """Note that the ledger was written; return whether the last attempt to write it had failed."""
        with self._lock:
            failed, self._ledger = self._ledger is not None, None
        return failed

    def note_contact(self, loadbalancer: str, now: float, url: str = "") -> None:
        """Note that a loadbalancer was heard of, whatever it sent; "": one that gives no name.

        url: where it has taken a hot set.
        """
        loadbalancer, url = safe_text(loadbalancer, 64), safe_text(url)
        with self._lock:
            self._heard = {n: h for n, h in self._heard.items() if now - h.contact_at <= DEAF_S}
            before = self._heard.get(loadbalancer)
            if before is not None:
                self._heard[loadbalancer] = replace(before, contact_at=now, url=url or before.url)
            elif len(self._heard) < MOST_HEARD:
                self._heard[loadbalancer] = Heard(now, now, url=url)

    def note_report(self, loadbalancer: str, now: float) -> None:
        """Note that a busy report of a loadbalancer was understood."""
        with self._lock:
            for name in (loadbalancer, ""):  # before 2026-12 they named themselves in reports only
                if name in self._heard:
                    self._heard[name] = replace(self._heard[name], deaf_since=now)
            self._reported = {n: at for n, at in self._reported.items() if now - at < REPORTS_S}
            self._reported[safe_text(loadbalancer, 64)] = now

    def reports(self, loadbalancer: str, now: float) -> bool:
        """Return whether a report of that loadbalancer was understood lately."""
        with self._lock:
            at = self._reported.get(safe_text(loadbalancer, 64), float("-inf"))
        return now - at < REPORTS_S

    def note_death(self, thread: str, error: BaseException, now: float) -> None:
        """Note that a thread of this process ended by an error; the caller starts it again."""
        with self._lock:
            self.restarts[thread] += 1
            times = self._deaths.setdefault(thread, [])
            times.append(now)
            del times[: -CRASH_LOOP[0]]
            self._last_death = f"{thread}: {type(error).__name__}: {error}"

    def note_step(self, by_s: float, now: float) -> None:
        """Note that the wall clock was set by that many seconds."""
        with self._lock:
            self.clock_steps = [*self.clock_steps[-9:], (now, by_s)]

    # -- what is asked ---------------------------------------------------------------------------------

    def heard(self, now: float) -> int:
        """Return from how many loadbalancers something came of late, whatever it was."""
        with self._lock:
            return sum(now - h.contact_at <= DEAF_S for h in self._heard.values())

    @property
    def writable(self) -> bool:
        """Whether the ledger could be written when that was last tried."""
        return self._ledger is None

    def may_complain(self, about: str, now: float) -> bool:
        """Return whether to log about that trouble now; True once a minute for each."""
        with self._lock:
            if now - self._complained.get(about, float("-inf")) < COMPLAIN_EVERY_S:
                return False
            self._complained[about] = now
            return True

    def complain(self, about: str, error: Exception, now: float) -> None:
        """Log an error, with its traceback if it is our own code's; about: what could not be done.

        What a full disk or a locked ledger causes is logged without one; all of it once a minute.
        """
        of_disk = isinstance(error, sqlite3.OperationalError | OSError)
        if not self.may_complain("ledger" if of_disk else f"{about} {type(error).__name__}", now):
            return
        if of_disk:
            log.warning("%s: %s: %s", about, type(error).__name__, error)
        else:
            log.error("%s", about, exc_info=error)

    def reasons(self, failed_creates: int, last_failure: str, now: float) -> list[Reason]:
        """Return the reasons why the autoscaler cannot do its job now; an empty list when it can.

        failed_creates, last_failure: how many creates failed in a row, and why the last did.
        """
        with self._lock:
            ledger, heard = self._ledger, dict(self._heard)
            looping = [
                name
                for name, times in self._deaths.items()
                if len(times) >= CRASH_LOOP[0] and now - times[0] <= CRASH_LOOP[1]
            ]
        found = []
        if ledger is not None and now - ledger[0] >= LEDGER_FAILS_S:
            found.append(
                Reason(
                    "ledger_not_writable",
                    f"the ledger could not be written for {now - ledger[0]:.0f} s: {ledger[2]}",
                )
            )
        deaf = {n: h for n, h in heard.items() if now - h.deaf_since >= DEAF_S > now - h.contact_at}
        if deaf:
            longest_s = now - min(h.deaf_since for h in deaf.values())
            found.append(
                Reason(
                    "no_reports",
                    f"no report was understood for {longest_s:.0f} s from {len(deaf)} of {len(heard)} "
                    f"loadbalancers that are there: {', '.join(_named(n, deaf[n]) for n in sorted(deaf))}",
                )
            )
        if failed_creates >= REFUSED_CREATES:
            found.append(
                Reason("creates_fail", f"{failed_creates} creates in a row failed, the last: {last_failure}")
            )
        if looping:
            found.append(Reason("thread_dies", f"it ends again and again: {self._last_death}"))
        return found


def keep_alive(
    run: Callable[[], None],
    name: str,
    own: OwnHealth,
    clock: Callable[[], float],
    stopped: threading.Event,
    rest_s: float = 1.0,
) -> None:
    """Call `run` until it returns; call it again after an error, which is logged and noted.

    rest_s: seconds between an error and the next call. stopped: ends the calls.
    """
    while True:
        try:
            run()
        except BaseException as e:
            own.note_death(name, e, clock())
            if own.may_complain(f"thread {name}", clock()):
                log.exception("thread %s ended, it begins again", name)
            if stopped.wait(rest_s):
                return
        else:
            return
