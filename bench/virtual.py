"""The step-level simulator: how fast it is, and whether the comparison of policies holds in it.

    python -m bench.virtual [--traces DIR] [--part speed,policies] [--json FILE]

speed      a million requests over 50 instances, and a log of two days: seconds, microseconds a request, and
           how much memory grows from half of the requests to all of them
policies   on the logs of an hour at about 3 instances: ours, tuned by replay on what it has seen, against
           peers with their knob chosen in hindsight, all with the real loadbalancer and autoscaler
"""

import logging
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import add_traces, bench_parser, names_in, write_json
from bench.policies.cases import GPUS, START_SHARE, TRACES, read_log
from bench.policies.peers.registry import PEERS, runs
from engine.profiles import get_profile
from engine.slo import Slo
from fleet.limits import Limits
from fleet_client.flags import run_main
from localcloud.machines import Machine
from policies import Fixed, FleetSnapshot, Objective, Policy, Targets
from process.progress import Progress
from simulation.traces import logs
from simulation.traces.reading import read
from simulation.traces.request import Request
from simulation.virtual.capacity import capacity_of
from simulation.virtual.cloud import times_for
from simulation.virtual.outcome import Outcome
from simulation.virtual.setting import Setting
from simulation.virtual.virtual_fleet import simulate

GOAL = 0.99
NEED = 3.0
PEER_NAMES = ("fixed / own", "vast / own", "dynamo-kalman / with pool")
KNOBS = 5
"""Knobs of a sweep that are tried, evenly over it."""


class PeerAtInterval:
    """A peer that is asked at its own interval; between, its last answer stands."""

    def __init__(self, peer: Any) -> None:
        """peer: a fresh one."""
        self._peer = peer
        self._next = float("-inf")
        self._said = Targets(0, 0, "not asked yet")
        self.memory_s = peer.memory_s

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return the peer's targets."""
        if seen.now >= self._next:
            self._next = seen.now + self._peer.tick_s
            self._said = self._peer.targets(seen)
        return self._said

    def scaled(self, speedup: float) -> "PeerAtInterval":
        """Return the same with its times divided."""
        return PeerAtInterval(self._peer.scaled(speedup))


def setting(profile_name: str, **changes: Any) -> Setting:
    """Return a market of one kind of machine, as the comparison in the fluid model has it."""
    gpu, count, usd_h = GPUS[profile_name]
    profile = get_profile(profile_name)
    machines = [
        Machine(5000 + n, gpu, usd_h / count, num_gpus=count, slots=64, disk_gb=1e5) for n in range(8)
    ]
    base = Setting(
        profile=profile,
        machines=machines,
        limits=Limits(max_instances=400, max_usd_h=1e6, max_creates_per_turn=8),
        times=times_for(profile, START_SHARE[profile_name]),
        seed=1,
    )
    return replace(base, **changes)


# -- speed -----------------------------------------------------------------------------------------------


def poisson(rate: float, count: int) -> Iterator[Request]:
    """Yield arrivals of the usual lengths. Drawn by the thousand: one by one it would take 3 µs a request."""
    rng = np.random.default_rng(1)
    at = 0.0
    for drawn in range(0, count, 1000):
        few = min(1000, count - drawn)
        times = at + np.cumsum(rng.exponential(1.0 / rate, few))
        at = float(times[-1])
        prompts = np.clip(np.rint(rng.lognormal(5.4, 0.8, few)), 1, 4000).astype(int)
        outputs = np.clip(np.rint(rng.lognormal(4.9, 0.7, few)), 1, 2000).astype(int)
        for came, prompt, output in zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True):
            yield Request(came, prompt, output, -1)


def memory_mb() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def speed(directory: Path) -> dict[str, Any]:
    """Measure both runs; print a line each."""
    found: dict[str, Any] = {}
    instances, rate = 50, 300.0
    half_mb = 0.0
    for count in (500_000, 1_000_000):
        begun = time.process_time()
        out = simulate(
            setting("vllm-13", hot=instances, pool=instances),
            Fixed(instances, instances),
            poisson(rate, count),
        )
        took = time.process_time() - begun
        grown = memory_mb() - half_mb
        half_mb = memory_mb()
        print(
            f"{count:,} requests, {instances} instances, {out.duration_s:.0f} s of traffic: {took:.1f} s of "
            f"one core, {1e6 * took / count:.0f} µs a request, {half_mb:.0f} MB"
        )
    found["million"] = {"seconds": took, "mb": half_mb, "mb_more_for_the_second_half": grown}
    path = directory / TRACES["m-small"]
    begun = time.process_time()
    out = simulate(setting("vllm-13", hot=1, pool=4), Fixed(1, 4), read(path))
    took = time.process_time() - begun
    print(f"{out.requests:,} requests of two days, a fixed fleet: {took:.1f} s of one core")
    found["two_days"] = {"seconds": took, "requests": out.requests}
    begun = time.process_time()
    out = simulate(setting("vllm-13", hot=1, pool=4), Objective(goal=GOAL), read(path))
    took = time.process_time() - begun
    print(f"the same with the objective and its 95 replays: {took:.1f} s; {out.missed_share:.2%} missed")
    found["two_days_objective"] = {"seconds": took, "missed": out.missed_share}
    return found


# -- policies --------------------------------------------------------------------------------------------


def scored(out: Outcome) -> dict[str, float]:
    """Return what is compared."""
    waits = out.late_wait.spread()
    return {
        "usd": out.costs.total,
        "misses": out.missed_share,
        "late_p50_s": waits["p50"] or 0.0,
        "late_max_s": waits["max"] or 0.0,
    }


def compare(directory: Path, name: str, lane: bool) -> dict[str, Any]:
    """Run all policies on one log, in one discipline."""
    log = read_log(directory / TRACES[name], 3.0 if name == "mooncake" else 0.0)
    profile = get_profile("vllm-13")
    gpu, count, _ = GPUS["vllm-13"]
    capacity = capacity_of(profile, profile.timing_on(gpu, count), islice(log, 20_000), Slo())
    work = sum(profile.prefill_weight * r.prompt_tokens + r.output_tokens for r in log)
    scale = NEED * capacity.work_s * log[-1].at_s / work
    base = setting(
        "vllm-13",
        hot=3,
        pool=15,
        score_from_s=log[-1].at_s // 2,
        score_to_s=log[-1].at_s,
        late_bound_s=300.0 if lane else None,
    )

    def play(policy: Policy) -> dict[str, float]:
        requests = logs.scaled(log, scale, logs.JITTER_S, random.Random(7))
        return scored(simulate(base, policy, requests))

    found: dict[str, Any] = {"ours": play(Objective(goal=GOAL)), "peers": {}}
    for line in PEER_NAMES:
        peer_name, actuator = line.split(" / ")
        peer = PEERS[peer_name]
        knobs = [knob for knob, _ in peer.sweep(capacity) if peer_name != "fixed" or knob <= 14]
        points = []
        for knob in knobs[:: max(1, len(knobs) // KNOBS)]:
            make: Callable[[], Any] = dict(runs(peer, partial(peer.at, knob)))[actuator]
            points.append({"knob": knob, **play(PeerAtInterval(make()))})
        kept = [p for p in points if p["misses"] <= 1.0 - GOAL]
        found["peers"][line] = {"points": points, "best": min(kept, key=lambda p: p["usd"], default=None)}
    return found


def policies(directory: Path) -> dict[str, Any]:
    """Run every log and discipline; print a table."""
    found: dict[str, Any] = {}
    cells = [(name, lane) for name in ("code", "conv", "mooncake") for lane in (False, True)]
    for name, lane in Progress().over(cells, lambda cell: cell[0]):
        key = f"{name}, {'late lane' if lane else 'one line'}"
        found[key] = line = compare(directory, name, lane)
        ours = line["ours"]
        print(
            f"{key}: ours ${ours['usd']:.2f}, {ours['misses']:.2%} missed, the late waited "
            f"{ours['late_p50_s']:.0f} s (p50), {ours['late_max_s']:.0f} at most"
        )
        for peer, of in line["peers"].items():
            best = of["best"]
            if best is None:
                nearest = min(of["points"], key=lambda p: p["misses"])
                shown = f"never; fewest misses {nearest['misses']:.2%} for ${nearest['usd']:.2f}"
            else:
                shown = f"${best['usd']:.2f} at {best['misses']:.2%} with knob {best['knob']:.3g}"
            print(f"    {peer:28}{shown}", flush=True)
    return found


def main() -> None:
    """Run both parts."""
    parser = bench_parser("virtual", __doc__)
    add_traces(parser)
    parser.add_argument("--part", default="speed,policies", metavar="NAME,…", help="(default %(default)s)")
    args = parser.parse_args()
    logging.getLogger("autoscaler").setLevel(logging.ERROR)
    parts = {"speed": speed, "policies": policies}
    write_json(args.json, {part: parts[part](args.traces) for part in names_in("--part", args.part, parts)})


if __name__ == "__main__":
    run_main(main)
