"""What rounds of the comparison say: medians of rounds, differences to direct, tables, a picture.

Times are milliseconds. What a way adds is its figure minus that of "direct" in the same round, and of those
differences the median over the rounds; so a minute in which the machine was slow does not count against
the way that was measured in it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DIRECT = "direct"
AHEAD, ASKED = "ours, leases ahead", "ours, /route each time"
AHEAD_TLS = AHEAD + ", TLS"

CPU_SHARE = 1.0 / 5.0
"""Of the cheapest router's processor time a request: ours is to be at most this."""

SLOWER_MS = 1.5
"""Without leases ahead the median may be this much above the fastest router's."""


@dataclass(frozen=True)
class WayRound:
    """One way, one number of streams, one round. Processor milliseconds are per request.

    router_ms: the router's processes, of ours the loadbalancer. beside_ms: of ours the auth_servers. The
    token check runs inside the engine and is in engine_ms. core: what the router took of its core. p50_ms and
    p99_ms, to the first token, are 0 where that was not measured. cut: requests that did not end in time.
    """

    ended: int
    cut: int
    failed: int
    why: str
    seconds: float
    p50_ms: float
    p99_ms: float
    router_ms: float
    beside_ms: float
    engine_ms: float
    client_ms: float
    core: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.ended / self.seconds


@dataclass(frozen=True)
class WayRow:
    """A way at a number of streams: medians of its rounds, and how far apart they were."""

    way: str
    rounds: int
    ended: int
    cut: int
    failed: int
    p50_ms: float
    p50_low_ms: float
    p50_high_ms: float
    p99_ms: float
    added_p50_ms: float
    added_p99_ms: float
    cpu_ms: float  # what is compared; of ours the token check's share is in it
    cpu_low_ms: float
    cpu_high_ms: float
    router_ms: float
    beside_ms: float
    engine_added_ms: float
    client_added_ms: float
    rate: float
    core: float


def percentile_ms(seconds: Sequence[float], q: float) -> float:
    """Return that percentile in milliseconds; 0 for nothing."""
    return float(np.percentile(np.asarray(seconds), q)) * 1e3 if seconds else 0.0


def is_ours(way: str) -> bool:
    """Return whether a token check in the engine is a part of that way."""
    return way.startswith("ours")


def cpu_ms(way: str, cell: WayRound, direct: WayRound) -> float:
    """Return processor time of what stands between client and engine, per request.

    Ours has a part inside the engine: what the engine needs more than for "direct" in the same round, so the
    token check, new connections and TLS. It may come out below 0 by the noise of the two, and stays so.
    """
    return cell.router_ms + cell.beside_ms + (cell.engine_ms - direct.engine_ms if is_ours(way) else 0.0)


def summary(way: str, cells: Sequence[WayRound], direct: Sequence[WayRound]) -> WayRow:
    """Return the row of a way. cells and direct: by round, in the same order."""

    def median(of: Callable[[WayRound, WayRound], float]) -> float:
        return statistics.median(of(c, d) for c, d in zip(cells, direct, strict=True))

    cpu = [cpu_ms(way, c, d) for c, d in zip(cells, direct, strict=True)]
    p50 = [c.p50_ms for c in cells]
    return WayRow(
        way=way,
        rounds=len(cells),
        ended=sum(c.ended for c in cells),
        cut=sum(c.cut for c in cells),
        failed=sum(c.failed for c in cells),
        p50_ms=statistics.median(p50),
        p50_low_ms=min(p50),
        p50_high_ms=max(p50),
        p99_ms=median(lambda c, _: c.p99_ms),
        added_p50_ms=median(lambda c, d: c.p50_ms - d.p50_ms),
        added_p99_ms=median(lambda c, d: c.p99_ms - d.p99_ms),
        cpu_ms=statistics.median(cpu),
        cpu_low_ms=min(cpu),
        cpu_high_ms=max(cpu),
        router_ms=median(lambda c, _: c.router_ms),
        beside_ms=median(lambda c, _: c.beside_ms),
        engine_added_ms=median(lambda c, d: c.engine_ms - d.engine_ms),
        client_added_ms=median(lambda c, d: c.client_ms - d.client_ms),
        rate=median(lambda c, _: c.rate),
        core=median(lambda c, _: c.core),
    )


def summaries(cells: Mapping[str, Sequence[WayRound]]) -> list[WayRow]:
    """Return a row for each way, in their order. cells: by way; "direct" is among them."""
    return [summary(way, found, cells[DIRECT]) for way, found in cells.items()]


def verdicts(rows: Sequence[WayRow]) -> list[str]:
    """Return the targets at one number of streams, each with what was measured; none without both sides."""
    by_way = {row.way: row for row in rows}
    routers = [row for row in rows if row.way != DIRECT and not is_ours(row.way)]
    if not routers:
        return []
    cheapest = min(routers, key=lambda row: row.cpu_ms)
    fastest = min(routers, key=lambda row: row.added_p50_ms)
    said = []
    for way in (AHEAD, ASKED):
        if way not in by_way:
            continue
        row = by_way[way]
        most_ms = CPU_SHARE * cheapest.cpu_ms
        said.append(
            f"{_yes(row.cpu_ms <= most_ms)}  {way}: {row.cpu_ms:.2f} processor ms a request, target at most "
            f"{most_ms:.2f}, a fifth of {cheapest.way}"
        )
        most_ms = fastest.added_p50_ms + (0.0 if way == AHEAD else SLOWER_MS)
        said.append(
            f"{_yes(row.added_p50_ms <= most_ms)}  {way}: {row.added_p50_ms:.2f} ms added at the median, "
            f"target at most {most_ms:.2f}, {fastest.way}{'' if way == AHEAD else f' + {SLOWER_MS:g}'}"
        )
    return said


def _yes(good: bool) -> str:
    return "met   " if good else "missed"


# -- tables and picture ----------------------------------------------------------------------------------


def table(rows: Sequence[WayRow]) -> str:
    """Return time to first token and processor time, a line a way."""
    lines = [
        f"{'':30} {'first token, ms':^31} {'added, ms':^15} {'processor ms a request':^40}",
        f"{'':30} {'p50':>7} {'of rounds':>15} {'p99':>7} {'p50':>7} {'p99':>7} "
        f"{'router':>8} {'of rounds':>15} {'engine':>7} {'client':>7} {'ended':>6} {'cut':>5} {'failed':>6}",
    ]
    lines += [
        f"{row.way:30} {row.p50_ms:7.2f} {_span(row.p50_low_ms, row.p50_high_ms):>15} {row.p99_ms:7.2f} "
        f"{row.added_p50_ms:+7.2f} {row.added_p99_ms:+7.2f} "
        f"{row.cpu_ms:8.2f} {_span(row.cpu_low_ms, row.cpu_high_ms):>15} "
        f"{row.engine_added_ms:+7.2f} {row.client_added_ms:+7.2f} {row.ended:6d} {row.cut:5d} {row.failed:6d}"
        for row in rows
    ]
    lines += [
        f"{row.way}: loadbalancer {row.router_ms:.2f}, auth_servers {row.beside_ms:.2f}, "
        f"engines {row.engine_added_ms:+.2f} processor ms a request"
        for row in rows
        if is_ours(row.way)
    ]
    return "\n".join(lines)


def rate_table(rows: Sequence[WayRow]) -> str:
    """Return requests a second, a line a way. a core: what a whole one would do, by what it took."""
    lines = [
        f"{'':30} {'requests/s':>10} {'router core':>11} {'a core':>7} {'processor ms':>12} {'failed':>7}"
    ]
    lines += [
        f"{row.way:30} {row.rate:10.0f} {100 * row.core:10.0f}% {_whole_core(row):>7} "
        f"{row.cpu_ms:12.3f} {row.failed:7d}"
        for row in rows
    ]
    return "\n".join(lines)


def _whole_core(row: WayRow) -> str:
    return f"{row.rate / row.core:.0f}" if row.core > 0.0 else "-"


def _span(low: float, high: float) -> str:
    return f"{low:.2f}–{high:.2f}"


def plot(levels: Mapping[str, Sequence[WayRow]], rates: Sequence[WayRow], path: Path) -> None:
    """Draw time added to the first token, processor time, and requests a second. levels: by label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 3)
    ways = [row.way for row in rates]
    places = np.arange(len(ways))[::-1]
    high = 0.8 / max(1, len(levels))
    for n, (label, rows) in enumerate(levels.items()):
        by_way = {row.way: row for row in rows}
        at = places + 0.4 - (n + 0.5) * high
        added = [max(0.01, by_way[way].added_p50_ms) for way in ways]
        panels[0].barh(at, added, high, label=label)
        panels[1].barh(at, [max(0.01, by_way[way].cpu_ms) for way in ways], high, label=label)
    panels[2].barh(
        places, [row.rate for row in rates], 0.6, color=["C3" if is_ours(w) else "C7" for w in ways]
    )
    titles = (
        "added to the time to first token, median, ms",
        "processor of the router, ms a streamed request",
        "requests/s, router on one core",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.set_xscale("log")
        panel.set_yticks(places, ways if panel is panels[0] else [""] * len(ways))
        panel.grid(axis="x", alpha=0.4)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
