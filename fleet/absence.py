"""How long the listings lack one instance, and when the cloud's page of it is asked for."""

from dataclasses import dataclass

STUCK_S = 300.0
"""Seconds after which an order that was begun and not answered is lost: no call of the CLI lasts so long."""

PAGE_TURNS = 2
"""Listings in a row that lack an instance before its own page is asked for: one may be late."""


@dataclass
class Absence:
    """The listings in a row that lack one instance, and the asking for the cloud's page of that instance."""

    since: float | None = None
    turns: int = 0
    asking: bool = False
    asked_at: float = float("-inf")
    shown_at: float = float("-inf")  # when its own page last said that it is there

    def miss(self, now: float) -> float:
        """Count a listing that lacks the instance; return for how many seconds the listings lack it now."""
        self.since = now if self.since is None else self.since
        self.turns += 1
        return now - self.since

    def end(self) -> None:
        """Note that a listing shows the instance again."""
        self.since, self.turns = None, 0

    def ask(self, now: float) -> None:
        """Note that the cloud's page of the instance is asked for."""
        self.asking, self.asked_at = True, now

    def answer(self, now: float, *, shown: bool) -> None:
        """Note that the cloud's page of the instance was answered for. shown: it shows the instance."""
        self.asking = False
        if shown:
            self.shown_at = now

    def page_due(self, repeat_s: float, now: float) -> bool:
        """Return whether the cloud's page of the instance is to be asked for now."""
        waiting = self.asking and now - self.asked_at <= STUCK_S
        return self.turns >= PAGE_TURNS and not waiting and now - self.asked_at >= repeat_s
