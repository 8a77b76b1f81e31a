"""Figures of many requests in little memory: counts by size, from which percentiles are read.

A value is counted in a bucket whose edges are a factor GROWTH apart, so a percentile is wrong by at most
0.25 % and millions of values take as much memory as thousands. Mean and maximum are exact.
"""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from simulation.report import QUANTILES

GROWTH = 1.005
LEAST = 1e-5
"""Seconds; what is smaller counts as that."""

_STEP = math.log(GROWTH)

_FRESH = 4096
"""Values that are counted together: alone each costs 0.7 µs, so 0.1 µs (2026-11)."""


class Digest:
    """Numbers of 0 or more, as counts by size."""

    __slots__ = ("_buckets", "_count", "_fresh", "_largest", "_total")

    def __init__(self, values: Iterable[float] = ()) -> None:
        """Empty, or with these."""
        self._buckets: Counter[int] = Counter()
        self._fresh: list[float] = []  # not counted yet
        self._count = 0
        self._total = 0.0
        self._largest = 0.0
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        """Count one."""
        self._fresh.append(value)
        if len(self._fresh) == _FRESH:
            self._count_fresh()

    def _count_fresh(self) -> None:
        if not self._fresh:
            return
        values = np.array(self._fresh)
        self._fresh.clear()
        sizes = np.log(np.maximum(values, LEAST) / LEAST) / _STEP
        self._buckets.update(np.where(values > LEAST, sizes.astype(np.int64) + 1, 0).tolist())
        self._count += len(values)
        # One after the other: the sum does not depend on how many are counted together.
        self._total = float(np.add.accumulate(np.concatenate(([self._total], values)))[-1])
        self._largest = max(self._largest, float(values.max()))

    @property
    def count(self) -> int:
        """So many were counted."""
        self._count_fresh()
        return self._count

    @property
    def total(self) -> float:
        """Their sum."""
        self._count_fresh()
        return self._total

    @property
    def largest(self) -> float:
        """The largest of them, 0 when there is none."""
        self._count_fresh()
        return self._largest

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
