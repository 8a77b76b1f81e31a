"""Users for a fleet: send requests as planned, measure what comes back, report.

    python sim.py --local               start everything on this machine, run, report, take it all down
    python sim.py --local --engine vllm     the same with real vLLM and a tiny model, on the processor
    python sim.py [flags]               against a loadbalancer and an autoscaler that run already
    python sim.py --virtual --trace F   in virtual time, with simulated machines:
    simulation/virtual/command.py

A run is rounds of --round-s seconds. In each round each user sends one request with a probability, at a
moment drawn uniformly inside the round; the number of users follows the schedule. simulation/live/ has the
rest: workload.py what is sent, users.py how it is tried again, measure.py the run with its checks and costs,
local_stack.py what --local starts. simulation/report.py says what the report means.
"""

import asyncio
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn

import uvloop

from engine.profiles import use_own_profiles
from fleet_client.flags import Parser, add_flags, flag_of, server_url
from process.errors import ConfigError
from process.own_profiles import read_own_profiles
from simulation import report_table
from simulation.live import measure
from simulation.live.config import SimConfig
from simulation.live.local_stack import ChildFailed, LocalStack
from simulation.live.progress import say
from simulation.live.stack_config import ENGINES, StackConfig
from simulation.live.workload import LOCAL_SCHEDULE
from simulation.report_file import write_page, write_report
from simulation.virtual import command

LOCAL_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paced": {"load_schedule": LOCAL_SCHEDULE},
        # vLLM takes 20 to 30 s to start, so the run is longer than with paced. One instance answers 5 to 6 of
        # these requests a second.
        "vllm": {
            "load_schedule": (1.0, 3.5, 3.5, 3.5, 3.5, 1.0, 0.5, 0.5),
            "num_iterations": 120,
            "prompt_tokens": 100.0,
            "max_tokens": 200.0,
        },
    }
)
"""What is sent with --local unless flags say otherwise, by engine."""

ONLY_LOCAL = ("engine", "instances", "speedup")
NOT_LOCAL = ("loadbalancer", "autoscaler", "client_key_file")


def parser() -> Parser:
    """Return the parser of the flags of a live run of users."""
    found = Parser(
        prog="sim.py",
        environment="SIM_",
        description=(__doc__ or "").split("\n")[0],
        epilog="Exit status: 0 all requests completed; 1 some failed, or something was left behind; "
        "2 it could not be run as asked; 130 interrupted.",
    )
    add_flags(found, SimConfig)
    found.add_argument(
        "--virtual", action="store_true", help="run in virtual time: has flags of its own, --virtual --help"
    )
    return found


def parse(argv: Sequence[str]) -> SimConfig:
    """Return the settings that the flags say; raise ConfigError where they do not fit together."""
    given = vars(parser().parse_args(argv))
    del given["virtual"]
    use_own_profiles(*read_own_profiles(given.get("profiles")))
    local = given.get("local", False)
    for name in NOT_LOCAL if local else ONLY_LOCAL:
        if name in given:
            raise ConfigError(f"{flag_of(name)} goes {'not' if local else 'only'} with --local")
    for name in ("loadbalancer", "autoscaler"):
        if name in given:
            given[name] = server_url(flag_of(name), given[name])
    if local:
        given = _local_defaults(given.get("engine", "paced")) | given
    given.setdefault("seed", secrets.randbelow(2**32))
    return SimConfig(**given, needs_autoscaler="autoscaler" in given).checked()


def _local_defaults(engine: str) -> dict[str, Any]:
    """Return the settings that differ for a run on a local cloud with that engine."""
    kind = ENGINES[engine]
    return {"model": kind.model, "instances": kind.instances, **LOCAL_DEFAULTS[engine]}


# --- outside world ----------------------------------------------------------------------------


def carry_out(config: SimConfig, engine: str | None = None) -> dict[str, Any]:
    """Run users against a fleet that runs already, on a new event loop; return the report.

    The first Ctrl-C or SIGTERM ends the run early.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(65_536, hard)), hard))  # a stream is a file

    async def with_signals() -> dict[str, Any]:
        loop, me, stop = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()

        def on_signal() -> None:
            if stop.is_set() and me is not None:
                me.cancel()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            return await measure.run(config, stop, engine)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, _interrupt)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(with_signals())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def carry_out_locally(config: SimConfig) -> tuple[dict[str, Any], bool]:
    """Start the whole system on this machine, run users against it, and take it down.

    Return the report, and whether nothing was left behind.
    """
    wanted = StackConfig(
        engine=config.engine,
        model=config.model,
        instances=config.instances,
        speedup=config.speedup,
        seed=config.seed,
        state_dir=config.state_dir,
    )
    tell: Callable[[str], None] = (lambda _: None) if config.quiet else say
    stack = LocalStack(wanted, say=tell)
    try:
        with stack:
            there = replace(
                config,
                loadbalancer=stack.loadbalancer_url,
                autoscaler=stack.autoscaler_url,
                state_dir=stack.state_dir,
                needs_autoscaler=True,
            )
            found = carry_out(there, stack.engine)
            print(report_table.table(found), flush=True)
            tell("taking everything down")
    except BaseException:
        # Also when it shall be quiet: a person must end what is left.
        if config.quiet and stack.taken_down is not None and stack.taken_down.left_behind:
            say(f"left behind: {', '.join(stack.taken_down.left_behind)}")
        raise
    end = stack.stop()
    found["local_stack"] = {"restarts": dict(end.restarts), "left_behind": list(end.left_behind)}
    if end.restarts:
        print("died and started again: " + ", ".join(f"{name} {n}" for name, n in end.restarts.items()))
    print(f"left behind: {', '.join(end.left_behind) or 'nothing'}")
    return found, not end.left_behind


def main(argv: Sequence[str] | None = None) -> int:
    """Run users as the flags say, and return the exit status.

    Raises ConfigError, ChildFailed and KeyboardInterrupt.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--virtual" in argv:
        return command.main(argv)
    config = parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if not config.quiet:
        say(f"seed {config.seed}")
    clean = True
    if config.local:
        found, clean = carry_out_locally(config)
    else:
        found = carry_out(config)
        print(report_table.table(found))
    write_report(found, config.json)
    write_page(found, config.html)
    if found["interrupted"]:
        return 130
    return 0 if clean and not found["requests"]["failed"] else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ConfigError as error:
        print(f"sim.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ChildFailed as error:
        print(f"sim.py: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
