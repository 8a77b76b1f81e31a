"""Add instances when the busy share is high, remove one when it has been low for a while: the plain policy.

Let d be the demand in instances' worth of capacity and n the hot instances.

    add:    d / n > add_above                    -> ceil(d / aim) hot, at once
    remove: max of d over the last remove_after_s,
            divided by n - 1, < remove_below     -> n - 1 hot

Between the two thresholds nothing moves, and one instance is removed at a time, so a short
lull costs one start and not a fleet. Instances that are coming count as hot: while they boot
nothing more is started unless demand grows past what they will hold.
"""

import math
from dataclasses import dataclass, replace

from policies.types import FleetSnapshot, Targets


@dataclass(frozen=True)
class Busy:
    """Keep the busy share, the demand divided by the hot instances, between two thresholds.

    add_above: busy share that adds; above it a Poisson stream waits noticeably for a free slot.
    aim: busy share that the fleet is given when it grows; the gap to add_above keeps it from flapping.
    remove_below: share of the *smaller* fleet; below add_above by a margin, or it would add again.
    remove_after_s: a start takes minutes, so an instance is kept through lulls of about that length.
    min_hot: instances kept hot with no load at all. spare: loaded instances in all beyond the hot target.
    """

    add_above: float = 0.8
    aim: float = 0.7
    remove_below: float = 0.6
    remove_after_s: float = 300.0
    min_hot: int = 1
    spare: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for thresholds that contradict each other."""
        if not 0.0 < self.aim <= self.add_above:
            raise ValueError(f"aim {self.aim:g}: wanted over 0 and at most add_above, {self.add_above:g}")
        if not 0.0 <= self.remove_below <= self.add_above:
            raise ValueError(
                f"remove_below {self.remove_below:g}: wanted 0 to add_above, {self.add_above:g}, "
                "or it would add again at once"
            )

    @property
    def memory_s(self) -> float:
        """For how many seconds into the past this policy reads the demand: as long as it waits to remove."""
        return self.remove_after_s

    def scaled(self, speedup: float) -> "Busy":
        """Return this policy for a cloud that is `speedup` times as fast: it waits less, but at least 10 s.

        The demand itself is not sped up.
        """
        return replace(self, remove_after_s=max(10.0, self.remove_after_s / speedup))

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return how many instances shall be hot now, and how many there shall be in all."""
        demand = seen.demand[-1][1] if seen.demand else 0.0
        ready = seen.hot + seen.coming
        hot, why = self._hot(seen, demand, ready)
        # A loaded pool is what makes starts quick, so it is not destroyed by a lull: it only grows here.
        return Targets(hot, max(hot + self.spare, seen.total), why)

    def _hot(self, seen: FleetSnapshot, demand: float, ready: int) -> tuple[int, str]:
        if ready < self.min_hot:
            return self.min_hot, f"{ready} hot or coming, at least {self.min_hot} wanted"
        if demand > self.add_above * ready:
            wanted = max(ready + 1, math.ceil(demand / self.aim))
            return wanted, f"demand {demand:.2f} is over {self.add_above:g} of {ready} hot or coming"
        peak = max((d for t, d in seen.demand if t >= seen.now - self.remove_after_s), default=0.0)
        watched_s = seen.now - seen.demand[0][0] if seen.demand else 0.0
        if (
            ready > self.min_hot
            and watched_s >= self.remove_after_s
            and (peak < self.remove_below * (ready - 1) or peak == 0.0)
        ):
            return (
                ready - 1,
                f"peak demand {peak:.2f} in {self.remove_after_s:g} s fits {ready - 1} "
                f"at {self.remove_below:g}",
            )
        return ready, f"demand {demand:.2f} fits {ready} hot or coming"
