"""Pictures of a run that a person understands at a glance, drawn with matplotlib without a display.

    instances     by state as a stack, over it what arrives, in instances' worth
    requests      that came: served in time, served late, failed
    waiting       requests that wait for an instance

Colours and words are those of the operator's page. Where more arrives than the hot instances can serve, that
is coloured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from process.errors import ConfigError
from simulation.report_file import outcome

COLOURS: Mapping[str, str] = {
    # state: colour, from the bottom of the stack up
    "hot": "#12805c",
    "draining": "#8a6d1f",
    "booting": "#6f9fdc",
    "cold": "#dde3ea",
}
WORDS: Mapping[str, str] = {
    "hot": "serving",
    "draining": "draining",
    "booting": "starting",
    "cold": "stopped",
}
INK, DIM, LINE, LATE, FAILED = "#16202c", "#566273", "#c3ccd7", "#e0a03c", "#b3202e"

Columns = Mapping[str, NDArray[np.float64]]


def fleet(report: Mapping[str, Any], path: Path, headline: str = "", detail: str = "") -> None:
    """Draw a run over time as a PNG. headline, detail: instead of what came of it and what was played.

    Raises ConfigError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    over_time = report["over_time"]
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in over_time["fleet"].items()}
    unit_s, unit = _unit(report["over_time"]["fleet"]["to"])
    hours = columns["at_s"] / unit_s
    figure = Figure(figsize=(10, 6.6))
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3.4, 1.5, 1.1))
    figure.subplots_adjust(left=0.07, right=0.985, top=0.865, bottom=0.075, hspace=0.24)
    detail = detail or str(report["settings"].get("trace") or report["model"])
    for text, y, size, weight, colour in (
        (headline or outcome(report), 0.985, 16, "bold", INK),
        (detail, 0.94, 10.5, "normal", DIM),
    ):
        # A dollar is a dollar, and no formula.
        figure.text(0.012, y, text, va="top", size=size, weight=weight, color=colour, parse_math=False)
    _instances(above, hours, columns)
    _requests(middle, over_time["requests"], unit_s)
    _waiting(below, hours, columns["held"])
    below.set_xlabel(unit, color=DIM)
    uncounted = (report["settings"].get("score_from_s") or 0.0) / unit_s
    for axes in (above, middle, below):
        axes.margins(x=0)
        axes.set_ylim(bottom=0.0)
        axes.tick_params(colors=DIM, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LINE)
        if uncounted > 0.0:
            axes.axvspan(0.0, uncounted, color="white", alpha=0.6, linewidth=0, zorder=5)
    save(figure, path)


def _unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which a time as long as this is shown, in seconds, and its name."""
    return (
        (1.0, "seconds") if seconds < 300 else (60.0, "minutes") if seconds < 2 * 3600 else (3600.0, "hours")
    )


def _instances(axes: Any, hours: NDArray[np.float64], columns: Columns) -> None:
    stacked = np.cumsum([columns[state] for state in COLOURS], axis=0)
    bottom = np.zeros_like(hours)
    for (state, colour), top in zip(COLOURS.items(), stacked, strict=True):
        if columns[state].any():
            axes.fill_between(hours, bottom, top, step="post", color=colour, linewidth=0, label=WORDS[state])
        bottom = top
    offered, hot = columns["offered"], columns["hot"] + columns["draining"]
    if (offered > hot).any():
        axes.fill_between(
            hours,
            hot,
            offered,
            where=(offered > hot).tolist(),
            facecolor=FAILED,
            alpha=0.75,
            linewidth=0,
            label="too much load",
        )
    axes.plot(hours, offered, color=INK, linewidth=1.5, label="load that arrives")
    axes.set_ylabel("instances", color=DIM)
    axes.yaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes.get_legend_handles_labels()
    _legend(axes, handles[::-1], labels[::-1])


def _requests(axes: Any, counts: Mapping[str, Any], unit_s: float) -> None:
    width_s = counts["width_s"]
    left = np.arange(len(counts["in_time"])) * width_s / unit_s
    bottom = np.zeros(len(left))
    for name, colour, label in (
        ("in_time", COLOURS["hot"], "served in time"),
        ("late", LATE, "served late"),
        ("failed", FAILED, "failed"),
    ):
        values = np.asarray(counts[name], dtype=np.float64) / width_s
        if values.any():
            axes.bar(
                left, values, width_s / unit_s, bottom, align="edge", color=colour, linewidth=0, label=label
            )
        bottom += values
    axes.set_ylabel("requests a second", color=DIM)
    _legend(axes, *axes.get_legend_handles_labels())


def _waiting(axes: Any, hours: NDArray[np.float64], held: NDArray[np.float64]) -> None:
    axes.fill_between(
        hours, held, step="post", color=COLOURS["booting"], linewidth=0, label="requests that wait"
    )
    axes.set_ylabel("requests", color=DIM)
    _legend(axes, *axes.get_legend_handles_labels())
    axes.set_ylim(0.0, max(10.0, 1.1 * float(held.max(initial=0.0))))


def _legend(axes: Any, handles: list[Any], labels: list[str]) -> None:
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.0, 0.99),
            ncols=len(handles),
            frameon=False,
            fontsize=9.5,
            labelcolor=INK,
            handlelength=1.2,
            handletextpad=0.5,
            columnspacing=1.4,
            borderaxespad=0.1,
        )


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure to a PNG file; raise ConfigError when it cannot be written."""
    try:
        # Without dates and versions the same figure is the same file.
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    except OSError as e:
        raise ConfigError(f"--plot {path} cannot be written: {e.strerror}") from e
