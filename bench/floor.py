"""What a clairvoyant would pay: the cheapest fleet for a trace that is known in advance.

    minimise  hot seconds + start_s a start + stop_s a stop + λ * missed requests

in the fluid model of simulation/virtual/fluid.py, by exact dynamic programming over (hot instances, work
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
its storage costs; the loads, of instances that are there when the window begins, are nobody's.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import FleetSnapshot, Targets
from process.compiled import njit
from simulation.virtual.fluid import Bins, Fleet, run_policy

Floats = NDArray[np.float64]
Schedule = NDArray[np.int16]

LEVELS = 24
"""Places of waiting work. 32 gives the same bound to three digits on the hour-long logs (2026-11)."""

MOST_CELLS = 700_000_000
"""Decisions that are kept to read the schedule back, one byte each."""

ROUNDS = 18
"""Of the bisection for λ."""

SHARES = (1.0, 0.8, 0.65, 0.5, 0.35)
"""Of the mean limit that a plan reckons with, until one keeps the goal."""

LONGEST_WAIT_S = 60.0
"""What can wait is counted in no more seconds than these: longer limits are of single long prompts."""


@dataclass(frozen=True)
class Floor:
    """The cheapest there can be, and a schedule that comes near. Hours of GPU and dollars of the window.

    bound_gpu_h: nobody keeps the goal for less. achieved_gpu_h: what a schedule costs that keeps it, in the
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
        """How far the schedule is above the bound."""
        return self.achieved_gpu_h / self.bound_gpu_h - 1.0


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
    """The least cost from the first step on, in GPU seconds; fills choice[t, h, b] with the next h.

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
                backlog = unit * b * b
                dropped = 0.0
                left = backlog + work[t] - room
                if left < 0.0:
                    left = 0.0
                if left > keep:
                    dropped = left - keep
                    left = keep
                place = math.sqrt(left / unit)
                low = int(place)
                if low >= levels - 1:
                    after = value[h, levels - 1]
                else:
                    below = unit * low * low
                    share = (left - below) / (unit * (low + 1) * (low + 1) - below)
                    after = value[h, low] + share * (value[h, low + 1] - value[h, low])
                cost[h, b] = h * step_s + price * dropped * per_work[t] + after
        for b in range(levels):
            # The best h' >= h pays start_s a start, the best h' <= h pays stop_s a stop.
            best, at = cost[most, b], most
            value[most, b] = best
            choice[t, most, b] = most
            for h in range(most - 1, -1, -1):
                best += start_s
                if cost[h, b] <= best:
                    best, at = cost[h, b], h
                value[h, b] = best
                choice[t, h, b] = at
            best, at = cost[0, b], 0
            for h in range(1, most + 1):
                best += stop_s
                if cost[h, b] <= best:
                    best, at = cost[h, b], h
                if best < value[h, b]:
                    value[h, b] = best
                    choice[t, h, b] = at
    least = float(value[0, 0])
    for h in range(most + 1):  # how many are hot at the start is free
        if cost[h, 0] < least:
            least = float(cost[h, 0])
    return least


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
    """The hot instances of each step, read back from the choices."""
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
        """What will be hot when what is ordered now has started, and no fewer than are to be hot now."""
        at = int(seen.now) // self._step_s
        coming = self._schedule[at : at + self._ahead + 1]
        wanted = int(coming.max()) if len(coming) else int(self._schedule[-1])
        return Targets(wanted, self._pool, "known in advance")

    def scaled(self, speedup: float) -> "Played":  # noqa: ARG002 - a schedule is of its own time
        """Itself."""
        return self


@dataclass(frozen=True)
class _Point:
    price: float
    cost_s: float  # GPU seconds, misses priced in
    gpu_s: float
    missed: float
    schedule: Schedule


def floor(
    bins: Bins,
    goal: float,
    fleet: Fleet,
    *,
    score_from_s: int = 0,
    score_to_s: int | None = None,
    step_s: int = 1,
) -> Floor:
    """The floor of the scored seconds; ValueError when nothing arrives in them.

    step_s: grain of the dynamic programme, seconds.
    """
    end = len(bins) if score_to_s is None else min(score_to_s, len(bins))
    part = bins.between(score_from_s, end)
    requests = float(part.requests.sum())
    if requests <= 0.0:
        raise ValueError("nothing arrives in the scored seconds")
    c = float(fleet.capacity.work_s)
    steps = math.ceil(len(part) / step_s)
    work, count = (_summed(v, steps, step_s) for v in (part.work, part.requests))
    per_work = np.divide(count, work, out=np.zeros(steps), where=work > 0.0)
    # Late work is dropped of what is waiting, which is of the last steps too.
    near = np.ones(max(1, round(30 / step_s)))
    per_work = np.convolve(count, near, "same") / np.maximum(np.convolve(work, near, "same"), 1e-9)
    # What waits came in several seconds, each with its own limit: their mean, by work, near this step.
    limit = np.convolve(_summed(part.limit_s * part.work, steps, step_s), near, "same")
    usual = float((part.limit_s * part.work).sum() / part.work.sum())
    near_work = np.convolve(work, near, "same")
    waits = np.where(near_work > 0.0, limit / np.maximum(near_work, 1e-9), usual)
    limits = np.minimum(waits, LONGEST_WAIT_S)
    most = min(255, max(2, math.ceil(1.1 * _peak(work, limits, step_s) / c) + 1))
    levels = LEVELS
    while steps * (most + 1) * levels > MOST_CELLS and levels > 8:
        levels -= 4
    choice = np.zeros((steps, most + 1, levels), dtype=np.uint8)
    start_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
    allowed = (1.0 - goal) * requests
    longest_s = float(limits.max())

    def at(price: float, share: float = 1.0) -> _Point:
        waits = limits * share
        cost_s = _plan(
            work,
            per_work,
            waits,
            c,
            most,
            levels,
            float(step_s),
            start_s,
            fleet.stop_s,
            price,
            longest_s,
            choice,
        )
        schedule = np.zeros(steps, dtype=np.int16)
        _follow(
            work, waits, c, most, levels, float(step_s), _first(work, c, most), longest_s, choice, schedule
        )
        moves = np.diff(schedule.astype(np.float64))
        gpu_s = float(schedule.sum()) * step_s
        gpu_s += start_s * float(moves[moves > 0].sum()) + fleet.stop_s * float(-moves[moves < 0].sum())
        return _Point(price, cost_s, gpu_s, max(0.0, (cost_s - gpu_s) / price), schedule)

    # The dual is concave in the price and flat where the plan misses just what is allowed.
    low, high, bound_s = 1e-2, 1e6, 0.0
    for _ in range(ROUNDS):
        price = math.sqrt(low * high)
        point = at(price)
        bound_s = max(bound_s, point.cost_s - price * allowed)
        low, high = (low, price) if point.missed <= allowed else (price, high)
        if high / low < 1.02:
            break
    # A plan that keeps the goal by the fluid model's own rules: with a higher price, and where the limits of
    # neighbours differ much, as if they were shorter than their mean.
    found, misses, usd = point, 1.0, math.inf
    for share in SHARES:
        tries_low, tries_high = 0.5 * high, 1e7
        for n in range(ROUNDS):
            price = high if n == 0 else math.sqrt(tries_low * tries_high)
            point = at(price, share)
            missed, cost = _achieved(bins, fleet, point, score_from_s, end, step_s)
            if missed <= 1.0 - goal:
                tries_high = price
                if cost < usd:
                    found, misses, usd = point, missed, cost
            else:
                tries_low = price
            if n and tries_high / tries_low < 1.15:
                break
        if usd < math.inf and share < 0.7:
            break
    if usd == math.inf:
        misses, usd = _achieved(bins, fleet, found, score_from_s, end, step_s)
    hourly = fleet.running_usd_h / 3600.0
    seconds = end - score_from_s
    peak = int(found.schedule.max())
    idle_s = peak * seconds - float(found.schedule.sum()) * step_s
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


def _achieved(
    bins: Bins, fleet: Fleet, point: _Point, score_from_s: int, score_to_s: int, step_s: int
) -> tuple[float, float]:
    """(share missed, dollars of GPUs) of the schedule in the fluid model, every start as long as the mean."""
    mean_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
    peak = int(point.schedule.max())
    exact = Fleet(
        fleet.capacity, mean_s, mean_s, fleet.load_s, fleet.stop_s, fleet.running_usd_h, fleet.stopped_usd_h,
        True, fleet.late_bound_s, max(peak, 1),
    )  # fmt: skip
    part = bins.between(score_from_s, score_to_s)
    policy = Played(point.schedule, step_s, mean_s, peak)
    first = int(policy.targets(_AT_ZERO).hot)
    result = run_policy(part, policy, exact, tick_s=5, hot=first, cold=peak - first)
    return result.misses, result.usd_serving


_AT_ZERO = FleetSnapshot(0.0, (), 0, 0, 0, 0, 0, 0.0, 0.0)


def _summed(values: Floats, steps: int, step_s: int) -> Floats:
    padded = np.zeros(steps * step_s)
    padded[: len(values)] = values
    found: Floats = padded.reshape(steps, step_s).sum(axis=1)
    return found


def _peak(work: Floats, waits: Floats, step_s: int) -> float:
    """Work per second that would have to be done at most to be never late."""
    window = max(1, int(float(np.median(waits)) / step_s))
    sums = np.convolve(work, np.ones(window), "valid") if len(work) >= window else work
    return float(sums.max()) / (window * step_s)


def _first(work: Floats, c: float, most: int) -> int:
    return min(most, max(0, round(float(work[:60].mean()) / c)))
