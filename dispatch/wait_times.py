"""Estimates of how long a request would wait, by the work known and by when an instance will be hot."""

import math
from dataclasses import dataclass

from dispatch.hot_instances import HotInstances
from dispatch.request_estimates import RequestEstimates
from dispatch.request_queue import RequestQueue
from dispatch.route_request import RouteRequest
from engine.slo import Slo

RETRY_UNKNOWN_S = 30.0
"""Seconds to wait when nothing is hot and the autoscaler has not said when something will be."""

RETRY_S = (1.0, 3600.0)
"""Bounds of the seconds after which a refused client is told to ask again."""

HOLD_S = 10.0
"""Seconds of its work that an instance usually may hold."""

LOOK_AT = 8
"""Instances of each class of speed that are looked at for the first room."""


@dataclass(slots=True, eq=False)
class WaitTimes:
    """Estimates of how long requests wait, in seconds. slo: the objective, which says what is in time."""

    instances: HotInstances
    queue: RequestQueue
    estimates: RequestEstimates
    slo: Slo

    def until_late_s(self, ask: RouteRequest) -> float:
        """Return for how long a request may wait and still be in time, less the time to read its prompt."""
        hot = self.instances
        read_s = ask.prompt_tokens * self.estimates.prefill_weight * hot.hot / max(hot.throughput, 1e-9)
        return self.slo.first_token_limit_s(ask.prompt_tokens) - read_s

    def takes_s(self, ask: RouteRequest) -> float:
        """Return the seconds that a request takes of the whole fleet's work; with none hot, of one's."""
        hot = self.instances
        return ask.work / (hot.throughput or hot.typical_capacity / HOLD_S)

    def until_served_s(self, ask: RouteRequest, now: float) -> float:
        """Return for how many seconds a request that came now would wait for a lease."""
        hot = self.instances
        if hot.hot:
            return self.queue.ahead_of_client(ask) / max(hot.throughput, 1e-9)
        return max(0.0, hot.expected_in_s(now) or 0.0)

    def retry_after_s(self, ask: RouteRequest, now: float) -> float:
        """Return in how many seconds a request that is refused now may find room."""
        least, most = RETRY_S
        if not self.instances.hot:
            expected_s = self.instances.expected_in_s(now)
            return min(most, max(least, RETRY_UNKNOWN_S if expected_s is None else expected_s))
        first = self.instances.index.first(LOOK_AT, now)
        if not first:
            return least  # no tokens, or all are being avoided: that is over in a moment or known soon
        room_s = min(left_s + (ask.work - inst.capacity) / inst.throughput for left_s, _, _, inst in first)
        return min(most, max(least, room_s + self._queue_s(room_s, now)))

    def _queue_s(self, room_s: float, now: float) -> float:
        """Return the seconds to serve all waiting requests from room_s on, with an instance hot by then."""
        work, throughput = self.queue.work, self.instances.throughput
        expected_s = self.instances.expected_in_s(now)
        help_s = math.inf if expected_s is None else max(0.0, expected_s) - room_s
        seconds = work / throughput
        if seconds <= help_s:
            return seconds
        before_s = max(0.0, help_s)
        one = throughput / self.instances.hot
        return before_s + (work - before_s * throughput) / (throughput + one)
