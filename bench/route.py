"""How many `POST /route` a second one loadbalancer process answers, and how long the slowest wait.

    python -m bench.route [--json FILE]

Three processes: a fleet of stub instances (a real socket each, tokens in batches, load reports, and the
autoscaler's two routes), the real `loadbalancer_server.py`, and this driver, which has keep-alive
connections, one request at a time on each. The driver tells the fleet which leases it was given and the
fleet reports them as started and ended, so stock, refills, leases, work and reports all do what they
do in service. With two cores the server has one, driver and fleet have the other.

Rounds with few and many instances alternate, each against a fresh server; medians of the rounds are shown.
Processor time is the server's (user and system) per answer, everything it does in the background included.
"""

import argparse
import asyncio
import functools
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import uvloop

from http_face import allow_many_files
from remote import boot

ROOT = Path(__file__).parent.parent
BODY = b'{"prompt_tokens": 300, "max_tokens": 200}'
REQUEST = (
    b"POST /route HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
SERVED_S = 0.3
"""How long a request takes at a stub instance."""

FLEET_THROUGHPUT, HOLD_S = 3e6, 6.0
"""Work/s of all stub instances together, and seconds they may hold: 16,000 requests/s, so none is full."""


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
            if target == "/tokens":
                return self._instance.token_batch(json.loads(body)["count"])
            return self._instance.load(int(target.partition("after=")[2]))
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
                {
                    "id": i.number,
                    "state": "hot",
                    "address": f"https://127.0.0.1:{i.port + 1}",
                    "certificate": certificate(),  # each lease carries it
                    "auth_url": f"http://127.0.0.1:{i.port}",
                    "master_token": "m" * 64,
                    "throughput_work_s": FLEET_THROUGHPUT / len(self._fleet),
                    "capacity_work": HOLD_S * FLEET_THROUGHPUT / len(self._fleet),
                }
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
        sock = socket.create_server(("127.0.0.1", 0))
        fleet.append(StubInstance(number, sock.getsockname()[1]))
        servers.append(
            await loop.create_server(lambda i=fleet[-1]: StubHttp(fleet, i), sock=sock)  # type: ignore[misc]
        )
    control = await loop.create_server(lambda: StubHttp(fleet, None), "127.0.0.1", 0)
    print(control.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


# -- the driver ------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One keep-alive connection: sends, waits for the answer, notes how long it took, sends again."""

    def __init__(self, driver: "Driver") -> None:
        """driver: where the figures go."""
        self._driver = driver
        self._buffer = b""
        self._sent_at = 0.0
        self.answers = 0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by descent

    def send(self) -> None:
        """Ask once."""
        self.waiting = True
        self._sent_at = time.perf_counter()
        self._transport.write(REQUEST)

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
        took_s = time.perf_counter() - self._sent_at
        self.waiting = False
        self.answers += 1
        if self._driver.heard(self._buffer[:end], self._buffer[end + 4 :], took_s):
            self._buffer = b""
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Part of asyncio.Protocol."""
        if self.waiting:
            self._driver.lost += 1

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


class Driver:
    """What the clients were answered."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.latencies: list[float] = []
        self.refused = 0
        self.lost = 0
        self.leased: list[bytes] = []
        self.measuring = False
        self.stopped = False

    def heard(self, head: bytes, body: bytes, took_s: float) -> bool:
        """Take in an answer; whether to go on."""
        if head.startswith(b"HTTP/1.1 200"):
            at = body.index(b'"request_id": "') + 15
            of = body.index(b'"instance_id": ') + 15
            self.leased.append(body[of : body.index(b",", of)] + b":" + body[at : at + 16])
        elif self.measuring:
            self.refused += 1
        if self.measuring:
            self.latencies.append(took_s)
        return not self.stopped


@dataclass(frozen=True)
class Round:
    """What one round measured. Times in milliseconds unless named otherwise."""

    instances: int
    connections: int
    seconds: float
    answers: int
    refused: int
    lost: int
    answers_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    server_cpu_us: float
    server_cpu_share: float
    fewest_answers_of_a_connection: int


def cpu_s(pid: int) -> float:
    """Processor seconds that process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def drive(
    port: int, fleet_port: int, pid: int, instances: int, connections: int, seconds: float
) -> Round:
    """Keep so many connections busy for so long, after a second in which stocks grow to the use."""
    loop = asyncio.get_running_loop()
    driver = Driver()
    clients = [
        (await loop.create_connection(lambda: Client(driver), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    teller = asyncio.create_task(_tell(driver, fleet_port))
    for client in clients:
        client.send()
    await asyncio.sleep(1.0)
    before = {client: client.answers for client in clients}
    cpu, begun = cpu_s(pid), time.perf_counter()
    driver.measuring = True
    await asyncio.sleep(seconds)
    driver.measuring = False
    took_s, cpu = time.perf_counter() - begun, cpu_s(pid) - cpu
    fewest = min(client.answers - before[client] for client in clients)
    driver.stopped = True
    limit = time.perf_counter() + 30.0
    while any(client.waiting for client in clients) and time.perf_counter() < limit:
        await asyncio.sleep(0.01)
    driver.lost += sum(client.waiting for client in clients)
    for client in clients:
        client.waiting = False
        client.close()
    teller.cancel()
    await asyncio.gather(teller, return_exceptions=True)
    found = sorted(driver.latencies)
    return Round(
        instances=instances,
        connections=connections,
        seconds=round(took_s, 3),
        answers=len(found),
        refused=driver.refused,
        lost=driver.lost,
        answers_s=round(len(found) / took_s, 1),
        p50_ms=round(1e3 * found[len(found) // 2], 3),
        p99_ms=round(1e3 * found[int(len(found) * 0.99)], 3),
        max_ms=round(1e3 * found[-1], 3),
        server_cpu_us=round(1e6 * cpu / len(found), 1),
        server_cpu_share=round(cpu / took_s, 3),
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


def wait_stocked(port: int, instances: int, timeout_s: float = 60.0) -> None:
    """Return when every instance has tokens in stock."""
    limit = time.monotonic() + timeout_s
    stocked = -1
    while time.monotonic() < limit:
        try:
            with urlopen(f"http://127.0.0.1:{port}/status", timeout=5.0) as reply:
                rows = json.load(reply)["instances"]
            stocked = sum(row["tokens_in_stock"] > 0 for row in rows)
            if stocked == instances:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"bench.route: {stocked} of {instances} instances have tokens after {timeout_s:g} s")


def one_round(instances: int, connections: int, seconds: float) -> Round:
    """A fresh fleet and a fresh server, measured once."""
    with (
        tempfile.TemporaryDirectory() as state,
        child("-m", "bench.route", "--fleet", str(instances)) as fleet,
    ):
        assert fleet.stdout is not None
        fleet_port = int(fleet.stdout.readline())
        port = free_port()
        with child(
            "loadbalancer_server.py",
            *("--port", str(port), "--autoscaler", f"http://127.0.0.1:{fleet_port}", "--state-dir", state),
        ) as server:
            wait_stocked(port, instances)
            pin(server.pid, 0)
            pin(fleet.pid, -1)
            return uvloop.run(drive(port, fleet_port, server.pid, instances, connections, seconds))


def median_of(rounds: list[Round]) -> dict[str, Any]:
    """Each figure's median; the worst of what must not happen."""
    rows = [asdict(r) for r in rounds]
    out: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    for key in ("refused", "lost", "max_ms"):
        out[key] = max(row[key] for row in rows)
    out["fewest_answers_of_a_connection"] = min(row["fewest_answers_of_a_connection"] for row in rows)
    return out


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"{text}: wanted 1 to 100000")
    return value


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.route", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--rounds", type=_count, default=3, metavar="N", help="per row (default 3)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="of one round (default 4)")
    parser.add_argument("--few", type=_count, default=10, metavar="N", help="instances (default 10)")
    parser.add_argument("--many", type=_count, default=1000, metavar="N", help="instances (default 1000)")
    parser.add_argument("--fleet", type=_count, metavar="N", help=argparse.SUPPRESS)
    args = parser.parse_args()
    allow_many_files()
    if args.fleet is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvloop.run(run_fleet(args.fleet))
        return
    cells = [(args.few, 16), (args.many, 16), (args.few, 1000)]
    pin(0, -1)
    rounds: dict[tuple[int, int], list[Round]] = {cell: [] for cell in cells}
    for n in range(args.rounds):
        for cell in cells:
            print(
                f"round {n + 1} of {args.rounds}: {cell[0]} instances, {cell[1]} connections", file=sys.stderr
            )
            rounds[cell].append(one_round(*cell, args.seconds))
    medians = [median_of(rounds[cell]) for cell in cells]
    ratio = statistics.median(
        many.answers_s / few.answers_s for few, many in zip(rounds[cells[0]], rounds[cells[1]], strict=True)
    )
    print(
        f"{'instances':>9} {'connections':>11} {'answers/s':>9} {'p50 ms':>7} {'p99 ms':>7} {'max ms':>7} "
        f"{'CPU µs':>7} {'refused':>7} {'lost':>5} {'fewest':>7}"
    )
    for row in medians:
        print(
            f"{row['instances']:9.0f} {row['connections']:11.0f} {row['answers_s']:9.0f} "
            f"{row['p50_ms']:7.2f} {row['p99_ms']:7.2f} {row['max_ms']:7.1f} {row['server_cpu_us']:7.1f} "
            f"{row['refused']:7.0f} {row['lost']:5.0f} {row['fewest_answers_of_a_connection']:7.0f}"
        )
    print(f"{cells[1][0]} instances against {cells[0][0]}: {ratio:.3f} times the rate")
    print("CPU: of the server, per answer. fewest: answers of the connection that got fewest in one round.")
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
            "rate_ratio_many_to_few": round(ratio, 4),
            "all_rounds": [asdict(r) for cell in cells for r in rounds[cell]],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
