"""A Vast.ai on this machine, for the real `vastai` command line.

    python -m localcloud [--speedup 30] [--engine vllm] [--fault NAME[:k=v,…]] …
    VAST_URL=http://127.0.0.1:8500 VAST_API_KEY=… vastai show instances

It runs what it is asked to run, as the user who started it: anyone with its key can do what that user can.
The key is in ROOT/api.key, or LOCALCLOUD_API_KEY.
"""

import argparse
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from waitress.server import create_server  # type: ignore[import-untyped]

from engine.profiles import use_own_profiles
from fleet_client import flags, private_files
from fleet_client.flags import Parser, add_flags, check_flags, flag
from fleet_client.listening import bind_socket
from fleet_client.loopback import is_loopback_host
from localcloud import faults, processes
from localcloud.api import create_app
from localcloud.catalogue import big_market
from localcloud.cloud import Cloud
from localcloud.engines import ENGINES
from localcloud.offers_file import read_machines
from localcloud.realism import LEVELS, Realism
from localcloud.world import World
from process.errors import ConfigError
from process.own_profiles import read_own_profiles
from web.app import MAX_BODY

log = logging.getLogger("localcloud")

THREADS = 16
"""Calls that are served at once: each that a fault lets hang takes a thread until its caller gives up."""

LOCK_WAIT_S = 2.0
"""Seconds to wait for the warden of a killed cloud to end the processes in the same directory."""


@dataclass(frozen=True)
class LocalCloudConfig:
    """The settings of a local cloud; each field is a flag of `python -m localcloud`."""

    host: str = flag("127.0.0.1", "address to listen on, loopback only", metavar="ADDRESS")
    port: int = flag(8500, "port to listen on", least=1, most=65535)
    speedup: float = flag(
        30.0,
        "boot and load times are the real ones divided by it; those of real vLLM are not",
        least=1.0,
        most=10_000.0,
        metavar="K",
        unit="factor",
    )
    engine: str = flag(
        "paced",
        "what answers requests: paced, a stand-in at the speed of the model on that GPU; or vllm, real "
        "vLLM on this machine's processor with a tiny model",
        choices=tuple(ENGINES),
    )
    root: Path | None = flag(
        None,
        "directory of the instances' disks and the key",
        metavar="DIR",
        shown="~/.local/state/autoscaler-py/localcloud",
    )
    seed: int = flag(0, "number from which times are drawn")
    fault: tuple[str, ...] = flag(
        (), "switch a fault on at the start; may be repeated", metavar="NAME[:k=v,…]"
    )
    offers: Path | None = flag(
        None, "machines for rent, JSON", shown="a built-in market, a bigger one if harsh"
    )
    profiles: Path | None = flag(
        None,
        "file of your own model profiles, TOML (docs/models.md)",
        shown="profiles.toml here",
    )
    credit: float = flag(100.0, "dollars to spend", least=0.0, most=1e9, metavar="USD", unit="$")
    realism: str = flag(
        "mild", "how unkind it is: none, mild or harsh (localcloud/realism.py)", choices=tuple(LEVELS)
    )
    only: tuple[str, ...] = flag(
        (), "of what --realism switches on only this; may be repeated", metavar="UNKINDNESS"
    )

    def checked(self) -> "LocalCloudConfig":
        """Return the settings unchanged, or raise a ConfigError with the flag, the value and the range."""
        check_flags(self)
        if not is_loopback_host(self.host):
            raise ConfigError(f"--host {self.host}: loopback only: it runs what it is asked to run")
        return self


def parser() -> Parser:
    """Return the parser of the flags of `python -m localcloud`."""
    found = Parser(
        prog="python -m localcloud",
        environment="LOCALCLOUD_",
        description="A Vast.ai on this machine, for the real vastai command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Faults:\n  " + "\n  ".join(line.replace("%", "%%") for line in faults.table()),
    )
    add_flags(found, LocalCloudConfig)
    return found


def _cloud(config: LocalCloudConfig, clock_now: float) -> Cloud:
    engine = ENGINES[config.engine]
    on = faults.Faults()
    for text in config.fault:
        try:
            name, given = faults.parse_flag(text)
            on.add(name, given, clock_now)
        except faults.BadFault as e:
            raise ConfigError(f"--fault {text}: {e}") from None
        if name in engine.deaf_to:
            raise ConfigError(f"--fault {text}: the {config.engine} engine cannot play it")
    realism = _realism(config)
    big = config.offers is None and realism.big_market
    return Cloud(
        big_market() if big else read_machines(config.offers),
        random.Random(config.seed),
        speedup=config.speedup,
        times=engine.times(config.speedup),
        faults=on,
        credit_usd=config.credit,
        realism=realism,
    )


def _realism(config: LocalCloudConfig) -> Realism:
    level = LEVELS[config.realism]
    try:
        return level.only(config.only) if config.only else level
    except ConfigError as e:
        raise ConfigError(f"--only: {e}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the local cloud until SIGTERM or Ctrl-C; then end every process of every instance."""
    config = LocalCloudConfig(**vars(parser().parse_args(argv))).checked()
    use_own_profiles(*read_own_profiles(config.profiles))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    cloud = _cloud(config, time.time())
    ENGINES[config.engine].make_ready()
    root = private_files.make_private_dir(config.root or private_files.default_state_dir("localcloud"))
    key = os.environ.get("LOCALCLOUD_API_KEY") or private_files.load_or_make_key(root / "api.key")
    sock = bind_socket(config.host, config.port)
    locked = processes.lock(root / "lock", LOCK_WAIT_S)
    if locked is None:
        raise ConfigError(f"--root {root}: another local cloud has its instances there")
    warden = processes.Warden(root.resolve() / "instances", locked)
    world = World(cloud, root.resolve(), config.engine)
    # Waitress, not our own event loop: a call that a fault lets hang keeps a thread, and the others go on.
    logging.getLogger("waitress").setLevel(logging.ERROR)
    server = create_server(
        create_app(world, key),
        sockets=[sock],
        threads=THREADS,
        connection_limit=1000,
        max_request_header_size=MAX_BODY,
        max_request_body_size=MAX_BODY,  # it reads bodies before the key is looked at
        channel_request_lookahead=1,  # a call that hangs learns that its caller has hung up
        ident=None,
    )

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        world.stopping.set()  # calls that hang are answered
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print(
        f"local cloud, {config.engine} engine, on http://{config.host}:{config.port}: not Vast.ai. "
        f"Times are divided by {config.speedup:g}; the key is in "
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
