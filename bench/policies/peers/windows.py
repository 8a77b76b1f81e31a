"""Memories of the last so many seconds: mean and peak of a gauge, growth of a counter.

A window of length w at time t holds what was noted in (t - w, t]. Means are summed afresh and never kept as a
running sum: what is left of one after a burst is 1e-13, and the ceiling of that is a whole replica.
"""

from collections import deque


class Gauge:
    """The last span_s seconds of a value that is read now and then."""

    def __init__(self, span_s: float) -> None:
        """span_s: length of the window, seconds."""
        self.span_s = span_s
        self._noted: deque[tuple[float, float]] = deque()

    def note(self, now: float, value: float) -> None:
        """Add a value, forget what is too old."""
        self._noted.append((now, value))
        self.forget(now)

    def forget(self, now: float) -> None:
        """Drop what left the window; the newest value is kept however old it is."""
        while len(self._noted) > 1 and self._noted[0][0] <= now - self.span_s:
            self._noted.popleft()

    def mean(self) -> float:
        """Return the mean of what is in the window, 0 when nothing was ever noted."""
        return sum(v for _, v in self._noted) / len(self._noted) if self._noted else 0.0

    def peak(self) -> float:
        """Return the largest in the window, 0 when nothing was ever noted."""
        return max((v for _, v in self._noted), default=0.0)


class Peak:
    """The largest value of the last span_s seconds, in constant time a note."""

    def __init__(self, span_s: float) -> None:
        """span_s: length of the window, seconds."""
        self.span_s = span_s
        self._falling: deque[tuple[float, float]] = deque()  # values fall from left to right

    def note(self, now: float, value: float) -> float:
        """Add a value; gives back the largest in the window."""
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now, value))
        while self._falling[0][0] <= now - self.span_s and len(self._falling) > 1:
            self._falling.popleft()
        return self._falling[0][1]


class Growth:
    """How much a cumulative figure grew in the last span_s seconds."""

    def __init__(self, span_s: float) -> None:
        """span_s: length of the window, seconds."""
        self.span_s = span_s
        self._noted: deque[tuple[float, float]] = deque()

    def note(self, now: float, total: float) -> float:
        """Add a reading; gives back the growth over the window (over what is known while it is younger).

        A reading below the last one means that the counter began anew: what was before is forgotten.
        """
        if self._noted and total < self._noted[-1][1]:
            self._noted.clear()
        self._noted.append((now, total))
        while len(self._noted) > 1 and self._noted[1][0] <= now - self.span_s:
            self._noted.popleft()
        return total - self._noted[0][1]

    @property
    def seconds(self) -> float:
        """What the last growth was measured over; 0 after the first reading."""
        return self._noted[-1][0] - self._noted[0][0] if self._noted else 0.0

    def rate(self, now: float, total: float) -> float:
        """Return growth per second, 0 while there is only one reading."""
        grown = self.note(now, total)
        return grown / self.seconds if self.seconds > 0.0 else 0.0
