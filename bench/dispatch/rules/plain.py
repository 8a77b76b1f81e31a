"""Rules that need no report: round robin, random, power of two, least in-flight.

Source: docs/reference/peers.md 2, 3, 14 and 18b.
"""

from collections.abc import Sequence
from itertools import count

from bench.dispatch.rules.rule import DispatchRequest, DispatchRule


class RoundRobin(DispatchRule):
    """One after the other; a server that may not be chosen is passed over."""

    _next = 0

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose the next in turn."""
        for step in count():
            server = (self._next + step) % len(self.fleet)
            if server in among:
                self._next = server + 1
                return server
        raise AssertionError


class Random(DispatchRule):
    """Any."""

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose by chance."""
        return self.rng.choice(among)


class PowerOfTwo(DispatchRule):
    """Two by chance, of these the one with fewer in flight (Ray Serve; its limit of 5 at once is lifted)."""

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose the emptier of two."""
        two = among if len(among) < 2 else self.rng.sample(among, 2)
        return min(two, key=lambda server: self.in_flight[server])


class LeastInFlight(DispatchRule):
    """SkyServe `least_load`: fewest in flight; among equals a cursor goes round."""

    _cursor = 0

    def weight(self, server: int) -> float:  # noqa: ARG002 all count the same
        """Return what requests in flight are divided by."""
        return 1.0

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:  # noqa: ARG002
        """Choose the emptiest."""
        loads = [self.in_flight[server] / self.weight(server) for server in among]
        least = min(loads)
        equal = [server for server, load in zip(among, loads, strict=True) if load == least]
        after = [server for server in equal if server >= self._cursor]
        chosen = (after or equal)[0]
        self._cursor = chosen + 1
        return chosen


class InstanceAware(LeastInFlight):
    """SkyServe `instance_aware_least_load`: in flight over target_qps of the GPU, here its measured rate."""

    def weight(self, server: int) -> float:
        """Return what it serves in a second."""
        return self.fleet.requests_s[server]
