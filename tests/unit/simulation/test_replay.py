"""The level is found by replaying: it keeps the goal, and costs more for a stricter one."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policies import Capacity, Objective
from process.errors import ConfigError
from simulation.virtual.fluid.bins import Bins
from simulation.virtual.fluid.fleet import FluidFleet
from simulation.virtual.fluid.run import run_fluid
from simulation.virtual.replay import K_MOST, LEAST_SLOW_S, answer, ladder, tune
from tests.paths import ROOT

FLEET = FluidFleet(Capacity(100.0, 1.0, 10.0, 1e6), 60.0, 120.0, max_instances=60)


def day(seed: int, hours: float = 8.0) -> Bins:
    """Bursty traffic that needs two instances or so, and five now and then."""
    rng = np.random.default_rng(seed)
    seconds = int(hours * 3600)
    rate = np.full(seconds, 1.5)
    for begin in rng.integers(0, seconds, int(4 * hours)):
        rate[begin : begin + int(rng.exponential(120.0))] *= rng.uniform(1.5, 2.5)
    requests = rng.poisson(rate).astype(float)
    work = requests * rng.gamma(4.0, 25.0, seconds)
    return Bins(work, requests, np.full(seconds, 2.5))


@pytest.mark.parametrize("goal", [0.95, 0.99])
def test_a_level_keeps_its_goal_on_the_next_day_too(goal: float) -> None:
    """Days of one kind, told by chance only: at most 1.3 times what is allowed on average."""
    missed = []
    for seed in range(3):
        tuned = tune(day(seed), goal, FLEET)
        assert tuned.reached
        out = run_fluid(day(seed + 100), tuned.level, FLEET, hot=3, cold=57, seed=seed)
        missed.append(out.misses)
    assert sum(missed) / len(missed) <= 1.3 * (1.0 - goal)
    assert sum(missed) / len(missed) >= 0.2 * (1.0 - goal), "and it does not pay for much more"


def test_a_stricter_goal_costs_more_and_the_curve_says_how_much() -> None:
    tuned = tune(day(1), 0.99, FLEET)
    prices = [p.usd_day for p in tuned.curve if p.reached]
    assert len(prices) >= 4
    assert prices == sorted(prices)
    assert tuned.simulated > 100
    cheap, dear = tune(day(1), 0.95, FLEET), tune(day(1), 0.999, FLEET)
    assert cheap.usd_day < tuned.usd_day < dear.usd_day


def test_the_pool_covers_what_was_wanted() -> None:
    tuned = tune(day(2), 0.99, FLEET)
    out = run_fluid(day(2), tuned.level, FLEET, hot=3, cold=tuned.level.pool - 3)
    assert out.uncovered <= 0.005
    assert out.creates <= 3


def test_a_short_history_is_given_no_long_means_and_no_pool_before_two_loads_are_known() -> None:
    short = ladder(0.99, 1800.0)
    assert 1 < len(short) < len(ladder(0.99, 86_400.0))
    assert all(s.slow_s <= LEAST_SLOW_S for s in short)
    assert tune(day(1, hours=0.4), 0.99, replace(FLEET, load_s=3600.0)).level.pool == 0
    assert tune(day(1, hours=0.4), 0.99, replace(FLEET, load_s=600.0)).level.pool > 0


def test_a_goal_that_cannot_be_kept_gives_no_extreme() -> None:
    """Starts of half an hour, and a burst a quarter: no k helps, so the knee of the curve is taken."""
    tuned = tune(day(3), 0.999, replace(FLEET, start_lo_s=1500.0, start_hi_s=2100.0, late_lane=False))
    assert tuned.level.k * max(1.0, tuned.level.slow_share) <= 1.2 * K_MOST
    assert not tuned.reached or tuned.usd_day < 60 * 24 * FLEET.running_usd_h


def test_twenty_minutes_of_a_model_that_starts_slowly_are_enough_for_a_level() -> None:
    """The first minutes of a replay, before a start can have helped, are nobody's fault."""
    slow = replace(FLEET, start_lo_s=120.0, start_hi_s=300.0, late_lane=False)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rate = 2.0 * np.exp(rng.normal(0.0, 0.6, 40)).repeat(30)
        requests = rng.poisson(rate).astype(float)
        work = requests * rng.gamma(2.0, 50.0, len(rate))
        tuned = tune(Bins(work, requests, np.full(len(rate), 2.5)), 0.99, slow)
        assert tuned.reached, "with a fifth of the history for a start it was in one of them"


def test_the_same_history_gives_the_same_level() -> None:
    assert tune(day(1), 0.99, FLEET) == tune(day(1), 0.99, FLEET)


# -- the process -----------------------------------------------------------------------------------------


def request(**changes: Any) -> dict[str, Any]:
    history = day(1, hours=1.0)
    return {
        "bins": {
            "work": history.work.tolist(),
            "requests": history.requests.tolist(),
            "limit_s": history.limit_s.tolist(),
        },
        "goal": 0.99,
        "capacity": {"work_s": 100.0, "requests_s": 1.0, "concurrency": 10.0, "kv_tokens": 1e6},
        "start_s": [60.0, 120.0],
        "load_s": 600.0,
        "running_usd_h": 0.78,
        "stopped_usd_h": 0.0083,
        "late_lane": True,
        "max_instances": 60,
        "seed": 1,
    } | changes


def test_a_process_answers_as_the_function_does() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "simulation.virtual.replay"],
        cwd=ROOT,
        input=json.dumps(request()).encode(),
        capture_output=True,
        check=True,
        timeout=100,
    )
    said, expected = json.loads(ran.stdout), answer(request())
    del said["seconds"], expected["seconds"]
    assert said == json.loads(json.dumps(expected))
    assert Objective(goal=0.99, **said["level"]).k > 0.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bins": 3}, "bins: wanted an object"),
        ({"bins": {"work": [1.0]}}, "'requests' is missing|requests is missing"),
        ({"goal": "much"}, "could not convert"),
        ({"start_s": [1.0]}, "not enough values"),
        ({"load_s": -1.0}, "load_s"),
        ({"capacity": {"work_s": 0.0}}, "missing|capacity"),
        ({"margin": 0.0}, "margin: wanted over 0 to 1"),
        ({"bins": {"work": [1.0] * 5, "requests": [1.0] * 5, "limit_s": [1.0] * 5}}, "a minute or more"),
        ({"bins": {"work": [-1.0], "requests": [1.0], "limit_s": [1.0]}}, "none negative"),
    ],
)
def test_a_wrong_request_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        answer(request(**changes))
    assert "\n" not in str(refused.value)


def test_the_process_refuses_what_is_no_json_with_one_line_and_status_2() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "simulation.virtual.replay"],
        cwd=ROOT,
        input=b"{",
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert ran.returncode == 2
    assert ran.stderr.count(b"\n") == 1
    assert b"no JSON" in ran.stderr
