"""Clients that wait: what they cost, and how soon they are answered when there is room."""

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvloop

from bench.children import cpu_s, free_port, memory_mb
from bench.route.keep_alive import KeepAliveClient, leases_in, post_route, request_of
from bench.route.rates import at_share_ms
from bench.route.servers import RunningLoadbalancer, loadbalancer, pin
from bench.route.stub_fleet import StubHttp, StubInstance, signed_push

HELD, WAKES_S, WAKING_S, BURST = 5000, 200, 5.0, 3000
"""Clients that wait, those woken a second, seconds for which they are, and clients woken at once."""

HELD_INSTANCES = 20
"""Instances: at 10 reports a second each they say 200 times that a request has ended."""

REQUEST_WORK = 100.0
"""Work of a request, and capacity of an instance while clients wait: it holds one."""


@dataclass(frozen=True)
class HeldRound:
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
        """Know their tokens, as the stub that holds them knows them."""
        self._instances = {i.number: i for i in instances}
        self._numbers = dict.fromkeys(self._instances, 0)
        self._serving: deque[tuple[int, str]] = deque()

    def note(self, leases: list[tuple[bytes, bytes]]) -> None:
        """Take note of (request id, instance id) that are served now."""
        self._serving += [(int(of), name.decode()) for name, of in leases]

    def next(self) -> bytes:
        """Return the push of the instance whose request has been there for longest."""
        number, request_id = self._serving.popleft()
        return self._push(
            number, request_id, [{"id": request_id, "status": "finished", "output_tokens": 150}]
        )

    def starts(self) -> list[bytes]:
        """Return the pushes of all that serve a request: that it has started."""
        return [self._push(number, request_id, []) for number, request_id in self._serving]

    def _push(self, number: int, request_id: str, ended: list[dict[str, Any]]) -> bytes:
        instance = self._instances[number]
        self._numbers[number] += 1
        told = {
            "boot_id": instance.boot_id,
            "number": self._numbers[number],
            "after": 0,
            "seq": 0,
            "missed": False,
            "started": [request_id],
            "ended": ended,
            "model_up": True,
        }
        return signed_push(instance, told)


class WaitingClients:
    """Clients that wait at a server, and when those that were answered were."""

    def __init__(self, server: RunningLoadbalancer, instances: list[StubInstance]) -> None:
        """Open nothing yet."""
        self.answered: list[float] = []
        self._server = server
        self._instances = instances
        self._pusher = Pusher(instances)
        self._clients: list[KeepAliveClient] = []

    def _heard(self, _: KeepAliveClient, head: bytes, body: bytes, __: float) -> None:
        if found := leases_in(head, body):
            self.answered.append(time.perf_counter())
        self._pusher.note(found)

    async def connect(self) -> KeepAliveClient:
        """Open one more connection."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(
            lambda: KeepAliveClient(self._heard), "127.0.0.1", self._server.port
        )
        self._clients.append(client)
        return client

    async def fill(self, waiting: int) -> None:
        """Have every instance serve one request, and so many clients wait."""
        request = post_route({"work": REQUEST_WORK, "wait_s": 300})
        for _ in range(len(self._instances) + waiting):
            (await self.connect()).send(
                request
            )  # at once: the server ends silent connections of whoever has many
        await asyncio.to_thread(self._server.wait_held, waiting)
        self.answered.clear()

    async def wake_one_by_one(self, wakes: int) -> list[float]:
        """Push that requests have ended, WAKES_S times a second; return seconds to each client's answer."""
        reports = await self.connect()
        pushed: list[float] = []
        due = time.perf_counter()
        for _ in range(wakes):
            due += 1.0 / WAKES_S
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            while reports.waiting:
                await asyncio.sleep(0)
            pushed.append(time.perf_counter())
            reports.send(self._pusher.next())
        await _until(lambda: len(self.answered) >= wakes)
        # One lease for each push, in their order.
        return [at - since for since, at in zip(pushed, self.answered, strict=False)]

    async def report_starts(self) -> None:
        """Push that all has started which is being served: until then it counts as unused."""
        reports = await self.connect()
        for push in self._pusher.starts():
            reports.send(push)
            while reports.waiting:
                await asyncio.sleep(0)

    async def keep(self, waiting: int) -> None:
        """Hang up all that wait but so many."""
        for client in [c for c in self._clients if c.waiting][waiting:]:
            client.close()
        await asyncio.to_thread(self._server.wait_held, waiting)
        self.answered.clear()

    def close(self) -> None:
        """Hang up all."""
        for client in self._clients:
            client.close()


def hot_set(version: int, capacity: float, instances: list[StubInstance], control: str) -> bytes:
    """Return PUT /hot with instances of that capacity."""
    told: dict[str, Any] = {
        "epoch": "held",
        "version": version,
        "model": "bench",
        "prefill_weight": 0.1,
        "expected_output_tokens": 100.0,
        "expected_hot_s": None,
        "instances": [i.hot_row(1.0, capacity) for i in instances],
    }
    return request_of("/hot", json.dumps(told).encode(), f"Authorization: Bearer {control}\r\n", "PUT")


async def hold(server: RunningLoadbalancer, instances: list[StubInstance]) -> HeldRound:
    """Fill the instances, let HELD wait, wake them one by one and then BURST at once."""
    control, pid = server.control_key.read_text().strip(), server.pid
    clients = WaitingClients(server, instances)
    autoscaler = await clients.connect()
    autoscaler.send(hot_set(1, REQUEST_WORK, instances, control))
    await _until(lambda: not autoscaler.waiting)
    await asyncio.to_thread(server.wait_stocked, len(instances))
    before = memory_mb(pid)
    await clients.fill(HELD)
    mb, cpu = memory_mb(pid), cpu_s(pid)
    await asyncio.sleep(2.0)
    share = (cpu_s(pid) - cpu) / 2.0
    wakes = round(WAKES_S * WAKING_S)
    took = await clients.wake_one_by_one(wakes)
    woken = len(clients.answered)
    await clients.keep(BURST)
    await clients.report_starts()
    cpu, begun = cpu_s(pid), time.perf_counter()
    autoscaler.send(hot_set(2, REQUEST_WORK * 2 * BURST / len(instances), instances, control))
    await _until(lambda: len(clients.answered) >= BURST)
    burst = [at - begun for at in clients.answered]
    cpu = cpu_s(pid) - cpu
    clients.close()
    return HeldRound(
        held=HELD,
        mb_before=round(before, 1),
        mb_held=round(mb, 1),
        waiting_cpu_share=round(share, 3),
        wakes=woken,
        wake_p50_ms=round(at_share_ms(took, 0.5), 2),
        wake_p99_ms=round(at_share_ms(took, 0.99), 2),
        wake_max_ms=round(at_share_ms(took, 1.0), 2),
        burst=len(burst),
        burst_first_ms=round(at_share_ms(burst, 0.0), 1),
        burst_p50_ms=round(at_share_ms(burst, 0.5), 1),
        burst_last_ms=round(at_share_ms(burst, 1.0), 1),
        burst_cpu_us=round(1e6 * cpu / max(1, len(burst)), 1),
        lost=abs(wakes - woken) + abs(BURST - len(burst)),
    )


async def _until(true: Callable[[], bool], limit_s: float = 30.0) -> None:
    limit = time.perf_counter() + limit_s
    while not true() and time.perf_counter() < limit:
        await asyncio.sleep(0.01)


def hold_round() -> HeldRound:
    """Measure a fresh server in front of instances that this process has."""

    async def run(server: RunningLoadbalancer) -> HeldRound:
        loop = asyncio.get_running_loop()
        instances: list[StubInstance] = []
        for number in range(HELD_INSTANCES):
            sock = socket.create_server(("127.0.0.1", 0))
            instances.append(StubInstance(number, sock.getsockname()[1]))
            await loop.create_server(lambda i=instances[-1]: StubHttp(instances, i), sock=sock)  # type: ignore[misc]
        return await hold(server, instances)

    # It finds no autoscaler, and asks for no reports: what happens is what is pushed.
    with loadbalancer(free_port(), "--poll-interval-s", "60", "--max-held", str(2 * HELD)) as server:
        server.wait_up()
        pin(server.pid, 0)
        return uvloop.run(run(server))
