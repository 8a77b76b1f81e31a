"""Servers, loadbalancers and requests in virtual time.

Time is one heap of (time, counter, what). A server is looked at when something can happen there. A request
that is given a server is there at once: what the network takes is the same for all rules.

Reports are fresh (each server says how it stands before every decision) or each server's come once a second,
the servers evenly spread. Several loadbalancers get the requests by chance; each knows of its own only, and
the reports, which are of the whole server.

Holding: held requests wait first come, first served, while no server has room. A server has room when none
waits there and the prompt fits into its memory; that is known as soon as it is so ("room free").
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np

from bench.dispatch.rules.rule import BLOCK_TOKENS, DispatchRequest, DispatchRule, ServerFleet, ServerReport
from engine.reference import EventKind, ServerEvent, SteppedModelServer

Later = Callable[[float, Callable[[], None]], None]
"""Do that then."""

Send = Callable[[DispatchRequest, int], None]
"""Give a request to a server."""


QUANTILES = (0.5, 0.95, 0.99)
"""Shares of the requests whose first tokens and whole answers a score has."""

STUCK_S = 7200.0
"""Seconds after the last arrival by which all have been served, unless a rule holds one for ever."""


class Dispatcher(Protocol):
    """A loadbalancer, as the world drives it."""

    @property
    def held(self) -> int:
        """Requests that wait in it."""

    def arrive(self, request: DispatchRequest, now: float) -> None:
        """Send a request that comes, or hold it."""

    def again(self, now: float) -> None:
        """Send held requests where something has changed."""

    def first_token(self, request: DispatchRequest, now: float) -> None:
        """Note that one of its own has its first token."""

    def ended(self, request: DispatchRequest, now: float) -> None:
        """Note that one of its own has its answer."""

    def happened(self, request: DispatchRequest, now: float, *, end: bool) -> None:
        """Note that any request has begun or ended on its server: what an instance writes down."""

    def report(self, server: int, live: SteppedModelServer, now: float) -> None:
        """Take in a report."""


class RuleRouter:
    """A rule as a proxy carries it out, with or without holding."""

    def __init__(self, rule: DispatchRule, send: Send, *, holds: bool) -> None:
        """Begin with an empty line."""
        self.rule = rule
        self._send = send
        self._holds = holds
        self._all = list(range(len(rule.fleet)))
        self._line: deque[DispatchRequest] = deque()
        self._busy = False

    @property
    def held(self) -> int:
        """Requests that wait here."""
        return len(self._line)

    def arrive(self, request: DispatchRequest, now: float) -> None:
        """Put it last in the line."""
        self._line.append(request)
        self.again(now)

    def again(self, now: float) -> None:
        """Serve the line from its head as far as it goes."""
        if self._busy:
            return
        self._busy = True
        while self._line:
            request = self._line[0]
            among = self._all
            if self._holds:
                live = self.rule.fleet.live
                among = [server for server in among if has_room(live[server], request.prompt)]
                if not among:
                    break
            server = self.rule.choose(request, among, now)
            if server is None:
                break
            self._line.popleft()
            self.rule.sent(request, server, now)
            self._send(request, server)
        self._busy = False

    def first_token(self, request: DispatchRequest, now: float) -> None:
        """Tell the rule."""
        self.rule.first_token(request, request.server, now)

    def ended(self, request: DispatchRequest, now: float) -> None:
        """Tell the rule."""
        self.rule.ended(request, request.server, now)

    def happened(self, request: DispatchRequest, now: float, *, end: bool) -> None:
        """Do nothing: a proxy sees its own only."""

    def report(self, server: int, live: SteppedModelServer, now: float) -> None:
        """Tell the rule what servers export as metrics."""
        self.rule.report(
            server,
            ServerReport(
                now,
                live.running,
                live.waiting,
                live.kv_use,
                live.waiting_tokens,
                live.prompt_tokens_total,
                live.generation_tokens_total,
            ),
        )


def has_room(live: SteppedModelServer, prompt: int) -> bool:
    """Return whether it would be admitted with the next step, by memory and by what waits."""
    return not live.waiting and (
        not live.running or live.kv_tokens_used + live.running + prompt + 1 <= live.timing.kv_tokens
    )


@dataclass(frozen=True)
class DispatchScore:
    """What a run gave, in seconds, over the requests that count. held_most: at once, in all loadbalancers."""

    requests: int
    first_mean: float
    first_p50: float
    first_p95: float
    first_p99: float
    whole_mean: float
    whole_p50: float
    whole_p95: float
    whole_p99: float
    held_most: int
    preemptions: int
    cached_share: float

    @property
    def j(self) -> float:
        """Mean whole latency and ten times the mean first token."""
        return self.whole_mean + 10.0 * self.first_mean

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "j": self.j}


class DispatchWorld:
    """One run: build it, give it its loadbalancers, call `run` once."""

    def __init__(
        self,
        fleet: ServerFleet,
        requests: Sequence[DispatchRequest],
        rng: random.Random,
        *,
        fresh: bool = False,
        report_s: float = 1.0,
    ) -> None:
        """requests: by arrival. fresh: reports before every decision, else each report_s."""
        self.fleet = fleet
        self.now = 0.0
        self.routers: list[Dispatcher] = []
        self._requests = requests
        self._rng = rng
        self._fresh = fresh
        self._report_s = report_s
        self._heap: list[tuple[float, int, Callable[[], None] | int, int]] = []
        self._counter = count()
        if not fleet.live:
            fleet.live.extend(SteppedModelServer(timing, every_token=False) for timing in fleet.timings)
        self._wake_no = [0] * len(fleet)
        self._wake_at = [float("inf")] * len(fleet)
        self._there: dict[str, DispatchRequest] = {}
        self._left = len(requests)
        self._stuck_at = requests[-1].at + STUCK_S
        self._held_most = 0

    def later(self, at: float, what: Callable[[], None]) -> None:
        """Do that then."""
        heapq.heappush(self._heap, (at, next(self._counter), what, 0))

    def run(self) -> None:
        """Run until the last answer."""
        if not self._fresh:
            for server in range(len(self.fleet)):
                self._report_each(server, self._report_s * (server + 1) / len(self.fleet))
        heap, pop = self._heap, heapq.heappop
        following = iter(self._requests)
        request = next(following, None)
        while self._left:
            if request is not None and (not heap or heap[0][0] >= request.at):
                self.now = request.at
                self._arrive(request)
                request = next(following, None)
                continue
            at, _, what, number = pop(heap)
            if at > self._stuck_at:
                raise RuntimeError(f"{self._left} requests have no answer at {at:.0f} s: no rule sends them")
            if isinstance(what, int):
                if number == self._wake_no[what]:
                    self.now = at
                    self._wake_at[what] = float("inf")
                    self._look(what)
            else:
                self.now = at
                what()

    def _arrive(self, request: DispatchRequest) -> None:
        routers = self.routers
        router = routers[0]
        if len(routers) > 1:
            router = routers[request.come_to(self._rng.randrange(len(routers)))]
        if self._fresh:
            for server in range(len(self.fleet)):
                self._look(server)
                router.report(server, self.fleet.live[server], self.now)
        router.arrive(request, self.now)
        if router.held:
            self._held_most = max(self._held_most, sum(r.held for r in routers))

    def _report_each(self, server: int, at: float) -> None:
        def report() -> None:
            self._look(server)
            for router in self.routers:
                router.report(server, self.fleet.live[server], self.now)
                if router.held:
                    router.again(self.now)
            self._report_each(server, self.now + self._report_s)

        self.later(at, report)

    def send(self, request: DispatchRequest, server: int) -> None:
        """Give the request to that server, now."""
        request.give(server, self.now)
        name = str(request.number)
        self._there[name] = request
        for router in self.routers:
            router.happened(request, self.now, end=False)
        live = self.fleet.live[server]
        events = live.submit(name, request.prompt, request.output, self.now, request.blocks, BLOCK_TOKENS)
        self._happened(events)
        self._wake_for(server)

    def _look(self, server: int) -> None:
        events = self.fleet.live[server].advance(self.now)
        if events:
            self._happened(events)
            self._wake_for(server)
        elif self._wake_at[server] == float("inf"):
            self._wake_for(server)

    def _wake_for(self, server: int) -> None:
        at = self.fleet.live[server].next_change()
        if at is None:
            self._wake_at[server] = float("inf")
            self._wake_no[server] += 1
        elif at != self._wake_at[server]:
            self._wake_at[server] = at
            self._wake_no[server] += 1
            heapq.heappush(self._heap, (at, next(self._counter), server, self._wake_no[server]))

    def _happened(self, events: list[ServerEvent]) -> None:
        for at, name, kind, _ in events:
            if kind is EventKind.TOKENS:
                request = self._there[name]
                if request.make_token(at):
                    self.routers[request.router].first_token(request, at)
            elif kind is EventKind.FINISHED:
                request = self._there.pop(name)
                request.end(at)
                self._left -= 1
                self.routers[request.router].ended(request, at)
                for router in self.routers:
                    router.happened(request, at, end=True)
        if events:
            for router in self.routers:
                if router.held:
                    router.again(self.now)

    def score(self, from_s: float = 0.0, first: int = 0) -> DispatchScore:
        """Return the score of the requests from the `first` on that came at from_s or later."""
        counted = [request for request in self._requests[first:] if request.at >= from_s]
        firsts = [request.first_at - request.at for request in counted]
        wholes = [request.ended_at - request.at for request in counted]
        first_p50, first_p95, first_p99 = quantiles(firsts)
        whole_p50, whole_p95, whole_p99 = quantiles(wholes)
        live = self.fleet.live
        read = sum(server.prompt_tokens_total for server in live)
        return DispatchScore(
            requests=len(counted),
            first_mean=sum(firsts) / len(firsts),
            first_p50=first_p50,
            first_p95=first_p95,
            first_p99=first_p99,
            whole_mean=sum(wholes) / len(wholes),
            whole_p50=whole_p50,
            whole_p95=whole_p95,
            whole_p99=whole_p99,
            held_most=self._held_most,
            preemptions=sum(server.preemptions for server in live),
            cached_share=sum(server.cached_tokens_total for server in live) / max(read, 1),
        )


def quantiles(values: Sequence[float]) -> list[float]:
    """Return, for each of the shares QUANTILES, the least value that this share is not above."""
    found: list[float] = np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
    return found
