"""The fluid model: a fleet over days of traffic in milliseconds, one second at a time.

Work is a liquid. What arrived in one second is a *bin*; instances that are hot draw c work/s each out of one
queue. Batching, prefill and single instances are left to the step-level model (virtual_fleet.py); this one
is for tuning, because it can be run hundreds of times.

          arrive                 on time: first come, first served
    bins ───────┬──────────────► ░░░░░░░░░░░░ ───────────────► c * hot work a second
                │ would be late       │ its limit passed            ▲
                └────────► late: ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ ─────────────────┘ only what is left over,
                                                                      unless the oldest waits late_bound_s
    cold ──start──► starting ──start_lo_s…start_hi_s──► hot ──stop──► stopping ──stop_s──► cold ──destroy──►
      ▲                 └──────────cancel────────────────────────────────▲
      └──or hot──◄── loading ◄──create──

Order within a second: what is ready becomes hot; at a tick the policy is asked and its commands are given;
the second's bin arrives; the instances serve. Time is whole seconds: a bin of second b served in second s has
waited s - b, which is right in the mean, and it is late when that is over its limit. A bin that is served in
parts counts in parts. Whether an arrival would be late is judged in the same whole seconds, as if the hot
instances of this moment were all there will be.

True after every run (checked by the tests):
- work that arrived = work served + work on time + work late;
- nothing is served faster than c a second for each hot instance;
- the same arguments give the same result, and a start takes the same time in every run that orders its n-th
  start of a second at that second, so that two levels are compared on the same luck.

Costs: a hot, starting, loading or stopping instance costs running_usd_h, a cold one stopped_usd_h.
"""

import math
from typing import Any

import numpy as np

from policies.objective import Objective, window
from policies.types import BIN_S, FleetSnapshot, Policy
from simulation.virtual.fluid import kernel
from simulation.virtual.fluid.bins import Bins, Floats
from simulation.virtual.fluid.fleet import MOST_INSTANCES, FluidFleet, FluidResult, FluidSeries
from simulation.virtual.fluid.kernel import NEVER, TICK_S, FluidConstants, FluidState, LevelRule
from simulation.virtual.fluid.snapshots import SnapshotBuilder

LATE_WAITS_S = 7200
"""Longest wait in seconds that late requests are counted by; longer ones are counted there too."""


def level_series(arriving: Floats, level: Objective) -> Floats:
    """Return the forecast level of policy `Objective` (its F after the hold), work/s, at the end of each bin.

    arriving: work per second that arrived in each bin of BIN_S seconds.
    """
    fast = kernel.mean_series(arriving, level.fast_s, window(level.fast_s))
    slow = kernel.mean_series(arriving, level.slow_s, window(level.slow_s))
    return kernel.held_series(np.maximum(fast, level.slow_share * slow), round(level.hold_s / BIN_S))


class FluidRun:
    """A run of the fluid model, led by one policy after another; each goes on where the last one ended.

    score_from_s, score_to_s: the seconds that count. hot, cold: the instances there are at the start, for
    which nothing was paid. tracked: whether a policy will be asked, which needs to know what is at hand.
    """

    def __init__(
        self,
        bins: Bins,
        fleet: FluidFleet,
        *,
        seed: int = 1,
        score_from_s: int = 0,
        score_to_s: int | None = None,
        hot: int = 1,
        cold: int = 0,
        tracked: bool = False,
        series: bool = False,
    ) -> None:
        seconds = len(bins)
        score_to = seconds if score_to_s is None else min(score_to_s, seconds)
        if not 0 <= score_from_s <= score_to:
            raise ValueError(f"scored seconds {score_from_s} to {score_to}: wanted a part of 0 to {seconds}")
        if hot < 0 or cold < 0 or hot + cold > fleet.max_instances:
            raise ValueError(f"{hot} hot and {cold} cold: wanted 0 to {fleet.max_instances} in all")
        self.bins, self.fleet, self.now = bins, fleet, 0
        self._arriving = bins.arriving
        at_hand = seconds if tracked else 0
        prompt, output = bins.tokens() if tracked else (np.zeros(0), np.zeros(0))
        self._totals = [*bins.sums, *(np.concatenate(([0.0], np.cumsum(v))) for v in (prompt, output))]
        self._given = FluidConstants(
            bins.work,
            bins.requests,
            bins.per_work,
            prompt,
            bins.patience,
            float(fleet.capacity.work_s),
            bool(fleet.late_lane),
            round(fleet.late_bound_s),
            float(fleet.start_lo_s),
            float(fleet.start_hi_s - fleet.start_lo_s),
            round(fleet.load_s),
            round(fleet.stop_s),
            int(fleet.max_instances),
            int(score_from_s),
            int(score_to),
            max(1, round(fleet.service_s)),
            int(seed) & 0x7FFFFFFFFFFFFFFF,
        )
        whole = np.zeros(kernel.WHOLES, dtype=np.int64)
        whole[kernel.HOT] = whole[kernel.WANTED] = hot
        whole[kernel.COLD], whole[kernel.NEXT_EVENT] = cold, NEVER
        ready, loaded, stopped = (np.empty(2 * MOST_INSTANCES, dtype=np.int64) for _ in range(3))
        self._state = FluidState(
            whole,
            np.zeros(kernel.REALS),
            np.empty(seconds),
            np.empty(seconds),
            ready,
            loaded,
            stopped,
            np.zeros(LATE_WAITS_S + 1),
            np.zeros(at_hand),
            np.zeros(at_hand),
            np.zeros(at_hand),
            np.zeros(((seconds + TICK_S - 1) // TICK_S if series else 0, 6), dtype=np.int64),
        )

    def level(self, level: Objective, until_s: int | None = None, levels: Floats | None = None) -> None:
        """Continue the run to until_s under policy `Objective`, compiled.

        levels: its `level_series`, if the caller has it. The result is that of `policy` with the same object
        at a tick of TICK_S.
        """
        end = len(self.bins) if until_s is None else min(until_s, len(self.bins))
        if self.now % TICK_S:
            raise ValueError(f"second {self.now}: a level begins at a multiple of {TICK_S}")
        known = level_series(self._arriving, level) if levels is None else levels
        settled = -NEVER if level.settled_at == -math.inf else int(level.settled_at)
        rule = LevelRule(
            known,
            float(level.factor),
            float(level.drain_s),
            int(level.min_hot),
            int(level.pool),
            float(level.pool_headroom),
            settled,
        )
        kernel.pass_seconds(self._state, self._given, self.now, end, rule)
        self.now = max(self.now, end)

    def policy(self, policy: Policy, until_s: int | None = None, tick_s: int = TICK_S) -> None:
        """Continue the run to until_s and ask the policy every tick_s seconds; between, it runs compiled."""
        end = len(self.bins) if until_s is None else min(until_s, len(self.bins))
        seen = SnapshotBuilder(self.fleet, self._state, self._arriving, self._totals, policy.memory_s)
        while self.now < end:
            targets = policy.targets(seen.look(self.now))
            until = min(self.now + tick_s, end)
            hot, total = targets.hot, targets.total
            kernel.pass_turn(self._state, self._given, self.now, until, hot, total, kernel.NO_RULE)
            self.now = until

    @property
    def instances(self) -> tuple[int, int]:
        """Return how many instances are hot or will be, and how many exist."""
        w = self._state.whole
        return int(w[kernel.HOT] + w[kernel.STARTING]), int(w[kernel.HOT : kernel.COLD + 1].sum())

    @property
    def scored_so_far(self) -> tuple[float, float]:
        """Return how many requests came in the scored seconds up to now, and how many of them were late."""
        g, requests = self._given, self._totals[0]
        first = min(self.now, g.score_from)
        came = float(requests[min(self.now, g.score_to)] - requests[first])
        return came, float(self._state.real[kernel.MISSED])

    def result(self) -> FluidResult:
        """End the run and return its result up to now; requests that still wait are counted."""
        s, g, fleet = self._state, self._given, self.fleet
        kernel.count_waiting(s, g, self.now)
        w, r = s.whole, s.real
        counted, late = np.cumsum(s.waits), r[kernel.LATE_ENDED]

        def waited(share: float) -> float:
            return float(np.searchsorted(counted, share * counted[-1])) if counted[-1] > 0.0 else 0.0

        def usd(place: int) -> float:
            price = fleet.stopped_usd_h if place == kernel.SEC_COLD else fleet.running_usd_h
            return float(w[place]) / 3600.0 * price

        arrived = float(self._totals[1][self.now])
        return FluidResult(
            requests=self.scored_so_far[0],
            missed=float(r[kernel.MISSED]),
            gpu_h=float(w[kernel.SEC_HOT : kernel.SEC_STOPPING + 1].sum()) / 3600.0,
            usd_hot=usd(kernel.SEC_HOT),
            usd_starting=usd(kernel.SEC_STARTING),
            usd_loading=usd(kernel.SEC_LOADING),
            usd_stopping=usd(kernel.SEC_STOPPING),
            usd_stopped=usd(kernel.SEC_COLD),
            starts=int(w[kernel.STARTS]),
            stops=int(w[kernel.STOPS]),
            creates=int(w[kernel.CREATES]),
            destroys=int(w[kernel.DESTROYS]),
            late_mean_s=float(r[kernel.LATE_WAITED] / late) if late > 0.0 else 0.0,
            late_p50_s=waited(0.5),
            late_p95_s=waited(0.95),
            late_max_s=float(r[kernel.LATE_MOST]),
            uncovered=float(w[kernel.SEC_UNCOVERED] / w[kernel.SEC_WANTED]) if w[kernel.SEC_WANTED] else 0.0,
            most_hot=int(w[kernel.MOST_HOT]),
            peak_wanted=int(w[kernel.PEAK_WANTED]),
            work_arrived=arrived,
            work_served=float(r[kernel.SERVED]),
            work_waiting=float(r[kernel.QUEUED] + r[kernel.LATE]),
            series=self._series() if len(s.record) else None,
        )

    def _series(self) -> FluidSeries:
        ticks = (self.now + TICK_S - 1) // TICK_S
        at = np.arange(ticks, dtype=np.int64) * TICK_S
        rows = self._state.record[:ticks]
        work = self._totals[1]
        before = work[np.minimum(at + TICK_S, self.now)] - work[at]
        demand = before / (TICK_S * self.fleet.capacity.work_s)
        hot, starting, loading, stopping, cold, wanted = (rows[:, n] for n in range(6))
        return FluidSeries(at, hot, starting, loading, cold + stopping, wanted, demand)


def run_fluid(
    bins: Bins,
    policy: Policy,
    fleet: FluidFleet,
    *,
    asked: bool = False,
    tick_s: int = TICK_S,
    levels: Floats | None = None,
    hot: int | None = None,
    cold: int | None = None,
    **options: Any,
) -> FluidResult:
    """Run the fluid model over a whole trace under a policy; return the result.

    An `Objective` runs compiled, a day in one to three milliseconds, at a tick of TICK_S; levels: its
    level_series, if that is at hand. Any other policy, and with `asked` an Objective, is asked every tick_s,
    with the same result. hot, cold: instances at the start; where not given, what the policy wants before
    anything has arrived. options: seed, score_from_s, score_to_s and series, as in `FluidRun`.
    """
    hot, cold = _first(policy, fleet, hot, cold)
    level = policy if isinstance(policy, Objective) and not asked else None
    run = FluidRun(bins, fleet, hot=hot, cold=cold, tracked=level is None, **options)
    if level is not None:
        run.level(level, levels=levels)
    else:
        run.policy(policy, tick_s=tick_s)
    return run.result()


def _first(policy: Policy, fleet: FluidFleet, hot: int | None, cold: int | None) -> tuple[int, int]:
    """Return the hot and cold instances at the start: as given, or as the policy wants without load."""
    if hot is not None and cold is not None:
        return hot, cold
    start_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
    wanted = policy.targets(
        FleetSnapshot(0.0, (), 0, 0, 0, 0, 0, start_s, fleet.load_s, capacity=fleet.capacity)
    )
    first = min(fleet.max_instances, max(0, wanted.hot)) if hot is None else hot
    total = min(fleet.max_instances, max(first, wanted.total))
    return first, total - first if cold is None else cold
