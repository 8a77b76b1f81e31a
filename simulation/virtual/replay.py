"""Find the policy parameters that keep the goal at the least cost, by simulating the fleet's own last day.

The parameters, an `Objective`, are called a level. A *shape* is a level without its safety factor k.

    the last day's arrivals ──► every shape of the ladder, k up and down ──► misses and cost of each
                                                                                   │
         misses                                                                    ▼
          10 % ┤ o                                 for each shape a curve; at the target the cheapest
           1 % ┤····o········· target              shape, with the k that its curve has there
         0.1 % ┤        o
               └──────────────── cost              the lower edge of all curves is what the operator sees:
                                                   what each goal would have cost

The target is a little under what the goal allows, because tomorrow differs from today. Between two settings
that were simulated the curve is taken as straight in the logarithms, so that the choice does not jump from
one setting to the next when a single request more is late.

The loaded pool follows from the run of the chosen level. An instance that is not hot costs storage, and a
new one costs its load; so one that was wanted within the last `keep_s`, the time in which storage costs as
much as a load, is kept (the ski rental rule: never more than twice the optimum in hindsight).

It runs as a process of its own, at low priority, that may be killed at any time: `python -m
simulation.virtual.replay` reads one request and prints one reply; fleet/outside/tuner.py asks it.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fleet_client.flags import run_main
from policies.objective import Objective
from policies.tuning import MARGIN, worth_keeping_s
from policies.types import Capacity
from process.errors import ConfigError
from process.progress import Progress
from simulation.virtual.fluid.bins import Bins, Floats
from simulation.virtual.fluid.fleet import MOST_INSTANCES, FluidFleet, FluidResult
from simulation.virtual.fluid.run import level_series, run_fluid

DAY_S = 86_400

LEVEL = ("k", "fast_s", "slow_s", "slow_share", "hold_s", "drain_s", "pool", "pool_headroom")
"""Fields of `Objective` that a replay sets."""

REPLAY_EVERY_S = 1800
"""Seconds between two replays."""

LEAST_HISTORY_S = 1200
"""Seconds of history before the first replay: twenty minutes hold a dozen bursts at best, and with less the
defaults are the better guess."""

UNCOVERED = 0.003
"""Share of the hot instances that were wanted for which the pool may have been too small on the replayed day:
less than the half percent that is promised, because tomorrow is not today."""

POOL_LOADS = 2.0
"""Load times of history before a pool is sized: what is ordered on less comes after what it was for."""

HEADROOM = 1.1
"""Multiple of the instances needed now that is to be loaded, where that is more than the pool."""

CURVE = (0.95, 0.98, 0.99, 0.995, 0.999)
"""Goals whose cost the operator is shown."""

LEAST_SLOW_S = 1800.0
"""Seconds of the slow mean that is tried with any history."""

K_STEP = 1.15
"""Ratio between two neighbouring values of k that are simulated: the curve between them is straight to within
a percent."""

KNEE = 1.25
"""Multiple of a shape's fewest misses that is taken where no k keeps the goal: more k buys little there."""

WARM_STARTS = 2.0
"""Multiple of the longest start that is played before a replay is scored."""

K_MOST = 6.0
"""Largest k that is tried; where the slow mean has a share above 1, times that share. The largest in the
studies was 4.1 (docs/reference/policy-study.md)."""

MISSES_MOST, MISSES_LEAST = 0.10, 2e-4
"""Shares of misses between which a curve is followed: what no goal allows, and what a day cannot measure."""


def ladder(goal: float, history_s: float) -> tuple[Objective, ...]:
    """Return the policies that a replay tries, with the safety factor k still open.

    A mean over more than half of the history is left out: no run shows how it follows.
    """
    base = Objective(goal=goal)
    shapes = [
        {"fast_s": 300.0, "slow_s": 1800.0, "slow_share": 0.8, "hold_s": 60.0, "drain_s": 40.0},
        {"fast_s": 60.0, "slow_s": 1800.0, "slow_share": 0.8, "hold_s": 60.0, "drain_s": 40.0},
        {"fast_s": 120.0, "slow_s": 3600.0, "slow_share": 1.0, "hold_s": 0.0, "drain_s": 40.0},
        {"fast_s": 300.0, "slow_s": 3600.0, "slow_share": 1.0, "hold_s": 60.0, "drain_s": 40.0},
        {"fast_s": 300.0, "slow_s": 3600.0, "slow_share": 1.5, "hold_s": 60.0, "drain_s": 40.0},
        {"fast_s": 300.0, "slow_s": 7200.0, "slow_share": 2.0, "hold_s": 60.0, "drain_s": 40.0},
        {"fast_s": 300.0, "slow_s": 1800.0, "slow_share": 0.8, "hold_s": 60.0, "drain_s": 400.0},
        {"fast_s": 600.0, "slow_s": 1800.0, "slow_share": 0.8, "hold_s": 60.0, "drain_s": 40.0},
    ]
    most_s = max(LEAST_SLOW_S, history_s / 2.0)
    return tuple(replace(base, **s) for s in shapes if s["slow_s"] <= most_s)  # type: ignore[arg-type]


def warm_up_s(history_s: int, fleet: FluidFleet) -> int:
    """Return how many seconds of a history are played before scoring, until the fleet has grown to the load.

    They are at least twice the longest start where the history has room: with less, in twenty minutes of a
    model that starts in five, no k kept 99 % in one line, and the largest was taken.
    """
    return max(min(600, history_s // 6), min(history_s // 2, math.ceil(WARM_STARTS * fleet.start_hi_s)))


@dataclass(frozen=True)
class CurvePoint:
    """What one goal would have cost: dollars a day of the hot instances and their starts.

    met: the goal. k: safety factor of the policy that was cheapest there. reached: whether any setting kept
    it.
    """

    met: float
    usd_day: float
    k: float
    reached: bool


@dataclass(frozen=True)
class ReplayResult:
    """What a replay found: the policy (level) to use, and what other goals would have cost (curve).

    misses, usd_day: of the level on the replayed day, read from its curve. reached: whether a setting kept
    the target. simulated: number of settings. history_s: seconds replayed.
    """

    level: Objective
    curve: tuple[CurvePoint, ...]
    misses: float
    usd_day: float
    reached: bool
    simulated: int
    history_s: int


@dataclass(frozen=True)
class ShapeCurve:
    """A policy simulated with several safety factors k, ascending, and the misses and dollars of each."""

    shape: Objective
    k: Floats
    misses: Floats
    usd: Floats

    def at(self, misses: float) -> tuple[float, float, bool]:
        """Return the k and the dollars at which this policy has these misses, and whether it gets so low.

        A curve that does not come down so far is taken where it has nearly its fewest: more k buys nothing.
        """
        # A larger k is never taken to be worse: it counts with the fewest misses of all up to it.
        low = np.minimum.accumulate(np.maximum(self.misses, MISSES_LEAST / 10))
        x = np.log(low[::-1])
        wanted = math.log(max(misses, KNEE * float(low[-1])))
        k = math.exp(float(np.interp(wanted, x, np.log(self.k)[::-1])))
        usd = math.exp(float(np.interp(wanted, x, np.log(self.usd)[::-1])))
        return k, usd, bool(low[-1] <= misses)


def _try(bins: Bins, shape: Objective, fleet: FluidFleet, warm_s: int, seed: int) -> ShapeCurve:
    """Simulate one policy with safety factors k from the middle to both ends; return its curve."""
    levels = level_series(bins.arriving, shape)
    begin = float(bins.work[:warm_s].mean()) / fleet.capacity.work_s * max(1.0, shape.slow_share)

    def run(k: float) -> FluidResult:
        hot = min(fleet.max_instances, max(shape.min_hot, math.ceil(k * begin)))
        return run_fluid(
            bins,
            replace(shape, k=k),
            fleet,
            seed=seed,
            score_from_s=warm_s,
            hot=hot,
            cold=fleet.max_instances - hot,
            levels=levels,
        )

    middle = 1.5 / max(1.0, shape.slow_share)
    done = {middle: run(middle)}
    k = middle
    while done[k].misses > MISSES_LEAST and k < K_MOST / max(1.0, shape.slow_share):
        k *= K_STEP
        done[k] = run(k)
    k = middle
    while done[k].misses < MISSES_MOST and k > 0.2:
        k /= K_STEP
        done[k] = run(k)
    ks = sorted(done)
    return ShapeCurve(
        shape,
        np.array(ks),
        np.array([done[k].misses for k in ks]),
        np.array([max(done[k].usd_serving, 1e-9) for k in ks]),
    )


def tune(
    history: Bins,
    goal: float,
    fleet: FluidFleet,
    *,
    shapes: Sequence[Objective] | None = None,
    margin: float = MARGIN,
    min_hot: int = 1,
    seed: int = 1,
    progress: Progress | None = None,
) -> ReplayResult:
    """Return the cheapest policy that would have kept the goal in this history, and the costs of others.

    history: arrivals of the last day or less, one value a second; ValueError when it is under a minute.
    margin: share of the misses allowed by the goal that the policy may have. progress: is told how far it is.
    """
    progress = progress or Progress(quiet=True)
    seconds = len(history)
    if not 0.0 < margin <= 1.0:
        raise ValueError(f"margin: wanted over 0 to 1, got {margin:g}")
    if seconds < 60:
        raise ValueError(f"{seconds} s of history: wanted a minute or more")
    warm_s = warm_up_s(seconds, fleet)
    tried = [
        _try(history, replace(s, min_hot=min_hot), fleet, warm_s, seed)
        for s in progress.over(
            shapes or ladder(goal, seconds), lambda s: f"means of {s.fast_s:g} and {s.slow_s:g} s"
        )
    ]
    target = margin * (1.0 - goal)
    best = min(tried, key=lambda t: (not t.at(target)[2], _score(t, target)))
    k, usd, reached = best.at(target)
    level = replace(best.shape, goal=goal, k=k, pool_headroom=HEADROOM)
    if seconds >= POOL_LOADS * fleet.load_s:
        level = replace(level, pool=_pool(history, level, fleet, warm_s, seed))
    per_day = DAY_S / (seconds - warm_s)
    curve = []
    for g in CURVE:
        points = [t.at(1.0 - g) for t in tried]
        cheapest = min(points, key=lambda p: (not p[2], p[1]))
        curve.append(CurvePoint(g, per_day * cheapest[1], cheapest[0], any(p[2] for p in points)))
    return ReplayResult(
        level, tuple(curve), target, usd * per_day, reached, sum(len(t.k) for t in tried), seconds
    )


def _score(t: ShapeCurve, target: float) -> float:
    """Return a policy's cost near the target and on both sides, so that luck at one point does not decide."""
    return sum(math.log(t.at(target * f)[1]) for f in (0.5, 1.0, 2.0))


def _pool(history: Bins, level: Objective, fleet: FluidFleet, warm_s: int, seed: int) -> int:
    """Return the least number of loaded instances that would have been enough lately.

    Lately: in the last part of the history, as long as a stopped instance is worth its storage.
    """
    begin = math.ceil(level.factor * float(history.work[:warm_s].mean()) / fleet.capacity.work_s)
    hot = min(fleet.max_instances, max(level.min_hot, begin))
    found = run_fluid(
        history, level, fleet, seed=seed, hot=hot, cold=fleet.max_instances - hot, series=True
    ).series
    if found is None:
        return hot
    keep_s = worth_keeping_s(fleet.load_s, fleet.running_usd_h, fleet.stopped_usd_h)
    first = max(warm_s, len(history) - int(min(keep_s, 1e9)))
    wanted = np.sort(found.wanted[found.at_s >= first])[::-1].astype(np.float64)
    if not len(wanted):
        return hot
    allowed = UNCOVERED * float(wanted.sum())
    # With m loaded, what is over m was not covered: the sum over all ticks falls as m grows.
    pool = int(wanted[0])
    while pool > level.min_hot and float(np.maximum(0.0, wanted - (pool - 1)).sum()) <= allowed:
        pool -= 1
    return pool


# -- asked and answered ----------------------------------------------------------------------------------


def answer(said: object, progress: Progress | None = None) -> dict[str, Any]:
    """Return the reply to a request for a replay; raise a ConfigError that names a wrong field.

    progress: is told how far it is.

    The request is made by fleet/replay.py:
    {"bins": {"work", "requests", "limit_s": one number a second}, "goal", "capacity": {"work_s",
    "requests_s", "concurrency", "kv_tokens"}, "start_s": [least, most], "load_s", "running_usd_h",
    "stopped_usd_h", "late_lane", "max_instances", "seed", "margin"}  ->  {"level": {...}, "curve": [...]}
    """
    begun = time.perf_counter()
    if not isinstance(said, dict):
        raise ConfigError(f"replay: wanted an object, got {said!r:.60}")
    bins = said.get("bins")
    if not isinstance(bins, dict):
        raise ConfigError("replay: bins: wanted an object of three lists")
    try:
        history = Bins(
            *(np.asarray(bins[name], dtype=np.float64) for name in ("work", "requests", "limit_s"))
        )
        capacity = Capacity(**{name: float(value) for name, value in said["capacity"].items()})
        least, most = (float(v) for v in said["start_s"])
        fleet = FluidFleet(
            capacity,
            start_lo_s=least,
            start_hi_s=most,
            load_s=float(said["load_s"]),
            running_usd_h=float(said["running_usd_h"]),
            stopped_usd_h=float(said["stopped_usd_h"]),
            late_lane=bool(said["late_lane"]),
            max_instances=min(int(said["max_instances"]), MOST_INSTANCES),
        )
        margin = float(said.get("margin", MARGIN))
        tuned = tune(
            history, float(said["goal"]), fleet, margin=margin, seed=int(said["seed"]), progress=progress
        )
    except KeyError as e:
        raise ConfigError(f"replay: {e.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"replay: {e}") from None
    level = tuned.level
    return {
        "level": {name: getattr(level, name) for name in LEVEL},
        "curve": [asdict(point) | {"reached": float(point.reached)} for point in tuned.curve],
        "misses": tuned.misses,
        "usd_day": tuned.usd_day,
        "reached": tuned.reached,
        "simulated": tuned.simulated,
        "history_s": tuned.history_s,
        "seconds": round(time.perf_counter() - begun, 3),
    }


# --- outside world ---------------------------------------------------------------------------------


def main() -> None:
    """Read a replay request from stdin and print the reply; a wrong one gives one line and exit 2."""
    os.nice(10)
    try:
        said = json.load(sys.stdin)
    except ValueError as e:
        raise ConfigError(f"replay: the input is no JSON: {e}") from None
    print(json.dumps(answer(said, Progress())))


if __name__ == "__main__":
    run_main(main)
