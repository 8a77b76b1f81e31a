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

Invariants: the same `seen` gives the same answer; hot is at least min_hot; total is never below what is hot
or coming. docs/policies.md has the mathematics with its sources.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.types import BIN_S, FleetSnapshot, Targets

MEANS_LOOK_BACK = 6.0
"""An exponential mean over w seconds reads the last 6 w: what is older would weigh exp(-6), a quarter of a
percent. A bound, so that a week of history costs no more than three hours."""

SETTLE_S = 60.0
"""For so long after a replay the pool may shrink: a few turns, since an order may fail and be repeated."""

ROUND = 1e-9
"""Taken off before rounding up: 3.0000000001 instances are 3 and an error of addition."""

MARGIN = 0.8
"""Share of the misses the goal allows that a replayed day may have (reference/policy-study.md)."""

MARGIN_KEEP = 0.985
"""What was missed fades by half in 46 replays, a day: misses come in bursts, and one says little."""

MARGIN_LEAST, MARGIN_SURE = 5.0, 12
"""Misses that must be allowed by now before they are judged: with fewer a single one decides. And replays,
six hours of them, after which what was seen is fully believed."""

DEFAULT_K = ((0.99, 2.0), (0.999, 3.2))
"""k for a fleet without history, by goal (reference/policy-study.md, "What mattered" 2): between these, and
beyond, straight in the logarithm of the misses."""


@lru_cache(maxsize=64)
def _weights(values: int, mean_s: float) -> NDArray[np.float64]:
    """The weights of an exponential mean, oldest first, the last one 1; shape (values,)."""
    decay = math.exp(-BIN_S / mean_s)
    return np.asarray(decay ** np.arange(values - 1, -1, -1, dtype=np.float64))


def default_k(goal: float) -> float:
    """The safety factor of a fleet that has no history yet."""
    (g0, k0), (g1, k1) = DEFAULT_K
    slope = (k1 - k0) / (math.log(1.0 - g0) - math.log(1.0 - g1))
    return max(1.0, k0 + slope * (math.log(1.0 - g0) - math.log(1.0 - goal)))


@dataclass(frozen=True)
class Objective:
    """The goal, and the level that replay sets.

    goal: share of requests to be served in time; the one knob.
    k: safety factor over the forecast level; 0 means the default for the goal.
    fast_s, slow_s, slow_share: the means, seconds, and how much of the slow one is kept in a lull.
    hold_s: how long a need is kept before an instance is taken down for lack of it.
    drain_s: a backlog is given what would clear it in so many seconds.
    pool: least number of loaded instances, hot and cold. pool_headroom: the same as a multiple of the hot.
    settled_at: when replay set the pool, on the clock of `FleetSnapshot.now`; -inf: never, so it only grows.
    min_hot: kept hot with no load at all.
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
        """Refuse what cannot work, with ValueError."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{f.name} {value!r}: wanted a number")
        _between("goal", self.goal, 0.5, 0.99999)
        _between("k", self.k, 0.0, 100.0)
        for name in ("fast_s", "slow_s"):
            _between(name, getattr(self, name), BIN_S, 86_400.0)
        _between("slow_share", self.slow_share, 0.0, 2.0)
        _between("hold_s", self.hold_s, 0.0, 86_400.0)
        _between("drain_s", self.drain_s, 1.0, 1e6)
        _between("pool_headroom", self.pool_headroom, 1.0, 10.0)
        for name in ("pool", "min_hot"):
            _between(name, getattr(self, name), 0, 100_000)
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r}: wanted a whole number")

    @property
    def factor(self) -> float:
        """k, or the default for the goal where none is set."""
        return self.k if self.k > 0.0 else default_k(self.goal)

    @property
    def memory_s(self) -> float:
        """It reads arrivals as far back as its slowest mean, at the start of the hold."""
        return self.hold_s + MEANS_LOOK_BACK * max(self.fast_s, self.slow_s)

    def scaled(self, speedup: float) -> "Objective":
        """The same with its times divided, but the means not under three bins: arrivals are not sped up."""
        return replace(
            self,
            fast_s=max(3 * BIN_S, self.fast_s / speedup),
            slow_s=max(3 * BIN_S, self.slow_s / speedup),
            hold_s=self.hold_s / speedup,
            drain_s=max(BIN_S, self.drain_s / speedup),
        )

    def targets(self, seen: FleetSnapshot) -> Targets:
        """The hot and total targets for this moment."""
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
        """How many shall be loaded: only a replay's word, while it is fresh, makes the pool smaller.

        The headroom is over what is needed without the backlog, which would be gone before a load ends.
        """
        spare = math.ceil(self.pool_headroom * steady - ROUND)
        least = max(self.pool, spare, hot, seen.hot + seen.coming)
        return least if 0.0 <= seen.now - self.settled_at <= SETTLE_S else max(least, seen.total)

    def _level(self, arriving: Sequence[float]) -> float:
        """The largest F of the last hold_s, work/s."""
        a = np.asarray(arriving, dtype=np.float64)
        back = min(round(self.hold_s / BIN_S), len(a) - 1)
        fast = _means(a, self.fast_s, back)
        slow = _means(a, self.slow_s, back)
        return max(max(f, self.slow_share * s) for f, s in zip(fast, slow, strict=True))


def _means(a: NDArray[np.float64], mean_s: float, back: int) -> list[float]:
    """The exponential mean `back` bins ago, and at each bin since then; work/s, back + 1 values.

    A short history is no reason for a low mean: the weights that are there are made to sum to 1.
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


def window(mean_s: float) -> int:
    """How many bins an exponential mean over mean_s reads."""
    return max(1, round(MEANS_LOOK_BACK * mean_s / BIN_S))


def _between(name: str, value: Any, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} {value:g}: wanted {least:g} to {most:g}")


def worth_keeping_s(load_s: float, running_usd_h: float, stopped_usd_h: float) -> float:
    """For so long a stopped instance is worth its storage: until that has cost as much as loading it again.

    The ski rental rule (Karlin et al., 1988): nobody who knows the future pays less than half of this.
    """
    return load_s * running_usd_h / max(stopped_usd_h, 1e-9)


class Margin:
    """Which share of the misses that the goal allows a replayed day may have.

    A replay knows no batching, no single instances and no deaths, so the fleet can miss more than was
    replayed. While it keeps the goal the share is MARGIN, because tomorrow is not today. When it has missed
    more than the goal allows the share falls with the third power of how much: a replay that is wrong by a
    factor m ends at about m^(1/4) times what is allowed.
    """

    def __init__(self, goal: float) -> None:
        """Nothing has happened yet."""
        self.goal = goal
        self.share = MARGIN
        self._requests = self._missed = 0.0
        self._notes = 0

    def note(self, requests: float, missed: float) -> float:
        """So many came since the last replay, and so many of them missed; the share for the next one."""
        self._notes += 1
        self._requests = self._requests * MARGIN_KEEP + requests
        self._missed = self._missed * MARGIN_KEEP + missed
        allowed = (1.0 - self.goal) * self._requests
        if allowed >= MARGIN_LEAST:
            sure = min(1.0, self._notes / MARGIN_SURE)
            over = 1.0 + sure * max(0.0, self._missed / allowed - 1.0)
            self.share = max(0.02, MARGIN * over**-3)
        return self.share


class KeptPool:
    """The largest pool that replays have found in the last keep_s: what was loaded is not given up sooner.

    A replay more or less changes its answer by an instance, and each change would cost a load.
    """

    def __init__(self, keep_s: float) -> None:
        """Nothing was found yet."""
        self.keep_s = keep_s
        self._found: deque[tuple[float, int]] = deque()

    def note(self, now: float, pool: int) -> int:
        """A replay found that pool now; the one to keep."""
        while self._found and self._found[-1][1] <= pool:
            self._found.pop()
        self._found.append((now, pool))
        while self._found[0][0] < now - self.keep_s:
            self._found.popleft()
        return self._found[0][1]
