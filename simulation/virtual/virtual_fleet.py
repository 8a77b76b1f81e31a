"""A whole fleet in virtual time: the real autoscaler and loadbalancer, simulated machines, a trace of users.

    trace ──► Users ──► LoadBalancer ──► SimulatedInstances ──► first token, end ──► Users
                            ▲   reports, pushes ──┘
                            │ hot set     │ usage                             (VirtualBackground)
                            └─ Autoscaler ┘ ── commands ──► SimulatedCloud ── boots, ends ──► instances
                                                                              (VirtualTurns)

`Autoscaler`, `InstanceSet`, `LoadBalancer`, `Demand` and `Ledger` are the objects that run in production,
unchanged; what is simulated is what they talk to. loop.py has the clock, audit.py what is true after every
run.
"""

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from autoscaler import InstanceSet
from fleet.commands import Command, Performed
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.outside.ledger import Ledger
from fleet.outside.tuner import NoCurve, Tuner
from fleet.outside.turns import Autoscaler
from fleet.replay import LEAST_S
from fleet.states import State
from loadbalancer import LoadBalancer
from policies import Fixed, Policy
from process.errors import ConfigError
from simulation.traces.request import Request
from simulation.virtual import replay
from simulation.virtual.audit import audit
from simulation.virtual.background import VirtualBackground
from simulation.virtual.cloud import SimulatedCloud, times_for
from simulation.virtual.instances import SimulatedInstances
from simulation.virtual.loop import EventLoop
from simulation.virtual.outcome import Outcome
from simulation.virtual.setting import Setting
from simulation.virtual.turns import VirtualTurns
from simulation.virtual.users import Users
from vast.rows import Row

PREPARE_S = 86_400.0
"""Longest seconds of virtual time to prepare the pool before the trace begins."""


class _Listing:
    """The simulated cloud as the autoscaler lists it: the part of `Vast` that the autoscaler uses."""

    def __init__(self, cloud: SimulatedCloud) -> None:
        self._cloud = cloud

    def list_instances(self, label_prefix: str | None = None) -> list[Row]:  # noqa: ARG002 all are ours
        return self._cloud.rows()


class _Performer:
    """Takes the autoscaler's commands to the simulated cloud; the simulation decides when they arrive."""

    def __init__(self, cloud: SimulatedCloud, loop: EventLoop) -> None:
        self._cloud = cloud
        self._loop = loop

    def perform(self, command: Command) -> Performed:
        return self._cloud.perform(command, self._loop.now)


class _ReplayInProcess:
    """Runs a replay, which tunes the policy, as a plain call; virtual time stands still meanwhile."""

    def run(self, request: bytes) -> bytes:
        return json.dumps(replay.answer(json.loads(request))).encode()

    def stop(self) -> None:
        """Do nothing, since no replay can be under way."""


class VirtualFleet:
    """One run of a fleet in virtual time: call `prepare`, `play` and `finish` once each, or `run` for all."""

    def __init__(
        self, setting: Setting, policy: Policy, requests: Iterable[Request], directory: Path
    ) -> None:
        """Build the whole run and start nothing. directory: an empty one, for the ledger."""
        rng = random.Random(setting.seed)
        profile = setting.profile
        self.loop = loop = EventLoop()
        self._setting = setting
        self._policy = policy
        self._requests = requests
        self._cloud = SimulatedCloud(
            setting.machines,
            profile,
            random.Random(rng.getrandbits(64)),
            times=setting.times or times_for(profile),
            speedup=setting.speedup,
            realism=setting.realism,
        )
        self._ledger = Ledger(directory / "ledger.sqlite")
        labels = count(1)
        self._scaler = Autoscaler(
            InstanceSet(
                "sim",
                profile,
                setting.limits,
                Deadlines.for_profile(profile, setting.speedup),
                speedup=setting.speedup,
            ),
            policy,
            Demand("sim", memory_s=max(3600.0, policy.memory_s)),
            _Listing(self._cloud),  # type: ignore[arg-type]
            _Performer(self._cloud, loop),  # type: ignore[arg-type]
            self._ledger,
            clock=lambda: loop.now,
            new_label=lambda: f"{next(labels):06d}",
        )
        self._balancer = LoadBalancer(
            random.Random(rng.getrandbits(64)),
            request_id=lambda token: token,
            max_held=100_000,
            slo=setting.slo,
            late_bound_s=setting.late_bound_s,
        )
        self._tuner = Tuner(self._scaler, directory, _ReplayInProcess(), setting.replay_every_s)
        self.instances = SimulatedInstances(loop, self._balancer)
        self._users = Users(
            setting,
            setting.context or self._longest_request(),
            loop,
            self._balancer,
            self.instances,
            random.Random(rng.getrandbits(64)),
        )
        self.instances.serve(self._users)
        self._background = VirtualBackground(
            setting, loop, self._balancer, self._scaler, self.instances, self._users
        )
        self._turns = VirtualTurns(
            setting,
            loop,
            self._scaler,
            self._tuner,
            self._balancer,
            self._cloud,
            self.instances,
            self._background,
        )
        self._begun_at = 0.0

    def _longest_request(self) -> int:
        """Return the most tokens of a request that every suitable machine of the market can hold."""
        setting = self._setting
        offers = self._cloud.offers(0.0)
        if not offers:
            raise ConfigError(f"no offer of the market suits {setting.profile.name}: nothing can be rented")
        return min(setting.timing_of(o).kv_tokens for o in offers)

    def run(self) -> Outcome:
        """Prepare the pool, play the trace, wait for the last answer; return the results."""
        self.prepare()
        self.play()
        return self.finish()

    def prepare(self) -> None:
        """Load the model on the pool's instances, with as many hot as the trace begins with.

        Costs count from the end of this.
        """
        s = self._setting
        total = max(s.pool, s.hot)
        self._scaler.set_policy(Fixed(s.hot, total))
        self._turns.turn_at(0.0)
        self.loop.at(0.0, self._background.beat)
        while not self._prepared(s.hot, total):
            if self.loop.now > PREPARE_S / max(s.speedup, 1.0) + 3600.0:
                raise ConfigError(
                    f"the pool of {total} could not be prepared: the market or the limits have no room for it"
                )
            self.loop.step(self.instances.play)
        self._scaler.set_policy(self._policy)
        self._scaler.clamps.clear()
        self._cloud.begin_hazards(s.hazards)
        now = self.loop.now
        self._begun_at = now + s.lead_in_s
        self._turns.begin(self._begun_at, now + LEAST_S if s.replay_every_s > 0.0 else float("inf"))

    def _prepared(self, hot: int, total: int) -> bool:
        instances = self._scaler.instances
        states = Counter(i.state for i in instances)
        return (
            sum(i.loaded for i in instances) >= total
            and states[State.HOT] == hot == self._balancer.instances.hot
            and states[State.HOT] + states[State.COLD] >= total
        )

    def play(self) -> None:
        """Let the requests of the trace arrive at their times, until the last of them has ended."""
        users, step, play = self._users, self.loop.step, self.instances.play
        users.play(self._requests, self._begun_at)
        while not users.idle:
            step(play)

    def finish(self) -> Outcome:
        """Return the results of the run; raise NotConserved when it lost or doubled something."""
        self._turns.advance_cloud()
        s, now, begun, scaler, ledger = (
            self._setting,
            self.loop.now,
            self._begun_at,
            self._scaler,
            self._ledger,
        )
        from_s, to_s = begun + s.score_from_s, min(now, begun + s.score_to_s)
        scaler.write_counts()
        curve = None
        with suppress(NoCurve):
            curve = self._tuner.curve()
        outcome = Outcome(
            **vars(self._users.figures),
            duration_s=min(now - begun, s.score_to_s) - s.score_from_s,
            costs=ledger.costs(from_s, to_s),
            took=ledger.durations(from_s, to_s),
            over_time=self._turns.samples.over_time(self._users.outcomes, now - begun),
            clamped=Counter({str(what): n for what, n in sorted(scaler.clamps.items())}),
            audit=audit(self._users, self.instances, self._cloud, ledger, s.turn_s, now),
            policy=scaler.policy,
            curve=curve,
        )
        ledger.close()
        return outcome


def simulate(setting: Setting, policy: Policy, requests: Iterable[Request]) -> Outcome:
    """Play the trace against a fleet under that policy; deterministic for the setting's seed."""
    with tempfile.TemporaryDirectory(prefix="virtual-fleet-", dir=_fast_directory()) as directory:
        return VirtualFleet(setting, policy, requests, Path(directory)).run()


def _fast_directory() -> str | None:
    """Return a directory in memory where there is one, because a run's ledger is read only once."""
    shm = Path("/dev/shm")  # noqa: S108 a directory of our own is made in it
    with suppress(OSError):
        if shm.is_dir():
            return str(shm)
    return None
