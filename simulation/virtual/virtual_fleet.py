"""A whole fleet in virtual time: the real autoscaler and loadbalancer, simulated machines, a trace of users.

    trace ──► users ──► LoadBalancer ──► instances (Engines) ──► first token, end
                            ▲   reports, pushes ──┘
                            │ hot set     │ usage
                            └─ Autoscaler ┘ ── orders ──► SimulatedCloud ── boots, ends ──► instances

`Autoscaler`, `InstanceSet`, `LoadBalancer`, `Demand` and `Ledger` are the objects that run in production,
unchanged; what is simulated is what they talk to. Time is a heap of (time, counter, what): what is due at the
same time happens in the order it was scheduled. What happens inside the model servers is not in it: they go
on by themselves until somebody has ended (engines.py), for of the rest nobody is told. The next arrival is
read from the trace when the one before has happened, and figures are kept as digests, so memory does not grow
with the length of the trace.

How long things take beside the model servers: an order takes as long as the vastai CLI, a health check as
long as ssh and a short prompt, an instance tells of ends as soon as remote/speaker.py does.

True after every run (`audit`):
- every request that arrived has ended, once, and was never in two places;
- each token that a model server made belongs to a request that it was given;
- the dollars in the ledger are those that the cloud charged, but for what passed between two listings.
"""

import heapq
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from autoscaler import InstanceSet
from dispatch.types import Ask, HotInstance, HotSet, Lease, Push, Waiter
from engine.model_servers import Engines
from engine.profiles import Profile
from engine.slo import Slo
from engine.timing import Timing, timing_for
from fleet.commands import Command, Create, Performed
from fleet.demand import Demand, Report
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.journal import Costs
from fleet.outside.ledger import Ledger
from fleet.outside.tuner import LEAST_S, NoCurve, Tuner
from fleet.outside.turns import Autoscaler
from fleet.states import Deadlines, Limits, State
from loadbalancer import SWEEP, LoadBalancer
from localcloud.account import Boot, End, Freeze, Kill, Moved, Times
from localcloud.market import Machine
from policies import Fixed, Policy
from process.errors import ConfigError
from simulation.figures import Digest
from simulation.report import FAILED, LATE, SLOW, Sample
from simulation.traces.logs import Request
from simulation.virtual import replay
from simulation.virtual.cloud import Hazards, SimulatedCloud, times_for
from vast.rows import Row

TURN_S = 5.0
"""Between two turns: autoscaler_server's --poll-interval-s."""

MIN_TURN_S = 1.0
"""An instance that is ready before the listing showed it makes the autoscaler look, after such a pause."""

BEAT_S = 1.0
"""Between two rounds of the loadbalancer's own work: tokens, load reports, expiry."""

GRANT_S = (0.02, 0.1)
"""Between two looks whether time alone has made room for somebody who is held: the first, doubling up to the
second while it has not. Whatever else makes room is looked at when it happens."""

CALL_S, CREATE_GAP_S = 0.5, 4.5
"""What the vastai CLI takes for a call, and between two creates (vast-contract 1.3)."""

CHECK_S = 0.3
"""What a health check takes: an ssh handshake and a short prompt."""

PUSH_S = 0.02
"""From an end to its report: the tick of remote/speaker.py."""

STALL_S = 30.0
"""An answer from which nothing comes for so long is broken off by the client (simulation/live/users.py)."""

RETRY_S = (0.5, 5.0)
"""A client's pause before its second and later tries: the first doubles up to the second."""

TOKEN_LIFE_S = 600.0

SAMPLES = 4096
"""Looks at the fleet that are kept; when there are more, every other is dropped."""

PREPARE_S = 86_400.0
"""So long the pool may take to be prepared before the trace begins."""


@dataclass(frozen=True)
class Setting:
    """All that a run depends on, beside the trace and the policy. Times in seconds.

    pool, hot: loaded instances, and hot ones, that are there when the trace begins. score_from_s, score_to_s:
    only what arrives and is spent between counts, measured from the first arrival. context: the longest
    request, prompt and answer; longer prompts are cut, and counted. timings: constants that replace or add
    to those of engine/reference.py. late_bound_s: None for one line, first come first served. tells_length:
    users say how long their answer will be (as sim.py's do), or not at all, so that the loadbalancer
    expects the mean.
    """

    profile: Profile
    machines: Sequence[Machine]
    limits: Limits = field(default_factory=lambda: Limits(max_instances=200, max_usd_h=1e6))
    slo: Slo = field(default_factory=Slo)
    times: Times | None = None
    hazards: Hazards = field(default_factory=Hazards)
    timings: Any = None
    speedup: float = 1.0
    late_bound_s: float | None = 300.0
    timeout_s: float = 600.0
    pool: int = 4
    hot: int = 1
    seed: int = 0
    score_from_s: float = 0.0
    score_to_s: float = float("inf")
    context: int | None = None
    replay_every_s: float = 1800.0
    tells_length: bool = False
    turn_s: float = TURN_S
    beat_s: float = BEAT_S


@dataclass
class Outcome:
    """What a run gave. Figures are of the scored window, counters of clamps and audit of the whole run."""

    duration_s: float
    requests: int
    completed: int
    failed: Counter[str]
    retried: int
    setbacks: Counter[str]
    refusals: Counter[str]
    cut: int
    prompt_tokens: int
    output_tokens: int
    missed: int
    missed_why: Counter[str]
    late: int
    first_token: Digest
    per_token: Digest
    whole: Digest
    route: Digest
    late_wait: Digest
    costs: Costs
    took: list[tuple[str, float, float]]
    samples: list[Sample]
    clamped: Counter[str]
    audit: dict[str, Any]
    policy: Policy
    curve: dict[str, Any] | None = None

    @property
    def missed_share(self) -> float:
        """Of the requests, how many did not keep the objective; those that failed are among them."""
        return self.missed / self.requests if self.requests else 0.0


class NotConserved(Exception):
    """A run lost or doubled a request, a token or a dollar: a mistake of ours."""


class Ended(NamedTuple):
    """The end of one request, as an instance tells it."""

    id: str
    status: str
    output_tokens: int


class LoadReport(NamedTuple):
    """What an instance answers a loadbalancer that polls it (dispatch.types.Load)."""

    boot_id: str
    seq: int
    started: Sequence[str]
    ended: Sequence[Ended]
    running: int
    waiting: int
    model_up: bool
    prompt_tokens_total: int
    generation_tokens_total: int
    started_bytes: Sequence[int] = ()


class _Flight:
    """One request of a user, until it has ended.

    place: where it is now. id: its lease's. row: its number among the requests of the engines, or 0.
    """

    __slots__ = (
        "ask",
        "at",
        "given_at",
        "id",
        "instance",
        "lease",
        "output",
        "pause_s",
        "place",
        "prompt",
        "row",
        "scored",
        "tries",
        "up_at",
        "was_late",
    )

    def __init__(self, at: float, prompt: int, output: int, ask: Ask, up_at: float, scored: bool) -> None:
        self.at = at
        self.prompt = prompt
        self.output = output
        self.ask = ask
        self.up_at = up_at
        self.scored = scored
        self.tries = 0
        self.pause_s = 0.0
        self.given_at = at
        self.id = ""
        self.row = 0
        self.lease: Lease | None = None
        self.instance: _Instance | None = None
        self.place = "asking"
        self.was_late = False


class _Instance:
    """A rental's processes: a model server, which requests are in it, and what it has not told yet."""

    __slots__ = (
        "after",
        "boot",
        "boot_id",
        "ended",
        "flights",
        "frozen",
        "heard",
        "id",
        "next_push_at",
        "number",
        "push_due",
        "ready",
        "seq",
        "server",
        "started",
        "up",
    )

    def __init__(self, id: int, boot: int, server: int) -> None:
        """server: its number among the engines."""
        self.id = id
        self.boot = boot
        self.boot_id = f"{id}-{boot}"
        self.server = server
        self.up = True
        self.ready = False
        self.frozen = False
        self.flights: dict[int, _Flight] = {}
        self.started: list[str] = []
        self.ended: list[Ended] = []
        self.seq = 0
        self.number = 0
        self.heard = 0
        self.push_due = False
        self.next_push_at = 0.0
        self.after = 0


class _NoVast:
    """What the autoscaler asks for listings."""

    def __init__(self, cloud: SimulatedCloud) -> None:
        self._cloud = cloud

    def list_instances(self, label_prefix: str | None = None) -> list[Row]:  # noqa: ARG002 all are ours
        return self._cloud.rows()


class _Performer:
    """What the autoscaler gives its orders to; the time at which they arrive is the simulation's."""

    def __init__(self, cloud: SimulatedCloud, clock: Callable[[], float]) -> None:
        self._cloud = cloud
        self._clock = clock

    def perform(self, command: Command) -> Performed:
        return self._cloud.perform(command, self._clock())


class _InProcess(Tuner):
    """The autoscaler's tuner, but that a replay is a call: virtual time stands still meanwhile."""

    def _replay(self, request: bytes) -> bytes:
        return json.dumps(replay.answer(json.loads(request))).encode()


class VirtualFleet:
    """One run. Build it, call `run` once."""

    def __init__(
        self, setting: Setting, policy: Policy, requests: Iterable[Request], directory: Path
    ) -> None:
        """directory: empty, for the ledger."""
        self.now = 0.0
        self.setting = setting
        self._rng = random.Random(setting.seed)
        profile = setting.profile
        self._heap: list[tuple[float, int, Callable[..., None], Any]] = []
        self._counter = count()
        self.cloud = SimulatedCloud(
            setting.machines,
            profile,
            random.Random(self._rng.getrandbits(64)),
            times=setting.times or times_for(profile),
            speedup=setting.speedup,
        )
        self.ledger = Ledger(directory / "ledger.sqlite")
        fleet = InstanceSet(
            "sim",
            profile,
            setting.limits,
            Deadlines.for_profile(profile, setting.speedup),
            speedup=setting.speedup,
        )
        labels = count(1)
        self.demand = Demand("sim", memory_s=max(3600.0, policy.memory_s))
        self.scaler = Autoscaler(
            fleet,
            policy,
            self.demand,
            _NoVast(self.cloud),  # type: ignore[arg-type]
            _Performer(self.cloud, lambda: self.now),  # type: ignore[arg-type]
            self.ledger,
            clock=lambda: self.now,
            new_label=lambda: f"{next(labels):06d}",
        )
        self.balancer = LoadBalancer(
            random.Random(self._rng.getrandbits(64)),
            request_id=lambda token: token,
            max_held=100_000,
            slo=setting.slo,
            late_bound_s=setting.late_bound_s,
        )
        self._policy = policy
        self._requests = iter(requests)
        self._context = setting.context or self._longest_request()
        self._engines = Engines()
        self._instances: dict[int, _Instance] = {}
        self._by_server: dict[int, _Instance] = {}
        self._lost_tokens = 0
        self._made_tokens = 0
        self._waiting: dict[Waiter, _Flight] = {}
        self._tune_at = float("inf")
        self.tuner = _InProcess(self.scaler, directory, (), setting.replay_every_s)
        self._flying = 0
        self._asking = 0
        self._tokens = count()
        self._grant_due = False
        self._grant_s = GRANT_S[0]
        self._granting = False
        self._turns = 0
        self._ended_machines = 0
        self._dearest_usd_h = 0.0
        self._turned_at = 0.0
        self._order_due = False
        self._cloud_due = float("inf")
        self._last_create = float("-inf")
        self._told_version = -1
        self._checking: set[str] = set()
        self._jitter = random.Random(self._rng.getrandbits(64))
        self._begun_at: float | None = None
        self._sample_every = 1
        self._looks = 0
        self._arrived = 0
        self._ended = 0
        self._delivered_tokens = 0
        self.out = Outcome(
            0.0, 0, 0, Counter(), 0, Counter(), Counter(), 0, 0, 0, 0, Counter(), 0,
            Digest(), Digest(), Digest(), Digest(), Digest(),
            Costs(0, 0, 0, 0, 0, 0, None, ()), [], [], Counter(), {}, policy,
        )  # fmt: skip

    def _longest_request(self) -> int:
        """What every machine of the market that suits the profile can hold."""
        offers = self.cloud._offers(0.0)
        if not offers:
            raise ConfigError(
                f"no offer of the market suits {self.setting.profile.name}: nothing can be rented"
            )
        return min(self._timing(o.gpu_name, o.num_gpus).kv_tokens for o in offers)

    def _timing(self, gpu_name: str, num_gpus: int) -> Timing:
        own = self.setting.timings
        if own is not None:
            return timing_for(self.setting.profile.name, gpu_name, num_gpus, own)
        return timing_for(self.setting.profile.name, gpu_name, num_gpus)

    # -- the loop --

    def run(self) -> Outcome:
        """Prepare the pool, play the trace, wait for the last answer; gives what came of it."""
        self._prepare()
        self._play()
        return self._finish()

    def _at(self, at: float, what: Callable[..., None], arg: Any = None) -> None:
        heapq.heappush(self._heap, (at, next(self._counter), what, arg))

    def _prepare(self) -> None:
        """The pool is loaded and as many are hot as the trace begins with; costs count from there."""
        s = self.setting
        total = max(s.pool, s.hot)
        self.scaler.set_policy(Fixed(s.hot, total))
        self._turn_at(0.0)
        self._at(0.0, self._beat)
        while not self._prepared(s.hot, total):
            if self.now > PREPARE_S / max(s.speedup, 1.0) + 3600.0:
                raise ConfigError(
                    f"the pool of {total} could not be prepared: the market or the limits have no room for it"
                )
            self._step()
        self.scaler.set_policy(self._policy)
        self.scaler.clamps.clear()
        self._tune_at = self.now + (LEAST_S if s.replay_every_s > 0.0 else float("inf"))
        self.cloud.hazards = s.hazards
        self._begun_at = self.now

    def _prepared(self, hot: int, total: int) -> bool:
        states = Counter(i.state for i in self.scaler.instances)
        loaded = sum(i.loaded for i in self.scaler.instances)
        return (
            loaded >= total
            and states[State.HOT] == hot == self.balancer.hot
            and (states[State.HOT] + states[State.COLD] >= total)
        )

    def _step(self, before: float = float("inf")) -> bool:
        """What happens next has happened; False when that is not before then."""
        heap = self._heap
        due = heap[0][0]
        # Whoever is held may be granted a lease by any change inside a model server, not by ends only.
        server, at, ended = self._engines.play(min(due, before), bool(self._waiting))
        if server:
            self.now = at
            self._happened(self._by_server[server], ended)
            return True
        if due >= before:
            return False
        self.now, _, what, arg = heapq.heappop(heap)
        if arg is None:
            what()
        else:
            what(arg)
        return True

    def _play(self) -> None:
        begun = self.now
        arrive, step = self._arrive, self._step
        for request in self._requests:
            due = begun + request.at_s
            while step(due):
                pass
            self.now = due
            arrive(request, due)
        if not self._arrived:
            raise ConfigError("the trace has no request")
        while self._asking or self._flying or self._waiting:
            step()

    # -- users --

    def _arrive(self, request: Request, now: float) -> None:
        _, prompt, output, _ = request
        if prompt + output > self._context:
            self.out.cut += 1
            output = min(output, self._context // 2)
            prompt = min(prompt, self._context - output)
        balancer = self.balancer
        s = self.setting
        told = output if s.tells_length else None
        ask = Ask(balancer.work_of(prompt, told), told, (), prompt)
        offset = request.at_s
        flight = _Flight(now, prompt, output, ask, now + s.timeout_s, s.score_from_s <= offset < s.score_to_s)
        self._arrived += 1
        self._asking += 1
        balancer.arrived(ask)
        self._ask(flight)

    def _ask(self, flight: _Flight) -> None:
        """Ask for a lease: it is given, or the request is held, or comes again later."""
        now = self.now
        balancer = self.balancer
        if self._waiting:
            self._grant()
        lease = balancer.route(flight.ask, now)
        if lease is not None:
            self._asking -= 1
            self._send(flight, lease)
            return
        waiter = balancer.hold(flight.ask, flight.up_at, now)
        if waiter is None:
            why, after_s = balancer.refuse(flight.ask, now)
            self._refused(flight, why, after_s)
            return
        self._asking -= 1
        flight.place = "held"
        self._waiting[waiter] = flight
        self._grant_soon()

    def _refused(self, flight: _Flight, why: str, after_s: float) -> None:
        if flight.scored:
            self.out.refusals[why] += 1
        after_s = min(after_s * self._jitter.uniform(1.0, 1.25), (flight.up_at - self.now) / 2)
        if after_s < 0.1:
            self._asking -= 1
            self._fails(flight, "no_capacity")
        else:
            self._at(self.now + after_s, self._ask, flight)

    def _send(self, flight: _Flight, lease: Lease) -> None:
        now = self.now
        flight.lease = lease
        flight.tries += 1
        flight.given_at = now
        instance = self._instances.get(lease.instance_id)
        flight.place = "sent"
        self._flying += 1
        if instance is None or not instance.ready or instance.frozen:
            if instance is not None and instance.frozen:
                flight.instance = instance
                self._at(now + STALL_S, self._stalled, flight)
                return
            self._set_back(flight, "not_started")
            return
        flight.instance = instance
        flight.id = lease.request_id
        instance.started.append(lease.request_id)
        instance.seq += 1
        flight.row, ended = self._engines.submit(instance.server, flight.prompt, flight.output, now)
        instance.flights[flight.row] = flight
        if ended:
            self._happened(instance, ended)
        elif self._waiting and len(instance.flights) == 1:  # admitted at once
            self._grant()

    def _set_back(self, flight: _Flight, why: str) -> None:
        """The instance failed it: the loadbalancer is told, and another is asked."""
        lease = flight.lease
        _must(flight.place == "sent" and lease is not None, "a request failed that was not on its way")
        if lease is None:
            return
        self._flying -= 1
        flight.instance = None
        flight.lease = None
        flight.row = 0
        self.balancer.done(lease.request_id, "failed", self.now)
        if flight.scored:
            self.out.setbacks[why] += 1
        again = self.now + flight.pause_s
        flight.place = "asking"
        if again >= flight.up_at:
            self._fails(flight, why)
            return
        flight.pause_s = min(max(2 * flight.pause_s, RETRY_S[0]), RETRY_S[1])
        avoid = (*flight.ask.avoid, lease.instance_id)[-16:]
        flight.ask = replace(flight.ask, avoid=avoid)
        self._asking += 1
        self._at(again, self._ask, flight)

    def _stalled(self, flight: _Flight) -> None:
        instance = flight.instance
        # One that was sent while it was frozen never arrived there, thawed or not.
        if flight.place == "sent" and instance is not None and (instance.frozen or not flight.row):
            if instance.flights.pop(flight.row, None) is not None:
                self._lost_tokens += flight.output
                self._engines.cancel(flight.row, instance.server, self.now)
            self._set_back(flight, "broken_off")

    def _fails(self, flight: _Flight, why: str) -> None:
        _must(flight.place in ("asking", "held"), f"a request was given up while it was {flight.place}")
        flight.place = "ended"
        self._ended += 1
        if flight.scored:
            out = self.out
            out.requests += 1
            out.failed[why] += 1
            out.missed += 1
            out.missed_why[FAILED] += 1
            out.retried += flight.tries > 1

    def _completes(self, flight: _Flight, first_at: float, at: float) -> None:
        if flight.place != "sent":
            raise NotConserved(f"a request completed that was {flight.place}")
        flight.place = "ended"
        self._flying -= 1
        self._ended += 1
        prompt, output = flight.prompt, flight.output
        self._delivered_tokens += output
        if not flight.scored:
            return
        out = self.out
        first_s = first_at - flight.at
        whole_s = at - flight.at
        out.requests += 1
        out.completed += 1
        out.retried += flight.tries > 1
        out.prompt_tokens += prompt
        out.output_tokens += output
        out.first_token.add(first_s)
        out.whole.add(whole_s)
        waited_s = flight.given_at - flight.at
        out.route.add(waited_s)
        if output > 1:
            out.per_token.add((whole_s - first_s) / (output - 1))
        slo = self.setting.slo
        if not slo.met(prompt, output, first_s, whole_s):
            out.missed += 1
            if first_s > slo.first_token_limit_s(prompt) + 1e-6:
                out.missed_why[LATE] += 1
                out.late_wait.add(waited_s)
            else:
                out.missed_why[SLOW] += 1
        out.late += flight.was_late

    # -- who is held --

    def _grant_soon(self) -> None:
        if not self._grant_due:
            self._grant_due = True
            self._at(self.now + self._grant_s, self._grant_again)

    def _grant_again(self) -> None:
        self._grant_due = False
        self._grant_s = min(GRANT_S[1], 2.0 * self._grant_s)
        self._grant()
        if self._waiting:
            self._grant_soon()

    def _grant(self) -> None:
        if not self._waiting or self._granting:
            return
        self._granting = (
            True  # what is sent may free room at once, and must not begin another round in this one
        )
        for waiter, lease in self.balancer.grant(self.now):
            self._grant_s = GRANT_S[0]
            flight = self._waiting.pop(waiter)
            flight.was_late = flight.was_late or waiter.late
            self._send(flight, lease)
        self._granting = False
        if len(self._waiting) > self.balancer.line.held:
            for waiter in [w for w in self._waiting if w.over]:
                self._fails(self._waiting.pop(waiter), "no_capacity")

    # -- instances --

    def _happened(self, instance: _Instance, ended: int) -> None:
        """Something changed in its model server: that request has ended, and others behind it; 0: none."""
        flights, engines, now = instance.flights, self._engines, self.now
        while ended:
            flight = flights.pop(ended)
            first_at, at, following = engines.after(ended)
            engines.release(ended)
            instance.ended.append(Ended(flight.id, "finished", flight.output))
            instance.seq += 1
            self._completes(flight, first_at, at)
            # The client says at once that it has its answer; the instance's report tells of its length.
            self.balancer.done(flight.id, "finished", now)
            if not instance.push_due:
                instance.push_due = True
                self._at(max(now + PUSH_S, instance.next_push_at), self._push, instance)
            ended = following
        if self._waiting:
            self._grant()

    def _push(self, instance: _Instance) -> None:
        instance.push_due = False
        if not instance.up or instance.frozen or not (instance.ended or instance.started):
            return
        instance.number += 1
        push = Push(
            instance.boot_id,
            instance.number,
            instance.after,
            instance.seq,
            False,
            instance.started,
            instance.ended,
            True,
        )
        wait_s = self.balancer.pushed(instance.id, push, self.now)
        if wait_s is None:
            return  # of a boot that is not known there: it is polled when it is
        instance.after = instance.seq
        instance.started, instance.ended = [], []
        instance.next_push_at = self.now + wait_s
        self._grant()

    def _load(self, instance: _Instance) -> LoadReport:
        happened, running, waiting, read, made = self._engines.look(instance.server, self.now)
        if happened:
            self._happened(instance, happened)
        started, ended = instance.started, instance.ended
        instance.started, instance.ended = [], []
        instance.after = instance.seq
        return LoadReport(
            instance.boot_id,
            instance.seq,
            started,
            ended,
            running,
            waiting,
            instance.ready,
            read,
            made,
        )

    def _ready(self, which: tuple[_Instance, int]) -> None:
        instance, _ = which
        if not instance.up:
            return
        instance.ready = True
        instance.heard += 1
        for i in self.scaler.instances:
            if i.id == instance.id:
                self.scaler.record_message(i.label, instance.boot_id, instance.heard, "ready")
                self._check()
                break
        if self.scaler.turn_due.is_set():  # the listing that we have is older than the machine
            self.scaler.turn_due.clear()
            self._turn_at(max(self.now + CALL_S, self._turned_at + MIN_TURN_S))

    def _dies(self, instance_id: int) -> None:
        """Its processes are gone, and with them what was on it."""
        instance = self._instances.pop(instance_id, None)
        if instance is None or not instance.up:
            return
        instance.up = instance.ready = False
        del self._by_server[instance.server]
        self._made_tokens += self._engines.made_tokens(instance.server)
        self._engines.remove(instance.server)
        self._ended_machines += 1
        for flight in instance.flights.values():
            self._lost_tokens += flight.output
            self._engines.release(flight.row)
            self._set_back(flight, "broken_off")
        instance.flights.clear()

    # -- the loadbalancer's own work --

    def _beat(self) -> None:
        balancer, now = self.balancer, self.now
        balancer.tick(now)
        self._refill()
        for _ in range(min(SWEEP, len(self._instances))):  # each looks at a tenth, at least at one
            for poll in balancer.polls(now):
                instance = self._instances.get(poll.instance_id)
                if instance is None or not instance.up or instance.frozen:
                    balancer.poll_failed(poll, now)
                else:
                    balancer.report(poll, self._load(instance), now)
        self._grant()
        self._at(now + self.setting.beat_s, self._beat)

    def _refill(self) -> None:
        balancer, now = self.balancer, self.now
        for refill in balancer.refills(now):
            instance = self._instances.get(refill.instance_id)
            if instance is None or not instance.up or instance.frozen:
                balancer.refill_failed(refill, now)
                continue
            first = next(self._tokens)
            tokens = [f"{instance.id}.{first}.{n}" for n in range(refill.count)]
            balancer.add_tokens(refill, instance.boot_id, tokens, TOKEN_LIFE_S, instance.seq, now)

    def _tell_hot_set(self) -> None:
        fleet = self.scaler.instances
        if fleet.hot_version == self._told_version or not fleet.knows_hot_set():
            return
        self._told_version = fleet.hot_version
        profile = self.setting.profile
        hot = HotSet(
            epoch="sim",
            version=fleet.hot_version,
            model=profile.name,
            prefill_weight=profile.prefill_weight,
            expected_output_tokens=profile.expected_output_tokens,
            expected_hot_s=fleet.expected_hot_s(self.now),
            instances=tuple(
                HotInstance(
                    id=i.id or 0,
                    draining=i.state is State.DRAINING,
                    address=i.address or "",
                    auth_url=i.auth_url or "",
                    master_token="",
                    throughput_work_s=i.throughput_work_s,
                    capacity_work=profile.throughput_on(i.gpu_name, i.num_gpus) * profile.hold_s,
                    timing=self._timing(i.gpu_name, i.num_gpus),
                )
                for i in fleet.serving()
            ),
        )
        self.balancer.replace_hot(hot, self.now)
        self._refill()
        self._grant()

    # -- the autoscaler's own work --

    def _turn_at(self, at: float) -> None:
        """The next turn is then, and not when it was to be."""
        self._turns += 1
        self._at(at, self._turn, self._turns)

    def _turn(self, number: int) -> None:
        if number != self._turns:
            return
        now = self._turned_at = self.now
        self._cloud_moves()
        if self._begun_at is not None and self.cloud.hazards != _NONE:
            self.cloud.draw_hazards(now, self.setting.turn_s)
        self._report_usage()
        if self._begun_at is not None and now >= self._tune_at:
            self._tune_at = now + self.setting.replay_every_s
            self.tuner.tune()
        self.scaler.turn()
        self.balancer.expect_hot(self.scaler.instances.expected_hot_s(now), now)
        self._check()
        self._tell_hot_set()
        self._order_soon()
        self._sample()
        self._turn_at(now + self.setting.turn_s)

    def _report_usage(self) -> None:
        """What loadbalancer_server tells the autoscaler each second; nobody reads it between turns."""
        balancer = self.balancer
        usage = balancer.usage(self.now)
        report = Report(
            loadbalancer="sim",
            hot_epoch="sim",
            hot_version=balancer.version,
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
            kv_tokens=sum(self._engines.kv_tokens_used(i.server) for i in self._instances.values()),
            slo=self.setting.slo,
            late_bound_s=self.setting.late_bound_s,
        )
        self.scaler.record_report(report, {i: u.throughput_work_s for i, u in usage.instances.items()})

    def _check(self) -> None:
        orders = self.scaler.checks_due(self._checking)
        for order in orders:
            self._checking.add(order.label)
            self._at(self.now + CHECK_S, self._checked, (order, self.now))

    def _checked(self, which: tuple[HealthCheckOrder, float]) -> None:
        order, started_at = which
        self._checking.discard(order.label)
        instance = self._instances.get(order.id)
        if instance is None or not instance.up or instance.frozen:
            check = HealthCheck(order.label, started_at, Verdict.FAILED, "does not answer")
        elif not instance.ready:
            check = HealthCheck(
                order.label, started_at, Verdict.LOADING, "the ready line is not in its log yet"
            )
        else:
            ended, running, waiting, _, _ = self._engines.look(instance.server, self.now)
            if ended:
                self._happened(instance, ended)
            check = HealthCheck(
                order.label,
                started_at,
                Verdict.PASSED,
                "test prompt: 1 token(s)",
                running + waiting,
            )
        self.scaler.judge(check)
        self._tell_hot_set()

    def _order_soon(self) -> None:
        if not self._order_due and not self.scaler._orders.empty():
            self._order_due = True
            self._at(self.now + CALL_S, self._order)

    def _order(self) -> None:
        command = self.scaler._orders.queue[0][2]
        if isinstance(command, Create):
            if self.now - self._last_create < CREATE_GAP_S:
                self._at(self._last_create + CREATE_GAP_S, self._order)
                return
            self._last_create = self.now
        self._order_due = False
        self.scaler.perform_next()
        self._cloud_moves()
        self._order_soon()

    def _cloud_moves(self) -> None:
        """What the cloud does to our machines by now, and when to look again."""
        now = self.now
        for effect in self.cloud.advance(now):
            if isinstance(effect, Boot):
                self._boot(effect)
            elif isinstance(effect, End):
                self._dies(effect.id)
            elif isinstance(effect, Kill):
                self._dies(effect.id)
                rental = self.cloud.model.rentals.get(effect.id)
                if rental is not None:
                    self.cloud.model.crashed(effect.id, rental.boot, now)
            elif isinstance(effect, Freeze):
                self._freezes(effect)
            elif isinstance(effect, Moved):
                pass
        at = self.cloud.next_event(now)
        if at is not None and at < now + self.setting.turn_s:
            at = max(at, now + 1e-3)
            if at < self._cloud_due or self._cloud_due <= now:
                self._cloud_due = at
                self._at(at, self._cloud_moves)

    def _boot(self, boot: Boot) -> None:
        self._dies(boot.id)
        timing = self._timing(boot.machine.gpu_name, boot.machine.num_gpus)
        server = self._engines.add(timing)
        instance = _Instance(boot.id, boot.boot, server)
        self._instances[boot.id] = self._by_server[server] = instance
        self._dearest_usd_h = max(self._dearest_usd_h, boot.machine.usd_h)
        self.cloud.booted(boot, self.now)
        self._at(self.now + boot.load_s, self._ready, (instance, boot.boot))

    def _freezes(self, effect: Freeze) -> None:
        instance = self._instances.get(effect.id)
        if instance is None:
            return
        instance.frozen = effect.frozen
        self._engines.freeze(instance.server, effect.frozen)
        if effect.frozen:
            for flight in instance.flights.values():
                self._at(self.now + STALL_S, self._stalled, flight)

    # -- what is seen --

    def _sample(self) -> None:
        if self._begun_at is None:
            return
        self._looks += 1
        if self._looks % self._sample_every:
            return
        fleet = self.scaler.instances
        states = Counter(str(i.state) for i in fleet)
        usd_h = sum(i.price_usd_h for i in fleet)
        at_s = self.now - self._begun_at
        samples = self.out.samples
        samples.append(Sample(at_s, dict(states), round(usd_h, 6), round(self.demand.demand, 4)))
        if len(samples) > SAMPLES:
            del samples[1::2]
            self._sample_every *= 2

    def _finish(self) -> Outcome:
        self._cloud_moves()
        out, begun = self.out, self._begun_at or 0.0
        s = self.setting
        out.duration_s = min(self.now - begun, s.score_to_s) - s.score_from_s
        from_s, to_s = begun + s.score_from_s, min(self.now, begun + s.score_to_s)
        self.scaler.write_counts()
        out.clamped = Counter({str(what): n for what, n in sorted(self.scaler.clamps.items())})
        with suppress(NoCurve):
            out.curve = self.tuner.curve()
        out.costs = self.ledger.costs(from_s, to_s, with_intervals=False)
        out.took = self.ledger.durations(from_s, to_s)
        out.policy = self.scaler.policy
        out.audit = self._audit()
        self.ledger.close()
        return out

    def _audit(self) -> dict[str, Any]:
        """What must be true of every run; raises NotConserved when it is not."""
        _must(self._arrived == self._ended, f"{self._arrived} requests arrived, {self._ended} ended")
        _must(not self._waiting and not self._flying, "the trace is over, and a request is still somewhere")
        made = self._made_tokens + sum(self._engines.made_tokens(i.server) for i in self._instances.values())
        delivered, lost = self._delivered_tokens, self._lost_tokens
        _must(
            delivered <= made <= delivered + lost,
            f"{made} tokens were made, {delivered} delivered, at most {lost} lost with machines",
        )
        self.cloud.advance(self.now)
        charged, booked = self.cloud.spent_usd(), self.ledger.costs(0.0, self.now).total
        # What passes between two listings is booked up to two turns late, each at no more than the dearest.
        changes = 2 + len(self.ledger.durations(0.0, self.now + 1.0)) + self._ended_machines
        off_s = changes * (3.0 * self.setting.turn_s + CALL_S)
        allowed = off_s * self._dearest_usd_h / 3600.0
        _must(
            abs(charged - booked) <= allowed + 1e-9,
            f"the ledger has ${booked:.4f}, the cloud charged ${charged:.4f}: at most ${allowed:.4f} apart",
        )
        return {
            "requests": self._arrived,
            "tokens_made": made,
            "tokens_delivered": delivered,
            "usd_charged": charged,
            "usd_in_ledger": booked,
        }


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotConserved(otherwise)


_NONE = Hazards()


def simulate(setting: Setting, policy: Policy, requests: Iterable[Request]) -> Outcome:
    """Play the trace against a fleet under that policy; deterministic for the setting's seed."""
    with tempfile.TemporaryDirectory(prefix="virtual-fleet-", dir=_fast_directory()) as directory:
        return VirtualFleet(setting, policy, requests, Path(directory)).run()


def _fast_directory() -> str | None:
    """Memory where there is such a file system: the ledger of a run is read once and thrown away."""
    shm = Path("/dev/shm")  # noqa: S108 a directory of our own is made in it
    with suppress(OSError):
        if shm.is_dir():
            return str(shm)
    return None
