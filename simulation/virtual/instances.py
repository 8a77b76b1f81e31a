"""The rented machines of a run in virtual time: model servers, single-use tokens, load reports.

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
"""Seconds from the issue of a single-use token to its expiry."""

PUSH_S = 0.02
"""Seconds from the end of a request to the pushed report of it: the tick of remote/speaker.py."""


class Sender(Protocol):
    """The users of a run as instances see them. held: the requests that wait at the loadbalancer."""

    held: dict[QueuedRequest, UserRequest]

    def answered(self, request: UserRequest, first_at: float, at: float) -> None:
        """Take the answer of a request: when its first token came, and when it ended."""

    def broken_off(self, request: UserRequest) -> None:
        """Note that the instance that served this request is gone."""

    def stall(self, request: UserRequest) -> None:
        """Note that the instance that serves this request says nothing from now on."""

    def grant(self) -> None:
        """Note that instances may have room for requests that wait."""


class SimulatedInstance:
    """One boot of a simulated machine: its model server, the requests in it, the events not reported yet."""

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
        """Make an instance that begins to load. server: its model server's row in engine/model_servers.py."""
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
        """Note that the instance's model is loaded."""
        self.ready = True

    def freeze(self, frozen: bool) -> None:
        """Let the instance stop answering and reporting, or begin again."""
        self.frozen = frozen

    def die(self) -> None:
        """End the instance with everything that was on it."""
        self.up = self.ready = False

    def begin(self, row: int, request: UserRequest) -> None:
        """Note that the instance's model server has a request, as that row of its table."""
        self.requests[row] = request
        self._started.append(request.given.request_id)
        self.seq += 1

    def end(self, row: int) -> UserRequest:
        """Remove the request of that row, which was answered, from the instance and return it."""
        request = self.requests.pop(row)
        self._ended.append(RequestEnd(request.given.request_id, "finished", request.output))
        self.seq += 1
        return request

    def plan_push(self, now: float) -> float | None:
        """Return when to push the new events to the loadbalancer; None if that is planned already."""
        if self._push_due:
            return None
        self._push_due = True
        return max(now + PUSH_S, self._next_push_at)

    def push(self) -> PushedReport | None:
        """Return the report to push now; None without a new event, or when the instance is frozen."""
        self._push_due = False
        if not self.up or self.frozen or not (self._ended or self._started):
            return None
        self.number += 1
        return PushedReport(
            self.boot_id, self.number, self._after, self.seq, False, self._started, self._ended, True
        )

    def pushed(self, next_at: float) -> None:
        """Forget the events that were pushed to the loadbalancer; the next push is not before next_at."""
        self._next_push_at = next_at
        self.take_events()

    def take_events(self) -> tuple[list[str], list[RequestEnd]]:
        """Return the starts and ends of requests since the last report, and forget them."""
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
        """Make a set of instances with none in it; `serve` must be called before the first boot."""
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
        """Set the users who are told from now on what becomes of their requests."""
        self._users = users

    def __len__(self) -> int:
        """Return how many instances run."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[SimulatedInstance]:
        """Iterate over the running instances in the order in which they booted."""
        return iter(self._by_id.values())

    def find(self, id: int) -> SimulatedInstance | None:
        """Return the running instance with that id; None when there is none."""
        return self._by_id.get(id)

    def answering(self, id: int) -> SimulatedInstance | None:
        """Return the running instance with that id unless it is frozen; None when there is none."""
        instance = self._by_id.get(id)
        return None if instance is None or instance.frozen else instance

    # -- the cloud --

    def boot(self, id: int, boot: int, timing: Timing) -> SimulatedInstance:
        """Start the processes of a rental, after ending those of its last boot; return the new instance."""
        self.end(id)
        server = self._engines.add(timing)
        instance = SimulatedInstance(id, boot, server)
        self._by_id[id] = self._by_server[server] = instance
        return instance

    def end(self, id: int) -> None:
        """End the processes of a rental, and break off the requests on it."""
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
        """Make the host of a rental unreachable, or reachable again."""
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
        """Return whether a request gets no answer: it reached no instance, or its instance is frozen."""
        return not request.row or self._by_id[request.given.instance_id].frozen

    def cancel(self, request: UserRequest) -> None:
        """Remove a request from the model server that it is in, if it reached one."""
        if request.row:
            instance = self._by_id[request.given.instance_id]
            del instance.requests[request.row]
            self.tokens_lost += request.output
            self._engines.cancel(request.row, instance.server, self._loop.now)

    # -- model servers --

    def play(self, until_s: float) -> bool:
        """Advance all model servers until a request ends before until_s; return False when none does.

        While requests wait at the loadbalancer, any change inside a model server may make room for one of
        them.
        """
        server, at, ended = self._engines.play(until_s, bool(self._users.held))
        if not server:
            return False
        self._loop.go_to(at)
        self._happened(self._by_server[server], ended)
        return True

    def _happened(self, instance: SimulatedInstance, ended: int) -> None:
        """Handle a change of an instance's model server. ended: the first request's row that ended, or 0."""
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
        """Return (requests running, waiting, prompt tokens read, tokens made) of an instance now."""
        ended, running, waiting, read, made = self._engines.look(instance.server, self._loop.now)
        if ended:
            self._happened(instance, ended)
        return running, waiting, read, made

    def requests_at(self, instance: SimulatedInstance) -> int:
        """Return how many requests run or wait in an instance's model server."""
        running, waiting, _, _ = self._look(instance)
        return running + waiting

    def kv_tokens_used(self) -> int:
        """Return the KV memory in use on all instances, in tokens."""
        return sum(self._engines.kv_tokens_used(i.server) for i in self)

    def tokens_made(self) -> int:
        """Return the output tokens made so far on all instances, those that are gone included."""
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
        """Return what an instance answers to the loadbalancer's `GET /load`."""
        running, waiting, read, made = self._look(instance)
        started, ended = instance.take_events()
        return LoadReport(
            instance.boot_id, instance.seq, started, ended, running, waiting, instance.ready, read, made
        )

    def new_tokens(self, instance: SimulatedInstance, count: int) -> TokenBatch:
        """Return `count` new single-use tokens of an instance."""
        batch = next(self._token_batches)
        tokens = [f"{instance.id}.{batch}.{n}" for n in range(count)]
        load = LoadReport(instance.boot_id, instance.seq, (), (), 0, 0, instance.ready, 0, 0)
        return TokenBatch(tokens, instance.boot_id, TOKEN_LIFE_S, load)
