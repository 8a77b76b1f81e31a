"""Every rule for choosing a server on every trace: how long users wait for the first token and for the whole.

    python -m bench.dispatch [--traces DIR] [--only conv,…] [--fleets equal,mixed] [--loads 0.6,0.8,0.9,0.95]
                             [--sets main,fresh,four,overload,unknown] [--rules NAME,…] [--servers N]
                             [--arrivals usual|poisson|log|sessions] [--requests N] [--seed N]
                             [--repeats N] [--workers N] [--json FILE] [--with FILE] [--plots DIR]
                             [--full]

Step-level model servers (engine/reference.py) are given the requests of a trace by ours, by the rules of
others (bench/dispatchers), and by a clairvoyant who knows how long every answer will be. Load is the share of
what the servers serve when they are saturated with the same lengths, each measured by itself.

    main      reports 1 s old, one loadbalancer        fresh     a report before every decision
    four      four loadbalancers that do not talk      overload  105 %, those who can hold do
    unknown   ours is told constants that are off by up to 30 %, scored after ten minutes or half of the run

The first tenth of the requests is warm-up. J = mean whole + 10 * mean first token. CL is the clairvoyant, BP
the best of the others, for each figure another one. Not in BP is least in-flight over the rate of the GPU,
which is told here what each server does with the very trace; a row of its own has it in.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from bench.dispatchers import RULES, Fleet, Request, World
from bench.dispatchers.ours import Ours
from bench.dispatchers.rule import BLOCK_TOKENS
from bench.dispatchers.world import Router, RuleRouter
from engine.reference import EventKind, SteppedModelServer
from engine.timing import TIMINGS, Timing
from fleet_client.flags import Parser, run_main, within
from process.errors import ConfigError
from simulation.traces import logs

TRACES: Mapping[str, str] = {
    "conv": "azure2023_conv.csv",
    "code": "azure2023_code.csv",
    "mooncake": "mooncake_conversation.csv",
}

# timing.md 3a, the fp16 rows; e as in model_timing.PREFILL_OPTIMISM, limits as in its LARGE_STEPS.
A100 = Timing("13B fp16 on A100 SXM4", 19.07, 0.054, 0.500, 11.3, 92.4 * 1.2, 2.71, 53_700)
H100 = Timing("13B fp16 on H100 SXM", 10.49, 0.028, 0.266, 5.2, 29.7 * 1.35, 1.92, 53_700, 1024, 8192)
L40S = TIMINGS["13B", "awq4", "L40S", 1]
RTX_4090 = TIMINGS["13B", "awq4", "RTX 4090", 1]

# The rows of Llama 3 8B, whose memory holds whole conversations.
SMALL_A100 = Timing("8B fp16 on A100 SXM4", 11.06, 0.032, 0.081, 5.5, 54.0 * 1.2, 1.91, 411_000)
SMALL_H100 = Timing("8B fp16 on H100 SXM", 6.64, 0.009, 0.041, 3.9, 17.1 * 1.35, 0.98, 411_000, 1024, 8192)
SMALL_L40S = Timing("8B fp16 on L40S", 23.60, 0.035, 0.191, 12.2, 58.9 * 1.2, 3.46, 192_000)

FLEETS: Mapping[str, tuple[Timing, ...]] = {
    # As many of each, in turn.
    "equal": (A100,),
    "mixed": (A100, L40S, RTX_4090, H100),
    "equal-8b": (SMALL_A100,),
    "mixed-8b": (SMALL_A100, SMALL_L40S, SMALL_H100, SMALL_A100),
}

ARRIVALS: Mapping[str, str] = {"conv": "poisson", "code": "log", "mooncake": "sessions"}
"""What comes by default. The study's lengths were stationary; code is there for its bursts; the sessions of
mooncake have the pauses of the log, or what is cached would be gone too late or too soon."""

UNKNOWN = 0.3
"""Constants are told off by up to so much, each by itself."""

LEARNED_S = 600.0
"""After so long they must have been learned."""

LANE_S = 300.0
"""late_bound_s of loadbalancer_server.py, where the late have a lane of their own."""

OVERLOAD = 1.05

SETTINGS = ("load", "balancers", "servers")
"""Of a line what says which run it is."""

WARM_UP = 0.1
"""Of the requests, the first so many are not scored."""

SATURATED = 1500
"""Requests a server is saturated with to find what it serves; the first third fills it."""


@dataclass(frozen=True)
class Cell:
    """One setting, in which all rules are compared. unknown: wrong constants are told."""

    set: str
    trace: str
    fleet: str
    load: float
    fresh: bool = False
    balancers: int = 1
    servers: int = 8
    unknown: bool = False
    from_s: float = 0.0
    arrivals: str = "usual"
    requests: int = 20_000
    seed: int = 0
    repeats: int = 1
    directory: Path = Path("../shared/traces")


# -- the world of a cell ---------------------------------------------------------------------------------


@cache
def lengths(path: Path, most: int) -> tuple[logs.Request, ...]:
    """The first so many of a log."""
    return tuple(islice(logs.read(path), most))


def cut(prompt: int, output: int, longest: int) -> tuple[int, int]:
    """So that both fit the smallest memory."""
    output = min(output, longest // 2)
    return min(prompt, longest - output), output


@cache
def saturated(path: Path, most: int, timing: Timing, longest: int) -> tuple[float, float]:
    """(requests, tokens made) a second by a server that always has somebody waiting, with these lengths."""
    log = lengths(path, most)
    step = max(1, len(log) // SATURATED)
    sample = [cut(r.prompt_tokens, r.output_tokens, longest) for r in log[::step]]
    server = SteppedModelServer(timing, every_token=False)
    given = ended = 0
    now = begun = 0.0
    made = counted = 0
    want = len(sample)
    while ended < want:
        while server.waiting < 2:
            server.submit(str(given), *sample[given % want], now)
            given += 1
        now = server.next_change() or now
        for event in server.advance(now):
            if event.kind is EventKind.FINISHED:
                ended += 1
                if ended == want // 3:
                    begun, made = now, server.generation_tokens_total
                elif ended > want // 3:
                    counted += 1
    return counted / (now - begun), (server.generation_tokens_total - made) / (now - begun)


def timings_of(cell: Cell) -> list[Timing]:
    """Of its servers."""
    kinds = FLEETS[cell.fleet]
    return [kinds[n % len(kinds)] for n in range(cell.servers)]


def fleet_of(cell: Cell) -> Fleet:
    """Its servers, and what they can do with the trace's lengths."""
    timings = timings_of(cell)
    path = cell.directory / TRACES[cell.trace]
    longest = min(t.kv_tokens for t in timings)
    rates = [saturated(path, cell.requests, t, longest) for t in timings]
    log = lengths(path, cell.requests)
    both = [cut(r.prompt_tokens, r.output_tokens, longest) for r in log]
    return Fleet(
        timings,
        [requests_s for requests_s, _ in rates],
        [tokens_s for _, tokens_s in rates],
        sum(p for p, _ in both) / len(both),
        sum(o for _, o in both) / len(both),
        cell.load * sum(requests_s for requests_s, _ in rates),
    )


def requests_of(cell: Cell, fleet: Fleet) -> tuple[list[Request], int]:
    """(what comes, how many of them were cut). Arrivals are as ARRIVALS says of the trace, or the cell."""
    log = lengths(cell.directory / TRACES[cell.trace], cell.requests)
    longest = min(t.kv_tokens for t in fleet.timings)
    rate = fleet.arrivals_s
    rng = random.Random(cell.seed * 7919 + 1)
    how = ARRIVALS[cell.trace] if cell.arrivals == "usual" else cell.arrivals
    shortened = 0
    out = []
    for number, (at, prompt_tokens, output_tokens, session) in enumerate(COME[how](log, rate, rng)):
        prompt, output = cut(prompt_tokens, output_tokens, longest)
        shortened += (prompt, output) != (prompt_tokens, output_tokens)
        blocks: Sequence[tuple[int, int]] = ()
        if session >= 0:
            blocks = [(session, n) for n in range((prompt + output) // BLOCK_TOKENS)]
        # Whoever says max_tokens knows within a factor of two (vast.py).
        out.append(Request(number, at, prompt, output, blocks, 1 << (output - 1).bit_length()))
    return out, shortened


Come = tuple[float, int, int, int]
"""When, prompt, output, session."""


def _poisson(log: Sequence[logs.Request], rate: float, rng: random.Random) -> Iterable[Come]:
    """Independent arrivals, the log's lengths in another order: nothing changes with time."""
    at = 0.0
    for r in rng.sample(log, len(log)):
        at += rng.expovariate(rate)
        yield at, r.prompt_tokens, r.output_tokens, -1


def _stretched(log: Sequence[logs.Request], rate: float, rng: random.Random) -> Iterable[Come]:
    """The log as it is, with its times stretched or shrunk: its bursts are as high and as many."""
    stretch = (len(log) - 1) / max(log[-1].at_s, 1e-9) / rate
    for r in logs.spread_ticks(log, logs.TICK_S if len({*log}) < len(log) else 0.0, rng):
        yield r.at_s * stretch, r.prompt_tokens, r.output_tokens, r.session


def _sessions(log: Sequence[logs.Request], rate: float, rng: random.Random) -> Iterable[Come]:
    """The log's sessions, as many of them as give the rate, with the pauses they have in reality.

    The log is played again, with others of its sessions, until as many have come as there are in it.
    """
    span_s = log[-1].at_s + logs.TICK_S
    share = rate * span_s / len(log)
    come: list[Come] = []
    tile = 0
    while len(come) < 0.9 * len(log):
        copies: dict[int, int] = {}
        for r in log:
            if r.session not in copies:
                copies[r.session] = int(share) + (rng.random() < share % 1.0)
            for copy in range(copies[r.session]):
                at = tile * span_s + r.at_s + rng.uniform(0.0, logs.TICK_S)
                come.append((at, r.prompt_tokens, r.output_tokens, (tile * 64 + copy) << 40 | r.session))
        tile += 1
    come.sort()
    return come


COME: Mapping[str, Callable[[Sequence[logs.Request], float, random.Random], Iterable[Come]]] = {
    "poisson": _poisson,
    "log": _stretched,
    "sessions": _sessions,
}


def told_wrong(timing: Timing, rng: random.Random) -> Timing:
    """Each constant off by up to UNKNOWN."""
    off = {name: getattr(timing, name) * rng.uniform(1.0 - UNKNOWN, 1.0 + UNKNOWN) for name in "abcdef"}
    return replace(timing, **off)


def carry_out(cell: Cell, name: str) -> dict[str, Any]:
    """One rule in one cell: the mean of every figure over as many runs as are wanted, seed by seed."""
    runs = [_carry_out(replace(cell, seed=cell.seed + n), name) for n in range(cell.repeats)]
    out = runs[0]
    for figure, value in out.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and figure not in SETTINGS:
            mean = sum(run[figure] for run in runs) / len(runs)
            out[figure] = round(mean) if isinstance(value, int) else mean
    return out


def _carry_out(cell: Cell, name: str) -> dict[str, Any]:
    begun = time.process_time()
    plain, _, how = name.partition("+")
    entry = RULES[plain]
    fleet = fleet_of(cell)
    requests, shortened = requests_of(cell, fleet)
    world = World(fleet, requests, random.Random(cell.seed * 31 + 2), fresh=cell.fresh)
    wrong = random.Random(cell.seed * 17 + 3)
    told = [told_wrong(t, wrong) for t in fleet.timings] if cell.unknown else None
    for number in range(cell.balancers):
        rng = random.Random(cell.seed * 1009 + number)
        router: Router
        if entry.make is None:
            options = {**entry.options, "holds": bool(how), "late_bound_s": LANE_S if how == "lane" else None}
            router = Ours(fleet, rng, world.send, world.later, number, told=told, **options)
        else:
            router = RuleRouter(entry.make(fleet, rng), world.send, holds=bool(how))
        world.routers.append(router)
    world.run()
    from_s = min(cell.from_s, requests[-1].at / 2.0)  # of a short run the second half
    score = world.score(from_s, math.ceil(WARM_UP * len(requests)))
    return {
        "trace": cell.trace,
        "fleet": cell.fleet,
        "load": cell.load,
        "fresh": cell.fresh,
        "balancers": cell.balancers,
        "servers": cell.servers,
        "unknown": cell.unknown,
        "set": cell.set,
        "rule": name,
        "asked": [cell.arrivals, cell.requests, cell.seed, cell.repeats],
        "cut": shortened,
        "duration_s": requests[-1].at,
        "from_s": from_s,
        "seconds": time.process_time() - begun,
        **score.told(),
    }


# -- what is compared ------------------------------------------------------------------------------------

SETS = ("main", "fresh", "four", "overload", "unknown")

WHOLE = ("ours-whole", "clairvoyant-whole")
"""Of mooncake only."""

USUAL = tuple(rule for rule in RULES if rule != "clairvoyant-here")


@dataclass(frozen=True)
class Choice:
    """What of the comparison is carried out."""

    traces: Sequence[str]
    fleets: Sequence[str]
    loads: Sequence[float]
    sets: Sequence[str]
    rules: Sequence[str]
    usual: Cell


def runs_of(choice: Choice) -> list[tuple[Cell, str]]:
    """Every run, those of a cell together."""
    out: list[tuple[Cell, str]] = []
    for name in choice.sets:
        for trace in choice.traces if name in ("main", "fresh", "four") else choice.traces[:1]:
            for fleet in choice.fleets:
                loads = [OVERLOAD] if name == "overload" else choice.loads
                for load in loads:
                    cell = replace(
                        choice.usual,
                        set=name,
                        trace=trace,
                        fleet=fleet,
                        load=load,
                        fresh=name == "fresh",
                        balancers=4 if name == "four" else 1,
                        from_s=LEARNED_S if name == "unknown" else 0.0,
                    )
                    rules = [r for r in choice.rules if r not in WHOLE or trace == "mooncake"]
                    if name == "overload":
                        rules = [both for rule in rules for both in (rule, f"{rule}+hold")]
                        rules += ["ours+lane"] if "ours" in rules else []
                    if name == "unknown":
                        own = [r for r in rules if RULES[r].make is None]
                        out += [(replace(cell, unknown=True), r) for r in own]
                        rules = [*own, *(r for r in rules if r == "clairvoyant")]
                    out += [(cell, rule) for rule in rules]
    return out


def title_of(rule: str) -> str:
    """As tables say it."""
    plain, _, how = rule.partition("+")
    return RULES[plain].title + {"": "", "hold": " + hold", "lane": " + hold, late lane"}[how]


def is_peer(rule: str, *, listed: bool = False) -> bool:
    """Whether it is a rule of others; listed: one that ours is measured against."""
    entry = RULES[rule.partition("+")[0]]
    return entry.peer and (entry.listed or not listed)


Line = Mapping[str, Any]
Key = tuple[str, str, str, float, bool]


def key_of(line: Line) -> Key:
    """The cell of a run."""
    return line["set"], line["trace"], line["fleet"], line["load"], line["unknown"]


def by_cell(lines: Iterable[Line]) -> dict[Key, dict[str, Line]]:
    """cell: rule: run."""
    out: dict[Key, dict[str, Line]] = {}
    for line in lines:
        out.setdefault(key_of(line), {})[line["rule"]] = line
    return out


def best_peer(cell: Mapping[str, Line], figure: str, *, listed: bool = True) -> float | None:
    """The least of the others'."""
    return min((line[figure] for rule, line in cell.items() if is_peer(rule, listed=listed)), default=None)


# -- tables ----------------------------------------------------------------------------------------------

GROUPS: Mapping[str, str] = {
    "main": "reports 1 s old",
    "fresh": "reports fresh",
    "four": "reports 1 s old, four loadbalancers",
    "overload": "reports 1 s old, overload",
    "unknown": "reports 1 s old, when constants have been learned",
}


def tables(lines: Sequence[Line], *, full: bool = False) -> str:
    """All tables as text: means, and with `full` also the quantiles."""
    out: list[str] = []
    cells = by_cell(lines)
    groups = dict.fromkeys((s, t, f) for s, t, f, _, _ in cells)
    for group in groups:
        name, trace, fleet = group
        loads = sorted({k[3] for k in cells if k[:3] == group})
        some = next(line for line in lines if key_of(line)[:3] == group)
        out += ["", f"{trace}, {some['servers']} servers {fleet}, {GROUPS[name]}; {_cut(some)}"]
        out.append("mean first token / whole, s, and J over the clairvoyant's")
        out.append(f"{'':32}" + "".join(f"{f'{load:.0%}':>26}" for load in loads))
        for unknown in sorted({k[4] for k in cells if k[:3] == group}):
            keys = [(*group, load, unknown) for load in loads]
            rules = dict.fromkeys(rule for key in keys for rule in cells.get(key, {}))
            for rule in rules:
                label = title_of(rule) + (", told wrong" if unknown else "")
                cols = []
                for load, key in zip(loads, keys, strict=True):
                    line = cells.get(key, {}).get(rule)
                    truth = cells.get((*group, load, False), {}).get("clairvoyant")
                    cols.append(_means(line, truth))
                out.append(f"{label:32}" + "".join(cols))
        for rule, label in (("ours", "ours"), ("clairvoyant", "CL")):
            for other in (["CL"] if rule == "ours" else []) + ["BP", "BP told GPUs' rates"]:
                ratios = [_ratios(cells.get((*group, load, False), {}), rule, other) for load in loads]
                if any(ratios):
                    out.append(f"{f'{label} / {other}':32}" + "".join(f"{ratio:>26}" for ratio in ratios))
        if full:
            out += _quantiles(cells, group, loads)
    return "\n".join([*out, "", *summary(lines)])


def _cut(line: Line) -> str:
    return f"{line['requests']:,} scored, {line['cut']:,} of all cut to fit the smallest memory"


def _means(line: Line | None, truth: Line | None) -> str:
    if line is None:
        return f"{'–':>26}"
    over = f"{line['j'] / truth['j']:6.2f}" if truth else f"{'':6}"
    return f"{line['first_mean']:11.3f}{line['whole_mean']:9.2f}{over}"


def _ratios(cell: Mapping[str, Line], rule: str, to: str) -> str:
    """First token, whole, J; nothing where one of the two was not run."""
    out = []
    for figure in ("first_mean", "whole_mean", "j"):
        if to == "CL":
            other = cell["clairvoyant"][figure] if "clairvoyant" in cell else None
        else:
            other = best_peer(cell, figure, listed=to == "BP")
        if other is None or rule not in cell:
            return ""
        out.append(f"{cell[rule][figure] / other:.3f}")
    return " ".join(out)


def _quantiles(
    cells: Mapping[Key, Mapping[str, Line]], group: tuple[str, str, str], loads: Sequence[float]
) -> list[str]:
    out = []
    figures = [f"{what}_{which}" for what in ("first", "whole") for which in ("mean", "p50", "p95", "p99")]
    for load in loads:
        out += ["", f"at {load:.0%}{'':27}" + "".join(f"{f.replace('_', ' '):>12}" for f in figures)]
        for rule, line in cells.get((*group, load, False), {}).items():
            out.append(f"{title_of(rule):32}" + "".join(f"{line[f]:12.3f}" for f in figures))
    return out


# -- targets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """ours' figure is to be at most `most` times that of CL or of BP, in these cells."""

    set: str
    trace: str
    fleets: tuple[str, ...]
    loads: tuple[float, ...]
    figure: str
    most: float
    of: str
    rule: str = "ours"


EQUAL, MIXED, ALL = ("equal",), ("mixed",), (0.6, 0.8, 0.9, 0.95)
TARGETS = (
    Target("main", "conv", EQUAL, (0.6, 0.8, 0.9), "first_mean", 1.02, "CL"),
    Target("main", "conv", EQUAL, (0.6, 0.8, 0.9), "whole_mean", 0.985, "BP"),
    Target("main", "conv", EQUAL, (0.95,), "j", 1.02, "CL"),
    Target("main", "conv", MIXED, (0.6, 0.8), "first_mean", 0.72, "BP"),
    Target("main", "conv", MIXED, (0.6, 0.8), "whole_mean", 0.95, "BP"),
    Target("main", "conv", MIXED, (0.9,), "j", 1.01, "CL"),
    Target("main", "conv", MIXED, (0.95,), "j", 1.03, "CL"),
    Target("main", "conv", MIXED, (0.95,), "whole_p99", 1.05, "CL"),
    Target("four", "conv", (*EQUAL, *MIXED), ALL, "first_mean", 1.2, "CL"),
    Target("unknown", "conv", (*EQUAL, *MIXED), ALL, "first_mean", 1.03, "known"),
    Target("unknown", "conv", (*EQUAL, *MIXED), ALL, "whole_mean", 1.03, "known"),
    Target("main", "mooncake", EQUAL, (0.8,), "whole_mean", 1.04, "CL"),
    Target("main", "mooncake", MIXED, (0.8,), "first_mean", 0.6, "BP"),
    Target("main", "mooncake", MIXED, (0.8,), "whole_mean", 0.9, "BP"),
    Target("overload", "conv", (*EQUAL, *MIXED), (OVERLOAD,), "first_mean", 1.4, "CL", "ours+hold"),
    Target("overload", "conv", (*EQUAL, *MIXED), (OVERLOAD,), "first_mean", 1.0, "BP", "ours+hold"),
    Target("overload", "conv", (*EQUAL, *MIXED), (OVERLOAD,), "whole_mean", 1.0, "BP", "ours+hold"),
)
NAMES = {"first_mean": "first token", "whole_mean": "whole", "whole_p99": "p99 of the whole", "j": "J"}


def judged(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Every target in every cell of it that was carried out: what it is and whether it is met."""
    cells = by_cell(lines)
    out = []
    for target in TARGETS:
        for fleet in target.fleets:
            for load in target.loads:
                key = (target.set, target.trace, fleet, load, target.of == "known")
                mine = cells.get(key, {}).get(target.rule)
                cell = cells.get((*key[:4], False), {})
                if target.of == "BP":
                    other = best_peer(cell, target.figure)
                else:
                    line = cell.get("clairvoyant" if target.of == "CL" else target.rule)
                    other = None if line is None else line[target.figure]
                if mine is None or other is None:
                    continue
                ratio = mine[target.figure] / other
                truth = cell.get("clairvoyant")
                out.append(
                    {
                        "target": f"{target.trace} {target.set} {fleet} {load:.0%}: {title_of(target.rule)}: "
                        f"{NAMES[target.figure]} over {target.of}",
                        "ratio": ratio,
                        # What the clairvoyant himself reaches of what ours is to reach.
                        "truth": truth[target.figure] / other if target.of == "BP" and truth else None,
                        "most": target.most,
                        "met": ratio <= target.most,
                    }
                )
    return out


def summary(lines: Sequence[Line]) -> list[str]:
    """The targets, one line each."""
    found = judged(lines)
    if not found:
        return []
    met = sum(one["met"] for one in found)
    return [
        f"targets: {met} of {len(found)} met",
        *(
            f"{'met   ' if one['met'] else 'MISSED'} {one['target']:72} {one['ratio']:.3f}"
            f" (at most {one['most']:g}{_reached(one['truth'])})"
            for one in found
        ),
    ]


def _reached(truth: float | None) -> str:
    return "" if truth is None else f"; CL {truth:.3f}"


# --- outside world ---------------------------------------------------------------------------------


def plots(lines: Sequence[Line], directory: Path) -> None:
    """First token and whole over load, a curve a rule; ours thick, the clairvoyant dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from simulation.plots import save

    directory.mkdir(parents=True, exist_ok=True)
    cells = by_cell(line for line in lines if not line["unknown"])
    for group in dict.fromkeys((s, t, f) for s, t, f, _, _ in cells):
        name, trace, fleet = group
        loads = sorted({k[3] for k in cells if k[:3] == group})
        rules = dict.fromkeys(rule for load in loads for rule in cells[(*group, load, False)])
        figure = Figure(figsize=(12, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2)
        for axes, what, label in zip(
            panels, ("first_mean", "whole_mean"), ("first token", "whole answer"), strict=True
        ):
            if len(loads) == 1:
                cell = cells[(*group, loads[0], False)]
                ordered = sorted(rules, key=lambda r: -cell[r][what])
                axes.barh(
                    [title_of(r) for r in ordered],
                    [cell[r][what] for r in ordered],
                    color=[_colour(r) for r in ordered],
                )
                axes.set_xlabel(f"mean of {label}, s")
                continue
            for rule in rules:
                points = [
                    (load, line[what])
                    for load in loads
                    if (line := cells[(*group, load, False)].get(rule)) is not None
                ]
                axes.plot(
                    [100 * load for load, _ in points],
                    [seconds for _, seconds in points],
                    label=title_of(rule),
                    **_style(rule),
                )
            axes.set_yscale("log")
            axes.set_xlabel("load, % of what the servers can serve")
            axes.set_ylabel(f"mean of {label}, s")
        if len(loads) > 1:
            panels[0].legend(fontsize="x-small", ncols=2)
        figure.suptitle(f"{trace}, {fleet} servers, {GROUPS[name]}")
        save(figure, directory / f"{name}-{trace}-{fleet}.png")


def _colour(rule: str) -> str:
    return "#9bb7d4" if is_peer(rule) else "#c0392b" if rule.startswith("clair") else "black"


def _style(rule: str) -> dict[str, Any]:
    if rule == "ours":
        return {"color": "black", "linewidth": 3.5, "marker": "o", "zorder": 9}
    if rule == "clairvoyant":
        return {"color": "#c0392b", "linewidth": 2.0, "linestyle": "--", "zorder": 10}
    return {"linewidth": 0.9, "marker": ".", "alpha": 0.9}


def _chosen(flag: str, text: str, known: Iterable[str]) -> list[str]:
    names = [part for part in text.split(",") if part]
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} {name!r}: known are {', '.join(known)}")
    return names


def main() -> None:
    """Carry out all runs and print the tables."""
    parser = Parser(prog="bench.dispatch", description=(__doc__ or "").split("\n")[0])
    usual = Path(__file__).parent.parent.parent / "shared" / "traces"
    for flag, default, text in (
        ("--only", ",".join(TRACES), "traces"),
        ("--fleets", "equal,mixed", f"of {', '.join(FLEETS)}"),
        ("--loads", "0.6,0.8,0.9,0.95", "shares of capacity"),
        ("--sets", ",".join(SETS), "parts of the comparison"),
        ("--rules", ",".join(USUAL), f"of these and {', '.join(set(RULES) - set(USUAL))}"),
        ("--arrivals", "usual", "poisson, log, sessions, or what is usual for the trace"),
    ):
        parser.add_argument(flag, default=default, help=f"{text} (default %(default)s)")
    parser.add_argument(
        "--traces", type=Path, default=usual, metavar="DIR", help="the logs (default %(default)s)"
    )
    parser.add_argument("--servers", type=int, default=8, metavar="N", help="(default %(default)d)")
    parser.add_argument(
        "--requests", type=int, default=20_000, metavar="N", help="of a log (default %(default)d)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first (default %(default)d)")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="runs, each with a seed (default %(default)d)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default %(default)d)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there (default: none)")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw a picture a group there (default: none)"
    )
    parser.add_argument(
        "--with",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="take what is not run now from such a --json file of the same settings (default: none)",
    )
    parser.add_argument("--full", action="store_true", help="print p50, p95 and p99 too")
    args = parser.parse_args()
    within("--workers", args.workers, 1, 64)
    within("--servers", args.servers, 1, 1024)
    within("--repeats", args.repeats, 1, 100)
    within("--requests", args.requests, 100, 1_000_000)
    try:
        loads = [float(load) for load in args.loads.split(",")]
    except ValueError:
        raise ConfigError(f"--loads {args.loads}: wanted numbers with commas") from None
    for load in loads:
        within("--loads", load, 0.01, 3.0)
    if args.arrivals not in ("usual", *COME):
        raise ConfigError(f"--arrivals {args.arrivals!r}: known are usual, {', '.join(COME)}")
    choice = Choice(
        _chosen("--only", args.only, TRACES),
        _chosen("--fleets", args.fleets, FLEETS),
        loads,
        _chosen("--sets", args.sets, SETS),
        _chosen("--rules", args.rules, RULES),
        Cell(
            "main",
            "conv",
            "equal",
            0.8,
            servers=args.servers,
            arrivals=args.arrivals,
            requests=args.requests,
            seed=args.seed,
            repeats=args.repeats,
            directory=args.traces,
        ),
    )
    known = [] if args.earlier is None else read(args.earlier, choice)
    todo = runs_of(choice)
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.workers) as pool:
        for line in pool.map(carry_out, *zip(*todo, strict=True)):
            found.append(line)
            if len(found) % 50 == 0 or len(found) == len(todo):
                print(f"{len(found)}/{len(todo)}: {sum(x['seconds'] for x in found):.0f} s", flush=True)
                if args.json is not None:
                    write(args.json, merged(found, known))
    found = merged(found, known)
    print(tables(found, full=args.full))
    if args.json is not None:
        write(args.json, found)
    if args.plots is not None:
        plots(found, args.plots)


def merged(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run the newest, in the order of the comparison."""
    runs = {(key_of(line), line["rule"]): line for line in [*before, *now]}
    order = {rule: n for n, rule in enumerate(RULES)}

    def place(line: Line) -> tuple[int, int, str, float, bool, int, str]:
        group = SETS.index(line["set"]), list(TRACES).index(line["trace"]), line["fleet"]
        return *group, line["load"], line["unknown"], order[line["rule"].partition("+")[0]], line["rule"]

    return sorted(runs.values(), key=place)


def read(path: Path, choice: Choice) -> list[dict[str, Any]]:
    """What was written, if it is of the same settings; raises ConfigError."""
    try:
        lines: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise ConfigError(f"--with {path}: {wrong!r:.100}") from None
    cell = choice.usual
    asked = [cell.arrivals, cell.requests, cell.seed, cell.repeats]
    for line in lines:
        if line["asked"] != asked or line["servers"] != cell.servers:
            raise ConfigError(f"--with {path}: was run with {line['asked']} on {line['servers']} servers")
    return lines


def write(path: Path, lines: Sequence[Line]) -> None:
    """All figures and the targets, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": list(lines), "targets": judged(lines)}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
