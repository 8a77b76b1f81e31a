"""The targets of the comparison, and whether they are met."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.dispatch.runs import OVERLOAD, Line, best_peer, by_cell, title_of


@dataclass(frozen=True)
class Target:
    """A target: the rule's figure is to be at most `most` times that of CL or of BP, in these cells."""

    set: str
    trace: str
    fleets: tuple[str, ...]
    loads: tuple[float, ...]
    figure: str
    most: float
    of: str
    rule: str = "ours"


EQUAL, MIXED, ALL = ("equal",), ("mixed",), (0.6, 0.8, 0.9, 0.95)
TARGETS = (
    Target("main", "conv", EQUAL, (0.6, 0.8, 0.9), "first_mean", 1.02, "CL"),
    Target("main", "conv", EQUAL, (0.6, 0.8, 0.9), "whole_mean", 0.985, "BP"),
    Target("main", "conv", EQUAL, (0.95,), "j", 1.02, "CL"),
    Target("main", "conv", MIXED, (0.6, 0.8), "first_mean", 0.72, "BP"),
    Target("main", "conv", MIXED, (0.6, 0.8), "whole_mean", 0.95, "BP"),
    Target("main", "conv", MIXED, (0.9,), "j", 1.01, "CL"),
    Target("main", "conv", MIXED, (0.95,), "j", 1.03, "CL"),
    Target("main", "conv", MIXED, (0.95,), "whole_p99", 1.05, "CL"),
    Target("four", "conv", (*EQUAL, *MIXED), ALL, "first_mean", 1.2, "CL"),
    Target("unknown", "conv", (*EQUAL, *MIXED), ALL, "first_mean", 1.03, "known"),
    Target("unknown", "conv", (*EQUAL, *MIXED), ALL, "whole_mean", 1.03, "known"),
    Target("main", "mooncake", EQUAL, (0.8,), "whole_mean", 1.04, "CL"),
    Target("main", "mooncake", MIXED, (0.8,), "first_mean", 0.6, "BP"),
    Target("main", "mooncake", MIXED, (0.8,), "whole_mean", 0.9, "BP"),
    Target("overload", "conv", (*EQUAL, *MIXED), (OVERLOAD,), "first_mean", 1.4, "CL", "ours+hold"),
    Target("overload", "conv", (*EQUAL, *MIXED), (OVERLOAD,), "first_mean", 1.0, "BP", "ours+hold"),
    Target("overload", "conv", (*EQUAL, *MIXED), (OVERLOAD,), "whole_mean", 1.0, "BP", "ours+hold"),
)
NAMES = {"first_mean": "first token", "whole_mean": "whole", "whole_p99": "p99 of the whole", "j": "J"}


def judged(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return every target in every cell of it that was carried out: what it is and whether it is met."""
    cells = by_cell(lines)
    out = []
    for target in TARGETS:
        for fleet in target.fleets:
            for load in target.loads:
                key = (target.set, target.trace, fleet, load, target.of == "known")
                mine = cells.get(key, {}).get(target.rule)
                cell = cells.get((*key[:4], False), {})
                if target.of == "BP":
                    other = best_peer(cell, target.figure)
                else:
                    line = cell.get("clairvoyant" if target.of == "CL" else target.rule)
                    other = None if line is None else line[target.figure]
                if mine is None or other is None:
                    continue
                ratio = mine[target.figure] / other
                truth = cell.get("clairvoyant")
                out.append(
                    {
                        "target": f"{target.trace} {target.set} {fleet} {load:.0%}: {title_of(target.rule)}: "
                        f"{NAMES[target.figure]} over {target.of}",
                        "ratio": ratio,
                        # What the clairvoyant rule reaches of what ours is to reach.
                        "truth": truth[target.figure] / other if target.of == "BP" and truth else None,
                        "most": target.most,
                        "met": ratio <= target.most,
                    }
                )
    return out


def summary(lines: Sequence[Line]) -> list[str]:
    """Return the targets, one line each."""
    found = judged(lines)
    if not found:
        return []
    met = sum(one["met"] for one in found)
    return [
        f"targets: {met} of {len(found)} met",
        *(
            f"{'met   ' if one['met'] else 'MISSED'} {one['target']:72} {one['ratio']:.3f}"
            f" (at most {one['most']:g}{_reached(one['truth'])})"
            for one in found
        ),
    ]


def _reached(truth: float | None) -> str:
    return "" if truth is None else f"; CL {truth:.3f}"
