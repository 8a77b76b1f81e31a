"""The snapshot of the fleet: the numbers that a policy decides on."""

from collections.abc import Iterable, Sequence
from typing import cast

from engine.profile import Profile
from fleet.arrivals import Mix
from fleet.demand import Demand
from fleet.durations import MeasuredDurations, median
from fleet.instance import Instance
from fleet.states import GIVEN_UP, State
from policies import BIN_S, Capacity, FleetSnapshot

EXPECTED_PROMPT_TOKENS = 300.0
"""Prompt tokens of a request, until one has arrived: those that the profiles' throughputs are given for."""


def take_snapshot(
    instances: Iterable[Instance],
    demand: Demand,
    profile: Profile,
    durations: MeasuredDurations,
    now: float,
    memory_s: float,
) -> FleetSnapshot:
    """Return the fleet's snapshot for a policy that looks back memory_s seconds."""
    hot = coming = loading = cold = draining = 0
    hot_work_s: list[float] = []
    loaded_work_s: list[float] = []
    running_usd_h: list[float] = []
    stopped_usd_h: list[float] = []
    for i in instances:
        state = i.state
        if state in GIVEN_UP:
            continue
        if state is State.HOT and i.trouble.slow.clients is not None:
            draining += 1  # it is held back: its capacity is not there
        elif state is State.HOT:
            hot += 1
            hot_work_s.append(i.throughput_work_s)
        elif state is State.DRAINING:
            draining += 1
        elif state is State.COLD or state is State.STOPPING:
            cold += 1
        elif i.is_coming:
            coming += 1
        else:
            loading += 1
        if i.loaded:
            loaded_work_s.append(i.throughput_work_s)
        if i.running_usd_h > 0.0:
            running_usd_h.append(i.running_usd_h)
        if i.listed:
            stopped_usd_h.append(i.stopped_usd_h)
    work_s = median(hot_work_s) or median(loaded_work_s) or profile.throughput_work_s
    return FleetSnapshot(
        now=now,
        demand=demand.since(now - memory_s),
        hot=hot,
        coming=coming,
        loading=loading,
        cold=cold,
        draining=draining,
        start_time_s=durations.start_s,
        load_time_s=durations.load_s,
        traffic=demand.traffic,
        capacity=_capacity(demand.saturation.work_s or work_s, demand.history.mix, profile),
        arriving=cast("Sequence[float]", demand.history.work_s(now, memory_s)) if memory_s >= BIN_S else (),
        running_usd_h=median(running_usd_h) or 0.0,
        stopped_usd_h=median(stopped_usd_h) or 0.0,
    )


def _capacity(work_s: float, mix: Mix | None, profile: Profile) -> Capacity:
    """Return the capacity of an instance that does work_s a second. mix: the mean request, or None."""
    if mix is None:
        output = profile.expected_output_tokens
        work = profile.prefill_weight * EXPECTED_PROMPT_TOKENS + output
        mix = Mix(work, EXPECTED_PROMPT_TOKENS, output)
    concurrency = work_s * profile.hold_s / mix.work
    # An answer that is under way is half there on average.
    kv_tokens = concurrency * (mix.prompt_tokens + mix.output_tokens / 2.0)
    return Capacity(work_s, work_s / mix.work, concurrency, kv_tokens)
