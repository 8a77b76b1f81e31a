"""DelayedOff: an arrival that finds all busy starts one; one that was idle for t_wait stops.

Source: docs/reference/peers.md 15 (Gandhi, Gupta, Harchol-Balter, Kozuch 2010): most-recently-busy
routing, so the surplus drains and the instances needed are always the first ones. Then

    N(t) = most of ceil(requests in the system / requests at once per instance) over the last t_wait

The wait that is at most twice the best (ski rental) is set-up cost over idle cost: a start is billed as
running, so it is the set-up time itself: stop-to-hot with our pool, order-to-hot without.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

from bench.policies.peers.rule import PeerRule, known, over_zero, whole_up
from policies import FleetSnapshot, Targets


@dataclass(eq=False)
class DelayedOff(PeerRule):
    """t_wait_s: None is the set-up time as measured on this fleet. It acts on arrivals; every 2 s here."""

    reads_setup_time: ClassVar[bool] = True

    tick_s: float = 2.0
    min_replicas: int = 0
    t_wait_s: float | None = None
    _needs: deque[tuple[float, int]] = field(default_factory=deque, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        super().__post_init__()
        over_zero(self, "t_wait_s")

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return the most that was needed lately."""
        capacity = known(seen.capacity)
        requests = seen.traffic.in_flight + seen.traffic.held
        if capacity is None:
            n = self.limited(max(seen.hot + seen.coming, 1 if requests > 0.0 else 0))
            return Targets(n, n, "no capacity known yet")
        need = whole_up(requests / capacity.concurrency)
        wait_s = self.t_wait_s if self.t_wait_s is not None else seen.start_time_s
        while self._needs and self._needs[-1][1] <= need:  # falls from left to right: the first is the most
            self._needs.pop()
        self._needs.append((seen.now, need))
        while len(self._needs) > 1 and self._needs[0][0] <= seen.now - wait_s:
            self._needs.popleft()
        n = self.limited(self._needs[0][1])
        return Targets(n, n, f"{need} needed now, {n} in {wait_s:.0f} s")
