"""NVIDIA Dynamo planner: the static thresholds it ships with, and its predictive throughput scaling.

Source: docs/reference/peers.md 12: wheel ai-dynamo 1.6.1, planner core/throughput_scaling.py,
load_scaling.py, load/predictors.py, config/defaults.py. Aggregated engines (prefill and decode together).

    static, every 5 s    util = (KV in use + KV queued + prompt tokens queued) / KV of an engine
    (the default)        any engine > 1.0: +1;  all < 0.6 and util N / (N - 1) stays under 1.0: -1
                         nothing while the last step is not done;  at least 1, at most 8 GPUs
    predictive           every 180 s: forecast requests, prompt and output length of the next interval;
    (target "sla")       N = ceil(requests/s / engine requests/s at these lengths and latencies)
                         at most 8 up or down at a step;  nothing while workers are pending

Engines are pooled here, so "any" and "all" read the same mean: with real routing some engine is fuller than
the mean and it would add sooner. The engine's rate is our measured capacity over the work of such a request,
which stands for its profiled performance model; sla_share under 1 is an operator who asks for tighter
latencies than needed, the only way its settings have to keep a reserve. Its ARIMA is pmdarima's
`auto_arima`; ours is in forecasts.py with the reason. Prophet is left out: heavy, and not the default.
An average over no requests is NaN there (#6985: cannot scale down at zero traffic); it counts as 0 here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.policies.peers.forecasts import Arima, Constant, Forecaster, Kalman
from bench.policies.peers.rule import PeerRule, known, over_zero, tokens_in_use, whole_up
from policies import FleetSnapshot, Targets

PROMPT_WORK = 0.1
"""Work of a prompt token in output tokens, as everywhere here (bench of issue 4)."""

PREDICTORS: dict[str, Callable[[], Forecaster]] = {"arima": Arima, "constant": Constant, "kalman": Kalman}

MAX_GPU_BUDGET = 8
"""GPUs in all; engines of one GPU here."""


@dataclass(eq=False)
class DynamoStatic(PeerRule):
    """optimization_target="throughput": 1.0 and 0.6; "latency": 0.4 and 0.1."""

    tick_s: float = 5.0
    max_replicas: int = MAX_GPU_BUDGET
    scale_up: float = 1.0
    scale_down: float = 0.6
    _n: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "scale_up", "scale_down")

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return one more, one fewer or as many as there are."""
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        capacity, n = known(seen.capacity), self._n
        if seen.hot < n or seen.hot == 0 or capacity is None:
            return Targets(n, n, "scaling in progress" if seen.hot < n else "no metrics")
        util = (tokens_in_use(seen) + seen.traffic.held_prompt_tokens) / (capacity.kv_tokens * seen.hot)
        if util > self.scale_up:
            self._n = self.limited(n + 1)
        elif n > 1 and util < self.scale_down and util * n / (n - 1) < self.scale_up:
            self._n = self.limited(n - 1)
        return Targets(self._n, self._n, f"KV use {util:.2f}")


@dataclass(eq=False)
class DynamoPredictive(PeerRule):
    """predictor: a key of PREDICTORS. sla_share: part of the engine's rate it reckons with."""

    tick_s: float = 180.0
    max_replicas: int = MAX_GPU_BUDGET
    predictor: str = "arima"
    sla_share: float = 1.0
    max_step: int = 8
    _series: tuple[Forecaster, Forecaster, Forecaster] = field(init=False, repr=False)
    _before: tuple[float, float, float, float] | None = field(default=None, init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "sla_share")
        if self.predictor not in PREDICTORS:
            raise ValueError(f"predictor {self.predictor!r}: wanted one of {', '.join(sorted(PREDICTORS))}")
        make = PREDICTORS[self.predictor]
        self._series = (make(), make(), make())

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Note the interval that ended, forecast the next, size for it."""
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        seconds = self._observe(seen)
        capacity = known(seen.capacity)
        if seconds <= 0.0 or capacity is None:
            return Targets(self._n, self._n, "nothing measured yet")
        if seen.hot < self._n:
            return Targets(self._n, self._n, f"{self._n - seen.hot} workers pending")
        requests, prompt, output = (series.next() for series in self._series)
        work = PROMPT_WORK * prompt + output
        engine_rps = self.sla_share * (capacity.work_s / work if work > 0.0 else capacity.requests_s)
        wanted = self.limited(whole_up(requests / seconds / engine_rps))
        self._n = min(max(wanted, self._n - self.max_step), self._n + self.max_step)
        return Targets(self._n, self._n, f"{requests:.0f} requests forecast, {engine_rps:.2f}/s an engine")

    def _observe(self, seen: FleetSnapshot) -> float:
        """Feed the forecasters with the interval since the last call; its length in seconds, 0 at first."""
        t = seen.traffic
        latest = (seen.now, t.requests_total, t.prompt_tokens_total, t.output_tokens_total)
        before, self._before = self._before, latest
        if before is None:
            return 0.0
        seconds, requests, prompt, output = (max(0.0, a - b) for a, b in zip(latest, before, strict=True))
        self._series[0].add(requests)
        self._series[1].add(prompt / requests if requests > 0.0 else 0.0)
        self._series[2].add(output / requests if requests > 0.0 else 0.0)
        return seconds
