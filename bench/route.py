"""How many leases a second one loadbalancer process gives, and how those fare who wait for one.

    python -m bench.route [--json FILE]

Three processes: a fleet of stub instances (a real socket each, tokens in batches, load reports, and the
autoscaler's two routes), the real `loadbalancer_server.py`, and this driver, which has keep-alive
connections, one request at a time on each. The driver tells the fleet which leases it was given and the
fleet reports them as started and ended, when it is asked and by itself, so stock, refills, leases, work and
reports all do what they do in service. With two cores the server has one, driver and fleet have the other.

Rounds of all kinds alternate, each against a fresh server; medians of the rounds are shown. Processor time is
the server's (user and system) per lease, everything it does in the background included.

    closed     each connection asks again as soon as it is answered: the rate
    paced      requests come by the clock (Poisson) at half of that rate, whatever the answers do: the
               latency, from when a request was due
    batches    closed, 32 leases an answer
    held       5,000 clients wait; instances push that a request has ended, 200 times a second; then a hot set
               with room for 3,000 comes at once
"""

import argparse
import asyncio
import functools
import hashlib
import hmac
import json
import os
import platform
import random
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import urlopen

import uvloop

from fleet_client.listening import allow_many_files
from remote import boot
from web.signatures import name_and_key

ROOT = Path(__file__).parent.parent


def post(path: str, said: dict[str, Any], more: str = "") -> bytes:
    """The request."""
    return with_body(path, json.dumps(said).encode(), more)


def with_body(path: str, body: bytes, more: str = "", method: str = "POST") -> bytes:
    """The request; more: further header lines."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{more}"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


SERVED_S = 0.3
"""How long a request takes at a stub instance."""

FLEET_THROUGHPUT, HOLD_S = 1.2e7, 6.0
"""Work/s of all stub instances together, and seconds they may hold: 65,000 requests/s, so none is full."""

MOST_PORTS = 1000
"""With more instances several share a port and differ in their path: a process has 20,000 files."""

BATCH = 32
"""Leases in one answer of the batches."""

SPEAKERS, TELL_AGAIN_S = 2, 1.0
"""Connections over which the fleet pushes its reports, and when it looks again at who had nothing to say."""

HELD, WAKES_S, WAKING_S, BURST = 5000, 200, 5.0, 3000
"""Clients that wait; of them woken a second, for so long; and then at once."""


# -- the fleet: stub instances and the autoscaler's two routes ------------------------------------------


class StubInstance:
    """Tokens and load reports of one instance."""

    def __init__(self, number: int, port: int) -> None:
        """number: its id; port: where its auth_server answers."""
        self.number = number
        self.port = port
        self.boot_id = secrets.token_hex(8)
        self.issued = 0
        self.events: deque[tuple[str, str]] = deque(maxlen=20_000)  # (request id, "" started or status)
        self.seq = 0
        self.served = 0
        self.serving: deque[tuple[float, str]] = deque()
        self.report_to = ""
        self.pushed = 0  # of the events, so many have been pushed
        self.pushes = 0
        self.path = ""
        self.master_token = f"{number:08d}" + "m" * 56

    def told(self, throughput: float, capacity: float) -> dict[str, Any]:
        """Its part of the hot set."""
        return {
            "id": self.number,
            "state": "hot",
            "address": f"https://127.0.0.1:{self.port + 1}",
            "certificate": certificate(),  # each lease carries it
            "auth_url": f"http://127.0.0.1:{self.port}{self.path}",
            "master_token": self.master_token,
            "throughput_work_s": throughput,
            "capacity_work": capacity,
        }

    def token_batch(self, count: int) -> dict[str, Any]:
        """POST /tokens."""
        tokens = [f"{self.number}-{n}-" + "x" * 64 for n in range(self.issued, self.issued + count)]
        self.issued += count
        return {
            "tokens": tokens,
            "boot_id": self.boot_id,
            "expires_at": time.time() + 600.0,
            "expires_in_s": 600.0,
            "load": self.load(self.seq),
        }

    def started(self, request_id: str, now: float) -> None:
        """A client brought that lease's token."""
        self.seq += 1
        self.events.append((request_id, ""))
        self.serving.append((now + SERVED_S, request_id))

    def push(self) -> bytes | None:
        """POST /report with what has happened since the last one, or None when nothing has."""
        if self.seq == self.pushed and not (self.serving and self.serving[0][0] <= time.monotonic()):
            return None
        load = self.load(self.pushed)
        self.pushes += 1
        told = {name: load[name] for name in ("boot_id", "seq", "missed", "started", "ended", "model_up")}
        raw = signed_push(self, told | {"number": self.pushes, "after": self.pushed})
        self.pushed = load["seq"]
        return raw

    def load(self, after: int) -> dict[str, Any]:
        """GET /load."""
        now = time.monotonic()
        while self.serving and self.serving[0][0] <= now:
            self.seq += 1
            self.served += 1
            self.events.append((self.serving.popleft()[1], "finished"))
        news = min(self.seq - after, len(self.events))
        fresh = [self.events[i] for i in range(len(self.events) - news, len(self.events))]
        return {
            "boot_id": self.boot_id,
            "seq": self.seq,
            "missed": self.seq - after > news,
            "started": [i for i, status in fresh if not status],
            "ended": [{"id": i, "status": s, "output_tokens": 150} for i, s in fresh if s],
            "running": len(self.serving),
            "waiting": 0,
            "kv_use": 0.1,
            "model_up": True,
            "prompt_tokens_total": 300 * self.served,
            "generation_tokens_total": 150 * self.served,
        }


def signed_push(instance: StubInstance, said: dict[str, Any]) -> bytes:
    """A report of that instance, as remote/speaker.py sends it."""
    raw = json.dumps(said).encode()
    name, key = name_and_key(instance.master_token)
    signature = hmac.new(key.encode(), b"/report " + raw, hashlib.sha256).hexdigest()
    return with_body("/report", raw, f"Authorization: Fleet {name}:{signature}\r\n")


class StubHttp(asyncio.Protocol):
    """Just enough HTTP/1.1 for the loadbalancer's client: keep-alive, Content-Length."""

    def __init__(self, fleet: list[StubInstance], instance: StubInstance | None) -> None:
        """instance None: this is the autoscaler's port, and the driver's."""
        self._fleet = fleet
        self._instance = instance
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by descent

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode("latin-1")
            length = 0
            for line in head.split("\r\n")[1:]:
                name, _, value = line.partition(":")
                if name.lower() == "content-length":
                    length = int(value)
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            payload = json.dumps(self._answer(head.split(" ")[1], body)).encode()
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(payload), payload)
            )

    def _answer(self, target: str, body: bytes) -> dict[str, Any]:
        if self._instance is not None:
            instance = self._instance
            if instance.path:
                instance = self._fleet[int(target.split("/")[1])]
            if target.endswith("/tokens"):
                said = json.loads(body)
                instance.report_to = said.get("report_to", "")
                return instance.token_batch(said["count"])
            return instance.load(int(target.partition("after=")[2]))
        if target == "/leased":
            now = time.monotonic()
            for line in body.decode().split():
                number, _, request_id = line.partition(":")
                self._fleet[int(number)].started(request_id, now)
            return {}
        if target == "/busy":
            return {"hot_epoch": "bench", "hot_version": 1, "expected_hot_s": None}
        return {
            "epoch": "bench",
            "version": 1,
            "model": "bench",
            "prefill_weight": 0.1,
            "expected_output_tokens": 150.0,
            "expected_hot_s": None,
            "instances": [
                i.told(FLEET_THROUGHPUT / len(self._fleet), HOLD_S * FLEET_THROUGHPUT / len(self._fleet))
                for i in self._fleet
            ],
        }


@functools.lru_cache(maxsize=1)
def certificate() -> str:
    """One as instances make it; here all have the same."""
    with tempfile.TemporaryDirectory() as directory:
        boot.make_certificate(directory)
        return Path(directory, "tls.crt").read_text()


async def run_fleet(count: int) -> None:
    """Serve that many instances until killed; the autoscaler's port goes to stdout."""
    loop = asyncio.get_running_loop()
    fleet: list[StubInstance] = []
    servers = []
    for number in range(count):
        if number >= MOST_PORTS:
            fleet.append(StubInstance(number, fleet[number % MOST_PORTS].port))
            fleet[-1].path = f"/{number}"
            continue
        sock = socket.create_server(("127.0.0.1", 0))
        fleet.append(StubInstance(number, sock.getsockname()[1]))
        fleet[-1].path = f"/{number}" if count > MOST_PORTS else ""
        servers.append(
            await loop.create_server(lambda i=fleet[-1]: StubHttp(fleet, i), sock=sock)  # type: ignore[misc]
        )
    control = await loop.create_server(lambda: StubHttp(fleet, None), "127.0.0.1", 0)
    print(control.sockets[0].getsockname()[1], flush=True)
    turns = deque((0.0, instance) for instance in fleet)
    await asyncio.gather(*(speak(turns) for _ in range(SPEAKERS)))
    await asyncio.Event().wait()


async def speak(turns: deque[tuple[float, StubInstance]]) -> None:
    """Push reports until the loadbalancer ends, of each instance as often as it is told to.

    turns: (when, whose), one of each instance; several speakers share them.
    """
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
    line: Client | None = None
    while True:
        due, instance = turns.popleft()
        if due > time.monotonic():  # else the last answer was waited for: the loop has had its turn
            await asyncio.sleep(due - time.monotonic())
        raw = instance.push() if instance.report_to else None
        next_in_s = TELL_AGAIN_S
        if raw is not None:
            if line is None:
                line = Client(lambda _, head, body, __: answers.put_nowait((head, body)))
                port = urlsplit(instance.report_to).port or 0
                await loop.create_connection(lambda it=line: it, "127.0.0.1", port)  # type: ignore[misc]
            if not line.connected:
                return
            line.send(raw)
            head, body = await answers.get()
            if head.startswith(b"HTTP/1.1 200"):
                next_in_s = json.loads(body)["next_in_s"]
        turns.append((time.monotonic() + next_in_s, instance))


# -- the driver ------------------------------------------------------------------------------------------

_LEASE = re.compile(rb'"request_id": "([0-9a-f]{16})", "instance_id": (\d+)')


class Client(asyncio.Protocol):
    """One keep-alive connection: sends when it is told to, and says what came and how long it took."""

    def __init__(self, heard: "Callable[[Client, bytes, bytes, float], None]") -> None:
        """heard: called with head, body and seconds of each answer."""
        self._heard = heard
        self._buffer = b""
        self._since = 0.0
        self.answers = 0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by descent

    @property
    def connected(self) -> bool:
        """Whether it can still ask."""
        return not self._transport.is_closing()

    def send(self, request: bytes, since: float | None = None) -> None:
        """Ask once. since: from when its time counts."""
        self.waiting = True
        self._since = time.perf_counter() if since is None else since
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        at = self._buffer.lower().find(b"content-length:", 0, end)
        length = int(self._buffer[at + 15 : self._buffer.find(b"\r\n", at)])
        if len(self._buffer) < end + 4 + length:
            return
        took_s = time.perf_counter() - self._since
        head, body, self._buffer = self._buffer[:end], self._buffer[end + 4 :], b""
        self.waiting = False
        self.answers += 1
        self._heard(self, head, body, took_s)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


class Driver:
    """Clients that ask, and what they were answered."""

    def __init__(self, request: bytes, *, again: bool) -> None:
        """request: what all ask. again: each asks again when it is answered."""
        self.request = request
        self.latencies: list[float] = []
        self.lags: list[float] = []  # from when a request was due until it was sent
        self.leases = 0
        self.refused = 0
        self.leased: list[bytes] = []
        self.measuring = False
        self.stopped = False
        self.clients: list[Client] = []
        self._again = again
        self._idle: deque[Client] = deque()
        self._due: deque[float] = deque()

    async def connect(self, port: int, connections: int) -> None:
        """Open them all."""
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, client = await loop.create_connection(lambda: Client(self.heard), "127.0.0.1", port)
            self.clients.append(client)
        self._idle.extend(self.clients)

    def heard(self, client: Client, head: bytes, body: bytes, took_s: float) -> None:
        """Take in an answer."""
        found = _LEASE.findall(body) if head.startswith(b"HTTP/1.1 200") else []
        self.leased += [b"%s:%s" % (of, name) for name, of in found]
        if self.measuring:
            self.latencies.append(took_s)
            self.leases += len(found)
            self.refused += not found
        if self.stopped:
            return
        if self._again:
            client.send(self.request)
        elif self._due:
            client.send(self.request, self._due.popleft())
        else:
            self._idle.append(client)

    async def pace(self, rate: float, rng: random.Random) -> None:
        """Send by the clock, so many a second on average; on the first connection that is free."""
        due = time.perf_counter()
        while not self.stopped:
            while due <= time.perf_counter():
                if self._idle:
                    if self.measuring:
                        self.lags.append(time.perf_counter() - due)
                    self._idle.popleft().send(self.request, due)
                else:
                    self._due.append(due)
                due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))


@dataclass(frozen=True)
class Cell:
    """What one round is of. paced: by the clock, at half of the rate of the same without it."""

    instances: int
    connections: int
    batch: int = 0
    paced: bool = False


@dataclass(frozen=True)
class Round:
    """What one round measured. Times in milliseconds unless named otherwise.

    lag_p99_ms: of all that the driver itself was late, which is part of the latencies.
    """

    instances: int
    connections: int
    batch: int
    due_s: float
    seconds: float
    answers: int
    refused: int
    lost: int
    leases_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    lag_p99_ms: float
    server_cpu_us: float
    server_cpu_share: float
    server_mb: float
    fewest_answers_of_a_connection: int


def cpu_s(pid: int) -> float:
    """Processor seconds that process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """What that process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def drive(
    port: int, fleet_port: int, pid: int, cell: Cell, seconds: float, rate: float | None
) -> Round:
    """Keep the connections busy for so long, after a second in which stocks grow to the use.

    rate: requests a second where they come by the clock.
    """
    said: dict[str, Any] = {"prompt_tokens": 300, "max_tokens": 200}
    driver = Driver(post("/route", said | ({"count": cell.batch} if cell.batch else {})), again=rate is None)
    await driver.connect(port, cell.connections)
    clients = driver.clients
    tasks = [asyncio.create_task(_tell(driver, fleet_port))]
    if rate is None:
        for client in clients:
            client.send(driver.request)
    else:
        tasks.append(asyncio.create_task(driver.pace(rate, random.Random(1))))
    await asyncio.sleep(1.0)
    before = {client: client.answers for client in clients}
    cpu, begun = cpu_s(pid), time.perf_counter()
    driver.measuring = True
    await asyncio.sleep(seconds)
    driver.measuring = False
    took_s, cpu = time.perf_counter() - begun, cpu_s(pid) - cpu
    mb = memory_mb(pid)
    fewest = min(client.answers - before[client] for client in clients)
    driver.stopped = True
    limit = time.perf_counter() + 30.0
    while any(client.waiting for client in clients) and time.perf_counter() < limit:
        await asyncio.sleep(0.01)
    lost = sum(client.waiting for client in clients)
    for client in clients:
        client.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    found, lags = sorted(driver.latencies), sorted(driver.lags)
    return Round(
        instances=cell.instances,
        connections=cell.connections,
        batch=cell.batch,
        due_s=round(rate or 0.0, 1),
        seconds=round(took_s, 3),
        answers=len(found),
        refused=driver.refused,
        lost=lost,
        leases_s=round(driver.leases / took_s, 1),
        p50_ms=round(1e3 * found[len(found) // 2], 3),
        p99_ms=round(1e3 * found[int(len(found) * 0.99)], 3),
        max_ms=round(1e3 * found[-1], 3),
        lag_p99_ms=round(1e3 * lags[int(len(lags) * 0.99)], 3) if lags else 0.0,
        server_cpu_us=round(1e6 * cpu / max(1, driver.leases), 1),
        server_cpu_share=round(cpu / took_s, 3),
        server_mb=round(mb, 1),
        fewest_answers_of_a_connection=fewest,
    )


async def _tell(driver: Driver, fleet_port: int) -> None:
    """Tell the fleet ten times a second which leases are being used."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet_port)
    try:
        while True:
            await asyncio.sleep(0.1)
            body = b"\n".join(driver.leased)
            driver.leased.clear()
            writer.write(b"POST /leased HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
    finally:
        writer.close()


# -- those who wait --------------------------------------------------------------------------------------

HELD_INSTANCES = 20
"""At 10 reports a second each they say 200 times that a request has ended."""


@dataclass(frozen=True)
class Held:
    """Clients that wait, in one process. Times in milliseconds: from what makes room to a client's answer."""

    held: int
    mb_before: float
    mb_held: float
    waiting_cpu_share: float
    wakes: int
    wake_p50_ms: float
    wake_p99_ms: float
    wake_max_ms: float
    burst: int
    burst_first_ms: float
    burst_p50_ms: float
    burst_last_ms: float
    burst_cpu_us: float
    lost: int


class Pusher:
    """What the instances push: that the one request which each of them holds has ended."""

    def __init__(self, instances: list[StubInstance]) -> None:
        """Their tokens are known, as the stub that holds them knows them."""
        self._instances = {i.number: i for i in instances}
        self._numbers = dict.fromkeys(self._instances, 0)
        self.serving: deque[tuple[int, str]] = deque()

    def next(self) -> bytes:
        """The push of the instance whose request has been there for longest."""
        number, request_id = self.serving.popleft()
        instance = self._instances[number]
        self._numbers[number] += 1
        said = {
            "boot_id": instance.boot_id,
            "number": self._numbers[number],
            "after": 0,
            "seq": 0,
            "missed": False,
            "started": [request_id],
            "ended": [{"id": request_id, "status": "finished", "output_tokens": 150}],
            "model_up": True,
        }
        return signed_push(instance, said)


async def hold(port: int, pid: int, control: str, instances: list[StubInstance]) -> Held:
    """Fill the instances, let HELD wait, wake them one by one and then BURST at once."""
    loop = asyncio.get_running_loop()
    pusher = Pusher(instances)
    came: list[tuple[float, bytes]] = []
    pushed: list[float] = []

    def heard(_: Client, head: bytes, body: bytes, __: float) -> None:
        found = _LEASE.findall(body) if head.startswith(b"HTTP/1.1 200") else []
        if found:
            came.append((time.perf_counter(), body))
        pusher.serving += [(int(of), name.decode()) for name, of in found]

    async def client() -> Client:
        return (await loop.create_connection(lambda: Client(heard), "127.0.0.1", port))[1]

    def hot(version: int, capacity: float) -> bytes:
        said = {
            "epoch": "held",
            "version": version,
            "model": "bench",
            "prefill_weight": 0.1,
            "expected_output_tokens": 100.0,
            "expected_hot_s": None,
            "instances": [i.told(1.0, capacity) for i in instances],
        }
        bearer = f"Authorization: Bearer {control}\r\n"
        return with_body("/hot", json.dumps(said).encode(), bearer, "PUT")

    speaker = await client()
    speaker.send(hot(1, 100.0))
    while speaker.waiting:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(wait_stocked, port, len(instances))
    request = post("/route", {"work": 100.0, "wait_s": 300})
    before = memory_mb(pid)
    clients = [await client() for _ in range(len(instances) + HELD)]
    for one in clients:
        one.send(request)
    await asyncio.to_thread(wait_held, port, HELD)
    came.clear()
    mb, cpu = memory_mb(pid), cpu_s(pid)
    await asyncio.sleep(2.0)
    share = (cpu_s(pid) - cpu) / 2.0
    reports = Client(heard)
    await loop.create_connection(lambda: reports, "127.0.0.1", port)
    wakes = round(WAKES_S * WAKING_S)
    due = time.perf_counter()
    for _ in range(wakes):
        due += 1.0 / WAKES_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        while reports.waiting:
            await asyncio.sleep(0)
        pushed.append(time.perf_counter())
        reports.send(pusher.next())
    await _until(lambda: len(came) >= wakes)
    # One lease for each push, in their order.
    took = sorted(at - since for since, (at, _) in zip(pushed, came, strict=False))
    woken = len(came)
    for one in [c for c in clients if c.waiting][BURST:]:
        one.close()
    await asyncio.to_thread(wait_held, port, BURST)
    came.clear()
    cpu, begun = cpu_s(pid), time.perf_counter()
    speaker.send(hot(2, 100.0 * 2 * BURST / len(instances)))
    await _until(lambda: len(came) >= BURST)
    burst = sorted(at - begun for at, _ in came)
    cpu = cpu_s(pid) - cpu
    for one in (*clients, speaker, reports):
        one.close()
    return Held(
        held=HELD,
        mb_before=round(before, 1),
        mb_held=round(mb, 1),
        waiting_cpu_share=round(share, 3),
        wakes=woken,
        wake_p50_ms=round(1e3 * took[len(took) // 2], 2),
        wake_p99_ms=round(1e3 * took[int(len(took) * 0.99)], 2),
        wake_max_ms=round(1e3 * took[-1], 2),
        burst=len(burst),
        burst_first_ms=round(1e3 * burst[0], 1),
        burst_p50_ms=round(1e3 * burst[len(burst) // 2], 1),
        burst_last_ms=round(1e3 * burst[-1], 1),
        burst_cpu_us=round(1e6 * cpu / max(1, len(burst)), 1),
        lost=abs(wakes - woken) + abs(BURST - len(burst)),
    )


async def _until(true: Callable[[], bool], limit_s: float = 30.0) -> None:
    limit = time.perf_counter() + limit_s
    while not true() and time.perf_counter() < limit:
        await asyncio.sleep(0.01)


# -- processes -------------------------------------------------------------------------------------------


def pin(pid: int, core: int) -> None:
    """Give that process one core, where there are two."""
    cores = sorted(os.sched_getaffinity(os.getpid() if pid == 0 else pid))
    if len(cores) >= 2:
        os.sched_setaffinity(pid, {cores[core]})


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A child process that is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def status_of(port: int) -> dict[str, Any]:
    """GET /status, empty while nobody answers."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/status", timeout=30.0) as reply:
            said: dict[str, Any] = json.load(reply)
            return said
    except OSError:
        return {}


def wait_stocked(port: int, instances: int, timeout_s: float = 180.0) -> None:
    """Return when every instance has tokens in stock."""
    limit = time.monotonic() + timeout_s
    stocked = -1
    while time.monotonic() < limit:
        rows = status_of(port).get("instances", [])
        stocked = sum(row["tokens_in_stock"] > 0 for row in rows)
        if stocked == instances:
            return
        time.sleep(max(0.2, instances / 5000))
    raise SystemExit(f"bench.route: {stocked} of {instances} instances have tokens after {timeout_s:g} s")


def wait_held(port: int, held: int, timeout_s: float = 60.0) -> None:
    """Return when so many wait."""
    limit = time.monotonic() + timeout_s
    while status_of(port).get("held") != held:
        if time.monotonic() > limit:
            raise SystemExit(f"bench.route: not {held} clients wait after {timeout_s:g} s")
        time.sleep(0.2)


@contextmanager
def loadbalancer(autoscaler_port: int, *flags: str) -> Iterator[tuple[int, int, Path]]:
    """A fresh server: its port, its pid, where its control key is."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as state,
        child(
            "loadbalancer_server.py",
            *("--port", str(port), "--autoscaler", f"http://127.0.0.1:{autoscaler_port}"),
            *("--state-dir", state, *flags),
        ) as server,
    ):
        yield port, server.pid, Path(state, "control.key")


def one_round(cell: Cell, seconds: float, rate: float | None) -> Round:
    """A fresh fleet and a fresh server, measured once."""
    with child("-m", "bench.route", "--fleet", str(cell.instances)) as fleet:
        assert fleet.stdout is not None
        fleet_port = int(fleet.stdout.readline())
        with loadbalancer(fleet_port) as (port, pid, _):
            wait_stocked(port, cell.instances)
            pin(pid, 0)
            pin(fleet.pid, -1)
            return uvloop.run(drive(port, fleet_port, pid, cell, seconds, rate))


def hold_round() -> Held:
    """A fresh server in front of instances that this process has."""

    async def run(port: int, pid: int, control: Path) -> Held:
        loop = asyncio.get_running_loop()
        instances = []
        for number in range(HELD_INSTANCES):
            sock = socket.create_server(("127.0.0.1", 0))
            instances.append(StubInstance(number, sock.getsockname()[1]))
            await loop.create_server(lambda i=instances[-1]: StubHttp(instances, i), sock=sock)  # type: ignore[misc]
        return await hold(port, pid, control.read_text().strip(), instances)

    # It finds no autoscaler, and asks for no reports: what happens is what is pushed.
    with loadbalancer(free_port(), "--poll-interval-s", "60", "--max-held", str(HELD)) as (
        port,
        pid,
        control,
    ):
        while not status_of(port):
            time.sleep(0.1)
        pin(pid, 0)
        return uvloop.run(run(port, pid, control))


def median_of(rounds: list[Any], worst: tuple[str, ...]) -> dict[str, Any]:
    """Each figure's median; of what must not happen the worst."""
    rows = [asdict(r) for r in rounds]
    out: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    for key in worst:
        out[key] = max(row[key] for row in rows)
    return out


def rates(cells: list[Cell], rounds: int, seconds: float) -> dict[Cell, list[Round]]:
    """Rounds of all cells by turns; a paced one after the one whose rate it takes."""
    found: dict[Cell, list[Round]] = {cell: [] for cell in cells}
    for n in range(rounds):
        for cell in cells:
            print(f"round {n + 1} of {rounds}: {cell}", file=sys.stderr)
            rate = None
            if cell.paced:
                closed = found[Cell(cell.instances, cell.connections, cell.batch)][-1]
                rate = 0.5 * closed.leases_s / max(1, cell.batch)
            found[cell].append(one_round(cell, seconds, rate))
    return found


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"{text}: wanted 1 to 100000")
    return value


def show(medians: list[dict[str, Any]], held: dict[str, Any] | None) -> None:
    """Print the tables."""
    print(
        f"{'instances':>9} {'clients':>7} {'batch':>5} {'due/s':>7} {'leases/s':>8} {'p50 ms':>7} "
        f"{'p99 ms':>7} {'max ms':>7} {'lag ms':>6} {'CPU µs':>7} {'MB':>5} {'refused':>7} {'lost':>4} "
        f"{'fewest':>6}"
    )
    for row in medians:
        print(
            f"{row['instances']:9.0f} {row['connections']:7.0f} {row['batch'] or '':>5} "
            f"{row['due_s'] or '':>7} {row['leases_s']:8.0f} {row['p50_ms']:7.2f} {row['p99_ms']:7.2f} "
            f"{row['max_ms']:7.1f} {row['lag_p99_ms']:6.2f} {row['server_cpu_us']:7.1f} "
            f"{row['server_mb']:5.0f} {row['refused']:7.0f} {row['lost']:4.0f} "
            f"{row['fewest_answers_of_a_connection']:6.0f}"
        )
    print(
        "CPU: of the server, per lease. due/s: by the clock; lag: p99 of how late the driver itself was.\n"
        "fewest: answers of the connection with fewest."
    )
    if held is not None:
        print(
            f"held {held['held']:.0f}: {held['mb_held']:.0f} MB (before {held['mb_before']:.0f}), "
            f"{held['waiting_cpu_share']:.1%} of a core; woken by {WAKES_S} reports a second: "
            f"p50 {held['wake_p50_ms']:.1f} ms, p99 {held['wake_p99_ms']:.1f}, "
            f"max {held['wake_max_ms']:.1f}; "
            f"{held['burst']:.0f} at once: first {held['burst_first_ms']:.0f} ms, "
            f"p50 {held['burst_p50_ms']:.0f}, last {held['burst_last_ms']:.0f}; lost {held['lost']:.0f}"
        )


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.route", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--rounds", type=_count, default=3, metavar="N", help="per row (default 3)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="of one round (default 4)")
    parser.add_argument("--few", type=_count, default=10, metavar="N", help="instances (default 10)")
    parser.add_argument("--many", type=_count, default=1000, metavar="N", help="instances (default 1000)")
    parser.add_argument("--most", type=_count, default=10_000, metavar="N", help="instances (default 10000)")
    parser.add_argument("--only", choices=("rates", "held"), help="measure that alone")
    parser.add_argument("--fleet", type=_count, metavar="N", help=argparse.SUPPRESS)
    args = parser.parse_args()
    allow_many_files()
    if args.fleet is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvloop.run(run_fleet(args.fleet))
        return
    few, many, most = args.few, args.many, args.most
    cells = [
        Cell(few, 16),
        Cell(few, 64),
        Cell(few, 64, paced=True),
        Cell(many, 16),
        Cell(most, 16),
        Cell(few, 1000),
        Cell(10 * few, 16, BATCH),
        Cell(many, 16, BATCH),
    ]
    pin(0, -1)
    found = {} if args.only == "held" else rates(list(dict.fromkeys(cells)), args.rounds, args.seconds)
    medians = [median_of(rounds, ("refused", "lost", "max_ms")) for rounds in found.values()]
    holds = [] if args.only == "rates" else [hold_round() for _ in range(args.rounds)]
    held = median_of(holds, ("lost", "wake_max_ms")) if holds else None
    show(medians, held)
    ratio = None
    if found:
        ratio = statistics.median(
            b.leases_s / a.leases_s for a, b in zip(found[Cell(few, 16)], found[Cell(most, 16)], strict=True)
        )
        print(f"{most} instances against {few}: {ratio:.3f} times the rate")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": {
                "platform": platform.platform(),
                "python": platform.python_version(),
                "cores": os.cpu_count(),
            },
            "seconds": args.seconds,
            "rounds": args.rounds,
            "rows": medians,
            "held": held,
            "rate_ratio_most_to_few": None if ratio is None else round(ratio, 4),
            "all_rounds": [asdict(r) for rounds in found.values() for r in rounds]
            + [asdict(r) for r in holds],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
