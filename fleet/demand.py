"""The demand for instances over time, put together from what the loadbalancers report each second.

demand is in instances' worth of capacity, with waiting and just refused requests counted, so that a fleet of
none wakes up; busy is the same without those and never more than are hot.

    report ─► difference to the one before ─► counters          (traffic: they never go back)
                                          └─► fleet/arrivals.py (work by second, and the ledger)

A loadbalancer counts from its own start, so what its first report says may be hours old: it goes into
`arrivals` only.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from engine.slo import Slo
from fleet.answer_window import AnswerWindow
from fleet.arrivals import ARRIVING_S, ArrivalHistory, ArrivalSums
from policies import Traffic
from process.safe_text import safe_text
from web.messages.busy import BusyReport

SILENT_S = 10.0
"""Seconds without a report, which comes each second, after which a loadbalancer is not counted any more."""

SETTLED_S = 10.0
"""Seconds of reports after which the demand is known: the first comes before the clients have come back."""

DEAF_S = 120.0
"""Seconds after the start of this process from which demand counts as known although nobody reports any."""

KNOWN_S = 86_400.0
"""Seconds for which its cumulative figures are kept: if it comes back it must not be counted from 0 again."""

LATE_BOUND_S = 300.0
"""Seconds after which a late request goes before all others, until a loadbalancer says it (its default)."""


class Demand:
    """The reports of all loadbalancers, summed up. Pure: its methods take now, in seconds."""

    def __init__(
        self,
        epoch: str = "",
        memory_s: float = ARRIVING_S,
        *,
        no_balancers: bool = False,
        began: float = float("-inf"),
    ) -> None:
        """Start without reports. epoch: the hot-set epoch of this process.

        memory_s: how long the series of demand is kept. no_balancers: this process tells its hot set to none
        (`prepare`), so no lease can be out. began: when this process did; what a loadbalancer counted before
        is in the ledger already.
        """
        self.epoch = epoch
        self.history = ArrivalHistory()
        self.saturation = Saturation()
        self.arrivals = 0
        self.turned_late = 0  # of what arrived: too late for the objective already at a loadbalancer
        self.answers = AnswerWindow()
        self.slo = Slo()  # as the last report had them
        self.late_bound_s: float | None = LATE_BOUND_S
        self._no_balancers = no_balancers
        self._memory_s = memory_s
        self._began = began
        self._first_report_at: float | None = None
        self._last: dict[str, tuple[float, BusyReport]] = {}  # of those heard of lately
        self._known: dict[str, tuple[float, BusyReport]] = {}
        self._series: list[tuple[float, float]] = []
        self._total = ArrivalSums()

    def add_report(self, report: BusyReport, now: float) -> tuple[dict[int, float], list[int]]:
        """Take in a busy report; return (seconds newly worked by instance id, ids with new failures)."""
        self._first_report_at = now if self._first_report_at is None else self._first_report_at
        at, before = self._known.get(report.loadbalancer, (now, None))
        most_s = float("inf")
        if before is None:
            before = msgspec.structs.replace(report, arrivals=0, instances={})
            most_s = now - self._began  # the loadbalancer may run for longer than this process
            self.history.begin(now)
        else:
            self._count(before, report, at, now)
        self.slo, self.late_bound_s = report.traffic.slo, report.traffic.late_bound_s
        self._last[report.loadbalancer] = self._known[report.loadbalancer] = (now, report)
        self.arrivals += max(0, report.arrivals - before.arrivals)
        worked: dict[int, float] = {}
        failing: list[int] = []
        for i, use in report.instances.items():
            earlier = before.instances.get(i)
            worked[i] = min(use.working_s - (earlier.working_s if earlier else 0.0), most_s)
            if use.failures > (earlier.failures if earlier else 0):
                failing.append(i)
        return {i: s for i, s in worked.items() if s > 0}, failing

    def _count(self, before: BusyReport, report: BusyReport, at: float, now: float) -> None:
        """Add what arrived between two reports of one loadbalancer; the earlier one came at `at`."""
        more = ArrivalSums(
            max(0, report.arrivals - before.arrivals),
            max(0.0, report.arrived_work - before.arrived_work),
            max(0, report.traffic.prompt_tokens - before.traffic.prompt_tokens),
            max(0.0, report.traffic.output_tokens - before.traffic.output_tokens),
        )
        self.turned_late += max(0, report.traffic.turned_late - before.traffic.turned_late)
        self.answers.add(before.answers, report.answers)
        self.history.add(more, at, now)
        if more.requests:
            self._total.add(more)

    def tick(self, now: float, hot: int = 0) -> None:
        """Forget silent loadbalancers; note the present demand, and what the `hot` hot instances served."""
        if any(now - at > SILENT_S for at, _ in self._known.values()):
            self._last = {name: (at, r) for name, (at, r) in self._last.items() if now - at <= SILENT_S}
            self._known = {name: (at, r) for name, (at, r) in self._known.items() if now - at <= KNOWN_S}
        self._series.append((now, self.demand))
        oldest = now - self._memory_s
        if self._series[0][0] < oldest:
            del self._series[: bisect_right(self._series, (oldest, -math.inf))]
        self.saturation.note(hot, self.traffic, now)

    def since(self, from_s: float) -> Sequence[tuple[float, float]]:
        """Return (time, demand) pairs, oldest first, starting with the last one at or before from_s."""
        first = bisect_right(self._series, (from_s, math.inf))
        return self._series[max(0, first - 1) :]

    @property
    def traffic(self) -> Traffic:
        """The present load at the loadbalancers heard of lately, and counters of all that has arrived."""
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

    def use_of_instances(self) -> dict[int, tuple[int, float, int]]:
        """Return (requests under way, their work, failures so far) of each instance, by id."""
        found: dict[int, tuple[int, float, int]] = {}
        for _, report in self._last.values():
            for i, use in report.instances.items():
                requests, work, failures = found.get(i, (0, 0.0, 0))
                found[i] = requests + use.unfinished, work + use.work, failures + use.failures
        return found

    def out(self) -> dict[int, str]:
        """Return the instances that a loadbalancer heard of lately does not listen to, and why."""
        reports = [report.instances for _, report in self._last.values()]
        return {i: use.out for rows in reports for i, use in rows.items() if use.out is not None}

    def slow(self) -> dict[int, str]:
        """Return the instances that a loadbalancer's clients find many times slower than others, and how."""
        reports = [report.instances for _, report in self._last.values()]
        return {i: safe_text(use.slow) for rows in reports for i, use in rows.items() if use.slow is not None}

    @property
    def demand(self) -> float:
        """The demand of all loadbalancers heard of lately, in instances' worth of capacity."""
        return sum(r.demand for _, r in self._last.values())

    @property
    def busy(self) -> float:
        """The capacity in use at all loadbalancers heard of lately, in instances' worth."""
        return sum(r.busy for _, r in self._last.values())

    @property
    def held(self) -> int:
        """How many requests wait at the loadbalancers heard of lately."""
        return sum(r.held for _, r in self._last.values())

    @property
    def held_by_priority(self) -> tuple[int, int, int]:
        """How many requests of high, normal and low priority wait at the loadbalancers heard of lately."""
        waiting = [r.traffic.held_by_priority for _, r in self._last.values()]
        high, normal, low = (sum(some) for some in zip(*waiting, strict=True)) if waiting else (0, 0, 0)
        return high, normal, low

    @property
    def reporting(self) -> bool:
        """Whether it is known on which instances leases are out: a loadbalancer reports, or there is none."""
        return self._no_balancers or bool(self._last)

    def heard(self, now: float) -> bool:
        """Return whether the demand is known by now; until then a fleet that was found hot stays hot."""
        first = self._first_report_at
        settled = first is not None and now - first >= SETTLED_S
        return self._no_balancers or settled or now - self._began >= DEAF_S

    def no_lease_on(self, instance_id: int, version: int) -> bool:
        """Return whether no loadbalancer heard of lately has a lease out on that instance.

        Each must also know the hot set of that version. With no loadbalancer heard of it is not known: False.
        """
        if self._no_balancers:
            return True
        reports = [r for _, r in self._last.values()]
        return bool(reports) and all(
            r.hot_epoch == self.epoch
            and r.hot_version is not None
            and r.hot_version >= version
            and not ((use := r.instances.get(instance_id)) and use.unfinished)
            for r in reports
        )


SATURATED_S = 120.0
"""Hot seconds in which requests waited, after which the work done in them says what an instance can do."""

SATURATED_MEMORY_S = 1800.0
"""Hot seconds after which half of what was seen before is forgotten."""

LONGEST_NOTE_S = 60.0
"""Seconds between two notes above which it is not known what happened in between."""


class Saturation:
    """What the hot instances serve while requests wait: what the fleet can really do.

    What single instances show is what they do when they are given the right requests; with what is lost
    between them it is less.
    """

    def __init__(self) -> None:
        """Begin with no time seen in which requests waited."""
        self._before = (-math.inf, 0, 0.0, 0.0)  # (when, hot, work arrived, work held)
        self._work = self._seconds = 0.0

    def note(self, hot: int, traffic: Traffic, now: float) -> None:
        """Learn from the work that the hot instances have served since the last call, if requests waited.

        hot: the number of hot instances. Only while requests wait does the work served show what an instance
        can do.
        """
        at, hot_then, arrived, held_work = self._before
        self._before = (now, hot, traffic.work_total, traffic.held_work)
        seconds = now - at
        waited = traffic.held_work > 0.0 and held_work > 0.0
        if not (0.0 < seconds <= LONGEST_NOTE_S and hot == hot_then > 0 and waited):
            return
        keep = 0.5 ** (hot * seconds / SATURATED_MEMORY_S)
        served = max(0.0, traffic.work_total - arrived - traffic.held_work + held_work)
        self._work = self._work * keep + served
        self._seconds = self._seconds * keep + hot * seconds

    @property
    def work_s(self) -> float | None:
        """The work per second of one hot instance when requests wait; None until SATURATED_S were seen."""
        return None if self._seconds < SATURATED_S else self._work / self._seconds
