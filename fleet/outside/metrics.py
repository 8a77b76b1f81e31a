"""The autoscaler's page of figures for Prometheus, GET /metrics."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fleet.contract_ends import ending
from fleet.costs import SPENT_ON
from fleet.holds import HoldKind
from fleet.outside.costs import credit_shown
from fleet.outside.own_health import REASONS
from fleet.outside.turns import Autoscaler
from fleet.states import State
from web.metrics import Family, counter, gauge, histogram, labelled

BOUNDS_S = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0)
"""Upper ends of the buckets, seconds: from a start on a local cloud to the load of a large model."""

CLAMPED = ("hot", "total")
"""What a policy may want more of than the hard limits allow: Decision.clamped."""

EFFECTS = {"create": "create", "start": "start", "stop": "stop", "destroyed": "destroy"}
"""Kind of a duration in the ledger -> the order whose effect the listing shows after that time."""


class AutoscalerMetrics(Collector):
    """Reads the figures of an autoscaler; those of the ledger include all processes before this one."""

    def __init__(self, scaler: Autoscaler, reasons: Callable[[], Collection[str]] = tuple) -> None:
        """Read the figures of that autoscaler, in any thread; its lock is held for arithmetic only.

        reasons: returns the words of the reasons for which it cannot do its job now.
        """
        self._scaler = scaler
        self._reasons = reasons
        self._started_at = scaler.clock()

    def collect(self) -> Iterator[Family]:
        """Yield instances by state, demand, dollars, age of the last turn, and how long orders took."""
        scaler = self._scaler
        now = scaler.clock()
        scaler.try_write_counts()
        costs = scaler.ledger.costs(0.0, now)
        with scaler.lock:
            states = dict.fromkeys(State, 0)
            for i in scaler.instances:
                states[i.state] += 1
            burn_usd_h = sum(i.price_usd_h for i in scaler.instances)
            demand, busy, held = scaler.demand.demand, scaler.demand.busy, scaler.demand.held
            arrivals = scaler.demand.arrivals
            clamps = [(target, scaler.clamps[target]) for target in CLAMPED]
        last = self._started_at if scaler.last_good_turn is None else scaler.last_good_turn

        by_state = ((str(state), n) for state, n in states.items())
        yield labelled(GaugeMetricFamily, "autoscaler_instances", "Instances by state.", "state", by_state)
        yield gauge("autoscaler_demand_instances", "Instances' worth of capacity that is asked for.", demand)
        yield gauge("autoscaler_busy_instances", "Instances' worth of capacity that is in use.", busy)
        yield gauge("autoscaler_held_requests", "Requests that wait at the loadbalancers.", held)
        yield counter("autoscaler_arrived_requests_total", "Requests that loadbalancers reported.", arrivals)
        yield gauge("autoscaler_burn_dollars_per_hour", "What the fleet costs at present.", burn_usd_h)
        says = "What the fleet may cost at most."
        yield gauge("autoscaler_limit_dollars_per_hour", says, scaler.instances.limits.max_usd_h)
        yield from self._money()
        now_not = set(self._reasons())
        not_well = ((reason, float(reason in now_not)) for reason in REASONS)
        says = "Whether the autoscaler cannot do its job for this reason, as GET /health says it."
        yield labelled(GaugeMetricFamily, "autoscaler_not_well", says, "reason", not_well)
        holds = {hold.kind for hold in scaler.instances.holds}
        says = "Whether nothing is rented for this reason although the policy may want more."
        held_by = ((str(kind), float(kind in holds)) for kind in HoldKind)
        yield labelled(GaugeMetricFamily, "autoscaler_held", says, "kind", held_by)
        spent = ((on, getattr(costs, on)) for on in SPENT_ON)
        says = "Dollars spent by this fleet, by what they were spent on."
        yield labelled(CounterMetricFamily, "autoscaler_spent_dollars_total", says, "on", spent)
        says = "Seconds since the last turn with a listing that was believed, or since the start."
        yield gauge("autoscaler_last_good_turn_age_seconds", says, now - last)
        says = "Turns in which the policy wanted more of this than the hard limits allow."
        yield labelled(CounterMetricFamily, "autoscaler_clamped_turns_total", says, "target", clamps)
        yield from self._durations(now)

    def _money(self) -> Iterator[Family]:
        credit, standings = credit_shown(self._scaler), self._scaler.instances.money.budgets.standings
        if credit["usd"] is not None:
            yield gauge("autoscaler_credit_dollars", "The credit of the cloud's account.", credit["usd"])
        if credit["hours_left"] is not None:
            says = "How long the credit lasts at the present rate."
            yield gauge("autoscaler_credit_hours", says, credit["hours_left"])
        fleet = self._scaler.instances
        off = (("yesterday" if d.is_whole else "today", d.difference_usd) for d in fleet.money.reconciled)
        says = "What the account was charged beside what the ledger has, of the days that were compared."
        yield labelled(GaugeMetricFamily, "autoscaler_charges_difference_dollars", says, "day", off)
        with self._scaler.lock:
            soon = ending(fleet, fleet.horizon, self._scaler.clock())
        yield gauge("autoscaler_contracts_ending", "Instances whose contract ends soon.", len(soon))
        used = ((s.period.name, s.share) for s in standings)
        says = "Share of the budget that is spent or bound to be, of a day or a month."
        yield labelled(GaugeMetricFamily, "autoscaler_budget_used_share", says, "period", used)

    def _durations(self, now: float) -> Iterator[Family]:
        seconds: dict[str, list[float]] = {}
        for kind, _, took_s in self._scaler.ledger.durations(0.0, now + 1.0):
            seconds.setdefault(kind, []).append(took_s)
        for kind, name, says in (
            ("boot", "autoscaler_start_seconds", "From the start of a cold instance until it was hot."),
            ("load", "autoscaler_load_seconds", "From the order of a new instance until it was hot."),
        ):
            of_model = {"model": str(self._scaler.instances.profile.name)}
            yield histogram(name, says, BOUNDS_S, {"": _count(seconds.get(kind, ()))}, always=of_model)
        says = "From an order to the cloud until the listing showed its effect."
        counts = {order: _count(seconds.get(kind, ())) for kind, order in EFFECTS.items()}
        yield histogram("autoscaler_order_seconds", says, BOUNDS_S, counts, "order")


def _count(seconds: Iterable[float]) -> tuple[list[int], float]:
    """Return (how many durations fall into each bucket of BOUNDS_S and above, their sum in seconds)."""
    counts, sum_s = [0] * (len(BOUNDS_S) + 1), 0.0
    for one_s in seconds:
        counts[bisect_left(BOUNDS_S, one_s)] += 1
        sum_s += one_s
    return counts, sum_s
