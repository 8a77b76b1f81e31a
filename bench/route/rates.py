"""Rounds that measure the rate, the latency, and the server's processor time for each lease."""

import asyncio
import random
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.children import child, cpu_s, memory_mb, said
from bench.route.keep_alive import KeepAliveClient, leases_in, post_route, request_of
from bench.route.servers import RunningLoadbalancer, loadbalancer, pin
from process.progress import Progress

SETTLE_S = 1.0
"""Seconds before a round is measured, in which stocks grow to the use."""


@dataclass(frozen=True)
class RouteCell:
    """What one round is of. paced: by the clock, at half of the rate of the same without it."""

    instances: int
    connections: int
    batch: int = 0
    paced: bool = False


@dataclass(frozen=True)
class RateRound:
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


def at_share_ms(seconds: list[float], share: float) -> float:
    """Return the value at that share of the sorted seconds, in milliseconds; 0 for none."""
    found = sorted(seconds)
    return 1e3 * found[min(len(found) - 1, int(len(found) * share))] if found else 0.0


class RouteDriver:
    """Clients that ask, and what they were answered."""

    def __init__(self, request: bytes, *, again: bool) -> None:
        """request: what all ask. again: each asks again when it is answered."""
        self.latencies: list[float] = []
        self.lags: list[float] = []  # from when a request was due until it was sent
        self.leases = 0
        self.refused = 0
        self._request = request
        self._leased: list[bytes] = []
        self._measuring = False
        self._stopped = False
        self._clients: list[KeepAliveClient] = []
        self._again = again
        self._idle: deque[KeepAliveClient] = deque()
        self._due: deque[float] = deque()

    async def connect(self, port: int, connections: int) -> None:
        """Open them all; those that ask again and again begin at once: of many silent ones some are ended."""
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, client = await loop.create_connection(lambda: KeepAliveClient(self._heard), "127.0.0.1", port)
            self._clients.append(client)
            if self._again:
                client.send(self._request)
        self._idle.extend(self._clients)

    def _heard(self, client: KeepAliveClient, head: bytes, body: bytes, took_s: float) -> None:
        found = leases_in(head, body)
        self._leased += [b"%s:%s" % (of, name) for name, of in found]
        if self._measuring:
            self.latencies.append(took_s)
            self.leases += len(found)
            self.refused += not found
        if self._stopped:
            return
        if self._again:
            client.send(self._request)
        elif self._due:
            client.send(self._request, self._due.popleft())
        else:
            self._idle.append(client)

    async def pace(self, rate: float, rng: random.Random) -> None:
        """Send by the clock, so many a second on average; on the first connection that is free."""
        due = time.perf_counter()
        while not self._stopped:
            while due <= time.perf_counter():
                if self._idle:
                    if self._measuring:
                        self.lags.append(time.perf_counter() - due)
                    self._idle.popleft().send(self._request, due)
                else:
                    self._due.append(due)
                due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def measure(self, seconds: float) -> int:
        """Count what is answered for so long; return the answers of the connection with fewest."""
        before = [client.answers for client in self._clients]
        self._measuring = True
        await asyncio.sleep(seconds)
        self._measuring = False
        return min(client.answers - n for client, n in zip(self._clients, before, strict=True))

    async def stop(self) -> int:
        """Ask no more and hang up; return how many requests had no answer."""
        self._stopped = True
        limit = time.perf_counter() + 30.0
        while any(client.waiting for client in self._clients) and time.perf_counter() < limit:
            await asyncio.sleep(0.01)
        lost = sum(client.waiting for client in self._clients)
        for client in self._clients:
            client.close()
        return lost

    async def tell(self, fleet_port: int) -> None:
        """Tell the fleet ten times a second which leases are being used."""
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet_port)
        try:
            while True:
                await asyncio.sleep(0.1)
                body = b"\n".join(self._leased)
                self._leased.clear()
                writer.write(request_of("/leased", body))
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
        finally:
            writer.close()


async def drive(
    server: RunningLoadbalancer, fleet_port: int, cell: RouteCell, seconds: float, rate: float | None
) -> RateRound:
    """Keep the connections busy for so long. rate: requests a second where they come by the clock."""
    body: dict[str, Any] = {"prompt_tokens": 300, "max_tokens": 200}
    if cell.batch:
        body["count"] = cell.batch
    driver = RouteDriver(post_route(body), again=rate is None)
    await driver.connect(server.port, cell.connections)
    tasks = [asyncio.create_task(driver.tell(fleet_port))]
    if rate is not None:
        tasks.append(asyncio.create_task(driver.pace(rate, random.Random(1))))
    await asyncio.sleep(SETTLE_S)
    cpu, begun = cpu_s(server.pid), time.perf_counter()
    fewest = await driver.measure(seconds)
    took_s, cpu = time.perf_counter() - begun, cpu_s(server.pid) - cpu
    mb = memory_mb(server.pid)
    lost = await driver.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return RateRound(
        instances=cell.instances,
        connections=cell.connections,
        batch=cell.batch,
        due_s=round(rate or 0.0, 1),
        seconds=round(took_s, 3),
        answers=len(driver.latencies),
        refused=driver.refused,
        lost=lost,
        leases_s=round(driver.leases / took_s, 1),
        p50_ms=round(at_share_ms(driver.latencies, 0.5), 3),
        p99_ms=round(at_share_ms(driver.latencies, 0.99), 3),
        max_ms=round(at_share_ms(driver.latencies, 1.0), 3),
        lag_p99_ms=round(at_share_ms(driver.lags, 0.99), 3),
        server_cpu_us=round(1e6 * cpu / max(1, driver.leases), 1),
        server_cpu_share=round(cpu / took_s, 3),
        server_mb=round(mb, 1),
        fewest_answers_of_a_connection=fewest,
    )


def one_round(cell: RouteCell, seconds: float, rate: float | None) -> RateRound:
    """Measure a fresh fleet and a fresh server once."""
    command = [sys.executable, "-m", "bench.route.stub_fleet", str(cell.instances)]
    with tempfile.TemporaryDirectory() as directory, child(command, Path(directory, "log")) as fleet:
        fleet_port = int(said("the fleet", fleet, r"^(\d+)\n"))
        with loadbalancer(fleet_port) as server:
            server.wait_stocked(cell.instances)
            pin(server.pid, 0)
            pin(fleet.pid, -1)
            return uvloop.run(drive(server, fleet_port, cell, seconds, rate))


def measure_rates(cells: list[RouteCell], rounds: int, seconds: float) -> dict[RouteCell, list[RateRound]]:
    """Measure rounds of all cells by turns; a paced one after the one whose rate it takes."""
    found: dict[RouteCell, list[RateRound]] = {cell: [] for cell in cells}
    for cell in Progress().over([cell for _ in range(rounds) for cell in cells]):
        rate = None
        if cell.paced:
            closed = found[RouteCell(cell.instances, cell.connections, cell.batch)][-1]
            rate = 0.5 * closed.leases_s / max(1, cell.batch)
        found[cell].append(one_round(cell, seconds, rate))
    return found
