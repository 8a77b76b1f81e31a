"""The tables and pictures of the comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def ratio(case: Mapping[str, Any], goal: str, usd: float | None) -> float | None:
    """Return the ratio to the floor's cost; None stays None."""
    return None if usd is None else usd / case["floor"][goal]["usd"]


def peer_usd(case: Mapping[str, Any], name: str, goal: str, when: str) -> float | None:
    """Return today's dollars of a peer with the knob of hindsight, or yesterday's if it keeps the goal."""
    point = case["peers"].get(name, {}).get("goals", {}).get(goal, {}).get(when)
    if point is None or (when == "yesterday" and point["now"]["misses"] > 1.0 - float(goal)):
        return None
    return float(point["now"]["usd"])


def best_peer(case: Mapping[str, Any], goal: str, when: str) -> tuple[str, float] | None:
    """Return the cheapest peer that keeps the goal, and its dollars."""
    found = [(name, peer_usd(case, name, goal, when)) for name in case["peers"]]
    costs = [(usd, name) for name, usd in found if usd is not None]
    return None if not costs else (min(costs)[1], min(costs)[0])


def tables(cases: Sequence[Mapping[str, Any]], goals: Sequence[float]) -> str:
    """Return all tables as text."""
    lines: list[str] = []
    for goal in (f"{g:g}" for g in goals):
        for profile, need in sorted({(c["profile"], c["need"]) for c in cases}):
            chosen = [c for c in cases if (c["profile"], c["need"]) == (profile, need)]
            names = list(dict.fromkeys(c["trace"] for c in chosen))
            lines += [
                "",
                f"{float(goal):.1%} in time, {profile}, about {need:g} instances: cost over the floor's,",
            ]
            lines.append("one line / late lane; peers with the best knob in hindsight")
            lines.append(f"{'':34}" + "".join(f"{n:>16}" for n in names))
            lines.append(
                f"{'floor, $ (achieved over bound)':34}"
                + "".join(_floor_cell(chosen, n, goal) for n in names)
            )
            lines.append(f"{'ours, no hindsight':34}" + "".join(_cell(chosen, n, _ours(goal)) for n in names))
            lines.append(
                f"{'  its misses':34}" + "".join(_cell(chosen, n, _misses(goal), "{:.2%}") for n in names)
            )
            for peer in dict.fromkeys(name for c in chosen for name in c["peers"]):
                cells = [_cell(chosen, n, _hindsight(peer, goal)) for n in names]
                lines.append(f"{peer:34}" + "".join(cells))
    return "\n".join([*lines, "", *summary(cases, goals)])


def _floor_cell(cases: Sequence[Mapping[str, Any]], trace: str, goal: str) -> str:
    case = next(c for c in cases if c["trace"] == trace)
    least = case["floor"][goal]
    return f"{least['usd']:>9.2f} ({least['achieved_usd'] / least['bound_usd']:.2f})"


def _cell(
    cases: Sequence[Mapping[str, Any]],
    trace: str,
    value: Callable[[Mapping[str, Any]], float | None],
    form: str = "{:.2f}",
) -> str:
    """Return both disciplines of a cell."""
    parts = []
    for lane in (False, True):
        case = next((c for c in cases if c["trace"] == trace and c["lane"] == lane), None)
        found = None if case is None else value(case)
        parts.append("–" if found is None else form.format(found))
    return f"{' / '.join(parts):>16}"


def _ours(goal: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: ratio(case, goal, case["ours"][goal]["usd"])


def _misses(goal: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: float(case["ours"][goal]["misses"])


def _hindsight(peer: str, goal: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: ratio(case, goal, peer_usd(case, peer, goal, "hindsight"))


def summary(cases: Sequence[Mapping[str, Any]], goals: Sequence[float]) -> list[str]:
    """Return ours against the best peer of each trace, and the cost of the pool."""
    lines = []
    for goal in (f"{g:g}" for g in goals):
        for profile, need in sorted({(c["profile"], c["need"]) for c in cases}):
            chosen = {
                (c["trace"], c["lane"]): c for c in cases if (c["profile"], c["need"]) == (profile, need)
            }
            names = sorted({trace for trace, _ in chosen})
            for what, own_lane, when in (
                ("ours with the lane / best peer in one line, its knob in hindsight", True, "hindsight"),
                ("ours with the lane / cheapest peer that keeps it with yesterday's knob", True, "yesterday"),
                ("one line against one line, its knob in hindsight", False, "hindsight"),
            ):
                shares = []
                for trace in names:
                    mine, other = chosen.get((trace, own_lane)), chosen.get((trace, False))
                    if mine is None or other is None:
                        continue
                    best = best_peer(other, goal, when)
                    if best is not None:
                        shares.append((trace, mine["ours"][goal]["usd"] / best[1], best[0]))
                if shares:
                    mean = math.exp(sum(math.log(s) for _, s, _ in shares) / len(shares))
                    each = ", ".join(f"{t} {s:.2f} ({n})" for t, s, n in shares)
                    lines.append(f"{float(goal):.1%} {profile} {need:g}: {what}: {mean:.2f} ({each})")
            lane = [c for (_, with_lane), c in chosen.items() if with_lane]
            if lane:
                own = [(c["trace"], c["ours"][goal]) for c in lane]
                pool = ", ".join(f"{t} {o['usd_pool'] / (o['usd'] - o['usd_pool']):.1%}" for t, o in own)
                bare = ", ".join(f"{t} {o['uncovered']:.2%}" for t, o in own)
                waits = ", ".join(f"{t} {o['late_p50_s']:.0f}/{o['late_max_s']:.0f} s" for t, o in own)
                lines.append(f"{'':8}pool over GPU cost: {pool}; hot demand uncovered: {bare}")
                lines.append(f"{'':8}waits of the late, p50/max: {waits}")
    return lines


# --- outside world ---------------------------------------------------------------------------------


def plots(cases: Sequence[Mapping[str, Any]], goals: Sequence[float], directory: Path) -> None:
    """Draw cost against objective met, a curve a policy; and our instances against demand."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from simulation.plots import save

    directory.mkdir(parents=True, exist_ok=True)
    for case in cases:
        name = f"{case['trace']}-{case['profile']}-{case['need']:g}-{'lane' if case['lane'] else 'line'}"
        figure = Figure(figsize=(11, 9), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1)
        _draw_costs(above, case, goals)
        above.set_title(f"{name}: cost against objective met")
        _draw_instances(below, case["ours"][f"{goals[0]:g}"]["series"])
        save(figure, directory / f"{name}.png")


def _draw_costs(axes: Any, case: Mapping[str, Any], goals: Sequence[float]) -> None:
    base = case["floor"][f"{goals[0]:g}"]["usd"]

    def draw(points: Sequence[tuple[float, float]], *style: Any, **more: Any) -> None:
        axes.plot([max(m, 1e-4) for m, _ in points], [usd / base for _, usd in points], *style, **more)

    for peer, line in case["peers"].items():
        points = sorted((p["now"]["misses"], p["now"]["usd"]) for p in line["points"])
        draw(_frontier(points), linewidth=0.9, label=peer)
    mine = [case["ours"][f"{g:g}"] for g in goals]
    draw([(one["misses"], one["usd"]) for one in mine], "k*-", markersize=11, label="ours, no hindsight")
    draw([(1 - g, case["floor"][f"{g:g}"]["usd"]) for g in goals], "r_--", label="floor")
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlim(0.2, 1e-4)
    axes.set_ylim(0.8, 6.0)
    axes.set_xlabel("share of requests missed (fewer to the right)")
    axes.set_ylabel(f"cost over the floor's at {goals[0]:.0%}")
    axes.legend(fontsize="x-small", ncols=3)


def _draw_instances(axes: Any, series: Mapping[str, Sequence[float]]) -> None:
    if not series:
        return
    hours = [t / 3600.0 for t in series["at_s"]]
    colours = {"hot": "#2a7fb8", "starting": "#f2a541", "loading": "#c07b20", "cold": "#d9d9d9"}
    stack = [series[name] for name in colours]
    axes.stackplot(
        hours, stack, labels=tuple(colours), step="post", linewidth=0, colors=tuple(colours.values())
    )
    axes.plot(hours, series["demand"], color="black", linewidth=0.6, label="demand")
    axes.set_xlabel("hours")
    axes.set_ylabel("instances, ours")
    axes.margins(x=0)
    axes.legend(loc="upper right", ncols=5, fontsize="x-small")


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the cheapest for each share missed or less."""
    edge: list[tuple[float, float]] = []
    for misses, usd in sorted(points, key=lambda p: (p[1], p[0])):
        if not edge or misses < edge[-1][0]:
            edge.append((misses, usd))
    return edge
