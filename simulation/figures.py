"""Figures of many requests in little memory: counts by size, from which percentiles are read.

A value is counted in a bucket whose edges are a factor GROWTH apart, so a percentile is wrong by at most
0.25 % and millions of values take as much memory as thousands. Mean and maximum are exact.
"""

import math
from collections.abc import Iterable

from report import QUANTILES

GROWTH = 1.005
LEAST = 1e-5
"""Seconds; what is smaller counts as that."""

_STEP = math.log(GROWTH)


class Digest:
    """Numbers of 0 or more, as counts by size."""

    __slots__ = ("_buckets", "count", "largest", "total")

    def __init__(self, values: Iterable[float] = ()) -> None:
        """Empty, or with these."""
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.largest = 0.0
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        """Count one."""
        at = int(math.log(value / LEAST) / _STEP) + 1 if value > LEAST else 0
        buckets = self._buckets
        buckets[at] = buckets.get(at, 0) + 1
        self.count += 1
        self.total += value
        if value > self.largest:
            self.largest = value

    def percentile(self, share: float) -> float:
        """The value that this share of all does not exceed, within 0.25 %; ValueError when there is none."""
        if not self.count:
            raise ValueError("no value was counted")
        rank = share * (self.count - 1)
        seen = 0
        for at in sorted(self._buckets):
            seen += self._buckets[at]
            if seen > rank:
                middle = LEAST * GROWTH ** (at - 0.5) if at else 0.0
                return min(middle, self.largest)
        return self.largest

    def spread(self) -> dict[str, float | None]:
        """Mean, percentiles and maximum, as report.spread; all null when there is no value."""
        if not self.count:
            return dict.fromkeys(("mean", *QUANTILES, "max"))
        return {
            "mean": self.total / self.count,
            **{name: self.percentile(share) for name, share in QUANTILES.items()},
            "max": self.largest,
        }
