"""Whether virtual time can be believed: one short trace live on the local cloud, and in virtual time.

    python -m bench.fidelity [--runs N] [--speedup X] [--json FILE]

Live means everything but GPUs: the vastai command line, ssh, tokens, HTTP, and the paced engine, whose model
servers are of the same class as those of the simulation. So what is compared is all the rest: how the fleet
grows and shrinks, which requests are held for how long, what is billed. The trace is drawn from a seed: a
quiet minute, a rise over what one machine holds, a peak, and a fall. The cloud's times are divided by
--speedup, this machine's own (a call of the command line, a handshake) are not: the higher it is, the more
those count.
"""

import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import ROOT
from bench.command import add_counts, bench_parser, write_json
from engine.profiles import get_profile
from fleet.limits import Limits
from fleet_client.flags import run_main, within
from localcloud.durations import Times
from localcloud.machines import MACHINES
from policies import POLICIES, make_policy
from process.progress import Progress
from simulation.live.stack_config import StackConfig
from simulation.traces.reading import read
from simulation.traces.request import Request
from simulation.virtual.setting import Setting
from simulation.virtual.virtual_fleet import simulate

SPEEDUP = 20.0
POOL = 4
POLICY = "objective"
RATES = (2.0, 6.0, 10.0, 4.0, 1.5)
"""Requests a second, for SLICE_S each; one RTX 3090 or 4090 answers about four of these."""
SLICE_S = 40.0
LIVE_TIMEOUT_S = 1200.0

TARGETS = {"ttft_p50": 0.10, "ttft_p95": 0.10, "usd": 0.03}
"""Relative differences of the two that the issue allows; starts and stops must be the same."""


@dataclass(frozen=True)
class Figures:
    """What is compared. Seconds, dollars, counts."""

    ttft_p50: float
    ttft_p95: float
    usd: float
    starts: int
    stops: int
    completed: int


def trace(seed: int) -> list[Request]:
    """Return the requests, in order of time."""
    rng = random.Random(seed)
    found, at = [], 0.0
    for n, rate in enumerate(RATES):
        while True:
            at += rng.expovariate(rate)
            if at >= (n + 1) * SLICE_S:
                at = (n + 1) * SLICE_S
                break
            prompt = min(2000, max(1, round(rng.lognormvariate(5.4, 0.8))))
            output = min(1000, max(1, round(rng.lognormvariate(4.9, 0.7))))
            found.append(Request(round(at, 3), prompt, output, -1))
    first = found[0].at_s
    return [Request(r.at_s - first, *r[1:]) for r in found]


def live(path: Path, seed: int, speedup: float) -> Figures:
    """Run `sim.py --local` with that trace."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "live.json"
        command = [sys.executable, "sim.py", "--local", "--quiet", "--trace", str(path), "--json", str(out)]
        command += ["--instances", str(POOL), "--speedup", f"{speedup:g}", "--seed", str(seed)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=LIVE_TIMEOUT_S, stdout=subprocess.DEVNULL)
        report: dict[str, Any] = json.loads(out.read_text())
    return Figures(
        report["latency_s"]["ttft"]["p50"],
        report["latency_s"]["ttft"]["p95"],
        report["cost_usd"]["total"],
        report["scaling"]["starts"],
        report["scaling"]["stops"],
        report["requests"]["completed"],
    )


def virtual(path: Path, seed: int, speedup: float) -> Figures:
    """Run the same in virtual time, with the same market, times, policy, limits and autoscaler's clock."""
    stack = StackConfig()
    setting = Setting(
        profile=get_profile("vllm-13"),
        machines=MACHINES,
        limits=Limits(max_instances=stack.limit, max_usd_h=stack.max_dollars_per_hour),
        times=Times(),
        speedup=speedup,
        pool=POOL,
        hot=1,
        seed=seed,
        tells_length=True,
        turn_s=stack.poll_interval_s,
    )
    out = simulate(setting, make_policy(POLICIES, POLICY, {}, speedup), read(path))
    kinds = [kind for kind, _, _ in out.took]
    return Figures(
        out.first_token.percentile(0.5),
        out.first_token.percentile(0.95),
        out.costs.total,
        kinds.count("start"),
        kinds.count("stop"),
        out.completed,
    )


def median(figures: Sequence[Figures]) -> Figures:
    """Return each figure's median."""
    return Figures(
        *(statistics.median(getattr(f, name) for f in figures) for name in Figures.__dataclass_fields__)
    )


def main() -> None:
    """Run both and print the table."""
    parser = bench_parser("fidelity", __doc__)
    add_counts(parser, ("--runs", 3, "of each"))
    parser.add_argument(
        "--speedup", type=float, default=SPEEDUP, metavar="X", help="of the cloud (default %(default)g)"
    )
    args = parser.parse_args()
    logging.getLogger("autoscaler").setLevel(logging.ERROR)
    within("--runs", args.runs, 1, 100)
    within("--speedup", args.speedup, 1.0, 100.0)
    found: dict[str, list[Figures]] = {"live": [], "virtual": []}
    progress = Progress()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.csv"
        requests = trace(1)
        rows = (f"{r.at_s:.3f},{r.prompt_tokens},{r.output_tokens}" for r in requests)
        path.write_text("\n".join(("arrival_s,prompt_tokens,output_tokens", *rows)) + "\n")
        for n in progress.over(range(args.runs), lambda n: f"live run {n}"):
            found["live"].append(live(path, n, args.speedup))
            print(f"live    {n}: {found['live'][-1]}", flush=True)
        for n in range(max(9, args.runs)):
            found["virtual"].append(virtual(path, n, args.speedup))
        print(f"virtual 0: {found['virtual'][0]}")
    a, b = median(found["live"]), median(found["virtual"])
    print(f"{len(requests)} requests, medians of {args.runs} live and {len(found['virtual'])} virtual runs")
    print(f"{'':12}{'live':>10}{'virtual':>10}{'difference':>12}{'allowed':>10}")
    for name in Figures.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        allowed = f"{TARGETS[name]:.0%}" if name in TARGETS else "none"
        difference = f"{y / x - 1:+.1%}" if name in TARGETS else f"{y - x:+g}"
        print(f"{name:12}{x:>10.4g}{y:>10.4g}{difference:>12}{allowed:>10}")
    write_json(args.json, {kind: [vars(f) for f in figures] for kind, figures in found.items()})


if __name__ == "__main__":
    run_main(main)
