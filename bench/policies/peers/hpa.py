"""Kubernetes HPA on an external metric with AverageValue, which is also what KEDA runs from 1 to N.

Source: docs/reference/peers.md 5: kubernetes pkg/controller/podautoscaler replica_calculator.go and
horizontal.go, pkg/apis/autoscaling/v2/defaults.go; chart of vllm production-stack a6c01db (2026-08-05).

    every 15 s: n = ceil(total / target), but N when | total / (target N) - 1 | <= 0.1
    down: not below the largest n of the last 300 s;  up: at once
    up by at most max(+100 %, +4) in 15 s, down by up to 100 %;  within min .. max

N is the replica count that was asked for: starting pods count in the ratio. Metrics: `HpaInFlight` counts
requests in flight and held, since those of a gateway are no pod's (section 19). It has no published target,
so 80 % of the requests an instance holds is taken, HPA's default for CPU (DefaultCPUUtilization).
`HpaWaiting` is the chart's trigger: vllm:num_requests_waiting over 5, polled each 15 s, 1 to 5 replicas; what
waits is what is held here. The missing- and not-ready rules are for per-pod metrics, so not for these.
"""

import math
from dataclasses import dataclass, field

from bench.policies.peers.rule import PeerRule, known, over_zero, whole_up
from bench.policies.peers.windows import Peak
from policies import FleetSnapshot, Targets


@dataclass(eq=False)
class Hpa(PeerRule):
    """What both metrics share. up_share, up_pods, down_share: most change in up_period_s (the sync)."""

    tick_s: float = 15.0
    tolerance: float = 0.1
    up_share: float = 1.0
    up_pods: int = 4
    down_share: float = 1.0
    downscale_stabilization_s: float = 300.0
    _recommended: Peak = field(init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "downscale_stabilization_s", "min_replicas")  # 0 is behind an alpha gate
        self._recommended = Peak(self.downscale_stabilization_s)

    def metric(self, seen: FleetSnapshot) -> tuple[float, float | None]:
        """Return the total, and the target of it per replica; None when the target is not known."""
        raise NotImplementedError(type(self).__name__)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Recommend, stabilise, limit the rate, keep within the limits."""
        if self._n is None:
            self._n = max(self.limited(seen.hot + seen.coming), 1)
            self._recommended.note(seen.now, self._n)
        n = self._n
        total, target = self.metric(seen)
        wanted = n
        if target is not None and abs(total / (target * n) - 1.0) > self.tolerance:
            wanted = whole_up(total / target)
        floor = int(self._recommended.note(seen.now, wanted))
        stable = wanted if wanted > n else min(n, floor)
        most = max(math.ceil(n * (1.0 + self.up_share)), n + self.up_pods)
        least = math.floor(n * (1.0 - self.down_share))
        self._n = self.limited(min(max(stable, least), most))
        return Targets(self._n, self._n, f"metric {total:.1f} wants {wanted}, {floor} in 300 s")


@dataclass(eq=False)
class HpaInFlight(Hpa):
    """target: requests per replica; None is share of what an instance holds."""

    target: float | None = None
    share: float = 0.8

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "target", "share")

    def metric(self, seen: FleetSnapshot) -> tuple[float, float | None]:
        """Return requests in flight and held."""
        capacity = known(seen.capacity)
        target = self.target
        if target is None and capacity is not None:
            target = self.share * capacity.concurrency
        return seen.traffic.in_flight + seen.traffic.held, target


@dataclass(eq=False)
class HpaWaiting(Hpa):
    """threshold: requests waiting per replica, of the chart."""

    max_replicas: int = 5
    threshold: float = 5.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "threshold")

    def metric(self, seen: FleetSnapshot) -> tuple[float, float | None]:
        """Return requests that wait."""
        return seen.traffic.held, self.threshold
