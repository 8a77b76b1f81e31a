"""How fast answers came by what clients tell (POST /pace): histograms of all of them, by priority.

    first token   from the request for a lease until the first part of the answer: what waited, and what came
    per token     seconds from one part of a stream to the next, over the whole answer
    whole         from the request for a lease until the end

The counts only grow, so that two looks at them say what came between.
"""

from dispatch.duration_histogram import DurationHistogram
from dispatch.lease import Lease
from engine.forward import PROMPT
from engine.slo import Slo
from web.messages.busy import FIRST_TOKEN_BOUNDS_S, TOKEN_BOUNDS_S, WHOLE_BOUNDS_S, AnswersReport

PRIORITIES = 3


class AnswerTimes:
    """Histograms of the answers that clients told of."""

    def __init__(self, slo: Slo) -> None:
        """Start without answers. slo: says which of them are in time."""
        self._slo = slo
        self.first_token = [DurationHistogram(FIRST_TOKEN_BOUNDS_S) for _ in range(PRIORITIES)]
        self.token = [DurationHistogram(TOKEN_BOUNDS_S) for _ in range(PRIORITIES)]
        self.whole = [DurationHistogram(WHOLE_BOUNDS_S) for _ in range(PRIORITIES)]
        self.late = 0

    def add(self, lease: Lease, first_s: float, rest_s: float, pieces: int) -> None:
        """Count the answer to a lease's request; the arguments are as in ClientPaces.hear."""
        waited_s, priority = lease.waited_s, lease.priority
        self.first_token[priority].add(waited_s + first_s)
        self.whole[priority].add(waited_s + first_s + rest_s)
        if pieces > 1:
            self.token[priority].add(rest_s / (pieces - 1))
        self.late += waited_s + first_s > self._slo.first_token_limit_s(lease.row.item(PROMPT))

    def report(self) -> AnswersReport:
        """Return all counts, of the three priorities together, for the autoscaler."""
        return AnswersReport(_sum(self.first_token), _sum(self.token), _sum(self.whole), late=self.late)


def _sum(histograms: list[DurationHistogram]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*(one.counts for one in histograms), strict=True)))
