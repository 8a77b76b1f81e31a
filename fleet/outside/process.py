"""The autoscaler as a process: configuration, state directory, keys, ledger and threads."""

import asyncio
import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec

from autoscaler import InstanceSet
from engine.profiles import Profile, get_profile
from engine.timing import PROFILE_MODELS, Timing, timing_for
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.health_check import HealthCheckOrder
from fleet.hot_set import make_hot_set
from fleet.limits import Limits
from fleet.outside.config import AutoscalerConfig, local_cloud_key
from fleet.outside.health_checker import HealthChecker
from fleet.outside.keys import FleetKeys
from fleet.outside.ledger import Ledger
from fleet.outside.performer import Performer
from fleet.outside.replay_process import ReplayProcess
from fleet.outside.ssh_log import SshLog
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from fleet_client import private_files
from instance_client import InstanceClient
from policies import Policy
from process.clock import steady_clock
from process.errors import CloudError, ConfigError
from vast.cli import Cli
from vast.client import Vast
from vast.settings import VastSettings, find_api_key
from web.messages.hot_set import HotSet

log = logging.getLogger("autoscaler")


HOT_PUSH_S = 0.25
"""How long a loadbalancer does not know of a changed hot set, at most; a passed check is told at once."""

CHECK_TICK_S = 0.25
"""How often it is looked which health checks are due, if nobody says that one is."""

MIN_TURN_S = 1.0
"""Between two listings, at least."""


def hot_set(scaler: Autoscaler, profile: Profile, master_token: Callable[[str], str]) -> HotSet | None:
    """Return what a loadbalancer must know, or None while the fleet is not known yet. Secrets are in it."""
    now = scaler.clock()
    with scaler.lock:
        if not scaler.instances.knows_hot_set():
            return None
        serving = [replace(i) for i in scaler.instances.serving()]
        version, expected_hot_s = scaler.instances.hot_version, scaler.instances.expected_hot_s(now)

    def timing(gpu_name: str, num_gpus: int) -> Timing | None:
        return timing_for(profile.name, gpu_name, num_gpus) if profile.name in PROFILE_MODELS else None

    return make_hot_set(serving, scaler.epoch, version, expected_hot_s, profile, master_token, timing)


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
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
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
                    async with session.put(
                        f"{url}/hot", data=msgspec.json.encode(answer), allow_redirects=False
                    ) as reply:
                        if reply.status == 200:
                            told = answer.version
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
