"""Documented-target model of Vast.ai Serverless: hot and stopped capacity as multiples of the load.

Source: docs/reference/peers.md 1: vast-ai/docs guides/serverless (2026-08-07), CLI, SDK and API reference.
The engine is closed: this follows what its documentation promises, not its code. Its two sets of defaults
differ, so both are here.

    hot   = max(min_load, anticipated load) / target_util         tokens/s of running workers
    total = max(cold_mult * load, min_cold_load)                  tokens/s of running and stopped workers
    at least min_workers loaded, at most max_workers in all
    queue time > target_queue_time: more, "aggressively"

Load is output tokens: prompts are free there, which is a weakness and kept. Not published, so assumed here,
to its favour (tried on a bursty trace: shorter means flap and cost a quarter more): *anticipated load* is the
larger of the means of the last 5 and of the last 30 minutes; the 1 h plan holds the largest total of the last
hour, so that a lull destroys nothing; target_queue_time is max_queue_time, 30 s (5 and 10 s cost more and
missed no fewer); "aggressively" is as many more workers as empty the queue in that time. The docs also call
cold_mult a multiple of the hot target; the form of docs/reference/peers.md is taken.
"""

import math
from dataclasses import dataclass, field

from bench.policies.peers.rule import PeerRule, known, over_zero, whole_up
from bench.policies.peers.windows import Growth, Peak
from policies import FleetSnapshot, Targets


@dataclass(eq=False)
class VastServerless(PeerRule):
    """Fields by their documented names; loads in output tokens per second, the defaults are the guide's.

    tick_s: workers report every 10 s, or after 1 s when something changed; looked at every 5 s here.
    """

    tick_s: float = 5.0
    min_replicas: int = 0
    target_util: float = 0.9
    cold_mult: float = 3.0
    min_workers: int = 5
    max_workers: int = 16
    min_load: float = 1.0
    min_cold_load: float = 0.0
    target_queue_time_s: float = 30.0
    short_s: float = 300.0
    long_s: float = 1800.0
    plan_s: float = 3600.0
    _loads: tuple[Growth, Growth] = field(init=False, repr=False)
    _planned: Peak = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "target_util", "target_queue_time_s", "short_s", "long_s", "plan_s")
        self._loads = (Growth(self.short_s), Growth(self.long_s))
        self._planned = Peak(self.plan_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return hot and total from the load, both in tokens per second over those of one worker."""
        traffic = seen.traffic
        tokens = traffic.output_tokens_total
        anticipated = max(window.rate(seen.now, tokens) for window in self._loads)
        capacity = known(seen.capacity)
        if capacity is None:
            hot = min(max(seen.hot + seen.coming, 1), self.max_workers)
            return Targets(hot, min(max(hot, self.min_workers), self.max_workers), "no benchmark yet")
        of_work = tokens / traffic.work_total if min(tokens, traffic.work_total) > 0.0 else 1.0
        perf = capacity.work_s * of_work
        queued = traffic.held_work * of_work
        wanted = max(self.min_load, anticipated) / self.target_util
        why = f"{anticipated:.0f} tok/s anticipated"
        queue_time = queued / (perf * seen.hot) if seen.hot > 0 else math.inf if queued > 0.0 else 0.0
        if queue_time > self.target_queue_time_s:
            wanted += queued / self.target_queue_time_s
            why += f", queue of {queue_time:.0f} s"
        hot = min(whole_up(wanted / perf), self.max_workers)
        planned = whole_up(max(self.cold_mult * anticipated, self.min_cold_load) / perf)
        planned = int(self._planned.note(seen.now, max(planned, hot)))
        total = min(max(planned, self.min_workers), self.max_workers)
        return Targets(hot, total, why)


GUIDE = {"cold_mult": 3.0, "min_workers": 5, "max_workers": 16, "min_load": 1.0}
"""The serverless guide and the console's form."""

CLI = {"cold_mult": 2.5, "min_workers": 5, "max_workers": 20, "min_load": 0.0}
"""The command line and the SDK."""

API = {"cold_mult": 2.5, "min_workers": 5, "max_workers": 20, "min_load": 10.0}
"""The HTTP API: as the command line, but for the load."""
