"""The fluid model: bursts, starts and bills by hand, and that no work is lost."""

from typing import Any

import numpy as np
import pytest

from policies import Capacity, Fixed, FleetSnapshot, Objective, Targets
from simulation.virtual.fluid.bins import Bins, bins_of
from simulation.virtual.fluid.fleet import FluidFleet, FluidResult
from simulation.virtual.fluid.run import FluidRun, run_fluid

C = 100.0
CAPACITY = Capacity(C, 1.0, 10.0, 1e6)


def fleet(**changes: Any) -> FluidFleet:
    given = {"start_lo_s": 90.0, "start_hi_s": 90.0, "running_usd_h": 3.6, "stopped_usd_h": 0.036} | changes
    return FluidFleet(CAPACITY, **given)


def bins(work: list[float], limit_s: float = 2.0) -> Bins:
    """One request for each hundred units of work."""
    amount = np.array(work)
    return Bins(amount, amount / 100.0, np.full(len(work), limit_s))


def fixed(trace: Bins, hot: int, **changes: Any) -> FluidResult:
    return run_fluid(trace, Fixed(hot, hot), fleet(**changes), hot=hot, cold=0)


BURST = [0.0] * 10 + [1000.0] + [0.0] * 89


def test_a_burst_in_one_line_is_late_from_the_limit_on() -> None:
    """1,000 work at once and 100 a second: what is served in seconds 0, 1 and 2 has waited 2 s or less."""
    out = fixed(bins(BURST), 1, late_lane=False)
    assert out.requests == 10.0
    assert out.missed == pytest.approx(7.0)
    assert out.work_served == pytest.approx(1000.0)


def test_late_work_does_not_delay_what_comes_after_it_when_there_is_a_lane() -> None:
    """After the burst 80 a second: with one line all of it is late until the backlog is gone."""
    after = [0.0] * 10 + [1000.0] + [80.0] * 89
    line = fixed(bins(after), 1, late_lane=False)
    lane = fixed(bins(after), 1)
    assert lane.missed == pytest.approx(7.0 + 0.0, abs=3.0)
    assert line.missed > 30.0
    assert lane.late_max_s > line.late_max_s, "who is late waits longer for that"


def test_a_late_request_waits_no_longer_than_its_bound_while_others_come() -> None:
    full = bins([0.0] * 10 + [1000.0] + [100.0] * 600)
    bounded = fixed(full, 1, late_bound_s=60.0)
    patient = fixed(full, 1, late_bound_s=300.0)
    assert bounded.late_max_s <= 80.0
    assert patient.late_max_s > 250.0
    assert bounded.missed > patient.missed


@pytest.mark.parametrize("lane", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_all_work_that_arrives_is_served_or_waits(lane: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    work = rng.gamma(0.3, 400.0, 3000) * (rng.random(3000) < 0.4)
    trace = Bins(work, work / rng.uniform(50.0, 150.0), rng.uniform(1.0, 8.0, 3000))
    out = run_fluid(
        trace, Objective(k=1.3), fleet(late_lane=lane, start_hi_s=150.0), seed=seed, hot=1, cold=9
    )
    assert out.work_arrived == pytest.approx(float(work.sum()))
    assert out.work_served + out.work_waiting == pytest.approx(out.work_arrived)
    assert out.work_served <= C * out.gpu_h * 3600.0
    assert 0.0 <= out.missed <= out.requests


class Script:
    """Says what it was told to at each moment."""

    memory_s = 0.0

    def __init__(self, *steps: tuple[float, int, int]) -> None:
        self._steps = steps

    def targets(self, seen: FleetSnapshot) -> Targets:
        _, hot, total = [s for s in self._steps if s[0] <= seen.now][-1]
        return Targets(hot, total, "")

    def scaled(self, speedup: float) -> "Script":
        return self


def test_a_start_and_a_stop_cost_what_they_take() -> None:
    """One more is started at 100, hot at 190, stopped at 500 and gone at 515, of 1,000 seconds."""
    quiet = bins([10.0] * 1000)
    out = run_fluid(quiet, Script((0, 1, 2), (100, 2, 2), (500, 1, 2)), fleet(), hot=1, cold=1)
    second = 3.6 / 3600.0
    assert out.usd_starting == pytest.approx(90 * second)
    assert out.usd_hot == pytest.approx((1000 + 310) * second)
    assert out.usd_stopping == pytest.approx(15 * second)
    assert out.usd_stopped == pytest.approx((1000 - 415) * 0.036 / 3600.0)
    assert (out.starts, out.stops, out.creates, out.destroys) == (1, 1, 0, 0)


def test_a_new_one_loads_first_and_one_too_many_is_destroyed() -> None:
    quiet = bins([10.0] * 1000)
    out = run_fluid(quiet, Script((0, 1, 1), (50, 2, 2), (700, 1, 1)), fleet(load_s=600.0), hot=1, cold=0)
    assert out.usd_loading == pytest.approx(600 * 3.6 / 3600.0)
    assert (out.creates, out.destroys) == (1, 1)


def test_only_the_scored_window_is_charged_and_counted() -> None:
    steady = bins([50.0] * 1000)
    out = run_fluid(steady, Fixed(1, 1), fleet(), hot=1, cold=0, score_from_s=400, score_to_s=900)
    assert out.gpu_h == pytest.approx(500 / 3600.0)
    assert out.requests == pytest.approx(250.0)


@pytest.mark.parametrize("lane", [True, False])
def test_the_compiled_rule_is_the_policy_that_people_read(lane: bool) -> None:
    rng = np.random.default_rng(5)
    work = rng.gamma(0.3, 500.0, 20_000) * (1.0 + np.sin(np.arange(20_000) / 900.0))
    trace = Bins(work, work / 100.0, np.full(20_000, 2.3))
    level = Objective(k=1.4, fast_s=60.0, slow_s=600.0, pool=6, settled_at=9000.0)
    world = fleet(late_lane=lane, start_lo_s=60.0, start_hi_s=120.0)
    a = run_fluid(trace, level, world, hot=2, cold=8)
    b = run_fluid(trace, level, world, asked=True, hot=2, cold=8)
    assert a == b


def test_the_same_arguments_give_the_same_result_and_another_seed_another() -> None:
    rng = np.random.default_rng(1)
    work = rng.gamma(0.2, 900.0, 20_000)
    trace = Bins(work, work / 100.0, np.full(20_000, 2.3))
    world = fleet(start_lo_s=30.0, start_hi_s=300.0)

    def run(seed: int) -> FluidResult:
        return run_fluid(trace, Objective(k=1.1), world, seed=seed, hot=1, cold=19)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_policy_sees_what_the_autoscaler_would_show_it() -> None:
    looks: list[FleetSnapshot] = []

    class Looks(Fixed):
        def targets(self, seen: FleetSnapshot) -> Targets:
            looks.append(seen)
            return Targets(1, 3, "")

    run_fluid(bins([200.0] * 100), Looks(), fleet(), hot=1, cold=2)
    last = looks[-1]
    assert (last.hot, last.cold, last.capacity) == (1, 2, CAPACITY)
    assert last.traffic.requests_total == pytest.approx(2.0 * 95)
    assert last.traffic.held_work == pytest.approx(100.0 * 95)
    assert list(last.arriving)[-1] == pytest.approx(200.0)


def test_requests_become_bins_with_their_limits() -> None:
    made = bins_of([0.1, 0.9, 3.5], [1000, 3000, 500], [10, 20, 30], reading_s=[0.1, 0.3, 0.05])
    assert made.work.tolist() == [430.0, 0.0, 0.0, 80.0]
    assert made.requests.tolist() == [2.0, 0.0, 0.0, 1.0]
    assert made.limit_s.tolist() == pytest.approx([3.8, 0.0, 0.0, 2.45])


@pytest.mark.parametrize(
    "wrong", [{"load_s": -1.0}, {"running_usd_h": float("nan")}, {"start_hi_s": 10.0}, {"max_instances": 0}]
)
def test_a_fleet_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        fleet(**wrong)


def test_a_run_can_be_led_by_one_level_after_another() -> None:
    trace = bins([150.0] * 2000)
    one = FluidRun(trace, fleet(), hot=2, cold=2)
    one.level(Objective(k=1.0))
    two = FluidRun(trace, fleet(), hot=2, cold=2)
    two.level(Objective(k=1.0), 1000)
    two.level(Objective(k=1.0))
    assert one.result() == two.result()
