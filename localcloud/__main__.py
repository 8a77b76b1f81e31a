"""A Vast.ai on this machine, for the real `vastai` command line.

    python -m localcloud [--speedup 30] [--engine vllm] [--fault NAME[:k=v,…]] …
    VAST_URL=http://127.0.0.1:8500 VAST_API_KEY=… vastai show instances

It runs what it is asked to run, as the user who started it: anyone with its key can do what that user can.
The key is in ROOT/api.key, or LOCALCLOUD_API_KEY.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from waitress.server import create_server  # type: ignore[import-untyped]

from fleet_client import flags, private_files
from fleet_client.flags import Parser, within
from fleet_client.listening import bind_socket
from fleet_client.loopback import is_loopback_host
from localcloud import faults, processes
from localcloud.api import create_app
from localcloud.cloud import Cloud
from localcloud.engines import ENGINES
from localcloud.machines import MACHINES, Machine, machines_from
from localcloud.world import World
from process.errors import ConfigError

log = logging.getLogger("localcloud")

THREADS = 16
"""Calls that are served at once: each that a fault lets hang takes a thread until its caller gives up."""

LOCK_WAIT_S = 2.0
"""Seconds to wait for the warden of a killed cloud to end the processes in the same directory."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m localcloud",
        description="A Vast.ai on this machine, for the real vastai command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Faults:\n  " + "\n  ".join(line.replace("%", "%%") for line in faults.table()),
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on, loopback only (default %(default)s)")
    add("--port", type=int, default=8500, help="port to listen on (default %(default)s)")
    add(
        "--speedup",
        type=float,
        default=30.0,
        metavar="K",
        help="boot and load times are the real ones divided by it (default %(default)g); "
        "those of real vLLM are not",
    )
    add(
        "--engine",
        default="paced",
        choices=tuple(ENGINES),
        help="what answers requests: paced, a stand-in at the speed of the model on that GPU; or vllm, real "
        "vLLM on this machine's processor with a tiny model (default %(default)s)",
    )
    add(
        "--root",
        type=Path,
        metavar="DIR",
        help="disks and key (default ~/.local/state/autoscaler-py/localcloud)",
    )
    add("--seed", type=int, default=0, metavar="N", help="times are drawn from it (default %(default)s)")
    add(
        "--fault",
        action="append",
        default=[],
        metavar="NAME[:k=v,…]",
        help="switch a fault on at the start; may be repeated",
    )
    add("--offers", type=Path, metavar="FILE", help="machines for rent, JSON (default: a built-in market)")
    add("--credit", type=float, default=100.0, metavar="USD", help="dollars to spend (default %(default)g)")
    return parser


def _machines(path: Path | None) -> tuple[Machine, ...]:
    if path is None:
        return MACHINES
    try:
        return machines_from(json.loads(path.read_text()))
    except (OSError, ValueError) as e:
        raise ConfigError(f"--offers {path}: {getattr(e, 'strerror', None) or e}") from e


def _cloud(args: argparse.Namespace, clock_now: float) -> Cloud:
    within("--speedup", args.speedup, 1.0, 10_000.0)
    within("--credit", args.credit, 0.0, 1e9)
    engine = ENGINES[args.engine]
    on = faults.Faults()
    for text in args.fault:
        try:
            name, given = faults.parse_flag(text)
            on.add(name, given, clock_now)
        except faults.BadFault as e:
            raise ConfigError(f"--fault {text}: {e}") from None
        if name in engine.deaf_to:
            raise ConfigError(f"--fault {text}: the {args.engine} engine cannot play it")
    return Cloud(
        _machines(args.offers),
        random.Random(args.seed),
        speedup=args.speedup,
        times=engine.times(args.speedup),
        faults=on,
        credit_usd=args.credit,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; then end every process of every instance."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if not is_loopback_host(args.host):
        raise ConfigError(f"--host {args.host}: loopback only: it runs what it is asked to run")
    within("--port", args.port, 1, 65_535)
    cloud = _cloud(args, time.time())
    ENGINES[args.engine].make_ready()
    root = private_files.make_private_dir(args.root or private_files.default_state_dir("localcloud"))
    key = os.environ.get("LOCALCLOUD_API_KEY") or private_files.load_or_make_key(root / "api.key")
    sock = bind_socket(args.host, args.port)
    locked = processes.lock(root / "lock", LOCK_WAIT_S)
    if locked is None:
        raise ConfigError(f"--root {root}: another local cloud has its instances there")
    warden = processes.Warden(root.resolve() / "instances", locked)
    world = World(cloud, root.resolve(), args.engine)
    # Waitress, not our own event loop: a call that a fault lets hang keeps a thread, and the others go on.
    logging.getLogger("waitress").setLevel(logging.ERROR)
    server = create_server(
        create_app(world, key),
        sockets=[sock],
        threads=THREADS,
        connection_limit=1000,
        channel_request_lookahead=1,  # a call that hangs learns that its caller has hung up
        ident=None,
    )

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        world.stopping.set()  # calls that hang are answered
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print(
        f"local cloud, {args.engine} engine, on http://{args.host}:{args.port}: not Vast.ai. "
        f"Times are divided by {args.speedup:g}; the key is in "
        f"{'LOCALCLOUD_API_KEY' if 'LOCALCLOUD_API_KEY' in os.environ else root / 'api.key'}",
        flush=True,
    )
    try:
        world.start()
        server.run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        world.stop()
        server.close()
        warden.close()
    if world.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.argv[0] = "localcloud"
    flags.run_main(main)
