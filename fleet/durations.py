"""How long instances of this fleet take to start and to load the model, as measured or by the profile."""

from collections.abc import Sequence

from engine.profile import Profile

KEPT = 20
"""Measured times of a kind that are remembered."""


class MeasuredDurations:
    """The last measured times from start to hot and from order to hot, in seconds, and their medians."""

    def __init__(self, profile: Profile, speedup: float) -> None:
        """Begin with the times in the model's profile, divided by the speedup of a local cloud."""
        self._expected_s = profile.start_time_s / speedup, profile.load_time_s / speedup
        self._starts: list[float] = []
        self._loads: list[float] = []
        self.start_s, self.load_s = self._expected_s

    def restore(self, starts: Sequence[float], loads: Sequence[float]) -> None:
        """Take over the times measured before a restart, oldest first, in seconds."""
        self._starts += starts
        self._loads += loads
        self._take_medians()

    def add_start(self, seconds: float) -> None:
        """Add a measured time from start to hot."""
        self._starts.append(seconds)
        self._take_medians()

    def add_load(self, seconds: float) -> None:
        """Add a measured time from order to hot."""
        self._loads.append(seconds)
        self._take_medians()

    def _take_medians(self) -> None:
        del self._starts[:-KEPT], self._loads[:-KEPT]
        self.start_s = median(self._starts) or self._expected_s[0]
        self.load_s = median(self._loads) or self._expected_s[1]

    @property
    def start_range_s(self) -> tuple[float, float]:
        """The shortest and longest time from start to hot lately, in seconds, or the profile's ± a third."""
        if len(self._starts) > 1:
            return min(self._starts), max(self._starts)
        return self.start_s * 2.0 / 3.0, self.start_s * 4.0 / 3.0


def median(values: Sequence[float]) -> float | None:
    """Return the median of the values; None when there are none.

    `statistics.median` takes five times as long, and every turn asks four times.
    """
    if not values:
        return None
    order = sorted(values)
    half = len(order) // 2
    return order[half] if len(order) % 2 else (order[half - 1] + order[half]) / 2.0
