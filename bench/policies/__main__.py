"""Every management policy on every trace: what it costs to serve a share of the requests in time.

    python -m bench.policies [--traces DIR] [--needs 3,30] [--profiles vllm-13,vllm-70] [--workers N]
                             [--goals 0.99,0.999] [--json FILE] [--plots DIR] [--only conv,…] [--peers NAME,…]

For each trace, size of fleet, profile and discipline of the queue (one line, or the late lane) in the fluid
model (simulation/virtual/fluid/run.py), whose capacity is that of the step-level model server for the trace's
lengths:

    floor        the cheapest a clairvoyant could do (floor.py)
    ours         `Objective`, tuned by replay every half hour on what it has seen; no hindsight
    peers        best knob in hindsight; the knob that was best yesterday; published defaults

The scored window is the second half of a log of an hour (the first is history) and the second day of two. A
cost is all dollars of the window: GPUs hot, starting, loading and stopping, and the pool's storage. It is
shown as a ratio to the floor's, whose pool is the cheapest there can be. All begin with as many hot as the
mean needs, and five times as many loaded.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.command import add_counts, add_traces, bench_parser, names_in, numbers_in, write_json
from bench.policies.cases import GPUS, TRACES, Line, PolicyCase, carry_out
from bench.policies.peers.registry import PEERS
from bench.policies.report import plots, tables
from fleet_client.flags import Parser, run_main, within
from process.progress import Progress


def _parser() -> Parser:
    parser = bench_parser("policies", __doc__)
    add_traces(parser)
    for flag, default, metavar, text in (
        ("--only", ",".join(TRACES), "NAME,…", "traces (default %(default)s)"),
        ("--needs", "3,30", "N,…", "instances on average (default %(default)s)"),
        ("--profiles", ",".join(GPUS), "NAME,…", "(default %(default)s)"),
        ("--goals", "0.99,0.999", "SHARE,…", "(default %(default)s)"),
        ("--peers", ",".join(PEERS), "NAME,…", "(default all)"),
    ):
        parser.add_argument(flag, default=default, metavar=metavar, help=text)
    add_counts(parser, ("--workers", os.cpu_count() or 1, "processes"))
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw a picture a case there (default: none)"
    )
    return parser


def main() -> None:
    """Carry out all cases and print the tables."""
    args = _parser().parse_args()
    within("--workers", args.workers, 1, 64)
    needs, goals = numbers_in("--needs", args.needs), tuple(numbers_in("--goals", args.goals))
    traces = names_in("--only", args.only, TRACES)
    profiles = names_in("--profiles", args.profiles, GPUS)
    peers = tuple(names_in("--peers", args.peers, PEERS))
    cases = [
        PolicyCase(trace, need, profile, lane, goals, args.traces, peers)
        for trace in sorted(traces, key=lambda t: t != "m-small")  # the longest first
        for need in needs
        for profile in profiles
        for lane in (False, True)
    ]
    found: list[Line] = []
    progress = Progress()
    with ProcessPoolExecutor(args.workers) as pool:
        for line in pool.map(carry_out, cases):
            found.append(line)
            at = f"{line['trace']} {line['profile']} {line['need']:g} {'lane' if line['lane'] else 'line'}"
            print(f"{len(found)}/{len(cases)} {at}: {line['seconds']:.0f} s", flush=True)
            progress.to(len(found) / len(cases))
            write_json(args.json, found)  # hours may have gone into it: what is there is kept
    order = {name: n for n, name in enumerate(TRACES)}
    found.sort(key=lambda c: order[c["trace"]])
    print(tables(found, goals))
    write_json(args.json, found)
    if args.plots is not None:
        plots(found, goals, args.plots)


if __name__ == "__main__":
    run_main(main)
