"""One live run: check the servers, send the requests, look at the fleet, ask for the costs, report."""

import asyncio
import contextlib
import gc
import json
import ssl
import time
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp

from engine.profiles import get_profile
from fleet_client import AsyncFleetTransport
from fleet_client.loopback import is_loopback_url
from fleet_client.network_trust import allow
from fleet_client.own_tls import TrustedServer
from fleet_client.private_files import default_state_dir, load_keys
from process.errors import ConfigError
from simulation import report
from simulation.live.config import SimConfig
from simulation.live.operator import NoAnswer, Operator, ask_again, bearer
from simulation.live.progress import FleetSampler, ProgressView, say
from simulation.live.users import Driver
from simulation.live.workload import Arrival, plan
from simulation.traces.reading import read
from simulation.traces.request import ReadNotes

SETTLE_S = 1.5
"""Seconds from the end of the run to asking for costs: the loadbalancer reports each second which worked."""

ANSWER_S = 15.0
"""Seconds for which an autoscaler that does not answer is asked again: it may be starting anew."""

START_S = 20.0
"""Seconds for which a server that does not answer yet is asked again: it may have been started just now."""

MOST_TRACED = 100_000
"""Most requests of a log that a live run sends: each is planned before the run begins."""

LOCALCLOUD_STATUS = "http://127.0.0.1:8500/localcloud/status"
"""Where a local cloud says which engine it has, unless its port was set."""


async def run(config: SimConfig, stop: asyncio.Event, engine: str | None) -> dict[str, Any]:
    """Carry out a live run and return its report; it ends early, with what there is, when stop is set.

    engine: what answers, where it is known; None finds out. Raises ConfigError when it cannot be run.
    """
    notes = ReadNotes()
    arrivals = plan(config) if config.trace is None else _traced(config.trace, config, notes)
    control_key = _control_key(config)
    allow(config.in_the_clear(), trust_network=config.trust_network)
    trusted = _Trusted(config)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        client_key = None if config.client_key_file is None else _key(config.client_key_file)
        operator = Operator(session, config.autoscaler, config.loadbalancer, control_key, trusted)
        await _check_loadbalancer(session, client_key, operator, config, trusted)
        managed = await _check_autoscaler(operator, config)
        try:
            found = await _measure(config, arrivals, stop, engine, operator, client_key)
            found["settings"]["trace_read_as"] = "; ".join(notes.lines) or None
            return found
        finally:
            if config.manage is not None and managed is not None and managed != config.manage:
                await _manage_as_before(operator, managed)


class _Trusted:
    """The certificates that the autoscaler and the loadbalancer may show, by URL."""

    def __init__(self, config: SimConfig) -> None:
        self._autoscaler = config.autoscaler
        self._of_autoscaler = TrustedServer("--autoscaler-cert", config.autoscaler_cert)
        self._of_loadbalancer = TrustedServer("--loadbalancer-cert", config.loadbalancer_cert)

    def __call__(self, url: str) -> ssl.SSLContext | bool:
        ours = url == self._autoscaler or url.startswith(f"{self._autoscaler}/")
        return (self._of_autoscaler if ours else self._of_loadbalancer).context() or True


def _traced(path: Path, config: SimConfig, notes: ReadNotes) -> list[Arrival]:
    """Return the requests of a log, cut to the model's context; raise ConfigError for a wrong or long one."""
    longest = get_profile(config.model).max_model_len
    arrivals = []
    for number, request in enumerate(read(path, notes, config.time_unit)):
        if number == MOST_TRACED:
            raise ConfigError(f"--trace {path}: over {MOST_TRACED:,} requests: --virtual plays such a log")
        output = min(request.output_tokens, longest - 1)
        prompt = min(request.prompt_tokens, longest - output)
        arrivals.append(Arrival(number, request.at_s, prompt, output))
    return arrivals


async def _measure(
    config: SimConfig,
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
        trust_network=config.trust_network,
        loadbalancer_cert=config.loadbalancer_cert,
    )
    driver = Driver(config, transport)
    sampler = FleetSampler(operator, lambda: time.perf_counter() - driver.begun)
    length_s = config.num_iterations * config.round_s if config.trace is None else arrivals[-1].at_s
    view = ProgressView(driver, sampler, len(arrivals), length_s, config.quiet)
    gc.collect()
    gc.freeze()  # the plan stays: collections need not look at it, which would delay what is due
    try:
        took = await _send(driver, arrivals, stop, transport, (sampler.run(), view.run()))
    finally:
        gc.unfreeze()
    await asyncio.sleep(0.0 if took.interrupted else SETTLE_S)
    costs, why = None, None
    try:
        costs = await ask_again(
            lambda: operator.costs(took.started_at, took.started_at + took.duration_s), ANSWER_S
        )
    except NoAnswer as e:
        why = str(e)
    fleet = None
    with contextlib.suppress(NoAnswer):  # an older autoscaler keeps no history
        fleet = await operator.history(took.started_at, took.started_at + took.duration_s)
    engine = engine or await _find_engine(driver.seen_addresses)
    about = report.RunInfo(
        engine=engine,
        local=engine.startswith("local cloud"),
        model=config.model,
        seed=config.seed,
        streaming=config.streaming,
        started_at=took.started_at,
        duration_s=took.duration_s,
        interrupted=took.interrupted,
        settings=_settings(config),
        cpu_share=took.cpu_share,
        ends_untold=transport.untold,
    )
    itl = driver.between_tokens.spread()
    return report.build(about, driver.records, sampler.samples, costs, why, fleet=fleet, itl=itl)


@dataclass(frozen=True)
class _Sending:
    """When requests were sent (epoch seconds), for how long, and the share of a core that this took."""

    started_at: float
    duration_s: float
    cpu_share: float
    interrupted: bool


async def _send(
    driver: Driver,
    arrivals: Sequence[Arrival],
    stop: asyncio.Event,
    transport: AsyncFleetTransport,
    jobs: Sequence[Coroutine[Any, Any, NoReturn]],
) -> _Sending:
    """Send the requests until all are answered or stop is set, beside the jobs; close the transport."""
    started_at, used = time.time(), time.process_time()
    begun = time.perf_counter()
    sending = asyncio.create_task(driver.run(arrivals))
    background: list[asyncio.Task[None]] = [asyncio.create_task(job) for job in jobs]
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
    if not interrupted:
        sending.result()
    return _Sending(started_at, duration_s, cpu_share, interrupted)


async def _manage_as_before(operator: Operator, managed: bool) -> None:
    """Set the autoscaler's manage flag back to what it was before the run.

    When that fails, say so and go on, since the report is worth having all the same.
    """
    try:
        await ask_again(lambda: operator.manage(managed), ANSWER_S)
    except NoAnswer as e:
        say(f"--{'manage' if managed else 'no-manage'}, as it was before, could not be set again: {e}")


async def _check_loadbalancer(
    session: aiohttp.ClientSession,
    client_key: str | None,
    operator: Operator,
    config: SimConfig,
    trusted: "_Trusted",
) -> None:
    """Raise ConfigError unless the loadbalancer answers, takes our key, and serves the model of the run."""
    try:
        status = await ask_again(lambda: _end_no_lease(session, client_key, config, trusted), START_S)
    except NoAnswer:
        raise ConfigError(
            f"the loadbalancer {config.loadbalancer} does not answer, for {START_S:.0f} s"
        ) from None
    if status in (401, 403):
        raise ConfigError(f"the loadbalancer {config.loadbalancer} wants a client key: --client-key-file")
    if status != 200:
        raise ConfigError(f"{config.loadbalancer} is no loadbalancer: POST /done answered {status}")
    with contextlib.suppress(NoAnswer):  # its status is for operators, and we may be none
        served = (await operator.status()).get("model")
        if served and served != config.model:
            raise ConfigError(f"--model {config.model}: the loadbalancer serves {served}")


async def _end_no_lease(
    session: aiohttp.ClientSession, client_key: str | None, config: SimConfig, trusted: "_Trusted"
) -> int:
    """Return the loadbalancer's status for the end of a lease that was never given: 200 if all is well.

    The call changes nothing. Raises NoAnswer, or ConfigError where TLS fails, which no waiting mends.
    """
    body = {"request_id": "sim-asks-who-is-there", "outcome": "unused"}
    timeout = aiohttp.ClientTimeout(total=5.0)
    try:
        async with session.post(
            f"{config.loadbalancer}/done",
            json=body,
            headers=bearer(client_key),
            timeout=timeout,
            allow_redirects=False,
            ssl=trusted(config.loadbalancer),
        ) as reply:
            return reply.status
    except aiohttp.ClientSSLError as e:
        raise ConfigError(
            f"the loadbalancer {config.loadbalancer} cannot be spoken to under TLS: {e}"
        ) from None
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise NoAnswer(f"{config.loadbalancer}/done: {e or type(e).__name__}") from None


async def _check_autoscaler(operator: Operator, config: SimConfig) -> bool | None:
    """Return the autoscaler's manage flag as it was, and set it as the run wants it.

    Return None if the autoscaler does not answer; raise ConfigError if the run needs it.
    """
    needed = config.needs_autoscaler or config.manage is not None
    try:
        _, managed = await ask_again(operator.instances, START_S if needed else 0.0)
        if config.manage is not None:
            await operator.manage(config.manage)
    except NoAnswer as e:
        if needed:
            raise ConfigError(f"the autoscaler does not answer: {e}") from None
        return None
    return managed


async def _find_engine(addresses: Collection[str]) -> str:
    """Return the name of the engine that answered, told by its addresses.

    On loopback it can only be a local cloud's, which is asked.
    """
    if not addresses:
        return "unknown engine: no instance was asked"
    if not all(is_loopback_url(address) for address in addresses):
        return "vLLM on rented machines"
    async with aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        try:
            async with session.get(LOCALCLOUD_STATUS) as reply:
                said = json.loads(await reply.read())
            return f"local cloud, {said['engine']} engine"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return "local cloud, unknown engine"


def _settings(config: SimConfig) -> dict[str, Any]:
    """Return the settings of the run as the report shows them."""
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


def _control_key(config: SimConfig) -> str | None:
    """Return the key that autoscaler and loadbalancer share, from their state directory, or None."""
    if config.state_dir is not None:
        missing = config.local and not config.state_dir.exists()
        return None if missing else _key(config.state_dir / "control.key")
    usual = default_state_dir("fleet") / "control.key"
    return _key(usual) if usual.exists() else None


def _key(path: Path) -> str:
    """Return one key of a key file; raise ConfigError when it cannot be read, or others can read it."""
    return min(load_keys(path))
