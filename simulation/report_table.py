"""The report of a run as a table for people, with a chart of the fleet.

An unknown figure is shown as unknown, never as 0.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from simulation.figures import SPREAD
from simulation.report import FAILURES, Sample
from simulation.report_words import LATENCIES, WORDS

WIDTH = 100
"""Columns of the table: a common terminal is at least as wide."""

CHART_ROWS = 10
"""Most rows of the chart: more instances than that share a row."""

STACK: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # what the chart shows, from the bottom up: its mark, and the states of an instance that are meant
    "hot": ("#", ("hot",)),
    "draining": ("-", ("draining",)),
    "booting": ("+", ("ordered", "loading", "running", "starting")),
    "cold": (".", ("stopping", "cold")),
    "failed": ("x", ("failed", "destroying")),
}

_BARS = " ▁▂▃▄▅▆▇█"


def table(report: Mapping[str, Any]) -> str:
    """Return a run's report as text of at most WIDTH columns."""
    lines = [*_heading(report), ""]
    lines += [*_requests(report), ""]
    lines += [*_latencies(report), *_objective_rows(report), ""]
    lines += [*_costs(report), ""]
    lines += [*_scaled(report), ""]
    lines += _driver(report)
    lines += ["", *(_fit(f"{name:20}{meaning}") for name, meaning in WORDS.values())]
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
            "throughput",
            f"{_figure(speed['requests_s'])} requests/s",
            f"goodput {_figure(speed['goodput_requests_s'])}",
            f"{_figure(speed['output_tokens_s'])} output tokens/s",
            f"{_figure(speed['total_tokens_s'])} with prompts",
        ),
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


_SHOWN = {"ttft": "first token", "tpot": "per token", "itl": "between tokens", "e2e": "whole answer"}


def _latencies(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{'latency, s':20}" + "".join(f"{c:>11}" for c in SPREAD)]
    for key, (name, _) in LATENCIES.items():
        values = report["latency_s"][key]
        title = f"{name:5}{_SHOWN.get(key, '')}"
        lines.append(f"{title:20}" + "".join(f"{_figure(values[c]):>11}" for c in SPREAD))
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
    if usd.get("traffic"):
        spent.append(f"{_usd(usd['traffic'])} traffic")
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
    samples = [Sample(p["at_s"], p["instances"], p["usd_h"], p["demand"]) for p in s["over_time"]]
    return lines + chart(samples, report["over_time"], report["duration_s"])


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


def chart(samples: Sequence[Sample], over_time: Mapping[str, Any], duration_s: float) -> list[str]:
    """Return the lines of a chart: instances by state over time as stacks of marks, and below them the load.

    Load offered is in instances' worth, without what waits. Requests served, and late or failed ones, have
    one scale. Without columns of the fleet the demand is shown, which counts what waits, too.
    """
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
    found, peaks = _loads(samples, over_time, duration_s, len(columns))
    lines += [f"{title:>12}  {bars}" for title, bars in found]
    end = f"{duration_s:.0f} s"
    lines.append(f"{'':14}0 s{end:>{max(len(end) + 1, len(columns) - 3)}}")
    return [*lines, *_row("at most", *peaks).splitlines()]


def _loads(
    samples: Sequence[Sample], over_time: Mapping[str, Any], duration_s: float, width: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the lines below the chart (title, bars) of so many columns, and the peak of each in words."""
    lines, peaks = [], []
    fleet, counts = over_time["fleet"], over_time["requests"]
    if fleet is None or not fleet["at_s"]:
        demand = _spread([s.at_s for s in samples], [s.demand or 0.0 for s in samples], duration_s, width)
        lines.append(("demand", demand, max(demand, default=0.0)))
        peaks.append(f"demand {lines[0][2]:.2f} instances' worth, with what waits")
    else:
        offered, held = (_spread(fleet["at_s"], fleet[n], duration_s, width) for n in ("offered", "held"))
        lines += [("offered", offered, max(offered)), ("waiting", held, max(held))]
        peaks.append(f"{max(fleet['offered']):.2f} instances' worth offered")
        peaks.append(f"{max(fleet['held']):,.0f} requests waiting")
    width_s = counts["width_s"]
    ends = [width_s * (n + 1) for n in range(len(counts["in_time"]))]
    served = [a + b for a, b in zip(counts["in_time"], counts["late"], strict=True)]
    missed = [a + b for a, b in zip(counts["failed"], counts["late"], strict=True)]
    most = max(map(max, zip(served, missed, strict=True)), default=0)
    lines += [
        (title, _spread(ends, values, duration_s, width), most)
        for title, values in (("served", served), ("late", missed))
    ]
    late = f"{max(missed, default=0):,} late or failed"
    peaks.append(f"{max(served, default=0):,} served and {late} of those that came in {width_s:g} s")
    bars = [(title, "".join(_bar(v, most) for v in values)) for title, values, most in lines]
    return bars, peaks


def _spread(at_s: Sequence[float], values: Sequence[float], duration_s: float, width: int) -> list[float]:
    """Return the largest value in each of so many equal parts of the time; where there is none, the last."""
    found: list[float | None] = [None] * width
    for at, value in zip(at_s, values, strict=True):
        column = min(width - 1, max(0, math.ceil(at / duration_s * width) - 1))
        found[column] = max(found[column] or 0.0, value)
    whole, last = [], 0.0
    for seen in found:
        last = last if seen is None else seen
        whole.append(last)
    return whole


def _columns(samples: Sequence[Sample], duration_s: float, most: int) -> list[Sample]:
    """Return one sample for each column of the chart, the last one taken in the column's part of the time."""
    count = min(most, max(1, len(samples)))
    chosen, at = [], 0
    for column in range(count):
        until = duration_s * (column + 1) / count
        while at + 1 < len(samples) and samples[at + 1].at_s <= until:
            at += 1
        chosen.append(samples[at])
    return chosen


def _stack(sample: Sample, per_row: int) -> str:
    """Return one column of the chart: a mark for per_row instances, from the bottom up, by state.

    A state with less than half a row of instances still shows one.
    """
    marks = ""
    for mark, states in STACK.values():
        n = sum(sample.states.get(state, 0) for state in states)
        marks += mark * (max(1, round(n / per_row)) if n else 0)
    return marks[: math.ceil(sum(sample.states.values()) / per_row)]


def _bar(value: float, peak: float) -> str:
    return _BARS[math.ceil(value / peak * (len(_BARS) - 1))] if peak > 0 else " "


def _row(title: str, *cells: str) -> str:
    """Return a title and cells as text; cells that do not fit go on in the next line."""
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
    """Return a duration or a rate as text of about four digits."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def _usd(value: float) -> str:
    return f"${value:.4f}" if abs(value) < 10 else f"${value:,.2f}"
