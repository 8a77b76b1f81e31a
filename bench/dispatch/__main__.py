"""Every rule for choosing a server on every trace: how long users wait for the first token and for the whole.

    python -m bench.dispatch [--traces DIR] [--only conv,…] [--fleets equal,mixed] [--loads 0.6,0.8,0.9,0.95]
                             [--sets main,fresh,four,overload,unknown] [--rules NAME,…] [--servers N]
                             [--arrivals usual|poisson|log|sessions] [--requests N] [--seed N]
                             [--repeats N] [--workers N] [--json FILE] [--with FILE] [--plots DIR]
                             [--full]

Step-level model servers (engine/reference.py) are given the requests of a trace by ours, by the rules of
others (bench/dispatch/rules), and by a clairvoyant rule that knows how long every answer will be. Load is the
share of what the servers serve when they are saturated with the same lengths, each measured by itself.

    main      reports 1 s old, one loadbalancer        fresh     a report before every decision
    four      four loadbalancers that do not talk      overload  105 %, those that can hold do
    unknown   ours is told constants that are off by up to 30 %, scored after ten minutes or half of the run

The first tenth of the requests is warm-up. J = mean whole + 10 * mean first token. CL is the clairvoyant, BP
the best of the others, for each figure another one. Not in BP is least in-flight over the rate of the GPU,
which is told here what each server does with the very trace; a row of its own has it in.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.command import add_counts, add_traces, bench_parser, names_in, numbers_in, write_json
from bench.dispatch.cells import COME, FLEETS, TRACES, DispatchCell, carry_out
from bench.dispatch.report import plots, tables
from bench.dispatch.rules.registry import RULES
from bench.dispatch.runs import SETS, USUAL, Comparison, Line, merged, read, runs_of
from bench.dispatch.targets import judged
from fleet_client.flags import Parser, run_main, within
from process.progress import Progress


def _parser() -> Parser:
    parser = bench_parser("dispatch", __doc__)
    add_traces(parser)
    for flag, default, text in (
        ("--only", ",".join(TRACES), "traces"),
        ("--fleets", "equal,mixed", f"of {', '.join(FLEETS)}"),
        ("--loads", "0.6,0.8,0.9,0.95", "shares of capacity"),
        ("--sets", ",".join(SETS), "parts of the comparison"),
        ("--rules", ",".join(USUAL), f"of these and {', '.join(set(RULES) - set(USUAL))}"),
        ("--arrivals", "usual", "poisson, log, sessions, or what is usual for the trace"),
    ):
        parser.add_argument(flag, default=default, help=f"{text} (default %(default)s)")
    add_counts(
        parser,
        ("--servers", 8, "model servers"),
        ("--requests", 20_000, "of a log"),
        ("--seed", 0, "the first"),
        ("--repeats", 1, "runs, each with a seed"),
        ("--workers", os.cpu_count() or 1, "processes"),
    )
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw a picture a group there (default: none)"
    )
    parser.add_argument(
        "--with",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="take what is not run now from such a --json file of the same settings (default: none)",
    )
    parser.add_argument("--full", action="store_true", help="print p50, p95 and p99 too")
    return parser


def _comparison(args: argparse.Namespace) -> Comparison:
    within("--workers", args.workers, 1, 64)
    within("--servers", args.servers, 1, 1024)
    within("--repeats", args.repeats, 1, 100)
    within("--requests", args.requests, 100, 1_000_000)
    loads = numbers_in("--loads", args.loads)
    for load in loads:
        within("--loads", load, 0.01, 3.0)
    (arrivals,) = names_in("--arrivals", args.arrivals, ("usual", *COME))
    usual = DispatchCell(
        "main",
        "conv",
        "equal",
        0.8,
        servers=args.servers,
        arrivals=arrivals,
        requests=args.requests,
        seed=args.seed,
        repeats=args.repeats,
        directory=args.traces,
    )
    return Comparison(
        names_in("--only", args.only, TRACES),
        names_in("--fleets", args.fleets, FLEETS),
        loads,
        names_in("--sets", args.sets, SETS),
        names_in("--rules", args.rules, RULES),
        usual,
    )


def write(path: Path | None, lines: Sequence[Line]) -> None:
    """Write all figures and the targets as JSON."""
    write_json(path, {"runs": list(lines), "targets": judged(lines)})


def main() -> None:
    """Carry out all runs and print the tables."""
    args = _parser().parse_args()
    choice = _comparison(args)
    known = [] if args.earlier is None else read(args.earlier, choice)
    todo = runs_of(choice)
    found: list[dict[str, Any]] = []
    progress = Progress()
    with ProcessPoolExecutor(args.workers) as pool:
        for line in pool.map(carry_out, *zip(*todo, strict=True)):
            found.append(line)
            progress.to(len(found) / len(todo), f"{len(found)} of {len(todo)} runs")
            if len(found) % 50 == 0 or len(found) == len(todo):
                write(args.json, merged(found, known))
    found = merged(found, known)
    print(tables(found, full=args.full))
    write(args.json, found)
    if args.plots is not None:
        plots(found, args.plots)


if __name__ == "__main__":
    run_main(main)
