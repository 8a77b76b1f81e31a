"""What the loadbalancers report, put together: demand over time, and who still has leases on whom.

demand is in instances' worth of capacity, held and just refused requests counted, so a fleet
of none wakes up; busy is the same without them and never more than are hot.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SILENT_S = 10.0
"""A loadbalancer that said nothing for so long (it reports each second) is not counted any more."""

KNOWN_S = 86_400.0
"""For so long its cumulative figures are remembered: one that comes back must not be counted from 0 again."""


@dataclass(frozen=True)
class Report:
    """One `POST /busy`. Cumulative figures count from the start of that loadbalancer process.

    instances: id -> (unfinished leases, cumulative seconds with a request in flight, cumulative failures).
    """

    loadbalancer: str
    hot_epoch: str | None
    hot_version: int | None
    busy: float
    demand: float
    held: int
    arrivals: int
    arrived_work: float
    unfinished: Mapping[int, int] = field(default_factory=dict)
    working_s: Mapping[int, float] = field(default_factory=dict)
    failures: Mapping[int, int] = field(default_factory=dict)


class Demand:
    """The reports of all loadbalancers. Pure: every method takes now, in seconds."""

    def __init__(
        self,
        epoch: str = "",
        memory_s: float = 3600.0,
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
        self._began = began
        self._last: dict[str, tuple[float, Report]] = {}
        self._known: dict[str, tuple[float, Report]] = {}
        self._series: deque[tuple[float, float]] = deque()

    def heard(self, report: Report, now: float) -> tuple[dict[int, float], list[int]]:
        """Take in a report; gives back seconds newly worked by instance, and instances with new failures."""
        _, before = self._known.get(report.loadbalancer, (now, None))
        most_s = float("inf")
        if before is None:
            before = replace(report, arrivals=0, arrived_work=0.0, working_s={}, failures={})
            most_s = now - self._began  # it may run for longer than we do
        self._last[report.loadbalancer] = self._known[report.loadbalancer] = (now, report)
        self.arrivals += max(0, report.arrivals - before.arrivals)
        self.arrived_work += max(0.0, report.arrived_work - before.arrived_work)
        worked = {i: min(s - before.working_s.get(i, 0.0), most_s) for i, s in report.working_s.items()}
        failing = [i for i, n in report.failures.items() if n > before.failures.get(i, 0)]
        return {i: s for i, s in worked.items() if s > 0}, failing

    def tick(self, now: float) -> None:
        """Forget silent loadbalancers and note the demand of this moment in the series."""
        self._last = {name: (at, r) for name, (at, r) in self._last.items() if now - at <= SILENT_S}
        self._known = {name: (at, r) for name, (at, r) in self._known.items() if now - at <= KNOWN_S}
        self._series.append((now, self.demand))
        while self._series and self._series[0][0] < now - self.memory_s:
            self._series.popleft()

    @property
    def series(self) -> tuple[tuple[float, float], ...]:
        """(time, demand), oldest first."""
        return tuple(self._series)

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
            and r.unfinished.get(instance_id, 0) == 0
            for r in reports
        )
