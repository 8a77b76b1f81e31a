"""The autoscaler as a process: state directory, keys, ledger and threads."""

import contextlib
import fcntl
import logging
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autoscaler import InstanceSet
from engine.profiles import get_profile
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.limits import Limits
from fleet.outside.account_watch import AccountWatch
from fleet.outside.alarm_watch import AlarmWatch
from fleet.outside.beforehand import beforehand_of
from fleet.outside.beforehand_watch import BeforehandWatch
from fleet.outside.config import AutoscalerConfig, vast_settings
from fleet.outside.engine_log import EngineLog
from fleet.outside.health_checker import HealthChecker
from fleet.outside.health_rounds import HealthRounds
from fleet.outside.hot_set_push import HotSetPush, current_hot_set
from fleet.outside.keys import FleetKeys
from fleet.outside.ledger import Ledger
from fleet.outside.market_view import MarketView
from fleet.outside.notifier import Postbox, senders
from fleet.outside.operator_acts import OperatorActs
from fleet.outside.own_health import keep_alive
from fleet.outside.performer import Performer
from fleet.outside.reasons import OwnReasons
from fleet.outside.replay_process import ReplayProcess
from fleet.outside.ssh_log import SshLog
from fleet.outside.standing import MANAGE, POLICY
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from fleet.outside.what_if_runs import WhatIfRuns
from fleet.probe_prompts import long_prompt
from fleet_client import private_files
from fleet_client.own_tls import TrustedServer
from instance_client import InstanceClient
from policies import Policy
from process.clock import STEP_S, StepDetector, boot_id, steady_clock, wall_offset
from process.errors import CloudError, ConfigError
from vast.billing import Billing
from vast.cli import Cli
from vast.client import Vast

log = logging.getLogger("autoscaler")

MIN_TURN_S = 1.0
"""Least seconds between two listings."""


# --- outside world ---------------------------------------------------------------------------------


class AutoscalerProcess:
    """One autoscaler process: its state directory (locked), its keys, its ledger and its threads."""

    def __init__(
        self,
        config: AutoscalerConfig,
        *,
        no_balancers: bool = False,
        policy: Policy | None = None,
        replay: Sequence[str] = (),
        virtual: Sequence[str] = (),
    ) -> None:
        """Open state directory, keys and ledger; raise ConfigError for what an operator must put right.

        no_balancers: the hot set is told to no loadbalancer. replay: the command that replays the last day;
        without it the policy's level is not tuned. virtual: the command of a run in virtual time, for an
        operator who asks what if.
        """
        self.config = config.checked()
        self.profile = get_profile(config.model)
        self.state_dir = config.state_dir or private_files.default_state_dir(config.label)
        private_files.make_private_dir(self.state_dir)
        self._lock_file = only_one(self.state_dir / "autoscaler.lock")
        self.keys = FleetKeys(self.state_dir)
        self.control_key = private_files.load_or_make_key(self.state_dir / "control.key")
        self.vast = Vast(cli := Cli(vast_settings(config, self.state_dir, os.environ, Path.home())))
        try:
            self.ledger = Ledger(self.state_dir / "ledger.sqlite")
        except (sqlite3.Error, OSError) as e:
            raise ConfigError(f"{self.state_dir / 'ledger.sqlite'} cannot be used: {e}") from e
        clock = _clock(self.ledger)
        self.scaler = scaler = Autoscaler(
            self._instances(),
            policy or config.make_policy(),
            Demand(secrets.token_hex(8), no_balancers=no_balancers, began=clock()),
            self.vast,
            performer := self._performer(),
            self.ledger,
            clock,
        )
        self.tuner = Tuner(
            scaler, self.state_dir, ReplayProcess(replay), config.replay_every_s if replay else 0.0
        )
        self._ssh = SshLog(self.keys.ssh_key, scaler.remember_host_key)
        self.acts = self._operator_acts(performer, virtual)
        self.hot_push = HotSetPush(
            lambda: scaler.instances.hot_version,
            lambda: current_hot_set(scaler, self.keys.master_token),
            config.loadbalancer,
            self.control_key,
            TrustedServer("--loadbalancer-cert", config.loadbalancer_cert),
            lambda name, url: scaler.own.note_contact(name, scaler.clock(), url),
            lambda name: scaler.own.reports(name, scaler.clock()),
        )
        self.health_rounds = HealthRounds(
            scaler, self._checker, self.hot_push.wakeup.wake, config.reach_places
        )
        self._alarms = self._alarm_watch()
        self._steps = StepDetector()
        self._account = AccountWatch(scaler, self.vast, Billing(cli), performer.perform)
        self._beforehand = BeforehandWatch(scaler, beforehand_of(config, self.profile, cli))
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def _instances(self) -> InstanceSet:
        config = self.config
        return InstanceSet(
            config.label,
            self.profile,
            Limits(
                config.max_instances,
                config.max_dollars_per_hour,
                budget_usd_day=config.budget_usd_day,
                budget_usd_month=config.budget_usd_month,
                min_credit_hours=config.min_credit_hours,
            ),
            Deadlines.for_profile(self.profile, config.speedup),
            config.speedup,
            config.check_hot_every_s,
            config.check_boot_every_s,
            manage=config.manage,
            preferences=config.preferences,
        )

    def _performer(self) -> Performer:
        config, keys = self.config, self.keys
        return Performer(
            self.vast,
            self.profile,
            keys.master_token,
            config.ready_url,
            config.offer_query(self.profile),
            keys.ssh_public_key,
            config.login(),
        )

    def _operator_acts(self, performer: Performer, virtual: Sequence[str]) -> OperatorActs:
        """Return what can be done by hand, after taking over what the last process was told."""
        acts = OperatorActs.of(
            self.scaler,
            self.state_dir / "audit.jsonl",
            {MANAGE: str(self.config.manage), POLICY: self.config.said_policy},
            self.tuner,
            engine_log=EngineLog(self.scaler, self._ssh),
            market=MarketView(self.scaler, performer.perform),
            what_if=WhatIfRuns(self.scaler, virtual) if virtual else None,
        )
        acts.take_over()
        return acts

    def _checker(self, client: InstanceClient) -> HealthChecker:
        return HealthChecker(
            client,
            self._ssh,
            self.keys.master_token,
            self.profile.name,
            self.config.check_timeout_s,
            self.scaler.clock,
            long_prompt=long_prompt(self.profile.max_model_len),
            chats=self.profile.chats,
            pooling=self.profile.pooling,
        )

    def _alarm_watch(self) -> AlarmWatch | None:
        """Return what tells people when something is wrong; None where nobody is to be told."""
        config = self.config
        if not (urls := config.notify_urls):
            return None
        return AlarmWatch(
            self.scaler,
            OwnReasons(self.scaler, config.poll_interval_s),
            [Postbox(name, send) for name, send in senders(urls, config.label)],
            config.notify_every_s,
            len(config.loadbalancer),
        )

    def check_account(self) -> None:
        """Make sure that the cloud's key works and the account has our ssh key; raise ConfigError if not."""
        try:
            self.vast.check_key()
            self.vast.register_ssh_key(self.keys.ssh_public_key)
        except CloudError as e:
            raise ConfigError(f"the cloud cannot be used: {e}") from e

    def check_beforehand(self) -> list[str]:
        """Ask hub and registry for model and image; return what they refuse. Creates are held meanwhile."""
        return self._beforehand.look()

    def start(self) -> None:
        """Start the threads: one takes turns, one sends orders, one tunes the policy, others tell people."""
        self._start(self._run_turns)
        self._start(self._run_orders)
        self._start(self._watch_account)
        self._start(self._watch_beforehand)
        self._start(self.tuner.run)
        if self._alarms is not None:
            self._alarms.start()
            self._start(self._watch_alarms)

    def start_health_checks(self) -> None:
        """Make health checks on a thread of their own until `stop`, in a process without a server."""
        self._start(lambda: self.health_rounds.run_until(self._stopped))

    def _start(self, target: Callable[[], None]) -> None:
        name = target.__qualname__
        own, clock = self.scaler.own, self.scaler.clock
        thread = threading.Thread(
            target=lambda: keep_alive(target, name, own, clock, self._stopped), name=name, daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        """Stop the threads. Orders begun and not sent are in the ledger: the next process goes on from it."""
        self._stopped.set()
        self.scaler.turn_due.set()
        self.scaler.stop_performing()
        self.tuner.stop()
        if self.acts.what_if is not None:
            self.acts.what_if.stop()
        for thread in self._threads:
            thread.join(timeout=30.0)
        if self._alarms is not None:
            self._alarms.end()
        try:
            self.scaler.write_counts()
        except Exception as e:  # noqa: BLE001 it is told
            self.scaler.own.complain("the arrivals of the last seconds are lost", e, self.scaler.clock())

    def close(self) -> None:
        """Close the ledger and unlock the state directory."""
        self.ledger.close()
        os.close(self._lock_file)

    def _watch_beforehand(self) -> None:
        self._beforehand.run(self._stopped)

    def _watch_account(self) -> None:
        self._account.run(self._stopped)

    def _watch_alarms(self) -> None:
        if self._alarms is not None:
            self._alarms.run(self._stopped)

    def _run_turns(self) -> None:
        while not self._stopped.is_set():
            begun = time.monotonic()
            try:
                self.scaler.turn()
            except Exception as e:  # noqa: BLE001 the loop must live: what it does not do now it does next turn
                self.scaler.note_failed_turn(e)
                self.scaler.own.complain("a turn failed", e, self.scaler.clock())
            self._look_at_ourselves()
            # An instance that reports before the listing shows it makes a turn due, but not without a pause.
            self._stopped.wait(min(MIN_TURN_S, self.config.poll_interval_s))
            self.scaler.turn_due.wait(max(0.0, self.config.poll_interval_s - (time.monotonic() - begun)))
            self.scaler.turn_due.clear()

    def _look_at_ourselves(self) -> None:
        """Notice a wall clock that was set, and what is over that a person asked."""
        self.acts.by_hand.remember()
        now = self.scaler.clock()
        by_s = self._steps.step_s()
        if by_s:
            log.warning("the clock of this computer was set by %+.0f s; nothing here follows it", by_s)
            self.scaler.own.note_step(by_s, now)
            with contextlib.suppress(sqlite3.Error):
                self.ledger.add_clock_step(now, by_s)

    def _run_orders(self) -> None:
        while True:
            try:
                if not self.scaler.perform_next():
                    return
            except Exception:
                log.exception("an order failed; the listing will show what became of it")


def _clock(ledger: Ledger) -> Callable[[], float]:
    """Return the clock of this process, which goes on from the last one's, however the wall clock was set.

    After a start of the machine the wall clock is all there is.
    """
    boot = boot_id()
    try:
        known = boot is not None and ledger.noted("boot_id") == boot
        offset = float(ledger.noted("clock_offset") or "nan") if known else wall_offset()
        if not math.isfinite(offset):
            offset = wall_offset()
        ledger.note({"boot_id": boot, "clock_offset": repr(offset)})
        clock = steady_clock(offset)
        changed = ledger.mend(clock())
    except (sqlite3.Error, ValueError) as e:
        log.warning("the ledger says nothing of the clock: %s", e)
        return steady_clock()
    if changed:
        log.warning("%d intervals of the ledger were put right: the clock had been set meanwhile", changed)
    if abs(offset - wall_offset()) >= STEP_S:
        log.warning("the clock was set while this ledger's fleet ran: its own time goes on")
    return clock


def only_one(path: Path) -> int:
    """Lock a state directory and return the lock's file; raise ConfigError if another autoscaler has it.

    Two autoscalers on one fleet would undo each other's orders. ConfigError, too, where it cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ConfigError(f"{path} cannot be used: {e.strerror}") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(f"another autoscaler runs on {path.parent}: stop it first") from None
    return fd
