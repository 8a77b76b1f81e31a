"""How long one turn of the autoscaler takes over a large fleet in which nothing changes.

    python -m bench.turn [--json FILE]

Everything is real but the command line, whose output is made beforehand: a listing with all the fields that
the service sends, start scripts included, is read, checked against the states, decided on with an hour of
demand behind it, and the ledger is asked whether there is something to write. What a turn costs besides
its CLI call is shown, whole and by part; processor time of other processes counts, so take a quiet machine.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoscaler import InstanceSet
from engine.profiles import get_profile
from fleet.deadlines import Deadlines
from fleet.demand import Demand, Report
from fleet.health_check import HealthCheck, Verdict
from fleet.limits import Limits
from fleet.outside.ledger import Ledger
from fleet.outside.performer import Performer
from fleet.outside.start_script import render
from fleet.outside.turns import Autoscaler
from fleet.states import State
from policies import Busy
from vast.cli import Cli, Endpoint
from vast.client import Vast

TARGET_MS = 50.0
"""Of one turn over 500 instances, besides the CLI call."""

TURN_S = 5.0
GPUS = (
    ("RTX 4090", 24564, 0.38),
    ("RTX 3090", 24576, 0.22),
    ("L40S", 46068, 0.62),
    ("RTX A6000", 49140, 0.45),
)


def row(number: int, *, hot: bool, rng: random.Random, onstart: str) -> dict[str, Any]:
    """One instance as `show instances --raw` prints it (vast-contract 2.11)."""
    gpu, ram, usd_h = rng.choice(GPUS)
    base = round(usd_h * rng.uniform(0.8, 1.3), 4)
    storage = round(rng.uniform(0.005, 0.02), 6)
    status, cur = ("running", "running") if hot else ("exited", "stopped")
    port = 40_000 + 3 * number % 20_000
    return {
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
        "image_uuid": "vllm/vllm-openai:v0.11.0",
        "image_args": [],
        "image_runtype": "ssh ssh_direc ssh_proxy",
        "extra_env": {"-p 3000:3000": "1", "-p 8000:8000": "1"},
        "onstart": onstart,
        "template_id": None,
        "template_hash_id": None,
        "template_name": None,
        "ssh_host": f"ssh{number % 9}.vast.ai",
        "ssh_port": 10_000 + number,
        "ssh_idx": str(number % 9),
        "machine_dir_ssh_port": port,
        "public_ipaddr": f"63.{number // 250}.{number % 250}.11\n",
        "local_ipaddrs": "192.168.1.17 172.17.0.1 \n",
        "ports": {
            f"{inside}/tcp": [
                {"HostIp": "0.0.0.0", "HostPort": str(port + n)},  # noqa: S104 as Docker writes it
                {"HostIp": "::", "HostPort": str(port + n)},
            ]
            for n, inside in enumerate((22, 3000, 8000))
        }
        if hot
        else {},
        "direct_port_count": 12,
        "direct_port_start": -1,
        "direct_port_end": -1,
        "static_ip": True,
        "num_gpus": 1,
        "gpu_name": gpu,
        "gpu_ram": ram,
        "gpu_totalram": ram,
        "gpu_frac": 0.125,
        "gpu_arch": "nvidia",
        "gpu_lanes": 16,
        "gpu_mem_bw": 843.7,
        "gpu_util": rng.uniform(0, 100),
        "gpu_temp": rng.uniform(30, 80),
        "bw_nvlink": 0.0,
        "cpu_name": "AMD EPYC 7702 64-Core Processor",
        "cpu_cores": 128,
        "cpu_cores_effective": 16.0,
        "cpu_ram": 515_000,
        "cpu_util": rng.uniform(0, 1),
        "cpu_arch": "amd64",
        "mem_limit": 62.0,
        "mem_usage": rng.uniform(5, 40),
        "vmem_usage": rng.uniform(5, 40),
        "disk_space": 40.0,
        "disk_usage": rng.uniform(10, 30),
        "disk_util": -1,
        "disk_bw": 2_870.0,
        "disk_name": "Samsung SSD 980 PRO 2TB",
        "inet_up": 840.1,
        "inet_down": 901.5,
        "inet_up_cost": 0.002,
        "inet_down_cost": 0.002,
        "dph_base": base,
        "dph_total": base + storage,
        "storage_cost": 0.1493,
        "storage_total_cost": storage,
        "min_bid": 0.1,
        "is_bid": False,
        "reliability2": 0.9993,
        "dlperf": 80.2,
        "dlperf_per_dphtotal": 190.3,
        "flops_per_dphtotal": 201.0,
        "total_flops": 82.6,
        "score": 310.9,
        "start_date": 1_763_900_000.0 + number,
        "end_date": 1_795_000_000.0,
        "duration": 86_400.0 + number,
        "uptime_mins": 700 if hot else None,
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
        "jupyter_token": "0" * 64,
        "cuda_max_good": 12.8,
        "driver_version": "570.86.15",
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
        """What the command would have printed."""
        return self._page if any(flag.startswith("--limit") for flag in flags) else self._whole


@dataclass(frozen=True)
class Result:
    """Milliseconds of a turn and of its parts: median and worst."""

    instances: int
    turns: int
    listing_bytes: int
    median_ms: dict[str, float]
    worst_ms: dict[str, float]


def measure(instances: int, turns: int) -> Result:
    """Run so many turns over so many instances, half of them hot; nothing may change in any of them."""
    rng = random.Random(1)
    profile = get_profile("vllm-13")
    script = render(profile, "0" * 64)
    cli = PreparedCli([row(n, hot=n % 2 == 0, rng=rng, onstart=script) for n in range(instances)])
    now = [1_764_000_000.0]
    spent: dict[str, list[float]] = {}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                spent.setdefault(part, []).append((time.perf_counter() - begun) * 1e3)

        return run

    with tempfile.TemporaryDirectory() as directory:
        vast = Vast(cli)
        fleet = InstanceSet("fleet", profile, Limits(2 * instances + 1, 1e6), Deadlines.for_profile(profile))
        demand = Demand("bench")
        ledger = Ledger(Path(directory) / "ledger.sqlite")
        hot = (instances + 1) // 2
        scaler = Autoscaler(
            fleet,
            Busy(min_hot=hot, spare=0),
            demand,
            vast,
            Performer(vast, profile, lambda label: label),
            ledger,
            lambda: now[0],
        )
        scaler.turn()
        for i in list(fleet):
            if i.state is State.RUNNING:
                scaler.judge(HealthCheck(i.label, now[0], Verdict.PASSED, "test prompt: 4 token(s)", 0))
        for _ in range(720):  # an hour of demand
            now[0] += TURN_S
            demand.add_report(
                Report("lb", "bench", fleet.hot_version, 0.7 * hot, 0.7 * hot, 0, 0, 0.0), now[0]
            )
            demand.tick(now[0])
        scaler.turn()  # reads prices and sizes for the first time
        vast.list_instances = timed("read the listing", vast.list_instances)  # type: ignore[method-assign]
        fleet.observe = timed("observe", fleet.observe)  # type: ignore[method-assign]
        fleet.decide = timed("decide", fleet.decide)  # type: ignore[method-assign]
        turn = timed("turn", scaler.turn)
        gc.collect()
        for _ in range(turns):
            now[0] += TURN_S
            demand.add_report(
                Report("lb", "bench", fleet.hot_version, 0.7 * hot, 0.7 * hot, 0, 0, 0.0), now[0]
            )
            decision = turn()
            assert decision.commands == (), f"something changed: {decision.commands[:3]} {decision.notes}"
        assert len(fleet.serving()) == hot
        ledger.close()
    return Result(
        instances,
        turns,
        cli.size,
        {part: round(statistics.median(ms), 3) for part, ms in spent.items()},
        {part: round(max(ms), 3) for part, ms in spent.items()},
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.turn", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--instances", type=int, default=500, metavar="N", help="in the fleet (default 500)")
    parser.add_argument("--turns", type=int, default=100, metavar="N", help="to measure (default 100)")
    args = parser.parse_args(argv)
    result = measure(args.instances, args.turns)
    print(
        f"{result.instances} instances, {result.turns} turns, listing of {result.listing_bytes / 1e6:.1f} MB"
    )
    print(f"{'part':<18} {'median ms':>9} {'worst ms':>9}")
    for part in ("read the listing", "observe", "decide", "turn"):
        print(f"{part:<18} {result.median_ms[part]:9.2f} {result.worst_ms[part]:9.2f}")
    print(f"target: under {TARGET_MS:g} ms for 500 instances, besides the CLI call")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        args.json.write_text(
            json.dumps({"machine": machine, "target_ms": TARGET_MS, **vars(result)}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
