"""The whole loadbalancer process on real sockets."""

import asyncio
import hashlib
import hmac
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from bench.route.stub_fleet import StubHttp, StubInstance
from fleet_client.listening import allow_many_files, bind_socket
from tests.loadbalancer_app import (
    HOT,
    INSTANCE,
)
from tests.paths import ROOT
from tests.ports import free_port
from web.signatures import name_and_key


def wait_until(true: Callable[[], object], what: str, limit_s: float = 30.0) -> None:
    """Return when it is; fail when it is not in time."""
    limit = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < limit, f"waited {limit_s:g} s for: {what}"
        time.sleep(0.01)


class StubFleet:
    """Stub instances and a stub autoscaler on real sockets, in a thread."""

    def __init__(self, count: int) -> None:
        self.instances: list[StubInstance] = []
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._count = count
        self.port = 0
        self._thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        servers = []
        for number in range(self._count):
            instance = StubInstance(number, free_port())
            self.instances.append(instance)
            servers.append(
                await self.loop.create_server(
                    lambda i=instance: StubHttp(self.instances, i),  # type: ignore[misc]
                    "127.0.0.1",
                    instance.port,
                )
            )
        servers.append(await self.loop.create_server(lambda: StubHttp(self.instances, None), "127.0.0.1", 0))
        self.port = servers[-1].sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        for server in servers:
            server.close()

    def __enter__(self) -> "StubFleet":
        self._thread.start()
        self._ready.wait(20.0)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20.0)
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


class Process:
    """A running loadbalancer."""

    def __init__(self, port: int, process: "subprocess.Popen[str]", state_dir: Path) -> None:
        self.port = port
        self.process = process
        self.control = state_dir / "control.key"

    def call(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        """One request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20.0)
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def status(self) -> Any:
        """GET /status, or None while the process does not listen."""
        try:
            return self.call("GET", "/status")[1]
        except OSError:
            return None


@contextmanager
def loadbalancer(autoscaler_port: int, state_dir: Path, *flags: str) -> Iterator[Process]:
    """A loadbalancer process; it must end by itself on SIGTERM."""
    port = free_port()
    command = ["--port", str(port), "--autoscaler", f"http://127.0.0.1:{autoscaler_port}"]
    with subprocess.Popen(
        [sys.executable, "loadbalancer_server.py", *command, "--state-dir", str(state_dir), *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    ) as process:
        made = Process(port, process, state_dir)
        try:
            wait_until(made.status, "the loadbalancer to listen")
            yield made
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=20.0)
        assert code == 0


def test_a_loadbalancer_finds_its_fleet_serves_it_and_learns_how_requests_end(tmp_path: Path) -> None:
    with (
        StubFleet(3) as fleet,
        loadbalancer(fleet.port, tmp_path / "state", "--poll-interval-s", "0.2") as it,
    ):
        wait_until(lambda: len([i for i in it.status()["instances"] if i["in_queue"]]) == 3, "tokens")
        leases = [it.call("POST", "/route", {"prompt_tokens": 10, "max_tokens": 20}) for _ in range(6)]
        assert {status for status, _ in leases} == {200}
        assert {x["instance_id"] for _, x in leases} == {0, 1, 2}
        for _, lease in leases[1:]:
            fleet.loop.call_soon_threadsafe(
                fleet.instances[lease["instance_id"]].started, lease["request_id"], time.monotonic()
            )
        wait_until(lambda: it.status()["ends"] == {"finished": 5}, "the ends to be reported")
        assert sum(i["unfinished"] for i in it.status()["instances"]) == 1
        unused = {"request_id": leases[0][1]["request_id"], "outcome": "unused"}
        assert it.call("POST", "/done", unused) == (200, {})
        assert sum(i["unfinished"] for i in it.status()["instances"]) == 0
        assert it.control.stat().st_mode & 0o777 == 0o600


def test_those_who_wait_are_served_when_an_instance_becomes_hot_and_told_at_the_end(tmp_path: Path) -> None:
    """Nobody answers on the autoscaler's port: the hot set comes by PUT."""
    with StubFleet(1) as fleet, loadbalancer(free_port(), tmp_path / "state") as it:
        answers: list[tuple[int, Any]] = []

        def wait(work: float) -> None:
            answers.append(it.call("POST", "/route", {"work": work, "wait_s": 60}))

        threads = [threading.Thread(target=wait, args=(10.0,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        wait_until(lambda: it.status()["held"] == 20, "20 to wait")
        assert it.status()["demand"] > 0.0
        gone = http.client.HTTPConnection("127.0.0.1", it.port, timeout=20.0)
        gone.request("POST", "/route", json.dumps({"work": 10.0, "wait_s": 60}))
        wait_until(lambda: it.status()["held"] == 21, "the 21st to wait")
        gone.close()
        wait_until(lambda: it.status()["held"] == 20, "the 21st to be forgotten")
        hot = {
            **HOT,
            "instances": [{**INSTANCE, "auth_url": f"http://127.0.0.1:{fleet.instances[0].port}"}],
        }
        key = it.control.read_text().strip()
        assert it.call("PUT", "/hot", hot, key)[0] == 200
        for thread in threads:
            thread.join(20.0)
        assert [status for status, _ in answers] == [200] * 20
        assert len({lease["token"] for _, lease in answers}) == 20
        last = threading.Thread(target=wait, args=(5000.0,))
        last.start()
        wait_until(lambda: it.status()["held"] == 1, "the last to wait")
        it.process.send_signal(signal.SIGTERM)
        last.join(20.0)
        assert (answers[-1][0], answers[-1][1]["error"]) == (503, "shutting_down")


@pytest.mark.alone
def test_an_instance_that_does_not_answer_delays_nobody(tmp_path: Path) -> None:
    """Its port takes connections and never says a word; the other instance serves meanwhile."""
    with (
        bind_socket("127.0.0.1", 0) as silent,
        StubFleet(1) as fleet,
        loadbalancer(free_port(), tmp_path / "state") as it,
    ):
        hot = {
            **HOT,
            "instances": [
                {**INSTANCE, "id": 1, "auth_url": f"http://127.0.0.1:{silent.getsockname()[1]}"},
                {**INSTANCE, "id": 2, "auth_url": f"http://127.0.0.1:{fleet.instances[0].port}"},
            ],
        }
        assert it.call("PUT", "/hot", hot, it.control.read_text().strip())[0] == 200
        wait_until(lambda: any(i["in_queue"] for i in it.status()["instances"]), "tokens of the other")
        begun = time.monotonic()
        answers = [it.call("POST", "/route", {"work": 1.0}) for _ in range(40)]
        assert {(status, lease["instance_id"]) for status, lease in answers} == {(200, 2)}
        assert time.monotonic() - begun < 4.0, "a refill that hangs takes 5 s"


class Waiting(asyncio.Protocol):
    """One connection on which a request waits; everything that comes back is kept."""

    def __init__(self, body: bytes) -> None:
        self.got = b""
        self._body = body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        head = b"POST /route HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % len(self._body) + self._body)

    def data_received(self, data: bytes) -> None:
        self.got += data


def memory_mb(pid: int) -> float:
    """What that process has in memory, at most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def held_status(port: int) -> dict[str, Any]:
    """GET /status without blocking this loop."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    raw = await reader.read()
    writer.close()
    said: dict[str, Any] = json.loads(raw.partition(b"\r\n\r\n")[2])
    return said


async def until(true: Callable[[], Awaitable[object]], what: str, limit_s: float = 60.0) -> None:
    """Return when it is."""
    limit = time.monotonic() + limit_s
    while not await true():
        assert time.monotonic() < limit, f"waited {limit_s:g} s for: {what}"
        await asyncio.sleep(0.05)


@pytest.mark.alone
def test_five_thousand_wait_in_one_process_and_a_replaced_hot_set_loses_none_and_answers_none_twice(
    tmp_path: Path,
) -> None:
    """Real connections of all classes; 200 clients go away; the hot set changes while others are served.

    All are one client by their address, which may have nine tenths of the places.
    """
    allow_many_files()
    fleet_size, many, away = 16, 5000, 200

    def hot(version: int, start: int) -> dict[str, Any]:
        members = [
            {
                **INSTANCE,
                "id": i.number,
                "auth_url": f"http://127.0.0.1:{i.port}",
                "throughput_work_s": 1e5,
                "capacity_work": 1e6,
            }
            for i in (fleet.instances[(start + n) % fleet_size] for n in range(6))
        ]
        return {**HOT, "version": version, "instances": members}

    async def run(it: Process, key: str) -> None:
        loop = asyncio.get_running_loop()

        async def holds(n: int) -> bool:
            return bool((await held_status(it.port))["held"] == n)

        async def put(version: int, start: int) -> None:
            status, said = await asyncio.to_thread(it.call, "PUT", "/hot", hot(version, start), key)
            assert (status, said["taken"]) == (200, True)

        clients: list[Waiting] = []
        for n in range(many):
            body = json.dumps({"work": 1.0, "wait_s": 90, "priority": ("high", "normal", "low")[n % 3]})
            _, client = await loop.create_connection(
                lambda body=body: Waiting(body.encode()),  # type: ignore[misc]
                "127.0.0.1",
                it.port,
            )
            clients.append(client)
        await until(lambda: holds(many), "all to be held")
        status = await held_status(it.port)
        assert status["demand"] > 0.0
        code, said = await asyncio.to_thread(it.call, "POST", "/route", {"work": 1.0, "wait_s": 90})
        assert (code, said["error"]) == (503, "nothing_hot"), "beyond the bound"
        assert said["retry_after_s"] >= 1.0
        for client in clients[:: many // away]:
            client.transport.close()
        await until(lambda: holds(many - away), "those who went away to be forgotten")
        stay = [c for n, c in enumerate(clients) if n % (many // away)]
        for version in range(1, 9):
            await put(version, 2 * version)
            await asyncio.sleep(0.1)

        async def all_answered() -> bool:
            return all(b"\r\n\r\n" in c.got for c in stay)

        await until(all_answered, "all to be answered")
        await asyncio.sleep(0.3)
        leases = []
        for client in stay:
            assert client.got.count(b"HTTP/1.1 ") == 1
            head, _, payload = client.got.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            leases.append(json.loads(payload))
        assert len({lease["token"] for lease in leases}) == many - away
        assert len({lease["request_id"] for lease in leases}) == many - away
        for client in stay:
            client.transport.close()
        assert memory_mb(it.process.pid) < 500.0
        assert await holds(0)

    with (
        StubFleet(fleet_size) as fleet,
        loadbalancer(free_port(), tmp_path / "state", "--max-held", str(many * 10 // 9)) as it,
    ):
        begun = time.monotonic()
        asyncio.run(run(it, it.control.read_text().strip()))
        print(f"took {time.monotonic() - begun:.1f} s, {memory_mb(it.process.pid):.0f} MB")


@pytest.mark.alone
def test_a_report_that_an_instance_pushes_wakes_who_waits(tmp_path: Path) -> None:
    """A request has ended there: the next one is given its place before any poll is due."""
    with (
        StubFleet(1) as fleet,
        loadbalancer(free_port(), tmp_path / "state", "--poll-interval-s", "60") as it,
    ):
        instance = fleet.instances[0]
        member = {**INSTANCE, "auth_url": f"http://127.0.0.1:{instance.port}", "throughput_work_s": 1.0}
        key = it.control.read_text().strip()
        assert it.call("PUT", "/hot", {**HOT, "instances": [member]}, key)[0] == 200
        wait_until(lambda: any(i["in_queue"] for i in it.status()["instances"]), "tokens")
        _, first = it.call("POST", "/route", {"work": 1000.0})
        took: list[float] = []

        def wait() -> None:
            assert it.call("POST", "/route", {"work": 1000.0, "wait_s": 60})[0] == 200
            took.append(time.perf_counter())

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: it.status()["held"] == 1, "one to wait")
        said = {
            "boot_id": instance.boot_id,
            "number": 1,
            "after": 0,
            "seq": 2,
            "missed": False,
            "started": [first["request_id"]],
            "ended": [{"id": first["request_id"], "status": "finished", "output_tokens": 5}],
            "model_up": True,
        }
        raw = json.dumps(said).encode()
        begun = time.perf_counter()
        name, secret = name_and_key(member["master_token"])
        signature = hmac.new(secret.encode(), b"/report " + raw, hashlib.sha256).hexdigest()
        connection = http.client.HTTPConnection("127.0.0.1", it.port, timeout=20.0)
        connection.request("POST", "/report", raw, {"Authorization": f"Fleet {name}:{signature}"})
        assert connection.getresponse().status == 200
        connection.close()
        thread.join(20.0)
        assert took[0] - begun < 0.5, "2 ms here"


OPENS_MANY = """
import resource, socket, sys
many, ready = int(sys.argv[2]), sys.stdout
resource.setrlimit(resource.RLIMIT_NOFILE, (many + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
kept = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60.0) for _ in range(many)]
print("open", flush=True)
sys.stdin.read()
"""
"""A client that opens many connections and sends nothing on any, until its input ends."""


def test_idle_connections_without_a_byte_take_no_memory_and_keep_nobody_out(tmp_path: Path) -> None:
    """6,000 of them; `make hostile` opens more than the process may have files."""
    with loadbalancer(free_port(), tmp_path) as it, ExitStack() as stack:
        for _ in range(200):
            assert it.call("GET", "/health")[0] == 200
        before = resident_kb(it.process.pid)
        attackers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", OPENS_MANY, str(it.port), "1000"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(6)
        ]
        for attacker in attackers:
            assert attacker.stdout is not None
            assert it.call("GET", "/health")[0] == 200
            assert attacker.stdout.readline() == b"open\n"
        assert it.call("GET", "/health")[0] == 200
        after = resident_kb(it.process.pid)
        for attacker in attackers:
            attacker.communicate(timeout=20.0)
    assert after < 1.05 * before, f"{before} kB before, {after} kB with 6,000 idle connections"


def test_bodies_without_a_key_take_no_memory(tmp_path: Path) -> None:
    """40 clients promise 32 MiB each to a route that takes as much from the autoscaler, and go on sending."""
    with loadbalancer(free_port(), tmp_path) as it, ExitStack() as stack:
        assert it.call("PUT", "/hot", key="wrong")[0] == 401
        most = before = resident_kb(it.process.pid)
        head = f"PUT /hot HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**25}\r\n\r\n".encode()
        socks = []
        for _ in range(40):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", it.port), timeout=20.0))
            sock.sendall(head + b" " * 2**16)
            assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")  # before its body has come
            sock.setblocking(False)
            socks.append(sock)
        sent, until = 0, time.monotonic() + 60.0
        while sent < 160 * 2**20:  # the server drops them slowly: some 4 MiB of each client
            assert time.monotonic() < until, f"{sent} bytes were taken"
            for sock in select.select([], socks, [], 1.0)[1]:
                with suppress(BlockingIOError):
                    sent += sock.send(b" " * 2**18)
            most = max(most, resident_kb(it.process.pid))
    assert most < 1.05 * before, f"{before} kB before, {most} kB with bodies"


def resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
