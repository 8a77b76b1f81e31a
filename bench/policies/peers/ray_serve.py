"""Ray Serve, replica_queue_length policy: ongoing and queued requests over a target, after a delay.

Source: docs/reference/peers.md 3: wheel ray 2.60.0, serve/autoscaling_policy.py, config.py.

    total   = mean over the last 30 s of (queued + running), as pushed by the handles every 10 s
    d       = total / target_ongoing_requests
    s       = ceil(running + factor * (d - running));  one less when rounding would hide a wish for fewer
    s > N for 30 s without a break: N = s;  s < N for 600 s without a break: N = max(1, s)
    nothing running and something waiting: N at least 1, at once

Running is what is ready; what is starting counts only through N. The backlog of a long load is in `total`, so
it overshoots. num_replicas="auto" (1 to 100) is what turns autoscaling on. Its loop runs every 0.1 s; nothing
it reads changes more often than every 10 s, so it is looked at every 2 s here.
"""

from dataclasses import dataclass, field

from bench.policies.peers.rule import EARLY_S, PeerRule, over_zero, whole_up
from bench.policies.peers.windows import Gauge
from policies import FleetSnapshot, Targets


@dataclass(eq=False)
class RayServe(PeerRule):
    """Fields by their names in AutoscalingConfig. downscale_to_zero_delay_s: None is downscale_delay_s."""

    tick_s: float = 2.0
    max_replicas: int = 100
    target_ongoing_requests: float = 2.0
    look_back_period_s: float = 30.0
    push_interval_s: float = 10.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    downscale_to_zero_delay_s: float | None = None
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    _pushed: Gauge = field(init=False, repr=False)
    _unpushed: list[tuple[float, float]] = field(default_factory=list, init=False, repr=False)
    _next_push: float = field(default=float("-inf"), init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)
    _more_since: float | None = field(default=None, init=False, repr=False)
    _less_since: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(
            self, "target_ongoing_requests", "look_back_period_s", "upscaling_factor", "downscaling_factor"
        )
        self._pushed = Gauge(self.look_back_period_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return the wish of this moment, committed once it has lasted."""
        total = self._total(seen)
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        if seen.hot == 0:
            if total > 0.0:
                self._n = self.limited(max(whole_up(self.upscaling_factor), self._n))
            return Targets(self._n, self._n, f"{total:.1f} ongoing, none running")
        wish = self._wish(total, seen.hot)
        self._commit(wish, seen.now)
        return Targets(self._n, self._n, f"{total:.1f} ongoing want {wish}")

    def _total(self, seen: FleetSnapshot) -> float:
        self._unpushed.append((seen.now, seen.traffic.in_flight + seen.traffic.held))
        if seen.now >= self._next_push - EARLY_S:
            self._next_push = seen.now + self.push_interval_s
            for at, value in self._unpushed:
                self._pushed.note(at, value)
            self._unpushed.clear()
        self._pushed.forget(seen.now)
        return self._pushed.mean()

    def _wish(self, total: float, running: int) -> int:
        exact = total / self.target_ongoing_requests
        factor = self.upscaling_factor if exact > running else self.downscaling_factor
        wish = whole_up(running + factor * (exact - running))
        if whole_up(exact) < running and wish == running:
            wish -= 1
        return self.limited(wish)

    def _commit(self, wish: int, now: float) -> None:
        assert self._n is not None
        if wish > self._n:
            self._less_since = None
            if self._more_since is None:
                self._more_since = now
            if now - self._more_since >= self.upscale_delay_s - EARLY_S:
                self._n, self._more_since = wish, None
        elif wish < self._n:
            self._more_since = None
            if self._less_since is None:
                self._less_since = now
            delay_s = self.downscale_delay_s
            if self._n == 1 and self.downscale_to_zero_delay_s is not None:
                delay_s = self.downscale_to_zero_delay_s
            if now - self._less_since >= delay_s - EARLY_S:
                self._n, self._less_since = wish if self._n == 1 else max(1, wish), None
        else:
            self._more_since = self._less_since = None
