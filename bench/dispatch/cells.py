"""One setting of the comparison, and one rule in it: servers, requests and arrivals."""

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from bench.dispatch.rules.ours import Ours
from bench.dispatch.rules.registry import RULES
from bench.dispatch.rules.rule import BLOCK_TOKENS, DispatchRequest, ServerFleet
from bench.dispatch.rules.world import Dispatcher, DispatchWorld, RuleRouter
from engine.reference import EventKind, SteppedModelServer
from engine.step_time_constants import TIMINGS, Timing
from simulation.traces import logs
from simulation.traces.reading import TICK_S, read
from simulation.traces.request import Request

TRACES: Mapping[str, str] = {
    "conv": "azure2023_conv.csv",
    "code": "azure2023_code.csv",
    "mooncake": "mooncake_conversation.csv",
}

# docs/reference/timing.md 3a, the fp16 rows; e and limits as in PREFILL_OPTIMISM and LARGE_STEPS of
# engine/step_time_constants.py.
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
"""Arrivals by default. The study's lengths were stationary; code is there for its bursts; the sessions of
mooncake have the pauses of the log, or what is cached would be gone too late or too soon."""

UNKNOWN = 0.3
"""Share by which constants are told wrong at most, each by itself."""

LANE_S = 300.0
"""late_bound_s of loadbalancer_server.py, in seconds, where late requests have a lane of their own."""

SETTINGS = ("load", "balancers", "servers")
"""Figures of a line that say which run it is."""

WARM_UP = 0.1
"""First share of the requests that is not scored."""

SATURATED = 1500
"""Requests that saturate a server to find what it serves; the first third fills it."""


@dataclass(frozen=True)
class DispatchCell:
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


# -- what a cell is played with --------------------------------------------------------------------------


@cache
def lengths(path: Path, most: int) -> tuple[Request, ...]:
    """Return the first so many of a log."""
    return tuple(islice(read(path), most))


def cut(prompt: int, output: int, longest: int) -> tuple[int, int]:
    """Return (prompt, output) cut to fit the smallest memory."""
    output = min(output, longest // 2)
    return min(prompt, longest - output), output


@cache
def saturated(path: Path, most: int, timing: Timing, longest: int) -> tuple[float, float]:
    """Return (requests, tokens made) a second by a server where some always wait, with these lengths."""
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


def timings_of(cell: DispatchCell) -> list[Timing]:
    """Return the timings of its servers."""
    kinds = FLEETS[cell.fleet]
    return [kinds[n % len(kinds)] for n in range(cell.servers)]


def fleet_of(cell: DispatchCell) -> ServerFleet:
    """Return its servers, and what they can do with the trace's lengths."""
    timings = timings_of(cell)
    path = cell.directory / TRACES[cell.trace]
    longest = min(t.kv_tokens for t in timings)
    rates = [saturated(path, cell.requests, t, longest) for t in timings]
    log = lengths(path, cell.requests)
    both = [cut(r.prompt_tokens, r.output_tokens, longest) for r in log]
    return ServerFleet(
        timings,
        [requests_s for requests_s, _ in rates],
        [tokens_s for _, tokens_s in rates],
        sum(p for p, _ in both) / len(both),
        sum(o for _, o in both) / len(both),
        cell.load * sum(requests_s for requests_s, _ in rates),
    )


def requests_of(cell: DispatchCell, fleet: ServerFleet) -> tuple[list[DispatchRequest], int]:
    """Return (what comes, how many were cut). Arrivals are as ARRIVALS says of the trace, or the cell."""
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
        # Users who say max_tokens know within a factor of two (rules/vast.py).
        out.append(DispatchRequest(number, at, prompt, output, blocks, 1 << (output - 1).bit_length()))
    return out, shortened


Come = tuple[float, int, int, int]
"""When, prompt, output, session."""


def _poisson(log: Sequence[Request], rate: float, rng: random.Random) -> Iterable[Come]:
    """Yield independent arrivals, the log's lengths in another order: nothing changes with time."""
    at = 0.0
    for r in rng.sample(log, len(log)):
        at += rng.expovariate(rate)
        yield at, r.prompt_tokens, r.output_tokens, -1


def _stretched(log: Sequence[Request], rate: float, rng: random.Random) -> Iterable[Come]:
    """Yield the log, its times stretched or shrunk: its bursts are as high and as many."""
    stretch = (len(log) - 1) / max(log[-1].at_s, 1e-9) / rate
    for r in logs.spread_ticks(log, TICK_S if len({*log}) < len(log) else 0.0, rng):
        yield r.at_s * stretch, r.prompt_tokens, r.output_tokens, r.session


def _sessions(log: Sequence[Request], rate: float, rng: random.Random) -> Iterable[Come]:
    """Return the log's sessions, as many of them as give the rate, with the pauses they have in reality.

    The log is played again, with others of its sessions, until as many have come as there are in it.
    """
    span_s = log[-1].at_s + TICK_S
    share = rate * span_s / len(log)
    come: list[Come] = []
    tile = 0
    while len(come) < 0.9 * len(log):
        copies: dict[int, int] = {}
        for r in log:
            if r.session not in copies:
                copies[r.session] = int(share) + (rng.random() < share % 1.0)
            for copy in range(copies[r.session]):
                at = tile * span_s + r.at_s + rng.uniform(0.0, TICK_S)
                come.append((at, r.prompt_tokens, r.output_tokens, (tile * 64 + copy) << 40 | r.session))
        tile += 1
    come.sort()
    return come


COME: Mapping[str, Callable[[Sequence[Request], float, random.Random], Iterable[Come]]] = {
    "poisson": _poisson,
    "log": _stretched,
    "sessions": _sessions,
}


def told_wrong(timing: Timing, rng: random.Random) -> Timing:
    """Return the timing with each constant off by up to UNKNOWN."""
    off = {name: getattr(timing, name) * rng.uniform(1.0 - UNKNOWN, 1.0 + UNKNOWN) for name in "abcdef"}
    return replace(timing, **off)


def carry_out(cell: DispatchCell, name: str) -> dict[str, Any]:
    """Run one rule in one cell: the mean of every figure over as many runs as are wanted, seed by seed."""
    runs = [_carry_out(replace(cell, seed=cell.seed + n), name) for n in range(cell.repeats)]
    out = runs[0]
    for figure, value in out.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and figure not in SETTINGS:
            mean = sum(run[figure] for run in runs) / len(runs)
            out[figure] = round(mean) if isinstance(value, int) else mean
    return out


def _carry_out(cell: DispatchCell, name: str) -> dict[str, Any]:
    begun = time.process_time()
    plain, _, how = name.partition("+")
    entry = RULES[plain]
    fleet = fleet_of(cell)
    requests, shortened = requests_of(cell, fleet)
    world = DispatchWorld(fleet, requests, random.Random(cell.seed * 31 + 2), fresh=cell.fresh)
    wrong = random.Random(cell.seed * 17 + 3)
    told = [told_wrong(t, wrong) for t in fleet.timings] if cell.unknown else None
    for number in range(cell.balancers):
        rng = random.Random(cell.seed * 1009 + number)
        router: Dispatcher
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
