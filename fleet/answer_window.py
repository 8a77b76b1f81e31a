"""How fast answers came in the last minute, from the growing counts of all loadbalancers.

Pure: its methods take now, in seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from web.messages.busy import FIRST_TOKEN_BOUNDS_S, TOKEN_BOUNDS_S, WHOLE_BOUNDS_S, AnswersReport

OVER_S = 60.0
"""Seconds whose answers are drawn as one point: of fewer a 99th percentile would be the slowest one."""

SHARES = (0.5, 0.95, 0.99)
"""The percentiles that are drawn, as shares."""

Quantiles = tuple[float | None, float | None, float | None]
"""Seconds in which SHARES of the answers had come; None where there were none."""

NONE: Quantiles = (None, None, None)


@dataclass(frozen=True)
class AnswerQuantiles:
    """How fast the answers of the last minute came. answers: how many; late: those not in time."""

    answers: int = 0
    late: int = 0
    first_token: Quantiles = NONE
    token: Quantiles = NONE
    whole: Quantiles = NONE


@dataclass
class _Counts:
    """Counts of answers by duration; all of them only grow."""

    first_token: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN_BOUNDS_S) + 1))
    token: list[int] = field(default_factory=lambda: [0] * (len(TOKEN_BOUNDS_S) + 1))
    whole: list[int] = field(default_factory=lambda: [0] * (len(WHOLE_BOUNDS_S) + 1))
    late: int = 0

    def grow(self, before: AnswersReport, after: AnswersReport) -> None:
        """Add what one loadbalancer counted between two reports."""
        _grow(self.first_token, before.first_token, after.first_token)
        _grow(self.token, before.token, after.token)
        _grow(self.whole, before.whole, after.whole)
        self.late += max(0, after.late - before.late)

    def copy(self) -> "_Counts":
        """Return the same counts, which do not grow with these."""
        return _Counts(list(self.first_token), list(self.token), list(self.whole), self.late)


class AnswerWindow:
    """The answers that all loadbalancers told of, and how fast those of the last minute came."""

    def __init__(self) -> None:
        """Start without answers."""
        self._all = _Counts()
        self._looks: deque[tuple[float, _Counts]] = deque()

    def add(self, before: AnswersReport | None, after: AnswersReport | None) -> None:
        """Add what one loadbalancer counted between two of its reports; None: it told nothing."""
        if after is not None:
            self._all.grow(before or AnswersReport((), (), (), 0), after)

    def lately(self, now: float) -> AnswerQuantiles:
        """Return how fast the answers came that were told in the last minute; call it once a turn."""
        self._looks.append((now, self._all.copy()))
        while len(self._looks) > 2 and self._looks[1][0] <= now - OVER_S:
            self._looks.popleft()
        then, seen = self._looks[0][1], self._looks[-1][1]
        first = [b - a for a, b in zip(then.first_token, seen.first_token, strict=True)]
        token = [b - a for a, b in zip(then.token, seen.token, strict=True)]
        whole = [b - a for a, b in zip(then.whole, seen.whole, strict=True)]
        return AnswerQuantiles(
            sum(first),
            seen.late - then.late,
            quantiles(FIRST_TOKEN_BOUNDS_S, first),
            quantiles(TOKEN_BOUNDS_S, token),
            quantiles(WHOLE_BOUNDS_S, whole),
        )


def _grow(total: list[int], before: Sequence[int], after: Sequence[int]) -> None:
    """Add what came between two reports; a bucket that shrank, or that only one side has, adds nothing."""
    padded = [*before, *[0] * len(after)]
    for n, (a, b) in enumerate(zip(padded, after, strict=False)):
        if n < len(total):
            total[n] += max(0, b - a)


def quantiles(bounds_s: Sequence[float], counts: Sequence[int]) -> Quantiles:
    """Return the seconds in which SHARES of durations were over, from how many fell into each bucket.

    Inside a bucket durations are taken to lie evenly, as Prometheus does it; above the last bound they count
    as that bound.
    """
    everything = sum(counts)
    if not everything:
        return NONE
    ends = list(accumulate(counts))
    found = []
    for share in SHARES:
        rank = share * everything
        at = next(n for n, end in enumerate(ends) if end >= rank)
        if at == len(bounds_s):
            found.append(bounds_s[-1])
            continue
        low, high = (0.0, *bounds_s)[at], bounds_s[at]
        before = ends[at] - counts[at]
        found.append(round(low + (high - low) * (rank - before) / counts[at], 5))
    return found[0], found[1], found[2]
