"""What it costs to stand between a client and its engines: ours against routers that proxy.

    python -m bench.routers [--json FILE] [--plot FILE] [--rounds N] [--quick] [--ways NAME;…] [--venv DIR]

Two engines (backend.py: stand-ins that stream 256 tokens at a fixed pace), one load (load.py), and between
them, in turn:

    direct                  nothing: the baseline
    vllm-router, sglang-router, litellm   from PyPI, with their default policy, and round_robin where they
                            have it; plain http, kept-alive connections, logs quiet
    ours, leases ahead      real loadbalancer, real auth_servers, real single-use token check in the engine;
                            a new connection to the engine for each request; leases fetched before
    ours, /route each time  the same, with POST /route before each request and inside its clock
    …, TLS                  the first, under TLS from client to engine, as on rented machines

    first token   from before the first byte is sent to the first token here, at 1, 32 and 256 streams
    processor     utime + stime from the first request to the end of the last, per 256 tokens that came. Of a
                  router: all its processes. Of ours: loadbalancer, both auth_servers, and what the engines
                  take more than for direct (token check, new connections, TLS)
    requests/s    32 at once, one token, not streamed, engine answers at once; the router has one core

Ways alternate within each round. A level's figures are medians of the rounds.
"""

import asyncio
import contextlib
import random
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import uvloop

from bench import children
from bench.command import add_counts, bench_parser, machine, write_json
from bench.routers import figures, processes
from bench.routers.backend import EVENT, LAST_EVENT
from bench.routers.figures import AHEAD, AHEAD_TLS, ASKED, DIRECT, WayRound
from bench.routers.load import (
    TOKENS,
    Failed,
    Kept,
    Leased,
    LoadClient,
    LoadResult,
    completion,
    flat_out,
    gives_batches,
    paced,
)
from bench.routers.processes import ROUTERS, StandInEngine
from fleet_client.flags import run_main, within
from fleet_client.listening import allow_many_files
from fleet_client.tls_pins import pinned_context
from process.errors import ConfigError
from process.progress import Progress
from remote import boot as boots
from remote.token_check import App, Message, Receive, Scope, Send, TokenCheck
from remote.tokens import Issuer

LEASES_AHEAD = 64
"""That a client of ours keeps: what one call of POST /route brings at most, where it gives batches."""

USUAL_ACKS = "sglang-router, usual ACKs"
"""Its default once more, with a client that leaves ACKs to the kernel (load.py says why that is a way)."""

LIMIT_S = 30.0
"""Of one round of one way: what has not ended by then is cut off. Only a saturated router needs it."""

RATE_STREAMS, RATE_WARM_S, RATE_S = 32, 0.5, 3.0
"""The closed loop for requests/s, and its seconds."""


IDLE_S = 5.0
"""Seconds in which nothing is asked, to see what the routers take all the same."""


@dataclass(frozen=True)
class Level:
    """So many streams, each at that pace (tokens/s), each of so many requests; the first is to warm up."""

    streams: int
    pace: float
    requests: int


LEVELS = (Level(1, 500.0, 13), Level(32, 500.0, 10), Level(256, 62.5, 2))
"""32 and 256 streams have 16,000 tokens/s together, so that no level is the saturation of two cores."""


@dataclass(frozen=True)
class Way:
    """One way to the engines. pids: on the router's core; beside: what counts as router elsewhere."""

    name: str
    client: Callable[[], LoadClient]
    pids: tuple[int, ...] = ()
    beside: tuple[int, ...] = ()


class Meter:
    """Processor seconds since its making: of router, of what is beside it, of engines, of this process."""

    def __init__(self, way: Way, engines: Sequence[StandInEngine]) -> None:
        """Begin now."""
        self._groups = (way.pids, way.beside, tuple(e.pids[0] for e in engines))
        self._begun = self._read()

    def _read(self) -> list[float]:
        groups = [children.tree_cpu_s(pids) if pids else 0.0 for pids in self._groups]
        return [time.perf_counter(), *groups, time.process_time()]

    def cell(self, heard: LoadResult, requests: float, first_s: Sequence[float] = ()) -> WayRound:
        """Return what came since then. requests: that the work was worth."""
        seconds, router, beside, engines, client = (
            now - before for now, before in zip(self._read(), self._begun, strict=True)
        )
        each = 1e3 / requests if requests else 0.0  # none ended: the rate says so
        return WayRound(
            ended=heard.ended,
            cut=heard.cut,
            failed=heard.failed,
            why=heard.why,
            seconds=seconds,
            p50_ms=figures.percentile_ms(first_s, 50.0),
            p99_ms=figures.percentile_ms(first_s, 99.0),
            router_ms=router * each,
            beside_ms=beside * each,
            engine_ms=engines * each,
            client_ms=client * each,
            core=router / seconds,
        )


async def at_level(way: Way, level: Level, engines: Sequence[StandInEngine]) -> WayRound:
    """Measure one round of streams."""
    client = way.client()
    meter = Meter(way, engines)
    heard = await paced(client, level.streams, level.pace, level.requests, LIMIT_S)
    # A way that did not get beyond the first requests in time is judged by those.
    cell = meter.cell(heard, heard.tokens / TOKENS, heard.first_s or heard.beginning_s)
    await client.close()
    return cell


async def at_full_rate(way: Way, seconds: float, engines: Sequence[StandInEngine]) -> WayRound:
    """Measure one round of requests of one token, as fast as they go."""
    client, heard, over = way.client(), LoadResult(), asyncio.Event()
    with contextlib.suppress(Failed, TimeoutError):  # one that was saturated may still be at what was cut off
        async with asyncio.timeout(LIMIT_S):
            await client.send(0, completion(0, 1, 0.0, stream=False))
    load = asyncio.create_task(flat_out(client, RATE_STREAMS, heard, over))
    await asyncio.sleep(RATE_WARM_S)
    meter = Meter(way, engines)
    before = heard.ended
    await asyncio.sleep(seconds)
    ended = heard.ended - before
    cell = meter.cell(replace(heard, ended=ended), ended)
    over.set()
    await load
    await client.close()
    return cell


async def idle_shares(ways: Sequence[Way], seconds: float) -> dict[str, float]:
    """Return shares of a core that each way's own processes take while nothing is asked."""

    def used() -> list[float]:
        return [children.tree_cpu_s(way.pids + way.beside) if way.pids else 0.0 for way in ways]

    begun, before = time.perf_counter(), used()
    await asyncio.sleep(seconds)
    after, took_s = used(), time.perf_counter() - begun
    return {way.name: (b - a) / took_s for way, a, b in zip(ways, before, after, strict=True)}


# -- the token check alone -----------------------------------------------------------------------------


def check_alone_ms(requests: int = 40, rounds: int = 5) -> float:
    """Return processor ms of the token check in a request of 256 events, with nothing around it.

    The same app with and without the check, in a loop, nothing sent anywhere, the least of the rounds: a
    figure without the noise of two engines' processor times, to compare their difference with.
    """
    headers = [(b"content-type", b"text/event-stream")]

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _n in range(TOKENS - 1):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": LAST_EVENT, "more_body": False})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Message) -> None:
        pass

    async def each_ms(answer: App, tokens: Sequence[str]) -> float:
        begun = time.process_time()
        for token in tokens:
            key = [(b"authorization", b"Bearer " + token.encode())]
            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": key}
            await answer(scope, receive, send)
        return (time.process_time() - begun) * 1e3 / len(tokens)

    async def compared() -> float:
        checked, bare = [], []
        for _ in range(rounds):
            tokens = issuer.issue(requests, time.monotonic())
            checked.append(await each_ms(TokenCheck(app, boot), tokens))
            bare.append(await each_ms(app, tokens))
        return min(checked) - min(bare)

    with tempfile.TemporaryDirectory() as home:
        boot = boots.begin(home)
        issuer = Issuer(boot, time.monotonic())
        return asyncio.run(compared())


# -- the whole -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutersConfig:
    """What is measured. venv: the routers'; ways: None for all."""

    venv: Path
    rounds: int
    levels: tuple[Level, ...]
    rate_s: float
    ways: frozenset[str] | None = None

    def wants(self, name: str) -> bool:
        """Return whether that way is measured; direct always is."""
        return self.ways is None or name in self.ways or name == DIRECT


def ours(engines: Sequence[StandInEngine], loadbalancer_pid: int, port: int, *, batches: bool) -> list[Way]:
    """Return ours, in its three forms. port: the loadbalancer's; batches: whether it gives them."""

    def way(name: str, ahead: int, kind: str, context: ssl.SSLContext | None) -> Way:
        ports = {e.number: e.ports[kind] for e in engines}
        auth = tuple(e.pids[1] for e in engines)
        return Way(
            name, partial(Leased, port, ports, context, ahead, batches=batches), (loadbalancer_pid,), auth
        )

    # Both engines have keys of their own; a client has a context for each, and here the one that fits both.
    both = pinned_context(engines[0].certificate)
    for e in engines[1:]:
        both.load_verify_locations(cadata=e.certificate)
    return [
        way(AHEAD, LEASES_AHEAD, "checked", None),
        way(ASKED, 0, "checked", None),
        way(AHEAD_TLS, LEASES_AHEAD, "tls", both),
    ]


@dataclass(frozen=True)
class Found:
    """Cells by way, for each level and for requests/s.

    idle: shares of a core with nothing to do. batches: whether leases ahead came in batches.
    """

    by_level: list[dict[str, list[WayRound]]]
    rates: dict[str, list[WayRound]]
    idle: dict[str, float]
    batches: bool


async def measure(config: RoutersConfig, directory: Path) -> Found:
    """Run everything, measure it and end it; SIGTERM cancels it, and then all has ended, too."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is not None:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(processes.engine(n, directory / f"engine-{n}")) for n in range(2)]
        plain = [e.ports["plain"] for e in engines]
        ways = [Way(DIRECT, partial(Kept, plain))]
        wanted = [router for router in ROUTERS if config.wants(router.name)]
        started = [stack.enter_context(processes.running(r, config.venv, plain, directory)) for r in wanted]
        autoscaler = await loop.create_server(lambda: processes.HotSetStub(engines), "127.0.0.1", 0)
        hot_port = autoscaler.sockets[0].getsockname()[1]
        balancer, port = stack.enter_context(processes.our_loadbalancer(directory, hot_port))
        stocked = partial(processes.stocked, port, len(engines))
        await asyncio.to_thread(children.wait_for, "our loadbalancer", balancer, stocked)
        for router, (it, router_port) in zip(wanted, started, strict=True):
            answers = partial(processes.answers, router_port)
            await asyncio.to_thread(children.wait_for, router.name, it, answers)
            ways.append(Way(router.name, partial(Kept, [router_port]), (it.pid,)))
            if router.name == "sglang-router" and config.wants(USUAL_ACKS):
                ways.append(Way(USUAL_ACKS, partial(Kept, [router_port], quick_ack=False), (it.pid,)))
        batches = await gives_batches(port)
        ways += [way for way in ours(engines, balancer.pid, port, batches=batches) if config.wants(way.name)]
        with children.on_core(-1):
            idle = await idle_shares(ways, IDLE_S)
            by_level, rates = await _rounds(config, ways, engines)
        autoscaler.close()
        return Found(by_level, rates, idle, batches)


async def _rounds(
    config: RoutersConfig, ways: Sequence[Way], engines: Sequence[StandInEngine]
) -> tuple[list[dict[str, list[WayRound]]], dict[str, list[WayRound]]]:
    by_level: list[dict[str, list[WayRound]]] = [{way.name: [] for way in ways} for _ in config.levels]
    rates: dict[str, list[WayRound]] = {way.name: [] for way in ways}
    for n in Progress().over(range(config.rounds), lambda n: f"round {n + 1}"):
        order = list(ways)
        random.Random(n).shuffle(order)
        for level, cells in zip(config.levels, by_level, strict=True):
            for way in order:
                cell = await at_level(way, level, engines)
                cells[way.name].append(cell)
                _say(f"round {n + 1} of {config.rounds}, {level.streams} streams", way, cell)
        for way in order:
            cell = await at_full_rate(way, config.rate_s, engines)
            rates[way.name].append(cell)
            _say(f"round {n + 1} of {config.rounds}, {cell.rate:.0f} requests/s", way, cell)
    return by_level, rates


def _say(what: str, way: Way, cell: WayRound) -> None:
    failed = f"  {cell.failed} failed: {cell.why[:100]}" if cell.failed else ""
    print(
        f"{what}  {way.name}: {cell.seconds:.1f} s, p50 {cell.p50_ms:.2f} ms, p99 {cell.p99_ms:.2f} ms, "
        f"router {cell.router_ms:.2f} ms{failed}",
        file=sys.stderr,
        flush=True,
    )


def _parsed(argv: Sequence[str] | None) -> tuple[RoutersConfig, Path | None, Path | None]:
    parser = bench_parser("routers", __doc__)
    add_counts(parser, ("--rounds", 3, "of everything"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there (default: none)")
    parser.add_argument("--quick", action="store_true", help="few requests: a look, and no measurement")
    parser.add_argument("--ways", metavar="NAME;…", help="only these, and direct")
    parser.add_argument("--venv", type=Path, default=processes.VENV, metavar="DIR", help="the routers' own")
    args = parser.parse_args(argv)
    within("--rounds", args.rounds, 1, 100)
    known = {r.name for r in ROUTERS} | {AHEAD, ASKED, AHEAD_TLS, USUAL_ACKS, DIRECT}
    ways = None if args.ways is None else frozenset(one.strip() for one in args.ways.split(";"))
    if ways is not None and not ways <= known:
        raise ConfigError(f"--ways: {', '.join(sorted(ways - known))} is none of {'; '.join(sorted(known))}")
    levels, rate_s = LEVELS, RATE_S
    if args.quick:
        levels, rate_s = (Level(1, 500.0, 4), Level(32, 500.0, 3), Level(256, 62.5, 2)), 1.5
    return RoutersConfig(args.venv, args.rounds, levels, rate_s, ways), args.json, args.plot


def show(config: RoutersConfig, versions: Mapping[str, str], found: Found, alone_ms: float) -> None:
    """Print the tables."""
    print(", ".join(f"{package} {version}" for package, version in versions.items()))
    for level, cells in zip(config.levels, found.by_level, strict=True):
        rows = figures.summaries(cells)
        print(f"\n{level.streams} streams of {level.pace:g} tokens/s, {TOKENS} tokens a request")
        print(figures.table(rows))
        print("\n".join(figures.verdicts(rows)))
    print(f"\n{RATE_STREAMS} at once, one token, engine answers at once; router on one core")
    print(figures.rate_table(figures.summaries(found.rates)))
    idle = ", ".join(f"{way} {100 * share:.1f}%" for way, share in found.idle.items() if share)
    print(
        f"\nOf a core with nothing to do: {idle or 'nothing'}.\n"
        f"The token check alone, {TOKENS} events: {alone_ms:.2f} processor ms a request.\n"
        f"Leases ahead come {'in batches' if found.batches else 'one a call'}, {LEASES_AHEAD} are kept.\n"
        "router: of ours all three parts. engine, client: what they take more than for direct. of rounds:\n"
        f"the least and the most. p99 of 1 stream is its worst. cut: not ended within {LIMIT_S:g} s.\n"
        "router core: below 100% something else was the limit; a core: requests/s if it had a whole one."
    )


def as_json(
    config: RoutersConfig, versions: Mapping[str, str], found: Found, alone_ms: float
) -> dict[str, object]:
    """Return all figures, and all that they were made of."""

    def told(cells: Mapping[str, Sequence[WayRound]]) -> dict[str, object]:
        rows = figures.summaries(cells)
        return {
            "rows": [asdict(row) for row in rows],
            "verdicts": figures.verdicts(rows),
            "cells": {way: [asdict(c) for c in all_rounds] for way, all_rounds in cells.items()},
        }

    return {
        "machine": machine(),  # of the load ours is about 2; what is above it was in the way
        "versions": versions,
        "rounds": config.rounds,
        "leases_ahead": LEASES_AHEAD,
        "leases_in_batches": found.batches,
        "idle_core": {way: round(share, 5) for way, share in found.idle.items()},
        "token_check_alone_ms": round(alone_ms, 4),
        "levels": [
            asdict(level) | told(cells) for level, cells in zip(config.levels, found.by_level, strict=True)
        ],
        "requests_s": {"streams": RATE_STREAMS} | told(found.rates) | {"verdicts": []},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write JSON and picture."""
    config, json_file, plot_file = _parsed(argv)
    versions = processes.versions(config.venv)
    allow_many_files()
    alone_ms = check_alone_ms()
    with tempfile.TemporaryDirectory(prefix="bench-routers-") as name:
        try:
            found = uvloop.run(measure(config, Path(name)))
        except asyncio.CancelledError:
            raise SystemExit(128 + signal.SIGTERM) from None
    show(config, versions, found, alone_ms)
    if plot_file is not None:
        levels = {
            f"{level.streams} streams": figures.summaries(cells)
            for level, cells in zip(config.levels, found.by_level, strict=True)
        }
        figures.plot(levels, figures.summaries(found.rates), plot_file)
    write_json(json_file, as_json(config, versions, found, alone_ms))


if __name__ == "__main__":
    run_main(main)
