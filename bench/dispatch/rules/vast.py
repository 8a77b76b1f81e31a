"""Vast Serverless: queue time by cost. A model of what is documented; the engine is closed.

Source: docs/reference/peers.md 1.

    wait = sum of the costs in flight / perf                    cost = max_tokens, the prompt is free
    the worker with the least; all over max_queue_time (30 s): held, first come first served

perf is what a benchmark finds: here the tokens a saturated worker makes. max_tokens is the power of two above
the answer: users who know within a factor of two how long it will be. (With one for all, 16 times the mean as
in usual traffic, 30 s are six requests: nothing would be served.) The engine holds and asks at once when
there is room; a client of the real one polls, up to 5 s.
"""

import random
from collections.abc import Sequence

from bench.dispatch.rules.rule import DispatchRequest, DispatchRule, ServerFleet

MAX_QUEUE_S = 30.0


class VastQueueTime(DispatchRule):
    """Least queue time."""

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """Begin with nothing under way."""
        super().__init__(fleet, rng)
        self._cost = [0.0] * len(fleet)

    def queue_s(self, server: int) -> float:
        """Return the wait at the worker, above which it would answer 429."""
        return self._cost[server] / self.fleet.tokens_s[server]

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int | None:  # noqa: ARG002
        """Choose the worker with the least wait; None while all are too long."""
        ready = [server for server in among if self.queue_s(server) <= MAX_QUEUE_S]
        return self.least(ready, [self.queue_s(server) for server in ready]) if ready else None

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:
        """Count its cost."""
        super().sent(request, server, now)
        self._cost[server] += request.max_tokens

    def ended(self, request: DispatchRequest, server: int, now: float) -> None:
        """Count its cost no more."""
        super().ended(request, server, now)
        self._cost[server] -= request.max_tokens
