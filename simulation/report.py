"""What a run measured, as one dictionary (`--json`); pure.

    records, one a request ─┐
    samples, one a second  ─┼─► build ─► report ─► table (report_table.py)
    costs, of the ledger   ─┘

Every figure is of all requests, none is sampled. Latencies count from the moment a request was *due*
(open loop), so that a driver or a loadbalancer that was late does not hide it; they are of completed
requests. What is not known is null, never 0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct, structs

from engine.slo import Slo
from simulation.figures import spread
from simulation.outcomes_over_time import OutcomesOverTime

COMPLETED = "completed"

FAILURES: Mapping[str, str] = {
    # kind of failure: what happened last before the request was given up
    "no_capacity": "the loadbalancer had no free instance until the time was up",
    "loadbalancer_unreachable": "the loadbalancer did not answer until the time was up",
    "refused_by_loadbalancer": "the loadbalancer said 4xx: no other try can succeed",
    "not_started": "instances took no request until the time was up",
    "broken_off": "answers broke off until the time was up",
    "bad_answer": "answers were not what they must be until the time was up",
    "rejected": "the model server said 4xx: no other try can succeed",
    "timeout": "an answer was still coming when the time was up",
    "interrupted": "the run was ended by Ctrl-C or SIGTERM",
}

# -- what is told ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """What became of one request. Times in seconds.

    due_s: since the start of the run. lag_s: how late it was sent. route_s: spent on getting leases, all
    attempts and pauses added up. first_token_s and end_s: since it was due. outcome: "completed" or one
    of FAILURES. setbacks: what an instance did wrong, by kind; each was followed by another try, or
    by the end. refusals: what the loadbalancer said instead of giving a lease, by kind.
    """

    due_s: float
    lag_s: float
    outcome: str = ""
    route_s: float = 0.0
    first_token_s: float | None = None
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    leases: int = 0
    setbacks: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def add_call(self, asked_s: float, leases: int, refusals: Iterable[str]) -> None:
        """Count one call for a lease of this request: its seconds, the leases it got, the refusals it met."""
        self.route_s += asked_s
        self.leases += leases
        self.refusals.update(refusals)

    def add_pause(self, pause_s: float) -> None:
        """Count the seconds of a pause before the request's next call for a lease."""
        self.route_s += pause_s

    def add_setback(self, kind: str) -> None:
        """Count a failure of an instance that had the request, by kind."""
        self.setbacks[kind] += 1

    def complete(
        self, prompt_tokens: int, output_tokens: int, first_token_s: float | None, end_s: float
    ) -> None:
        """Note the end of the request's answer; times are seconds since the request was due."""
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.first_token_s, self.end_s = first_token_s, end_s


@dataclass(frozen=True)
class Sample:
    """The state of the fleet at_s seconds into the run.

    states: number of instances by state. usd_h: what they cost. demand is in instances' worth of capacity.
    """

    at_s: float
    states: Mapping[str, int]
    usd_h: float
    demand: float | None


@dataclass(frozen=True)
class RunInfo:
    """How a run was made, for the report.

    duration_s: from the start to the end of the last answer; settings: shown as they are. cpu_share: share of
    a core that sending took. ends_untold: leases whose end could not be told to the loadbalancer.
    """

    engine: str
    local: bool
    model: str
    seed: int
    streaming: bool
    started_at: float
    duration_s: float
    interrupted: bool
    settings: Mapping[str, Any]
    cpu_share: float
    ends_untold: int


class SpentUsd(Struct, frozen=True):
    """Dollars that a run cost, by what they were spent on."""

    total: float
    hot_working: float
    hot_idle: float
    loading: float
    stopped: float
    lost: float = 0.0
    traffic: float = 0.0


class RunCosts(Struct, frozen=True):
    """The part of the autoscaler's `GET /costs` that the report needs, for the time of the run."""

    usd: SpentUsd
    usd_if_all_hot: float
    starts: int
    stops: int
    creates: int
    destroys: int
    order_to_hot_s: tuple[float, ...]
    utilisation: float | None = None


# -- figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """The requests of a run in figures; `latency_s` has a spread for each latency of LATENCIES.

    missed_by: requests that did not keep the objective, by what they missed; None when it cannot be told.
    late_wait_s: how long those whose first token was late had waited for a lease. late_lane: requests that
    the loadbalancer put behind the others, where that is known.
    """

    sent: int
    completed: int
    retried: int
    failed_by_kind: Mapping[str, int]
    setbacks_by_kind: Mapping[str, int]
    refusals_by_kind: Mapping[str, int]
    prompt_tokens: int
    output_tokens: int
    latency_s: Mapping[str, Mapping[str, float | None]]
    missed_by: Mapping[str, int] | None
    late_wait_s: Mapping[str, float | None]
    late_lane: int | None = None


LATE, SLOW, FAILED = "first_token_late", "tokens_slow", "failed"
"""What a request can miss of the objective."""


def missed_by(slo: Slo, prompt_tokens: int, output_tokens: int, first_s: float, end_s: float) -> str | None:
    """Return what an answered request missed of the objective, LATE or SLOW; None if it was in time."""
    if slo.met(prompt_tokens, output_tokens, first_s, end_s):
        return None
    return LATE if first_s > slo.first_token_limit_s(prompt_tokens) + 1e-6 else SLOW


def _missed(r: Record, slo: Slo) -> str | None:
    if r.outcome != COMPLETED or r.first_token_s is None:
        return FAILED
    return missed_by(slo, r.prompt_tokens, r.output_tokens, r.first_token_s, r.end_s)


@dataclass(frozen=True)
class OverTime:
    """A run over time. samples: the fleet by state, one a second or less; outcomes: of the requests.

    fleet: columns as of GET /history, with times since the start of the run; None: not known.
    """

    samples: Sequence[Sample]
    outcomes: OutcomesOverTime
    fleet: Mapping[str, Any] | None = None


def counted(
    records: Sequence[Record], slo: Slo, *, streaming: bool, itl: Mapping[str, float | None] | None = None
) -> Counted:
    """Return the figures of these requests. Without streaming no first token is known, so none is judged.

    itl: the spread of the seconds between two events of a stream.
    """
    completed = [r for r in records if r.outcome == COMPLETED]
    # The first token takes its own time; the others share what is left. One token alone has no such time.
    tpot = (
        (r.end_s - r.first_token_s) / (r.output_tokens - 1)
        for r in completed
        if r.first_token_s is not None and r.output_tokens > 1
    )
    setbacks: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for r in records:
        setbacks += r.setbacks
        refusals += r.refusals
    missed: Counter[str] = Counter()
    late_waits = []
    for r in records:
        what = _missed(r, slo)
        if what is not None:
            missed[what] += 1
        if what == LATE:
            late_waits.append(r.route_s)
    return Counted(
        sent=len(records),
        completed=len(completed),
        retried=sum(r.leases > 1 for r in records),
        failed_by_kind=Counter(r.outcome for r in records if r.outcome != COMPLETED),
        setbacks_by_kind=setbacks,
        refusals_by_kind=refusals,
        prompt_tokens=sum(r.prompt_tokens for r in completed),
        output_tokens=sum(r.output_tokens for r in completed),
        latency_s={
            "route": spread(r.route_s for r in completed),
            "ttft": spread(r.first_token_s for r in completed if r.first_token_s is not None),
            "tpot": spread(tpot),
            "itl": spread(()) if itl is None else itl,
            "e2e": spread(r.end_s for r in completed),
        },
        missed_by=missed if streaming else None,
        late_wait_s=spread(late_waits),
    )


def build(
    run: RunInfo,
    records: Sequence[Record],
    samples: Sequence[Sample],
    costs: RunCosts | None,
    why_no_costs: str | None = None,
    slo: Slo | None = None,
    fleet: Mapping[str, Any] | None = None,
    itl: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """Return the report of a live run, everything that was measured, ready for JSON.

    why_no_costs: the reason, needed where costs is None. fleet: as in OverTime. itl: as in counted.
    """
    slo = slo or Slo()
    outcomes = OutcomesOverTime()
    for r in records:
        failed = r.outcome != COMPLETED
        outcomes.add(
            r.due_s, failed=failed, late=run.streaming and not failed and _missed(r, slo) is not None
        )
    requests = counted(records, slo, streaming=run.streaming, itl=itl)
    driver = {
        "send_lag_s": spread(r.lag_s for r in records),
        "cpu_share": round(run.cpu_share, 4),
        "lease_ends_untold": run.ends_untold,
    }
    return assemble(run, requests, OverTime(samples, outcomes, fleet), costs, why_no_costs, slo, driver)


def assemble(
    run: RunInfo,
    requests: Counted,
    over_time: OverTime,
    costs: RunCosts | None,
    why_no_costs: str | None,
    slo: Slo,
    driver: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return a run's report made from figures that were counted before.

    driver: how the sending went; None in virtual time. why_no_costs: needed where costs is None.
    """
    seconds = run.duration_s
    completed, output_tokens = requests.completed, requests.output_tokens
    return {
        "engine": run.engine,
        "local": run.local,
        "model": run.model,
        "seed": run.seed,
        "streaming": run.streaming,
        "started_at": round(run.started_at, 3),
        "duration_s": round(seconds, 3),
        "interrupted": run.interrupted,
        "settings": dict(run.settings),
        "requests": {
            "sent": requests.sent,
            "completed": completed,
            "failed": requests.sent - completed,
            "retried": requests.retried,
            "failed_by_kind": dict(requests.failed_by_kind),
            "setbacks_by_kind": dict(requests.setbacks_by_kind),
            "route_refusals_by_kind": dict(requests.refusals_by_kind),
        },
        "tokens": {"prompt": requests.prompt_tokens, "output": output_tokens},
        "latency_s": {name: dict(values) for name, values in requests.latency_s.items()},
        "objective": _objective(requests, slo),
        "throughput": _throughput(requests, seconds),
        **_money(costs, why_no_costs, completed, output_tokens),
        "scaling": _scaling(over_time.samples, costs),
        "over_time": {
            "requests": over_time.outcomes.columns(),
            "fleet": None if over_time.fleet is None else dict(over_time.fleet),
        },
        "driver": None if driver is None else dict(driver),
    }


def _throughput(requests: Counted, seconds: float) -> dict[str, float | None]:
    missed = requests.missed_by
    counts = {
        "requests_s": requests.completed,
        "output_tokens_s": requests.output_tokens,
        "total_tokens_s": requests.prompt_tokens + requests.output_tokens,
        "goodput_requests_s": None if missed is None else requests.sent - sum(missed.values()),
    }
    return {name: n / seconds if n is not None and seconds > 0 else None for name, n in counts.items()}


def _objective(requests: Counted, slo: Slo) -> dict[str, Any]:
    missed = None if requests.missed_by is None else sum(requests.missed_by.values())
    return {
        "first_token_s": slo.first_token_s,
        "prompt_token_s": slo.prompt_token_s,
        "output_token_s": slo.output_token_s,
        "met_share": None if missed is None or not requests.sent else 1.0 - missed / requests.sent,
        "missed": missed,
        "missed_by": None if requests.missed_by is None else dict(requests.missed_by),
        "late_wait_s": dict(requests.late_wait_s),
        "late_lane": requests.late_lane,
    }


def _money(costs: RunCosts | None, why: str | None, completed: int, output_tokens: int) -> dict[str, Any]:
    if costs is None:
        return {
            "cost_usd": dict.fromkeys((*SpentUsd.__struct_fields__, "if_all_hot")),
            "cost": {
                **dict.fromkeys(("usd_per_1k_requests", "usd_per_1m_output_tokens", "utilisation")),
                "why_unknown": why or "not asked for",
            },
        }
    total = costs.usd.total
    return {
        "cost_usd": {**structs.asdict(costs.usd), "if_all_hot": costs.usd_if_all_hot},
        "cost": {
            "usd_per_1k_requests": 1e3 * total / completed if completed else None,
            "usd_per_1m_output_tokens": 1e6 * total / output_tokens if output_tokens else None,
            "utilisation": costs.utilisation,
            "why_unknown": None,
        },
    }


def _scaling(samples: Sequence[Sample], costs: RunCosts | None) -> dict[str, Any]:
    counts = ("starts", "stops", "creates", "destroys")
    return {
        **{name: getattr(costs, name) if costs else None for name in counts},
        "order_to_hot_s": {
            "count": len(costs.order_to_hot_s) if costs else None,
            **spread(costs.order_to_hot_s if costs else ()),
        },
        "most_hot": max((s.states.get("hot", 0) for s in samples), default=None),
        "over_time": [
            {"at_s": round(s.at_s, 2), "usd_h": s.usd_h, "demand": s.demand, "instances": dict(s.states)}
            for s in samples
        ],
    }
