"""The policies of the SGLang model gateway and of SMG, its continuation (docs/reference/peers.md 10).

least_load    (queued tokens + tokens sent since the report) / throughput + 0.15 k/(1-k)
cache_aware   old: least load if max - min > 64 and max > 1.5 min, else the one with the longest prefix if
              that is over 0.3 of the prompt, else least load. New: that first trigger is gone; the one with
              the longest prefix, the least loaded of them, unless its load > 1.5 mean and > mean + 64; else
              least load
lmetric       new prompt tokens * (load + 1)

Load is requests in flight as this router counts them; what is cached is what this router has sent. k is KV
use, throughput the tokens made in a second by the last reports, or 2,000.
"""

import random
from collections.abc import Sequence

from bench.dispatch.rules.rule import (
    BLOCK_TOKENS,
    DispatchRequest,
    DispatchRule,
    Index,
    ServerFleet,
    ServerReport,
)

KV_WEIGHT_S, NOMINAL_TOKENS_S, RATE_OVER_S = 0.15, 2000.0, 1.0
THRESHOLD, BALANCE_ABS, BALANCE_REL = 0.3, 64, 1.5
UNKNOWN_TOKENS = 1024


class LeastLoad(DispatchRule):
    """Least work, corrected for what was sent since the report."""

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """Begin without a report."""
        super().__init__(fleet, rng)
        self._since = [0] * len(fleet)
        self._report: list[ServerReport | None] = [None] * len(fleet)
        self._rate_from: list[ServerReport | None] = [None] * len(fleet)
        self._rate = [0.0] * len(fleet)

    def report(self, server: int, report: ServerReport) -> None:
        """Take queue and KV use anew; the rate is taken over RATE_OVER_S, however often it reports."""
        self._since[server] = 0
        self._report[server] = report
        before = self._rate_from[server]
        if before is None:
            self._rate_from[server] = report
        elif report.at - before.at >= RATE_OVER_S - 1e-6:
            self._rate[server] = (report.made_total - before.made_total) / (report.at - before.at)
            self._rate_from[server] = report

    def score(self, server: int) -> float:
        """Return seconds to drain, and the barrier."""
        told = self._report[server]
        if told is None:
            return self.in_flight[server] * UNKNOWN_TOKENS / NOMINAL_TOKENS_S
        k = min(max(told.kv_use, 0.0), 0.999)
        tokens = told.waiting_tokens + self._since[server]
        return tokens / (self._rate[server] or NOMINAL_TOKENS_S) + KV_WEIGHT_S * k / (1.0 - k)

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose the least score."""
        return self.least(among, [self.score(server) for server in among])

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:
        """Count it until the next report."""
        super().sent(request, server, now)
        self._since[server] += request.prompt


class CacheAwareOld(DispatchRule):
    """sglang-router up to 0.3.2."""

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """Begin with nothing sent."""
        super().__init__(fleet, rng)
        self._index = Index(len(fleet))

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose by balance first, then by the prefix."""
        loads = [self.in_flight[server] for server in among]
        emptiest = among[loads.index(min(loads))]
        if max(loads) - min(loads) > BALANCE_ABS and max(loads) > BALANCE_REL * min(loads):
            return emptiest
        matched = self._index.matched(request.prefix)
        longest = max(among, key=lambda server: matched[server])
        return longest if matched[longest] * BLOCK_TOKENS > THRESHOLD * request.prompt else emptiest

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:
        """Note its prefix there, whatever it was chosen for."""
        super().sent(request, server, now)
        self._index.sent(request.prefix, server)


class CacheAwareNew(CacheAwareOld):
    """SMG of 2026-08, KV pressure off as by default."""

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose by the prefix first, unless its holder is far above the mean."""
        loads = [float(self.in_flight[server]) for server in among]
        matched = self._index.matched(request.prefix)
        longest = max(matched[server] for server in among)
        if longest * BLOCK_TOKENS > THRESHOLD * request.prompt:
            holders = [server for server in among if matched[server] == longest]
            chosen = self.least(holders, [float(self.in_flight[server]) for server in holders])
            mean = sum(loads) / len(loads)
            if not self.in_flight[chosen] > max(BALANCE_REL * mean, mean + BALANCE_ABS):
                return chosen
        return self.least(among, loads)


class LMetric(CacheAwareOld):
    """New prompt tokens times batch size; ties: the lesser load, then fewer new tokens."""

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose the least product."""
        matched = self._index.matched(request.prefix)

        def metric(server: int) -> tuple[float, int, int]:
            new = request.prompt - matched[server] * BLOCK_TOKENS
            return new * (self.in_flight[server] + 1), self.in_flight[server], new

        metrics = [metric(server) for server in among]
        least = min(metrics)
        return self.rng.choice([s for s, m in zip(among, metrics, strict=True) if m == least])
