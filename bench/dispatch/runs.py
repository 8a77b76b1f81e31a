"""Which runs make the comparison, and how the lines they give are found again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.dispatch.cells import TRACES, DispatchCell
from bench.dispatch.rules.registry import RULES
from process.errors import ConfigError

LEARNED_S = 600.0
"""Seconds after which wrong constants must have been learned."""

OVERLOAD = 1.05


# -- what is compared ------------------------------------------------------------------------------------

SETS = ("main", "fresh", "four", "overload", "unknown")

WHOLE = ("ours-whole", "clairvoyant-whole")
"""Rules that are run on mooncake only."""

USUAL = tuple(rule for rule in RULES if rule != "clairvoyant-here")


@dataclass(frozen=True)
class Comparison:
    """The part of the comparison that is carried out. usual: what all its cells have in common."""

    traces: Sequence[str]
    fleets: Sequence[str]
    loads: Sequence[float]
    sets: Sequence[str]
    rules: Sequence[str]
    usual: DispatchCell


def runs_of(choice: Comparison) -> list[tuple[DispatchCell, str]]:
    """Return every run, those of a cell together."""
    out: list[tuple[DispatchCell, str]] = []
    for name in choice.sets:
        for trace in choice.traces if name in ("main", "fresh", "four") else choice.traces[:1]:
            for fleet in choice.fleets:
                for load in [OVERLOAD] if name == "overload" else choice.loads:
                    cell = replace(
                        choice.usual,
                        set=name,
                        trace=trace,
                        fleet=fleet,
                        load=load,
                        fresh=name == "fresh",
                        balancers=4 if name == "four" else 1,
                        from_s=LEARNED_S if name == "unknown" else 0.0,
                    )
                    out += _runs_in(cell, choice.rules)
    return out


def _runs_in(cell: DispatchCell, wanted: Sequence[str]) -> list[tuple[DispatchCell, str]]:
    rules = [r for r in wanted if r not in WHOLE or cell.trace == "mooncake"]
    if cell.set == "overload":
        rules = [both for rule in rules for both in (rule, f"{rule}+hold")]
        rules += ["ours+lane"] if "ours" in rules else []
    if cell.set != "unknown":
        return [(cell, rule) for rule in rules]
    own = [r for r in rules if RULES[r].make is None]
    told = [*own, *(r for r in rules if r == "clairvoyant")]
    return [*((replace(cell, unknown=True), r) for r in own), *((cell, r) for r in told)]


def title_of(rule: str) -> str:
    """Return the rule's name in tables."""
    plain, _, how = rule.partition("+")
    return RULES[plain].title + {"": "", "hold": " + hold", "lane": " + hold, late lane"}[how]


def is_peer(rule: str, *, listed: bool = False) -> bool:
    """Return whether it is a rule of others; listed: one that ours is measured against."""
    entry = RULES[rule.partition("+")[0]]
    return entry.peer and (entry.listed or not listed)


Line = Mapping[str, Any]
Key = tuple[str, str, str, float, bool]


def key_of(line: Line) -> Key:
    """Return the cell of a run."""
    return line["set"], line["trace"], line["fleet"], line["load"], line["unknown"]


def by_cell(lines: Iterable[Line]) -> dict[Key, dict[str, Line]]:
    """Return the runs by cell, and then by rule."""
    out: dict[Key, dict[str, Line]] = {}
    for line in lines:
        out.setdefault(key_of(line), {})[line["rule"]] = line
    return out


def best_peer(cell: Mapping[str, Line], figure: str, *, listed: bool = True) -> float | None:
    """Return the least of the others' figures."""
    return min((line[figure] for rule, line in cell.items() if is_peer(rule, listed=listed)), default=None)


def merged(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest line of each run, in the order of the comparison."""
    runs = {(key_of(line), line["rule"]): line for line in [*before, *now]}
    order = {rule: n for n, rule in enumerate(RULES)}

    def place(line: Line) -> tuple[int, int, str, float, bool, int, str]:
        group = SETS.index(line["set"]), list(TRACES).index(line["trace"]), line["fleet"]
        return *group, line["load"], line["unknown"], order[line["rule"].partition("+")[0]], line["rule"]

    return sorted(runs.values(), key=place)


def read(path: Path, choice: Comparison) -> list[dict[str, Any]]:
    """Return what was written, if it is of the same settings; raises ConfigError."""
    try:
        lines: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise ConfigError(f"--with {path}: {wrong!r:.100}") from None
    cell = choice.usual
    asked = [cell.arrivals, cell.requests, cell.seed, cell.repeats]
    for line in lines:
        if line["asked"] != asked or line["servers"] != cell.servers:
            raise ConfigError(f"--with {path}: was run with {line['asked']} on {line['servers']} servers")
    return lines
