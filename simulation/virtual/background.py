"""What the loadbalancer does by itself in virtual time (dispatch/outside/background.py): ask and tell.

It asks instances for tokens and load reports, takes the autoscaler's hot set and tells it the usage.
"""

from dispatch.load_reports import SWEEP
from fleet.demand import Report
from fleet.outside.turns import Autoscaler
from fleet.states import State
from loadbalancer import LoadBalancer
from simulation.virtual.instances import SimulatedInstances
from simulation.virtual.loop import EventLoop
from simulation.virtual.setting import Setting
from simulation.virtual.users import Users
from web.messages.hot_set import HotInstance, HotSet, HotTiming


class VirtualBackground:
    """The loadbalancer's rounds, and what passes between it and the autoscaler."""

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
        """Make a round, and go on every beat_s."""
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
        """Take the autoscaler's hot set when it has changed."""
        fleet, now = self._scaler.instances, self._loop.now
        if fleet.hot_version == self._told_version or not fleet.knows_hot_set():
            return
        self._told_version = fleet.hot_version
        profile = self._setting.profile
        hot = HotSet(
            epoch="sim",
            version=fleet.hot_version,
            model=profile.name,
            prefill_weight=profile.prefill_weight,
            expected_output_tokens=profile.expected_output_tokens,
            expected_hot_s=fleet.expected_hot_s(now),
            instances=tuple(
                HotInstance(
                    id=i.id or 0,
                    state="draining" if i.state is State.DRAINING else "hot",
                    address=i.address or "",
                    auth_url=i.auth_url or "",
                    master_token="",
                    throughput_work_s=i.throughput_work_s,
                    capacity_work=profile.throughput_on(i.gpu_name, i.num_gpus) * profile.hold_s,
                    timing=HotTiming.of(self._setting.timing(i.gpu_name, i.num_gpus)),
                )
                for i in fleet.serving()
            ),
        )
        self._balancer.update_hot_set(hot, now)
        self._refill()
        self._users.grant()

    def report_usage(self) -> None:
        """Tell the autoscaler what loadbalancer_server tells it each second; it is read once a turn."""
        usage = self._balancer.usage(self._loop.now)
        report = Report(
            loadbalancer="sim",
            hot_epoch="sim",
            hot_version=self._told_version if self._told_version >= 0 else None,
            busy=usage.busy,
            demand=usage.demand,
            held=usage.held,
            arrivals=usage.arrivals,
            arrived_work=usage.arrived_work,
            unfinished={i: u.unfinished for i, u in usage.instances.items()},
            working_s={i: u.working_s for i, u in usage.instances.items()},
            failures={i: u.failures for i, u in usage.instances.items()},
            held_work=usage.held_work,
            arrived_prompt_tokens=usage.arrived_prompt_tokens,
            arrived_output_tokens=usage.arrived_output_tokens,
            in_flight=usage.in_flight,
            late=usage.late,
            held_prompt_tokens=usage.held_prompt_tokens,
            oldest_wait_s=usage.oldest_wait_s,
            turned_late=usage.turned_late,
            kv_tokens=self._instances.kv_tokens_used(),
            slo=self._setting.slo,
            late_bound_s=self._setting.late_bound_s,
        )
        self._scaler.record_report(report, {i: u.throughput_work_s for i, u in usage.instances.items()})
