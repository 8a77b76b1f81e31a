"""The load: so many streams at once, each sending its next request when the last one has ended.

One event loop, a bare `asyncio.Protocol` a connection, httptools for the parsing; the same for every way to
the engine. A stream of 256 tokens costs it about a millisecond of processor.

    Kept      one kept-alive connection a stream, to the router; direct: to one of the engines
    Leased    ours: POST /route on a kept-alive connection, then a new connection to the engine of the
              lease; with leases ahead the first has been done before, by `fleet_leases.LeasesAhead`

A router that writes the head of an answer and its first event in two packets, and leaves Nagle's algorithm
on, sends the second only when the first is acknowledged, which Linux does after 40 ms on a kept-alive
connection. sglang-router 0.3.2 does (strace: two writev, no TCP_NODELAY). So that this is not all that there
is to see of it, a head that comes alone is acknowledged at once (TCP_QUICKACK), for every way; the way
"sglang-router, usual ACKs" shows what clients get that do not do so, which is all of them.

The clock of a request starts before its first byte is sent anywhere (for `Leased`: before /route, and before
the connection is opened) and is read at the first token, as counted in the body of the answer.
"""

import asyncio
import contextlib
import json
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import httptools

from bench.routers.backend import MODEL, TOKEN
from fleet_client.leases import ClientLease, Refusal, done_body, read_batch, read_route, route_body
from fleet_client.leases_ahead import LeasesAhead
from fleet_client.token_estimate import estimate_request

TOKENS = 256
"""Of a streamed answer."""

WORDS = "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor " * 16
"""A prompt of about 1,200 bytes, 300 tokens."""

WAIT_S = 30.0
"""How long /route may hold a request; here there is always room, so none is held."""

_TOKEN = TOKEN.encode()


class Failed(Exception):
    """Count a request that had no proper answer."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request. Seconds from its begin to the first token, and to the end of the answer."""

    first_s: float
    whole_s: float
    tokens: int


class ClientConnection(asyncio.Protocol):
    """One HTTP/1.1 connection of a client, one request at a time."""

    def __init__(self, *, quick_ack: bool = True) -> None:
        """Connect nothing yet. quick_ack: acknowledge a head that comes alone at once."""
        self._quick_ack = quick_ack
        self._over: asyncio.Future[None] | None = None
        self._lost = False
        self.first_at = 0.0
        self.tokens = 0
        self.status = 0
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by descent

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError):  # AttributeError: it speaks before it is asked
            self._transport.abort()
        if self._quick_ack and not self.tokens and self._over is not None and not self._over.done():
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self._lost = True
        if self._over is not None and not self._over.done():
            self._over.set_exception(Failed(f"the connection broke: {exc or 'closed'}"))

    def on_body(self, body: bytes) -> None:
        """Add a piece of the answer: what httptools calls."""
        count = body.count(_TOKEN)
        if count and not self.tokens:
            self.first_at = time.perf_counter()
        self.tokens += count
        if not count:
            self.body += body

    def on_message_complete(self) -> None:
        """End the answer: what httptools calls."""
        self.status = self._parser.get_status_code()
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    @property
    def usable(self) -> bool:
        """Whether another request may go over it."""
        return not self._lost and not self._transport.is_closing()

    async def ask(self, raw: bytes) -> None:
        """Send a request and read its answer to the end; raises Failed unless it is 200."""
        self._parser = httptools.HttpResponseParser(self)
        self.first_at, self.tokens, self.body = 0.0, 0, b""
        self._over = asyncio.get_running_loop().create_future()
        self._transport.write(raw)
        await self._over
        if self.status != 200:
            raise Failed(f"status {self.status}: {self.body[:200]!r}")

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


async def connect(
    port: int, context: ssl.SSLContext | None = None, *, quick_ack: bool = True
) -> ClientConnection:
    """Open a new connection to that port of this machine."""
    loop = asyncio.get_running_loop()
    name = "127.0.0.1" if context is not None else None
    try:
        _, line = await loop.create_connection(
            lambda: ClientConnection(quick_ack=quick_ack),
            "127.0.0.1",
            port,
            ssl=context,
            server_hostname=name,
        )
    except OSError as e:
        raise Failed(f"port {port}: {e}") from e
    return line


def completion(number: int, tokens: int, pace: float, *, stream: bool) -> bytes:
    """Return a completion's body. Each prompt begins otherwise: no cache of prefixes knows it."""
    prompt = f"{number} pace {pace:g} {WORDS}"
    said = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": stream}
    return json.dumps(said).encode()


def post(path: str, body: bytes, token: str = "") -> bytes:
    """Return a POST request as it goes over the wire."""
    key = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{key}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# -- the ways --------------------------------------------------------------------------------------------


class LoadClient(Protocol):
    """Sends completion requests for one round. tokens: that have come, also of answers that were cut off."""

    tokens: int

    async def send(self, stream: int, body: bytes) -> RequestTimes:
        """Send one request of that stream, to its end; raises Failed."""

    async def close(self) -> None:
        """Close all, and give back what is held."""


class Kept:
    """Each stream has a kept-alive connection to one of the ports."""

    def __init__(self, ports: Sequence[int], *, quick_ack: bool = True) -> None:
        """ports: streams take them in turn."""
        self.tokens = 0
        self._ports = ports
        self._quick_ack = quick_ack
        self._lines: dict[int, ClientConnection] = {}

    async def send(self, stream: int, body: bytes) -> RequestTimes:
        """Part of LoadClient."""
        begun = time.perf_counter()
        line = self._lines.get(stream)
        if line is None or not line.usable:
            port = self._ports[stream % len(self._ports)]
            line = self._lines[stream] = await connect(port, quick_ack=self._quick_ack)
        try:
            await line.ask(post("/v1/completions", body))
        except asyncio.CancelledError:
            line.close()
            raise
        finally:
            self.tokens += line.tokens
        return RequestTimes(line.first_at - begun, time.perf_counter() - begun, line.tokens)

    async def close(self) -> None:
        """Part of LoadClient."""
        for line in self._lines.values():
            line.close()


class Leased:
    """A lease and a new connection to the engine for each request."""

    def __init__(
        self,
        loadbalancer: int,
        engines: Mapping[int, int],
        context: ssl.SSLContext | None,
        ahead: int,
        *,
        batches: bool,
    ) -> None:
        """loadbalancer: its port. engines: port of each instance. ahead: leases fetched before use.

        batches: one POST /route brings as many of those as are missing; else it brings one.
        """
        self.tokens = 0
        self._loadbalancer = loadbalancer
        self._engines = engines
        self._context = context
        self._ahead = LeasesAhead(ahead)
        self._batches = batches
        self._free: deque[ClientConnection] = deque()  # kept-alive connections to the loadbalancer
        self._fetches: set[asyncio.Task[None]] = set()

    async def send(self, stream: int, body: bytes) -> RequestTimes:  # noqa: ARG002
        """Part of LoadClient."""
        begun = time.perf_counter()
        size = estimate_request("POST", "/v1/completions", body)
        lease = self._ahead.take(size, time.monotonic())
        while wanted := self._ahead.want(time.monotonic()):
            task = asyncio.create_task(self._fetch(wanted))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)
        if lease is None:
            said = read_route(
                200, await self._ask("/route", route_body(size, WAIT_S)), None, time.monotonic()
            )
            lease = _given(said)
        line = await connect(self._engines[lease.instance_id], self._context)
        try:
            await line.ask(post("/v1/completions", body, lease.token))
        finally:
            self.tokens += line.tokens
            line.close()
        return RequestTimes(line.first_at - begun, time.perf_counter() - begun, line.tokens)

    async def close(self) -> None:
        """Part of LoadClient: leases that were not used go back."""
        await asyncio.gather(*self._fetches, return_exceptions=True)
        for lease in self._ahead.close():
            await self._ask("/done", done_body(lease, "unused", ""))
        for line in self._free:
            line.close()

    async def _fetch(self, wanted: int) -> None:
        try:
            leases = await self._ahead_of_need(wanted)
        except Failed:
            self._ahead.refused(wanted, 0.0, time.monotonic())
            return
        self._ahead.arrived(leases, wanted, time.monotonic())

    async def _ahead_of_need(self, wanted: int) -> list[ClientLease]:
        typical = self._ahead.typical
        if self._batches:
            raw = await self._ask("/route", route_body(typical, 0.0, count=wanted))
            return _given(read_batch(200, raw, None, time.monotonic()))
        answers = [await self._ask("/route", route_body(typical, 0.0)) for _ in range(wanted)]
        return [_given(read_route(200, raw, None, time.monotonic())) for raw in answers]

    async def _ask(self, path: str, said: Mapping[str, Any]) -> bytes:
        line = self._free.pop() if self._free else await connect(self._loadbalancer)
        try:
            await line.ask(post(path, json.dumps(said).encode()))
        except Failed:
            line.close()
            raise
        self._free.append(line)
        return line.body


T = TypeVar("T")


def _given(said: T | Refusal) -> T:
    if isinstance(said, Refusal):
        raise Failed(said.message)
    return said


async def gives_batches(loadbalancer: int) -> bool:
    """Return whether POST /route on that port knows `count`, and so gives several leases at once."""
    line = await connect(loadbalancer)
    try:
        await line.ask(post("/route", json.dumps({"prompt_tokens": 1, "max_tokens": 1, "count": 1}).encode()))
        leases = read_batch(line.status, line.body, None, time.monotonic())
    except Failed:
        return False
    finally:
        line.close()
    return not isinstance(leases, Refusal)


# -- the rounds ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LoadResult:
    """What came of a round. first_s: of requests that began when all streams were under way.

    beginning_s: of each stream's first request. cut: requests that had not ended when the time was over.
    """

    first_s: list[float] = field(default_factory=list)
    beginning_s: list[float] = field(default_factory=list)
    ended: int = 0
    tokens: int = 0
    failed: int = 0
    cut: int = 0
    why: str = ""  # the last failure

    def end(self) -> None:
        """Count a request that has its answer."""
        self.ended += 1

    def fail(self, why: str) -> None:
        """Count a request that had no proper answer."""
        self.failed += 1
        self.why = why


async def paced(client: LoadClient, streams: int, pace: float, requests: int, limit_s: float) -> LoadResult:
    """Run so many streams, each of so many requests at that pace, until all have ended or limit_s is over.

    Streams begin spread over the time of one request, and stay spread. The first request of each opens
    connections while the others are just beginning: it counts as work, and not for the time to first token.
    """
    heard = LoadResult()
    apart_s = TOKENS / pace / streams

    async def one(stream: int) -> None:
        await asyncio.sleep(stream * apart_s)
        for n in range(requests):
            body = completion(random.getrandbits(40), TOKENS, pace, stream=True)
            try:
                sample = await client.send(stream, body)
            except Failed as e:
                heard.fail(str(e))
                continue
            if sample.tokens != TOKENS:
                heard.fail(f"{sample.tokens} tokens instead of {TOKENS}")
                continue
            heard.end()
            (heard.first_s if n else heard.beginning_s).append(sample.first_s)

    tasks = [asyncio.create_task(one(n)) for n in range(streams)]
    _, late = await asyncio.wait(tasks, timeout=limit_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    heard.cut, heard.tokens = len(late), client.tokens
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return heard


async def flat_out(client: LoadClient, streams: int, heard: LoadResult, over: asyncio.Event) -> None:
    """Send requests of one token, not streamed, each stream's next after its last, until over."""

    async def one(stream: int) -> None:
        while not over.is_set():
            body = completion(random.getrandbits(40), 1, 0.0, stream=False)
            try:
                sample = await client.send(stream, body)
            except Failed as e:
                heard.fail(str(e))
                await asyncio.sleep(0.01)
                continue
            if sample.tokens == 1:
                heard.end()
            else:
                heard.fail(f"{sample.tokens} tokens instead of 1")

    tasks = [asyncio.create_task(one(n)) for n in range(streams)]
    await over.wait()
    _, late = await asyncio.wait(tasks, timeout=30.0)
    for task in late:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks)
