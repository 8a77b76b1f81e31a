"""RunPod Serverless: workers by request count, or one more when a request has waited too long.

Source: docs/reference/peers.md 13: runpod/docs serverless (2026-08-20). Closed: documentation only.

    request count   N = ceil((queued + in progress) / scaler_value)
    queue delay     a request has waited over 4 s: one more worker
    both            a worker that was idle for idle_timeout (5 s) stops; 0 active workers, at most 3

Not published, so assumed: both look every 2 s; a worker is idle when the requests in progress would fit the
others (kind to it: packed as if by most-recently-busy routing); queue delay adds one worker in each delay
while something waits, and does not count those that still start, unless `counts_starting` is set, which adds
none while one is on its way. scaler_value has no default of its own for request count: the form's 4 is taken.
"""

from dataclasses import dataclass, field

from bench.policies.peers.rule import EARLY_S, PeerRule, known, over_zero, whole_up
from bench.policies.peers.windows import Peak
from policies import FleetSnapshot, Targets


def busy_workers(seen: FleetSnapshot) -> int:
    """Return workers that requests in progress fill when packed; all hot ones while none is known."""
    capacity = known(seen.capacity)
    if capacity is None:
        return seen.hot if seen.traffic.in_flight > 0.0 else 0
    return min(seen.hot, whole_up(seen.traffic.in_flight / capacity.concurrency))


@dataclass(eq=False)
class RunPodRequestCount(PeerRule):
    """scaler_value: requests per worker."""

    tick_s: float = 2.0
    min_replicas: int = 0
    max_replicas: int = 3
    scaler_value: float = 4.0
    idle_timeout_s: float = 5.0
    _wanted: Peak = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "scaler_value", "idle_timeout_s")
        self._wanted = Peak(self.idle_timeout_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return what the count asks for or what is busy, the most of it in the idle timeout."""
        requests = seen.traffic.in_flight + seen.traffic.held
        wanted = max(whole_up(requests / self.scaler_value), busy_workers(seen))
        n = self.limited(int(self._wanted.note(seen.now, wanted)))
        return Targets(n, n, f"{requests:.1f} requests want {wanted}")


@dataclass(eq=False)
class RunPodQueueDelay(PeerRule):
    """scaler_value_s: the wait that asks for one more worker."""

    tick_s: float = 2.0
    min_replicas: int = 0
    max_replicas: int = 3
    scaler_value_s: float = 4.0
    idle_timeout_s: float = 5.0
    counts_starting: bool = False
    _busy: Peak = field(init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)
    _added_at: float = field(default=float("-inf"), init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "scaler_value_s", "idle_timeout_s")
        self._busy = Peak(self.idle_timeout_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return one more while something waits too long; the idle ones go once nothing waits."""
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        traffic = seen.traffic
        waits = traffic.held > 0.0
        if waits and traffic.oldest_wait_s > self.scaler_value_s:
            starting = self.counts_starting and self._n > seen.hot
            if not starting and seen.now - self._added_at >= self.scaler_value_s - EARLY_S:
                self._n, self._added_at = self.limited(self._n + 1), seen.now
        used = int(self._busy.note(seen.now, self._n if waits else busy_workers(seen)))
        if not waits:
            self._n = self.limited(min(self._n, used))
        return Targets(self._n, self._n, f"oldest waits {traffic.oldest_wait_s:.1f} s")
