"""Budgets of a day and of a month, by UTC: what is spent, what is bound to be, and what still fits.

    spent     by the ledger since the period began, traffic included
    bound     what cannot be saved any more: storage until the period ends, loads under way, one drain
    forecast  spent, and the present rate until the period ends

    spent + bound ≥ 80 %    near: a create must fit even if the fleet then goes on like this to the end
    spent + bound ≥ 100 %   used up: no creates, no starts; hot instances drain and stop. It stays so until
                            the period ends or the budget is another, although stopping gives room back

Before 80 % a create fits when its traffic, its load and its storage until the end do. Since `bound` holds the
longest drain, a budget is kept as long as storage alone does not use it up. Times are epoch seconds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fleet.instance import Instance
from fleet.states import GIVEN_UP, SERVING, State

NEAR = 0.8
"""Share of a budget from which on it is near its end."""

DAY_S = 86_400.0

DAY, MONTH = "day", "month"


@dataclass(frozen=True)
class Period:
    """A day or a month, and the dollars that may be spent in it."""

    name: str
    from_s: float
    to_s: float
    limit_usd: float

    @property
    def key(self) -> str:
        """What tells it from other days and from other budgets."""
        return f"{self.name} {self.from_s:.0f} {self.limit_usd:g}"


def day_of(now: float) -> tuple[float, float]:
    """Return when the day of that time begins and ends, by UTC."""
    begin = now - now % DAY_S
    return begin, begin + DAY_S


def month_of(now: float) -> tuple[float, float]:
    """Return when the month of that time begins and ends, by UTC."""
    first = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    after = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return first.timestamp(), after.timestamp()


@dataclass(frozen=True)
class Standing:
    """How one budget stands, in dollars. used_up: also when it was used up earlier in its period."""

    period: Period
    spent_usd: float
    bound_usd: float
    rate_usd_h: float
    left_s: float
    used_up: bool

    @property
    def share(self) -> float:
        """The share of the budget that is spent or bound to be."""
        return (self.spent_usd + self.bound_usd) / max(self.period.limit_usd, 1e-9)

    @property
    def near(self) -> bool:
        """Whether the budget is near its end."""
        return self.used_up or self.share >= NEAR

    @property
    def forecast_usd(self) -> float:
        """What the period will cost if the fleet goes on at its present rate."""
        return self.spent_usd + self.rate_usd_h * self.left_s / 3600.0

    @property
    def sentence(self) -> str:
        """How it stands, in words, with what to do."""
        name, limit = self.period.name, self.period.limit_usd
        do = f"raise --budget-usd-{name}, or wait for the next {name} (UTC)"
        said = f"${self.spent_usd:.2f} of ${limit:.2f} are spent, ${self.bound_usd:.2f} are bound to be"
        if self.used_up:
            return f"the {name}'s budget is used up ({said}): hot instances drain and stop; {do}"
        return f"{self.share:.0%} of the {name}'s budget is used ({said}): few creates still fit; {do}"

    def shown(self) -> dict[str, float | bool]:
        """Return it as JSON for people and programs."""
        return {
            "limit_usd": self.period.limit_usd,
            "spent_usd": round(self.spent_usd, 6),
            "bound_usd": round(self.bound_usd, 6),
            "forecast_usd": round(self.forecast_usd, 6),
            "share": round(self.share, 6),
            "near": self.near,
            "used_up": self.used_up,
            "from": self.period.from_s,
            "to": self.period.to_s,
        }


@dataclass(frozen=True)
class CreateCost:
    """What one create costs: dollars for its traffic, $/h running and stopped, and its load in seconds."""

    download_usd: float
    running_usd_h: float
    stopped_usd_h: float
    load_s: float

    def until_loaded_usd(self, left_s: float) -> float:
        """Return what it costs until it is loaded, and its storage for the rest of that time."""
        load_s = min(self.load_s, left_s)
        hours = load_s * self.running_usd_h + (left_s - load_s) * self.stopped_usd_h
        return self.download_usd + hours / 3600.0

    def until_the_end_usd(self, left_s: float) -> float:
        """Return what it costs if it runs all that time."""
        return self.download_usd + left_s * self.running_usd_h / 3600.0


@dataclass(frozen=True)
class Habits:
    """How the fleet goes about things: seconds from order to hot, of the longest drain, GB of a create."""

    load_s: float
    drain_s: float
    download_gb: float = 0.0


def bound_usd(instances: Iterable[Instance], left_s: float, habits: Habits, now: float) -> float:
    """Return the dollars that these instances cost within left_s even if all is stopped as soon as may be."""
    load_s, drain_s = habits.load_s, habits.drain_s
    total = 0.0
    for i in instances:
        if i.state in GIVEN_UP:
            continue
        more_usd_h = max(0.0, i.running_usd_h - i.stopped_usd_h)
        runs_s = 0.0
        if i.state in SERVING or i.state is State.STARTING or (i.state is State.RUNNING and i.loaded):
            runs_s = drain_s
        elif i.state in (State.ORDERED, State.LOADING, State.RUNNING):
            runs_s = max(drain_s, load_s - (now - i.ordered_at))
        if i.state is State.ORDERED:  # once it is listed its download is in the ledger
            total += i.terms.download_usd(habits.download_gb) * 3600.0
        total += i.stopped_usd_h * left_s + more_usd_h * min(runs_s, left_s)
    return total / 3600.0


class Budgets:
    """The budgets of one fleet, and which of them are used up."""

    def __init__(self, usd_day: float | None = None, usd_month: float | None = None) -> None:
        """Keep to so many dollars a day and a month; None: no such budget."""
        self._limits = {DAY: usd_day, MONTH: usd_month}
        self._used_up: frozenset[str] = frozenset()
        self.standings: tuple[Standing, ...] = ()

    def periods(self, now: float) -> list[Period]:
        """Return the periods of that time for which there is a budget."""
        spans = {DAY: day_of(now), MONTH: month_of(now)}
        return [
            Period(name, *spans[name], limit) for name, limit in self._limits.items() if limit is not None
        ]

    @property
    def used_up(self) -> frozenset[str]:
        """The keys of the periods whose budget was used up, for the next process."""
        return self._used_up

    def restore(self, used_up: Iterable[str]) -> None:
        """Take over which budgets an earlier process found used up."""
        self._used_up = frozenset(used_up)

    def settle(
        self,
        spent_usd: Mapping[str, float],
        instances: Iterable[Instance],
        habits: Habits,
        now: float,
    ) -> None:
        """Take in what was spent, by the periods' names; keep how each budget stands now.

        A period of which nothing is known stands as before.
        """
        there = list(instances)
        rate = sum(i.price_usd_h for i in there)
        before = {s.period.name: s for s in self.standings}
        found = []
        for period in self.periods(now):
            spent = spent_usd.get(period.name)
            if spent is None:
                old = before.get(period.name)
                if old is None or old.period != period:
                    continue
                spent = old.spent_usd
            left_s = period.to_s - now
            bound = bound_usd(there, left_s, habits, now)
            over = spent + bound >= period.limit_usd or period.key in self._used_up
            found.append(Standing(period, spent, bound, rate, left_s, over))
        self.standings = tuple(found)
        known = {p.key for p in self.periods(now)}
        self._used_up = frozenset({s.period.key for s in found if s.used_up} | (self._used_up & known))
