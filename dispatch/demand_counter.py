"""What clients ask for: arrivals and their rate, and the work that was refused."""

import math
from collections import deque

from dispatch.route_request import RouteRequest

ARRIVALS_WEIGHT = 0.02
"""Weight of one second's arrivals in the expected rate: about the last minute, for a burst is soon over."""

REFUSED_S = 10.0
"""Seconds for which refused work counts as demand, about one request's life: that much would be under way."""

CLIENT_INSTANCES = 2.0
"""Instances' worth of refused work of one client that counts at least, so that one instance can become three;
of a larger fleet as much as it holds: one client alone can have it doubled, and again when that is used."""


class DemandCounter:
    """Counts requests and their work since this process started; work is in output-token equivalents."""

    def __init__(self) -> None:
        """Start with all counts at zero."""
        self.arrivals = 0
        self.work = 0.0
        self.prompt_tokens = 0
        self.output_tokens = 0.0  # as expected when the requests came
        self.refused = 0
        self.impossible = 0  # refused because the model can never take them: no demand
        self.arrivals_s = 0.0  # expected arrivals a second
        self._refused_work: deque[tuple[int, dict[str, float]]] = deque()  # (second, work by client)
        self._starts = 0  # requests that were seen to start, those of other loadbalancers too
        self._ticks = 0
        self._ticked: tuple[float, int, int] | None = None  # (time, arrivals, starts) at the last tick

    def arrived(self, ask: RouteRequest, prefill_weight: float, count: int = 1) -> None:
        """Count `count` new requests like this one. Call it once for each, whatever becomes of it."""
        self.arrivals += count
        self.work += count * ask.work
        self.prompt_tokens += count * ask.prompt_tokens
        self.output_tokens += count * (ask.work - ask.prompt_tokens * prefill_weight)

    def started(self) -> None:
        """Count a request that has started at an instance, whichever loadbalancer sent it."""
        self._starts += 1

    def refuse(self, ask: RouteRequest, now: float) -> None:
        """Count a refused request, whose work counts as demand for REFUSED_S."""
        self.refused += 1
        second = math.floor(now)
        if not self._refused_work or self._refused_work[-1][0] != second:
            self._refused_work.append((second, {}))
        by_client = self._refused_work[-1][1]
        by_client[ask.client] = by_client.get(ask.client, 0.0) + ask.work

    def count_impossible(self, impossible: bool) -> None:
        """If impossible, count a request that no instance can ever serve: neither an arrival nor demand."""
        self.impossible += impossible

    def refused_work(self, now: float, instance_work: float, hot: int) -> float:
        """Return the work that was refused within the last REFUSED_S, with a bound for each client.

        instance_work: what one instance may hold. hot: number of hot instances. A client counts for at most
        as much as they hold together, or CLIENT_INSTANCES. Requests without a client's name are this
        process's own (virtual time) and have no bound.
        """
        while self._refused_work and self._refused_work[0][0] < now - REFUSED_S:
            self._refused_work.popleft()
        by_client: dict[str, float] = {}
        for _, some in self._refused_work:
            for client, work in some.items():
                by_client[client] = by_client.get(client, 0.0) + work
        most = max(CLIENT_INSTANCES, hot) * instance_work
        return sum(min(work, most) if client else work for client, work in by_client.items())

    def tick(self, now: float) -> None:
        """Update the expected rate of arrivals by those since the last tick."""
        if self._ticked is not None and now > self._ticked[0]:
            # Requests of other loadbalancers are seen when they start; our own may still be held.
            came = max(self.arrivals - self._ticked[1], self._starts - self._ticked[2])
            arrived_s = came / (now - self._ticked[0])
            self._ticks += 1
            self.arrivals_s += max(ARRIVALS_WEIGHT, 1.0 / self._ticks) * (arrived_s - self.arrivals_s)
        self._ticked = now, self.arrivals, self._starts
