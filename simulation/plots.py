"""Pictures of a run that a person understands at a glance, drawn with matplotlib without a display."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from process.errors import ConfigError

COLOURS: Mapping[str, str] = {
    # state: colour, from the bottom of the stack up
    "hot": "#2a7fb8",
    "draining": "#8fc1e3",
    "booting": "#f2a541",
    "cold": "#d9d9d9",
    "failed": "#c0392b",
}

_BOOTING = ("ordered", "loading", "running", "starting")


def fleet(report: Mapping[str, Any], path: Path) -> None:
    """Draw the instances of a run by state against demand over time, as a PNG.

    Raises ConfigError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = report["scaling"]["over_time"]
    hours = [p["at_s"] / 3600.0 for p in points]
    counts = [_grouped(p["instances"]) for p in points]
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stackplot(
        hours,
        [[c[state] for c in counts] for state in COLOURS],
        labels=list(COLOURS),
        colors=list(COLOURS.values()),
        step="post",
        linewidth=0,
    )
    axes.plot(hours, [p["demand"] or 0.0 for p in points], color="black", linewidth=0.8, label="demand")
    met = report["objective"]["met_share"]
    usd = report["cost_usd"]["total"]
    axes.set_title(
        f"{report['settings'].get('trace', report['model'])}: "
        f"{0.0 if met is None else met:.2%} in time, ${0.0 if usd is None else usd:,.2f}"
    )
    axes.set_xlabel("hours")
    axes.set_ylabel("instances")
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=6, fontsize="small")
    save(figure, path)


def _grouped(states: Mapping[str, int]) -> dict[str, int]:
    return {
        "hot": states.get("hot", 0),
        "draining": states.get("draining", 0),
        "booting": sum(states.get(state, 0) for state in _BOOTING),
        "cold": states.get("cold", 0) + states.get("stopping", 0),
        "failed": states.get("failed", 0) + states.get("destroying", 0),
    }


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure to a PNG file; raise ConfigError when it cannot be written."""
    try:
        # Without dates and versions the same figure is the same file.
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    except OSError as e:
        raise ConfigError(f"--plot {path} cannot be written: {e.strerror}") from e
