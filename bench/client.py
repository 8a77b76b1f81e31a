"""What the way to the engine costs a client: its hashes, token check, fleet_client, gateway.

python -m bench.client [--json FILE]

hashes    microseconds of processor for a request: to read its JSON and size it, to hash its prefixes, and
          (with leases ahead) to look up and note which instance has read them
ahead     conversations and single prompts against a made-up fleet, with 8 leases ahead: what a request waits
          for POST /route and for its prompt to be read, by the lease it takes: the oldest here, the nearest
          here, what the client does, or always one that is asked for
check     a paced engine with 100,000 tokens outstanding, 500 requests/s, each with a token of its own: time
          in the token check, by a watch inside the server
first     a whole fleet on this machine (local cloud, real loadbalancer, TLS): time to the first token of the
          same request sent directly to the instance with a token got before, through `fleet_client` with
          and without leases fetched ahead, and through the gateway; one after the other, again and again,
          so that all meet the same noise
streams   200 concurrent streams of 50 events/s through the gateway from a server that writes into each
          event when it was sent: how late it arrives, and what the gateway takes of a core
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import numpy as np
from aiohttp import web

from fleet_client import AsyncFleetTransport, FleetTransport
from fleet_client.leases import ClientLease
from fleet_client.leases_ahead import READ_S, LeasesAhead
from fleet_client.prefix_hashes import BLOCK_TOKENS, Hasher, Served
from fleet_client.tls_pins import pinned_context
from fleet_client.token_estimate import TokenEstimate, estimate_body, read_body
from process.children import dying_with_parent
from remote import boot as boots
from remote.tokens import CAP, Issuer
from simulation.live.local_stack import LocalStack, StackConfig

ROOT = Path(__file__).parent.parent
UP_S = 30.0
EVENT_S = 0.02
"""Between two events of a stream: 50 a second."""

BODY = {"model": "vllm-13", "prompt": "Hello there", "max_tokens": 2, "stream": True}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and worst, in milliseconds."""
    ms = np.asarray(seconds) * 1e3
    return {
        "count": len(ms),
        "p50_ms": round(float(np.median(ms)), 3),
        "p99_ms": round(float(np.percentile(ms, 99)), 3),
        "max_ms": round(float(ms.max()), 3),
    }


def cpu_s(pid: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environ: dict[str, str], ready: str) -> Iterator["Child"]:
    """A child whose log matches `ready`; ended with SIGTERM afterwards."""
    with log.open("wb") as out:
        process = subprocess.Popen(dying_with_parent(tuple(command)), env=environ, stdout=out, stderr=out)
    try:
        limit = time.monotonic() + UP_S
        while (found := re.search(ready, log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{command[1:4]} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield Child(process.pid, found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=15)


class Child:
    """A process, and what its log said it is reached by."""

    def __init__(self, pid: int, said: str) -> None:
        """said: the first group of the pattern."""
        self.pid = pid
        self.said = said


# -- salted hashes --------------------------------------------------------------------------------------


def measure_hashes(rounds: int) -> dict[str, dict[str, float]]:
    """Medians, by the shape of the request."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]

    def text(size: int) -> str:
        return " ".join(rng.choices(words, k=size // 6))[:size]

    def chat(messages: int, size: int) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": text(size)} for n in range(messages)]}

    shapes: dict[str, dict[str, Any]] = {
        "a question of 200 bytes": chat(1, 200),
        "one message of 4 kB": chat(1, 4096),
        "20 messages, 16 kB": chat(20, 820),
        "200 messages, 160 kB": chat(200, 820),
        "one message of 256 kB": chat(1, 2**18),
        "one message of 4 MB": chat(1, 2**22),
        "8,192 token ids": {"prompt": [rng.randrange(100_000) for _ in range(8192)]},
    }
    return {name: _hash_cost(json.dumps(body).encode(), rounds) for name, body in shapes.items()}


def _hash_cost(raw: bytes, rounds: int) -> dict[str, float]:
    hasher, served, target = Hasher(b"bench " * 4), Served(), "/v1/chat/completions"
    times: dict[str, list[float]] = {"read_us": [], "hash_us": [], "note_us": []}
    made: tuple[str, ...] = ()
    for _ in range(rounds):
        begun = time.perf_counter()
        said = read_body("POST", raw)
        size = estimate_body("POST", target, raw, said)
        read = time.perf_counter()
        made = hasher.hashes(target, said, size)
        hashed = time.perf_counter()
        served.blocks(made)
        served.note(made, 1)
        noted = time.perf_counter()
        for name, took_s in zip(times, (read - begun, hashed - read, noted - hashed), strict=True):
            times[name].append(took_s)
    medians = {name: round(statistics.median(some) * 1e6, 1) for name, some in times.items()}
    hashed_kb = len(made) * 1.024
    return {"kB": round(len(raw) / 1e3, 1), "blocks": len(made), **medians} | (
        {"hash_us_per_kB": round(medians["hash_us"] / hashed_kb, 2)} if made else {}
    )


# -- which lease -----------------------------------------------------------------------------------------

WAYS = ("oldest", "nearest", "client", "asked")


def measure_ahead(instances: int, route_s: float, turns: float, requests: int = 4000) -> dict[str, float]:
    """Milliseconds a request, by the way of taking leases; no queues, and instances keep what they have read.

    turns: of a conversation, on average. Its prompt has 4 blocks, and 2 more each turn; 20 requests/s.
    """
    return {way: round(_mean_wait_s(way, instances, route_s, turns, requests) * 1e3, 1) for way in WAYS}


def _mean_wait_s(way: str, instances: int, route_s: float, turns: float, requests: int) -> float:
    rng = random.Random(1)
    ahead, served = LeasesAhead(8), Served()
    ahead.answered(route_s)
    told: dict[str, int] = {}  # what the loadbalancer knows
    has_read: list[set[str]] = [set() for _ in range(instances)]
    live: list[list[str]] = []
    now, waited_s, size = 0.0, 0.0, TokenEstimate(1500, 100)
    for n in range(requests):
        now += rng.expovariate(20.0)
        follows = bool(live) and rng.random() > 1.0 / turns
        prompt = live.pop(rng.randrange(len(live))) if follows else []
        prompt = prompt + [f"{n}-{block}" for block in range(2 if prompt else 4)]
        live = [*live, prompt][-40:]
        near = {} if way == "oldest" else served.blocks(prompt)
        ask = way == "asked" or (way == "client" and ahead.better_asked(len(prompt), near, (), now))
        lease = None if ask else ahead.take(size, now, (), near)
        if lease is None:
            waited_s += route_s
            where = next((told[one] for one in reversed(prompt) if one in told), rng.randrange(instances))
            told |= dict.fromkeys(prompt, where)
        else:
            where = lease.instance_id
        ahead.sweep(now)
        while way != "asked" and (wanted := ahead.want(now)):
            places = [rng.randrange(instances) for _ in range(wanted)]
            ahead.arrived(
                [ClientLease("", "", one, now, now + 600.0, "", None) for one in places], wanted, now
            )
        waited_s += READ_S * BLOCK_TOKENS * sum(one not in has_read[where] for one in prompt)
        has_read[where].update(prompt)
        served.note(prompt, where)
    return waited_s / requests


# -- the token check ------------------------------------------------------------------------------------


def measure_check(directory: Path, rate: float, seconds: float, outstanding: int) -> dict[str, float]:
    """500 requests/s, one token each, of so many that are outstanding."""
    fleet = directory / "fleet"
    fleet.mkdir()
    boots.begin(str(fleet))
    issuer = Issuer(str(fleet / "boot"), time.monotonic())
    tokens: list[str] = []
    while len(tokens) < outstanding:
        tokens += issuer.issue(min(2000, outstanding - len(tokens)), time.monotonic())
    machine = directory / "machine.json"
    machine.write_text('{"gpu_name": "H100 SXM", "num_gpus": 1, "load_s": 0, "start_s": 0, "loaded": null}')
    times = directory / "times.json"
    environ = {
        **os.environ,
        "HOME": str(directory),
        "PYTHONPATH": f"{ROOT / 'localcloud' / 'image'}{os.pathsep}{ROOT}",
        "LOCALCLOUD_MACHINE": str(machine),
        "BENCH_TIMES": str(times),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    command += ["--served-model-name", "vllm-13", "--host", "127.0.0.1", "--port", "0"]
    command += ["--middleware", "bench.timed_check.TimedCheck"]
    ready = r"Uvicorn running on (http://127\.0\.0\.1:\d+)"
    with running(command, directory / "model.log", environ, ready) as server:
        random.Random(1).shuffle(tokens)
        statuses = asyncio.run(_at_rate(server.said, tokens[: round(rate * seconds)], rate))
    if set(statuses) != {200}:
        raise RuntimeError(f"wanted 200 from the paced engine, got {set(statuses)}")
    return milliseconds(json.loads(times.read_text()))


async def _at_rate(url: str, tokens: Sequence[str], rate: float) -> list[int]:
    body = {"model": "vllm-13", "prompt": [7] * 20, "max_tokens": 1}

    async def one(token: str) -> int:
        async with session.post(
            f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {token}"}
        ) as reply:
            await reply.read()
            return reply.status

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    async with aiohttp.ClientSession(connector=connector) as session:
        begun, tasks = time.monotonic(), []
        for n, token in enumerate(tokens):
            await asyncio.sleep(max(0.0, begun + n / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(token)))
        return list(await asyncio.gather(*tasks))


# -- time to the first token ----------------------------------------------------------------------------


class Direct:
    """Sends to the instance itself, with a lease that it has before its clock starts."""

    def __init__(self, loadbalancer: str) -> None:
        """Nothing is opened yet."""
        self._loadbalancer = loadbalancer
        self._lease: dict[str, Any] = {}
        self._clients: dict[str, httpx2.Client] = {}
        self._async: dict[str, httpx2.AsyncClient] = {}

    def take_lease(self) -> None:
        """Before the clock starts."""
        size = {"prompt_tokens": 3, "max_tokens": 2, "wait_s": 10}
        self._lease = httpx2.post(f"{self._loadbalancer}/route", json=size, trust_env=False).json()

    def give_back(self) -> None:
        """It is not needed: one that nobody uses keeps room from the others."""
        end = {"request_id": self._lease["request_id"], "outcome": "unused"}
        httpx2.post(f"{self._loadbalancer}/done", json=end, trust_env=False)

    @property
    def request(self) -> tuple[str, dict[str, str]]:
        """(URL, headers)."""
        lease = self._lease
        return f"{lease['address']}/v1/completions", {"Authorization": f"Bearer {lease['token']}"}

    @property
    def client(self) -> httpx2.Client:
        """With a connection that is kept."""
        pem = self._lease["certificate"]
        if pem not in self._clients:
            self._clients[pem] = httpx2.Client(verify=pinned_context(pem), trust_env=False)
        return self._clients[pem]

    @property
    def async_client(self) -> httpx2.AsyncClient:
        """The same for an event loop."""
        pem = self._lease["certificate"]
        if pem not in self._async:
            self._async[pem] = httpx2.AsyncClient(verify=pinned_context(pem), trust_env=False)
        return self._async[pem]

    def close(self) -> None:
        """Close what is kept."""
        for client in self._clients.values():
            client.close()

    async def aclose(self) -> None:
        """Close what is kept for the event loop."""
        for client in self._async.values():
            await client.aclose()


def first_token_s(client: httpx2.Client, url: str, headers: dict[str, str] | None = None) -> float:
    """From the call to the first bytes of the streamed answer; the rest is read outside the clock."""
    begun = time.perf_counter()
    with client.stream("POST", url, json=BODY, headers=headers) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        took_s = time.perf_counter() - begun
        for _ in pieces:
            pass
        if reply.status_code != 200:
            raise RuntimeError(f"{url}: wanted 200, got {reply.status_code}")
    return took_s


async def first_token_async_s(
    client: httpx2.AsyncClient, url: str, headers: dict[str, str] | None = None
) -> float:
    """The same in an event loop."""
    begun = time.perf_counter()
    async with client.stream("POST", url, json=BODY, headers=headers) as reply:
        pieces = reply.aiter_raw()
        await anext(pieces)
        took_s = time.perf_counter() - begun
        async for _ in pieces:
            pass
        if reply.status_code != 200:
            raise RuntimeError(f"{url}: wanted 200, got {reply.status_code}")
    return took_s


def compare(times: dict[str, list[float]]) -> dict[str, Any]:
    """Each way's figures, and what its median is above the direct one's."""
    base = statistics.median(times["direct"])
    return {
        way: milliseconds(seconds) | {"above_direct_ms": round((statistics.median(seconds) - base) * 1e3, 3)}
        for way, seconds in times.items()
    }


def measure_sync(loadbalancer: str, gateway: str, rounds: int) -> dict[str, Any]:
    """Threads' way: httpx2.Client."""
    direct = Direct(loadbalancer)
    fleet, ahead = (httpx2.Client(transport=FleetTransport(loadbalancer, ahead=n)) for n in (0, 4))
    local = httpx2.Client(trust_env=False)
    ways: dict[str, Callable[[], float]] = {
        "direct": lambda: first_token_s(direct.client, *direct.request),
        "fleet_client": lambda: first_token_s(fleet, "http://fleet/v1/completions"),
        "fleet_client, leases ahead": lambda: first_token_s(ahead, "http://fleet/v1/completions"),
        "gateway": lambda: first_token_s(local, f"{gateway}/v1/completions"),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for n in range(rounds + 5):
        order = list(ways)
        random.Random(n).shuffle(order)
        for way in order:
            direct.take_lease()  # for each way, so that all come after the same
            if way != "direct":
                direct.give_back()
            took_s = ways[way]()
            if n >= 5:
                times[way].append(took_s)
    for client in (direct, fleet, ahead, local):
        client.close()
    return compare(times)


async def measure_async(loadbalancer: str, rounds: int) -> dict[str, Any]:
    """An event loop's way: httpx2.AsyncClient."""
    direct = Direct(loadbalancer)
    fleet, ahead = (httpx2.AsyncClient(transport=AsyncFleetTransport(loadbalancer, ahead=n)) for n in (0, 4))
    times: dict[str, list[float]] = {"direct": [], "fleet_client": [], "fleet_client, leases ahead": []}
    for n in range(rounds + 5):
        order = list(times)
        random.Random(n).shuffle(order)
        for way in order:
            await asyncio.to_thread(direct.take_lease)
            if way == "direct":
                took_s = await first_token_async_s(direct.async_client, *direct.request)
            else:
                await asyncio.to_thread(direct.give_back)
                client = fleet if way == "fleet_client" else ahead
                took_s = await first_token_async_s(client, "http://fleet/v1/completions")
            if n >= 5:
                times[way].append(took_s)
    await direct.aclose()
    await fleet.aclose()
    await ahead.aclose()
    return compare(times)


# -- many streams through the gateway -------------------------------------------------------------------


def serve_streams(events: int) -> None:
    """A loadbalancer and an instance in one: each stream has an event every 20 ms, with the time in it."""

    async def route(request: web.Request) -> web.Response:
        lease = {
            "address": f"http://127.0.0.1:{request.transport.get_extra_info('sockname')[1]}",  # type: ignore[union-attr]
            **{"token": "t" * 38, "request_id": "0" * 16, "instance_id": 1, "model": "m"},
            **{"expires_at": time.time() + 60, "expires_in_s": 60.0},
        }
        return web.json_response(lease)

    async def stream(request: web.Request) -> web.StreamResponse:
        await request.read()
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        begun = time.monotonic() + random.random() * EVENT_S
        for n in range(events):
            await asyncio.sleep(max(0.0, begun + n * EVENT_S - time.monotonic()))
            await reply.write(b'data: {"at": %.6f, "choices": [{"text": "word"}]}\n\n' % time.monotonic())
        await reply.write(b"data: [DONE]\n\n")
        return reply

    async def done(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.post("/route", route), web.post("/done", done), web.post("/v1/completions", stream)])
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"streams on http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    web.run_app(app, sock=sock, print=lambda *_: None)


async def read_streams(url: str, streams: int, events: int) -> tuple[list[float], int]:
    """(how late each event arrived, streams that came to their end)."""
    late: list[float] = []

    async def one(n: int) -> bool:
        await asyncio.sleep(n * 0.005)  # 200 a second begin
        count, rest = 0, b""
        async with session.post(f"{url}/v1/completions", json=BODY) as reply:
            async for chunk in reply.content.iter_any():
                now = time.monotonic()
                *lines, rest = (rest + chunk).split(b"\n\n")
                for line in lines:
                    if line.startswith(b'data: {"at": '):
                        late.append(now - float(line[13 : line.index(b",")]))
                        count += 1
                    elif line == b"data: [DONE]":
                        return count == events
        return False

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        ended = await asyncio.gather(*(one(n) for n in range(streams)))
    return late, sum(ended)


def measure_streams(directory: Path, streams: int, seconds: float, *, gateway: bool) -> dict[str, Any]:
    """So many streams at once, through the gateway, or straight from the server: what the bench adds."""
    events = round(seconds / EVENT_S)
    command = [sys.executable, "-m", "bench.client", "--serve-streams", str(events)]
    log = directory / f"streams-{gateway}.log"
    with running(command, log, dict(os.environ), r"streams on (\S+)") as server:
        if not gateway:
            late, ended = asyncio.run(read_streams(server.said, streams, events))
            return milliseconds(late) | {"streams": streams, "ended": ended}
        with running_gateway(directory, server.said) as child:
            before, begun = cpu_s(child.pid), time.monotonic()
            late, ended = asyncio.run(read_streams(child.said, streams, events))
            share = (cpu_s(child.pid) - before) / (time.monotonic() - begun)
    return milliseconds(late) | {"streams": streams, "ended": ended, "gateway_core_share": round(share, 3)}


def running_gateway(directory: Path, loadbalancer: str) -> "contextlib.AbstractContextManager[Child]":
    """A gateway on a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = [sys.executable, str(ROOT / "gateway.py"), "--port", str(port), "--loadbalancer", loadbalancer]
    log = directory / f"gateway-{port}.log"
    return running(command, log, dict(os.environ), r"(http://127\.0\.0\.1:" + str(port) + ")")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.client", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="of each way (default 200)")
    parser.add_argument("--streams", type=int, default=200, metavar="N", help="at once (default 200)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of load (default 10)")
    parser.add_argument("--serve-streams", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve_streams is not None:
        serve_streams(args.serve_streams)
        return
    with tempfile.TemporaryDirectory(prefix="bench-client-") as name:
        directory = Path(name)
        result: dict[str, Any] = {
            "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
            "hashes": measure_hashes(args.rounds),
            "ahead": {
                f"{instances} instances, /route {route_s * 1e3:g} ms, {turns:g} turns": measure_ahead(
                    instances, route_s, turns
                )
                for instances in (2, 8, 40)
                for route_s in (0.002, 0.02, 0.1)
                for turns in (1.02, 4.0)
            },
            "check": measure_check(directory, 500.0, args.seconds, CAP),
        }
        for shape, figures in result["hashes"].items():
            _show(f"hashes: {shape}", figures)
        for shape, figures in result["ahead"].items():
            _show(f"ahead: {shape}", figures)
        _show("token check, 500 requests/s, 100,000 tokens outstanding", result["check"])
        for way in (False, True):
            key = "streams" if way else "streams_without_gateway"
            result[key] = measure_streams(directory, args.streams, args.seconds, gateway=way)
            _show(f"{args.streams} streams of 50 events/s, {'gateway' if way else 'direct'}", result[key])
        config = StackConfig(instances=1, max_instances=1, seed=1)
        with LocalStack(config, say=lambda _: None) as stack:
            with running_gateway(directory, stack.loadbalancer_url) as child:
                result["first_token"] = measure_sync(stack.loadbalancer_url, child.said, args.rounds)
            result["first_token_async"] = asyncio.run(measure_async(stack.loadbalancer_url, args.rounds))
    for key in ("first_token", "first_token_async"):
        for way, figures in result[key].items():
            _show(f"{key}: {way}", figures)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _show(what: str, figures: dict[str, Any]) -> None:
    print(f"{what:58}" + "  ".join(f"{k} {v:g}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    main()
