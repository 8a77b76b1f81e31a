"""The fleet in virtual time: closed forms, conservation, determinism, and what goes wrong by chance."""

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.profile import Profile
from engine.profiles import PROFILES
from engine.step_time_constants import Timing
from localcloud.machines import Machine
from localcloud.realism import HARSH, NONE, Realism
from policies import Busy, Fixed, FleetSnapshot, Targets
from simulation.traces.request import Request
from simulation.virtual.cloud import Hazards, deep_market, parse_hazards
from simulation.virtual.outcome import Outcome
from simulation.virtual.setting import Setting
from simulation.virtual.virtual_fleet import VirtualFleet, simulate

A100 = tuple(m for m in deep_market() if m.gpu_name == "A100 SXM4")
PROFILE = PROFILES["vllm-13"]


def poisson(rate: float, count: int, seed: int, prompt: int = 300, output: int = 180) -> Iterator[Request]:
    rng = random.Random(seed)
    at = 0.0
    for _ in range(count):
        at += rng.expovariate(rate)
        yield Request(at, prompt, output, -1)


def setting(**changes: Any) -> Setting:
    return replace(Setting(profile=PROFILE, machines=A100, seed=7), **changes)


# -- closed forms ------------------------------------------------------------------------------------

TOKEN_S = 0.01
MEAN_TOKENS = 200


def one_at_a_time() -> Any:
    """A machine that serves one request after the other, TOKEN_S a token, and reads prompts in no time."""
    timing = Timing("queue", 1e3 * TOKEN_S, 0.0, 0.0, 0.0, 0.0, 0.0, kv_tokens=1_000_000, max_seqs=1)
    return {("13B", "awq4", "A100 SXM4", 1): timing}


def queue_path(servers: int, load: float, fixed: bool, seed: int) -> Iterator[Request]:
    """Arrivals without end that give so many servers so much to do."""
    rng = random.Random(seed)
    at = 0.0
    while True:
        at += rng.expovariate(servers * load / (MEAN_TOKENS * TOKEN_S))
        tokens = MEAN_TOKENS if fixed else max(1, math.ceil(rng.expovariate(1.0 / MEAN_TOKENS)))
        yield Request(at, 1, tokens, -1)


def one_line(servers: int, path: Iterable[Request]) -> float:
    """The mean wait when every free server takes the next: by hand, server by server."""
    free = [0.0] * servers
    waits, count = 0.0, 0
    for request in path:
        count += 1
        begins = max(request.at_s, free[0])
        waits += begins - request.at_s
        heapq.heapreplace(free, begins + (request.output_tokens - 1) * TOKEN_S)
    return waits / count


def simulated_wait_s(servers: int, path: Iterable[Request]) -> float:
    """The mean wait of a fleet whose machines are given a request when they are idle."""
    profile: Profile = replace(PROFILE, hold_s=1e-6)
    one = setting(
        profile=profile,
        timings=one_at_a_time(),
        late_bound_s=None,
        timeout_s=1e9,
        pool=servers,
        hot=servers,
        context=1_000_000,
        turn_s=60.0,
        beat_s=10.0,
    )
    out = simulate(one, Fixed(servers, servers), path)
    assert not out.failed
    mean = out.route.spread()["mean"]
    assert mean is not None
    return mean


def erlang_c(servers: int, load: float) -> float:
    """The share that waits, M/M/k."""
    a = servers * load
    terms = sum(a**n / math.factorial(n) for n in range(servers))
    last = a**servers / math.factorial(servers) / (1.0 - load)
    return last / (terms + last)


QUEUES = pytest.mark.parametrize(
    ("servers", "load", "fixed"),
    [(1, 0.6, False), (1, 0.8, True), (3, 0.7, False)],
    ids=["M/M/1", "M/D/1", "M/M/3"],
)


@QUEUES
def test_waits_are_those_of_one_line_on_the_same_arrivals(servers: int, load: float, fixed: bool) -> None:
    """Within 1 %. A machine is known to be idle when its client says that it has its answer."""
    path = list(itertools.islice(queue_path(servers, load, fixed, seed=3), 6_000))
    assert simulated_wait_s(servers, path) == pytest.approx(one_line(servers, path), rel=0.01)


@QUEUES
def test_waits_of_one_line_are_those_of_queueing_theory(servers: int, load: float, fixed: bool) -> None:
    """Within 1 %: Pollaczek and Khinchine for one server, Erlang's C for several. With the test before: 2 %.

    The first of n tokens comes with the prompt, which takes no time here.
    """
    mean_s = (MEAN_TOKENS - (1.0 if fixed else 0.5)) * TOKEN_S
    rate = servers * load / (MEAN_TOKENS * TOKEN_S)
    share = rate * mean_s / servers
    expected = erlang_c(servers, share) * mean_s / (servers * (1.0 - share)) * (0.5 if fixed else 1.0)
    path = itertools.islice(queue_path(servers, load, fixed, seed=1), 2_000_000)
    assert one_line(servers, path) == pytest.approx(expected, rel=0.01)


# -- conservation, determinism ---------------------------------------------------------------------------


def digest(out: Outcome) -> tuple[Any, ...]:
    return (
        out.requests,
        out.completed,
        out.missed,
        out.first_token.spread(),
        out.whole.spread(),
        out.costs,
        out.took,
        out.over_time.samples,
        out.audit,
    )


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    hazards = Hazards(no_gpu=0.3, dies_h=2.0)

    def run(seed: int) -> Outcome:
        return simulate(setting(seed=seed, hazards=hazards), Busy(), poisson(12.0, 6_000, 3))

    assert digest(run(5)) == digest(run(5))
    assert digest(run(5)) != digest(run(6))


def test_every_request_ends_once_and_every_token_belongs_to_one() -> None:
    out = simulate(setting(), Busy(), poisson(10.0, 5_000, 1))
    assert out.requests == out.completed == out.audit["requests"] == 5_000
    assert out.audit["tokens_made"] == out.audit["tokens_delivered"] == 5_000 * 180
    assert out.output_tokens == 5_000 * 180


def test_the_ledger_has_every_dollar_that_the_cloud_charged() -> None:
    out = simulate(setting(), Busy(), poisson(12.0, 15_000, 1))
    moves = len(out.took)
    assert moves > 4
    # What passes between two listings is seen up to a turn late.
    most = moves * 10.0 * 1.2 / 3600.0
    assert out.audit["usd_in_ledger"] == pytest.approx(out.audit["usd_charged"], abs=most)


def test_machines_that_die_or_are_lost_cost_retries_and_no_request() -> None:
    hazards = Hazards(dies_h=3.0, offline_h=3.0, no_gpu=0.2)
    out = simulate(setting(hazards=hazards, pool=8, hot=3), Fixed(3, 8), poisson(6.0, 12_000, 2))
    assert out.setbacks["broken_off"] > 0
    assert out.retried > 0
    assert out.completed == 12_000
    assert out.audit["tokens_made"] > out.audit["tokens_delivered"]  # what was broken off was made twice


def test_what_is_sent_to_a_host_that_is_lost_for_a_moment_is_broken_off_and_tried_again(
    tmp_path: Path,
) -> None:
    fleet = VirtualFleet(setting(pool=2, hot=2), Fixed(2, 2), poisson(20.0, 40, 1), tmp_path)
    fleet.prepare()
    lost = next(iter(fleet.instances)).id
    fleet.instances.freeze(lost, frozen=True)
    fleet.loop.at(fleet.loop.now + 10.0, lambda: fleet.instances.freeze(lost, frozen=False))
    fleet.play()
    out = fleet.finish()
    assert out.setbacks["broken_off"] > 0
    assert out.completed == 40


def test_an_interruptible_fleet_is_outbid_and_comes_back() -> None:
    hazards = parse_hazards("outbid_h=2,outbid_s=300,bid=0.6")
    out = simulate(setting(hazards=hazards, pool=6, hot=2), Fixed(2, 6), poisson(4.0, 12_000, 2))
    assert out.completed == 12_000
    assert sum(kind == "boot" for kind, _, _ in out.took) > 0


def test_a_market_that_is_empty_is_said_and_not_waited_for() -> None:
    from process.errors import ConfigError

    none = (Machine(1, "RTX 3090", 0.2, reliability=0.5),)
    with pytest.raises(ConfigError, match="no offer of the market suits vllm-13"):
        simulate(setting(machines=none), Busy(), poisson(1.0, 10, 1))


class Absurd:
    """A policy that asks for what cannot be."""

    memory_s = 0.0

    def targets(self, seen: FleetSnapshot) -> Targets:
        return Targets(-1, 10**9, "absurd")

    def scaled(self, speedup: float) -> "Absurd":
        return self


def test_a_policy_that_asks_for_minus_one_or_a_billion_is_clamped_and_it_is_said() -> None:
    from fleet.limits import Limits

    limits = Limits(max_instances=5, max_usd_h=100.0)
    out = simulate(setting(limits=limits, pool=2, timeout_s=60.0), Absurd(), poisson(0.5, 300, 1))
    assert max(sum(s.states.values()) for s in out.over_time.samples) <= 5
    assert set(out.clamped) == {"hot", "total"}
    assert min(out.clamped.values()) > 100  # in every turn


def test_late_requests_let_those_in_time_pass_and_without_the_lane_they_do_not() -> None:
    """A burst of a minute at four times what one machine can do."""

    def burst() -> Iterator[Request]:
        rng = random.Random(1)
        at = 0.0
        while at < 900.0:
            at += rng.expovariate(30.0 if 100.0 <= at < 160.0 else 4.0)
            yield Request(at, 300, 180, -1)

    with_lane = simulate(setting(pool=1), Fixed(1, 1), burst())
    one_line = simulate(setting(pool=1, late_bound_s=None), Fixed(1, 1), burst())
    assert with_lane.missed < 0.7 * one_line.missed
    assert with_lane.late > 0
    waits = with_lane.late_wait.spread()
    assert waits["max"] is not None
    assert waits["max"] <= 300.0 + 60.0


def test_a_run_takes_gpus_that_are_known_only_by_name_or_by_the_numbers_of_their_offer() -> None:
    """Nothing was measured of either; the new one has twice the bandwidth, and is done earlier."""
    known = replace(A100[0], machine_id=1, gpu_name="RTX 5090", usd_gpu_h=0.5)
    new = replace(
        known,
        machine_id=2,
        gpu_name="New and fast",
        gpu_ram_mb=65_536,
        gpu_tflops=210.0,
        gpu_mem_bw=3_584.0,
    )
    took_s = []
    for machine in (known, new):
        out = simulate(setting(machines=(machine,), pool=1), Fixed(1, 1), poisson(0.1, 40, 3, output=600))
        assert out.completed == out.requests == 40
        took_s.append(out.duration_s)
    assert took_s[1] < took_s[0]


def test_bytes_and_dearer_stopped_disks_cost_in_virtual_time_what_the_cloud_charges() -> None:
    """The audit compares ledger and cloud; without these prices nothing changes."""

    def played(realism: Realism) -> Outcome:
        return simulate(
            setting(realism=realism, pool=2, hot=1, turn_s=5.0), Fixed(2, 3), poisson(0.5, 600, seed=3)
        )

    kind, dear = played(NONE), played(HARSH.only(["bandwidth", "stopped_storage"]))
    assert kind.costs.traffic == 0.0
    assert dear.costs.traffic == pytest.approx(PROFILE.download_gb * 0.002), "one more is rented on the way"
    assert dear.audit["usd_charged"] == pytest.approx(dear.audit["usd_in_ledger"], rel=0.02)
    assert dear.costs.stopped > 1.5 * kind.costs.stopped > 0.0, "what is being stopped is in it, too"
