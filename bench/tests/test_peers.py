"""Each rule of others walks through a case computed by hand from its source, and ships with its defaults.

A walk is a list of moments: what was seen, what the source's formula gives (in the comment), what was said.
"""

import math
from typing import Any

import numpy as np
import pytest

from bench.policies.peers.actuators import AsIs, WithPool
from bench.policies.peers.delayed_off import DelayedOff
from bench.policies.peers.dynamo import DynamoPredictive, DynamoStatic
from bench.policies.peers.forecasts import Arima, Constant, Kalman, fit, kpss
from bench.policies.peers.hpa import HpaInFlight, HpaWaiting
from bench.policies.peers.knative import KnativeKpa
from bench.policies.peers.ray_serve import RayServe
from bench.policies.peers.registry import PEERS, Peer, runs
from bench.policies.peers.rule import NO_CAP, PeerPolicy, PeerRule, whole_up
from bench.policies.peers.runpod import RunPodQueueDelay, RunPodRequestCount
from bench.policies.peers.sageserve import SageServe
from bench.policies.peers.skyserve import SkyServe
from bench.policies.peers.vast import API, CLI, GUIDE, VastServerless
from bench.policies.peers.windows import Gauge, Growth, Peak
from bench.policies.peers.wva import WvaTokens
from policies import Capacity, FleetSnapshot, Targets, Traffic

CAPACITY = Capacity(work_s=800.0, requests_s=4.0, concurrency=40.0, kv_tokens=80_000.0)
"""An instance that serves 4 requests of 1,000 prompt and 100 output tokens a second, 40 at once."""


def seen(
    now: float,
    hot: int = 1,
    *,
    coming: int = 0,
    loading: int = 0,
    cold: int = 0,
    capacity: Capacity | None = CAPACITY,
    start_time_s: float = 90.0,
    load_time_s: float = 600.0,
    **traffic: Any,
) -> FleetSnapshot:
    """A moment; what is not said of the traffic is 0."""
    return FleetSnapshot(
        now,
        [],
        hot,
        coming,
        loading,
        cold,
        0,
        start_time_s,
        load_time_s,
        traffic=Traffic(**traffic),
        capacity=capacity,
    )


# -- what they remember with --


def test_a_window_holds_what_came_after_its_beginning() -> None:
    gauge = Gauge(6.0)
    for now, value in ((0.0, 8.0), (2.0, 2.0), (4.0, 5.0)):
        gauge.note(now, value)
    assert (gauge.mean(), gauge.peak()) == (5.0, 8.0)
    gauge.note(6.0, 2.0)  # (0, 6]: 2, 5, 2
    assert (gauge.mean(), gauge.peak()) == (3.0, 5.0)


def test_after_a_burst_an_empty_window_is_exactly_empty() -> None:
    gauge = Gauge(60.0)
    for n in range(1000):
        gauge.note(float(n), 0.1 * n if n < 900 else 0.0)
    assert gauge.mean() == 0.0


def test_the_peak_is_the_largest_of_its_window_and_no_older() -> None:
    peak = Peak(10.0)
    said = [
        peak.note(float(now), value) for now, value in ((0, 3), (5, 1), (9, 2), (10, 1), (19, 0), (20, 0))
    ]
    assert said == [3, 3, 3, 2, 1, 0]


def test_growth_is_over_the_window_and_survives_a_counter_that_begins_anew() -> None:
    growth = Growth(10.0)
    assert [growth.note(*at) for at in ((0.0, 100.0), (5.0, 110.0), (10.0, 130.0), (15.0, 160.0))] == [
        0.0,
        10.0,
        30.0,
        50.0,  # against the reading at 5
    ]
    assert growth.seconds == 10.0
    assert growth.note(20.0, 4.0) == 0.0, "it fell, so it began anew"
    assert growth.rate(24.0, 12.0) == 2.0


@pytest.mark.parametrize(
    ("wanted", "whole"),
    [(0.3 / 0.1, 3), (3.01, 4), (0.0, 0), (-5.0, 0), (math.nan, 0), (math.inf, NO_CAP), (1e12, NO_CAP)],
)
def test_a_whole_number_of_replicas_is_never_more_than_rounding_off(wanted: float, whole: int) -> None:
    assert whole_up(wanted) == whole


# -- Vast Serverless, docs/reference/peers.md 1 --


def vast_load(now: float, tokens_s: float, held_work: float = 0.0) -> dict[str, Any]:
    """A steady load since 0; work is twice the output tokens (as much of it is reading)."""
    return {
        "output_tokens_total": tokens_s * now,
        "work_total": 2.0 * tokens_s * now,
        "held_work": held_work,
    }


def test_vast_sizes_hot_by_target_util_and_total_by_cold_mult() -> None:
    """900 tok/s anticipated -> 1000 tok/s of capacity (the guide's example); at 400 tok/s a worker: 3."""
    rule = VastServerless()
    rule.targets(seen(0.0))
    said = rule.targets(seen(60.0, 1, **vast_load(60.0, 900.0)))
    # work_s 800, half of it output: perf 400; 900/0.9/400 = 2.5 -> 3; 3 * 900/400 = 6.75 -> 7
    assert (said.hot, said.total) == (3, 7)
    said = rule.targets(seen(120.0, 3, **vast_load(120.0, 900.0, held_work=80_000.0)))
    # 80,000 work = 40,000 tokens queued over 3 * 400 = 33.3 s > 30 s: + 40,000/30 tok/s; 2,333/400 = 5.8
    assert (said.hot, said.total) == (6, 7)
    said = rule.targets(seen(180.0, 6, **vast_load(180.0, 900.0, held_work=80_000.0)))
    assert said.hot == 3, "40,000 tokens over 6 * 400 is 16.7 s: within the target queue time"


def test_vast_forgets_a_burst_after_half_an_hour_and_plans_with_it_for_another_hour() -> None:
    rule = VastServerless(min_workers=0)
    tokens = 0.0
    said: dict[int, Targets] = {}
    for now in range(0, 6001, 60):
        tokens += 60.0 * (4000.0 if 0 < now <= 600 else 0.0)
        said[now] = rule.targets(seen(float(now), output_tokens_total=tokens, work_total=2.0 * tokens))
    # 4000/0.9/400 = 11.1 -> 12; 3 * 4000/400 = 30, capped at 16
    assert (said[600].hot, said[600].total) == (12, 16)
    # ten minutes later: nothing in 5 minutes, 600 s of 4000 in the 1200 s there were: 2000/0.9/400 = 5.6
    assert (said[1200].hot, said[1200].total) == (6, 16)
    # the burst is out of the half hour: min_load 1 tok/s -> 1
    assert (said[2400].hot, said[2400].total) == (1, 16)
    # an hour after 1260 s, when 600 * 4000 / 1260 = 1905 tok/s were anticipated: 3 * 1905/400 = 14.3
    assert said[4800].total == 15
    assert said[6000].total == 1


def test_vast_default_sets_differ_as_documented() -> None:
    rule = VastServerless()
    assert (rule.target_util, rule.min_cold_load) == (0.9, 0.0)
    assert GUIDE == {"cold_mult": 3.0, "min_workers": 5, "max_workers": 16, "min_load": 1.0}
    assert {name: getattr(rule, name) for name in GUIDE} == GUIDE
    assert CLI == {"cold_mult": 2.5, "min_workers": 5, "max_workers": 20, "min_load": 0.0}
    assert API == {**CLI, "min_load": 10.0}
    cli = dict(PEERS["vast-cli"].defaults())["CLI"]().targets(seen(0.0))
    assert (cli.hot, cli.total) == (0, 5), "no load, min_load 0: none hot, five kept"


# -- SkyServe, section 2 --


def test_skyserve_commits_up_after_fifteen_looks_and_down_after_sixty() -> None:
    rule = SkyServe(target_qps_per_replica=1.0)
    said: list[int] = []
    total = 0.0
    for look in range(100):
        now = 20.0 * look
        # 3 requests/s for the first 20 looks (400 s), then half a request per second
        total += 0.0 if look == 0 else 60.0 if look < 20 else 10.0
        said.append(rule.targets(seen(now, said[-1] if said else 1, requests_total=total)).hot)
    # look 0: nothing yet: c = 1 = N. Look 1: 60/60: c = 1. Look 2: 120/60 = 2 > 1: up 1; looks 3..16: c = 3.
    # look 16 is the 15th in a row: N = 3, the c of that look
    assert said[:16] == [1] * 16
    assert said[16] == 3
    # look 20: (60+60+10)/60 = 2.2 -> 3 = N. Look 21: (60+10+10)/60 = 1.3 -> 2 < 3: down 1; look 22..: c = 1.
    # look 80 is the 60th in a row: N = 1
    assert said[17:80] == [3] * 63
    assert said[80:] == [1] * 20


def test_skyserve_starts_counting_anew_when_the_wish_is_what_there_is() -> None:
    rule = SkyServe(target_qps_per_replica=1.0, upscale_delay_s=60.0)  # three looks
    rule.targets(seen(0.0, 2))
    said = [
        rule.targets(seen(20.0 * n, 2, requests_total=total)).hot
        for n, total in ((1, 180), (2, 180), (3, 180), (4, 180 + 100), (5, 280 + 100), (6, 380 + 100))
    ]
    # q * 60 = 180, 180, 180, 100, 200, 300 -> c = 3, 3, 3: third in a row, N = 3; then 2 (down), 4, 5 (up)
    assert said == [2, 2, 3, 3, 3, 3]
    assert rule.targets(seen(140.0, 2, requests_total=580.0)).hot == 5, "300/60 = 5, the third over 3"


def test_skyserve_leaves_zero_at_once_and_looks_every_five_seconds_there() -> None:
    rule = SkyServe(target_qps_per_replica=1.0, min_replicas=0)
    assert rule.targets(seen(0.0, 0)).hot == 0
    assert rule.targets(seen(5.0, 0, requests_total=61.0)).hot == 2
    assert rule.targets(seen(10.0, 0, requests_total=400.0)).hot == 2, "no look for 20 s now"


def test_skyserve_defaults() -> None:
    rule = SkyServe()
    assert (rule.qps_window_s, rule.look_s, rule.tick_s) == (60.0, 20.0, 5.0)
    assert (rule.upscale_delay_s, rule.downscale_delay_s, rule.min_replicas) == (300.0, 1200.0, 1)
    assert (rule.num_overprovision, rule.target_qps_per_replica) == (0, None)
    rule = SkyServe(upscale_delay_s=20.0)
    rule.targets(seen(0.0))
    # no target given: what one instance serves, 4 requests/s; 480/60/4 = 2
    assert rule.targets(seen(20.0, requests_total=480.0)).hot == 2


# -- Ray Serve, section 3 --


def test_ray_waits_thirty_seconds_up_and_six_hundred_down() -> None:
    rule = RayServe(target_ongoing_requests=10.0)
    said: dict[int, int] = {}
    for now in range(0, 1000, 2):
        ongoing = 35.0 if now < 300 else 5.0
        held = 20.0 if now < 300 else 0.0
        hot = 1 if now < 120 else said[now - 2]
        said[now] = rule.targets(seen(float(now), hot, in_flight=ongoing - held, held=held)).hot
    # (15 + 20)/10 = 3.5 -> ceil(1 + 2.5) = 4 > 1 since 0: committed at 30, queued ones counted
    assert (said[28], said[30]) == (1, 4)
    # from 300 on 5 are ongoing; pushed at 310 first: samples of (280, 310]: nine of 35 (282..298), six of 5
    # (300..310): 345/15 = 23 -> 2.3 -> 3 < 4 since 310; 600 s later it is long 0.5 -> 1
    assert (said[908], said[910]) == (4, 1)


def test_ray_breaks_the_wait_when_the_wish_goes_away() -> None:
    rule = RayServe(target_ongoing_requests=10.0, look_back_period_s=1.0, push_interval_s=2.0)
    said = [
        rule.targets(seen(float(now), 1, in_flight=5.0 if now == 28 else 15.0)).hot for now in range(0, 64, 2)
    ]
    # 1.5 -> 2 from 0 to 26, 0.5 -> 1 at 28, so the thirty seconds begin again at 30 and end at 60
    assert said == [1] * 30 + [2] * 2


def test_ray_with_none_running_asks_for_one_at_once_and_keeps_its_target() -> None:
    rule = RayServe(min_replicas=0)
    assert rule.targets(seen(0.0, 0)).hot == 0
    assert rule.targets(seen(10.0, 0, held=50.0)).hot == 1, "not 25: nothing runs, so one"


def test_ray_takes_one_less_where_rounding_would_hide_the_wish() -> None:
    """downscaling_factor 0.1: ceil(4 + 0.1 (1 - 4)) = ceil(3.7) = 4 = running, but 1 < 4 is wished: 3."""
    rule = RayServe(target_ongoing_requests=10.0, downscaling_factor=0.1, downscale_delay_s=0.0)
    assert rule.targets(seen(0.0, 4, in_flight=10.0)).hot == 3


def test_ray_defaults() -> None:
    rule = RayServe()
    assert (rule.target_ongoing_requests, rule.look_back_period_s, rule.push_interval_s) == (2.0, 30.0, 10.0)
    assert (rule.upscale_delay_s, rule.downscale_delay_s, rule.downscale_to_zero_delay_s) == (
        30.0,
        600.0,
        None,
    )
    assert (rule.upscaling_factor, rule.downscaling_factor) == (1.0, 1.0)
    assert (rule.min_replicas, rule.max_replicas) == (1, 100)


# -- Knative, section 4 --


def test_knative_panics_keeps_its_peak_and_calms_down_after_sixty_seconds() -> None:
    rule = KnativeKpa(container_concurrency=10.0 / 0.7)  # target 10
    said: dict[int, int] = {}
    for now in range(0, 200, 2):
        load = 8.0 if now < 60 else 50.0 if now < 70 else 8.0
        said[now] = rule.targets(seen(float(now), 1, in_flight=8.0, held=load - 8.0)).hot
    assert said[58] == 1
    # 60: panic window (54, 60]: 8, 8, 50: mean 22 -> ceil(2.2) = 3, 3/1 >= 2: panic
    assert said[60] == 3
    # 62: 8, 50, 50 = 36 -> 4.  64: 50 -> 5, which stays the peak.  70: 50, 50, 8 = 36 -> 4 still over.
    assert (said[62], said[64], said[70]) == (4, 5, 5)
    # 72: 50, 8, 8 = 22 -> 3: over for the last time.  74: 8 -> 1.  Calm only after 72 + 60: at 134
    assert (said[74], said[132], said[134]) == (5, 5, 1)


def test_knative_halves_at_most_and_starts_in_panic_with_more_than_one_ready() -> None:
    rule = KnativeKpa(min_replicas=1)
    said = {now: rule.targets(seen(float(now), 8)).hot for now in range(0, 70, 2)}
    assert (said[0], said[60], said[62]) == (8, 8, 4), (
        "panic of the first look ends after 60 s; then floor(8/2)"
    )
    assert rule.targets(seen(70.0, 4)).hot == 2


def test_knative_counts_ready_pods_only_so_a_slow_start_looks_like_ever_more_to_do() -> None:
    """target 70, 1 ready, 9 coming, 700 waiting: ceil(700/70) = 10, whether or not they are on their way."""
    rule = KnativeKpa()
    assert rule.targets(seen(0.0, 1, coming=9, held=700.0)).hot == 10
    assert rule.targets(seen(2.0, 1, coming=9, held=1400.0)).hot == 15, "mean of 700 and 1400 over 70"


def test_knative_goes_to_zero_after_the_window_and_the_grace() -> None:
    rule = KnativeKpa()
    said = {
        now: rule.targets(seen(float(now), 1, in_flight=7.0 if now == 0 else 0.0)).hot
        for now in range(0, 96, 2)
    }
    # out of the window at 60, wanted 0 since then, granted at 90
    assert (said[58], said[60], said[88], said[90]) == (1, 1, 1, 0)


def test_knative_defaults() -> None:
    rule = KnativeKpa()
    assert (rule.container_concurrency, rule.target_share) == (100.0, 0.7)
    assert rule.target == pytest.approx(70.0)
    assert (rule.max_scale_up_rate, rule.max_scale_down_rate) == (1000.0, 2.0)
    assert (rule.panic_threshold, rule.panic_window_share, rule.stable_window_s) == (2.0, 0.1, 60.0)
    assert (rule.scale_to_zero_grace_s, rule.scale_down_delay_s, rule.tick_s) == (30.0, 0.0, 2.0)
    assert (rule.min_replicas, rule.max_replicas) == (0, NO_CAP)


# -- HPA, section 5 --


def test_hpa_doubles_or_adds_four_tolerates_a_tenth_and_waits_five_minutes_down() -> None:
    rule = HpaInFlight(target=10.0)
    said: list[int] = []
    loads = [10.9, 200.0, 200.0, 200.0, 200.0] + [50.0] * 22
    for n, load in enumerate(loads):
        said.append(rule.targets(seen(15.0 * n, 1, in_flight=10.0, held=load - 10.0)).hot)
    # 1.09: within 0.1 of 1.  200 -> 20, but max(2, 5), max(10, 9), max(20, 14): 5, 10, 20 though one is ready
    assert said[:5] == [1, 5, 10, 20, 20]
    # 50 -> 5 from look 5 (75 s) on; 20 was last recommended at 60 s: look 23 (345 s) sees it, 24 does not
    assert said[5:24] == [20] * 19
    assert said[24:] == [5] * 3


def test_hpa_keeps_what_it_found_for_five_minutes_when_it_wakes_up() -> None:
    rule = HpaInFlight(target=10.0)
    said = [rule.targets(seen(15.0 * n, 7)).hot for n in range(22)]
    assert said == [7] * 20 + [1] * 2


def test_hpa_on_waiting_requests_follows_the_chart() -> None:
    rule = HpaWaiting()
    said = [
        rule.targets(seen(15.0 * n, 1, held=held)).hot for n, held in enumerate((0.0, 5.2, 9.0, 14.0, 90.0))
    ]
    # 0 wants 0, but at least 1; 5.2/5 = 1.04: within a tenth; 9/5 = 1.8 -> 2; 14/10 = 1.4 -> 3; 18, cap 5
    assert said == [1, 1, 2, 3, 5]


def test_hpa_defaults() -> None:
    rule = HpaWaiting()
    assert (rule.tick_s, rule.tolerance, rule.downscale_stabilization_s) == (15.0, 0.1, 300.0)
    assert (rule.up_share, rule.up_pods, rule.down_share, rule.threshold) == (1.0, 4, 1.0, 5.0)
    assert (rule.min_replicas, rule.max_replicas) == (1, 5)
    # no target given: 80 % of 40 at once = 32; 90/32 = 2.8
    assert HpaInFlight().targets(seen(0.0, 1, in_flight=90.0)).hot == 3
    with pytest.raises(ValueError, match="min_replicas"):
        HpaInFlight(min_replicas=0)


# -- RunPod, section 13 --


def test_runpod_counts_requests_and_stops_what_was_idle_for_the_timeout() -> None:
    rule = RunPodRequestCount(scaler_value=10.0, max_replicas=NO_CAP)
    said = [
        rule.targets(seen(2.0 * n, 2, in_flight=flight, held=held)).hot
        for n, (flight, held) in enumerate(
            ((20, 15), (20, 0), (5, 0), (5, 0), (0, 0), (0, 0), (0, 0), (0, 0))
        )
    ]
    # 35 -> 4 at 0 s, kept for 5 s; 20 -> 2 at 2 s, kept until 7 s; 5 -> 1 at 6 s, kept until 11 s
    assert said == [4, 4, 4, 2, 1, 1, 0, 0]


def test_runpod_does_not_stop_a_worker_that_is_busy() -> None:
    """90 in progress at 100 a worker ask for one, but fill three at 40 each."""
    rule = RunPodRequestCount(scaler_value=100.0, max_replicas=NO_CAP)
    assert rule.targets(seen(0.0, 3, in_flight=90.0)).hot == 3


def test_runpod_adds_one_in_each_delay_while_something_waits() -> None:
    rule = RunPodQueueDelay(max_replicas=NO_CAP)
    waits = [(0.0, 0.0), (5.0, 2.0), (5.0, 4.0), (5.0, 6.0), (5.0, 8.0), (5.0, 10.0), (0.0, 0.0)]
    said = [
        rule.targets(seen(2.0 * n, 1, in_flight=40.0, held=held, oldest_wait_s=wait)).hot
        for n, (held, wait) in enumerate(waits)
    ]
    # over 4 s first at 6 s: 2; 8 s is too soon; 10 s: 3; at 12 s nothing waits, but the three were
    # in use until 10 s, so they stay 5 s
    assert said == [1, 1, 1, 2, 2, 3, 3]
    assert [rule.targets(seen(now, 3, in_flight=50.0)).hot for now in (14.0, 16.0)] == [3, 2], "50 fill two"


def test_runpod_that_counts_starting_adds_one_at_a_time() -> None:
    rule = RunPodQueueDelay(max_replicas=NO_CAP, counts_starting=True)
    said = [
        rule.targets(seen(4.0 * n, hot, held=5.0, oldest_wait_s=9.0)).hot
        for n, hot in enumerate((1, 1, 1, 2, 2))
    ]
    assert said == [2, 2, 2, 3, 3]


def test_runpod_defaults() -> None:
    count, delay = RunPodRequestCount(), RunPodQueueDelay()
    for rule in (count, delay):
        assert (rule.min_replicas, rule.max_replicas, rule.idle_timeout_s) == (0, 3, 5.0)
    assert (delay.scaler_value_s, count.scaler_value) == (4.0, 4.0)
    assert count.targets(seen(0.0, 1, held=100.0)).hot == 3, "at most three"


# -- Dynamo, section 12 --


def test_dynamo_static_adds_when_full_and_removes_only_what_the_others_can_take() -> None:
    rule = DynamoStatic()
    steps = [
        # hot, KV tokens of 80,000 each, prompt tokens queued
        (1, 70_000.0, 8_000.0),  # 0.975: as it is
        (1, 76_000.0, 8_000.0),  # 1.05 > 1: two
        (1, 80_000.0, 90_000.0),  # scaling in progress: observe only
        (2, 150_000.0, 12_000.0),  # 162/160 = 1.0125: three
        (3, 140_000.0, 0.0),  # 0.583 < 0.6, and 0.583 * 3/2 = 0.875 < 1: two
        (2, 100_000.0, 0.0),  # 0.625: as it is
        (2, 88_000.0, 0.0),  # 0.55 < 0.6, but 0.55 * 2 = 1.1 over the threshold: refused
        (2, 72_000.0, 0.0),  # 0.45, 0.9: one
        (1, 100.0, 0.0),  # never below one
    ]
    said = [
        rule.targets(seen(5.0 * n, hot, kv_tokens=kv, in_flight=1.0, held_prompt_tokens=queued)).hot
        for n, (hot, kv, queued) in enumerate(steps)
    ]
    assert said == [1, 2, 2, 3, 2, 2, 2, 1, 1]


def dynamo_walk(rule: DynamoPredictive, requests: list[float], prompt: float = 1000.0) -> list[int]:
    """What it says after intervals of 180 s with so many requests of so many prompt and 100 output tokens."""
    said = [rule.targets(seen(0.0)).hot]
    total = 0.0
    for n, count in enumerate(requests):
        total += count
        moment = seen(
            180.0 * (n + 1),
            said[-1],
            requests_total=total,
            prompt_tokens_total=prompt * total,
            output_tokens_total=100.0 * total,
        )
        said.append(rule.targets(moment).hot)
    return said[1:]


def test_dynamo_constant_predictor_sizes_for_the_interval_before() -> None:
    """An engine does 800 / (0.1 * 1000 + 100) = 4 requests/s; 1,500 in 180 s are 8.3/s: 3."""
    rule = DynamoPredictive(predictor="constant", max_replicas=NO_CAP)
    # 1,500 -> 2.08 -> 3;  20,000 -> 27.8 -> 28, but 8 at a step: 11, 19;  720 -> 1, again 8 at a step: 11
    assert dynamo_walk(rule, [1500.0, 20_000.0, 20_000.0, 720.0]) == [3, 11, 19, 11]
    # twice the prompt: 800 / 300 = 2.67/s, 8.33/2.67 = 3.1
    rule = DynamoPredictive(predictor="constant", max_replicas=NO_CAP)
    assert dynamo_walk(rule, [1500.0], prompt=2000.0) == [4]


def test_dynamo_waits_for_pending_workers() -> None:
    rule = DynamoPredictive(predictor="constant")
    rule.targets(seen(0.0, 1))
    at: dict[str, Any] = {"prompt_tokens_total": 0.0}
    assert rule.targets(seen(180.0, 1, requests_total=1500.0, output_tokens_total=300_000.0, **at)).hot == 3
    # 200 output tokens and no prompt: again 4/s.  One of three is there: nothing moves, and then it does
    assert rule.targets(seen(360.0, 1, requests_total=5000.0, output_tokens_total=1e6, **at)).hot == 3
    assert rule.targets(seen(540.0, 3, requests_total=8600.0, output_tokens_total=1.72e6, **at)).hot == 5


def test_dynamo_kalman_follows_a_trend_one_step_ahead() -> None:
    """By hand with q_level 1, q_trend 0.1, r 10 and a first variance of 1000 for both.

    Seen 100: level 100, trend 0. Seen 110: P- = (2001, 1000, 1000.1), gains 2001/2011 = 0.99503 and
    1000/2011 = 0.49727, so level = 100 + 0.99503 * 10 = 109.9503, trend = 4.9727: next 114.9229.
    """
    kalman = Kalman()
    assert kalman.next() == 0.0
    kalman.add(100.0)
    assert kalman.next() == 100.0
    kalman.add(110.0)
    assert kalman.next() == pytest.approx(114.9229, abs=1e-3)
    assert kalman.next() == kalman.next(), "asking moves nothing"
    for value in range(120, 400, 10):
        kalman.add(float(value))
    assert kalman.next() == pytest.approx(400.0, abs=0.5), "a straight line is followed"
    kalman.add(0.0)
    for _ in range(20):
        kalman.add(0.0)
    assert kalman.next() == pytest.approx(0.0, abs=5.0)


def test_arima_finds_the_autoregression_in_a_series_that_has_one() -> None:
    rng = np.random.default_rng(4)
    values = [0.0]
    for noise in rng.normal(0.0, 1.0, 4000):
        values.append(0.7 * values[-1] + float(noise))
    model = fit([v + 50.0 for v in values])
    assert model.d == 0
    assert model.phi[0] == pytest.approx(0.7, abs=0.05)
    path = model.path(60)
    assert path[0] == pytest.approx(50.0 + 0.7 * values[-1], abs=0.3)
    assert path[-1] == pytest.approx(50.0, abs=0.5), "far ahead it is the mean"


def test_arima_differences_what_wanders_and_never_explodes() -> None:
    walk = np.cumsum(np.random.default_rng(4).normal(0.0, 1.0, 500)) + 100.0
    assert kpss(walk) > 0.463 > kpss(np.diff(walk))
    model = fit(walk.tolist())
    assert model.d >= 1
    assert model.path(60)[-1] == pytest.approx(walk[-1], abs=5.0)
    line = fit([10.0 + 2.0 * n for n in range(200)])  # a line: its second difference is nothing
    assert all(math.isfinite(v) for v in line.path(60))


def test_arima_is_the_last_value_until_there_are_five_and_never_below_zero() -> None:
    arima = Arima()
    assert arima.next() == 0.0
    for value in (0.0, 0.0, 30.0, 20.0, 10.0):
        arima.add(value)
    assert arima.next() == 10.0, "two zeros before the first traffic do not count: three values"
    for value in (5.0, 1.0, 0.0, 0.0, math.nan):
        arima.add(value)
        assert arima.next() >= 0.0
    constant = Constant()
    constant.add(math.inf)
    assert constant.next() == 0.0
    for same in (7.0,) * 8:
        arima.add(same)
    alike = Arima()
    for same in (7.0,) * 8:
        alike.add(same)
    assert alike.next() == 7.0


@pytest.mark.parametrize("predictor", ["arima", "constant", "kalman"])
def test_dynamo_survives_no_traffic_at_all(predictor: str) -> None:
    """#6985: zero traffic made its lengths NaN and it could not scale down. Here it goes down to one."""
    rule = DynamoPredictive(predictor=predictor, max_replicas=NO_CAP)
    said = dynamo_walk(rule, [5000.0] * 6 + [0.0] * 12)
    assert said[5] == 7, "5000/180/4 = 6.9"
    assert said[-1] == 1
    assert dynamo_walk(DynamoPredictive(predictor=predictor), [0.0] * 4) == [1] * 4


def test_dynamo_defaults() -> None:
    static, predictive = DynamoStatic(), DynamoPredictive()
    for rule in (static, predictive):
        assert (rule.min_replicas, rule.max_replicas) == (1, 8)
    assert (static.tick_s, static.scale_up, static.scale_down) == (5.0, 1.0, 0.6)
    assert (predictive.tick_s, predictive.predictor, predictive.max_step) == (180.0, "arima", 8)
    kalman = Kalman()
    assert (kalman._noise, Arima.FEWEST) == ((1.0, 0.1, 10.0), 5)
    latency = dict(PEERS["dynamo-static"].defaults())["latency, no cap"]()
    assert isinstance(latency, DynamoStatic)
    assert (latency.scale_up, latency.scale_down) == (0.4, 0.1)
    with pytest.raises(ValueError, match="predictor"):
        DynamoPredictive(predictor="prophet")


# -- WVA, section 7 --


def wva_load(kv: float, held: float = 0.0, requests: float = 1000.0) -> dict[str, Any]:
    """Requests of 1,000 prompt and 100 output tokens."""
    return {
        "kv_tokens": kv,
        "held": held,
        "in_flight": 1.0,
        "requests_total": requests,
        "prompt_tokens_total": 1000.0 * requests,
        "output_tokens_total": 100.0 * requests,
    }


def test_wva_counts_pending_and_moves_by_whole_replicas() -> None:
    """k1 = 0.8 * 80,000 = 64,000; k2 = min(8192 * 100/1100, 256) * 1050 = 268,800: cap = 64,000."""
    rule = WvaTokens()
    # 100,000 + 20 * 1,000 = 120,000 / 0.85 - 64,000 * 2 = 13,176 > 0: ceil(0.2) = 1 more
    assert rule.targets(seen(0.0, 2, **wva_load(100_000.0, held=4.0))).hot == 2, "104,000: 122,353 < 128,000"
    assert rule.targets(seen(60.0, 2, **wva_load(116_000.0, held=4.0))).hot == 3
    # a minute later, the third still pending: 120,000/0.85 - 192,000 < 0; 128,000 - 171,429 < 0: as it is
    assert rule.targets(seen(120.0, 2, coming=1, **wva_load(116_000.0, held=4.0))).hot == 3
    # all three ready and 30,000 in use: 192,000 - 42,857 = 149,143 / 64,000 = 2.3: two fewer
    assert rule.targets(seen(200.0, 3, **wva_load(30_000.0))).hot == 1
    assert rule.targets(seen(260.0, 1, **wva_load(0.0))).hot == 1, "one is kept"


def test_wva_reads_the_peak_of_the_last_minute() -> None:
    rule = WvaTokens()
    said = [
        rule.targets(seen(15.0 * n, 1, **wva_load(kv))).hot
        for n, kv in enumerate((10_000.0, 10_000.0, 100_000.0, 10_000.0, 10_000.0, 9_000.0, 9_000.0))
    ]
    # scraped at 30 s, decided at 60 s: 100,000/0.85 - 64,000 = 53,647: one more
    assert said == [1, 1, 1, 1, 2, 2, 2]


def test_wva_learns_what_a_replica_holds_when_its_queue_is_five() -> None:
    rule = WvaTokens()
    # queue 6 on one replica with 40,000 in use: k2 = 40,000 < k1
    # demand 46,000: 46,000/0.85 - 40,000 = 14,118: ceil(0.35) = 1 more
    assert rule.targets(seen(0.0, 1, **wva_load(40_000.0, held=6.0))).hot == 2
    # later two replicas with queue 10 and 100,000 in use: 50,000 each; mean of 40,000 and 50,000 is 45,000
    # demand 110,000: 129,412 - 90,000 = 39,412: one more
    assert rule.targets(seen(60.0, 2, **wva_load(100_000.0, held=10.0))).hot == 3
    # and it remembers: 60,000 in use, no queue: 135,000 - 85,714 = 49,286 / 45,000 = 1.1: one fewer
    assert rule.targets(seen(180.0, 3, **wva_load(60_000.0))).hot == 2


def test_wva_defaults() -> None:
    rule = WvaTokens()
    assert (rule.loop_s, rule.scale_up, rule.scale_down) == (60.0, 0.85, 0.70)
    assert (rule.kv_threshold, rule.queue_threshold, rule.min_replicas) == (0.80, 5.0, 1)
    with pytest.raises(ValueError, match="scale_down"):
        WvaTokens(scale_up=0.5)


# -- SageServe, section 15 --


def sage_hour(rule: SageServe, work_s: float, hot: int = 2, use: float = 0.3) -> float:
    """An hour of steady work and memory use; gives back the work total at its end."""
    for now in range(0, 3600, 20):
        rule.targets(seen(float(now), hot, work_total=work_s * now, kv_tokens=use * 80_000.0 * hot))
    return work_s * 3600.0


def sage_at(now: float, hot: int, use: float, work: float, *, cold: int = 0) -> FleetSnapshot:
    return seen(now, hot, cold=cold, work_total=work, kv_tokens=use * 80_000.0 * hot, in_flight=1.0)


def test_sageserve_plans_each_hour_and_acts_when_memory_says_so() -> None:
    rule = SageServe()
    work = sage_hour(rule, 3000.0)
    # 3,000 work/s forecast, * 1.1 / 800 = 4.1 -> 5 wanted, 2 there: +3 planned, but memory use is 0.4
    assert rule.targets(sage_at(3600.0, 2, 0.4, work)) == Targets(2, 2, "memory use 0.40, +3 planned")
    # over 0.5: one, reclaimed (there is a cold one), so the next not before 65 s
    said = rule.targets(sage_at(3605.0, 2, 0.6, work, cold=1))
    assert (said.hot, said.total) == (3, 3)
    assert rule.targets(sage_at(3665.0, 3, 0.6, work)).hot == 3
    assert rule.targets(sage_at(3670.0, 3, 0.6, work)).hot == 4, "65 s later; none cold, so now 155 s"
    assert rule.targets(sage_at(3820.0, 4, 0.6, work)).hot == 4
    assert rule.targets(sage_at(3825.0, 4, 0.6, work)).hot == 5
    assert rule.targets(sage_at(4000.0, 5, 0.7, work)).hot == 5, (
        "the plan is done: nothing more, however full"
    )


def test_sageserve_gives_back_only_when_planned_and_idle_and_donates_what_it_gives() -> None:
    rule = SageServe()
    work = sage_hour(rule, 1000.0, hot=4)
    # 1,000 * 1.1 / 800 = 1.4 -> 2: two fewer planned
    assert rule.targets(sage_at(3600.0, 4, 0.30, work)).hot == 4
    said = rule.targets(sage_at(3605.0, 4, 0.20, work))
    assert (said.hot, said.total) == (3, 4), "one is donated, not destroyed"
    said = rule.targets(sage_at(3610.0, 3, 0.20, work, cold=1))
    assert (said.hot, said.total) == (2, 4)
    assert rule.targets(sage_at(3615.0, 2, 0.01, work, cold=2)).hot == 2, "the plan is done, and two are kept"


def test_sageserve_adds_an_extra_one_at_five_times_the_forecast_and_wants_it_back() -> None:
    rule = SageServe()
    work = sage_hour(rule, 1000.0)  # 2 wanted, 2 there
    assert rule.targets(sage_at(3600.0, 2, 0.95, work)).hot == 2, "full, but that is not what LT-UA looks at"
    # the last minute holds 290,000 work and the forecast is 60,000: 4.8 times
    assert rule.targets(sage_at(3650.0, 2, 0.6, work + 280_000.0)).hot == 2
    assert rule.targets(sage_at(3655.0, 2, 0.6, work + 320_000.0, cold=1)).hot == 3
    # one too many is planned away now, once memory use is low
    assert rule.targets(sage_at(3725.0, 3, 0.2, work + 320_000.0)).hot == 2


def test_sageserve_lt_u_adds_an_extra_one_when_nearly_full() -> None:
    rule = SageServe(extra="util")
    work = sage_hour(rule, 1000.0)
    assert rule.targets(sage_at(3600.0, 2, 0.90, work)).hot == 2
    assert rule.targets(sage_at(3605.0, 2, 0.91, work)).hot == 3


def test_sageserve_is_reactive_until_its_first_hour() -> None:
    rule = SageServe()
    said = [
        rule.targets(sage_at(now, hot, use, 0.0)).hot
        for now, hot, use in (
            (0.0, 2, 0.6),
            (100.0, 3, 0.6),
            (155.0, 3, 0.6),
            (400.0, 4, 0.2),
            (405.0, 3, 0.2),
        )
    ]
    assert said == [3, 3, 4, 3, 2]


def test_sageserve_defaults() -> None:
    rule = SageServe()
    assert (rule.use_up, rule.use_down, rule.extra_use, rule.extra_ratio) == (0.5, 0.25, 0.9, 5.0)
    assert (rule.margin, rule.min_replicas, rule.extra) == (1.1, 2, "ratio")
    assert (rule.reclaim_s, rule.spin_up_s, rule.plan_every_s) == (65.0, 155.0, 3600.0)
    with pytest.raises(ValueError, match="extra"):
        SageServe(extra="both")


# -- DelayedOff, section 15 --


def test_delayed_off_starts_for_who_finds_all_busy_and_stops_after_the_wait() -> None:
    rule = DelayedOff(t_wait_s=10.0, tick_s=1.0)
    said = [
        rule.targets(seen(float(now), 1, in_flight=flight, held=held)).hot
        for now, flight, held in (
            (0, 30, 0),
            (1, 40, 1),
            (2, 40, 50),
            (5, 40, 0),
            (11, 20, 0),
            (12, 20, 0),
            (15, 0, 0),
        )
    ]
    # at 40 each: 1, 2, 3 needed; 1 needed at 5. The 3 of second 2 count until 12; the 1 of second 12 until 22
    assert said == [1, 2, 3, 3, 3, 1, 1]
    assert [rule.targets(seen(now, 1)).hot for now in (21.0, 22.0)] == [1, 0]


def test_delayed_off_waits_as_long_as_a_set_up_takes_by_either_actuator() -> None:
    for make, wait_s in ((AsIs, 600.0), (WithPool, 90.0)):
        policy = make(DelayedOff())
        assert policy.targets(seen(0.0, 1, in_flight=100.0)).hot == 3
        assert policy.targets(seen(wait_s - 2.0, 3)).hot == 3
        assert policy.targets(seen(wait_s, 3)).hot == 0


# -- how they are carried out --


class Says(PeerRule):
    """A rule that says what it is told to."""

    n = 0

    def decide(self, seen: FleetSnapshot) -> Targets:
        return Targets(self.n, 99, "told")


def test_as_it_is_a_rule_destroys_what_it_does_not_want_hot() -> None:
    rule = Says()
    policy = AsIs(rule)
    said = []
    for now, n in ((0.0, 3), (5.0, 1)):
        rule.n = n
        said.append(policy.targets(seen(now, 3, cold=2)))
    assert said == [Targets(3, 3, "told"), Targets(1, 1, "told")]


def test_with_the_pool_it_keeps_what_was_wanted_lately() -> None:
    rule = Says()
    policy = WithPool(rule, keep_s=100.0)
    said = []
    for now, n, cold in (
        (0.0, 2, 6),
        (50.0, 4, 6),
        (90.0, 1, 6),
        (100.0, 1, 6),
        (149.0, 1, 3),
        (150.0, 1, 3),
    ):
        rule.n = n
        said.append(
            (policy.targets(seen(now, n, cold=cold)).hot, policy.targets(seen(now, n, cold=cold)).total)
        )
    # watched for under 100 s: what is loaded stays; then the most of 100 s: 4 until 150, then 1
    assert said == [(2, 8), (4, 10), (1, 7), (1, 4), (1, 4), (1, 1)]


def test_a_rule_decides_when_its_own_time_has_come_and_repeats_itself_between() -> None:
    rule = Says(tick_s=15.0)
    said = []
    for now in (0.0, 5.0, 10.0, 15.0, 20.0):
        rule.n += 1
        said.append(rule.targets(seen(now)).hot)
    assert said == [1, 1, 1, 4, 4]


# -- all of them --

EVERY = [
    pytest.param(make, id=f"{peer.name} {label} {actuator}".replace(" ", "-"))
    for peer in PEERS.values()
    for label, published in peer.defaults()
    for actuator, make in runs(peer, published)
]

ODD: dict[str, dict[str, Any]] = {
    "nothing there and no load": {"hot": 0},
    "no capacity known": {"hot": 1, "capacity": None, "held": 50.0, "in_flight": 3.0},
    "nothing hot and much held": {"hot": 0, "held": 500.0, "held_work": 1e6, "oldest_wait_s": 300.0},
    "a capacity of nothing": {"hot": 1, "capacity": Capacity(0.0, 0.0, 0.0, 0.0), "in_flight": 5.0},
    "a capacity that is no number": {"hot": 1, "capacity": Capacity(math.nan, 1.0, 1.0, 1.0), "held": 5.0},
    "more than anybody has": {"hot": 3, "held": 1e12, "held_work": 1e15, "requests_total": 1e12},
    "counters that begin anew": {"hot": 2, "requests_total": 5.0, "work_total": 5.0},
}


@pytest.mark.parametrize("make", EVERY)
def test_whatever_it_sees_it_says_whole_numbers_within_reason(make: Any) -> None:
    for odd in ODD.values():
        policy: PeerPolicy = make()
        policy.targets(seen(0.0, 2, requests_total=10.0, work_total=2000.0, output_tokens_total=1000.0))
        for n in range(1, 200):
            said = policy.targets(seen(60.0 * n, **odd))
            assert isinstance(said.hot, int)
            assert isinstance(said.total, int)
            assert 0 <= said.hot <= said.total <= NO_CAP + 8
            assert "nan" not in said.why


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_peer_says_where_it_is_from_and_its_sweep_goes_to_the_careful_end(peer: Peer) -> None:
    assert peer.source
    assert peer.knob
    sweep = peer.sweep(CAPACITY)
    values = [value for value, _ in sweep]
    assert len(values) >= 8
    assert values in (sorted(values), sorted(values, reverse=True))
    for value, make in sweep:
        policy = make()
        assert value > 0.0
        assert policy.tick_s > 0.0
        assert getattr(policy, "max_replicas", NO_CAP) == NO_CAP, "a sweep has no vendor's limit"
        assert policy.scaled(10.0) is not None
    assert sweep[0][1]() is not sweep[0][1](), "each run has a memory of its own"
    between = peer.at(round(math.sqrt(values[0] * values[1])) if peer.whole else (values[0] + values[1]) / 2)
    assert 0 <= between.targets(seen(0.0)).hot <= NO_CAP, "any value of the knob will do"


@pytest.mark.parametrize(
    "name", [n for n in PEERS if n not in ("fixed", "hpa-waiting", "runpod-delay", "delayed-off")]
)
def test_the_careful_end_of_a_sweep_keeps_several_times_what_is_needed(name: str) -> None:
    """A steady 8 requests/s, two instances' worth, all hot that are asked for, for three hours."""
    policy = (
        AsIs(PEERS[name].sweep(CAPACITY)[-1][1]())
        if not PEERS[name].knows_pool
        else PEERS[name].sweep(CAPACITY)[-1][1]()
    )
    hot = 2
    for now in range(0, 10_800, 5):
        count = 8.0 * now
        hot = policy.targets(
            seen(
                float(now),
                hot,
                requests_total=count,
                prompt_tokens_total=1000.0 * count,
                output_tokens_total=100.0 * count,
                work_total=200.0 * count,
                in_flight=80.0,
                kv_tokens=80.0 * 1050.0,
            )
        ).hot
    assert hot >= 8


@pytest.mark.parametrize(
    "name", ["skyserve", "ray-serve", "knative", "hpa", "dynamo-arima", "wva", "sageserve"]
)
def test_at_ten_times_the_speed_the_same_is_said_at_a_tenth_of_the_time(name: str) -> None:
    """Load, start and all its own times ten times faster: every answer is the same, that much earlier."""

    def walk(speedup: float) -> list[Targets]:
        policy = PEERS[name].defaults()[0][1]().scaled(speedup)
        capacity = Capacity(800.0 * speedup, 4.0 * speedup, 40.0, 80_000.0)
        said = []
        for now in range(0, 9000, 5):
            count = 20.0 * now if now < 4000 else 80_000.0 + (now - 4000) * 2.0
            said.append(
                policy.targets(
                    seen(
                        now / speedup,
                        3,
                        capacity=capacity,
                        in_flight=400.0 if now < 4000 else 10.0,
                        requests_total=count,
                        prompt_tokens_total=1000.0 * count,
                        output_tokens_total=100.0 * count,
                        work_total=200.0 * count,
                    )
                )
            )
        return said

    fast, slow = walk(10.0), walk(1.0)
    assert [said.hot for said in fast] == [said.hot for said in slow]
    assert len({said.hot for said in slow}) > 1


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (VastServerless, {"target_util": 0.0}),
        (SkyServe, {"target_qps_per_replica": -1.0}),
        (RayServe, {"target_ongoing_requests": 0.0}),
        (KnativeKpa, {"container_concurrency": math.nan}),
        (HpaInFlight, {"target": 0.0}),
        (RunPodRequestCount, {"scaler_value": 0.0}),
        (RunPodQueueDelay, {"scaler_value_s": 0.0}),
        (DynamoStatic, {"scale_up": 0.0}),
        (DynamoPredictive, {"sla_share": math.inf}),
        (WvaTokens, {"scale_down": 0.0}),
        (SageServe, {"margin": 0.0}),
        (DelayedOff, {"t_wait_s": 0.0}),
        (RayServe, {"min_replicas": 5, "max_replicas": 4}),
        (KnativeKpa, {"tick_s": 0.0}),
    ],
)
def test_a_knob_that_cannot_work_is_refused_by_name(make: Any, fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        make(**fields)
