"""How long one turn of the autoscaler takes over a large fleet in which nothing changes.

    python -m bench.turn [--json FILE]

Everything is real but the command line, whose output is made beforehand: a listing with all the fields that
the service sends, start scripts included, is read, checked against the states, decided on with an hour of
demand behind it, and the ledger is asked whether there is something to write. What a turn costs besides
its CLI call is shown, whole and by part; processor time of other processes counts, so take a quiet machine.
"""

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

from autoscaler import InstanceSet
from bench.command import add_counts, bench_parser, machine, write_json
from engine.profiles import get_profile
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.health_check import HealthCheck, Verdict
from fleet.limits import Limits
from fleet.outside.ledger import Ledger
from fleet.outside.performer import Performer
from fleet.outside.start_script import StartScript, render
from fleet.outside.turns import Autoscaler
from fleet.states import State
from fleet_client.flags import run_main
from policies import Busy
from vast.cli import Cli, Endpoint
from vast.client import Vast
from web.messages.busy import BusyReport

P = ParamSpec("P")
R = TypeVar("R")

TARGET_MS = 50.0
"""Milliseconds of one turn over 500 instances, besides the CLI call."""

TURN_S = 5.0
GPUS = (
    ("RTX 4090", 24564, 0.38),
    ("RTX 3090", 24576, 0.22),
    ("L40S", 46068, 0.62),
    ("RTX A6000", 49140, 0.45),
)


UNVARYING: dict[str, Any] = {
    "image_uuid": "vllm/vllm-openai:v0.11.0",
    "image_args": [],
    "image_runtype": "ssh ssh_direc ssh_proxy",
    "template_id": None,
    "template_hash_id": None,
    "template_name": None,
    "local_ipaddrs": "192.168.1.17 172.17.0.1 \n",
    "direct_port_count": 12,
    "direct_port_start": -1,
    "direct_port_end": -1,
    "static_ip": True,
    "num_gpus": 1,
    "gpu_frac": 0.125,
    "gpu_arch": "nvidia",
    "gpu_lanes": 16,
    "gpu_mem_bw": 843.7,
    "bw_nvlink": 0.0,
    "cpu_name": "AMD EPYC 7702 64-Core Processor",
    "cpu_cores": 128,
    "cpu_cores_effective": 16.0,
    "cpu_ram": 515_000,
    "cpu_arch": "amd64",
    "mem_limit": 62.0,
    "disk_space": 40.0,
    "disk_util": -1,
    "disk_bw": 2_870.0,
    "disk_name": "Samsung SSD 980 PRO 2TB",
    "inet_up": 840.1,
    "inet_down": 901.5,
    "inet_up_cost": 0.002,
    "inet_down_cost": 0.002,
    "storage_cost": 0.1493,
    "min_bid": 0.1,
    "is_bid": False,
    "reliability2": 0.9993,
    "dlperf": 80.2,
    "dlperf_per_dphtotal": 190.3,
    "flops_per_dphtotal": 201.0,
    "total_flops": 82.6,
    "score": 310.9,
    "end_date": 1_795_000_000.0,
    "client_run_time": 14.5,
    "host_run_time": 2_592_000.0,
    "time_remaining": "",
    "time_remaining_isbid": "",
    "verification": "verified",
    "geolocation": "Norway, NO",
    "country_code": "NO",
    "hosting_type": 0,
    "external": False,
    "rentable": True,
    "os_version": "22.04",
    "mobo_name": "ROME2D32GM-2T",
    "pci_gen": 4.0,
    "pcie_bw": 24.9,
    "webpage": None,
    "logo": "/static/logos/vastai_small2.png",
    "volume_info": [],
    "credit_balance": None,
    "credit_discount": None,
    "credit_discount_max": 0.4,
    "vram_costperhour": 0.0000153,
    "cuda_max_good": 12.8,
    "driver_version": "570.86.15",
}
"""Fields of a listing's row that are the same for all instances here (vast-contract 2.11)."""


def row(number: int, *, hot: bool, rng: random.Random, start: StartScript) -> dict[str, Any]:
    """Return one instance as `show instances --raw` prints it (vast-contract 2.11)."""
    gpu, ram, usd_h = rng.choice(GPUS)
    base = round(usd_h * rng.uniform(0.8, 1.3), 4)
    storage = round(rng.uniform(0.005, 0.02), 6)
    status, cur = ("running", "running") if hot else ("exited", "stopped")
    port = 40_000 + 3 * number % 20_000
    return {
        **UNVARYING,
        "id": 7_000_000 + number,
        "machine_id": 10_000 + number // 2,
        "host_id": 50_000 + number // 8,
        "bundle_id": 900_000 + number,
        "actual_status": status,
        "intended_status": cur,
        "cur_state": cur,
        "next_state": cur,
        "status_msg": f"success, {status} vllm/vllm-openai_v0.11.0/ssh\n",
        "label": f"fleet/{number:012x}",
        "onstart": start.onstart,
        "extra_env": {"-p 3000:3000": "1", "-p 8000:8000": "1"}
        | dict(word.split("=", 1) for word in start.env.split(" ") if "=" in word),
        "ssh_host": f"ssh{number % 9}.vast.ai",
        "ssh_port": 10_000 + number,
        "ssh_idx": str(number % 9),
        "machine_dir_ssh_port": port,
        "public_ipaddr": f"63.{number // 250}.{number % 250}.11\n",
        "ports": {
            f"{inside}/tcp": [
                {"HostIp": "0.0.0.0", "HostPort": str(port + n)},  # noqa: S104 as Docker writes it
                {"HostIp": "::", "HostPort": str(port + n)},
            ]
            for n, inside in enumerate((22, 3000, 8000))
        }
        if hot
        else {},
        "gpu_name": gpu,
        "gpu_ram": ram,
        "gpu_totalram": ram,
        "gpu_util": rng.uniform(0, 100),
        "gpu_temp": rng.uniform(30, 80),
        "cpu_util": rng.uniform(0, 1),
        "mem_usage": rng.uniform(5, 40),
        "vmem_usage": rng.uniform(5, 40),
        "disk_usage": rng.uniform(10, 30),
        "dph_base": base,
        "dph_total": base + storage,
        "storage_total_cost": storage,
        "start_date": 1_763_900_000.0 + number,
        "duration": 86_400.0 + number,
        "uptime_mins": 700 if hot else None,
        "jupyter_token": "0" * 64,
        "instance": {
            "gpuCostPerHour": base if hot else 0.0,
            "diskHour": storage,
            "totalHour": (base if hot else 0.0) + storage,
        },
        "search": {"gpuCostPerHour": base, "diskHour": storage, "totalHour": base + storage},
    }


class PreparedCli(Cli):
    """Prints the same listing at every call, as two runs of the real command do, and counts its own time."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """rows: what the account has."""
        page = rows[:25]
        more = "bmV4dA==" if len(rows) > len(page) else None
        self._whole = json.dumps(rows, indent=1, sort_keys=True)
        self._page = json.dumps(
            {
                "success": True,
                "instances_found": len(page),
                "total_instances": len(rows),
                "next_token": more,
                "instances": page,
            },
            indent=1,
            sort_keys=True,
        )

    @property
    def size(self) -> int:
        """Bytes that are printed at each turn."""
        return len(self._whole) + len(self._page)

    def run(self, endpoint: Endpoint, words: Sequence[str], flags: Sequence[str] = (), **more: object) -> str:  # noqa: ARG002
        """Return what the command would have printed."""
        return self._page if any(flag.startswith("--limit") for flag in flags) else self._whole


class PartTimes:
    """Milliseconds that calls have taken, by part."""

    def __init__(self) -> None:
        """Have measured nothing."""
        self._spent: dict[str, list[float]] = {}

    def timed(self, part: str, call: Callable[P, R]) -> Callable[P, R]:
        """Return the call, measured."""

        def run(*args: P.args, **more: P.kwargs) -> R:
            begun = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                self._spent.setdefault(part, []).append((time.perf_counter() - begun) * 1e3)

        return run

    def each(self, figure: Callable[[list[float]], float]) -> dict[str, float]:
        """Return that figure of each part."""
        return {part: round(figure(ms), 3) for part, ms in self._spent.items()}


class SteadyFleet:
    """An autoscaler over a fleet, half of it hot, with an hour of demand behind it, and its own clock."""

    def __init__(self, instances: int, directory: Path, cli: Cli) -> None:
        """Take two turns, the first ones, which read prices and sizes."""
        profile = get_profile("vllm-13")
        self.vast = Vast(cli)
        self.set = InstanceSet(
            "fleet", profile, Limits(2 * instances + 1, 1e6), Deadlines.for_profile(profile)
        )
        self.hot = (instances + 1) // 2
        self.ledger = Ledger(directory / "ledger.sqlite")
        self._demand = Demand("bench")
        self._now = 1_764_000_000.0
        self.scaler = Autoscaler(
            self.set,
            Busy(min_hot=self.hot, spare=0),
            self._demand,
            self.vast,
            Performer(self.vast, profile, lambda label: label),
            self.ledger,
            lambda: self._now,
        )
        self.scaler.turn()
        for i in list(self.set):
            if i.state is State.RUNNING:
                passed = HealthCheck(i.label, self._now, Verdict.PASSED, "test prompt: 4 token(s)", 0)
                self.scaler.judge(passed)
        for _ in range(720):
            self.wait()
            self._demand.tick(self._now)
        self.scaler.turn()

    def wait(self) -> None:
        """Let the time of a turn pass; demand is the same."""
        self._now += TURN_S
        busy = 0.7 * self.hot
        report = BusyReport("lb", "bench", self.set.hot_version, busy, busy, 0, 0.0, 0, 0.0, {})
        self._demand.add_report(report, self._now)


def measure(instances: int, turns: int) -> dict[str, Any]:
    """Run so many turns over so many instances, in which nothing changes; return milliseconds by part."""
    rng = random.Random(1)
    script = render(get_profile("vllm-13"), "0" * 64)
    cli = PreparedCli([row(n, hot=n % 2 == 0, rng=rng, start=script) for n in range(instances)])
    watch = PartTimes()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        fleet = SteadyFleet(instances, Path(directory), cli)
        for part, owner, name in (
            ("read the listing", fleet.vast, "list_instances"),
            ("observe", fleet.set, "observe"),
            ("decide", fleet.set, "decide"),
        ):
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        turn = watch.timed("turn", fleet.scaler.turn)
        gc.collect()
        for _ in range(turns):
            fleet.wait()
            decision = turn()
            assert decision.commands == (), f"something changed: {decision.commands[:3]} {decision.notes}"
        assert len(fleet.set.serving()) == fleet.hot
        fleet.ledger.close()
    return {
        "instances": instances,
        "turns": turns,
        "listing_bytes": cli.size,
        "median_ms": watch.each(statistics.median),
        "worst_ms": watch.each(max),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = bench_parser("turn", __doc__)
    add_counts(parser, ("--instances", 500, "in the fleet"), ("--turns", 100, "to measure"))
    args = parser.parse_args(argv)
    result = measure(args.instances, args.turns)
    print(
        f"{args.instances} instances, {args.turns} turns, listing of {result['listing_bytes'] / 1e6:.1f} MB"
    )
    print(f"{'part':<18} {'median ms':>9} {'worst ms':>9}")
    for part in ("read the listing", "observe", "decide", "turn"):
        print(f"{part:<18} {result['median_ms'][part]:9.2f} {result['worst_ms'][part]:9.2f}")
    print(f"target: under {TARGET_MS:g} ms for 500 instances, besides the CLI call")
    write_json(args.json, {"machine": machine(), "target_ms": TARGET_MS, **result})


if __name__ == "__main__":
    run_main(main)
