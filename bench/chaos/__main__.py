"""Run the campaign: `python -m bench.chaos`; `make chaos` runs all five seeds."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from bench.chaos.audit import Line, audit, missed
from bench.chaos.campaign import PAUSE_S, STORM_S, CampaignSettings, Figures, run_seed
from bench.chaos.kinds import GROUPS, all_kinds, group_of
from bench.chaos.stack import StackSettings
from bench.chaos.undo import UNDONE
from bench.command import bench_parser, machine, names_in, write_json
from fleet_client.flags import Parser, run_main
from process.progress import Progress

MOST_SHOWN = 12
"""Lines of detail that are shown of what was missed; the JSON has all."""


def parser() -> Parser:
    """Return the parser of the flags."""
    found = bench_parser("chaos", "A campaign of faults against the whole stack, and an audit.")
    found.add_argument(
        "--seed", default="0", metavar="N,N", help="seeds, one after the other (default %(default)s)"
    )
    found.add_argument(
        "--minutes", type=float, default=12.0, metavar="N", help="of each seed (default %(default)g)"
    )
    found.add_argument(
        "--only", default="", metavar="KIND,KIND", help="faults of these kinds only (default: all)"
    )
    found.add_argument("--undo", default=None, choices=UNDONE, help="run without that fix (default: none)")
    found.add_argument(
        "--rate", type=float, default=3.0, metavar="N", help="requests a second (default %(default)g)"
    )
    found.add_argument(
        "--storm-s", type=float, default=STORM_S, metavar="S", help="of a storm (default %(default)g)"
    )
    found.add_argument(
        "--pause-s",
        type=float,
        default=PAUSE_S,
        metavar="S",
        help="from fault to fault (default %(default)g)",
    )
    found.add_argument(
        "--speedup", type=float, default=60.0, metavar="X", help="of the cloud (default %(default)g)"
    )
    found.add_argument(
        "--keep", type=Path, default=None, metavar="DIR", help="keep all logs there (default: none)"
    )
    found.add_argument("--list", action="store_true", help="show the kinds of faults, and end")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the seeds, print the table, exit with 1 where a line of the audit was missed."""
    said = parser().parse_args(argv)
    if said.list:
        print("\n".join(all_kinds()))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for name in ("httpx2", "openai"):  # a line a request
        logging.getLogger(name).setLevel(logging.WARNING)
    only = tuple(names_in("--only", said.only, all_kinds()))
    seeds: list[Figures] = []
    for seed in Progress().over([int(text) for text in said.seed.split(",")], lambda seed: f"seed {seed}"):
        stack = replace(StackSettings(seed), speedup=said.speedup, undo=said.undo)
        settings = CampaignSettings(
            seed, said.minutes, only, said.rate, said.storm_s, said.pause_s, keep=said.keep, stack=stack
        )
        seeds.append(run_seed(settings))
        write_json(said.json, figures_of(seeds))
        print(f"\nseed {seed}, {seeds[-1].seconds:.0f} s, {seeds[-1].faults.total()} faults")
        print(table(audit(seeds[-1:])), flush=True)
    lines = audit(seeds)
    if len(seeds) > 1:
        print(f"\n{len(seeds)} seeds\n{table(lines)}")
    print(kinds_table(seeds))
    if missed(lines):
        raise SystemExit(1)


def figures_of(seeds: Sequence[Figures]) -> dict[str, object]:
    """Return everything as JSON has it."""
    return {
        "at": time.time(),
        "machine": machine(),
        "audit": msgspec.to_builtins(audit(seeds)),
        "seeds": [msgspec.to_builtins(figures) for figures in seeds],
    }


def table(lines: Sequence[Line]) -> str:
    """Return the audit for people, target beside figure, with details of what was missed."""
    shown = [f"{'':4} {'':74} {'target':32} measured"]
    for line in lines:
        mark = {True: "kept", False: "MISS", None: "-"}[line.kept]
        shown.append(f"{mark:4} {line.what:74} {line.target:32} {line.figure}")
        if line.kept is False:
            shown += [f"       {detail[:1500]}" for detail in line.details[:MOST_SHOWN]]
            if len(line.details) > MOST_SHOWN:
                shown.append(f"       and {len(line.details) - MOST_SHOWN} more")
    return "\n".join(shown)


def kinds_table(seeds: Sequence[Figures]) -> str:
    """Return how often each kind struck, and what was left out."""
    struck: Counter[str] = Counter()
    out: Counter[str] = Counter()
    for figures in seeds:
        struck += figures.faults
        out += figures.left_out
    groups: Counter[str] = Counter()
    for name, n in struck.items():
        groups[group_of(name)] += n
    shown = ", ".join(f"{name} {n}{_variants(name, struck)}" for name, n in sorted(groups.items()))
    left = ", ".join(f"{name} {n}" for name, n in sorted(out.items()))
    return f"\n{struck.total()} faults: {shown}\nnothing to strike: {left or 'never'}"


def _variants(group: str, struck: Counter[str]) -> str:
    """Return how often each variant of a kind struck, where it has more than one."""
    names = GROUPS.get(group, ())
    return f" ({', '.join(f'{name} {struck[name]}' for name in names)})" if names else ""


if __name__ == "__main__":
    run_main(main)
