"""What the loadbalancers report, put together: demand over time, what arrives, who still has leases on whom.

demand is in instances' worth of capacity, held and just refused requests counted, so a fleet
of none wakes up; busy is the same without them and never more than are hot.

    report ─► difference to the one before ─► counters        (traffic: they never go back)
                                          └─► seconds         (arriving, and the ledger)

A loadbalancer counts from its own start, so what its first report says may be hours old: it goes into
`arrivals` only. A difference that covers more than two seconds is spread over them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.slo import Slo
from policies import BIN_S, Traffic
from web.messages.busy import BusyReport

SILENT_S = 10.0
"""A loadbalancer that said nothing for so long (it reports each second) is not counted any more."""

KNOWN_S = 86_400.0
"""For so long its cumulative figures are remembered: one that comes back must not be counted from 0 again."""

ARRIVING_S = 50_400
"""Seconds of arrivals that are kept for the policies: the longest mean that one takes is over two hours, and
reads six times that; and some."""

AT_ONCE_S = 2.0
"""What arrived between two reports nearer than this is put into one second, the one in the middle."""

MIX_S = 6 * 3600.0
"""The mean request is that of about so long: the lengths of a day's work differ from those of the night's."""

LATE_BOUND_S = 300.0
"""Seconds after which a late request goes before all others, until a loadbalancer says it (its default)."""

SATURATED_S, SATURATED_MEMORY_S = 120.0, 1800.0
"""Hot seconds in which requests waited after which the work done in them says what an instance can do, and
after which half of what was seen before is forgotten."""

_MEAN = np.full(int(BIN_S), 1.0 / BIN_S)
_EMPTY: NDArray[np.float64] = np.zeros(0)


class Arrived(NamedTuple):
    """What arrived in one second, as the ledger keeps it: times and counts, nothing of what was asked.

    second: it lasts from then to the next, epoch seconds. Where reports were rare, counts are not whole.
    """

    second: int
    requests: float
    work: float
    prompt_tokens: float


@dataclass(frozen=True, slots=True)
class Mix:
    """The mean request: work, and the prompt tokens and expected output tokens of it."""

    work: float
    prompt_tokens: float
    output_tokens: float


class Demand:
    """The reports of all loadbalancers. Pure: every method takes now, in seconds."""

    def __init__(
        self,
        epoch: str = "",
        memory_s: float = ARRIVING_S,
        *,
        told_nobody: bool = False,
        began: float = float("-inf"),
    ) -> None:
        """epoch: the hot-set epoch of this process; memory_s: how long the series is kept.

        told_nobody: this process tells no loadbalancer of its hot set (`prepare`), so no lease can be out.
        began: when this process did; what a loadbalancer counted before is in the ledger already.
        """
        self.epoch = epoch
        self.told_nobody = told_nobody
        self.memory_s = memory_s
        self.arrivals = 0
        self.arrived_work = 0.0
        self.turned_late = 0  # of what arrived: too late for the objective already at a loadbalancer
        self.slo = Slo()  # as the last report had them
        self.late_bound_s: float | None = LATE_BOUND_S
        self._began = began
        self._last: dict[str, tuple[float, BusyReport]] = {}
        self._known: dict[str, tuple[float, BusyReport]] = {}
        self._series: list[tuple[float, float]] = []
        self._total = _Sums()
        self._recent = _Sums()  # fades with MIX_S
        self._recent_at = 0.0
        self._seconds = _Seconds()
        self._fresh: dict[int, Arrived] = {}
        self._served = (-math.inf, 0, 0.0, 0.0)  # (when, hot, work arrived, work held)
        self._full_work = self._full_s = 0.0

    def add_report(self, report: BusyReport, now: float) -> tuple[dict[int, float], list[int]]:
        """Take in a report; gives back seconds newly worked by instance, and instances with new failures."""
        at, before = self._known.get(report.loadbalancer, (now, None))
        most_s = float("inf")
        if before is None:
            before = msgspec.structs.replace(report, arrivals=0, arrived_work=0.0, instances={})
            most_s = now - self._began  # it may run for longer than we do
            self._seconds.begin(math.floor(now))
        else:
            self._count(before, report, at, now)
        self.slo, self.late_bound_s = report.traffic.slo, report.traffic.late_bound_s
        self._last[report.loadbalancer] = self._known[report.loadbalancer] = (now, report)
        self.arrivals += max(0, report.arrivals - before.arrivals)
        self.arrived_work += max(0.0, report.arrived_work - before.arrived_work)
        worked: dict[int, float] = {}
        failing: list[int] = []
        for i, use in report.instances.items():
            earlier = before.instances.get(i)
            worked[i] = min(use.working_s - (earlier.working_s if earlier else 0.0), most_s)
            if use.failures > (earlier.failures if earlier else 0):
                failing.append(i)
        return {i: s for i, s in worked.items() if s > 0}, failing

    def _count(self, before: BusyReport, report: BusyReport, at: float, now: float) -> None:
        """Add what arrived since the report before, which came at `at`, to counters and seconds."""
        more = _Sums(
            max(0, report.arrivals - before.arrivals),
            max(0.0, report.arrived_work - before.arrived_work),
            max(0, report.traffic.prompt_tokens - before.traffic.prompt_tokens),
            max(0.0, report.traffic.output_tokens - before.traffic.output_tokens),
        )
        self.turned_late += max(0, report.traffic.turned_late - before.traffic.turned_late)
        if not more.requests:
            self._seconds.said(math.floor((at + now) / 2.0))
            return
        self._total.add(more)
        self._fade(now)
        self._recent.add(more)
        for second, share in _seconds_of(at, now):
            self._seconds.add(second, more.work * share)
            known = self._fresh.get(second) or Arrived(second, 0.0, 0.0, 0.0)
            self._fresh[second] = Arrived(
                second,
                known.requests + more.requests * share,
                known.work + more.work * share,
                known.prompt_tokens + more.prompt_tokens * share,
            )

    def _fade(self, now: float) -> None:
        passed = now - self._recent_at
        if passed > 0.0:
            self._recent.scale(math.exp(-passed / MIX_S))
            self._recent_at = now

    def take_arrived(self) -> list[Arrived]:
        """What arrived since the last call, for the ledger; the same second may come again with more."""
        fresh, self._fresh = self._fresh, {}
        return list(fresh.values())

    def put_back(self, arrived: Iterable[Arrived]) -> None:
        """It could not be written: the next `take_arrived` has it again."""
        for a in arrived:
            known = self._fresh.get(a.second) or Arrived(a.second, 0.0, 0.0, 0.0)
            self._fresh[a.second] = Arrived(
                a.second,
                known.requests + a.requests,
                known.work + a.work,
                known.prompt_tokens + a.prompt_tokens,
            )

    def remember(self, arrived: Iterable[Arrived], prefill_weight: float) -> None:
        """Take over what the ledger knows, oldest first; before the first report. The counters stay at 0."""
        for a in arrived:
            self._seconds.begin(a.second)
            self._seconds.add(a.second, a.work)
            self._fade(a.second)
            output = max(0.0, a.work - prefill_weight * a.prompt_tokens)
            self._recent.add(_Sums(a.requests, a.work, a.prompt_tokens, output))

    def tick(self, now: float) -> None:
        """Forget silent loadbalancers and note the demand of this moment in the series."""
        if any(now - at > SILENT_S for at, _ in self._known.values()):
            self._last = {name: (at, r) for name, (at, r) in self._last.items() if now - at <= SILENT_S}
            self._known = {name: (at, r) for name, (at, r) in self._known.items() if now - at <= KNOWN_S}
        self._series.append((now, self.demand))
        oldest = now - self.memory_s
        if self._series[0][0] < oldest:
            del self._series[: bisect_right(self._series, (oldest, -math.inf))]

    def saturated_work_s(self) -> float | None:
        """Work per second that a hot instance did while there was always more: the fleet's own capacity.

        What single instances show is what they do when they are given the right requests; with what is lost
        between them it is less. None until SATURATED_S of hot seconds were seen.
        """
        return None if self._full_s < SATURATED_S else self._full_work / self._full_s

    def served(self, hot: int, now: float) -> None:
        """Note what so many hot instances have served since the last call, if requests waited meanwhile."""
        t = self.traffic
        at, hot_then, arrived, held_work = self._served
        self._served = (now, hot, t.work_total, t.held_work)
        seconds = now - at
        if not (0.0 < seconds <= 60.0 and hot == hot_then > 0 and t.held_work > 0.0 and held_work > 0.0):
            return
        keep = 0.5 ** (hot * seconds / SATURATED_MEMORY_S)
        self._full_work = self._full_work * keep + max(0.0, t.work_total - arrived - t.held_work + held_work)
        self._full_s = self._full_s * keep + hot * seconds

    def since(self, from_s: float) -> Sequence[tuple[float, float]]:
        """(time, demand), oldest first, from the last one at or before from_s on."""
        first = bisect_right(self._series, (from_s, math.inf))
        return self._series[max(0, first - 1) :]

    @property
    def series(self) -> tuple[tuple[float, float], ...]:
        """(time, demand), oldest first, as far as it is kept."""
        return tuple(self._series)

    def arriving(self, now: float, memory_s: float) -> NDArray[np.float64]:
        """Work per second that arrived in each BIN_S of the last memory_s, oldest first; read-only.

        The last bin ends with the last second that was reported. Before the first report nothing is known,
        so there are fewer bins then; ARRIVING_S is kept at most.
        """
        return self._seconds.bins(now, min(memory_s, ARRIVING_S))

    @property
    def traffic(self) -> Traffic:
        """The load as the loadbalancers heard of lately say it, and counters of what has arrived."""
        in_flight = held = prompt_tokens = 0
        held_work = oldest_s = kv_tokens = 0.0
        for _, r in self._last.values():
            in_flight += r.traffic.in_flight
            held += r.held
            held_work += r.held_work
            prompt_tokens += r.traffic.held_prompt_tokens
            kv_tokens += r.traffic.kv_tokens
            oldest_s = max(oldest_s, r.traffic.oldest_wait_s)
        t = self._total
        return Traffic(
            t.requests,
            t.prompt_tokens,
            t.output_tokens,
            t.work,
            in_flight,
            held,
            held_work,
            prompt_tokens,
            oldest_s,
            kv_tokens,
        )

    @property
    def mix(self) -> Mix | None:
        """The mean of the requests of the last hours; None until one has arrived."""
        r = self._recent
        if r.requests <= 0.0 or r.work <= 0.0:
            return None
        return Mix(r.work / r.requests, r.prompt_tokens / r.requests, r.output_tokens / r.requests)

    @property
    def demand(self) -> float:
        """The sum over the loadbalancers heard of lately, instances' worth of capacity."""
        return sum(r.demand for _, r in self._last.values())

    @property
    def busy(self) -> float:
        """The same, of what is being served."""
        return sum(r.busy for _, r in self._last.values())

    @property
    def held(self) -> int:
        """Requests that wait at a loadbalancer."""
        return sum(r.held for _, r in self._last.values())

    @property
    def reporting(self) -> bool:
        """Whether there is anybody who says where leases are out."""
        return self.told_nobody or bool(self._last)

    def no_lease_on(self, instance_id: int, version: int) -> bool:
        """Whether every loadbalancer heard of lately knows that hot set and has no lease out on it.

        With no loadbalancer heard of, nobody is known to have none: False.
        """
        if self.told_nobody:
            return True
        reports = [r for _, r in self._last.values()]
        return bool(reports) and all(
            r.hot_epoch == self.epoch
            and r.hot_version is not None
            and r.hot_version >= version
            and not ((use := r.instances.get(instance_id)) and use.unfinished)
            for r in reports
        )


@dataclass(slots=True)
class _Sums:
    """Arrivals, summed up."""

    requests: float = 0
    work: float = 0.0
    prompt_tokens: float = 0
    output_tokens: float = 0.0

    def add(self, more: "_Sums") -> None:
        self.requests += more.requests
        self.work += more.work
        self.prompt_tokens += more.prompt_tokens
        self.output_tokens += more.output_tokens

    def scale(self, factor: float) -> None:
        self.requests *= factor
        self.work *= factor
        self.prompt_tokens *= factor
        self.output_tokens *= factor


def _seconds_of(from_s: float, to_s: float) -> Iterable[tuple[int, float]]:
    """The seconds that a span of time lies in, and which share of it lies in each."""
    length = to_s - from_s
    if length <= AT_ONCE_S:
        return ((math.floor((from_s + to_s) / 2.0), 1.0),)
    return (
        (second, (min(to_s, second + 1) - max(from_s, second)) / length)
        for second in range(math.floor(from_s), math.ceil(to_s))
    )


class _Seconds:
    """Work that arrived in each of the last ARRIVING_S seconds, in an array that is moved when it is full."""

    def __init__(self) -> None:
        self._work = np.zeros(2 * ARRIVING_S)
        self._first = 0  # the second of _work[0]
        self._since: int | None = None  # the first second that anything is known of
        self._until = 0  # and the one after the last
        self._made: tuple[int, int] | None = None  # (end, count) of the bins below
        self._bins = _EMPTY

    def begin(self, second: int) -> None:
        """From that second on it is known what arrived, if nothing was known yet."""
        if self._since is None:
            self._since = self._until = self._first = second

    def said(self, second: int) -> None:
        """Nothing more arrived up to the end of that second."""
        if second >= self._until:
            self._until = second + 1

    def add(self, second: int, work: float) -> None:
        """So much work arrived then; what is too old to be kept is not counted."""
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
        self.said(second)

    def bins(self, now: float, memory_s: float) -> NDArray[np.float64]:
        """Work per second in bins of BIN_S, oldest first."""
        if self._since is None:
            return _EMPTY
        # What was reported lags behind by a second or so; when nobody reports nothing is taken to arrive.
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
