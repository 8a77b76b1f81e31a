"""What requests have arrived: the work in each second of the last hours, and the mean request.

Seconds begin with the first report, or with what the ledger knows; before them nothing is known, which is not
the same as that nothing arrived.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies import BIN_S

ARRIVING_S = 50_400
"""Seconds of arrivals that are kept for the policies: the longest mean that one takes is over two hours, and
reads six times that; and some."""

AT_ONCE_S = 2.0
"""Seconds between two reports up to which what arrived is put into one second, the one in the middle."""

MIX_S = 6 * 3600.0
"""Seconds in which the weight of a request in the mean falls to 1/e: the lengths of a day's work differ from
those of the night's."""

_MEAN = np.full(int(BIN_S), 1.0 / BIN_S)
_EMPTY: NDArray[np.float64] = np.zeros(0)


class Arrived(NamedTuple):
    """What arrived in one second, as the ledger keeps it: times and counts, nothing of what was asked.

    second: from this time to the next second, epoch seconds. work: in output-token equivalents. Where reports
    were rare, counts are not whole.
    """

    second: int
    requests: float
    work: float
    prompt_tokens: float


@dataclass(frozen=True, slots=True)
class Mix:
    """The mean of the requests that arrived: its work, prompt tokens and expected output tokens."""

    work: float
    prompt_tokens: float
    output_tokens: float


@dataclass(slots=True)
class ArrivalSums:
    """Sums over requests that arrived: how many, their work and their tokens."""

    requests: float = 0
    work: float = 0.0
    prompt_tokens: float = 0
    output_tokens: float = 0.0

    def add(self, more: "ArrivalSums") -> None:
        """Add other sums to these."""
        self.requests += more.requests
        self.work += more.work
        self.prompt_tokens += more.prompt_tokens
        self.output_tokens += more.output_tokens

    def scale(self, factor: float) -> None:
        """Multiply all sums by a factor, so that older requests count for less."""
        self.requests *= factor
        self.work *= factor
        self.prompt_tokens *= factor
        self.output_tokens *= factor


class ArrivalHistory:
    """The requests that arrived in the last hours. Pure: its methods take the time in seconds."""

    def __init__(self) -> None:
        """Begin with nothing known of arrivals."""
        self._seconds = _WorkBySecond()
        self._recent = ArrivalSums()  # fades with MIX_S
        self._recent_at = 0.0
        self._unsaved: dict[int, Arrived] = {}  # by second

    def begin(self, now: float) -> None:
        """Note that what arrives is known from now on, unless something is known already."""
        self._seconds.begin(math.floor(now))

    def add(self, more: ArrivalSums, from_s: float, to_s: float) -> None:
        """Add what arrived between two reports, made at from_s and to_s; spread evenly if over AT_ONCE_S."""
        if not more.requests:
            self._seconds.note_until(math.floor((from_s + to_s) / 2.0))
            return
        self._add_recent(more, to_s)
        for second, share in _seconds_of(from_s, to_s):
            self._seconds.add(second, more.work * share)
            self._add_unsaved(
                Arrived(second, more.requests * share, more.work * share, more.prompt_tokens * share)
            )

    def restore(self, arrived: Iterable[Arrived], prefill_weight: float) -> None:
        """Take over the arrivals that the ledger knows, oldest first, before others are added."""
        for a in arrived:
            self._seconds.begin(a.second)
            self._seconds.add(a.second, a.work)
            output = max(0.0, a.work - prefill_weight * a.prompt_tokens)
            self._add_recent(ArrivalSums(a.requests, a.work, a.prompt_tokens, output), a.second)

    def _add_recent(self, more: ArrivalSums, now: float) -> None:
        passed = now - self._recent_at
        if passed > 0.0:
            self._recent.scale(math.exp(-passed / MIX_S))
            self._recent_at = now
        self._recent.add(more)

    @property
    def mix(self) -> Mix | None:
        """The mean request of the last hours; None until one has arrived."""
        r = self._recent
        if r.requests <= 0.0 or r.work <= 0.0:
            return None
        return Mix(r.work / r.requests, r.prompt_tokens / r.requests, r.output_tokens / r.requests)

    def work_s(self, now: float, memory_s: float) -> NDArray[np.float64]:
        """Return the mean work per second that arrived, for each BIN_S of the last memory_s; read-only.

        The oldest bin is the first, the last one ends with the last second that was reported. Before the
        first report nothing is known, so there are fewer bins then; ARRIVING_S is kept at most.
        """
        return self._seconds.bins(now, min(memory_s, ARRIVING_S))

    # -- for the ledger --------------------------------------------------------------------------------

    def take_unsaved(self) -> list[Arrived]:
        """Return what arrived since the last call, for the ledger; a second may come again with more."""
        unsaved, self._unsaved = self._unsaved, {}
        return list(unsaved.values())

    def put_back(self, arrived: Iterable[Arrived]) -> None:
        """Give back what the ledger could not write, so that the next `take_unsaved` returns it again."""
        for a in arrived:
            self._add_unsaved(a)

    def _add_unsaved(self, a: Arrived) -> None:
        known = self._unsaved.get(a.second) or Arrived(a.second, 0.0, 0.0, 0.0)
        self._unsaved[a.second] = Arrived(
            a.second,
            known.requests + a.requests,
            known.work + a.work,
            known.prompt_tokens + a.prompt_tokens,
        )


def _seconds_of(from_s: float, to_s: float) -> Iterable[tuple[int, float]]:
    """Return the seconds that a span of time lies in, and which share of it lies in each."""
    length = to_s - from_s
    if length <= AT_ONCE_S:
        return ((math.floor((from_s + to_s) / 2.0), 1.0),)
    return (
        (second, (min(to_s, second + 1) - max(from_s, second)) / length)
        for second in range(math.floor(from_s), math.ceil(to_s))
    )


class _WorkBySecond:
    """Work that arrived in each of the last ARRIVING_S seconds, in an array that is moved when it is full."""

    def __init__(self) -> None:
        self._work = np.zeros(2 * ARRIVING_S)
        self._first = 0  # the second of _work[0]
        self._since: int | None = None  # the first second that anything is known of
        self._until = 0  # and the one after the last
        self._made: tuple[int, int] | None = None  # (end, count) of the bins below
        self._bins = _EMPTY

    def begin(self, second: int) -> None:
        """Note that arrivals are counted from that second on, unless they were counted before it already."""
        if self._since is None:
            self._since = self._until = self._first = second

    def note_until(self, second: int) -> None:
        """Note that nothing else arrived up to the end of that second."""
        if second >= self._until:
            self._until = second + 1

    def add(self, second: int, work: float) -> None:
        """Add work that arrived in that second, unless it is too long ago to be kept."""
        at = second - self._first
        if at >= len(self._work):
            first = second + 1 - ARRIVING_S
            kept = self._work[first - self._first :].copy()
            self._work[:] = 0.0
            self._work[: len(kept)] = kept
            self._first, at = first, ARRIVING_S - 1
        if at >= 0:
            self._work[at] += work
            self._made = None
        self.note_until(second)

    def bins(self, now: float, memory_s: float) -> NDArray[np.float64]:
        """Return the mean work per second in each bin of BIN_S within memory_s, oldest first."""
        if self._since is None:
            return _EMPTY
        # Reports lag behind by a second or so; without any, nothing is taken to arrive.
        end = max(min(math.floor(now) + 1, self._until), math.floor(now) - 1)
        width = int(BIN_S)
        count = max(0, min(int(memory_s // BIN_S), (end - max(self._since, self._first)) // width))
        if self._made != (end, count):
            self._made = (end, count)
            from_at, to_at = end - count * width - self._first, end - self._first
            work = self._work[max(0, from_at) : max(0, to_at)]
            if len(work) < count * width:  # nothing was reported for so long that the array ends earlier
                work = np.concatenate((work, np.zeros(count * width - len(work))))
            self._bins = work.reshape(count, width) @ _MEAN  # four times as fast as sum(axis=1)
            self._bins.flags.writeable = False
        return self._bins
