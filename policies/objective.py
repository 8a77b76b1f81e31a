"""Keep the objective at the least cost: one knob for the operator, a level that replay sets.

Work arrives at a(t) work/s; an instance does c work/s. Every turn:

    level    F = max( E_fast, slow_share * E_slow )     E_w: exponential mean of a over w seconds
    need     R = k / c * (the largest F of the last hold_s)
    backlog  B = work that waits at the loadbalancers, late requests included
    hot      N = max( min_hot, ceil( R + B / (c * drain_s) ) )

           a(t)    .:.:|.  .:|:. .            E_fast follows a rise, slow_share * E_slow keeps a floor under
        F ~~~~~~~~~~~~~~~~~~~~~~~~            a lull, k pays for what no mean can foresee
      N  ____________|~~~~~|______            a backlog asks for what would clear it in drain_s

Instances that are starting count as hot: while they boot nothing more is started. A backlog starts what is
loaded, but orders nothing new: a machine that must first load comes after the burst.

The operator says `goal`, the share of requests that shall be served in time. Everything else is the level:
`simulation/virtual/replay.py` finds it every half hour by simulating the fleet's own last day. Until there
is a history of some twenty minutes the defaults hold; for them k follows from the goal.

The loaded pool (hot + cold) only grows between two replays. When a replay has just settled how many are
worth their storage (`pool`, at `settled_at`) the rest is given up.

Invariants: the same snapshot gives the same answer; hot is at least min_hot; total is never below what is hot
or coming. docs/policies.md has the mathematics with its sources.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from policies.types import BIN_S, FleetSnapshot, Targets

MEANS_LOOK_BACK = 6.0
"""Multiples of w that an exponential mean over w seconds looks back: what is older would weigh exp(-6), a
quarter of a percent. It is a bound, so that a week of history costs no more than three hours."""

SETTLE_S = 60.0
"""Seconds after a replay in which the pool may shrink: a few turns, for an order may fail and be repeated."""

ROUND = 1e-9
"""Instances taken off before rounding up: 3.0000000001 are 3 and an error of addition."""

DEFAULT_K = ((0.99, 2.0), (0.999, 3.2))
"""k for a fleet without history, by goal (docs/reference/policy-study.md 2): between these, and
beyond, straight in the logarithm of the misses."""

RANGES = {
    "goal": (0.5, 0.99999),
    "k": (0.0, 100.0),
    "fast_s": (BIN_S, 86_400.0),
    "slow_s": (BIN_S, 86_400.0),
    "slow_share": (0.0, 2.0),
    "hold_s": (0.0, 86_400.0),
    "drain_s": (1.0, 1e6),
    "pool_headroom": (1.0, 10.0),
    "pool": (0, 100_000),
    "min_hot": (0, 100_000),
}
"""Least and most of each parameter; pool and min_hot are whole numbers."""


@dataclass(frozen=True)
class Objective:
    """Serve the wanted share of requests in time (`goal`); all other parameters are set by replay.

    goal: share of requests to be served in time, the one parameter for the operator.
    k: safety factor over the forecast level; 0 means the default for the goal.
    fast_s, slow_s, slow_share: seconds of the two means, and how much of the slow one is kept in a lull.
    hold_s: seconds for which a need is kept before an instance is taken down for lack of it.
    drain_s: seconds in which what is hot should clear the backlog.
    pool: least number of loaded instances, hot and cold. pool_headroom: the same as a multiple of the hot.
    settled_at: when replay set the pool, on the clock of `FleetSnapshot.now`; -inf: never, so it only grows.
    min_hot: instances kept hot with no load at all.
    """

    goal: float = 0.99
    k: float = 0.0
    fast_s: float = 300.0
    slow_s: float = 1800.0
    slow_share: float = 0.8
    hold_s: float = 60.0
    drain_s: float = 40.0
    pool: int = 0
    pool_headroom: float = 1.2
    settled_at: float = -math.inf
    min_hot: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a parameter that is no number, out of range, or should be whole and is not."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{f.name} {value!r}: wanted a number")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} {value:g}: wanted {least:g} to {most:g}")
            if isinstance(least, int) and value != int(value):
                raise ValueError(f"{name} {value!r}: wanted a whole number")

    @property
    def factor(self) -> float:
        """The safety factor over the forecast level: k, or the default for the goal where k is 0."""
        return self.k if self.k > 0.0 else default_k(self.goal)

    @property
    def memory_s(self) -> float:
        """For how many seconds into the past this policy reads arrivals: its slowest mean and the hold."""
        return self.hold_s + MEANS_LOOK_BACK * max(self.fast_s, self.slow_s)

    def scaled(self, speedup: float) -> "Objective":
        """Return this policy for a cloud that is `speedup` times as fast: its times are divided by that.

        The times over which arrivals are averaged stay at least three bins (of BIN_S seconds) long, because
        arrivals are not sped up.
        """
        return replace(
            self,
            fast_s=max(3 * BIN_S, self.fast_s / speedup),
            slow_s=max(3 * BIN_S, self.slow_s / speedup),
            hold_s=self.hold_s / speedup,
            drain_s=max(BIN_S, self.drain_s / speedup),
        )

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return how many instances shall be hot now, and how many there shall be in all."""
        if seen.capacity is None or not len(seen.arriving):
            what = "nothing has arrived yet" if seen.capacity else "no capacity is known yet"
            total = self._total(seen, self.min_hot, self.min_hot)
            return Targets(self.min_hot, total, f"{what}: {self.min_hot} kept hot")
        capacity = seen.capacity.work_s
        level = self._level(seen.arriving)
        need = self.factor * level / capacity
        backlog = seen.traffic.held_work / (capacity * self.drain_s)
        steady = max(self.min_hot, math.ceil(need - ROUND))
        wanted = max(self.min_hot, math.ceil(need + backlog - ROUND))
        hot = min(wanted, max(steady, seen.total))
        why = f"level {level:.0f} work/s × {self.factor:.2f} / {capacity:.0f} = {need:.2f} instances"
        if backlog >= 0.01:
            why += f", + {backlog:.2f} to clear what waits in {self.drain_s:.0f} s"
        if hot < wanted:
            why += f"; {wanted} would be hot, but no more are loaded"
        return Targets(hot, self._total(seen, steady, hot), why)

    def _total(self, seen: FleetSnapshot, steady: int, hot: int) -> int:
        """Return how many instances shall have the model loaded, hot and cold ones together.

        They are fewer than there are now only just after a replay. The headroom is over what is needed
        without the backlog, which would be gone before a load ends.
        """
        spare = math.ceil(self.pool_headroom * steady - ROUND)
        least = max(self.pool, spare, hot, seen.hot + seen.coming)
        return least if 0.0 <= seen.now - self.settled_at <= SETTLE_S else max(least, seen.total)

    def _level(self, arriving: Sequence[float]) -> float:
        """Return the largest forecast level (F in the module's text) of the last hold_s seconds, work/s."""
        a = np.asarray(arriving, dtype=np.float64)
        back = min(round(self.hold_s / BIN_S), len(a) - 1)
        fast = _means(a, self.fast_s, back)
        slow = _means(a, self.slow_s, back)
        return max(max(f, self.slow_share * s) for f, s in zip(fast, slow, strict=True))


def default_k(goal: float) -> float:
    """Return the safety factor k for this goal in a fleet that has no history yet."""
    (g0, k0), (g1, k1) = DEFAULT_K
    slope = (k1 - k0) / (math.log(1.0 - g0) - math.log(1.0 - g1))
    return max(1.0, k0 + slope * (math.log(1.0 - g0) - math.log(1.0 - goal)))


def window(mean_s: float) -> int:
    """Return how many bins of arrivals an exponential mean over mean_s seconds reads."""
    return max(1, round(MEANS_LOOK_BACK * mean_s / BIN_S))


def _means(a: NDArray[np.float64], mean_s: float, back: int) -> list[float]:
    """Return an exponential mean of the arrivals `a` as of `back` bins ago and of each bin since, work/s.

    These are back + 1 values. A short history is no reason for a low mean: the weights of the known bins are
    made to sum to 1.
    """
    decay = math.exp(-BIN_S / mean_s)
    most = window(mean_s)
    known = len(a) - back
    values = min(known, most)
    total = float(np.dot(_weights(most, mean_s)[most - values :], a[known - values : known]))
    out = [total * (1.0 - decay) / (1.0 - decay**values)]
    forgotten = decay**most
    for end in range(known, len(a)):
        total = total * decay + float(a[end])
        if end >= most:
            total -= forgotten * float(a[end - most])
        values = min(values + 1, most)
        out.append(total * (1.0 - decay) / (1.0 - decay**values))
    return out


@lru_cache(maxsize=64)
def _weights(values: int, mean_s: float) -> NDArray[np.float64]:
    """Return the weights of an exponential mean, oldest first, the last one 1; shape (values,)."""
    decay = math.exp(-BIN_S / mean_s)
    return np.asarray(decay ** np.arange(values - 1, -1, -1, dtype=np.float64))
