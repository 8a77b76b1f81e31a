"""What clients ask for: arrivals and their rate, and the work that was refused."""

import math
from collections import deque
from collections.abc import Iterable, Mapping

from dispatch.hot_instances import HotInstances
from dispatch.route_request import QueuedRequest, RouteRequest

ARRIVALS_WEIGHT = 0.02
"""Weight of one second's arrivals in the expected rate: about the last minute, for a burst is soon over."""

REFUSED_S = 10.0
"""Seconds for which refused work counts as demand, about one request's life: that much would be under way."""

CLIENT_INSTANCES = 2.0
"""Instances' worth of waiting and refused work of one client that counts at least, so that one instance can
become three; of a larger fleet as much as it holds: one client alone can have it doubled, and again when that
is used."""


ASKED_S, HOLD_S = 60.0, 10.0
"""Seconds over which a client's arrivals that are not served are bounded, so that a burst counts whole; and
seconds of its work that an instance usually may hold."""

MOST_CLIENTS = 1024
"""Clients whose arrivals are bounded one by one, the latest."""


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
        self._asked: dict[str, tuple[float, float]] = {}  # by client: work that was asked for, and when
        self._starts = 0  # requests that were seen to start, those of other loadbalancers too
        self._ticks = 0
        self._ticked: tuple[float, int, int] | None = None  # (time, arrivals, starts) at the last tick

    def arrived(self, ask: RouteRequest, prefill_weight: float, count: int = 1) -> None:
        """Count `count` new requests like this one. Call it once for each, whatever becomes of it."""
        self.arrivals += count
        self.work += count * ask.work
        self.prompt_tokens += count * ask.prompt_tokens
        self.output_tokens += count * (ask.work - ask.prompt_tokens * prefill_weight)

    def asks(
        self, ask: RouteRequest, prefill_weight: float, given: int, now: float, instances: HotInstances
    ) -> bool:
        """Count a new request; return whether it counted, or is to be counted when it is given a lease.

        given: leases that it is given now; a batch is as many arrivals. What one client asks for and is not
        given arrives at most as fast as max(CLIENT_INSTANCES, hot) instances work, on average over ASKED_S.
        """
        if ask.client and not given:
            most = max(CLIENT_INSTANCES, instances.hot) * instances.typical_capacity * (ASKED_S / HOLD_S)
            spent, at = self._asked.pop(ask.client, (0.0, now))
            spent = max(0.0, spent - most * (now - at) / ASKED_S)
            counts = spent + ask.work <= most
            self._asked[ask.client] = (spent + ask.work if counts else spent), now
            if len(self._asked) > MOST_CLIENTS:
                del self._asked[next(iter(self._asked))]
            if not counts:
                return False
        self.arrived(ask, prefill_weight, given or 1)
        return True

    def granted(self, requests: Iterable[QueuedRequest], prefill_weight: float) -> None:
        """Count those requests that arrive when they are granted, because they did not count before."""
        for queued in requests:
            if queued.arrives:
                self.arrived(queued.ask, prefill_weight)

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

    def waiting(
        self, held: Mapping[str, float], now: float, instance_work: float, hot: int
    ) -> tuple[float, float]:
        """Return (held work that is too much, refused work) as demand, with a bound for each client.

        held: work that waits, by client. instance_work: what one instance may hold. hot: number of hot
        instances. What a client has waiting and was refused within the last REFUSED_S counts for at most as
        much as all hot instances hold together, or CLIENT_INSTANCES. Requests without a client's name are
        this process's own (virtual time) and have no bound.
        """
        while self._refused_work and self._refused_work[0][0] < now - REFUSED_S:
            self._refused_work.popleft()
        by_client: dict[str, float] = {}
        for _, some in self._refused_work:
            for client, work in some.items():
                by_client[client] = by_client.get(client, 0.0) + work
        most = max(CLIENT_INSTANCES, hot) * instance_work
        excess = sum(max(0.0, work - most) for client, work in held.items() if client)
        refused = sum(
            min(work, max(0.0, most - held.get(client, 0.0))) if client else work
            for client, work in by_client.items()
        )
        return excess, refused

    def tick(self, now: float) -> None:
        """Update the expected rate of arrivals by those since the last tick."""
        if self._ticked is not None and now > self._ticked[0]:
            # Requests of other loadbalancers are seen when they start; our own may still be held.
            came = max(self.arrivals - self._ticked[1], self._starts - self._ticked[2])
            arrived_s = came / (now - self._ticked[0])
            self._ticks += 1
            self.arrivals_s += max(ARRIVALS_WEIGHT, 1.0 / self._ticks) * (arrived_s - self.arrivals_s)
        self._ticked = now, self.arrivals, self._starts
