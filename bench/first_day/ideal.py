"""What a clairvoyant would have paid for the same day.

    python -m bench.first_day.ideal DAY.json

It knows every request beforehand, which machine is well, and when credit, budget or a host end: it loads the
model on just as many machines as the busiest moment needs, the cheapest ones of the market, and has just as
many hot as the requests need (bench/policies/floor.py, the same fluid model and goal as in the comparison of
policies).

    ideal = hot and starting + stopped storage of the others + (load time x price + traffic) of each machine

As the fleet's policy does (min_hot 1), it has one machine hot all the time; `free_serving_usd` is what it
would pay if it might also stop that one between two requests, which the fluid model finds worth it where
starts take no longer than the speedup leaves of them.

DAY.json is what `python -m bench.first_day` leaves: the requests by second, and the offer that was cheapest.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.policies.cases import scaled_bins
from bench.policies.floor import floor
from engine.profiles import get_profile
from engine.slo import Slo
from fleet_client.flags import run_main
from process.errors import ConfigError
from simulation.traces.request import Request
from simulation.virtual.capacity import capacity_of
from simulation.virtual.fluid.fleet import FluidFleet

GOAL = 0.99
"""Share of requests in time: that of the autoscaler's default policy."""

MIN_HOT = 1
"""Machines that are hot without any load: the default of the autoscaler's policy."""

START_SHARE = 1 / 3
"""Of a start's mean time, either way: as the local cloud draws it."""


@dataclass(frozen=True)
class DayPlayed:
    """What the ideal depends on: the requests, and the cheapest offer of the market that is well.

    arrived: (second, prompt tokens, answer tokens) of each request. Prices in dollars an hour. speedup: by it
    the local cloud divides the times of starts and loads, and the bytes that come over the network;
    download_usd: image and weights, at full size.
    """

    profile: str
    speedup: float
    gpu_name: str
    num_gpus: int
    usd_h: float
    stopped_usd_h: float
    download_usd: float
    arrived: tuple[tuple[float, int, int], ...]


def ideal_usd(day: DayPlayed, goal: float = GOAL) -> dict[str, Any]:
    """Return the dollars of the clairvoyant, and what they are spent on; ConfigError without requests."""
    if not day.arrived:
        raise ConfigError("no request in that day: nothing has to be served")
    profile = get_profile(day.profile)
    timing = profile.timing_on(day.gpu_name, day.num_gpus)
    requests = [Request(*one, session=-1) for one in day.arrived]
    seconds = math.ceil(requests[-1].at_s) + 1
    fleet = FluidFleet(
        capacity_of(profile, timing, requests, Slo()),
        start_lo_s=profile.start_time_s * (1.0 - START_SHARE) / day.speedup,
        start_hi_s=profile.start_time_s * (1.0 + START_SHARE) / day.speedup,
        load_s=profile.load_time_s / day.speedup,
        stop_s=15.0 / day.speedup,
        running_usd_h=day.usd_h,
        stopped_usd_h=day.stopped_usd_h,
    )
    least = floor(scaled_bins(requests, 1.0, timing, seconds, seed=7), goal, fleet)
    hot = np.maximum(MIN_HOT, least.schedule.astype(float))
    machines = int(hot.max())
    rises = np.diff(hot, prepend=hot[0])
    starts_s = float(rises[rises > 0].sum()) * profile.start_time_s / day.speedup
    serving = (float(hot.sum()) * least.step_s + starts_s) / 3600.0 * day.usd_h
    loading = machines * (profile.load_time_s / 3600.0 * day.usd_h + day.download_usd) / day.speedup
    return {
        "usd": serving + least.pool_usd + loading,
        "serving_usd": serving,
        "free_serving_usd": min(least.bound_usd, least.achieved_usd),
        "stopped_usd": least.pool_usd,
        "loading_usd": loading,
        "machines": machines,
        "goal": goal,
        "misses": least.misses,
    }


def day_from(path: Path) -> DayPlayed:
    """Return the day in a file that `python -m bench.first_day` left."""
    said = json.loads(path.read_text())["day"]
    return DayPlayed(**{**said, "arrived": tuple(tuple(one) for one in said["arrived"])})


def as_json(day: DayPlayed) -> dict[str, Any]:
    """Return the day as JSON for `day_from`."""
    return asdict(day)


def main() -> None:
    """Print what the clairvoyant would have paid for a day that was played."""
    parser = argparse.ArgumentParser(prog="bench.first_day.ideal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("day", type=Path, help="what `python -m bench.first_day --json FILE` left")
    print(json.dumps(ideal_usd(day_from(parser.parse_args().day)), indent=1))


if __name__ == "__main__":
    run_main(main)
