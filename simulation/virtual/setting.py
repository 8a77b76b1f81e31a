"""All that a run in virtual time depends on, beside the trace and the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.gpus import GpuNumbers
from engine.profile import Profile
from engine.slo import Slo
from engine.step_time_constants import Key, Timing
from fleet.gpu_numbers import numbers_of
from fleet.limits import Limits
from localcloud.durations import Times
from localcloud.machines import Machine
from localcloud.realism import NONE, Realism
from simulation.virtual.cloud import Hazards
from vast.rows import Offer, Row

TURN_S = 5.0
"""Seconds between two turns of the autoscaler: the default of its --poll-interval-s."""

BEAT_S = 1.0
"""Seconds between two rounds of the loadbalancer's background work: tokens, load reports, expiry."""

CALL_S = 0.5
"""Seconds that a call of the vastai CLI takes (vast-contract 1.3)."""


@dataclass(frozen=True)
class Setting:
    """All that a run in virtual time depends on, beside trace and policy. Times in seconds.

    pool, hot: loaded instances, and hot ones, when the first request arrives. lead_in_s: how long before the
    trace's beginning, its time 0, that is. score_from_s, score_to_s: only what
    arrives and is spent between them counts, measured from that beginning. context: the longest request,
    prompt and answer; longer prompts are cut, and counted. timings: constants that replace or add to those
    of engine/step_time_constants.py. late_bound_s: None for one line, first come first served. tells_length:
    users say how long their answer will be (as sim.py's do), or not at all, so that the loadbalancer expects
    the mean.
    """

    profile: Profile
    machines: Sequence[Machine]
    limits: Limits = field(default_factory=lambda: Limits(max_instances=200, max_usd_h=1e6))
    slo: Slo = field(default_factory=Slo)
    times: Times | None = None
    hazards: Hazards = field(default_factory=Hazards)
    realism: Realism = NONE
    timings: Mapping[Key, Timing] = field(default_factory=dict)
    speedup: float = 1.0
    late_bound_s: float | None = 300.0
    timeout_s: float = 600.0
    pool: int = 4
    hot: int = 1
    lead_in_s: float = 0.0
    seed: int = 0
    score_from_s: float = 0.0
    score_to_s: float = float("inf")
    context: int | None = None
    replay_every_s: float = 1800.0
    tells_length: bool = False
    turn_s: float = TURN_S
    beat_s: float = BEAT_S

    def timing(self, gpu_name: str, num_gpus: int, told: GpuNumbers | None) -> Timing:
        """Return the step-time constants of a model server on these GPUs. told: what their offer says."""
        return self.profile.timing_on(gpu_name, num_gpus, told, self.timings)

    def timing_of(self, listed: Offer | Row) -> Timing:
        """Return the same for what is offered or rented."""
        return self.timing(listed.gpu_name, listed.num_gpus, numbers_of(listed))
