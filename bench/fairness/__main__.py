"""How long one client's requests take beside others that attack, against alone, and the server's memory.

    python -m bench.fairness [--json FILE]

The real `loadbalancer_server.py`, a few stub instances with known step times and real sockets in this
process, a victim with a key of its own that sends requests by the clock, and one attacker after the other
(bench/fairness/attackers.py), each against a fresh server. A request takes SERVED_S at a stub instance; what
is measured is from when it is due until it is answered, with all refusals and pauses between.
"""

import argparse
import asyncio
import secrets
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from bench.children import child, free_port, memory_mb
from bench.command import bench_parser, machine, write_json
from bench.fairness.attackers import KINDS
from bench.route.servers import RunningLoadbalancer, loadbalancer
from bench.route.stub_fleet import SERVED_S, StubHttp, StubInstance
from engine.step_time_constants import TIMINGS
from fleet_client.flags import run_main
from fleet_client.listening import allow_many_files
from web.messages.hot_set import HotTiming

INSTANCES, PLACES = 4, 32
"""Stub instances, and requests that each may run at once."""

RATE = 40.0
"""Requests a second of the victim: a tenth of what the instances serve."""

WAIT_S = 30.0
"""Seconds that the victim's requests may wait for a lease."""


@dataclass(frozen=True)
class FairnessRound:
    """What the victim met, alone and then beside an attacker. Times in milliseconds."""

    attacker: str
    alone_requests: int
    alone_p50_ms: float
    alone_p95_ms: float
    alone_mb: float
    beside_requests: int
    beside_p50_ms: float
    beside_p95_ms: float
    beside_mb: float
    refusals: int
    p95_ratio: float


class Victim:
    """A client that asks by the clock; its requests are served as soon as they have a lease."""

    def __init__(
        self, url: str, key: str, instances: list[StubInstance], http: aiohttp.ClientSession
    ) -> None:
        """url: of the loadbalancer."""
        self.refusals = 0
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._instances = instances
        self._http = http

    def begin(self) -> None:
        """Count refusals from now on."""
        self.refusals = 0

    async def ask_for(self, seconds: float) -> list[float]:
        """Send requests for so long; return how long each took, in milliseconds."""
        begun, tasks = time.perf_counter(), []
        for n in range(round(seconds * RATE)):
            await asyncio.sleep(max(0.0, begun + n / RATE - time.perf_counter()))
            tasks.append(asyncio.create_task(self._request()))
        return await asyncio.gather(*tasks)

    async def _request(self) -> float:
        begun = time.perf_counter()
        while (lease := await self._lease()) is None:
            self.refusals += 1
            await asyncio.sleep(0.5)
        self._instances[lease["instance_id"]].started(lease["request_id"], time.monotonic())
        await asyncio.sleep(SERVED_S)
        return 1e3 * (time.perf_counter() - begun)

    async def _lease(self) -> dict[str, Any] | None:
        said = {"prompt_tokens": 300, "max_tokens": 200, "wait_s": WAIT_S}
        try:
            async with self._http.post(f"{self._url}/route", json=said, headers=self._headers) as reply:
                found: dict[str, Any] = await reply.json()
                return found if reply.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def hot_set(instances: list[StubInstance]) -> dict[str, Any]:
    """Return the hot set of instances that may run PLACES requests each."""
    timing = HotTiming.of(replace(TIMINGS["13B", "awq4", "A100 SXM4", 1], max_seqs=PLACES))
    rows = [
        i.hot_row(1000.0, 10_000.0)
        | {
            "address": f"http://127.0.0.1:{i.port}",
            "certificate": None,
            "timing": msgspec.to_builtins(timing),
        }
        for i in instances
    ]
    return {
        "epoch": "fairness",
        "version": 1,
        "model": "bench",
        "prefill_weight": 0.1,
        "expected_output_tokens": 150.0,
        "expected_hot_s": None,
        "instances": rows,
    }


async def measure(
    server: RunningLoadbalancer, kind: str, keys: list[str], seconds: float, log: Path
) -> FairnessRound:
    """Measure the victim for so long alone, and for so long beside the attacker."""
    loop = asyncio.get_running_loop()
    instances: list[StubInstance] = []
    for number in range(INSTANCES):
        sock = socket.create_server(("127.0.0.1", 0))
        instances.append(StubInstance(number, sock.getsockname()[1]))
        await loop.create_server(lambda i=instances[-1]: StubHttp(instances, i), sock=sock)  # type: ignore[misc]
    url = f"http://127.0.0.1:{server.port}"
    timeout = aiohttp.ClientTimeout(total=WAIT_S + 10.0)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as http:
        control = {"Authorization": f"Bearer {server.control_key.read_text().strip()}"}
        async with http.put(f"{url}/hot", json=hot_set(instances), headers=control) as reply:
            if reply.status != 200:
                raise SystemExit(f"bench.fairness: PUT /hot: {reply.status} {await reply.text()}")
        await asyncio.to_thread(server.wait_stocked, INSTANCES)
        victim = Victim(url, keys[0], instances, http)
        await victim.ask_for(1.0)
        alone = await victim.ask_for(seconds)
        alone_mb = memory_mb(server.pid)
        command = [sys.executable, "-m", "bench.fairness.attackers", kind, str(server.port)]
        with child([*command, ",".join(keys[1:])], log):
            await asyncio.sleep(3.0)  # until it is up and has taken what it can
            victim.begin()
            beside = await victim.ask_for(seconds)
            beside_mb = memory_mb(server.pid)
    p95 = [_share(took, 0.95) for took in (alone, beside)]
    return FairnessRound(
        attacker=kind,
        alone_requests=len(alone),
        alone_p50_ms=_share(alone, 0.5),
        alone_p95_ms=p95[0],
        alone_mb=round(alone_mb, 1),
        beside_requests=len(beside),
        beside_p50_ms=_share(beside, 0.5),
        beside_p95_ms=p95[1],
        beside_mb=round(beside_mb, 1),
        refusals=victim.refusals,
        p95_ratio=round(p95[1] / p95[0], 3),
    )


def _share(took: list[float], share: float) -> float:
    return round(statistics.quantiles(took, n=100)[round(100 * share) - 1], 1)


def one_round(kind: str, seconds: float) -> FairnessRound:
    """Measure a fresh server once."""
    keys = [secrets.token_hex(16) for _ in range(3)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "client.keys")
        path.touch(mode=0o600)
        path.write_text("\n".join(keys) + "\n")
        flags = ("--client-keys-file", str(path), "--poll-interval-s", "0.2")
        with loadbalancer(free_port(), *flags) as server:
            server.wait_up()
            return uvloop.run(measure(server, kind, keys, seconds, Path(directory, "attacker.log")))


def show(rounds: list[FairnessRound]) -> None:
    """Print the table."""
    print(f"{'attacker':12} {'alone p95':>10} {'beside p95':>11} {'ratio':>6} {'refused':>8} {'MB':>11}")
    for row in rounds:
        print(
            f"{row.attacker:12} {row.alone_p95_ms:7.0f} ms {row.beside_p95_ms:8.0f} ms {row.p95_ratio:6.2f} "
            f"{row.refusals:8d} {row.alone_mb:5.0f} → {row.beside_mb:4.0f}"
        )


def _parsed() -> argparse.Namespace:
    parser = bench_parser("fairness", __doc__)
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of one part (default 10)")
    parser.add_argument("--only", choices=KINDS, help="that attacker alone (default: all)")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write JSON."""
    args = _parsed()
    allow_many_files()
    rounds = [one_round(kind, args.seconds) for kind in ([args.only] if args.only else KINDS)]
    show(rounds)
    write_json(args.json, {"machine": machine(), "rounds": [asdict(row) for row in rounds]})


if __name__ == "__main__":
    run_main(main)
