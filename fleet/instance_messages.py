"""The messages that an instance sends by itself: how often it may, and what it said last.

An instance is somebody else's computer, so the messages that are taken in are bounded.
"""

from enum import StrEnum

from process.safe_text import safe_text
from web.messages.reports import ReadyBody
from web.replay_guard import ReplayGuard

BURST = 20
"""Messages at once: a model server that ends and begins again says three."""

REST_S = 2.0
"""Seconds after which one more is taken; an instance that loads says how far it is every five."""


class MessageBudget:
    """How many messages of one instance may be taken in now: up to BURST, one more each REST_S."""

    def __init__(self) -> None:
        """Begin with room for BURST messages."""
        self._left, self._at = float(BURST), float("-inf")

    def take(self, now: float) -> bool:
        """Return whether one more message may be taken in, and count it if so."""
        self._left = min(float(BURST), self._left + max(0.0, now - self._at) / REST_S)
        self._at = max(now, self._at)
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Hearing(StrEnum):
    """What became of a message that an instance sent."""

    NEWS = "news"  # it says something else than the one before
    AGAIN = "again"  # it says the same
    HEARD = "heard before"
    TOO_MANY = "too many"

    @property
    def taken(self) -> bool:
        """Whether the message was taken in: it was neither a copy nor one too many."""
        return self in (Hearing.NEWS, Hearing.AGAIN)


class Ear:
    """The messages of one instance: the last one that was taken in, and what guards against too many."""

    def __init__(self) -> None:
        """Begin without a message."""
        self.says = ""  # its last message
        self.boot_id = ""  # of that
        self.certificate: str | None = None  # the machine's, by a message of the present boot
        self._budget = MessageBudget()
        self._guard = ReplayGuard()

    def forget(self) -> None:
        """Note that another boot begins: what was said before is no word of it."""
        self.says, self.certificate = "", None

    @property
    def word(self) -> str:
        """The last message of the present boot, if the machine vouched for its certificate with it."""
        return self.says if self.certificate else ""

    def hear(self, said: ReadyBody, now: float) -> Hearing:
        """Take in a message unless it is a copy or one too many; return what became of it."""
        if not self._guard.accept(said.boot_id, said.number):
            return Hearing.HEARD  # perhaps somebody else's copy: it takes nothing from the instance
        if not self._budget.take(now):
            return Hearing.TOO_MANY
        self.boot_id, self.certificate = said.boot_id, said.certificate or None
        before, self.says = self.says, safe_text(f"{said.state}: {said.why}" if said.why else said.state)
        return Hearing.AGAIN if before == self.says else Hearing.NEWS
