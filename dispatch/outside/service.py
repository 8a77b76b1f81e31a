"""The loadbalancer's state with its clock and the requests that are parked, on one thread."""

import asyncio
import logging
import math
import secrets
import threading
from collections.abc import Callable
from functools import partial

from dispatch.outside.hot_set import HotSetReader
from dispatch.outside.lease_answers import encode_lease, encode_leases
from dispatch.types import Ask, Lease, Waiter
from loadbalancer import LoadBalancer
from web.answers import JsonAnswer, error_answer
from web.direct import Held
from web.messages.decoding import decode
from web.messages.hot_set import HotSet
from web.messages.reports import PushedReport
from web.signatures import name_and_key, signer

log = logging.getLogger("loadbalancer")


GRANT_AT_ONCE = 64
"""So many of those who wait are given leases in one turn of the loop, some 5 ms: then answers are sent and
other requests have their turn. Of a burst the first are answered before the last are given theirs."""


# -- the state of the process ----------------------------------------------------------------------------


class Desk:
    """The LoadBalancer, the clock, and those who are parked. Belongs to the thread that first uses it."""

    def __init__(self, balancer: LoadBalancer, clock: Callable[[], float]) -> None:
        """clock gives epoch seconds and never goes back."""
        self.clock = clock
        self.name = secrets.token_hex(8)  # of this process, for the autoscaler
        self.heard_at: float | None = (
            None  # when the autoscaler last said what is hot, or that it is still so
        )
        self._balancer = balancer
        self.stirred = asyncio.Event()  # something has happened after which there may be errands to do
        self._parked: dict[Waiter, tuple[Held, int | None]] = {}
        self._granting = False
        self.reader = HotSetReader()
        self._signers: dict[str, int] = {}  # what an instance calls itself -> its id
        self._signing_keys: dict[str, str] = {}
        self._thread: int | None = None

    @property
    def balancer(self) -> LoadBalancer:
        """The LoadBalancer; raises RuntimeError in a second thread."""
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        elif self._thread != here:
            raise RuntimeError("the loadbalancer's state belongs to the thread of the event loop")
        return self._balancer

    def route(self, ask: Ask, wait_s: float, count: int | None = None) -> JsonAnswer | Held:
        """A lease, a place in the line, or why not; with count up to so many leases, and at least one."""
        balancer, now = self.balancer, self.clock()
        self.stirred.set()
        after_s = balancer.over_allowance(ask, now)
        if after_s is not None:
            return self._too_many(ask, after_s)
        if balancer.line.held:
            self.serve_waiting()
        if count is None:
            lease = balancer.route(ask, now)
            given = [] if lease is None else [lease]
        else:
            given = balancer.lease_many(ask, count, now)
        # A batch is as many requests as it is given leases, and at least one.
        for _ in range(max(1, len(given))):
            balancer.arrived(ask)
        if given:
            return self._granted(given, count, now)
        waiter = balancer.hold(ask, now + wait_s, now) if wait_s > 0.0 else None
        return self._refused(ask) if waiter is None else self._park(waiter, wait_s, count)

    def serve_waiting(self) -> None:
        """Give leases to those who wait, as far as there is capacity.

        A few now, and on a loop the others in its next turns.
        """
        if self._granting or not self.balancer.line.held:
            return
        if not self._grant():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # under another server, or in a test
                while not self._grant():
                    pass
            else:
                self._granting = True
                loop.call_soon(self._grant_on)

    def _grant_on(self) -> None:
        self._granting = False
        self.serve_waiting()

    def _grant(self) -> bool:
        """Give leases to a few of those who wait; False when there may be more for others."""
        balancer, now = self.balancer, self.clock()
        batches: list[tuple[Waiter, Lease, Held, int]] = []
        for waiter, lease in balancer.grant(now, GRANT_AT_ONCE):
            held, count = self._parked.pop(waiter)
            if count is not None and count > 1:
                batches.append((waiter, lease, held, count))
            else:
                self._deliver(held, [lease], count, now)
        done = not balancer.line.cut
        for waiter, lease, held, count in batches:
            # Of a batch the first lease is as any; the others are for what those who wait leave.
            more = balancer.lease_many(waiter.ask, count - 1, now) if done else []
            for _ in more:
                balancer.arrived(waiter.ask)
            self._deliver(held, [lease, *more], count, now)
        return done

    def _deliver(self, held: Held, given: list[Lease], count: int | None, now: float) -> None:
        held.answer(self._granted(given, count, now), partial(self._take_back, given))

    def hot_set(self, hot: HotSet) -> bool:
        """Take over a hot set; False when it is older than what is known."""
        now = self.clock()
        before = self.balancer.epoch, self.balancer.version
        if not self.balancer.replace_hot(hot, now):
            return False
        self.heard_at = now
        self.stirred.set()
        named = {i.id: name_and_key(i.master_token) for i in hot.instances}
        self._signers = {name: i for i, (name, _) in named.items()}
        self._signing_keys = dict(named.values())
        if before != (hot.epoch, hot.version):
            draining = sum(i.draining for i in hot.instances)
            log.info(
                "hot set %s/%d: %d hot, %d draining",
                hot.epoch[:8],
                hot.version,
                len(hot.instances) - draining,
                draining,
            )
        self.serve_waiting()
        return True

    def report(self, raw: bytes, authorization: str | None) -> JsonAnswer:
        """An instance says by itself what has happened there."""
        name = signer(authorization, "/report", raw, self._signing_keys)
        if name is None:
            return error_answer(401, "unauthorized", "wanted the signature of an instance that is hot")
        push = decode(raw, PushedReport)
        instance_id = self._signers[name]
        next_in_s = self.balancer.pushed(instance_id, push, self.clock())
        if next_in_s is None:
            return error_answer(409, "not_now", "of a boot that is not known here, or heard before")
        if any(end.status == "failed" for end in push.ended):
            self.stirred.set()  # the instance may be in doubt
        if not push.model_up:
            log.warning("instance %d says that its model server is down: it gets no requests", instance_id)
        self.serve_waiting()
        return JsonAnswer({"next_in_s": round(next_in_s, 3)})

    def _park(self, waiter: Waiter, wait_s: float, count: int | None) -> Held:
        def leave() -> None:
            self._parked.pop(waiter, None)
            self.balancer.cancel(waiter)

        def late() -> JsonAnswer:
            leave()
            return self._refused(waiter.ask)

        held = Held(wait_s, late, leave)
        self._parked[waiter] = held, count
        return held

    def _take_back(self, given: list[Lease]) -> None:
        for lease in given:
            self.balancer.done(lease.request_id, "unused", self.clock())

    def _granted(self, given: list[Lease], count: int | None, now: float) -> JsonAnswer:
        """One lease, or with count several."""
        model = self._balancer.model
        if count is None:
            return JsonAnswer(encode_lease(given[0], model, now))
        return JsonAnswer(encode_leases(given, model, now))

    def _too_many(self, ask: Ask, after_s: float) -> JsonAnswer:
        leases, work = self.balancer.allowance.unused(ask.client)
        message = (
            f"{leases} leases of {work:.0f} work are yours and unused, and others ask, too, or it is as many "
            "as may be: use them, or give them back with POST /done"
        )
        return _again_later("too_many_unused", message, after_s, 429)

    def _refused(self, ask: Ask) -> JsonAnswer:
        why, after_s = self.balancer.refuse(ask, self.clock())
        message = {
            "nothing_hot": "no instance is hot; the fleet has been told",
            "all_busy": "every hot instance is at its capacity or not to be used; wait_s holds a request",
        }[why]
        return _again_later(why, message, after_s, 503)


def _again_later(error: str, message: str, after_s: float, status: int) -> JsonAnswer:
    said = {"error": error, "message": message, "retry_after_s": round(after_s, 1)}
    return JsonAnswer(said, status, (("Retry-After", str(math.ceil(after_s))),))
