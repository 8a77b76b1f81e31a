"""The rented machines of a run: model servers, single-use tokens, load reports and pushes.

    Users ── submit ──► model servers (engine/model_servers.py) ── answered, broken off ──► Users
                            │ load reports, pushes
                            ▼
                        LoadBalancer

An instance reports ends as soon as remote/speaker.py does.
"""

from collections.abc import Iterator
from itertools import count
from typing import Protocol

from dispatch.route_request import QueuedRequest
from engine.model_servers import ModelServers
from engine.step_time_constants import Timing
from loadbalancer import LoadBalancer
from simulation.virtual.loop import EventLoop
from simulation.virtual.user_request import UserRequest
from web.messages.reports import LoadReport, PushedReport, RequestEnd, TokenBatch

TOKEN_LIFE_S = 600.0
"""Seconds that a token is good for."""

PUSH_S = 0.02
"""Seconds from an end to its report: the tick of remote/speaker.py."""


class Sender(Protocol):
    """The users, as far as instances know them. held: requests that wait at the loadbalancer."""

    held: dict[QueuedRequest, UserRequest]

    def answered(self, request: UserRequest, first_at: float, at: float) -> None:
        """Take in when a request had its first token and its end."""

    def broken_off(self, request: UserRequest) -> None:
        """Take in that the instance of a request is gone."""

    def stall(self, request: UserRequest) -> None:
        """Take in that the instance of a request is silent from now on."""

    def grant(self) -> None:
        """Take in that there may be room for those that are held."""


class SimulatedInstance:
    """One boot of a rental: its model server, the requests in it, and what it has not reported yet."""

    __slots__ = (
        "_after",
        "_ended",
        "_next_push_at",
        "_push_due",
        "_started",
        "boot_id",
        "frozen",
        "id",
        "number",
        "ready",
        "requests",
        "seq",
        "server",
        "up",
    )  # fmt: skip

    def __init__(self, id: int, boot: int, server: int) -> None:
        """server: its number among the model servers."""
        self.id = id
        self.boot_id = f"{id}-{boot}"
        self.server = server
        self.up = True
        self.ready = False
        self.frozen = False
        self.requests: dict[int, UserRequest] = {}  # by their rows
        self.seq = 0
        self.number = 0  # of the last push
        self._started: list[str] = []
        self._ended: list[RequestEnd] = []
        self._after = 0  # all events up to this one are reported
        self._push_due = False
        self._next_push_at = 0.0

    def become_ready(self) -> None:
        """Have the model loaded."""
        self.ready = True

    def freeze(self, frozen: bool) -> None:
        """Say nothing from now on, or speak again."""
        self.frozen = frozen

    def die(self) -> None:
        """Be gone, with everything that was on it."""
        self.up = self.ready = False

    def begin(self, row: int, request: UserRequest) -> None:
        """Have a request in the model server, as that row."""
        self.requests[row] = request
        self._started.append(request.given.request_id)
        self.seq += 1

    def end(self, row: int) -> UserRequest:
        """Have answered the request of that row."""
        request = self.requests.pop(row)
        self._ended.append(RequestEnd(request.given.request_id, "finished", request.output))
        self.seq += 1
        return request

    def plan_push(self, now: float) -> float | None:
        """Return when to push what has happened; None when a push is planned already."""
        if self._push_due:
            return None
        self._push_due = True
        return max(now + PUSH_S, self._next_push_at)

    def push(self) -> PushedReport | None:
        """Return what it pushes now; None when there is nothing, or it cannot speak."""
        self._push_due = False
        if not self.up or self.frozen or not (self._ended or self._started):
            return None
        self.number += 1
        return PushedReport(
            self.boot_id, self.number, self._after, self.seq, False, self._started, self._ended, True
        )

    def pushed(self, next_at: float) -> None:
        """Forget what was pushed; the next push is not before next_at."""
        self._next_push_at = next_at
        self.take_events()

    def take_events(self) -> tuple[list[str], list[RequestEnd]]:
        """Return what has started and ended since the last report, which is reported by that."""
        events = self._started, self._ended
        self._started, self._ended = [], []
        self._after = self.seq
        return events


class SimulatedInstances:
    """All instances of a run that are up, by id. Those that are gone remain as totals.

    tokens_lost: output tokens of the requests that were broken off; at most so many were made in vain.
    ended: instances whose processes ended.
    """

    def __init__(self, loop: EventLoop, balancer: LoadBalancer) -> None:
        """`serve` comes before the first boot."""
        self.tokens_lost = 0
        self.ended = 0
        self._loop = loop
        self._balancer = balancer
        self._users: Sender
        self._engines = ModelServers()
        self._by_id: dict[int, SimulatedInstance] = {}
        self._by_server: dict[int, SimulatedInstance] = {}
        self._made_by_gone = 0
        self._token_batches = count()

    def serve(self, users: Sender) -> None:
        """Say from now on to these users what becomes of their requests."""
        self._users = users

    def __len__(self) -> int:
        """How many are up."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[SimulatedInstance]:
        """Those that are up, as they booted."""
        return iter(self._by_id.values())

    def find(self, id: int) -> SimulatedInstance | None:
        """Return the instance of that id, if it is up."""
        return self._by_id.get(id)

    def answering(self, id: int) -> SimulatedInstance | None:
        """Return the instance of that id, if it is up and not frozen."""
        instance = self._by_id.get(id)
        return None if instance is None or instance.frozen else instance

    # -- the cloud --

    def boot(self, id: int, boot: int, timing: Timing) -> SimulatedInstance:
        """Start the processes of a rental; those of its boot before are gone."""
        self.end(id)
        server = self._engines.add(timing)
        instance = SimulatedInstance(id, boot, server)
        self._by_id[id] = self._by_server[server] = instance
        return instance

    def end(self, id: int) -> None:
        """End the processes of a rental, and break off what was on it."""
        instance = self._by_id.pop(id, None)
        if instance is None:
            return
        instance.die()
        del self._by_server[instance.server]
        self._made_by_gone += self._engines.made_tokens(instance.server)
        self._engines.remove(instance.server)
        self.ended += 1
        for request in instance.requests.values():
            self.tokens_lost += request.output
            self._engines.release(request.row)
            self._users.broken_off(request)

    def freeze(self, id: int, frozen: bool) -> None:
        """Let the host of a rental be lost, or come back."""
        instance = self._by_id.get(id)
        if instance is None:
            return
        instance.freeze(frozen)
        self._engines.freeze(instance.server, frozen)
        if frozen:
            for request in instance.requests.values():
                self._users.stall(request)

    # -- users --

    def submit(self, instance: SimulatedInstance, request: UserRequest) -> None:
        """Give a request to the model server of a ready instance."""
        row, ended = self._engines.submit(instance.server, request.prompt, request.output, self._loop.now)
        request.submitted(row)
        instance.begin(row, request)
        if ended:
            self._happened(instance, ended)
        elif len(instance.requests) == 1:  # admitted at once
            self._users.grant()

    def silent(self, request: UserRequest) -> bool:
        """Whether nothing comes for a request that was sent: it never arrived, or its instance is frozen."""
        return not request.row or self._by_id[request.given.instance_id].frozen

    def cancel(self, request: UserRequest) -> None:
        """Take a request out of its model server, if it arrived there."""
        if request.row:
            instance = self._by_id[request.given.instance_id]
            del instance.requests[request.row]
            self.tokens_lost += request.output
            self._engines.cancel(request.row, instance.server, self._loop.now)

    # -- model servers --

    def play(self, until_s: float) -> bool:
        """Let all model servers go on until a request has ended before until_s; False when none has.

        While requests are held, any change inside a model server may make room for one of them.
        """
        server, at, ended = self._engines.play(until_s, bool(self._users.held))
        if not server:
            return False
        self._loop.go_to(at)
        self._happened(self._by_server[server], ended)
        return True

    def _happened(self, instance: SimulatedInstance, ended: int) -> None:
        """Take in a change of a model server: that row has ended, and others behind it; 0: none."""
        engines, now = self._engines, self._loop.now
        while ended:
            request = instance.end(ended)
            first_at, at, following = engines.after(ended)
            engines.release(ended)
            self._users.answered(request, first_at, at)
            push_at = instance.plan_push(now)
            if push_at is not None:
                self._loop.at(push_at, self._push, instance)
            ended = following
        self._users.grant()

    def _look(self, instance: SimulatedInstance) -> tuple[int, int, int, int]:
        """Return requests running and waiting, prompt tokens read and tokens made there by now."""
        ended, running, waiting, read, made = self._engines.look(instance.server, self._loop.now)
        if ended:
            self._happened(instance, ended)
        return running, waiting, read, made

    def requests_at(self, instance: SimulatedInstance) -> int:
        """How many requests run and wait in its model server."""
        running, waiting, _, _ = self._look(instance)
        return running + waiting

    def kv_tokens_used(self) -> int:
        """KV memory in use in all model servers, in tokens."""
        return sum(self._engines.kv_tokens_used(i.server) for i in self)

    def tokens_made(self) -> int:
        """Output tokens made so far, also by instances that are gone."""
        return self._made_by_gone + sum(self._engines.made_tokens(i.server) for i in self)

    # -- loadbalancer --

    def _push(self, instance: SimulatedInstance) -> None:
        push = instance.push()
        if push is None:
            return
        wait_s = self._balancer.pushed(instance.id, push, self._loop.now)
        if wait_s is not None:  # else its boot is not known there: it is polled when it is
            instance.pushed(self._loop.now + wait_s)
            self._users.grant()

    def load(self, instance: SimulatedInstance) -> LoadReport:
        """Return its answer to a poll."""
        running, waiting, read, made = self._look(instance)
        started, ended = instance.take_events()
        return LoadReport(
            instance.boot_id, instance.seq, started, ended, running, waiting, instance.ready, read, made
        )

    def new_tokens(self, instance: SimulatedInstance, count: int) -> TokenBatch:
        """Return so many single-use tokens of an instance."""
        batch = next(self._token_batches)
        tokens = [f"{instance.id}.{batch}.{n}" for n in range(count)]
        load = LoadReport(instance.boot_id, instance.seq, (), (), 0, 0, instance.ready, 0, 0)
        return TokenBatch(tokens, instance.boot_id, TOKEN_LIFE_S, load)
