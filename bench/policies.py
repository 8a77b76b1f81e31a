"""Every management policy on every trace: what it costs to serve a share of the requests in time.

    python -m bench.policies [--traces DIR] [--needs 3,30] [--profiles vllm-13,vllm-70] [--workers N]
                             [--goals 0.99,0.999] [--json FILE] [--plots DIR] [--only conv,…] [--peers NAME,…]

For each trace, size of fleet, profile and discipline of the queue (one line, or the late lane) in the fluid
model (simulation/virtual/fluid.py), whose capacity is that of the step-level model server for the trace's
lengths:

    floor        the cheapest a clairvoyant could do (bench/floor.py)
    ours         `Objective`, tuned by replay every half hour on what it has seen; no hindsight
    peers        best knob in hindsight; the knob that was best yesterday; published defaults

The scored window is the second half of a log of an hour (the first is history) and the second day of two. A
cost is all dollars of the window: GPUs hot, starting, loading and stopping, and the pool's storage. It is
shown as a ratio to the floor's, whose pool is the cheapest there can be. All begin with as many hot as the
mean needs, and five times as many loaded.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.floor import floor
from bench.peers import PEERS, Peer, runs
from engine.profiles import get_profile
from engine.slo import Slo
from engine.timing import Timing, timing_for
from fleet_client.flags import Parser, run_main, within
from policies import Capacity
from policies.objective import KeptPool, Margin, Objective, worth_keeping_s
from process.errors import ConfigError
from simulation.traces import logs
from simulation.virtual.capacity import capacity_of
from simulation.virtual.fluid import Bins, Fleet, FluidResult, Run, bins_of
from simulation.virtual.replay import LEAST_HISTORY_S, REPLAY_EVERY_S, tune

TRACES: Mapping[str, str] = {
    "code": "azure2023_code.csv",
    "conv": "azure2023_conv.csv",
    "mooncake": "mooncake_conversation.csv",
    "m-small": "servegen_m-small_2d.csv.gz",
}

GPUS: Mapping[str, tuple[str, int, float]] = {
    # profile: GPU, how many, $/h on demand (timing.md section 4)
    "vllm-13": ("A100 SXM4", 1, 0.78),
    "vllm-70": ("A100 SXM4", 2, 1.90),
}
STORAGE_USD_GB_MONTH = 0.15
START_SHARE = {"vllm-13": 1 / 3, "vllm-70": 3 / 7}
"""Starts take the profile's time within ± so much: 60 to 120 s, and 2 to 5 min."""

DAY_S = 86_400
KNOB_ROUNDS = 3
"""Of the bisection between the two knobs of a sweep around the goal."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One cell of the comparison. need: instances on average."""

    trace: str
    need: float
    profile: str
    lane: bool
    goals: tuple[float, ...]
    directory: Path
    peers: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """What a case is played in. history_s to end_s is scored; hot and cold are there at the begin."""

    bins: Bins
    fleet: Fleet
    history_s: int
    end_s: int
    hot: int
    cold: int


# -- the world of a case ---------------------------------------------------------------------------------


def read_log(path: Path, tick_s: float) -> list[logs.Request]:
    """A log, its rounded times spread."""
    log = logs.read(path)
    return list(log if not tick_s else logs.spread_ticks(log, tick_s, random.Random(1)))


def world_of(case: Case) -> World:
    """The trace at the size of the case, and a fleet of machines for it."""
    log = read_log(case.directory / TRACES[case.trace], 3.0 if case.trace == "mooncake" else 0.0)
    gpu, count, usd_h = GPUS[case.profile]
    profile, timing = get_profile(case.profile), timing_for(case.profile, gpu, count)
    capacity = capacity_of(profile, timing, islice(log, 20_000), Slo())
    seconds = math.ceil(log[-1].at_s)
    days = seconds > 1.5 * DAY_S
    history_s = DAY_S if days else seconds // 2 // 5 * 5
    work = sum(profile.prefill_weight * r.prompt_tokens + r.output_tokens for r in log)
    scale = case.need * capacity.work_s * seconds / work
    bins = scaled_bins(log, scale, timing, seconds, seed=7)
    share = START_SHARE[case.profile]
    fleet = Fleet(
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
    return World(bins, fleet, history_s, seconds, hot, 4 * hot)


def _reading_s(timing: Timing, prompt: NDArray[np.float64]) -> NDArray[np.float64]:
    """What an idle instance takes over each prompt, seconds."""
    thousands = prompt / 1e3
    found: NDArray[np.float64] = (timing.d + timing.e * thousands + timing.f * thousands**2) / 1e3
    return found


def scaled_bins(log: Sequence[logs.Request], scale: float, timing: Timing, seconds: int, seed: int) -> Bins:
    """The arrivals `scale` times, each repeat moved by up to JITTER_S, as traces.scaled does it one by one.

    Repeat after repeat goes into the bins, so that a thousand of them need no more memory than one.
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
class Score:
    """A window: share missed, dollars in all and of the pool (loads and storage), waits of the late."""

    misses: float
    usd: float
    usd_pool: float
    late_p50_s: float
    late_max_s: float
    uncovered: float
    most_hot: int

    @classmethod
    def of(cls, r: FluidResult) -> "Score":
        """From a result."""
        pool = r.usd_loading + r.usd_stopped
        return cls(r.misses, r.usd, pool, r.late_p50_s, r.late_max_s, r.uncovered, r.most_hot)


def _begun(world: World, from_s: int, to_s: int, *, series: bool = False, tracked: bool = True) -> Run:
    return Run(
        world.bins,
        world.fleet,
        score_from_s=from_s,
        score_to_s=to_s,
        hot=world.hot,
        cold=world.cold,
        tracked=tracked,
        series=series,
    )


def ours(world: World, goal: float, *, series: bool = False) -> tuple[Score, FluidResult, Objective]:
    """`Objective` as the autoscaler runs it: tuned every half hour on the last day, in the order of time."""
    run = _begun(world, world.history_s, world.end_s, series=series, tracked=False)
    level = Objective(goal=goal)
    f = world.fleet
    pool = KeptPool(worth_keeping_s(f.load_s, f.running_usd_h, f.stopped_usd_h))
    pool.note(0, world.hot + world.cold)
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
            level = replace(tuned.level, pool=pool.note(now, tuned.level.pool), settled_at=float(now))
        until = min(world.end_s, now + (REPLAY_EVERY_S if now >= REPLAY_EVERY_S else LEAST_HISTORY_S))
        if now < LEAST_HISTORY_S:
            until = min(until, LEAST_HISTORY_S)
        run.level(level, until)
        watched.level(level, until)
        now = until
    result = run.result()
    return Score.of(result), result, level


# -- one case --------------------------------------------------------------------------------------------


def carry_out(case: Case) -> Line:
    """All policies of one case."""
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


def _thinned(result: FluidResult, world: World) -> Line:
    """What the plots need of a run: a thousand moments of the window."""
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


def _peer(world: World, peer: Peer, capacity: Capacity, goals: Sequence[float]) -> Iterable[tuple[str, Line]]:
    """Its sweep and defaults, by each actuator."""
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


def _both(world: World, policy: Any, again: Callable[[], Any] | None) -> tuple[Score, Score]:
    """(yesterday, today): one run, whose counters are read at the begin of the window too."""
    before = None
    if again is not None:
        run = _begun(world, 600, world.history_s)
        run.policy(again(), world.history_s, tick_s=int(policy.tick_s))
        before = Score.of(run.result())
    run = _begun(world, world.history_s, world.end_s)
    run.policy(policy, world.end_s, tick_s=int(policy.tick_s))
    now = Score.of(run.result())
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


# -- the table -------------------------------------------------------------------------------------------


def ratio(case: Mapping[str, Any], goal: str, usd: float | None) -> float | None:
    """To the floor; None stays None."""
    return None if usd is None else usd / case["floor"][goal]["usd"]


def peer_usd(case: Mapping[str, Any], name: str, goal: str, when: str) -> float | None:
    """Today's dollars of a peer with the knob of hindsight, or of yesterday if it keeps the goal today."""
    point = case["peers"].get(name, {}).get("goals", {}).get(goal, {}).get(when)
    if point is None or (when == "yesterday" and point["now"]["misses"] > 1.0 - float(goal)):
        return None
    return float(point["now"]["usd"])


def best_peer(case: Mapping[str, Any], goal: str, when: str) -> tuple[str, float] | None:
    """The cheapest one that keeps the goal."""
    found = [(name, peer_usd(case, name, goal, when)) for name in case["peers"]]
    costs = [(usd, name) for name, usd in found if usd is not None]
    return None if not costs else (min(costs)[1], min(costs)[0])


def tables(cases: Sequence[Mapping[str, Any]], goals: Sequence[float]) -> str:
    """All tables as text."""
    lines: list[str] = []
    for goal in (f"{g:g}" for g in goals):
        for profile, need in sorted({(c["profile"], c["need"]) for c in cases}):
            chosen = [c for c in cases if (c["profile"], c["need"]) == (profile, need)]
            names = list(dict.fromkeys(c["trace"] for c in chosen))
            lines += [
                "",
                f"{float(goal):.1%} in time, {profile}, about {need:g} instances: cost over the floor's,",
            ]
            lines.append("one line / late lane; peers with the best knob in hindsight")
            lines.append(f"{'':34}" + "".join(f"{n:>16}" for n in names))
            lines.append(
                f"{'floor, $ (achieved over bound)':34}"
                + "".join(_floor_cell(chosen, n, goal) for n in names)
            )
            lines.append(f"{'ours, no hindsight':34}" + "".join(_cell(chosen, n, _ours(goal)) for n in names))
            lines.append(
                f"{'  its misses':34}" + "".join(_cell(chosen, n, _misses(goal), "{:.2%}") for n in names)
            )
            for peer in dict.fromkeys(name for c in chosen for name in c["peers"]):
                cells = [_cell(chosen, n, _hindsight(peer, goal)) for n in names]
                lines.append(f"{peer:34}" + "".join(cells))
    return "\n".join([*lines, "", *summary(cases, goals)])


def _floor_cell(cases: Sequence[Mapping[str, Any]], trace: str, goal: str) -> str:
    case = next(c for c in cases if c["trace"] == trace)
    least = case["floor"][goal]
    return f"{least['usd']:>9.2f} ({least['achieved_usd'] / least['bound_usd']:.2f})"


def _cell(
    cases: Sequence[Mapping[str, Any]],
    trace: str,
    value: Callable[[Mapping[str, Any]], float | None],
    form: str = "{:.2f}",
) -> str:
    """Both disciplines of a cell."""
    parts = []
    for lane in (False, True):
        case = next((c for c in cases if c["trace"] == trace and c["lane"] == lane), None)
        found = None if case is None else value(case)
        parts.append("–" if found is None else form.format(found))
    return f"{' / '.join(parts):>16}"


def _ours(goal: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: ratio(case, goal, case["ours"][goal]["usd"])


def _misses(goal: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: float(case["ours"][goal]["misses"])


def _hindsight(peer: str, goal: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: ratio(case, goal, peer_usd(case, peer, goal, "hindsight"))


def summary(cases: Sequence[Mapping[str, Any]], goals: Sequence[float]) -> list[str]:
    """What the issue asks: ours against the best peer of each trace, and the cost of the pool."""
    lines = []
    for goal in (f"{g:g}" for g in goals):
        for profile, need in sorted({(c["profile"], c["need"]) for c in cases}):
            chosen = {
                (c["trace"], c["lane"]): c for c in cases if (c["profile"], c["need"]) == (profile, need)
            }
            names = sorted({trace for trace, _ in chosen})
            for what, own_lane, when in (
                ("ours with the lane / best peer in one line, its knob in hindsight", True, "hindsight"),
                ("ours with the lane / cheapest peer that keeps it with yesterday's knob", True, "yesterday"),
                ("one line against one line, its knob in hindsight", False, "hindsight"),
            ):
                shares = []
                for trace in names:
                    mine, other = chosen.get((trace, own_lane)), chosen.get((trace, False))
                    if mine is None or other is None:
                        continue
                    best = best_peer(other, goal, when)
                    if best is not None:
                        shares.append((trace, mine["ours"][goal]["usd"] / best[1], best[0]))
                if shares:
                    mean = math.exp(sum(math.log(s) for _, s, _ in shares) / len(shares))
                    each = ", ".join(f"{t} {s:.2f} ({n})" for t, s, n in shares)
                    lines.append(f"{float(goal):.1%} {profile} {need:g}: {what}: {mean:.2f} ({each})")
            lane = [c for (_, with_lane), c in chosen.items() if with_lane]
            if lane:
                own = [(c["trace"], c["ours"][goal]) for c in lane]
                pool = ", ".join(f"{t} {o['usd_pool'] / (o['usd'] - o['usd_pool']):.1%}" for t, o in own)
                bare = ", ".join(f"{t} {o['uncovered']:.2%}" for t, o in own)
                waits = ", ".join(f"{t} {o['late_p50_s']:.0f}/{o['late_max_s']:.0f} s" for t, o in own)
                lines.append(f"{'':8}pool over GPU cost: {pool}; hot demand uncovered: {bare}")
                lines.append(f"{'':8}waits of the late, p50/max: {waits}")
    return lines


# --- outside world ---------------------------------------------------------------------------------


def plots(cases: Sequence[Mapping[str, Any]], goals: Sequence[float], directory: Path) -> None:
    """Cost against objective met, a curve a policy; and our instances against demand."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from simulation.plots import save

    directory.mkdir(parents=True, exist_ok=True)
    for case in cases:
        goal = f"{goals[0]:g}"
        name = f"{case['trace']}-{case['profile']}-{case['need']:g}-{'lane' if case['lane'] else 'line'}"
        figure = Figure(figsize=(11, 9), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1)
        base = case["floor"][goal]["usd"]
        for peer, line in case["peers"].items():
            points = sorted((p["now"]["misses"], p["now"]["usd"]) for p in line["points"])
            edge = _frontier(points)
            above.plot(
                [max(m, 1e-4) for m, _ in edge], [u / base for _, u in edge], linewidth=0.9, label=peer
            )
        mine = [(case["ours"][f"{g:g}"]["misses"], case["ours"][f"{g:g}"]["usd"]) for g in goals]
        above.plot(
            [max(m, 1e-4) for m, _ in mine],
            [u / base for _, u in mine],
            "k*-",
            markersize=11,
            label="ours, no hindsight",
        )
        least = [(1 - g, case["floor"][f"{g:g}"]["usd"]) for g in goals]
        above.plot([m for m, _ in least], [u / base for _, u in least], "r_--", label="floor")
        above.set_xscale("log")
        above.invert_xaxis()
        above.set_xlim(0.2, 1e-4)
        above.set_ylim(0.8, 6.0)
        above.set_xlabel("share of requests missed (fewer to the right)")
        above.set_ylabel(f"cost over the floor's at {goals[0]:.0%}")
        above.set_title(f"{name}: cost against objective met")
        above.legend(fontsize="x-small", ncols=3)
        series = case["ours"][goal]["series"]
        if series:
            hours = [t / 3600.0 for t in series["at_s"]]
            stack = [series[k] for k in ("hot", "starting", "loading", "cold")]
            below.stackplot(
                hours, stack, labels=("hot", "starting", "loading", "cold"), step="post", linewidth=0,
                colors=("#2a7fb8", "#f2a541", "#c07b20", "#d9d9d9"),
            )  # fmt: skip
            below.plot(hours, series["demand"], color="black", linewidth=0.6, label="demand")
            below.set_xlabel("hours")
            below.set_ylabel("instances, ours")
            below.margins(x=0)
            below.legend(loc="upper right", ncols=5, fontsize="x-small")
        save(figure, directory / f"{name}.png")


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The cheapest for each share missed or less."""
    edge: list[tuple[float, float]] = []
    for misses, usd in sorted(points, key=lambda p: (p[1], p[0])):
        if not edge or misses < edge[-1][0]:
            edge.append((misses, usd))
    return edge


def main() -> None:
    """Carry out all cases and print the tables."""
    parser = Parser(prog="bench.policies", description=(__doc__ or "").split("\n")[0])
    usual = Path(__file__).parent.parent.parent / "shared" / "traces"
    parser.add_argument(
        "--traces", type=Path, default=usual, metavar="DIR", help="the logs (default %(default)s)"
    )
    parser.add_argument(
        "--only", default=",".join(TRACES), metavar="NAME,…", help="traces (default %(default)s)"
    )
    parser.add_argument(
        "--needs", default="3,30", metavar="N,…", help="instances on average (default %(default)s)"
    )
    parser.add_argument("--profiles", default=",".join(GPUS), metavar="NAME,…", help="(default %(default)s)")
    parser.add_argument("--goals", default="0.99,0.999", metavar="SHARE,…", help="(default %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAME,…", help="(default all)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default %(default)d)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there (default: none)")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw a picture a case there (default: none)"
    )
    args = parser.parse_args()
    within("--workers", args.workers, 1, 64)
    try:
        needs = [float(n) for n in args.needs.split(",")]
        goals = tuple(float(g) for g in args.goals.split(","))
    except ValueError:
        raise ConfigError(f"--needs {args.needs} --goals {args.goals}: wanted numbers with commas") from None
    for name, known in ((args.only, TRACES), (args.profiles, GPUS), (args.peers, PEERS)):
        for part in filter(None, name.split(",")):
            if part not in known:
                raise ConfigError(f"{part!r}: known are {', '.join(known)}")
    peers = tuple(filter(None, args.peers.split(",")))
    cases = [
        Case(trace, need, profile, lane, goals, args.traces, peers)
        for trace in sorted(args.only.split(","), key=lambda t: t != "m-small")  # the longest first
        for need in needs
        for profile in args.profiles.split(",")
        for lane in (False, True)
    ]
    found: list[Line] = []
    with ProcessPoolExecutor(args.workers) as pool:
        for line in pool.map(carry_out, cases):
            found.append(line)
            at = f"{line['trace']} {line['profile']} {line['need']:g} {'lane' if line['lane'] else 'line'}"
            print(f"{len(found)}/{len(cases)} {at}: {line['seconds']:.0f} s", flush=True)
            if args.json is not None:  # hours may have gone into it: what is there is kept
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    order = {name: n for n, name in enumerate(TRACES)}
    found.sort(key=lambda c: order[c["trace"]])
    print(tables(found, goals))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plots is not None:
        plots(found, goals, args.plots)


if __name__ == "__main__":
    run_main(main)
