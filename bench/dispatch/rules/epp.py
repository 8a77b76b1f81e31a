"""llm-d's endpoint picker with the weights of its chart: queue 2, KV 2, prefix 3 (docs/reference/peers.md 8).

    queue = (max - waiting) / (max - min), 1 if all are equal     KV = 1 - use     prefix = matched / total

The sum decides, chance among equals. Waiting and use are of the last report and nothing is counted since, as
there: it polls every 50 ms, so a report each second is worse than it would ever have, and a fresh one better.
"""

import random
from collections.abc import Sequence

from bench.dispatch.rules.rule import DispatchRequest, DispatchRule, Index, ServerFleet, ServerReport

QUEUE, KV, PREFIX = 2.0, 2.0, 3.0


class Epp(DispatchRule):
    """Weighted scorers."""

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """Begin without a report: all look idle."""
        super().__init__(fleet, rng)
        self._index = Index(len(fleet))
        self._waiting = [0] * len(fleet)
        self._kv_use = [0.0] * len(fleet)

    def report(self, server: int, report: ServerReport) -> None:
        """Keep queue and use."""
        self._waiting[server], self._kv_use[server] = report.waiting, report.kv_use

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose the highest sum."""
        prefix = request.prefix
        matched = self._index.matched(prefix)
        waiting = [self._waiting[server] for server in among]
        most, spread = max(waiting), max(waiting) - min(waiting)
        scores = [
            QUEUE * ((most - self._waiting[server]) / spread if spread else 1.0)
            + KV * (1.0 - self._kv_use[server])
            + PREFIX * (matched[server] / len(prefix) if prefix else 0.0)
            for server in among
        ]
        return self.least(among, [-score for score in scores])

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:
        """Note its prefix there."""
        super().sent(request, server, now)
        self._index.sent(request.prefix, server)
