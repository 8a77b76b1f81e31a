"""SageServe, LT-UA: an hourly forecast says how many more or fewer, memory use says when.

Source: docs/reference/peers.md 15: SageServe (SIGMETRICS 2026), arbiter.py (GlobalArbiterARIMAChecking),
global_arbiter.py, long_term_allocation.py and configs of its repository.

    hourly     need  = most of the forecast over [t + 20, t + 60] min, and 10 % for development traffic
               delta = ceil(need / capacity of one) - N            (its ILP with one model, region and GPU)
    at once    delta > 0 and memory use > 0.5: +1;   delta < 0 and memory use < 0.25: -1
               delta = 0 and tokens of the last minute > 5 times the forecast: one extra, to be given back
               (LT-U, extra="util": and memory use > 0.9)
    one action at a time: 65 s after one came back from spot, 155 s after a new one;  at least 2

What is taken down is *donated* to spot and reclaimed from there: our stopped pool, which it never destroys.
Its forecasts come from files made by ARIMA on weeks of minutes; ours is fitted on the minutes seen so far (at
most a day) with up to 20 lags. Until the first hour it is its own reactive baseline (+1 over 0.5, -1 under
0.25). Tokens are work here, the unit that capacity is known in. Memory use is KV tokens in use over what the
hot ones hold, or requests in flight over theirs where that is more: whichever fills first. It decides at each
request; every 5 s here. The 10 % is its own constant, and the margin its knob.
"""

from collections import deque
from dataclasses import dataclass, field

from bench.policies.peers.forecasts import fit
from bench.policies.peers.rule import EARLY_S, PeerRule, known, over_zero, tokens_in_use, whole_up
from bench.policies.peers.windows import Growth
from policies import Capacity, FleetSnapshot, Targets

MINUTE = 60
HISTORY = 24 * MINUTE
"""Minutes that the forecast is fitted on."""


@dataclass(eq=False)
class SageServe(PeerRule):
    """use_up, use_down: memory use; margin: on the forecast; extra: "ratio" (LT-UA) or "util" (LT-U)."""

    tick_s: float = 5.0
    min_replicas: int = 2
    margin: float = 1.1
    use_up: float = 0.5
    use_down: float = 0.25
    extra: str = "ratio"
    extra_ratio: float = 5.0
    extra_use: float = 0.9
    plan_every_s: float = 3600.0
    minute_s: float = 60.0
    reclaim_s: float = 65.0
    spin_up_s: float = 155.0
    max_lags: int = 20
    _last_minute: Growth = field(init=False, repr=False)
    _minutes: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY), init=False, repr=False)
    _minute_at: tuple[float, float] | None = field(default=None, init=False, repr=False)
    _forecast: list[float] = field(default_factory=list, init=False, repr=False)
    _planned_at: float | None = field(default=None, init=False, repr=False)
    _delta: int = field(default=0, init=False, repr=False)
    _acting_until: float = field(default=float("-inf"), init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(
            self, "margin", "use_up", "use_down", "extra_ratio", "extra_use", "plan_every_s", "minute_s"
        )
        if self.extra not in ("ratio", "util"):
            raise ValueError(f"extra {self.extra!r}: wanted ratio or util")
        self._last_minute = Growth(self.minute_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Keep the minutes, plan when the hour is round, act when memory use says so."""
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        lately = self._note(seen)
        capacity = known(seen.capacity)
        if capacity is None:
            return self._say(seen, "no capacity known yet")
        hour = len(self._minutes) >= round(self.plan_every_s / self.minute_s)
        if hour and (self._planned_at is None or seen.now - self._planned_at >= self.plan_every_s - EARLY_S):
            self._plan(seen.now, capacity)
        use = self._use(seen, capacity)
        if seen.now >= self._acting_until - EARLY_S:
            self._act(seen, use, lately)
        return self._say(seen, f"memory use {use:.2f}, {self._delta:+d} planned")

    def _say(self, seen: FleetSnapshot, why: str) -> Targets:
        assert self._n is not None
        return Targets(self._n, max(self._n, seen.total), why)

    def _note(self, seen: FleetSnapshot) -> float:
        """Note tokens of the last minute; full minutes go to the history."""
        work = seen.traffic.work_total
        lately = self._last_minute.note(seen.now, work)
        if self._minute_at is None or work < self._minute_at[1]:
            self._minute_at = (seen.now, work)
        since, before = self._minute_at
        if seen.now - since >= self.minute_s - EARLY_S:
            self._minutes.append((work - before) * self.minute_s / (seen.now - since))
            self._minute_at = (seen.now, work)
        return lately

    def _plan(self, now: float, capacity: Capacity) -> None:
        assert self._n is not None
        self._planned_at = now
        path = fit(list(self._minutes), max_p=self.max_lags).path(MINUTE)
        self._forecast = [max(0.0, tokens) for tokens in path]
        need = self.margin * max(self._forecast[MINUTE // 3 :])
        self._delta = self.limited(whole_up(need / (capacity.work_s * self.minute_s))) - self._n

    @staticmethod
    def _use(seen: FleetSnapshot, capacity: Capacity) -> float:
        if seen.hot == 0:
            return 1.0 if seen.traffic.held > 0.0 else 0.0
        kv = tokens_in_use(seen) / (capacity.kv_tokens * seen.hot)
        return max(kv, seen.traffic.in_flight / (capacity.concurrency * seen.hot))

    def _surprised(self, now: float, use: float, lately: float) -> bool:
        """Return whether the load is so far from the plan that one extra is due."""
        if self.extra == "util":
            return use > self.extra_use
        assert self._planned_at is not None
        minute = min(int((now - self._planned_at) / self.minute_s), len(self._forecast) - 1)
        return lately > self.extra_ratio * self._forecast[minute]

    def _act(self, seen: FleetSnapshot, use: float, lately: float) -> None:
        assert self._n is not None
        step = 0
        if self._planned_at is None:
            step = 1 if use > self.use_up else -1 if use < self.use_down else 0
        elif self._delta == 0:
            step = 1 if self._surprised(seen.now, use, lately) else 0
        elif self._delta > 0 and use > self.use_up:
            step = 1
        elif self._delta < 0 and use < self.use_down:
            step = -1
        n = self.limited(self._n + step)
        if n == self._n:
            return
        if self._planned_at is not None:
            self._delta -= n - self._n
        if n > self._n:
            self._acting_until = seen.now + (self.reclaim_s if seen.cold > 0 else self.spin_up_s)
        self._n = n
