"""NVIDIA Dynamo's KV router (docs/reference/peers.md 12).

    raw  = (prompt tokens not yet read at the worker + those of the request) / block
    cost = max(0, raw - blocks it has cached) + blocks of its active requests         least, random ties
    held, first come first served, while every worker has over 16 * its batch's tokens to read

Defaults: weights 1, no decay of the credit, no weight of the count, temperature 0, KV events on: what is
cached is known exactly. A prompt counts as read at its first token; blocks of answers are not tracked.
"""

import random
from collections.abc import Sequence

from bench.dispatch.rules.rule import DispatchRequest, DispatchRule, ServerFleet

BLOCK, QUEUE_BATCHES = 16, 16


class DynamoKv(DispatchRule):
    """Least blocks to read and to hold."""

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """Begin with nothing under way."""
        super().__init__(fleet, rng)
        self._reading = [0] * len(fleet)  # tokens
        self._blocks = [0] * len(fleet)
        self._to_read: dict[int, int] = {}

    def _cached(self, request: DispatchRequest, server: int) -> int:
        if not request.blocks or not self.fleet.live:
            return 0
        return min(request.prompt, self.fleet.live[server].cached_tokens(request.prefix))

    def cost(self, request: DispatchRequest, server: int) -> float:
        """Return the cost in blocks."""
        raw = (self._reading[server] + request.prompt) / BLOCK
        return max(0.0, raw - self._cached(request, server) / BLOCK) + self._blocks[server]

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int | None:  # noqa: ARG002
        """Choose the least cost; None while all have too much to read."""
        if all(
            self._reading[server] > QUEUE_BATCHES * self.fleet.timings[server].step_tokens for server in among
        ):
            return None
        return self.least(among, [self.cost(request, server) for server in among])

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:
        """Count the blocks to read, those that are not cached."""
        super().sent(request, server, now)
        self._to_read[request.number] = request.prompt - self._cached(request, server)
        self._reading[server] += self._to_read[request.number]
        self._blocks[server] += -(-request.prompt // BLOCK)

    def first_token(self, request: DispatchRequest, server: int, now: float) -> None:  # noqa: ARG002
        """Count its prompt as read."""
        self._reading[server] -= self._to_read.pop(request.number, 0)

    def ended(self, request: DispatchRequest, server: int, now: float) -> None:
        """Free its blocks."""
        super().ended(request, server, now)
        self.first_token(request, server, now)
        self._blocks[server] -= -(-request.prompt // BLOCK)
