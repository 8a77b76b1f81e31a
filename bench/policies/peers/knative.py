"""Knative pod autoscaler (KPA): concurrency over a target, in a long window and a short one for panic.

Source: docs/reference/peers.md 4: knative/serving 98e5ef9 (2026-08-21), pkg/autoscaler, files
scaling/autoscaler.go and config/config.go.

    stable, panic = mean concurrency of the last 60 s and 6 s;  R = max(1, ready)
    want = ceil(mean / target), within floor(R / 2) .. ceil(1000 R), for each
    panic begins when ceil(panic / target) / R >= 2, and ends 60 s after that was last so
    N = want of the stable window; in panic the largest want since panic began: it never falls
    then the largest N of scale_down_delay (0 s);  target = 0.7 * container concurrency (100)

Ready pods only: what is starting does not count, so a slow start is seen as ever more to do. Requests held at
the loadbalancer count, as those in the activator do. An autoscaler that wakes up with more than one ready pod
begins in panic. Down to zero only after the grace of 30 s (there an upper bound, taken as the time it needs).
"""

from dataclasses import dataclass, field

from bench.policies.peers.rule import EARLY_S, PeerRule, over_zero, whole_up
from bench.policies.peers.windows import Gauge, Peak
from policies import FleetSnapshot, Targets


@dataclass(eq=False)
class KnativeKpa(PeerRule):
    """Fields by their names in config-autoscaler, percentages as shares."""

    tick_s: float = 2.0
    min_replicas: int = 0
    container_concurrency: float = 100.0
    target_share: float = 0.7
    stable_window_s: float = 60.0
    panic_window_share: float = 0.1
    panic_threshold: float = 2.0
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    scale_down_delay_s: float = 0.0
    scale_to_zero_grace_s: float = 30.0
    _stable: Gauge = field(init=False, repr=False)
    _short: Gauge = field(init=False, repr=False)
    _delayed: Peak = field(init=False, repr=False)
    _panic_at: float | None = field(default=None, init=False, repr=False)
    _panic_peak: int = field(default=0, init=False, repr=False)
    _awake: bool = field(default=False, init=False, repr=False)
    _idle_since: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "container_concurrency", "target_share", "stable_window_s", "panic_window_share")
        over_zero(self, "panic_threshold", "max_scale_up_rate", "max_scale_down_rate")
        self._stable = Gauge(self.stable_window_s)
        self._short = Gauge(self.stable_window_s * self.panic_window_share)
        self._delayed = Peak(self.scale_down_delay_s)

    @property
    def target(self) -> float:
        """Requests at once that a pod should have."""
        return self.target_share * self.container_concurrency

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return the larger of the two windows while in panic, else the stable one."""
        now, concurrency = seen.now, seen.traffic.in_flight + seen.traffic.held
        for window in (self._stable, self._short):
            window.note(now, concurrency)
        if not self._awake:
            self._awake = True
            if seen.hot > 1:
                self._panic_at, self._panic_peak = now, seen.hot
        ready = max(1, seen.hot)
        least, most = int(ready / self.max_scale_down_rate), whole_up(self.max_scale_up_rate * ready)
        means = self._stable.mean(), self._short.mean()
        raw = [whole_up(mean / self.target) for mean in means]
        stable, panic = (min(max(n, least), most) for n in raw)
        if raw[1] / ready >= self.panic_threshold:
            self._panic_at = now
        elif self._panic_at is not None and now > self._panic_at + self.stable_window_s + EARLY_S:
            self._panic_at, self._panic_peak = None, 0
        n = stable
        if self._panic_at is not None:
            n = self._panic_peak = max(self._panic_peak, stable, panic)
        n = self.limited(int(self._delayed.note(now, n)))
        n = self._after_grace(n, now)
        mode = "stable" if self._panic_at is None else "panic"
        return Targets(n, n, f"{means[0]:.1f} in the long window, {means[1]:.1f} in the short one, {mode}")

    def _after_grace(self, n: int, now: float) -> int:
        if n > 0:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._idle_since is not None and now - self._idle_since < self.scale_to_zero_grace_s - EARLY_S:
            return min(1, self._said.hot)
        return n
