"""How much one instance may report: reports a second, and events in a report and a second.

An instance is somebody else's computer. One that says more than an engine can do is left out of the queue,
with the reason in GET /status, and is neither asked nor heard for OUT_S; then it is tried again. Its numbers
are refused before they are worked on, so that the others do not wait for it.

Times are epoch seconds.
"""

import math

MOST_EVENTS = 65_536
"""Events of a report: an instance keeps no more (remote/events.py). 65,536 take some 0.05 s."""

EVENTS_S = 5_000.0
"""Events a second: a start and an end of far more requests than an engine finishes."""

PUSHES, PUSHES_RATIO = 50.0, 2.0
"""Pushed reports at once, and reports a second, as a ratio to those of the promised interval: a network may
hold some back and let them through together."""

OUT_S = 30.0
"""Seconds that an instance is out which has said too much."""


class ReportBudget:
    """How many more reports and events of one instance are accepted now.

    why: the reason for which the instance is ignored, or was the last time; None: it never was.
    """

    def __init__(self, now: float) -> None:
        """Start with the whole budget of reports and events."""
        self.why: str | None = None
        self.out_until = -math.inf
        self._events, self._events_at = float(MOST_EVENTS), now
        self._pushes, self._pushes_at = PUSHES, now
        self._interval_s = 1.0 / PUSHES

    def promise(self, interval_s: float) -> None:
        """Note the least seconds between two pushed reports that the instance was told."""
        self._interval_s = interval_s

    def excludes(self, now: float) -> bool:
        """Return whether the instance is being ignored now, because it has reported too much."""
        return now < self.out_until

    def reason(self, now: float) -> str | None:
        """Return why the instance is not listened to now; None when it is."""
        return self.why if self.excludes(now) else None

    def take_push(self, events: int, now: float) -> bool:
        """Spend the budget for a pushed report; False when it was one too many: the instance is ignored now.

        events: how many starts and ends of requests the report has.
        """
        since_s = max(0.0, now - self._pushes_at)
        self._pushes = min(PUSHES, self._pushes + since_s * PUSHES_RATIO / self._interval_s) - 1.0
        self._pushes_at = now
        if self._pushes < 0.0:
            return self._exclude(f"more than a report each {self._interval_s:g} s, which it was told", now)
        return self.take(events, now)

    def take(self, events: int, now: float) -> bool:
        """Spend the budget for a report's events; False when they are too many: the instance is ignored."""
        self._events = min(MOST_EVENTS, self._events + max(0.0, now - self._events_at) * EVENTS_S)
        self._events_at = now
        if events > MOST_EVENTS:
            return self._exclude(f"{events} events in a report, of {MOST_EVENTS} at most", now)
        self._events -= events
        if self._events < 0.0:
            return self._exclude(f"more than {EVENTS_S:g} events a second", now)
        return True

    def _exclude(self, why: str, now: float) -> bool:
        self.why, self.out_until = f"it reported {why}", now + OUT_S
        self._events, self._pushes = float(MOST_EVENTS), PUSHES
        self._events_at = self._pushes_at = now
        return False
