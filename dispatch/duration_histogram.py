"""Durations counted by size, for an operator's histograms.

Our own count, because the library that writes the metrics page takes a lock and walks along the buckets for
each value: 0.5 to 0.7 µs. One thread needs no lock, and a bisection takes 0.1 µs (2026-11).
"""

from bisect import bisect_left
from collections.abc import Sequence


class DurationHistogram:
    """How many durations fell into each bucket, and the sum of all; the counts only grow."""

    __slots__ = ("bounds", "counts", "sum_s")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start without durations. bounds: upper ends of the buckets in seconds, ascending, inclusive."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last: longer than every bound
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration, in seconds."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds
