"""The tables and pictures of the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.dispatch.runs import Key, Line, best_peer, by_cell, is_peer, key_of, title_of
from bench.dispatch.targets import summary

GROUPS: Mapping[str, str] = {
    "main": "reports 1 s old",
    "fresh": "reports fresh",
    "four": "reports 1 s old, four loadbalancers",
    "overload": "reports 1 s old, overload",
    "unknown": "reports 1 s old, when constants have been learned",
}


def tables(lines: Sequence[Line], *, full: bool = False) -> str:
    """Return all tables as text: means, and with `full` also the quantiles."""
    out: list[str] = []
    cells = by_cell(lines)
    groups = dict.fromkeys((s, t, f) for s, t, f, _, _ in cells)
    for group in groups:
        name, trace, fleet = group
        loads = sorted({k[3] for k in cells if k[:3] == group})
        some = next(line for line in lines if key_of(line)[:3] == group)
        out += ["", f"{trace}, {some['servers']} servers {fleet}, {GROUPS[name]}; {_cut(some)}"]
        out.append("mean first token / whole, s, and J over the clairvoyant's")
        out.append(f"{'':32}" + "".join(f"{f'{load:.0%}':>26}" for load in loads))
        for unknown in sorted({k[4] for k in cells if k[:3] == group}):
            keys = [(*group, load, unknown) for load in loads]
            rules = dict.fromkeys(rule for key in keys for rule in cells.get(key, {}))
            for rule in rules:
                label = title_of(rule) + (", told wrong" if unknown else "")
                cols = []
                for load, key in zip(loads, keys, strict=True):
                    line = cells.get(key, {}).get(rule)
                    truth = cells.get((*group, load, False), {}).get("clairvoyant")
                    cols.append(_means(line, truth))
                out.append(f"{label:32}" + "".join(cols))
        for rule, label in (("ours", "ours"), ("clairvoyant", "CL")):
            for other in (["CL"] if rule == "ours" else []) + ["BP", "BP told GPUs' rates"]:
                ratios = [_ratios(cells.get((*group, load, False), {}), rule, other) for load in loads]
                if any(ratios):
                    out.append(f"{f'{label} / {other}':32}" + "".join(f"{ratio:>26}" for ratio in ratios))
        if full:
            out += _quantiles(cells, group, loads)
    return "\n".join([*out, "", *summary(lines)])


def _cut(line: Line) -> str:
    return f"{line['requests']:,} scored, {line['cut']:,} of all cut to fit the smallest memory"


def _means(line: Line | None, truth: Line | None) -> str:
    if line is None:
        return f"{'–':>26}"
    over = f"{line['j'] / truth['j']:6.2f}" if truth else f"{'':6}"
    return f"{line['first_mean']:11.3f}{line['whole_mean']:9.2f}{over}"


def _ratios(cell: Mapping[str, Line], rule: str, to: str) -> str:
    """Return first token, whole and J over the other's; nothing where one of the two was not run."""
    out = []
    for figure in ("first_mean", "whole_mean", "j"):
        if to == "CL":
            other = cell["clairvoyant"][figure] if "clairvoyant" in cell else None
        else:
            other = best_peer(cell, figure, listed=to == "BP")
        if other is None or rule not in cell:
            return ""
        out.append(f"{cell[rule][figure] / other:.3f}")
    return " ".join(out)


def _quantiles(
    cells: Mapping[Key, Mapping[str, Line]], group: tuple[str, str, str], loads: Sequence[float]
) -> list[str]:
    out = []
    figures = [f"{what}_{which}" for what in ("first", "whole") for which in ("mean", "p50", "p95", "p99")]
    for load in loads:
        out += ["", f"at {load:.0%}{'':27}" + "".join(f"{f.replace('_', ' '):>12}" for f in figures)]
        for rule, line in cells.get((*group, load, False), {}).items():
            out.append(f"{title_of(rule):32}" + "".join(f"{line[f]:12.3f}" for f in figures))
    return out


# --- outside world ---------------------------------------------------------------------------------


def plots(lines: Sequence[Line], directory: Path) -> None:
    """Draw first token and whole over load, a curve a rule; ours thick, the clairvoyant dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from simulation.plots import save

    directory.mkdir(parents=True, exist_ok=True)
    cells = by_cell(line for line in lines if not line["unknown"])
    for group in dict.fromkeys((s, t, f) for s, t, f, _, _ in cells):
        name, trace, fleet = group
        loads = sorted({k[3] for k in cells if k[:3] == group})
        by_load = {load: cells[(*group, load, False)] for load in loads}
        figure = Figure(figsize=(12, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2)
        figures = (("first_mean", "first token"), ("whole_mean", "whole answer"))
        for axes, (what, label) in zip(panels, figures, strict=True):
            if len(loads) == 1:
                _draw_bars(axes, by_load[loads[0]], what, label)
            else:
                _draw_curves(axes, by_load, what, label)
        if len(loads) > 1:
            panels[0].legend(fontsize="x-small", ncols=2)
        figure.suptitle(f"{trace}, {fleet} servers, {GROUPS[name]}")
        save(figure, directory / f"{name}-{trace}-{fleet}.png")


def _draw_bars(axes: Any, cell: Mapping[str, Line], what: str, label: str) -> None:
    ordered = sorted(cell, key=lambda rule: -cell[rule][what])
    titles, seconds = [title_of(rule) for rule in ordered], [cell[rule][what] for rule in ordered]
    axes.barh(titles, seconds, color=[_colour(rule) for rule in ordered])
    axes.set_xlabel(f"mean of {label}, s")


def _draw_curves(axes: Any, by_load: Mapping[float, Mapping[str, Line]], what: str, label: str) -> None:
    for rule in dict.fromkeys(rule for cell in by_load.values() for rule in cell):
        points = [(load, cell[rule][what]) for load, cell in by_load.items() if rule in cell]
        loads, seconds = [100 * load for load, _ in points], [one for _, one in points]
        axes.plot(loads, seconds, label=title_of(rule), **_style(rule))
    axes.set_yscale("log")
    axes.set_xlabel("load, % of what the servers can serve")
    axes.set_ylabel(f"mean of {label}, s")


def _colour(rule: str) -> str:
    return "#9bb7d4" if is_peer(rule) else "#c0392b" if rule.startswith("clair") else "black"


def _style(rule: str) -> dict[str, Any]:
    if rule == "ours":
        return {"color": "black", "linewidth": 3.5, "marker": "o", "zorder": 9}
    if rule == "clairvoyant":
        return {"color": "#c0392b", "linewidth": 2.0, "linestyle": "--", "zorder": 10}
    return {"linewidth": 0.9, "marker": ".", "alpha": 0.9}
