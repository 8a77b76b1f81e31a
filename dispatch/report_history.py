"""What one instance has reported so far, and when it was asked for its next load report."""

import math

from dispatch.report_budget import ReportBudget
from web.messages.reports import LoadReport, PushedReport

SILENT = 3
"""Polls in a row without an answer after which the requests of an instance are taken to be lost."""


class ReportHistory:
    """The load reports of one instance: counts, the last figures, polls. Times are epoch seconds."""

    def __init__(self, now: float) -> None:
        """Start without a report of the instance."""
        self.budget = ReportBudget(now)
        self.seq = 0  # number of the last event that is known
        self.count = 0  # reports that were polled
        self.pushes = 0
        self.running = self.waiting = 0  # requests, by the last report
        self.polling = False  # a poll is under way
        self.polled_at = now
        self.look_at = now  # no report is due until then
        self._asked_at = now
        self._push_number = -1
        self._failures = 0  # polls in a row that were not answered
        self._quiet = False  # the last report had no request
        self._down = False  # its model server is down by the last report

    # -- polls --

    def begin_poll(self, now: float) -> None:
        """Note that the instance is asked for a load report now."""
        self.polling = True
        self._asked_at = now

    def end_poll(self, now: float) -> float:
        """Note that a load report came; return when the instance was asked for it, in epoch seconds."""
        asked_at = self._asked_at if self.polling else now
        self.polling = False
        self.polled_at = now
        self.count += 1
        self._failures = 0
        return asked_at

    def fail_poll(self, now: float) -> None:
        """Note that a load report that was asked for did not come."""
        self.polling = False
        self.polled_at = now
        self._failures += 1

    def look_again(self, at: float) -> None:
        """Set when to look next whether a load report of this instance is due."""
        self.look_at = at

    @property
    def silent(self) -> bool:
        """Whether the instance has not answered for SILENT polls in a row."""
        return self._failures >= SILENT

    # -- what was reported --

    def take(self, load: LoadReport) -> None:
        """Take over the event number and the request counts of a load report."""
        self.seq, self.running, self.waiting = load.seq, load.running, load.waiting

    def take_push(self, push: PushedReport) -> bool:
        """Count a pushed report; False when its number is not higher than that of the last one."""
        if push.number <= self._push_number:
            return False
        self._push_number = push.number
        self.pushes += 1
        return True

    def follow_push(self, push: PushedReport, now: float) -> None:
        """Take over the last event's number from a push; if events are missing, have the instance polled."""
        if push.missed or push.after > self.seq:
            self.polled_at = -math.inf
            self.look_at = now
        else:
            self.seq = max(self.seq, push.seq)

    def quiet_twice(self, load: LoadReport) -> bool:
        """Return whether this load report and the one before say that no request is in the instance."""
        before, self._quiet = self._quiet, load.model_up and load.running + load.waiting == 0
        return before and self._quiet

    def down_twice(self, load: LoadReport) -> bool:
        """Return whether this load report and the one before say that the model server is down."""
        before, self._down = self._down, not load.model_up
        return before and self._down

    @property
    def model_down(self) -> bool:
        """Whether the instance's model server is down, by the last report that was polled."""
        return self._down

    def reboot(self, seq: int) -> None:
        """Begin another boot of the instance. seq: the number of its last event."""
        self.seq, self._push_number, self._quiet = seq, -1, False
