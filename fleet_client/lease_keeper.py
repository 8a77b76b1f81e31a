"""The leases of one transport: those at hand, and the ends of leases that the loadbalancer is to be told.

A request takes a lease at hand or asks for one; everything else can wait and is a `LoadbalancerJob`, which a
transport performs beside its requests, in tasks or in a thread:

    fetch a batch of leases ahead      POST /route with `count`     none left: those that come go back
    tell how a lease ended             POST /done                   failed: why; unused: it goes back
    tell how fast answers came         POST /pace                   seconds and pieces of some

Only failed and unused leases are told: the instance itself reports the ends of requests that it has served.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fleet_client.answer_pace import AnswerPace, PaceLog
from fleet_client.call import Call
from fleet_client.leases import PRIORITIES, ClientLease, Posted, Refusal, done_body, read_batch, route_body
from fleet_client.leases_ahead import LeasesAhead
from fleet_client.options import FleetOptions
from fleet_client.prefix_hashes import Served
from fleet_client.reply import HttpReply

ENDS_KEPT = 10_000
"""Most ends of leases that wait to be told."""

PACE_ROUTE = "/pace"
"""Where the loadbalancer is told how fast answers came."""

BATCH_S, DONE_S = 5.0, 5.0
"""Seconds that a POST /route for a batch, and a POST /done, may take."""


@dataclass(frozen=True, slots=True)
class LoadbalancerJob:
    """A message that a transport is to POST to the loadbalancer, beside its requests.

    begun: when the job was handed out. wanted: leases of a batch; 0: the message tells the end of a lease, or
    how fast answers came.
    """

    path: str
    body: Mapping[str, Any]
    limit_s: float
    begun: float
    wanted: int = 0


class LeaseKeeper:
    """Keeps one transport's leases at hand, which instance has read which prefix, and the waiting jobs.

    lock: held whenever anything changes, so that threads may share it. wake: called with the lock held when
    there may be a job.
    """

    def __init__(
        self, options: FleetOptions, lock: AbstractContextManager[Any], wake: Callable[[], None]
    ) -> None:
        """Start without leases and jobs."""
        self.options = options
        self.untold = 0  # ends of leases that the loadbalancer did not take in
        self._wake = wake
        self.start_anew(lock)

    def start_anew(self, lock: AbstractContextManager[Any]) -> None:
        """Forget all leases and jobs, in a fork, where they are the parent's, or in a new event loop."""
        self._lock = lock
        self._ahead = LeasesAhead(self.options.ahead)
        self._served = Served()
        self._ends: deque[tuple[ClientLease, str, str]] = deque()
        self._paces = PaceLog()
        self._over = False

    def __str__(self) -> str:
        """Return how many fetched leases are unused, in words; "" where none are fetched ahead."""
        return f"{len(self._ahead)} leases ahead, {self._ahead.coming} coming" if self._ahead.most else ""

    @property
    def at_hand(self) -> int:
        """How many leases were fetched ahead and are not used yet."""
        return len(self._ahead)

    # -- what a request asks of it

    def may_take(self, call: Call) -> bool:
        """Return whether a call may take leases at hand; with them low priority would pass others by."""
        own = self.options.priority
        return self._ahead.most > 0 and PRIORITIES.index(call.priority or own) <= PRIORITIES.index(own)

    def first(self, call: Call, now: float) -> tuple[ClientLease | None, bool]:
        """Return (a lease at hand or None, whether /route should be asked for one nearer to the prefix).

        Where it should, no lease counts as used: those that only ever lie at hand go back.
        """
        with self._lock:
            near = self._served.blocks(call.affinity) if len(self._ahead) else {}
            if self._ahead.better_asked(len(call.affinity), near, call.avoid, now):
                return None, True
            lease = self._ahead.take(call.size, now, call.avoid, near)
            if lease is not None:
                self._wake()  # else when it has one: a batch must not take what it is waiting for
            return lease, False

    def another(self, call: Call, avoid: Collection[int], now: float) -> ClientLease | None:
        """Take a lease at hand for another try of a call, on none of these instances; None without one."""
        with self._lock:
            lease = self._ahead.take(call.size, now, avoid, self._served.blocks(call.affinity))
            self._wake()
            return lease

    def refill(self) -> None:
        """Have leases fetched, because a request found none at hand and has got one otherwise."""
        with self._lock:
            self._wake()

    def note_route_time(self, took_s: float) -> None:
        """Note how long POST /route took to answer when it was not asked to wait."""
        with self._lock:
            self._ahead.answered(took_s)

    def note_answer(self, call: Call, reply: HttpReply) -> None:
        """Note that the instance that answered has read the call's prompt, and may have it in memory now."""
        if self._ahead.most and call.affinity and reply.status == 200 and reply.lease is not None:
            with self._lock:
                self._served.note(call.affinity, reply.lease.instance_id)

    def tell(self, lease: ClientLease, outcome: str, why: str = "") -> None:
        """Queue a job that tells the loadbalancer how a lease ended: failed (why), or unused."""
        with self._lock:
            if self._over or len(self._ends) >= ENDS_KEPT:
                self.untold += 1
            else:
                self._ends.append((lease, outcome, why))
            if outcome == "failed":
                self._give_back(self._ahead.leave(lease.instance_id))
            if not self._over:
                self._wake()

    def note_pace(self, lease: ClientLease, pace: AnswerPace, now: float) -> None:
        """Note how fast the answer to a lease's request came, which the loadbalancer is told soon."""
        with self._lock:
            if not self._over and self._paces.add(pace.told(lease.request_id), now):
                self._wake()

    def _give_back(self, leases: Iterable[ClientLease]) -> None:
        self._ends.extend((lease, "unused", "") for lease in leases)

    # -- jobs

    def next_job(self, now: float, *, ends: bool = True) -> LoadbalancerJob | None:
        """Return a job that is due now, or None. ends: whether it may tell the end of a lease."""
        with self._lock:
            self._give_back(self._ahead.sweep(now))
            if wanted := self._ahead.want(now):
                body = route_body(self._ahead.typical, 0.0, count=wanted, priority=self.options.priority)
                return LoadbalancerJob("/route", body, BATCH_S, now, wanted)
            if ends and self._ends:
                return LoadbalancerJob("/done", done_body(*self._ends.popleft()), DONE_S, now)
            if ends and (paces := self._paces.take(now)):
                return LoadbalancerJob(PACE_ROUTE, {"answers": paces}, DONE_S, now)
            return None

    def finish_job(self, job: LoadbalancerJob, came: Posted | Refusal, now: float) -> None:
        """Take in what the loadbalancer answered to a job."""
        with self._lock:
            if job.path == PACE_ROUTE:
                if not isinstance(came, Refusal) and came[0] in (404, 405):
                    self._paces.refuse(now)
            elif not job.wanted:
                self.untold += isinstance(came, Refusal) or came[0] != 200
            else:
                self._ahead.answered(now - job.begun)
                said = came if isinstance(came, Refusal) else read_batch(*came, now)
                if isinstance(said, Refusal):
                    self._ahead.refused(job.wanted, said.retry_after_s, now)
                else:
                    self._give_back(self._ahead.arrived(said, job.wanted, now))
            if not self._over:
                self._wake()

    def look_in_s(self, now: float) -> float | None:
        """Return in how many seconds a job may become due by itself; None: not before a request."""
        with self._lock:
            looks = self._ahead.look_in_s(now), self._paces.look_in_s(now)
            return min((one for one in looks if one is not None), default=None)

    # -- the end

    def give_all_back(self) -> None:
        """Fetch no more leases; queue jobs that give back those at hand."""
        with self._lock:
            self._paces.clear()
            self._give_back(self._ahead.close())
            if self._ends:
                self._wake()

    def abandon(self) -> None:
        """Drop the ends of leases that the loadbalancer was not told, and make no more jobs."""
        with self._lock:
            self._over = True
            self.untold += len(self._ends)
            self._ends.clear()
            self._paces.clear()
