"""How far something is that takes long, with the time that is left: a line on stderr every few seconds.

Nothing is said of what is done within FIRST_S. The time left is what the rest takes at the speed so far, so
it is only as good as the share that is told.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

FIRST_S, EVERY_S = 5.0, 5.0
"""Seconds until the first line, and between two."""

LEAST_SHARE = 0.01
"""Share of the whole from which on the time left is told: before, it is a guess."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Tells how far one thing is. Make it when the thing begins, and call `to` as often as you like."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = _say,
    ) -> None:
        """Begin now. quiet: say nothing ever. say: takes a line of text."""
        self._quiet = quiet
        self._clock = clock
        self._say = say
        self._begun = clock()
        self._next = self._begun + FIRST_S

    def to(self, share: float | None, what: str = "") -> None:
        """Tell that this share of the whole is done, if a line is due; None: the whole is not known."""
        now = self._clock()
        if self._quiet or now < self._next:
            return
        self._next = now + EVERY_S
        passed = now - self._begun
        parts = [] if share is None else [f"{min(1.0, share):.0%}"]
        parts += [what] if what else []
        parts.append(f"{in_words(passed)} so far")
        if share is not None and share >= LEAST_SHARE:
            parts.append(f"about {in_words(passed * max(0.0, 1.0 - share) / share)} left")
        self._say(", ".join(parts))

    def over(self, items: Sequence[T], what: Callable[[T], str] = str) -> Iterator[T]:
        """Yield the items, and tell after each how many of them are done. what: says an item in words."""
        for n, item in enumerate(items, 1):
            yield item
            self.to(n / len(items), f"{n} of {len(items)} done, {what(item)} last")


def in_words(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5970.0 else f"{seconds / 3600.0:.1f} h"
