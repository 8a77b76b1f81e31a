"""A fleet of stub instances, a real socket each, and the autoscaler's two routes, in a process of its own.

python -m bench.route.stub_fleet N      the autoscaler's port goes to stdout
"""

import asyncio
import functools
import hashlib
import hmac
import json
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

from bench.route.keep_alive import KeepAliveClient, request_of
from fleet_client.listening import allow_many_files
from remote import boot
from web.signatures import name_and_key

SERVED_S = 0.3
"""Seconds a request takes at a stub instance."""

FLEET_THROUGHPUT, HOLD_S = 1.2e7, 6.0
"""Work/s of all stub instances together, and seconds of work they may hold: 65,000 requests/s fill none."""

MOST_PORTS = 1000
"""Most ports; more instances share them and differ in their path, because a process has 20,000 files."""

REPORTERS, LOOK_AGAIN_S = 2, 1.0
"""Connections over which the fleet pushes reports, and seconds until it looks again at an instance without
news."""


class StubInstance:
    """Tokens and load reports of one instance."""

    def __init__(self, number: int, port: int, path: str = "") -> None:
        """number: its id. port, path: where its auth_server answers."""
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
        self.path = path
        self.master_token = f"{number:08d}" + "m" * 56

    def hot_row(self, throughput: float, capacity: float) -> dict[str, Any]:
        """Return its part of the hot set."""
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

    def token_batch(self, count: int, report_to: str = "") -> dict[str, Any]:
        """Answer POST /tokens. report_to: where it is to push its reports."""
        self.report_to = report_to
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
        """Begin to serve the request of that lease."""
        self.seq += 1
        self.events.append((request_id, ""))
        self.serving.append((now + SERVED_S, request_id))

    def push(self) -> bytes | None:
        """Return POST /report with what has happened since the last one, or None when nothing has."""
        if self.seq == self.pushed and not (self.serving and self.serving[0][0] <= time.monotonic()):
            return None
        load = self.load(self.pushed)
        self.pushes += 1
        told = {name: load[name] for name in ("boot_id", "seq", "missed", "started", "ended", "model_up")}
        raw = signed_push(self, told | {"number": self.pushes, "after": self.pushed})
        self.pushed = load["seq"]
        return raw

    def load(self, after: int) -> dict[str, Any]:
        """Answer GET /load."""
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
    """Return a report of that instance, as remote/speaker.py sends it."""
    raw = json.dumps(said).encode()
    name, key = name_and_key(instance.master_token)
    signature = hmac.new(key.encode(), b"/report " + raw, hashlib.sha256).hexdigest()
    return request_of("/report", raw, f"Authorization: Fleet {name}:{signature}\r\n")


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
                return instance.token_batch(said["count"], said.get("report_to", ""))
            if target.endswith("/health"):
                return {}
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
                i.hot_row(FLEET_THROUGHPUT / len(self._fleet), HOLD_S * FLEET_THROUGHPUT / len(self._fleet))
                for i in self._fleet
            ],
        }


@functools.lru_cache(maxsize=1)
def certificate() -> str:
    """Return a certificate as instances make it; here all have the same."""
    with tempfile.TemporaryDirectory() as directory:
        boot.make_certificate(directory)
        return Path(directory, "tls.crt").read_text()


async def run_fleet(count: int) -> None:
    """Serve that many instances until killed; the autoscaler's port goes to stdout."""
    loop = asyncio.get_running_loop()
    fleet: list[StubInstance] = []
    servers = []
    for number in range(count):
        path = f"/{number}" if count > MOST_PORTS else ""
        if number >= MOST_PORTS:
            fleet.append(StubInstance(number, fleet[number % MOST_PORTS].port, path))
            continue
        sock = socket.create_server(("127.0.0.1", 0))
        fleet.append(StubInstance(number, sock.getsockname()[1], path))
        servers.append(
            await loop.create_server(lambda i=fleet[-1]: StubHttp(fleet, i), sock=sock)  # type: ignore[misc]
        )
    control = await loop.create_server(lambda: StubHttp(fleet, None), "127.0.0.1", 0)
    print(control.sockets[0].getsockname()[1], flush=True)
    turns = deque((0.0, instance) for instance in fleet)
    await asyncio.gather(*(push_reports(turns) for _ in range(REPORTERS)))
    await asyncio.Event().wait()


async def push_reports(turns: deque[tuple[float, StubInstance]]) -> None:
    """Push reports until the loadbalancer ends, of each instance as often as it is told to.

    turns: (when, whose), one of each instance; several connections share them.
    """
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
    connection: KeepAliveClient | None = None
    while True:
        due, instance = turns.popleft()
        if due > time.monotonic():  # else the last answer was waited for: the loop has had its turn
            await asyncio.sleep(due - time.monotonic())
        raw = instance.push() if instance.report_to else None
        next_in_s = LOOK_AGAIN_S
        if raw is not None:
            if connection is None:
                connection = KeepAliveClient(lambda _, head, body, __: answers.put_nowait((head, body)))
                port = urlsplit(instance.report_to).port or 0
                await loop.create_connection(lambda it=connection: it, "127.0.0.1", port)  # type: ignore[misc]
            if not connection.connected:
                return
            connection.send(raw)
            head, body = await answers.get()
            if head.startswith(b"HTTP/1.1 200"):
                next_in_s = json.loads(body)["next_in_s"]
        turns.append((time.monotonic() + next_in_s, instance))


if __name__ == "__main__":
    allow_many_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvloop.run(run_fleet(int(sys.argv[1])))
