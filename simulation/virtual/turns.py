"""The autoscaler's turns, health checks and commands in virtual time, and what the cloud does to machines.

How long things take: a command as long as a call of the vastai CLI, a health check as long as ssh and a
short prompt. A machine that is ready before the listing showed it makes the autoscaler look sooner.
"""

from fleet.commands import Create
from fleet.evidence import Health
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from loadbalancer import LoadBalancer
from localcloud.effects import Boot, End, Freeze, Kill
from simulation.virtual.background import VirtualBackground
from simulation.virtual.cloud import SimulatedCloud, told_of
from simulation.virtual.instances import SimulatedInstance, SimulatedInstances
from simulation.virtual.loop import EventLoop
from simulation.virtual.outcome import FleetSamples
from simulation.virtual.setting import CALL_S, Setting
from web.messages.reports import ReadyBody

MIN_TURN_S = 1.0
"""Least seconds between two turns, also when an instance has become ready and asks for one."""

CREATE_GAP_S = 4.5
"""Seconds between two creates (vast-contract 1.3)."""

CREDIT_USD = 1e12
"""Credit of the account, dollars: as much as there is."""

CHECK_S = 0.3
"""Seconds that a health check takes: an ssh handshake and a short prompt."""


class VirtualTurns:
    """Takes the autoscaler's turns in virtual time: it lists the cloud, decides, and sends commands."""

    def __init__(
        self,
        setting: Setting,
        loop: EventLoop,
        scaler: Autoscaler,
        tuner: Tuner,
        balancer: LoadBalancer,
        cloud: SimulatedCloud,
        instances: SimulatedInstances,
        background: VirtualBackground,
    ) -> None:
        self.samples = FleetSamples()
        self._setting = setting
        self._loop = loop
        self._scaler = scaler
        self._tuner = tuner
        self._balancer = balancer
        self._cloud = cloud
        self._instances = instances
        self._background = background
        self._begun_at = float("inf")
        self._tune_at = float("inf")
        self._turn_number = 0
        self._turned_at = 0.0
        self._checking: set[str] = set()
        self._command_due = False
        self._last_create = float("-inf")
        self._cloud_due = float("inf")

    def begin(self, begun_at: float, tune_at: float) -> None:
        """Keep samples of the fleet from begun_at on, when the trace begins; tune from tune_at on."""
        self._begun_at = begun_at
        self._tune_at = tune_at

    # -- turns --

    def turn_at(self, at: float) -> None:
        """Let the autoscaler take its next turn at that time instead of the planned one."""
        self._turn_number += 1
        self._loop.at(at, self._turn, self._turn_number)

    def _turn(self, number: int) -> None:
        if number != self._turn_number:
            return
        s, scaler = self._setting, self._scaler
        now = self._turned_at = self._loop.now
        self.advance_cloud()
        self._cloud.draw_hazards(now, s.turn_s)
        self._background.report_usage()
        if now >= self._tune_at:
            self._tune_at = now + s.replay_every_s
            self._tuner.tune()
        scaler.record_reach(Health.WELL)
        scaler.instances.note_credit(CREDIT_USD, now)  # an account that is asked each turn
        scaler.turn()
        self._balancer.expect_hot(scaler.instances.expected_hot_s(now), now)
        self._check()
        self._background.take_hot_set()
        self._plan_command()
        if now >= self._begun_at:
            latest = scaler.history.latest
            noted = latest if latest is not None and latest.at_s == now else None
            self.samples.look(now - self._begun_at, scaler.instances, scaler.demand.demand, noted)
        self.turn_at(now + s.turn_s)

    def _check(self) -> None:
        for order in self._scaler.checks_due(self._checking):
            self._checking.add(order.label)
            self._loop.at(self._loop.now + CHECK_S, self._checked, (order, self._loop.now))

    def _checked(self, which: tuple[HealthCheckOrder, float]) -> None:
        order, started_at = which
        self._checking.discard(order.label)
        instance = self._instances.answering(order.id)
        if instance is None:
            check = HealthCheck(order.label, started_at, Verdict.FAILED, "does not answer")
        elif not instance.ready:
            check = HealthCheck(
                order.label, started_at, Verdict.LOADING, "the ready line is not in its log yet"
            )
        else:
            at_hand = self._instances.requests_at(instance)
            check = HealthCheck(order.label, started_at, Verdict.PASSED, "test prompt: 1 token(s)", at_hand)
        self._scaler.judge(check)
        self._background.take_hot_set()

    # -- commands --

    def _plan_command(self) -> None:
        if not self._command_due and self._scaler.orders.first() is not None:
            self._command_due = True
            self._loop.at(self._loop.now + CALL_S, self._perform)

    def _perform(self) -> None:
        now = self._loop.now
        if isinstance(self._scaler.orders.first(), Create):
            if now - self._last_create < CREATE_GAP_S:
                self._loop.at(self._last_create + CREATE_GAP_S, self._perform)
                return
            self._last_create = now
        self._command_due = False
        self._scaler.perform_next()
        self.advance_cloud()
        self._plan_command()

    # -- machines --

    def advance_cloud(self) -> None:
        """Carry out what the cloud has done to machines by now, and schedule the cloud's next event."""
        now = self._loop.now
        for effect in self._cloud.advance(now):
            if isinstance(effect, Boot):
                self._boot(effect)
            elif isinstance(effect, End):
                self._instances.end(effect.id)
            elif isinstance(effect, Kill):
                self._instances.end(effect.id)
                self._cloud.crashed(effect.id, now)
            elif isinstance(effect, Freeze):
                self._instances.freeze(effect.id, effect.frozen)
        at = self._cloud.next_event(now)
        if at is not None and at < now + self._setting.turn_s:
            at = max(at, now + 1e-3)
            if at < self._cloud_due or self._cloud_due <= now:
                self._cloud_due = at
                self._loop.at(at, self.advance_cloud)

    def _boot(self, boot: Boot) -> None:
        timing = self._setting.timing(boot.machine.gpu_name, boot.machine.num_gpus, told_of(boot.machine))
        instance = self._instances.boot(boot.id, boot.boot, timing)
        self._cloud.booted(boot, self._loop.now)
        self._loop.at(self._loop.now + boot.load_s, self._ready, instance)

    def _ready(self, instance: SimulatedInstance) -> None:
        """Mark an instance's model as loaded, and let the instance report this to the autoscaler."""
        if not instance.up:
            return
        instance.become_ready()
        scaler = self._scaler
        for i in scaler.instances:
            if i.id == instance.id:
                scaler.record_message(i.label, ReadyBody("ready", instance.boot_id, 1))
                self._check()
                break
        if scaler.turn_due.is_set():  # the listing that we have is older than the machine
            scaler.turn_due.clear()
            self.turn_at(max(self._loop.now + CALL_S, self._turned_at + MIN_TURN_S))
