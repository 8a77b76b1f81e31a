"""llm-d Workload Variant Autoscaler, V2 (tokens): demand and capacity in KV tokens, pending counted.

Source: docs/reference/peers.md 7: llm-d WVA internal/engines/{analyzers/saturation_v2,pipeline}
(2026-02-19). One variant here, so cheapest and dearest are the same.

    every 60 s, from the peaks of the last minute:
    cap      = min(k1, k2);  k1 = 0.80 * KV tokens of a replica
    k2       = tokens in use when its queue is 5 or more (mean of the last 10, by length of the output),
               else n (I + O/2) with n = min(B O / (I + O), S) from the engine's arguments
    demand   = tokens in use + waiting * mean prompt
    required = demand / 0.85 - cap (ready + pending)  > 0:  add ceil(required / cap)
    spare    = cap ready - demand / 0.70              > 0:  remove floor(spare / cap), keep 1

Pending replicas count, so a slow start does not overshoot; nothing looks ahead. B = 8192 and S = 256 are
vLLM's defaults. What is waiting is what is held. Scale to zero is an option and left out. Metrics are scraped
each 15 s.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from bench.policies.peers.rule import (
    EARLY_S,
    ROUNDING,
    PeerRule,
    known,
    mean_lengths,
    over_zero,
    tokens_in_use,
    whole_up,
)
from bench.policies.peers.windows import Gauge
from policies import Capacity, FleetSnapshot, Targets

OBSERVED = 10
"""Values of k2 that its rolling mean is over."""

OUTPUT_BUCKETS = (100.0, 500.0)
"""Output tokens at which another k2 is learned."""


@dataclass(eq=False)
class WvaTokens(PeerRule):
    """tick_s: scrape interval; loop_s: of the decision; the thresholds are shares."""

    tick_s: float = 15.0
    loop_s: float = 60.0
    scale_up: float = 0.85
    scale_down: float = 0.70
    kv_threshold: float = 0.80
    queue_threshold: float = 5.0
    max_batched_tokens: int = 8192
    max_num_seqs: int = 256
    _tokens: Gauge = field(init=False, repr=False)
    _waiting: Gauge = field(init=False, repr=False)
    _learned: dict[int, deque[float]] = field(default_factory=dict, init=False, repr=False)
    _next_loop: float = field(default=float("-inf"), init=False, repr=False)
    _n: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "loop_s", "scale_up", "scale_down", "kv_threshold", "queue_threshold")
        if self.scale_down > self.scale_up:
            raise ValueError(f"scale_down {self.scale_down:g}: wanted at most scale_up, {self.scale_up:g}")
        self._tokens, self._waiting = Gauge(self.loop_s), Gauge(self.loop_s)

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Scrape at every call, analyse when the loop comes round."""
        if self._n is None:
            self._n = self.limited(seen.hot + seen.coming)
        self._tokens.note(seen.now, tokens_in_use(seen))
        self._waiting.note(seen.now, seen.traffic.held)
        capacity = known(seen.capacity)
        if capacity is None:
            return Targets(self._n, self._n, "no metrics")
        if seen.now < self._next_loop - EARLY_S:
            return self._said
        self._next_loop = seen.now + self.loop_s
        prompt, _ = mean_lengths(seen)
        in_use, waiting = self._tokens.peak(), self._waiting.peak()
        cap = self._cap(seen, capacity, in_use, waiting)
        demand = in_use + waiting * prompt
        required = demand / self.scale_up - cap * max(self._n, seen.hot)
        spare = cap * seen.hot - demand / self.scale_down
        if required > 0.0:
            self._n = self.limited(max(self._n, seen.hot) + whole_up(required / cap))
        elif spare > 0.0:
            self._n = self.limited(self._n - math.floor(spare / cap + ROUNDING))
        return Targets(self._n, self._n, f"{demand:.0f} tokens wanted, {cap:.0f} a replica")

    def _cap(self, seen: FleetSnapshot, capacity: Capacity, in_use: float, waiting: float) -> float:
        """Return tokens a replica holds well; learned when it is full."""
        prompt, output = mean_lengths(seen)
        learned = self._learned.setdefault(
            sum(output >= edge for edge in OUTPUT_BUCKETS), deque(maxlen=OBSERVED)
        )
        if seen.hot > 0 and in_use > 0.0 and waiting / seen.hot >= self.queue_threshold:
            learned.append(in_use / seen.hot)
        k1 = self.kv_threshold * capacity.kv_tokens
        if learned:
            return min(k1, sum(learned) / len(learned))
        if output <= 0.0:
            return k1
        batch = min(self.max_batched_tokens * output / (prompt + output), float(self.max_num_seqs))
        return min(k1, batch * (prompt + output / 2.0))
