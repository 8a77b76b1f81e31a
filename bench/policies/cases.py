"""One case of the comparison: the floor, ours and the peers on one trace, size, profile and discipline."""

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.policies.floor import floor
from bench.policies.peers.registry import PEERS, Peer, runs
from engine.profiles import get_profile
from engine.slo import Slo
from engine.step_time_constants import Timing
from policies import Capacity
from policies.objective import Objective
from policies.tuning import KeptPool, Margin, worth_keeping_s
from simulation.traces import logs
from simulation.traces.reading import read
from simulation.traces.request import Request
from simulation.virtual.capacity import capacity_of
from simulation.virtual.fluid.bins import Bins, bins_of
from simulation.virtual.fluid.fleet import FluidFleet, FluidResult
from simulation.virtual.fluid.run import FluidRun
from simulation.virtual.replay import LEAST_HISTORY_S, REPLAY_EVERY_S, tune

TRACES: Mapping[str, str] = {
    "code": "azure2023_code.csv",
    "conv": "azure2023_conv.csv",
    "mooncake": "mooncake_conversation.csv",
    "m-small": "servegen_m-small_2d.csv.gz",
}

GPUS: Mapping[str, tuple[str, int, float]] = {
    # profile: GPU, how many, $/h on demand (docs/reference/timing.md 4)
    "vllm-13": ("A100 SXM4", 1, 0.78),
    "vllm-70": ("A100 SXM4", 2, 1.90),
}
STORAGE_USD_GB_MONTH = 0.15
START_SHARE = {"vllm-13": 1 / 3, "vllm-70": 3 / 7}
"""Share by which starts are shorter or longer than the profile's time: 60 to 120 s, and 2 to 5 min."""

DAY_S = 86_400
KNOB_ROUNDS = 3
"""Rounds of the bisection between the two knobs of a sweep around the goal."""

Line = dict[str, Any]


@dataclass(frozen=True)
class PolicyCase:
    """One cell of the comparison. need: instances on average."""

    trace: str
    need: float
    profile: str
    lane: bool
    goals: tuple[float, ...]
    directory: Path
    peers: tuple[str, ...]


@dataclass(frozen=True)
class PolicyWorld:
    """What a case is played in. history_s to end_s is scored; hot and cold are there at the begin."""

    bins: Bins
    fleet: FluidFleet
    history_s: int
    end_s: int
    hot: int
    cold: int


# -- what a case is played in ----------------------------------------------------------------------------


def read_log(path: Path, tick_s: float) -> list[Request]:
    """Return a log, its rounded times spread."""
    log = read(path)
    return list(log if not tick_s else logs.spread_ticks(log, tick_s, random.Random(1)))


def world_of(case: PolicyCase) -> PolicyWorld:
    """Return the trace at the size of the case, and a fleet of machines for it."""
    log = read_log(case.directory / TRACES[case.trace], 3.0 if case.trace == "mooncake" else 0.0)
    gpu, count, usd_h = GPUS[case.profile]
    profile = get_profile(case.profile)
    timing = profile.timing_on(gpu, count)
    capacity = capacity_of(profile, timing, islice(log, 20_000), Slo())
    seconds = math.ceil(log[-1].at_s)
    days = seconds > 1.5 * DAY_S
    history_s = DAY_S if days else seconds // 2 // 5 * 5
    work = sum(profile.prefill_weight * r.prompt_tokens + r.output_tokens for r in log)
    scale = case.need * capacity.work_s * seconds / work
    bins = scaled_bins(log, scale, timing, seconds, seed=7)
    share = START_SHARE[case.profile]
    fleet = FluidFleet(
        capacity,
        start_lo_s=profile.start_time_s * (1 - share),
        start_hi_s=profile.start_time_s * (1 + share),
        load_s=profile.load_time_s,
        running_usd_h=usd_h,
        stopped_usd_h=STORAGE_USD_GB_MONTH * profile.disk_gb / 720.0,
        late_lane=case.lane,
        max_instances=max(20, math.ceil(12 * case.need)),
    )
    hot = math.ceil(case.need)
    return PolicyWorld(bins, fleet, history_s, seconds, hot, 4 * hot)


def _reading_s(timing: Timing, prompt: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return seconds that an idle instance takes over each prompt."""
    thousands = prompt / 1e3
    found: NDArray[np.float64] = (timing.d + timing.e * thousands + timing.f * thousands**2) / 1e3
    return found


def scaled_bins(log: Sequence[Request], scale: float, timing: Timing, seconds: int, seed: int) -> Bins:
    """Return the arrivals `scale` times, each repeat moved by up to JITTER_S.

    logs.scaled does the same request by request. Here repeat after repeat goes into the bins, so that a
    thousand of them need no more memory than one.
    """
    rng = np.random.default_rng(seed)
    table = np.array([(r.at_s, r.prompt_tokens, r.output_tokens) for r in log])
    sums = [np.zeros(seconds) for _ in range(5)]
    for copy in range(math.ceil(scale)):
        part = table if copy + 1 <= scale else table[rng.random(len(table)) < scale - copy]
        moved = rng.uniform(-logs.JITTER_S, logs.JITTER_S, len(part)) if copy else 0.0
        at = np.clip(part[:, 0] + moved, 0.0, seconds - 1e-6)
        one = bins_of(at, part[:, 1], part[:, 2], seconds=seconds, reading_s=_reading_s(timing, part[:, 1]))
        prompt, output = one.tokens()
        for total, values in zip(
            sums, (one.work, one.requests, one.limit_s * one.requests, prompt, output), strict=True
        ):
            total += values
    work, requests, limits, prompt, output = sums
    return Bins(work, requests, limits / np.maximum(requests, 1.0), prompt, output)


# -- one run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyScore:
    """A window: share missed, dollars in all and of the pool (loads and storage), waits of the late."""

    misses: float
    usd: float
    usd_pool: float
    late_p50_s: float
    late_max_s: float
    uncovered: float
    most_hot: int

    @classmethod
    def of(cls, r: FluidResult) -> "PolicyScore":
        """Return the score of a result."""
        pool = r.usd_loading + r.usd_stopped
        return cls(r.misses, r.usd, pool, r.late_p50_s, r.late_max_s, r.uncovered, r.most_hot)


def _begun(
    world: PolicyWorld, from_s: int, to_s: int, *, series: bool = False, tracked: bool = True
) -> FluidRun:
    return FluidRun(
        world.bins,
        world.fleet,
        score_from_s=from_s,
        score_to_s=to_s,
        hot=world.hot,
        cold=world.cold,
        tracked=tracked,
        series=series,
    )


def ours(
    world: PolicyWorld, goal: float, *, series: bool = False
) -> tuple[PolicyScore, FluidResult, Objective]:
    """Run `Objective` as the autoscaler does: tuned every half hour on the last day, in the order of time."""
    run = _begun(world, world.history_s, world.end_s, series=series, tracked=False)
    level = Objective(goal=goal)
    f = world.fleet
    pool, keep_s = KeptPool(), worth_keeping_s(f.load_s, f.running_usd_h, f.stopped_usd_h)
    pool.note(0, world.hot + world.cold, keep_s)
    # What it has missed so far, scored or not: the same run once more, whose every second counts.
    watched, margin, counted = _begun(world, 0, world.end_s, tracked=False), Margin(goal), (0.0, 0.0)
    now = 0
    while now < world.end_s:
        if now >= LEAST_HISTORY_S:
            so_far = watched.scored_so_far
            if now > LEAST_HISTORY_S:  # what the first level did is not the replays' fault
                margin.note(so_far[0] - counted[0], so_far[1] - counted[1])
            counted = so_far
            history = world.bins.between(max(0, now - DAY_S), now)
            tuned = tune(history, goal, world.fleet, margin=margin.share)
            kept = pool.note(now, tuned.level.pool, keep_s)
            level = replace(tuned.level, pool=kept, settled_at=float(now))
        until = min(world.end_s, now + (REPLAY_EVERY_S if now >= REPLAY_EVERY_S else LEAST_HISTORY_S))
        if now < LEAST_HISTORY_S:
            until = min(until, LEAST_HISTORY_S)
        run.level(level, until)
        watched.level(level, until)
        now = until
    result = run.result()
    return PolicyScore.of(result), result, level


# -- one case --------------------------------------------------------------------------------------------


def carry_out(case: PolicyCase) -> Line:
    """Run all policies of one case."""
    begun = time.monotonic()
    world = world_of(case)
    found: Line = {
        "trace": case.trace,
        "need": case.need,
        "profile": case.profile,
        "lane": case.lane,
        "capacity": asdict(world.fleet.capacity),
        "floor": {},
        "ours": {},
        "peers": {},
    }
    step_s = 2 if world.end_s > DAY_S else 1
    for goal in case.goals:
        least = floor(
            world.bins, goal, world.fleet, score_from_s=world.history_s, score_to_s=world.end_s, step_s=step_s
        )
        found["floor"][f"{goal:g}"] = {
            "bound_usd": least.bound_usd,
            "achieved_usd": least.achieved_usd,
            "pool_usd": least.pool_usd,
            # Where the grain of the bound puts it over a schedule that was played, the schedule is the floor.
            "usd": min(least.bound_usd, least.achieved_usd) + least.pool_usd,
            "misses": least.misses,
        }
        score, result, level = ours(world, goal, series=True)
        found["ours"][f"{goal:g}"] = {
            **asdict(score),
            "level": {k: v for k, v in asdict(level).items() if k != "settled_at"},
            "series": _thinned(result, world),
        }
    capacity = world.fleet.capacity
    for name in case.peers:
        for actuator, line in _peer(world, PEERS[name], capacity, case.goals):
            found["peers"][f"{name} / {actuator}"] = line
    found["seconds"] = time.monotonic() - begun
    return found


def _thinned(result: FluidResult, world: PolicyWorld) -> Line:
    """Return what the plots need of a run: a thousand moments of the window."""
    s = result.series
    if s is None:
        return {}
    first = int(np.searchsorted(s.at_s, world.history_s))
    every = max(1, (len(s.at_s) - first) // 1000)
    part = slice(first, None, every)
    names = {"at_s": s.at_s, "hot": s.hot, "starting": s.starting, "loading": s.loading, "cold": s.cold}
    return {
        **{name: values[part].tolist() for name, values in names.items()},
        "demand": [round(float(d), 3) for d in s.demand[part]],
    }


def _peer(
    world: PolicyWorld, peer: Peer, capacity: Capacity, goals: Sequence[float]
) -> Iterable[tuple[str, Line]]:
    """Yield its sweep and defaults, by each actuator."""
    for actuator in [name for name, _ in runs(peer, lambda: peer.at(1.0))]:

        def make(factory: Callable[[], Any], actuator: str = actuator) -> Any:
            return dict(runs(peer, factory))[actuator]()

        points: list[Line] = []

        def score(knob: float, make: Callable[..., Any] = make, points: list[Line] = points) -> Line:
            policy = make(lambda: peer.at(knob))
            before, now = _both(world, policy, lambda: make(lambda: peer.at(knob)))
            point = {"knob": knob, "now": asdict(now), "before": asdict(before)}
            points.append(point)
            return point

        # Days take seconds a run: every other value, for each is refined below.
        every = 2 if world.end_s > DAY_S else 1
        for knob, _ in peer.sweep(capacity)[::every]:
            score(knob)
        line: Line = {"title": peer.title, "knob": peer.knob, "goals": {}, "defaults": []}
        for goal in goals:
            _refine(points, score, goal, "now", whole=peer.whole)
            _refine(points, score, goal, "before", whole=peer.whole)
        points.sort(key=lambda p: p["now"]["usd"])
        line["points"] = points
        for goal in goals:
            kept = [p for p in points if p["now"]["misses"] <= 1.0 - goal]
            hindsight = min(kept, key=lambda p: p["now"]["usd"], default=None)
            kept_before = [p for p in points if p["before"]["misses"] <= 1.0 - goal]
            yesterday = min(kept_before, key=lambda p: p["before"]["usd"], default=None)
            line["goals"][f"{goal:g}"] = {"hindsight": hindsight, "yesterday": yesterday}
        for label, factory in peer.defaults():
            policy = make(factory)
            _, now = _both(world, policy, None)
            line["defaults"].append({"label": label, **asdict(now)})
        yield actuator, line


def _both(
    world: PolicyWorld, policy: Any, again: Callable[[], Any] | None
) -> tuple[PolicyScore, PolicyScore]:
    """Return (yesterday, today), each scored in a run of its own."""
    before = None
    if again is not None:
        run = _begun(world, 600, world.history_s)
        run.policy(again(), world.history_s, tick_s=int(policy.tick_s))
        before = PolicyScore.of(run.result())
    run = _begun(world, world.history_s, world.end_s)
    run.policy(policy, world.end_s, tick_s=int(policy.tick_s))
    now = PolicyScore.of(run.result())
    return before or now, now


def _refine(
    points: list[Line], score: Callable[[float], Line], goal: float, when: str, *, whole: bool
) -> None:
    """Bisect between the cheapest knob that keeps the goal and the next one that does not."""
    for _ in range(KNOB_ROUNDS):
        ordered = sorted(points, key=lambda p: p["knob"])
        kept = [n for n, p in enumerate(ordered) if p[when]["misses"] <= 1.0 - goal]
        if not kept:
            return
        best = min(kept, key=lambda n: ordered[n][when]["usd"])
        neighbours = [ordered[n] for n in (best - 1, best + 1) if 0 <= n < len(ordered) and n not in kept]
        if not neighbours:
            return
        a, b = ordered[best]["knob"], min(neighbours, key=lambda p: p[when]["usd"])["knob"]
        middle = round((a + b) / 2) if whole else math.sqrt(a * b) if a > 0 and b > 0 else (a + b) / 2
        if any(abs(middle - p["knob"]) <= 0.02 * abs(middle) for p in points):
            return
        score(middle)
