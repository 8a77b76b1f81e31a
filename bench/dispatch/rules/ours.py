"""The real `LoadBalancer`, driven through its public interface as loadbalancer_server.py and instances do.

An instance's report has what it has written down since the last one; with pushes it also says so by itself,
when something began or ended, no more often than it is told to, and a client says at once when it
has its answer. Polls only: nothing but the reports.
"""

import random
from collections.abc import Sequence
from itertools import count

from bench.dispatch.rules.rule import BLOCK_TOKENS, DispatchRequest, ServerFleet
from bench.dispatch.rules.world import Later, Send
from dispatch.chooser import FIRST_TOKEN_WEIGHT
from dispatch.lease import Lease
from dispatch.load_reports import Poll
from dispatch.prefix_cache import AFFINITY_BLOCK_TOKENS
from dispatch.route_request import Granted, QueuedRequest, RouteRequest
from engine.reference import SteppedModelServer
from engine.step_time_constants import Timing
from loadbalancer import LoadBalancer
from simulation.virtual.instances import PUSH_S, TOKEN_LIFE_S
from simulation.virtual.setting import BEAT_S
from simulation.virtual.users import GRANT_S
from web.messages.hot_set import HotInstance, HotSet, HotTiming
from web.messages.reports import LoadReport, PushedReport, RequestEnd, TokenBatch

AMPLE = 50.0
"""Without holding an instance is told to hold so many times what fits its memory."""

PREFILL_WEIGHT = 0.1

BYTES_A_TOKEN, ENVELOPE_BYTES = (3.0, 6.0), 200
"""Of a request: English takes 4 to 5 bytes a token, code and other languages less or more."""

GOLDEN_RATIO = 0.6180339887498949


class _UnreportedEvents:
    """What one instance has not told this loadbalancer yet, as an instance keeps it."""

    def __init__(self, told: HotInstance) -> None:
        self.told = told
        self.boot_id = f"boot-{told.id}"
        self.started: list[str] = []
        self.started_bytes: list[int] = []
        self.ended: list[RequestEnd] = []
        self.seq = self.after = self.number = 0
        self._push_due = False
        self._next_push_at = 0.0

    def note_start(self, name: str, size: int) -> None:
        """Write down that a request of that many bytes has begun."""
        self.seq += 1
        self.started.append(name)
        self.started_bytes.append(size)

    def note_end(self, end: RequestEnd) -> None:
        """Write down that a request has ended."""
        self.seq += 1
        self.ended.append(end)

    def push_at(self, now: float) -> float | None:
        """Return when the events are to be pushed; None where a push is due already."""
        if self._push_due:
            return None
        self._push_due = True
        return max(now + PUSH_S, self._next_push_at)

    def push(self) -> PushedReport | None:
        """Return what is pushed now; None where all has been told."""
        self._push_due = False
        if not (self.started or self.ended):
            return None
        self.number += 1
        return PushedReport(
            self.boot_id,
            self.number,
            self.after,
            self.seq,
            False,
            self.started,
            self.ended,
            True,
            self.started_bytes,
        )

    def pushed(self, next_at: float) -> None:
        """Begin anew after a push; the next one may come at next_at."""
        self.reported()
        self._next_push_at = next_at

    def reported(self) -> None:
        """Begin anew: all has been told."""
        self.after = self.seq
        self.started, self.started_bytes, self.ended = [], [], []


class Ours:
    """One loadbalancer of ours."""

    def __init__(
        self,
        fleet: ServerFleet,
        rng: random.Random,
        send: Send,
        later: Later,
        number: int,
        *,
        pushes: bool = True,
        holds: bool = False,
        weight: float = FIRST_TOKEN_WEIGHT,
        late_bound_s: float | None = None,
        told: Sequence[Timing] | None = None,
    ) -> None:
        """number: which loadbalancer. told: the timings it is told, the true ones if None."""
        self.balancer = LoadBalancer(
            rng,
            request_id=lambda token: token,
            max_held=1_000_000,
            late_bound_s=late_bound_s,
            first_token_weight=weight,
        )
        self._fleet = fleet
        self._send = send
        self._later = later
        self._number = number
        self._pushes = pushes
        self._tokens = count()
        self._waiting: dict[QueuedRequest, DispatchRequest] = {}
        self._ids: dict[int, str] = {}
        self._granting = False
        self._grant_due = False
        self._grant_s = GRANT_S[0]
        hot = _hot_instances(fleet, told, holds=holds)
        self._instances = [_UnreportedEvents(one) for one in hot]
        self.balancer.update_hot_set(
            HotSet("bench", 1, "vllm-13", PREFILL_WEIGHT, fleet.mean_output, None, tuple(hot)), 0.0
        )
        self._refill(0.0)
        self._later(BEAT_S, lambda: self._beat(BEAT_S))

    @property
    def held(self) -> int:
        """Who waits here."""
        return len(self._waiting)

    def _refill(self, now: float) -> None:
        while refills := self.balancer.refills(now):
            for refill in refills:
                instance = self._instances[refill.instance_id - 1]
                first = next(self._tokens)
                names = [f"{self._number}.{refill.instance_id}.{first}.{n}" for n in range(refill.count)]
                load = LoadReport(instance.boot_id, instance.seq, (), (), 0, 0, True, 0, 0)
                batch = TokenBatch(names, instance.boot_id, TOKEN_LIFE_S, load)
                self.balancer.complete_refill(refill, batch, now)

    def _beat(self, now: float) -> None:
        self.balancer.tick(now)
        self._refill(now)
        self.again(now)
        self._later(now + BEAT_S, lambda: self._beat(now + BEAT_S))

    def arrive(self, request: DispatchRequest, now: float) -> None:
        """Route it, or hold it."""
        balancer = self.balancer
        ask = RouteRequest(
            balancer.work_of(request.prompt, None),
            None,
            (),
            request.prompt,
            hashes(request) if request.blocks else (),
        )
        self.again(now)
        answer = balancer.request(ask, 1e12, None, now)
        if isinstance(answer, Granted):
            self._send_with(answer.leases[0], request)
        elif isinstance(answer, QueuedRequest):
            self._waiting[answer] = request
            self._grant_soon(now)
        else:
            raise RuntimeError("the queue is full")  # noqa: TRY004 a value, not a type

    def _send_with(self, lease: Lease, request: DispatchRequest) -> None:
        self._ids[request.number] = lease.request_id
        self._send(request, lease.instance_id - 1)

    def _grant_soon(self, now: float) -> None:
        if not self._grant_due:
            self._grant_due = True
            at = now + self._grant_s
            self._later(at, lambda: self._grant_again(at))

    def _grant_again(self, now: float) -> None:
        self._grant_due = False
        self._grant_s = min(GRANT_S[1], 2.0 * self._grant_s)
        self.again(now)
        if self._waiting:
            self._grant_soon(now)

    def again(self, now: float) -> None:
        """Serve those that may be served now."""
        if not self._waiting or self._granting:
            return
        self._granting = True
        for queued, leases in self.balancer.grant(now):
            self._grant_s = GRANT_S[0]
            self._send_with(leases[0], self._waiting.pop(queued))
        self._granting = False

    def first_token(self, request: DispatchRequest, now: float) -> None:
        """Do nothing: answers do not pass through a loadbalancer."""

    def ended(self, request: DispatchRequest, now: float) -> None:
        """Have the client say so."""
        if self._pushes:
            self.balancer.end_lease(self._ids[request.number], "finished", now)

    def happened(self, request: DispatchRequest, now: float, *, end: bool) -> None:
        """Have the instance write it down, and report it soon."""
        instance = self._instances[request.server]
        # Another loadbalancer's requests have names of theirs.
        name = self._ids.get(request.number) or f"{request.router}.{request.number}"
        if end:
            instance.note_end(RequestEnd(name, "finished", request.output))
            self._ids.pop(request.number, None)
        else:
            instance.note_start(name, body_bytes(request))
        if self._pushes and (at := instance.push_at(now)) is not None:
            self._push_later(instance, at)

    def _push_later(self, instance: _UnreportedEvents, at: float) -> None:
        self._later(at, lambda: self._push(instance, at))

    def _push(self, instance: _UnreportedEvents, now: float) -> None:
        push = instance.push()
        if push is None:
            return
        wait_s = self.balancer.pushed(instance.told.id, push, now)
        instance.pushed(now + (wait_s or 0.0))
        self.again(now)

    def report(self, server: int, live: SteppedModelServer, now: float) -> None:
        """Poll the instance and take in its answer."""
        instance = self._instances[server]
        load = LoadReport(
            instance.boot_id,
            instance.seq,
            instance.started,
            instance.ended,
            live.running,
            live.waiting,
            True,
            live.prompt_tokens_total,
            live.generation_tokens_total,
            started_bytes=instance.started_bytes,
        )
        instance.reported()
        self.balancer.complete_poll(Poll(instance.told, instance.after), load, now)


def _hot_instances(fleet: ServerFleet, told: Sequence[Timing] | None, *, holds: bool) -> list[HotInstance]:
    """Return the servers as the hot set has them. told: the timings it is told, the true ones if None."""
    mean_work = PREFILL_WEIGHT * fleet.mean_prompt + fleet.mean_output
    hot = []
    for n, (timing, rate) in enumerate(zip(told or fleet.timings, fleet.requests_s, strict=True)):
        fits = timing.kv_tokens / (fleet.mean_prompt + 0.5 * fleet.mean_output) * mean_work
        off = 1.0 if told is None else fleet.timings[n].a / timing.a
        hot.append(
            HotInstance(
                id=n + 1,
                state="hot",
                address=f"10.0.0.{n + 1}:80",
                auth_url=f"http://10.0.0.{n + 1}:81",
                master_token="",
                throughput_work_s=rate * mean_work * off,
                capacity_work=fits * (1.0 if holds else AMPLE),
                timing=HotTiming.of(timing),
            )
        )
    return hot


def body_bytes(request: DispatchRequest) -> int:
    """Return its length in JSON. What a token takes differs from text to text, evenly."""
    least, most = BYTES_A_TOKEN
    chance = request.number * GOLDEN_RATIO % 1.0  # each its own, and the same for all loadbalancers
    return round(ENVELOPE_BYTES + request.prompt * (least + chance * (most - least)))


def hashes(request: DispatchRequest) -> list[str]:
    """Return one for each AFFINITY_BLOCK_TOKENS of the prompt: a block's id for each of its parts."""
    parts = BLOCK_TOKENS // AFFINITY_BLOCK_TOKENS
    return [f"{block}.{part}" for block in request.prefix for part in range(parts)]
