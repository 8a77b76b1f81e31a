"""The LoadBalancer with its clock and the requests that are parked, on one thread."""

import asyncio
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import msgspec

from dispatch.answer_times import PRIORITIES
from dispatch.duration_histogram import DurationHistogram
from dispatch.lease import Lease
from dispatch.outside.hot_set import HotSetReader
from dispatch.outside.lease_answers import encode_lease, encode_leases
from dispatch.report_budget import OUT_S
from dispatch.route_request import Granted, QueuedRequest, RouteRefused, RouteRequest
from loadbalancer import LoadBalancer
from web.answers import JsonAnswer, error_answer, problem
from web.direct import Held
from web.messages.hot_set import HotSet
from web.messages.leases import DoneBody, PaceBody, WellAnswer, WellBody
from web.messages.reports import PushedReport, ReportTaken, read_report
from web.signatures import claimed_name, name_and_key, signer
from web.slices import in_slices

T = TypeVar("T")

log = logging.getLogger("loadbalancer")

GRANT_AT_ONCE = 64
"""Waiting requests that are given leases in one turn of the loop, some 5 ms: then answers are sent and other
requests have their turn. Of a burst the first are answered before the last are given theirs."""

WAIT_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper ends of the buckets by which waits of requests are counted, seconds."""

ROUTE_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""The same for the time that a lease takes to give, of which all others wait."""

REFUSALS = {
    "nothing_hot": "no instance is hot; {autoscaler}{waited}; ask again in {again_s} s",
    "all_busy": "every hot instance is at its capacity or not to be used; {waited}; ask again in {again_s} s",
    "too_many_unused": "{unused[0]} leases with the room of {unused[1]:.2g} instances are yours and unused, "
    "and others ask, too, or it is as many as may be: use them, or give them back with POST /done",
}
"""What a refused client is told, by RouteRefused.why."""

NO_FAULT = re.compile("status_4..")
"""How a request may fail through no fault of the instance: a token that is too old, a request that is wrong,
more than it can take. All else says that it refuses, times out or breaks."""

GAVE_UP = "first_byte"
"""What a client says that has given up waiting for the first byte of an answer."""

MISSED = frozenset(("no_connection", "no_tls", "wrong_certificate", "bad_address"))
"""What a client says that met nobody there, or somebody else: that we can look into ourselves."""

NOT_SIGNED = error_answer(401, "unauthorized", "wanted the signature of an instance that is hot")

SILENT_S = 10.0
"""Seconds without an answer of the autoscaler, which is asked each second, after which a client is told."""


class LoadBalancerService:
    """The LoadBalancer, its clock, and the parked requests. Belongs to the thread that first uses it.

    activity: set when something has happened after which instances may have to be asked. heard_at: when the
    autoscaler last said what is hot, or that it is still so. leased_waits: from a request's arrival to its
    lease, by priority; refused_waits: to its refusal. route_times: how long requests that did not wait took.
    """

    def __init__(self, balancer: LoadBalancer, clock: Callable[[], float]) -> None:
        """Serve with a LoadBalancer. clock: gives epoch seconds and never goes back."""
        self.clock = clock
        self.name = secrets.token_hex(8)  # of this process, for the autoscaler
        self.heard_at: float | None = None
        self.autoscaler_problem: str | None = None
        self.activity = asyncio.Event()
        self.reader = HotSetReader()
        self.route_times = DurationHistogram(ROUTE_S)
        self.leased_waits = [DurationHistogram(WAIT_S) for _ in range(PRIORITIES)]
        self.refused_waits = DurationHistogram(WAIT_S)
        self._leased_after = [one.add for one in self.leased_waits]
        self._refused_after = self.refused_waits.add
        self._balancer = balancer
        self._model = ""  # of the hot set
        self._describing = asyncio.Lock()  # one page of all instances at a time
        self._parked: dict[QueuedRequest, Held] = {}
        self._serving = False  # the next turn of the loop goes on serving
        self._signers: dict[str, int] = {}  # what an instance calls itself -> its id
        self._signing_keys: dict[str, str] = {}
        self._out: dict[int, float] = {}  # instances that said too much -> until when they were out last
        self._thread: int | None = None

    @property
    def balancer(self) -> LoadBalancer:
        """The LoadBalancer; getting it raises RuntimeError in any thread but the first that did."""
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        elif self._thread != here:
            raise RuntimeError("the loadbalancer's state belongs to the thread of the event loop")
        return self._balancer

    async def status(self, _accept: str = "") -> JsonAnswer:
        """Answer GET /status with all that an operator may see: everything but tokens and keys."""
        head, rows = await self.described(lambda row: msgspec.Raw(msgspec.json.encode(row)))
        return JsonAnswer(msgspec.json.encode(head | {"instances": rows}))

    async def described(self, keep: Callable[[dict[str, Any]], T]) -> tuple[dict[str, Any], list[T]]:
        """Return what an operator may see of the whole, and `keep` of what may be seen of each instance.

        10,000 instances take 0.1 s, in which requests are answered.
        """
        async with self._describing:
            now = self.clock()
            rows = [keep(row) async for row in in_slices(self.balancer.describe_instances(now))]
            return self._head(self.clock()), rows

    def _head(self, now: float) -> dict[str, Any]:
        return {
            "loadbalancer": self.name,
            "heard_of_autoscaler_s_ago": None if self.heard_at is None else round(now - self.heard_at, 1),
            "autoscaler_problem": self.autoscaler_problem,
            **self.balancer.describe(now),
        }

    # -- clients --

    def route(self, ask: RouteRequest | None, wait_s: float, count: int | None = None) -> JsonAnswer | Held:
        """Answer POST /route with leases or a refusal, or park the request for up to wait_s seconds.

        ask: the request; None where the model can never take its prompt. count: how many leases at most, and
        at least one; None: one.
        """
        begun = time.perf_counter()
        if ask is None:
            hot_set = self.balancer.instances.hot_set
            most = hot_set.max_model_len if hot_set else 0
            why = f"the prompt is too long: the model takes {most} tokens with the answer"
            return error_answer(400, "prompt_too_long", why)
        self.activity.set()
        self.serve_waiting()
        now = self.clock()
        outcome = self.balancer.request(ask, wait_s, count, now)
        if isinstance(outcome, QueuedRequest):
            return self._park(outcome, wait_s)
        if isinstance(outcome, Granted):
            answer = self._granted(outcome.leases, count, now)
            self._leased_after[ask.priority](0.0)
        else:
            why_now = "as many wait as may" if wait_s > 0.0 else "wait_s would let it wait"
            answer = self._refused(outcome, why_now)
            self._refused_after(0.0)
        self.route_times.add(time.perf_counter() - begun)
        return answer

    def done(self, said: DoneBody, client: str) -> JsonAnswer:
        """Answer POST /done, by which a client says how the request of its lease ended."""
        why, now, balancer = said.why or "", self.clock(), self.balancer
        failed, lease = said.outcome == "failed", balancer.leases.get(said.request_id)
        if failed and why == GAVE_UP:
            balancer.paces.give_up(said.request_id, client, now)
        known = balancer.leases.belongs(said.request_id, client) and balancer.end_lease(
            said.request_id, said.outcome, now, blame=not NO_FAULT.fullmatch(why), missed=why in MISSED
        )
        if known and failed:
            traced = f" trace {lease.trace}" if lease is not None and lease.trace else ""
            log.warning(
                "a client's request %s%s failed: %s", said.request_id, traced, why or "no reason given"
            )
        self.activity.set()
        self.serve_waiting()
        return JsonAnswer({})

    def pace(self, told: PaceBody, client: str) -> JsonAnswer:
        """Answer POST /pace, by which a client says how fast answers came."""
        paces, now = self.balancer.paces, self.clock()
        for one in told.answers:
            paces.hear(one.request_id, client, one.first_s, one.rest_s, one.pieces, now)
        return JsonAnswer({})

    def well(self, asked: WellBody, _client: str) -> JsonAnswer:
        """Answer POST /well: which of the instances asked about answer nothing any more, and why."""
        why = {one: self.balancer.instances.why_out(one) for one in asked.instances}
        return JsonAnswer(WellAnswer({one: word for one, word in why.items() if word is not None}))

    def serve_waiting(self) -> None:
        """Give leases to the waiting requests that find room: some now, others in the loop's next turns."""
        if self._serving or not self.balancer.queue.held:
            return
        self._serve_some()
        while self.balancer.queue.cut:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # under another server, or in a test
                self._serve_some()
            else:
                self._serving = True
                loop.call_soon(self._serve_on)
                return

    def _serve_on(self) -> None:
        self._serving = False
        self.serve_waiting()

    def _serve_some(self) -> None:
        now = self.clock()
        for queued, leases in self.balancer.grant(now):
            self._leased_after[queued.ask.priority](now - queued.since)
            for lease in leases:
                lease.note_wait(now - queued.since)
            answer = self._granted(leases, queued.count, now)
            self._parked.pop(queued).answer(answer, partial(self._take_back, leases))

    def _park(self, queued: QueuedRequest, wait_s: float) -> Held:
        def leave() -> None:
            self._parked.pop(queued, None)
            self.balancer.cancel(queued)

        def time_out() -> JsonAnswer:
            self._parked.pop(queued, None)
            now = self.clock()
            self._refused_after(now - queued.since)
            return self._refused(self.balancer.time_out(queued, now), f"the request waited {wait_s:g} s")

        held = self._parked[queued] = Held(wait_s, time_out, leave)
        return held

    def _refused(self, refused: RouteRefused, waited: str) -> JsonAnswer:
        """Return the answer to a refused request. waited: what waiting did, or would have done, as text."""
        message = REFUSALS[refused.why].format(
            autoscaler=self._news_of_autoscaler(),
            waited=waited,
            unused=refused.unused,
            again_s=math.ceil(refused.retry_after_s),
        )
        status = 429 if refused.why == "too_many_unused" else 503
        said = problem(status, refused.why, message, retry_after_s=round(refused.retry_after_s, 1))
        return JsonAnswer(said, status, (("Retry-After", str(math.ceil(refused.retry_after_s))),))

    def _news_of_autoscaler(self) -> str:
        """Return a text about the autoscaler: whether it has heard that an instance is wanted."""
        if self.heard_at is None:
            return "no autoscaler has answered since the loadbalancer started, its operator must start one; "
        silent_s = self.clock() - self.heard_at
        if silent_s > SILENT_S:
            return f"the autoscaler has not answered for {silent_s:.0f} s, its operator must see to it; "
        return "the autoscaler has been told; "

    def _take_back(self, leases: list[Lease]) -> None:
        for lease in leases:
            self.balancer.end_lease(lease.request_id, "unused", self.clock())

    def _granted(self, leases: list[Lease], count: int | None, now: float) -> JsonAnswer:
        """Return the answer with one lease, or with a batch of leases where a count was asked for."""
        if count is None:
            return JsonAnswer(encode_lease(leases[0], self._model, now))
        return JsonAnswer(encode_leases(leases, self._model, now))

    async def model(self, _accept: str = "") -> JsonAnswer:
        """Answer GET /model: which model the fleet serves, also when no instance is hot."""
        hot_set = self.balancer.instances.hot_set
        if hot_set is None:
            why = f"no hot set has come; {self._news_of_autoscaler()}ask again"
            return error_answer(503, "not_ready", why, ("Retry-After", "1"))
        return JsonAnswer({"model": hot_set.model, "max_model_len": hot_set.max_model_len})

    # -- autoscaler and instances --

    async def take_hot_set(self, hot: HotSet) -> bool:
        """Take over a hot set in slices, between which requests are answered; False when it is too old."""
        steps = self._take_over(hot)
        if steps is None:
            return False
        async for _ in in_slices(steps):
            pass
        return True

    def hot_set(self, hot: HotSet) -> bool:
        """Take over a hot set in one go; False when it is older than what is known."""
        steps = self._take_over(hot)
        if steps is None:
            return False
        for _ in steps:
            pass
        return True

    def _take_over(self, hot: HotSet) -> Iterator[None] | None:
        steps = self.balancer.begin_hot_set(hot, self.clock())
        return None if steps is None else self._finish_hot_set(hot, steps)

    def _finish_hot_set(self, hot: HotSet, steps: Iterator[None]) -> Iterator[None]:
        before = self.balancer.instances.hot_set
        yield from steps
        signers: dict[str, int] = {}
        keys: dict[str, str] = {}
        for inst in hot.instances:
            name, key = name_and_key(inst.master_token)
            signers[name], keys[name] = inst.id, key
            yield
        if not self.balancer.instances.takes(hot):
            return  # a newer one has come meanwhile
        self._signers, self._signing_keys = signers, keys
        self._model = hot.model
        self.confirm_hot_set()
        self.activity.set()
        if before is None or (before.epoch, before.version) != (hot.epoch, hot.version):
            draining = sum(i.draining for i in hot.instances)
            log.info(
                "hot set %s/%d: %d hot, %d draining",
                hot.epoch[:8],
                hot.version,
                len(hot.instances) - draining,
                draining,
            )
        self.serve_waiting()

    def note_autoscaler(self, problem: str | None) -> None:
        """Note why the last exchange with the autoscaler failed, for GET /status; None: it did not fail."""
        self.autoscaler_problem = problem

    def confirm_hot_set(self) -> None:
        """Note that the autoscaler says now that the hot set known here is the present one."""
        self.heard_at = self.clock()

    def report_refusal(self, authorization: str | None) -> JsonAnswer | None:
        """Refuse a pushed report before its body is read, if it names no hot instance; None: read it.

        authorization: the request's header of that name.
        """
        return None if claimed_name(authorization) in self._signing_keys else NOT_SIGNED

    def tell_out(self, instance_id: int) -> None:
        """Log that an instance is not listened to any more, once each time that it said too much."""
        inst = self.balancer.instances.by_id.get(instance_id)
        if inst is None or (why := inst.reports.budget.reason(self.clock())) is None:
            return
        until = inst.reports.budget.out_until
        if self._out.get(instance_id) != until:
            self._out[instance_id] = until
            log.warning("instance %d is out for %g s: %s", instance_id, OUT_S, why)

    def report(self, raw: bytes, authorization: str | None) -> JsonAnswer:
        """Take in a report that an instance pushed, if its signature is right; answer when the next may come.

        raw: the body. authorization: the request's header of that name.
        """
        name = signer(authorization, "/report", raw, self._signing_keys)
        if name is None:
            return NOT_SIGNED
        report = read_report(raw, PushedReport)
        instance_id = self._signers[name]
        next_in_s = self.balancer.pushed(instance_id, report, self.clock())
        if next_in_s is None:
            self.tell_out(instance_id)
            return error_answer(409, "not_now", "of a boot that is not known here, or heard before")
        if any(end.status == "failed" for end in report.ended):
            self.activity.set()  # the instance may be in doubt
        if not report.model_up:
            log.warning("instance %d says that its model server is down: it gets no requests", instance_id)
        self.serve_waiting()
        return JsonAnswer(ReportTaken(round(next_in_s, 3)))
