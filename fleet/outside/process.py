"""The autoscaler as a process: configuration, state directory, keys, ledger and threads."""

import asyncio
import fcntl
import logging
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from autoscaler import InstanceSet
from engine.profiles import Profile, get_profile
from engine.timing import told_timing
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.health_check import HealthCheckOrder
from fleet.limits import Limits
from fleet.outside.health_checker import HealthChecker
from fleet.outside.keys import FleetKeys
from fleet.outside.ledger import Ledger
from fleet.outside.performer import Performer
from fleet.outside.replay_process import ReplayProcess
from fleet.outside.ssh_log import SshLog
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from fleet_client import private_files
from fleet_client.flags import within
from instance_client import InstanceClient
from policies import POLICIES, Policy, make_policy, parse_params
from process.clock import steady_clock
from process.errors import CloudError, ConfigError
from vast.cli import Cli
from vast.client import Vast
from vast.settings import VastSettings, find_api_key

log = logging.getLogger("autoscaler")


HOT_PUSH_S = 0.25
"""How long a loadbalancer does not know of a changed hot set, at most; a passed check is told at once."""

CHECK_TICK_S = 0.25
"""How often it is looked which health checks are due, if nobody says that one is."""

MIN_TURN_S = 1.0
"""Between two listings, at least."""


@dataclass(frozen=True)
class AutoscalerConfig:
    """Everything an operator may set. Times in seconds, money in dollars per hour."""

    model: str = "vllm-13"
    label: str = "fleet"  # instances are labelled <label>/<random>; nothing else is ever touched
    state_dir: Path | None = None  # keys, ledger, vastai configuration; default below ~/.local/state
    host: str = "127.0.0.1"
    port: int = 8100
    loadbalancer: tuple[str, ...] = ("http://127.0.0.1:8200",)
    manage: bool = True
    policy: str = "objective"
    policy_params: tuple[str, ...] = ()
    goal: float | None = None  # short for the policy that keeps it: the share of requests served in time
    replay_every_s: float = (
        1800.0  # from one replay of the last day to the next, which sets the level; 0: none
    )
    max_instances: int = 8  # hard limit, stopped ones counted
    max_dollars_per_hour: float = 10.0  # hard limit on what all orders together may cost
    poll_interval_s: float = 5.0  # one listing each; the CLI costs 0.5 s of processor a call
    check_hot_every_s: float = 15.0
    check_boot_every_s: float = 5.0
    check_timeout_s: float = 15.0  # for a whole health check, ssh and prompt together
    local: bool = False  # a localcloud instead of Vast.ai
    cloud_url: str = "http://127.0.0.1:8500"  # of the localcloud
    speedup: float = 1.0  # deadlines and policy times are divided by it; local cloud only
    operator_key_file: Path | None = None
    public_url: str | None = None  # of this server, as instances reach it: then they say when they are ready

    def make_policy(self) -> Policy:
        """The policy with its parameters; raises ConfigError."""
        params = parse_params("--policy-param", self.policy_params)
        if self.goal is None:
            return make_policy(POLICIES, self.policy, params, self.speedup)
        if "goal" in params:
            raise ConfigError("--goal and --policy-param goal=…: wanted one of them")
        return make_policy(POLICIES, "objective", params | {"goal": self.goal}, self.speedup)

    @property
    def ready_url(self) -> str | None:
        """Where an instance says that it is ready, if it can reach us at all."""
        if self.public_url is None and self.local:
            return f"http://127.0.0.1:{self.port}/ready"
        return None if self.public_url is None else f"{self.public_url}/ready"

    def checked(self) -> "AutoscalerConfig":
        """Itself, or ConfigError naming the flag, the value and the range."""
        within("--port", self.port, 1, 65535)
        within("--max-instances", self.max_instances, 1, 10_000)
        within("--max-dollars-per-hour", self.max_dollars_per_hour, 0.0, 100_000.0)
        within("--poll-interval-s", self.poll_interval_s, 0.5, 600.0)
        within("--check-hot-every-s", self.check_hot_every_s, 0.5, 3600.0)
        within("--check-boot-every-s", self.check_boot_every_s, 0.5, 600.0)
        within("--check-timeout-s", self.check_timeout_s, 1.0, 300.0)
        within("--replay-every-s", self.replay_every_s, 0.0, 86_400.0)
        within("--speedup", self.speedup, 1.0, 10_000.0)
        if self.speedup != 1.0 and not self.local:
            raise ConfigError("--speedup is for --local only: real machines take their time")
        # Narrower than what the cloud allows, so that a label is one word in every message and command.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", self.label):
            raise ConfigError(f"--label {self.label!r}: wanted 1 to 64 of A-Z a-z 0-9 _ . -, first no . or -")
        for url in self.loadbalancer:
            if not _is_base_url(url):
                raise ConfigError(f"--loadbalancer {url!r}: wanted http://HOST:PORT")
        if self.public_url is not None and not _is_base_url(self.public_url):
            raise ConfigError(f"--public-url {self.public_url!r}: wanted http://HOST:PORT")
        return self


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and not (parts.path or parts.query or parts.fragment or parts.username)


def local_cloud_key(environ: Mapping[str, str], home: Path) -> str:
    """The key of the localcloud; ConfigError if there is none. Never the operator's Vast.ai key."""
    if key := environ.get("LOCALCLOUD_API_KEY", "").strip():
        return key
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    path = state / "autoscaler-py" / "localcloud" / "api.key"
    if not path.exists():
        raise ConfigError(
            f"no key of the local cloud in {path}: `python -m localcloud` makes it when it starts; "
            "for one with another --root set LOCALCLOUD_API_KEY"
        )
    keys = private_files.load_keys(path)
    if len(keys) != 1:
        raise ConfigError(f"key file {path}: wanted one key, got {len(keys)}")
    return next(iter(keys))


def hot_set(
    scaler: Autoscaler, profile: Profile, master_token: Callable[[str], str]
) -> dict[str, Any] | None:
    """What a loadbalancer must know, or None while the fleet is not known yet. Secrets are in it."""
    now = scaler.clock()
    with scaler.lock:
        if not scaler.instances.knows_hot_set():
            return None
        serving = [replace(i) for i in scaler.instances.serving()]
        version, expected = scaler.instances.hot_version, scaler.instances.expected_hot_s(now)
    return {
        "epoch": scaler.epoch,
        "version": version,
        "model": profile.name,
        "prefill_weight": profile.prefill_weight,
        "expected_output_tokens": profile.expected_output_tokens,
        "expected_hot_s": expected,
        "instances": [
            {
                "id": i.id,
                "state": str(i.state),
                "address": i.address,
                "auth_url": i.auth_url,
                "certificate": i.certificate,
                "master_token": master_token(i.label),
                "throughput_work_s": i.throughput_work_s,
                "capacity_work": profile.throughput_on(i.gpu_name, i.num_gpus) * profile.hold_s,
                "timing": told_timing(profile.name, i.gpu_name, i.num_gpus),
            }
            for i in serving
        ],
    }


# --- outside world ---------------------------------------------------------------------------------


class Wakeup:
    """Wakes those of one event loop who wait for it. Ring it in that loop."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._waiting: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """All who wait go on."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Until it rings, or for so long."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait((future,), timeout=timeout_s)
        finally:
            self._waiting.discard(future)


class AutoscalerProcess:
    """One autoscaler process: its state directory (locked), its keys, its ledger and its threads."""

    def __init__(
        self,
        config: AutoscalerConfig,
        *,
        told_nobody: bool = False,
        policy: Policy | None = None,
        replay: Sequence[str] = (),
    ) -> None:
        """Open everything; raises ConfigError when something an operator must mend is wrong.

        replay: the command that replays the last day for the tuner; without one no level is set.
        """
        self.config = config.checked()
        self.profile = get_profile(config.model)
        self.state_dir = config.state_dir or private_files.default_state_dir(config.label)
        private_files.make_private_dir(self.state_dir)
        self._lock_file = _only_one(self.state_dir / "autoscaler.lock")
        self.keys = FleetKeys(self.state_dir)
        find_key = local_cloud_key if config.local else find_api_key
        settings = VastSettings(
            url=config.cloud_url if config.local else None,
            api_key=find_key(os.environ, Path.home()),
            local=config.local,
            state_dir=self.state_dir,
            speedup=config.speedup,
        )
        self.vast = Vast(Cli(settings))
        try:
            self.ledger = Ledger(self.state_dir / "ledger.sqlite")
        except (sqlite3.Error, OSError) as e:
            raise ConfigError(f"{self.state_dir / 'ledger.sqlite'} cannot be used: {e}") from e
        clock = steady_clock()
        demand = Demand(secrets.token_hex(8), told_nobody=told_nobody, began=clock())
        fleet = InstanceSet(
            config.label,
            self.profile,
            Limits(config.max_instances, config.max_dollars_per_hour),
            Deadlines.for_profile(self.profile, config.speedup),
            config.speedup,
            config.check_hot_every_s,
            config.check_boot_every_s,
            manage=config.manage,
        )
        self.scaler = Autoscaler(
            fleet,
            policy or config.make_policy(),
            demand,
            self.vast,
            Performer(self.vast, self.profile, self.keys.master_token, config.ready_url),
            self.ledger,
            clock,
        )
        self.tuner = Tuner(
            self.scaler, self.state_dir, ReplayProcess(replay), config.replay_every_s if replay else 0.0
        )
        self.check_wakeup, self.push_wakeup = Wakeup(), Wakeup()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def check_account(self) -> None:
        """The key works and the account has our ssh key; raises ConfigError."""
        try:
            self.vast.check_key()
            self.vast.register_ssh_key(self.keys.ssh_public_key)
        except CloudError as e:
            raise ConfigError(f"the cloud cannot be used: {e}") from e

    def start(self) -> None:
        """Start the turn thread, the one that sends orders and the one that tunes the policy."""
        for target in (self._run_turns, self._run_orders, self.tuner.run):
            thread = threading.Thread(target=target, name=target.__qualname__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop ordering. What was begun and not sent is in the ledger: the next process goes on from it."""
        self._stop.set()
        self.scaler.turn_due.set()
        self.scaler.stop_performing()
        self.tuner.stop()
        for thread in self._threads:
            thread.join(timeout=30.0)
        try:
            self.scaler.write_counts()
        except sqlite3.Error:
            log.exception("the arrivals of the last seconds are lost")

    def start_health_checks(self) -> None:
        """Make them on a thread of their own until `stop`, where there is no server's loop for them."""

        async def until_stopped() -> None:
            while not self._stop.is_set():
                task = asyncio.create_task(self.run_health_checks())
                while not self._stop.is_set() and not task.done():
                    await asyncio.sleep(0.1)
                task.cancel()
                (error,) = await asyncio.gather(task, return_exceptions=True)
                if not self._stop.is_set():
                    log.error("health checks failed, they start again", exc_info=error)
                    await asyncio.sleep(1.0)

        thread = threading.Thread(target=lambda: asyncio.run(until_stopped()), name="health", daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Let go of the ledger and the state directory."""
        self.ledger.close()
        os.close(self._lock_file)

    def _run_turns(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self.scaler.turn()
            except Exception as e:  # the loop must live: what it does not do now it does next turn
                self.scaler.note_failed_turn(e)
                log.exception("a turn failed")
            # An instance that speaks up before the listing showed it makes us look, but not without a pause.
            self._stop.wait(min(MIN_TURN_S, self.config.poll_interval_s))
            self.scaler.turn_due.wait(max(0.0, self.config.poll_interval_s - (time.monotonic() - begun)))
            self.scaler.turn_due.clear()

    def _run_orders(self) -> None:
        while True:
            try:
                if not self.scaler.perform_next():
                    return
            except Exception:
                log.exception("an order failed; the listing will show what became of it")

    async def run_health_checks(self) -> None:
        """Make the checks that are due, all at once; never returns."""
        async with InstanceClient() as client:
            checker = HealthChecker(
                client,
                SshLog(self.keys.ssh_key, self.ledger.remember_host_key),
                self.keys.master_token,
                self.profile.name,
                self.config.check_timeout_s,
                self.scaler.clock,
            )
            running: dict[str, asyncio.Task[None]] = {}

            async def one(order: HealthCheckOrder) -> None:
                try:
                    check = await checker.check(order)
                    await asyncio.get_running_loop().run_in_executor(None, self.scaler.judge, check)
                except sqlite3.Error:
                    log.exception("what a health check changed is not written down yet")
                finally:
                    del running[order.label]
                    self.check_wakeup.wake()
                    self.push_wakeup.wake()

            try:
                while True:
                    # One at a time of each: a machine that hangs would gather more and more of them.
                    for order in self.scaler.checks_due(running.keys()):
                        running[order.label] = asyncio.create_task(one(order))
                    await self.check_wakeup.wait(CHECK_TICK_S)
            finally:
                tasks = list(running.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def run_hot_push(self) -> None:
        """Tell the loadbalancers of a changed hot set at once; they also ask by themselves."""
        key = private_files.load_or_make_key(self.state_dir / "control.key")
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=3.0),
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        ) as session:
            await asyncio.gather(*(self._push_hot(session, url) for url in self.config.loadbalancer))

    async def _push_hot(self, session: aiohttp.ClientSession, url: str) -> None:
        told: int | None = None
        complaint: str | None = None
        while True:
            answer = None
            if told != self.scaler.instances.hot_version:
                answer = hot_set(self.scaler, self.profile, self.keys.master_token)
            if answer is not None:
                trouble: str | None = None
                try:
                    async with session.put(f"{url}/hot", json=answer, allow_redirects=False) as reply:
                        if reply.status == 200:
                            told = answer["version"]
                        else:
                            trouble = f"refused the hot set: {reply.status}"
                except (aiohttp.ClientError, TimeoutError, OSError) as e:
                    trouble = f"is not there: {type(e).__name__}"
                if trouble is not None and trouble != complaint:
                    log.warning("loadbalancer %s %s; it will ask when it can", url, trouble)
                complaint = trouble
            await self.push_wakeup.wait(HOT_PUSH_S)


def _only_one(path: Path) -> int:
    """Hold the lock of a state directory; two autoscalers on one fleet would undo each other's orders."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(f"another autoscaler runs on {path.parent}: stop it first") from None
    return fd
