"""Users for a fleet: send requests as planned, measure what comes back, report.

    python sim.py --local               start everything on this machine, run, report, take it all down
    python sim.py --local --engine vllm     the same with real vLLM and a tiny model, on the processor
    python sim.py [flags]               against a loadbalancer and an autoscaler that run already
    python sim.py --virtual --trace F   in virtual time, with simulated machines:
    simulation/virtual/command.py

A run is rounds of --round-s seconds. In each round each user sends one request with a probability, at a
moment drawn uniformly inside the round; the number of users follows the schedule. What is sent, when, and
how it is tried again is told in simulation/live/users.py; what the report says in simulation/report.py.
Beside the requests the fleet is looked at once a second, and at the end the autoscaler is asked for the
costs of exactly this stretch of time.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import resource
import secrets
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import aiohttp
import uvloop
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from engine.profiles import PROFILES, get_profile
from fleet_client import AsyncFleetTransport
from fleet_client.flags import Parser, server_url, within
from fleet_client.loopback import is_loopback_url
from fleet_client.private_files import default_state_dir, load_keys
from process.errors import ConfigError
from simulation import report
from simulation.live.local_stack import ENGINES, ChildFailed, LocalStack, StackConfig
from simulation.live.users import Arrival, Driver, Workload, plan
from simulation.report import COMPLETED
from simulation.traces.logs import read
from simulation.virtual import command

T = TypeVar("T")


SAMPLE_S = 1.0
"""Between two looks at the fleet."""

SETTLE_S = 1.5
"""After the run, before costs are asked for: the loadbalancer says every second who worked."""

ANSWER_S = 15.0
"""How long an autoscaler that does not answer is asked again: it may be starting anew."""

MOST_TRACED = 100_000
"""Requests of a log that are sent: each is planned ahead."""

SHOW_S = (0.5, 5.0)
"""Between two pictures of the progress: on a terminal, and elsewhere (a line each)."""

LOCAL_SCHEDULE = (1.0, 3.0, 4.0, 1.0, 0.5, 0.5)
"""With --local: grows beyond one instance and falls again, in a minute."""

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

DEFAULT_LOADBALANCER, DEFAULT_AUTOSCALER = "http://127.0.0.1:8200", "http://127.0.0.1:8100"
DEFAULT_LOCALCLOUD = "http://127.0.0.1:8500"


@dataclass(frozen=True)
class Config(Workload):
    """Everything a user may set: what is sent, and where to."""

    manage: bool | None = None  # None leaves the autoscaler's flag as it is
    local: bool = False
    engine: str = "paced"  # with local
    instances: int = 4  # with local: the prepared pool
    speedup: float = 60.0  # with local
    loadbalancer: str = DEFAULT_LOADBALANCER
    autoscaler: str = DEFAULT_AUTOSCALER
    needs_autoscaler: bool = False  # it was named on the command line: unreachable is an error then
    state_dir: Path | None = None
    client_key_file: Path | None = None
    trace: Path | None = None  # a log whose requests are sent in place of drawn ones
    json: Path | None = None
    quiet: bool = False

    def checked(self) -> "Config":
        """Itself, or ConfigError naming the flag, the value and the range."""
        longest = get_profile(self.model).max_model_len
        within("--num-iterations", self.num_iterations, 1, 1_000_000)
        within("--round-s", self.round_s, 0.01, 3600.0)
        within("--base-num-users", self.base_num_users, 0, 1_000_000)
        within("--request-probability", self.request_probability, 0.0, 1.0)
        within("--prompt-tokens", self.prompt_tokens, 1.0, longest)
        within("--max-tokens", self.max_tokens, 1.0, longest)
        within("--seed", self.seed, 0, 2**63 - 1)
        within("--wait-s", self.wait_s, 0.0, 600.0)  # the loadbalancer's own bound
        within("--request-timeout-s", self.request_timeout_s, 0.1, 86_400.0)
        if self.prompt_tokens + self.max_tokens > longest:
            raise ConfigError(
                f"--prompt-tokens {self.prompt_tokens:g} and --max-tokens {self.max_tokens:g}: "
                f"wanted at most {longest} together, the context of {self.model}"
            )
        if self.base_num_users * self.num_iterations * max(self.load_schedule) > 1e8:
            raise ConfigError("--base-num-users × --num-iterations: wanted at most 100 million draws in all")
        if self.json is not None:
            if not self.json.absolute().parent.is_dir():
                raise ConfigError(f"--json {self.json}: there is no directory {self.json.absolute().parent}")
            if self.json.is_dir():
                raise ConfigError(f"--json {self.json}: wanted a file, that is a directory")
        return self


def parse_schedule(text: str) -> tuple[float, ...]:
    """Multiples of the base number of users over equal slices of the run; raises ConfigError."""
    try:
        multiples = tuple(float(part) for part in text.split(","))
    except ValueError:
        multiples = ()
    if not multiples or not all(0.0 <= m <= 1000.0 for m in multiples):
        raise ConfigError(f"--load-schedule {text!r}: wanted numbers from 0 to 1000 with commas between")
    return multiples


# --- outside world ----------------------------------------------------------------------------


class NoAnswer(Exception):
    """The autoscaler or the loadbalancer did not answer as it must; the text says who, and what came."""


class Operator:
    """What an operator may ask: the autoscaler's routes, and the loadbalancer's `GET /status`."""

    def __init__(self, session: aiohttp.ClientSession, config: Config, key: str | None) -> None:
        """key: the control key, where there is one."""
        self._session = session
        self._autoscaler = config.autoscaler
        self._loadbalancer = config.loadbalancer
        self._headers = _bearer(key)

    async def instances(self) -> tuple[list[Mapping[str, Any]], bool | None]:
        """Every instance, and whether the autoscaler manages them; raises NoAnswer."""
        said = await self._ask("GET", f"{self._autoscaler}/instances")
        rows, manage = said.get("instances"), said.get("manage")
        if not isinstance(rows, list) or not all(isinstance(r, dict) and "state" in r for r in rows):
            raise NoAnswer(f"{self._autoscaler}/instances: wanted instances with states")
        return rows, manage if isinstance(manage, bool) else None

    async def manage(self, wanted: bool) -> None:
        """Have it manage the fleet, or leave it as it is; raises NoAnswer."""
        await self._ask("PUT", f"{self._autoscaler}/manage", {"manage": wanted})

    async def costs(self, from_s: float, to_s: float) -> report.Costs:
        """What was spent between the two, epoch seconds; raises NoAnswer."""
        said = await self._ask("GET", f"{self._autoscaler}/costs?from={from_s:.3f}&to={to_s:.3f}")
        try:
            return report.parse_costs(said)
        except ValueError as e:
            raise NoAnswer(f"{self._autoscaler}/costs: {e}") from None

    async def status(self) -> Mapping[str, Any]:
        """The loadbalancer's figures; raises NoAnswer."""
        return await self._ask("GET", f"{self._loadbalancer}/status")

    async def _ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        shown = url.partition("?")[0]
        try:
            async with self._session.request(
                method,
                url,
                json=body,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=3.0),
                allow_redirects=False,
            ) as reply:
                raw = await reply.read()
                status = reply.status
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise NoAnswer(f"{shown}: {e or type(e).__name__}") from None
        if status != 200:
            raise NoAnswer(f"{shown}: wanted 200, got {status}")
        try:
            said = json.loads(raw)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise NoAnswer(f"{shown}: wanted a JSON object, got {raw[:40]!r}")
        return said


class Watch:
    """Looks at the fleet every SAMPLE_S; a look that fails is left out."""

    def __init__(self, operator: Operator, clock: Callable[[], float]) -> None:
        """clock gives seconds since the start of the run."""
        self.samples: list[report.Sample] = []
        self._operator = operator
        self._clock = clock

    async def run(self) -> NoReturn:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        looks = 0
        while True:
            with contextlib.suppress(NoAnswer):
                await self._look()
            looks += 1
            await asyncio.sleep(max(0.05, begun + looks * SAMPLE_S - loop.time()))

    async def _look(self) -> None:
        (rows, _), demand = await asyncio.gather(self._operator.instances(), self._demand())
        prices = (row.get("price_usd_h") for row in rows)
        usd_h = sum(p for p in prices if isinstance(p, int | float))
        states = Counter(str(row["state"]) for row in rows)
        self.samples.append(report.Sample(max(0.0, self._clock()), dict(states), round(usd_h, 6), demand))

    async def _demand(self) -> float | None:
        """In instances' worth; None when the loadbalancer does not say."""
        try:
            demand = (await self._operator.status()).get("demand")
        except NoAnswer:
            return None
        return float(demand) if isinstance(demand, int | float) else None


async def run(config: Config, stop: asyncio.Event, engine: str | None) -> dict[str, Any]:
    """Carry out the run and give back its report; it ends early, with what there is, when stop is set.

    engine: what answers, where it is known; None finds out. Raises ConfigError when nothing can be run.
    """
    arrivals = plan(config) if config.trace is None else _traced(config.trace, config)
    control_key = _control_key(config)
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as session,
    ):
        client_key = _client_key(config)
        operator = Operator(session, config, control_key)
        await _check_loadbalancer(session, client_key, operator, config)
        managed = await _check_autoscaler(operator, config)
        try:
            return await _measure(config, arrivals, stop, engine, operator, client_key)
        finally:
            if config.manage is not None and managed is not None and managed != config.manage:
                await _manage_as_before(operator, managed)


def _traced(path: Path, config: Config) -> list[Arrival]:
    """The requests of a log, cut to the model's context; raises ConfigError."""
    longest = get_profile(config.model).max_model_len
    arrivals = []
    for number, request in enumerate(read(path)):
        if number == MOST_TRACED:
            raise ConfigError(f"--trace {path}: over {MOST_TRACED:,} requests: --virtual plays such a log")
        output = min(request.output_tokens, longest - 1)
        prompt = min(request.prompt_tokens, longest - output)
        arrivals.append(Arrival(number, request.at_s, prompt, output))
    return arrivals


async def _measure(
    config: Config,
    arrivals: Sequence[Arrival],
    stop: asyncio.Event,
    engine: str | None,
    operator: Operator,
    client_key: str | None,
) -> dict[str, Any]:
    transport = AsyncFleetTransport(
        config.loadbalancer,
        api_key=client_key or "",
        max_tries=1,  # the driver tries again itself, and keeps a record of it
        wait_s=config.wait_s,
        trust_network=True,  # an operator's own measurement
    )
    driver = Driver(config, transport)
    watch = Watch(operator, lambda: time.perf_counter() - driver.begun)
    length_s = config.num_iterations * config.round_s if config.trace is None else arrivals[-1].at_s
    screen = Screen(config, driver, watch, len(arrivals), length_s)
    gc.collect()
    gc.freeze()  # the plan stays: collections need not look at it, which would delay what is due
    started_at, used = time.time(), time.process_time()
    begun = time.perf_counter()
    sending = asyncio.create_task(driver.run(arrivals))
    background: list[asyncio.Task[None]] = [asyncio.create_task(job) for job in (watch.run(), screen.run())]
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((sending, stopped, *background), return_when=asyncio.FIRST_COMPLETED)
        interrupted = stop.is_set() and not sending.done()
        for task in background:
            if task.done():
                task.result()  # they only end by raising
    finally:
        sending.cancel()  # changes nothing when all has ended
        stopped.cancel()
        await asyncio.wait((sending, stopped))
        duration_s = time.perf_counter() - begun
        cpu_share = (time.process_time() - used) / max(duration_s, 1e-9)
        await transport.aclose()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        gc.unfreeze()
    if not interrupted:
        sending.result()
    await asyncio.sleep(0.0 if interrupted else SETTLE_S)
    costs, why = None, None
    try:
        costs = await _again_and_again(lambda: operator.costs(started_at, started_at + duration_s))
    except NoAnswer as e:
        why = str(e)
    engine = engine or await _find_engine(driver.seen_addresses)
    return report.build(
        report.Run(
            engine=engine,
            local=engine.startswith("local cloud"),
            model=config.model,
            seed=config.seed,
            streaming=config.streaming,
            started_at=started_at,
            duration_s=duration_s,
            interrupted=interrupted,
            settings=_settings(config),
            cpu_share=cpu_share,
            ends_untold=transport.untold,
        ),
        driver.records,
        watch.samples,
        costs,
        why,
    )


async def _again_and_again(ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What ask gives, asked again for ANSWER_S while there is no answer; raises the last NoAnswer."""
    until = time.monotonic() + ANSWER_S
    while True:
        try:
            return await ask()
        except NoAnswer:
            if time.monotonic() >= until:
                raise
        await asyncio.sleep(0.5)


async def _manage_as_before(operator: Operator, managed: bool) -> None:
    """Set the flag back, or say that it could not be: the report is worth having all the same."""
    try:
        await _again_and_again(lambda: operator.manage(managed))
    except NoAnswer as e:
        _say(f"--{'manage' if managed else 'no-manage'}, as it was before, could not be set again: {e}")


async def _check_loadbalancer(
    session: aiohttp.ClientSession, client_key: str | None, operator: Operator, config: Config
) -> None:
    """Raise ConfigError unless it is there, takes our key, and serves the model we measure for."""
    # An end of a lease that it never gave is answered 200 and changes nothing.
    body = {"request_id": "sim-asks-who-is-there", "outcome": "unused"}
    timeout = aiohttp.ClientTimeout(total=5.0)
    try:
        async with session.post(
            f"{config.loadbalancer}/done",
            json=body,
            headers=_bearer(client_key),
            timeout=timeout,
            allow_redirects=False,
        ) as reply:
            status = reply.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        raise ConfigError(f"the loadbalancer {config.loadbalancer} does not answer") from None
    if status in (401, 403):
        raise ConfigError(f"the loadbalancer {config.loadbalancer} wants a client key: --client-key-file")
    if status != 200:
        raise ConfigError(f"{config.loadbalancer} is no loadbalancer: POST /done answered {status}")
    with contextlib.suppress(NoAnswer):  # its status is for operators, and we may be none
        served = (await operator.status()).get("model")
        if served and served != config.model:
            raise ConfigError(f"--model {config.model}: the loadbalancer serves {served}")


async def _check_autoscaler(operator: Operator, config: Config) -> bool | None:
    """Its manage flag as it is now, then set as wanted; raises ConfigError if it is needed and not there."""
    try:
        _, managed = await operator.instances()
        if config.manage is not None:
            await operator.manage(config.manage)
    except NoAnswer as e:
        if config.needs_autoscaler or config.manage is not None:
            raise ConfigError(f"the autoscaler does not answer: {e}") from None
        return None
    return managed


def _bearer(key: str | None) -> dict[str, str]:
    """The header that carries the key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _find_engine(addresses: Collection[str]) -> str:
    """What answered, told by where it is: on loopback it can only be a local cloud."""
    if not addresses:
        return "unknown engine: no instance was asked"
    if not all(is_loopback_url(address) for address in addresses):
        return "vLLM on rented machines"
    async with aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        try:
            async with session.get(f"{DEFAULT_LOCALCLOUD}/localcloud/status") as reply:
                said = json.loads(await reply.read())
            return f"local cloud, {said['engine']} engine"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return "local cloud, unknown engine"


def _settings(config: Config) -> dict[str, Any]:
    return {
        "rounds": config.num_iterations,
        "round_s": config.round_s,
        "users": config.base_num_users,
        "probability": config.request_probability,
        "schedule": ",".join(f"{m:g}" for m in config.load_schedule),
        "streaming": config.streaming,
        "manage": config.manage,
        "prompt_tokens": config.prompt_tokens,
        "max_tokens": config.max_tokens,
        "trace": None if config.trace is None else config.trace.name,
        "wait_s": config.wait_s,
        "request_timeout_s": config.request_timeout_s,
    }


# -- what is shown ---------------------------------------------------------------------------------------


class Screen:
    """The progress: a live bar on a terminal, a line every few seconds elsewhere; on stderr."""

    def __init__(self, config: Config, driver: Driver, watch: Watch, total: int, length_s: float) -> None:
        """total: requests to be sent, in so many seconds."""
        self._length_s = length_s
        self._config = config
        self._driver = driver
        self._watch = watch
        self._total = total
        self._console = Console(stderr=True)

    async def run(self) -> NoReturn:
        """Show until cancelled."""
        if self._config.quiet:
            await asyncio.Event().wait()
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(SHOW_S[1])
                print(self.line(), file=sys.stderr, flush=True)
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self._picture(), refresh=True)
                await asyncio.sleep(SHOW_S[0])

    def line(self) -> str:
        """The figures of this moment."""
        driver = self._driver
        completed = driver.outcomes[COMPLETED]
        failed = driver.outcomes.total() - completed
        parts = [
            f"{self._at_s():.0f} s",
            f"sent {len(driver.records)}/{self._total}",
            f"in flight {driver.in_flight}",
            f"done {completed}",
            f"failed {failed}",
        ]
        if driver.first_tokens:
            parts.append(f"p50 first token {statistics.median(driver.first_tokens):.2f} s")
        if self._watch.samples:
            sample = self._watch.samples[-1]
            states = ", ".join(f"{n} {state}" for state, n in sorted(sample.states.items()))
            parts += [states or "no instances", f"${sample.usd_h:.2f}/h"]
        return "  ".join(parts)

    def _picture(self) -> Group:
        length_s = max(self._length_s, 1.0)
        bar = ProgressBar(total=length_s, completed=min(length_s, self._at_s()), width=60)
        return Group(bar, Text(self.line(), no_wrap=True, overflow="ellipsis"))

    def _at_s(self) -> float:
        return max(0.0, time.perf_counter() - self._driver.begun) if self._driver.begun else 0.0


# -- the command -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    d = Config()
    parser = Parser(
        prog="sim.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="Exit status: 0 all requests completed; 1 some failed, or something was left behind; "
        "2 it could not be run as asked; 130 interrupted.",
    )

    def add(flag: str, kind: type, metavar: str, default: object, text: str) -> None:
        shown = f"default {default:g}" if isinstance(default, int | float) else f"default {default}"
        parser.add_argument(flag, type=kind, metavar=metavar, help=f"{text} ({shown})")

    def switch(flag: str, text: str) -> None:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)

    add("--num-iterations", int, "N", d.num_iterations, "rounds")
    add("--round-s", float, "S", d.round_s, "seconds of a round")
    add("--base-num-users", int, "N", d.base_num_users, "users")
    add("--request-probability", float, "P", d.request_probability, "that a user sends a request in a round")
    local_schedule = ",".join(f"{m:g}" for m in LOCAL_SCHEDULE)
    add(
        "--load-schedule",
        str,
        "M,M,…",
        f"1; with --local {local_schedule}",
        "users over equal slices, times N",
    )
    switch("--streaming", "have answers streamed (default)")
    switch("--manage", "have the autoscaler manage the fleet or not, for the run (default: as it is)")
    add("--model", str, "NAME", d.model, f"profile: {', '.join(PROFILES)}")
    add("--prompt-tokens", float, "N", d.prompt_tokens, "mean length of prompts")
    add("--max-tokens", float, "N", d.max_tokens, "mean length of answers")
    add("--seed", int, "N", "random, and printed", "everything is drawn from")
    add("--loadbalancer", str, "URL", d.loadbalancer, "who gives leases")
    add("--autoscaler", str, "URL", d.autoscaler, "who knows costs and states")
    add("--state-dir", Path, "DIR", "~/.local/state/autoscaler-py/fleet", "holds the control key")
    add("--client-key-file", Path, "FILE", "none", "a key of the loadbalancer's clients, mode 0600")
    add("--wait-s", float, "S", d.wait_s, "how long /route may hold a request")
    add("--request-timeout-s", float, "S", d.request_timeout_s, "for a request, all tries together")
    add(
        "--trace",
        Path,
        "FILE",
        "none",
        "send the requests of a log instead, at its times (simulation/traces/logs.py)",
    )
    add("--json", Path, "FILE", "none", "write the report there")
    parser.add_argument("--local", action="store_true", help="start everything on this machine, and end it")
    add("--engine", str, "NAME", d.engine, f"with --local: what answers, {' or '.join(ENGINES)}")
    add("--instances", int, "N", "4, vllm 2", "with --local: stopped instances prepared first")
    add("--speedup", float, "K", d.speedup, "with --local: the cloud's times, not real vLLM's, are divided")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the report")
    parser.add_argument(
        "--virtual", action="store_true", help="in virtual time: has flags of its own, --virtual --help"
    )
    return parser


_ONLY_LOCAL = ("engine", "instances", "speedup")
_NOT_LOCAL = ("loadbalancer", "autoscaler", "client_key_file")


def parse(argv: Sequence[str]) -> Config:
    """The flags as a Config; raises ConfigError."""
    given = {k: v for k, v in vars(_parser().parse_args(argv)).items() if v is not None and k != "virtual"}
    local = given["local"]
    for name in _NOT_LOCAL if local else _ONLY_LOCAL:
        if name in given:
            raise ConfigError(f"--{name.replace('_', '-')} goes {'not' if local else 'only'} with --local")
    for name in ("loadbalancer", "autoscaler"):
        if name in given:
            given[name] = server_url(f"--{name}", given[name])
    if "load_schedule" in given:
        given["load_schedule"] = parse_schedule(given["load_schedule"])
    if local:
        given = _local_defaults(given.get("engine", "paced")) | given
    given.setdefault("seed", secrets.randbelow(2**32))
    return Config(**given, needs_autoscaler="autoscaler" in given).checked()


def _local_defaults(engine: str) -> dict[str, Any]:
    """What a run on that engine of a local cloud is like; raises ConfigError."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: wanted {' or '.join(ENGINES)}")
    kind = ENGINES[engine]
    return {"model": kind.model, "instances": kind.instances, **LOCAL_DEFAULTS[engine]}


def _client_key(config: Config) -> str | None:
    """The key that the loadbalancer wants of its clients, if one was given."""
    return None if config.client_key_file is None else _key(config.client_key_file)


def _control_key(config: Config) -> str | None:
    """The key that autoscaler and loadbalancer share, if it lies where they keep it."""
    if config.state_dir is not None:
        return (
            None if config.local and not config.state_dir.exists() else _key(config.state_dir / "control.key")
        )
    usual = default_state_dir("fleet") / "control.key"
    return _key(usual) if usual.exists() else None


def _key(path: Path) -> str:
    """A key in the file; raises ConfigError when it cannot be read, or others can read it."""
    return min(load_keys(path))


def carry_out(config: Config, engine: str | None = None) -> dict[str, Any]:
    """The report of the run, on an event loop of its own. The first Ctrl-C or SIGTERM ends it early."""
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
            return await run(config, stop, engine)
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


def carry_out_locally(config: Config) -> tuple[dict[str, Any], bool]:
    """Start everything, run, end everything: the report, and whether nothing was left behind."""
    wanted = StackConfig(
        engine=config.engine,
        model=config.model,
        instances=config.instances,
        speedup=config.speedup,
        seed=config.seed,
        state_dir=config.state_dir,
    )
    say: Callable[[str], None] = (lambda _: None) if config.quiet else _say
    stack = LocalStack(wanted, say=say)
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
            print(report.table(found), flush=True)
            say("taking everything down")
    except BaseException:
        # Also when it shall be quiet: somebody must end it.
        if config.quiet and stack.taken_down is not None and stack.taken_down.left_behind:
            _say(f"left behind: {', '.join(stack.taken_down.left_behind)}")
        raise
    end = stack.stop()
    found["local_stack"] = {"restarts": dict(end.restarts), "left_behind": list(end.left_behind)}
    if end.restarts:
        print("died and started again: " + ", ".join(f"{name} {n}" for name, n in end.restarts.items()))
    print(f"left behind: {', '.join(end.left_behind) or 'nothing'}")
    return found, not end.left_behind


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the flags say; the exit status. Raises ConfigError, ChildFailed and KeyboardInterrupt."""
    argv = sys.argv[1:] if argv is None else argv
    if "--virtual" in argv:
        return command.main(argv)
    config = parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if not config.quiet:
        _say(f"seed {config.seed}")
    clean = True
    if config.local:
        found, clean = carry_out_locally(config)
    else:
        found = carry_out(config)
        print(report.table(found))
    if config.json is not None:
        try:
            config.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as e:
            raise ConfigError(f"--json {config.json} cannot be written: {e.strerror}") from e
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
