"""A LoadBalancer with a clock that tests move, and instances that give tokens. There is no I/O."""

import random
from dataclasses import dataclass, field
from typing import Any

from dispatch.lease import Lease
from dispatch.load_reports import Poll
from dispatch.route_request import Granted, QueuedRequest, RouteRefused, RouteRequest
from dispatch.token_refills import Refill
from engine.step_time_constants import Timing
from loadbalancer import LoadBalancer
from tests.messages import load_report, token_batch
from web.messages.hot_set import HotInstance, HotSet, HotTiming

T0 = 1_700_000_000.0


def instance(
    id: int,
    throughput: float = 100.0,
    hold_s: float = 10.0,
    *,
    draining: bool = False,
    timing: Timing | None = None,
) -> HotInstance:
    """One that may hold ten seconds of a hundred work/s."""
    return HotInstance(
        id=id,
        state="draining" if draining else "hot",
        address=f"http://10.0.0.{id}:8000",
        auth_url=f"http://10.0.0.{id}:3000",
        master_token="m" * 64,
        throughput_work_s=throughput,
        capacity_work=throughput * hold_s,
        timing=None if timing is None else HotTiming.of(timing),
    )


@dataclass
class DispatchWorld:
    """A LoadBalancer, a clock, and instances that give tokens whenever they are asked. given: all leases."""

    balancer: LoadBalancer
    now: float = T0
    version: int = 0
    issued: int = 0
    boots: dict[int, str] = field(default_factory=dict)
    given: list[Lease] = field(default_factory=list)

    # -- hot set and tokens --

    def hot(self, *instances: HotInstance, expected_hot_s: float | None = None) -> bool:
        """A new hot set, and tokens for all of it."""
        taken = self.hot_without_tokens(*instances, expected_hot_s=expected_hot_s)
        self.refill()
        return taken

    def hot_without_tokens(self, *instances: HotInstance, expected_hot_s: float | None = None) -> bool:
        """A new hot set."""
        self.version += 1
        return self.hot_set("epoch1", self.version, *instances, expected_hot_s=expected_hot_s)

    def hot_set(
        self, epoch: str, version: int, *instances: HotInstance, expected_hot_s: float | None = None
    ) -> bool:
        """A hot set of that version."""
        told = HotSet(epoch, version, "vllm-13", 0.1, 200.0, expected_hot_s, instances)
        return self.balancer.update_hot_set(told, self.now)

    def refill(self, expires_in_s: float = 600.0) -> list[Refill]:
        """Answer all refills there are."""
        done: list[Refill] = []
        while asked := self.balancer.refills(self.now):
            for one in asked:
                tokens = [f"token{self.issued + n}" for n in range(one.count)]
                self.issued += one.count
                self.give_tokens(one, tokens, expires_in_s)
            done += asked
        return done

    def give_tokens(self, refill: Refill, tokens: list[str], expires_in_s: float = 600.0) -> None:
        """Answer a refill."""
        boot = self.boots.get(refill.instance_id, "boot1")
        self.balancer.complete_refill(refill, token_batch(tokens, expires_in_s, boot), self.now)

    def fail_refill(self, refill: Refill) -> None:
        """Do not answer a refill."""
        self.balancer.complete_refill(refill, None, self.now)

    # -- clients --

    def request(
        self, work: float = 100.0, wait_s: float = 0.0, count: int | None = None, **more: Any
    ) -> Granted | QueuedRequest | RouteRefused:
        """Ask for leases."""
        outcome = self.balancer.request(RouteRequest(work, **more), wait_s, count, self.now)
        if isinstance(outcome, Granted):
            self.given += outcome.leases
        return outcome

    def ask(self, work: float = 100.0, **more: Any) -> Lease | None:
        """Ask for a lease without waiting."""
        outcome = self.request(work, **more)
        return outcome.leases[0] if isinstance(outcome, Granted) else None

    def lease(self, work: float = 100.0, **more: Any) -> Lease:
        """Ask for a lease that must be given."""
        lease = self.ask(work, **more)
        assert lease is not None
        return lease

    def batch(self, work: float, count: int, **more: Any) -> list[Lease]:
        """Ask for several leases."""
        outcome = self.request(work, count=count, **more)
        return outcome.leases if isinstance(outcome, Granted) else []

    def refused(self, work: float, **more: Any) -> RouteRefused:
        """Ask for a lease that must be refused."""
        outcome = self.request(work, **more)
        assert isinstance(outcome, RouteRefused)
        return outcome

    def hold(self, work: float = 100.0, wait_s: float = 900.0, **more: Any) -> QueuedRequest:
        """Ask for a lease that must be waited for."""
        outcome = self.request(work, wait_s, **more)
        assert isinstance(outcome, QueuedRequest)
        return outcome

    def grant(self) -> list[tuple[QueuedRequest, Lease]]:
        """Give leases to the requests that wait."""
        granted = [(queued, leases[0]) for queued, leases in self.balancer.grant(self.now)]
        self.given += [lease for _, lease in granted]
        return granted

    def served(self) -> list[QueuedRequest]:
        """The waiting requests that get a lease now, in that order."""
        return [queued for queued, _ in self.grant()]

    def end(self, lease: Lease, outcome: str = "finished", **more: bool) -> bool:
        """Let a client say how its lease ended."""
        return self.balancer.end_lease(lease.request_id, outcome, self.now, **more)

    @property
    def unfinished(self) -> list[Lease]:
        """The leases that have not ended."""
        return [lease for lease in self.given if not lease.over]

    # -- instances --

    def poll(self, id: int) -> Poll:
        """A poll of that instance, whether or not it is due."""
        return Poll(instance(id), 0)

    def report(self, id: int, **what: Any) -> None:
        """Let that instance report."""
        self.balancer.complete_poll(self.poll(id), load_report(**what), self.now)

    def fail_poll(self, id: int) -> None:
        """Let that instance not answer."""
        self.balancer.complete_poll(self.poll(id), None, self.now)

    # -- time and figures --

    def tick(self, seconds: float) -> None:
        """Let time pass; the loadbalancer looks at its watch every second of it."""
        while seconds > 0.0:
            step = min(1.0, seconds)
            self.now += step
            seconds -= step
            self.balancer.tick(self.now)

    def work(self, id: int) -> float:
        """The work that instance is taken to have."""
        return self.balancer.usage(self.now).instances[id].work

    def row(self, id: int) -> dict[str, Any]:
        """Its line in the description."""
        row: dict[str, Any] = next(r for r in self.describe()["instances"] if r["id"] == id)
        return row

    def describe(self) -> dict[str, Any]:
        """What an operator sees."""
        instances = list(self.balancer.describe_instances(self.now))
        return self.balancer.describe(self.now) | {"instances": instances}


def world(*instances: HotInstance, seed: int = 1, **settings: Any) -> DispatchWorld:
    """A loadbalancer that knows these instances."""
    made = DispatchWorld(LoadBalancer(random.Random(seed), lambda token: f"id-{token}", **settings))
    if instances:
        made.hot(*instances)
    return made


def full(max_held: int = 100, **settings: Any) -> tuple[DispatchWorld, Lease]:
    """One instance, full, and the lease that fills it."""
    b = world(instance(1), max_held=max_held, **settings)
    return b, b.lease(1000.0)
