"""How fast an answer came, as its client met it: what the loadbalancer is told of it, and when.

    first    seconds from sending the request to the first part of the answer
    rest     seconds that were waited for the other parts; what the program does in between does not count
    pieces   events of a stream; 0: the answer came in one piece

No byte of an answer is in that, and neither is how long it was. Times are seconds of the caller's own clock.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TELL_EVERY_S = 2.0
"""Seconds between two messages about answers: the loadbalancer judges minutes."""

MOST_TOLD = 64
"""Answers of one message. Of more, those that ended first since the last message speak for all."""

NOT_AGAIN_S = 600.0
"""Seconds until a loadbalancer that knows no such message is told again: it may have been updated."""

LONGEST_S, MOST_PIECES = 1e5, 10_000_000
"""What a loadbalancer believes."""

PIECE = b"data: {"
"""Where an event of a stream begins; a text that has it is counted twice."""


@dataclass(slots=True)
class AnswerPace:
    """The pace of one answer, while it is read. first_s: until its head; then until its first part."""

    first_s: float
    rest_s: float = 0.0
    pieces: int = 0
    begun: bool = False
    _asked: float | None = None

    def ask(self, now: float) -> None:
        """Note that the next part is waited for from now on."""
        self._asked = now

    def came(self, part: bytes, now: float) -> None:
        """Note that a part came; b"" is the end."""
        waited_s = 0.0 if self._asked is None else now - self._asked
        self._asked = None
        if self.begun:
            self.rest_s += waited_s
        else:
            self.begun = True
            self.first_s += waited_s
        self.pieces += part.count(PIECE)

    def end(self, now: float) -> bool:
        """Note that no more is read; return whether there is anything to tell: it was read or waited for."""
        if not self.begun and self._asked is None:
            return False
        self.came(b"", now)  # what is waited for in vain counts, too
        return True

    def told(self, request_id: str) -> dict[str, Any]:
        """Return what the loadbalancer is told of this answer."""
        return {
            "request_id": request_id,
            "first_s": round(min(self.first_s, LONGEST_S), 4),
            "rest_s": round(min(self.rest_s, LONGEST_S), 4),
            "pieces": min(self.pieces, MOST_PIECES),
        }


class PaceLog:
    """The answers whose pace is still to be told."""

    def __init__(self) -> None:
        """Start with none."""
        self._waiting: deque[dict[str, Any]] = deque()
        self._due = float("-inf")

    def add(self, told: Mapping[str, Any], now: float) -> bool:
        """Keep the pace of an answer; return whether it is the first that waits to be told."""
        first = not self._waiting
        if first:
            self._due = max(self._due, now + TELL_EVERY_S)
        if len(self._waiting) < MOST_TOLD:
            self._waiting.append(dict(told))
        return first

    def take(self, now: float) -> Sequence[Mapping[str, Any]]:
        """Return what is to be told now, and forget it."""
        if not self._waiting or now < self._due:
            return ()
        out = list(self._waiting)
        self._waiting.clear()
        return out

    def refuse(self, now: float) -> None:
        """Note that the loadbalancer knows no such message."""
        self._due = now + NOT_AGAIN_S

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()

    def look_in_s(self, now: float) -> float | None:
        """Return in how many seconds there is something to tell; None: not before another answer."""
        return max(0.01, self._due - now) if self._waiting else None
