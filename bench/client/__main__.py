"""What the way to the engine costs a client: its hashes, token check, fleet_client, gateway.

python -m bench.client [--json FILE]

hashes    microseconds of processor for a request: to read its JSON and size it, to hash its prefixes, and
          (with leases ahead) to look up and note which instance has read them
ahead     conversations and single prompts against a made-up fleet, with 8 leases ahead: what a request waits
          for POST /route and for its prompt to be read, by the lease it takes: the oldest here, the nearest
          here, what the client does, or always one that is asked for
check     a paced engine with 100,000 tokens outstanding, 500 requests/s, each with a token of its own: time
          in the token check, by a watch inside the server
first     a whole fleet on this machine (local cloud, real loadbalancer, TLS): time to the first token of the
          same request sent directly to the instance with a token got before, through `fleet_client` with
          and without leases fetched ahead, and through the gateway; one after the other, again and again,
          so that all meet the same noise
streams   200 concurrent streams of 50 events/s through the gateway from a server that writes into each
          event when it was sent: how late it arrives, and what the gateway takes of a core
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from bench.client.first_token import measure_async, measure_sync
from bench.client.hashing import measure_hashes
from bench.client.lease_choice import measure_ahead
from bench.client.streams import measure_streams, running_gateway
from bench.client.token_check import measure_check
from bench.command import add_counts, bench_parser, machine, write_json
from fleet_client.flags import run_main
from remote.tokens import CAP
from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure all, one after the other, and print a line for each figure."""
    result: dict[str, Any] = {"machine": machine(), "hashes": measure_hashes(args.rounds)}
    for shape, figures in result["hashes"].items():
        _show(f"hashes: {shape}", figures)
    result["ahead"] = {
        f"{instances} instances, /route {route_s * 1e3:g} ms, {turns:g} turns": measure_ahead(
            instances, route_s, turns
        )
        for instances in (2, 8, 40)
        for route_s in (0.002, 0.02, 0.1)
        for turns in (1.02, 4.0)
    }
    for shape, figures in result["ahead"].items():
        _show(f"ahead: {shape}", figures)
    result["check"] = measure_check(directory, 500.0, args.seconds, CAP)
    _show("token check, 500 requests/s, 100,000 tokens outstanding", result["check"])
    for way in (False, True):
        key = "streams" if way else "streams_without_gateway"
        result[key] = measure_streams(directory, args.streams, args.seconds, gateway=way)
        _show(f"{args.streams} streams of 50 events/s, {'gateway' if way else 'direct'}", result[key])
    config = StackConfig(instances=1, max_instances=1, seed=1)
    with LocalStack(config, say=lambda _: None) as stack:
        with running_gateway(directory, stack.loadbalancer_url) as (_, url):
            result["first_token"] = measure_sync(stack.loadbalancer_url, url, args.rounds)
        result["first_token_async"] = asyncio.run(measure_async(stack.loadbalancer_url, args.rounds))
    for key in ("first_token", "first_token_async"):
        for way, figures in result[key].items():
            _show(f"{key}: {way}", figures)
    return result


def _show(what: str, figures: dict[str, Any]) -> None:
    print(f"{what:58}" + "  ".join(f"{k} {v:g}" for k, v in figures.items()), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = bench_parser("client", __doc__)
    add_counts(parser, ("--rounds", 200, "of each way"), ("--streams", 200, "at once"))
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of load (default 10)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-client-") as name:
        write_json(args.json, measure(args, Path(name)))


if __name__ == "__main__":
    run_main(main)
