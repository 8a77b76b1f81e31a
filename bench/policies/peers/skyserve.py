"""SkyPilot SkyServe, RequestRateAutoscaler: requests per second over a target, with long patience.

Source: docs/reference/peers.md 2: wheel skypilot 0.14.1, sky/serve/autoscalers.py and constants.py.

    q = arrivals of the last 60 s / 60;  c = ceil(q / target_qps_per_replica), within the limits
    N = 0: N = c at once;  c > N for 15 looks in a row: N = c;  c < N for 60 looks in a row: N = c

A look is every 20 s, every 5 s while N is 0. What is committed is the last c, not the largest. Replicas that
are still starting count, so nothing overshoots; nothing looks ahead either. The target has no default: it is
qps_share of what one typical instance of ours serves, with the lengths of this load.
max_replicas is 1 unless the operator sets it, who must, so it is open here.
"""

from dataclasses import dataclass, field

from bench.policies.peers.rule import EARLY_S, PeerRule, known, over_zero, whole_up
from bench.policies.peers.windows import Growth
from policies import FleetSnapshot, Targets


@dataclass(eq=False)
class SkyServe(PeerRule):
    """Fields by their names in the service file. tick_s: of the look at zero; look_s otherwise."""

    tick_s: float = 5.0
    look_s: float = 20.0
    target_qps_per_replica: float | None = None
    qps_share: float = 1.0
    qps_window_s: float = 60.0
    upscale_delay_s: float = 300.0
    downscale_delay_s: float = 1200.0
    num_overprovision: int = 0
    _arrived: Growth = field(init=False, repr=False)
    _next_look: float = field(default=float("-inf"), init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)
    _up: int = field(default=0, init=False, repr=False)
    _down: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "look_s", "target_qps_per_replica", "qps_share", "qps_window_s")
        self._arrived = Growth(self.qps_window_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Count the arrivals at every call, and look when it is time to."""
        arrived = self._arrived.note(seen.now, seen.traffic.requests_total)
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        if self._n > 0 and seen.now < self._next_look - EARLY_S:
            return self._said
        self._next_look = seen.now + self.look_s
        capacity = known(seen.capacity)
        target = self.target_qps_per_replica
        if target is None and capacity is not None:
            target = self.qps_share * capacity.requests_s
        qps = arrived / self.qps_window_s
        wanted = self.limited(whole_up(qps / target)) if target is not None else self.min_replicas
        self._commit(wanted)
        n = min(self._n + self.num_overprovision, self.max_replicas)
        return Targets(n, n, f"{qps:.2f} requests/s want {wanted}")

    def _commit(self, wanted: int) -> None:
        assert self._n is not None
        if self._n == 0:
            self._n = wanted
        elif wanted > self._n:
            self._up, self._down = self._up + 1, 0
            if self._up >= int(self.upscale_delay_s / self.look_s):
                self._up, self._n = 0, wanted
        elif wanted < self._n:
            self._up, self._down = 0, self._down + 1
            if self._down >= int(self.downscale_delay_s / self.look_s):
                self._down, self._n = 0, wanted
        else:
            self._up = self._down = 0
