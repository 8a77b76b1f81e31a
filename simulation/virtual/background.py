"""The loadbalancer's background tasks in virtual time (really: dispatch/outside/background.py).

It asks instances for tokens and load reports, takes the autoscaler's hot set and tells it the usage.
"""

import msgspec

from dispatch.load_reports import SWEEP
from fleet.hot_set import make_hot_set
from fleet.outside.turns import Autoscaler
from loadbalancer import LoadBalancer
from simulation.virtual.instances import SimulatedInstances
from simulation.virtual.loop import EventLoop
from simulation.virtual.setting import Setting
from simulation.virtual.users import Users


class VirtualBackground:
    """The loadbalancer's regular rounds in virtual time, and its messages to and from the autoscaler."""

    def __init__(
        self,
        setting: Setting,
        loop: EventLoop,
        balancer: LoadBalancer,
        scaler: Autoscaler,
        instances: SimulatedInstances,
        users: Users,
    ) -> None:
        self._setting = setting
        self._loop = loop
        self._balancer = balancer
        self._scaler = scaler
        self._instances = instances
        self._users = users
        self._told_version = -1

    def beat(self) -> None:
        """Make one round of the loadbalancer's background work (tokens, load, expiry); plan the next."""
        balancer, now = self._balancer, self._loop.now
        balancer.tick(now)
        self._refill()
        for _ in range(min(SWEEP, len(self._instances))):  # each looks at a tenth, at least at one
            for poll in balancer.polls(now):
                instance = self._instances.answering(poll.instance_id)
                load = None if instance is None else self._instances.load(instance)
                balancer.complete_poll(poll, load, now)
        self._users.grant()
        self._loop.at(now + self._setting.beat_s, self.beat)

    def _refill(self) -> None:
        balancer, now = self._balancer, self._loop.now
        for refill in balancer.refills(now):
            instance = self._instances.answering(refill.instance_id)
            batch = None if instance is None else self._instances.new_tokens(instance, refill.count)
            balancer.complete_refill(refill, batch, now)

    def take_hot_set(self) -> None:
        """Give the loadbalancer the autoscaler's hot set when it has changed."""
        fleet, now = self._scaler.instances, self._loop.now
        if fleet.hot_version == self._told_version or not fleet.knows_hot_set():
            return
        self._told_version = fleet.hot_version
        hot = make_hot_set(
            fleet.serving(),
            "sim",
            fleet.hot_version,
            fleet.expected_hot_s(now),
            self._setting.profile,
            lambda _: "",
            lambda i: self._setting.timing(i.gpu_name, i.num_gpus, i.gpu_told),
        )
        self._balancer.update_hot_set(hot, now)
        self._refill()
        self._users.grant()

    def report_usage(self) -> None:
        """Give the autoscaler the loadbalancer's usage, really reported every second; here once a turn."""
        report = self._balancer.usage(self._loop.now, "sim")
        traffic = msgspec.structs.replace(report.traffic, kv_tokens=self._instances.kv_tokens_used())
        self._scaler.record_report(msgspec.structs.replace(report, traffic=traffic))
