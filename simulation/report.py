"""What a run measured, as one dictionary (`--json`) and as a table for people; pure.

    records, one a request ─┐
    samples, one a second  ─┼─► build ─► report ─► table
    costs, of the ledger   ─┘

Every figure is of all requests, none is sampled. Latencies count from the moment a request was *due*
(open loop), so a driver or a loadbalancer that was late cannot hide it; they are of completed requests.
A percentile is the linear interpolation between the two nearest ranks, as numpy's default. What is not
known is null in the report and said so in the table, never 0.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.slo import Slo

WIDTH = 100
"""Columns of the table; a common terminal is at least as wide."""

CHART_ROWS = 10
"""Most rows of the chart of instances; more instances than that share a row."""

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

QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}

STACK: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # what the chart shows, from the bottom up: its mark, and the states of an instance that are meant
    "hot": ("#", ("hot",)),
    "draining": ("-", ("draining",)),
    "booting": ("+", ("ordered", "loading", "running", "starting")),
    "cold": (".", ("stopping", "cold")),
    "failed": ("x", ("failed", "destroying")),
}

_BARS = " ▁▂▃▄▅▆▇█"

# -- what is told ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """One request. Times in seconds.

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
        """Count a call for a lease: what it took, and what it got."""
        self.route_s += asked_s
        self.leases += leases
        self.refusals.update(refusals)

    def add_pause(self, pause_s: float) -> None:
        """Count a pause before the next call for a lease."""
        self.route_s += pause_s

    def add_setback(self, kind: str) -> None:
        """Count what an instance did wrong."""
        self.setbacks[kind] += 1

    def complete(
        self, prompt_tokens: int, output_tokens: int, first_token_s: float | None, end_s: float
    ) -> None:
        """Note the answer; seconds since the request was due."""
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.first_token_s, self.end_s = first_token_s, end_s


@dataclass(frozen=True)
class Sample:
    """The fleet at one moment, at_s seconds into the run. demand is in instances' worth of capacity."""

    at_s: float
    states: Mapping[str, int]
    usd_h: float
    demand: float | None


@dataclass(frozen=True)
class RunInfo:
    """What was run. duration_s: from the start to the end of the last answer; settings: for the reader."""

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


@dataclass(frozen=True)
class RunCosts:
    """The part of the autoscaler's `GET /costs` that the report needs; dollars of the run's window."""

    usd: Mapping[str, float]
    usd_if_all_hot: float
    utilisation: float | None
    starts: int
    stops: int
    creates: int
    destroys: int
    order_to_hot_s: tuple[float, ...]


_SPENT_ON = ("total", "hot_working", "hot_idle", "loading", "stopped")


def parse_costs(said: object) -> RunCosts:
    """The answer of `GET /costs` as Costs; raises ValueError that names what is missing or wrong."""
    answer = _mapping("the answer", said)
    usd = _mapping("usd", answer.get("usd"))
    utilisation = answer.get("utilisation")
    took = answer.get("order_to_hot_s")
    if not isinstance(took, list):
        raise ValueError(f"order_to_hot_s: wanted a list, got {took!r:.60}")  # noqa: TRY004 as below
    spent = {name: _number(f"usd.{name}", usd.get(name)) for name in _SPENT_ON}
    return RunCosts(
        usd=spent | {"lost": _number("usd.lost", usd.get("lost", 0.0))},
        usd_if_all_hot=_number("usd_if_all_hot", answer.get("usd_if_all_hot")),
        utilisation=None if utilisation is None else _number("utilisation", utilisation),
        starts=_whole("starts", answer.get("starts")),
        stops=_whole("stops", answer.get("stops")),
        creates=_whole("creates", answer.get("creates")),
        destroys=_whole("destroys", answer.get("destroys")),
        order_to_hot_s=tuple(_number("order_to_hot_s", s) for s in took),
    )


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: wanted an object, got {value!r:.60}")  # noqa: TRY004 a wrong answer, not a bug
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: wanted a number, got {value!r:.60}")
    return float(value)


def _whole(name: str, value: object) -> int:
    number = _number(name, value)
    if number != int(number):
        raise ValueError(f"{name}: wanted a whole number, got {value!r:.60}")
    return int(number)


# -- figures ---------------------------------------------------------------------------------------------


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which that share of an ordered, non-empty sequence lies, interpolated linearly."""
    at = (len(ordered) - 1) * share
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean, percentiles and maximum; all null when there is no value."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(("mean", *QUANTILES, "max"))
    return {
        "mean": math.fsum(ordered) / len(ordered),
        **{name: percentile(ordered, share) for name, share in QUANTILES.items()},
        "max": ordered[-1],
    }


@dataclass(frozen=True)
class Counted:
    """The requests of a run in figures; `latency_s` has a spread for route, ttft, tpot and e2e.

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
"""What of the objective a request can miss."""


def counted(records: Sequence[Record], slo: Slo, *, streaming: bool) -> Counted:
    """The figures of these records. Without streaming there is no first token, so no objective."""
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
        if r.outcome != COMPLETED or r.first_token_s is None:
            missed[FAILED] += 1
        elif r.first_token_s > slo.first_token_limit_s(r.prompt_tokens):
            missed[LATE] += 1
            late_waits.append(r.route_s)
        elif not slo.met(r.prompt_tokens, r.output_tokens, r.first_token_s, r.end_s):
            missed[SLOW] += 1
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
) -> dict[str, Any]:
    """Everything a live run measured, ready for JSON. costs None needs the reason."""
    slo = slo or Slo()
    requests = counted(records, slo, streaming=run.streaming)
    driver = {
        "send_lag_s": spread(r.lag_s for r in records),
        "cpu_share": round(run.cpu_share, 4),
        "lease_ends_untold": run.ends_untold,
    }
    return assemble(run, requests, samples, costs, why_no_costs, slo, driver)


def assemble(
    run: RunInfo,
    requests: Counted,
    samples: Sequence[Sample],
    costs: RunCosts | None,
    why_no_costs: str | None,
    slo: Slo,
    driver: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The report of figures that were counted already; driver is None where nobody had to send."""
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
        "throughput": {
            "requests_s": completed / seconds if seconds > 0 else None,
            "output_tokens_s": output_tokens / seconds if seconds > 0 else None,
        },
        **_money(costs, why_no_costs, completed, output_tokens),
        "scaling": _scaling(samples, costs),
        "driver": None if driver is None else dict(driver),
    }


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
            "cost_usd": dict.fromkeys((*_SPENT_ON, "lost", "if_all_hot")),
            "cost": {
                **dict.fromkeys(("usd_per_1k_requests", "usd_per_1m_output_tokens", "utilisation")),
                "why_unknown": why or "not asked for",
            },
        }
    total = costs.usd["total"]
    return {
        "cost_usd": {**costs.usd, "if_all_hot": costs.usd_if_all_hot},
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


# -- for people ------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The report as text of at most WIDTH columns."""
    lines = [*_heading(report), ""]
    lines += [*_requests(report), ""]
    lines += [*_latencies(report), *_objective_rows(report), ""]
    lines += [*_costs(report), ""]
    lines += [*_scaled(report), ""]
    lines += _driver(report)
    return "\n".join(line.rstrip() for line in lines)


def _heading(report: Mapping[str, Any]) -> list[str]:
    given = report["settings"]
    lines = [
        f"{report['model']} on {report['engine']}, {report['duration_s']:.1f} s, seed {report['seed']}"
        + (", interrupted" if report["interrupted"] else "")
    ]
    if report["local"]:
        lines.append("No GPU was used: times and prices are those of the local cloud, not of real machines.")
    lines = [_fit(line) for line in lines]
    load = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
    return lines + textwrap.wrap(load, WIDTH)


def _requests(report: Mapping[str, Any]) -> list[str]:
    r, tokens, speed = report["requests"], report["tokens"], report["throughput"]
    lines = [
        _row("requests", *(f"{r[k]:,} {k}" for k in ("sent", "completed", "failed", "retried"))),
        _row(
            "tokens", f"{tokens['prompt']:,} in", f"{tokens['output']:,} out", "as the model servers counted"
        ),
        _row(
            "throughput", f"{_figure(speed['requests_s'])} requests/s", f"{_figure(speed['output_tokens_s'])}"
        )
        + " output tokens/s",
    ]
    lines += [
        _row("failed" if n == 0 else "", f"{count:,} {kind}: {FAILURES.get(kind, 'a kind without a name')}")
        for n, (kind, count) in enumerate(sorted(r["failed_by_kind"].items()))
    ]
    for title, key in (
        ("setbacks", "setbacks_by_kind"),
        ("refusals", "route_refusals_by_kind"),
    ):
        if r[key]:
            lines.append(_row(title, *(f"{n:,} {kind}" for kind, n in sorted(r[key].items()))))
    return lines


_LATENCIES = {"route": "route", "ttft": "first token", "tpot": "per output token", "e2e": "whole"}


def _latencies(report: Mapping[str, Any]) -> list[str]:
    columns = ("mean", *QUANTILES, "max")
    lines = [f"{'latency, s':18}" + "".join(f"{c:>11}" for c in columns)]
    for key, title in _LATENCIES.items():
        values = report["latency_s"][key]
        lines.append(f"{title:18}" + "".join(f"{_figure(values[c]):>11}" for c in columns))
    if not report["streaming"]:
        lines.append("not streamed, so there is no time of a first token")
    return lines


def _objective_rows(report: Mapping[str, Any]) -> list[str]:
    o = report["objective"]
    if o["met_share"] is None:
        return []
    limit = f"{o['first_token_s']:g} s + {1e3 * o['prompt_token_s']:g} ms per prompt token"
    missed = [f"{n:,} {kind.replace('_', ' ')}" for kind, n in sorted(o["missed_by"].items()) if n]
    lines = [
        _row("in time", f"{o['met_share']:.3%}", *(missed or ["none missed"])),
        _row("", f"first token within {limit}, {1e3 * o['output_token_s']:g} ms per output token"),
    ]
    wait = o["late_wait_s"]
    if wait["max"] is not None:
        lane = "" if o["late_lane"] is None else f"{o['late_lane']:,} were in the late lane, "
        lines.append(
            _row("", f"{lane}who was late had waited {wait['p50']:.1f} s (p50), {wait['max']:.1f} s at most")
        )
    return lines


def _costs(report: Mapping[str, Any]) -> list[str]:
    usd, cost = report["cost_usd"], report["cost"]
    if usd["total"] is None:
        return [_fit(f"{'cost':14}not known: {cost['why_unknown']}")]
    spent = [
        f"{_usd(usd[k])} {title}"
        for k, title in (
            ("hot_working", "hot and working"),
            ("hot_idle", "hot and idle"),
            ("loading", "loading"),
            ("stopped", "stopped"),
        )
    ]
    if usd["lost"]:
        spent.append(f"{_usd(usd['lost'])} failed")
    share = cost["utilisation"]
    per = [
        f"{title} {_usd(cost[key]) if cost[key] is not None else '–'}"
        for title, key in (
            ("1k requests", "usd_per_1k_requests"),
            ("1M output tokens", "usd_per_1m_output_tokens"),
        )
    ]
    lines = [
        _row("cost", f"{_usd(usd['total'])} in all"),
        _row("", *spent),
        _row("", *per, "utilisation " + ("–" if share is None else f"{share:.0%}")),
    ]
    more = f" ({usd['if_all_hot'] / usd['total']:.2f} times as much)" if usd["total"] > 0 else ""
    return [*lines, _row("", f"{_usd(usd['if_all_hot'])} with every instance hot all the time{more}")]


def _scaled(report: Mapping[str, Any]) -> list[str]:
    s = report["scaling"]
    lines = []
    if s["starts"] is not None:
        took = s["order_to_hot_s"]
        hot = (
            f"order to hot {_figure(took['mean'])} s mean, {_figure(took['max'])} s at most"
            if took["count"]
            else "nothing became hot in the run"
        )
        counts = (f"{s[k]} {k}" for k in ("starts", "stops", "creates", "destroys"))
        lines.append(_row("scaling", *counts, hot))
    return lines + chart(
        [Sample(p["at_s"], p["instances"], p["usd_h"], p["demand"]) for p in s["over_time"]],
        report["duration_s"],
    )


def _driver(report: Mapping[str, Any]) -> list[str]:
    if report["driver"] is None:
        return []
    lag, untold = report["driver"]["send_lag_s"], report["driver"]["lease_ends_untold"]
    if lag["max"] is None:
        return []
    lines = [
        _row(
            "driver",
            f"sent {1e3 * lag['p50']:.1f} ms after due (p50), {1e3 * lag['p99']:.1f} p99, "
            f"{1e3 * lag['max']:.1f} max",
            f"{report['driver']['cpu_share']:.0%} of a core",
        )
    ]
    if untold:
        lines.append(_row("", f"{untold:,} ends of leases could not be told to the loadbalancer"))
    return lines


def chart(samples: Sequence[Sample], duration_s: float) -> list[str]:
    """Instances by state over time as a small stack of marks, and the demand under it."""
    if not samples or duration_s <= 0:
        return []
    columns = _columns(samples, duration_s, WIDTH - 14)
    tallest = max((sum(s.states.values()) for s in columns), default=0)
    per_row = max(1, math.ceil(tallest / CHART_ROWS))
    stacks = [_stack(s, per_row) for s in columns]
    legend = "  ".join(f"{mark} {name}" for name, (mark, _) in STACK.items())
    each = f"{per_row} instances a row" if per_row > 1 else "one row an instance"
    lines = [_row("instances", legend, each)]
    lines += [
        f"{row * per_row:>12}  " + "".join(stack[row - 1] if row <= len(stack) else " " for stack in stacks)
        for row in range(math.ceil(tallest / per_row), 0, -1)
    ]
    peak = max((s.demand or 0.0 for s in samples), default=0.0)
    if any(s.demand is not None for s in columns):
        bars = "".join(_bar(s.demand, peak) for s in columns)
        lines.append(f"{'demand':>12}  {bars}")
    end = f"{duration_s:.0f} s"
    lines.append(f"{'':14}0 s{end:>{max(len(end) + 1, len(columns) - 3)}}")
    if peak > 0:
        lines.append(f"{'':14}demand at its peak: {peak:.2f} instances' worth")
    return lines


def _columns(samples: Sequence[Sample], duration_s: float, most: int) -> list[Sample]:
    """One sample a column: the last one taken by the end of the column's stretch of time."""
    count = min(most, max(1, len(samples)))
    chosen, at = [], 0
    for column in range(count):
        until = duration_s * (column + 1) / count
        while at + 1 < len(samples) and samples[at + 1].at_s <= until:
            at += 1
        chosen.append(samples[at])
    return chosen


def _stack(sample: Sample, per_row: int) -> str:
    """Marks from the bottom up; a state that has instances but less than half a row still shows one mark."""
    marks = ""
    for mark, states in STACK.values():
        n = sum(sample.states.get(state, 0) for state in states)
        marks += mark * (max(1, round(n / per_row)) if n else 0)
    return marks[: math.ceil(sum(sample.states.values()) / per_row)]


def _bar(demand: float | None, peak: float) -> str:
    if demand is None or peak <= 0:
        return " "
    return _BARS[math.ceil(demand / peak * (len(_BARS) - 1))]


def _row(title: str, *cells: str) -> str:
    """A title and cells; when they do not fit they go on in the next line."""
    lines, line = [], f"{title:14}"
    for n, cell in enumerate(cells):
        gap = "" if n == 0 or line.isspace() else "   "
        if len(line) + len(gap) + len(cell) > WIDTH and not line.isspace():
            lines.append(line)
            line, gap = " " * 14, ""
        line += gap + cell
    return "\n".join(_fit(text) for text in [*lines, line])


def _fit(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _figure(value: float | None) -> str:
    """Four digits or so: what matters of a duration or a rate."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def _usd(value: float) -> str:
    return f"${value:.4f}" if abs(value) < 10 else f"${value:,.2f}"
