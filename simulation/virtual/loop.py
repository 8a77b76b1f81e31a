"""Virtual time: a clock, and a heap of events that are due.

The key is (time, priority, counter): of what is due at the same moment arrivals come first, and the rest
happens in the order in which it was scheduled. What happens inside the model servers is not in the heap: they
go on by themselves until a request has ended (engine/model_servers.py).
"""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

ARRIVAL, USUAL = 0, 1
"""Priorities: a request that arrives sees the fleet before anything else of that moment has happened."""


class EventLoop:
    """The virtual clock of a run, `now` in seconds, and the events that are scheduled on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[..., None], Any]] = []
        self._counter = count()

    def at(self, at: float, what: Callable[..., None], arg: Any = None, priority: int = USUAL) -> None:
        """Schedule a call of what(arg) at a virtual time, or of what() where arg is None."""
        heapq.heappush(self._heap, (at, priority, next(self._counter), what, arg))

    def step(self, play: Callable[[float], bool]) -> None:
        """Carry out the next event: a scheduled one, or one inside the model servers.

        play: advances the model servers until one has an event before the time that it is given, moves the
        clock there and returns True; returns False when there is none.
        """
        heap = self._heap
        if play(heap[0][0]):
            return
        self.now, _, _, what, arg = heapq.heappop(heap)
        if arg is None:
            what()
        else:
            what(arg)

    def go_to(self, now: float) -> None:
        """Move the virtual clock to a time that must be before the next scheduled event."""
        self.now = now
