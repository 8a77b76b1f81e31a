"""How many leases a second one loadbalancer process gives, and how soon clients that wait are answered.

    python -m bench.route [--json FILE]

Three processes: a fleet of stub instances (a real socket each, tokens in batches, load reports, and the
autoscaler's two routes), the real `loadbalancer_server.py`, and this driver, which has keep-alive
connections, one request at a time on each. The driver tells the fleet which leases it was given and the
fleet reports them as started and ended, when it is asked and by itself, so stock, refills, leases, work and
reports all do what they do in service.

Rounds of all kinds alternate, each against a fresh server; medians of the rounds are shown. Processor time is
the server's (user and system) per lease, everything it does in the background included.

    closed     each connection asks again as soon as it is answered: the rate
    paced      requests come by the clock (Poisson) at half of that rate, whatever the answers do: the
               latency, from when a request was due
    batches    closed, 32 leases an answer
    held       5,000 clients wait; instances push that a request has ended, 200 times a second; then a hot set
               with room for 3,000 comes at once
"""

import argparse
import statistics
from dataclasses import asdict
from typing import Any

from bench.command import add_counts, bench_parser, machine, write_json
from bench.route.held import WAKES_S, hold_round
from bench.route.rates import RouteCell, measure_rates
from bench.route.servers import pin
from fleet_client.flags import run_main, within
from fleet_client.listening import allow_many_files

BATCH = 32
"""Leases in one answer of the batches."""


def median_of(rounds: list[Any], worst: tuple[str, ...]) -> dict[str, Any]:
    """Return each figure's median; of what must not happen the worst."""
    rows = [asdict(r) for r in rounds]
    out: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    for key in worst:
        out[key] = max(row[key] for row in rows)
    return out


def show(medians: list[dict[str, Any]], held: dict[str, Any] | None) -> None:
    """Print the tables."""
    print(
        f"{'instances':>9} {'clients':>7} {'batch':>5} {'due/s':>7} {'leases/s':>8} {'p50 ms':>7} "
        f"{'p99 ms':>7} {'max ms':>7} {'lag ms':>6} {'CPU µs':>7} {'MB':>5} {'refused':>7} {'lost':>4} "
        f"{'fewest':>6}"
    )
    for row in medians:
        print(
            f"{row['instances']:9.0f} {row['connections']:7.0f} {row['batch'] or '':>5} "
            f"{row['due_s'] or '':>7} {row['leases_s']:8.0f} {row['p50_ms']:7.2f} {row['p99_ms']:7.2f} "
            f"{row['max_ms']:7.1f} {row['lag_p99_ms']:6.2f} {row['server_cpu_us']:7.1f} "
            f"{row['server_mb']:5.0f} {row['refused']:7.0f} {row['lost']:4.0f} "
            f"{row['fewest_answers_of_a_connection']:6.0f}"
        )
    print(
        "CPU: of the server, per lease. due/s: by the clock; lag: p99 of how late the driver itself was.\n"
        "fewest: answers of the connection with fewest."
    )
    if held is not None:
        print(
            f"held {held['held']:.0f}: {held['mb_held']:.0f} MB (before {held['mb_before']:.0f}), "
            f"{held['waiting_cpu_share']:.1%} of a core; woken by {WAKES_S} reports a second: "
            f"p50 {held['wake_p50_ms']:.1f} ms, p99 {held['wake_p99_ms']:.1f}, "
            f"max {held['wake_max_ms']:.1f}; "
            f"{held['burst']:.0f} at once: first {held['burst_first_ms']:.0f} ms, "
            f"p50 {held['burst_p50_ms']:.0f}, last {held['burst_last_ms']:.0f}; lost {held['lost']:.0f}"
        )


def _parsed() -> argparse.Namespace:
    parser = bench_parser("route", __doc__)
    rows = (("--rounds", 3, "per row"), ("--few", 10, "instances"), ("--many", 1000, "instances"))
    add_counts(parser, *rows, ("--most", 10_000, "instances"))
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="of one round (default 4)")
    parser.add_argument("--only", choices=("rates", "held"), help="measure that alone (default: both)")
    args = parser.parse_args()
    for name in ("rounds", "few", "many", "most"):
        within(f"--{name}", getattr(args, name), 1, 100_000)
    return args


def main() -> None:
    """Measure, print the table, write JSON."""
    args = _parsed()
    allow_many_files()
    few, many, most = args.few, args.many, args.most
    cells = [
        RouteCell(few, 16),
        RouteCell(few, 64),
        RouteCell(few, 64, paced=True),
        RouteCell(many, 16),
        RouteCell(most, 16),
        RouteCell(few, 1000),
        RouteCell(10 * few, 16, BATCH),
        RouteCell(many, 16, BATCH),
    ]
    pin(0, -1)
    wanted = [] if args.only == "held" else list(dict.fromkeys(cells))
    found = measure_rates(wanted, args.rounds, args.seconds)
    medians = [median_of(rounds, ("refused", "lost", "max_ms")) for rounds in found.values()]
    holds = [] if args.only == "rates" else [hold_round() for _ in range(args.rounds)]
    held = median_of(holds, ("lost", "wake_max_ms")) if holds else None
    show(medians, held)
    ratio = None
    if found:
        pairs = zip(found[RouteCell(few, 16)], found[RouteCell(most, 16)], strict=True)
        ratio = statistics.median(b.leases_s / a.leases_s for a, b in pairs)
        print(f"{most} instances against {few}: {ratio:.3f} times the rate")
    write_json(
        args.json,
        {
            "machine": machine(),
            "seconds": args.seconds,
            "rounds": args.rounds,
            "rows": medians,
            "held": held,
            "rate_ratio_most_to_few": None if ratio is None else round(ratio, 4),
            "all_rounds": [asdict(r) for rounds in found.values() for r in rounds]
            + [asdict(r) for r in holds],
        },
    )


if __name__ == "__main__":
    run_main(main)
