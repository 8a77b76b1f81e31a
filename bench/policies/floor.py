"""What a clairvoyant would pay: the cheapest fleet for a trace that is known in advance.

    minimise  hot seconds + start_s a start + stop_s a stop + λ * missed requests

in the fluid model of simulation/virtual/fluid/run.py, by exact dynamic programming over (hot instances, work
that waits and is still in time). The clairvoyant orders a start just as early as it takes, so its count of
hot instances is free, and it may drop any work to the late lane, which is served from what is left and
costs it nothing. What waits longer than a bin's limit is dropped; so with h hot at most  c·h·limit  of work
can wait.

    V(t, h, b) = min over h'  [ seconds of h' + moves from h to h' + λ·(dropped) + V(t + dt, h', b') ]

The sum splits, so one step costs O(hot * backlog): the best h' for every h is found in two sweeps, one of
counts rising and one of counts falling. Work that waits has LEVELS places, square-spaced (fine where it
matters, near zero) between 0 and what can wait at all; in between V is linear.

For each λ the dynamic programme gives a lower bound for every goal (the Lagrangian dual: cost + λ·(missed -
allowed)), and a schedule, which is played in the fluid model with its own rules, so that it can be seen what
it achieves. Both are given; the truth lies between them. The bound leaves out what late work may cost later.

The pool of a floor is the cheapest there can be: its peak, stopped when it is not hot. `pool_usd` says what
its storage costs; the loads of instances that are there when the window begins are not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import FleetSnapshot, Targets
from process.compiled import njit
from simulation.virtual.fluid.bins import Bins
from simulation.virtual.fluid.fleet import FluidFleet
from simulation.virtual.fluid.run import run_fluid

Floats = NDArray[np.float64]
Schedule = NDArray[np.int16]

LEVELS = 24
"""Places of waiting work; 32 gives the same bound to three digits on the hour-long logs (2026-11)."""

MOST_CELLS = 700_000_000
"""Most decisions kept to read the schedule back, one byte each."""

ROUNDS = 18
"""Most rounds of a bisection for λ."""

SHARES = (1.0, 0.8, 0.65, 0.5, 0.35)
"""Shares of the mean limit that a plan reckons with, one after the other, until one keeps the goal."""

LONGEST_WAIT_S = 60.0
"""Longest wait, in seconds, that is counted: longer limits are of single long prompts."""


@dataclass(frozen=True)
class Floor:
    """The cheapest there can be, and a schedule that comes near. Hours of GPU and dollars of the window.

    bound_gpu_h: no fleet keeps the goal for less. achieved_gpu_h: what a schedule costs that keeps it, in the
    fluid model; misses: its share. pool_usd: storage of its peak while not hot. schedule: hot instances,
    every step_s seconds of the whole trace.
    """

    goal: float
    bound_gpu_h: float
    achieved_gpu_h: float
    misses: float
    bound_usd: float
    achieved_usd: float
    pool_usd: float
    schedule: Schedule
    step_s: int

    @property
    def gap(self) -> float:
        """Share by which the schedule is above the bound."""
        return self.achieved_gpu_h / self.bound_gpu_h - 1.0


@njit
def _between(values: Floats, left: float, unit: float) -> float:
    """Return the value of so much waiting work, linear between its places."""
    low = int(math.sqrt(left / unit))
    if low >= len(values) - 1:
        return float(values[len(values) - 1])
    below = unit * low * low
    share = (left - below) / (unit * (low + 1) * (low + 1) - below)
    return float(values[low] + share * (values[low + 1] - values[low]))


@njit
def _best_moves(
    cost: Floats, start_s: float, stop_s: float, value: Floats, choice: NDArray[np.uint8]
) -> None:
    """Fill, for each count of hot instances, the least cost and the next count that gives it.

    A higher count pays start_s a start, a lower one stop_s a stop. cost: by the next count.
    """
    most = len(cost) - 1
    best, at = cost[most], most
    value[most] = best
    choice[most] = most
    for h in range(most - 1, -1, -1):
        best += start_s
        if cost[h] <= best:
            best, at = cost[h], h
        value[h] = best
        choice[h] = at
    best, at = cost[0], 0
    for h in range(1, most + 1):
        best += stop_s
        if cost[h] <= best:
            best, at = cost[h], h
        if best < value[h]:
            value[h] = best
            choice[h] = at


@njit
def _plan(
    work: Floats,
    per_work: Floats,
    waits: Floats,
    c: float,
    most: int,
    levels: int,
    step_s: float,
    start_s: float,
    stop_s: float,
    price: float,
    longest_s: float,
    choice: NDArray[np.uint8],
) -> float:
    """Return the least cost from the first step on, in GPU seconds; fill choice[t, h, b] with the next h.

    work: that comes in each step; per_work: requests in a unit of it; waits: seconds that may be waited;
    price: GPU seconds that a missed request counts as; longest_s: the most that waits says.
    """
    steps = len(work)
    top = c * most * longest_s
    unit = top / ((levels - 1) * (levels - 1))
    value = np.zeros((most + 1, levels))
    cost = np.zeros((most + 1, levels))
    for t in range(steps - 1, -1, -1):
        for h in range(most + 1):
            room = c * h * step_s
            keep = c * h * waits[t]
            for b in range(levels):
                left = max(0.0, unit * b * b + work[t] - room)
                dropped = max(0.0, left - keep)
                after = _between(value[h], min(left, keep), unit)
                cost[h, b] = h * step_s + price * dropped * per_work[t] + after
        for b in range(levels):
            _best_moves(cost[:, b], start_s, stop_s, value[:, b], choice[t, :, b])
    # How many are hot at the start is free.
    return min(float(value[0, 0]), float(cost[:, 0].min()))


@njit
def _follow(
    work: Floats,
    waits: Floats,
    c: float,
    most: int,
    levels: int,
    step_s: float,
    first: int,
    longest_s: float,
    choice: NDArray[np.uint8],
    schedule: Schedule,
) -> None:
    """Fill schedule with the hot instances of each step, read back from the choices."""
    top = c * most * longest_s
    unit = top / ((levels - 1) * (levels - 1))
    h, backlog = first, 0.0
    for t in range(len(work)):
        b = math.ceil(math.sqrt(backlog / unit) - 1e-9)
        if b > levels - 1:
            b = levels - 1
        h = choice[t, h, b]
        schedule[t] = h
        backlog = min(max(0.0, backlog + work[t] - c * h * step_s), c * h * waits[t])


class Played:
    """A schedule as a policy: it orders starts as early as they take."""

    memory_s = 0.0
    tick_s = 5.0

    def __init__(self, schedule: Schedule, step_s: int, ahead_s: float, pool: int) -> None:
        """ahead_s: what a start takes."""
        self._schedule = schedule
        self._step_s = step_s
        self._ahead = math.ceil((ahead_s + self.tick_s) / step_s)
        self._pool = pool

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return what will be hot when what is ordered now has started, no fewer than are to be hot now."""
        at = int(seen.now) // self._step_s
        coming = self._schedule[at : at + self._ahead + 1]
        wanted = int(coming.max()) if len(coming) else int(self._schedule[-1])
        return Targets(wanted, self._pool, "known in advance")

    def scaled(self, speedup: float) -> "Played":  # noqa: ARG002 - a schedule is of its own time
        """Return itself."""
        return self


@dataclass(frozen=True)
class _Point:
    price: float
    cost_s: float  # GPU seconds, misses priced in
    gpu_s: float
    missed: float
    schedule: Schedule


class _Planner:
    """The scored seconds in steps, and the best plan for a price of a missed request."""

    def __init__(self, part: Bins, fleet: FluidFleet, step_s: int) -> None:
        """part: the scored seconds; step_s: grain of the dynamic programme, seconds."""
        self._fleet = fleet
        self._step_s = float(step_s)
        self._c = float(fleet.capacity.work_s)
        self._start_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
        steps = math.ceil(len(part) / step_s)
        self._work, count = (_summed(v, steps, step_s) for v in (part.work, part.requests))
        # Late work is dropped of what is waiting, which is of the last steps too.
        near = np.ones(max(1, round(30 / step_s)))
        near_work = np.convolve(self._work, near, "same")
        self._per_work = np.convolve(count, near, "same") / np.maximum(near_work, 1e-9)
        # What waits came in several seconds, each with its own limit: their mean, by work, near this step.
        limit = np.convolve(_summed(part.limit_s * part.work, steps, step_s), near, "same")
        usual = float((part.limit_s * part.work).sum() / part.work.sum())
        waits = np.where(near_work > 0.0, limit / np.maximum(near_work, 1e-9), usual)
        self._limits = np.minimum(waits, LONGEST_WAIT_S)
        self._longest_s = float(self._limits.max())
        peak = _peak(self._work, self._limits, step_s)
        self._most = min(255, max(2, math.ceil(1.1 * peak / self._c) + 1))
        self._levels = LEVELS
        while steps * (self._most + 1) * self._levels > MOST_CELLS and self._levels > 8:
            self._levels -= 4
        self._choice = np.zeros((steps, self._most + 1, self._levels), dtype=np.uint8)

    def at(self, price: float, share: float = 1.0) -> _Point:
        """Return the best plan for that price. share: of the limits that may be waited."""
        waits, most, levels = self._limits * share, self._most, self._levels
        cost_s = _plan(
            self._work,
            self._per_work,
            waits,
            self._c,
            most,
            levels,
            self._step_s,
            self._start_s,
            self._fleet.stop_s,
            price,
            self._longest_s,
            self._choice,
        )
        schedule = np.zeros(len(self._work), dtype=np.int16)
        first = min(most, max(0, round(float(self._work[:60].mean()) / self._c)))
        _follow(
            self._work,
            waits,
            self._c,
            most,
            levels,
            self._step_s,
            first,
            self._longest_s,
            self._choice,
            schedule,
        )
        moves = np.diff(schedule.astype(np.float64))
        gpu_s = float(schedule.sum()) * self._step_s
        gpu_s += self._start_s * float(moves[moves > 0].sum())
        gpu_s += self._fleet.stop_s * float(-moves[moves < 0].sum())
        return _Point(price, cost_s, gpu_s, max(0.0, (cost_s - gpu_s) / price), schedule)


def floor(
    bins: Bins,
    goal: float,
    fleet: FluidFleet,
    *,
    score_from_s: int = 0,
    score_to_s: int | None = None,
    step_s: int = 1,
) -> Floor:
    """Return the floor of the scored seconds; ValueError when nothing arrives in them.

    step_s: grain of the dynamic programme, seconds.
    """
    end = len(bins) if score_to_s is None else min(score_to_s, len(bins))
    part = bins.between(score_from_s, end)
    requests = float(part.requests.sum())
    if requests <= 0.0:
        raise ValueError("nothing arrives in the scored seconds")
    planner = _Planner(part, fleet, step_s)
    bound_s, price, last = _bound(planner, (1.0 - goal) * requests)

    def achieved(point: _Point) -> tuple[float, float]:
        return _achieved(part, fleet, point, step_s)

    kept = _cheapest_kept(planner, price, goal, achieved)
    found, misses, usd = kept or (last, *achieved(last))
    hourly = fleet.running_usd_h / 3600.0
    peak = int(found.schedule.max())
    idle_s = peak * (end - score_from_s) - float(found.schedule.sum()) * step_s
    return Floor(
        goal,
        bound_s / 3600.0,
        usd / fleet.running_usd_h,
        misses,
        bound_s * hourly,
        usd,
        max(0.0, idle_s) / 3600.0 * fleet.stopped_usd_h,
        found.schedule,
        step_s,
    )


def _bound(planner: _Planner, allowed: float) -> tuple[float, float, _Point]:
    """Return (the bound in GPU seconds, a price of which no more miss than allowed, the last plan tried)."""
    # The dual is concave in the price and flat where the plan misses just what is allowed.
    low, high, bound_s = 1e-2, 1e6, 0.0
    for _ in range(ROUNDS):
        price = math.sqrt(low * high)
        point = planner.at(price)
        bound_s = max(bound_s, point.cost_s - price * allowed)
        low, high = (low, price) if point.missed <= allowed else (price, high)
        if high / low < 1.02:
            break
    return bound_s, high, point


def _cheapest_kept(
    planner: _Planner, price: float, goal: float, achieved: Callable[[_Point], tuple[float, float]]
) -> tuple[_Point, float, float] | None:
    """Return (plan, share missed, dollars) that keeps the goal by the fluid model's own rules.

    It is searched with higher prices, and where the limits of neighbours differ much, as if they were shorter
    than their mean. None: no plan keeps it.
    """
    found: tuple[_Point, float, float] | None = None
    for share in SHARES:
        low, high = 0.5 * price, 1e7
        for n in range(ROUNDS):
            tried = price if n == 0 else math.sqrt(low * high)
            point = planner.at(tried, share)
            missed, usd = achieved(point)
            if missed <= 1.0 - goal:
                high = tried
                if found is None or usd < found[2]:
                    found = point, missed, usd
            else:
                low = tried
            if n and high / low < 1.15:
                break
        if found is not None and share < 0.7:
            break
    return found


def _achieved(part: Bins, fleet: FluidFleet, point: _Point, step_s: int) -> tuple[float, float]:
    """Return (share missed, dollars of GPUs) of the schedule in the fluid model; starts take the mean."""
    mean_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
    peak = int(point.schedule.max())
    exact = FluidFleet(
        fleet.capacity, mean_s, mean_s, fleet.load_s, fleet.stop_s, fleet.running_usd_h, fleet.stopped_usd_h,
        True, fleet.late_bound_s, max(peak, 1),
    )  # fmt: skip
    policy = Played(point.schedule, step_s, mean_s, peak)
    first = int(policy.targets(_AT_ZERO).hot)
    result = run_fluid(part, policy, exact, tick_s=5, hot=first, cold=peak - first)
    return result.misses, result.usd_serving


_AT_ZERO = FleetSnapshot(0.0, (), 0, 0, 0, 0, 0, 0.0, 0.0)


def _summed(values: Floats, steps: int, step_s: int) -> Floats:
    padded = np.zeros(steps * step_s)
    padded[: len(values)] = values
    found: Floats = padded.reshape(steps, step_s).sum(axis=1)
    return found


def _peak(work: Floats, waits: Floats, step_s: int) -> float:
    """Return the most work per second that would have to be done to be never late."""
    window = max(1, int(float(np.median(waits)) / step_s))
    sums = np.convolve(work, np.ones(window), "valid") if len(work) >= window else work
    return float(sums.max()) / (window * step_s)
