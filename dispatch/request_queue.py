"""The requests that wait for a lease, in two lanes; within a lane, higher priority first, then as they came.

    comes ──► in time ──────────────► served first
                 │ cannot be in time any more
                 ▼
               late ──► served from what the others leave; overdue: before all others

A request that cannot be in time any more (engine/slo.py), by the work ahead of it when it came or because its
time has passed since, is late: in one lane a burst would spoil every request behind it until it is worked
off. A request that has been late for late_bound_s is overdue and goes before all others, so that none
starves.

Priority: a request stands in its lane as if it had come CLASS_S sooner (high) or later (low) than it did.

    rank = when it came + (-CLASS_S, 0, CLASS_S)[priority]        the lower goes first

So a request that comes more than 2 * CLASS_S after another can never go before it in its lane, whatever its
class and however many they are: none starves. It needs no counters and no weights, and within a class it is
first come, first served.

True after every call: no new request overtakes one of a lower rank that waits for room and can still be in
time, or is overdue. A pass looks at the requests that it serves, at the first that it does not, and at
ASIDE_FEW of those that stand aside; so it costs the same with five that wait and with 100,000.

How leases are given and whether there is room is not known here: grant and blocks take functions.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count as numbers

from dispatch.lease import Lease
from dispatch.route_request import QueuedRequest, RouteRequest

LATE_BOUND_S = 300.0
"""Most seconds that a late request waits while others are in time: in the study of the policies none waited
for much longer (docs/reference/policy-study.md), so the bound seldom costs another request its time."""

CLASS_S = 30.0
"""Seconds that a class of priority is worth. Far more than the seconds in which a request can be in time, so
that there a higher class always goes first; about what a stopped machine takes to serve, so that in a burst
it goes first until there is help; and a tenth of LATE_BOUND_S, so that no class waits much longer than
that."""

ASIDE_FEW = 32
"""Requests tried in one pass, in turns, of those that wait only because of the instances that they avoid."""

LOW_SHARE = 0.75
"""Most share of the places for low priority: filling the queue with it keeps no other request out."""

LOW = 2

Entry = tuple[float, int, QueuedRequest]
"""(rank, number, request): of equal rank the first to come goes first."""


class Lane:
    """The requests of one lane, the lowest rank first.

    aside: those for which there is room, but where they must not go.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.entries: list[Entry] = []  # a heap; requests that left stay until they would be served
        self.aside: deque[Entry] = deque()

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Go through the requests in order. It sorts: for operators and tests."""
        return (entry[2] for entry in sorted((*self.entries, *self.aside)) if not entry[2].over)

    def head(self) -> Entry | None:
        """Return the first request that does not stand aside."""
        while self.entries and self.entries[0][2].over:
            heappop(self.entries)
        return self.entries[0] if self.entries else None

    def trim(self, living: int) -> None:
        """Forget the requests that left when most entries are theirs, so that it costs O(1) for each."""
        if len(self.entries) + len(self.aside) > 2 * living + 64:
            self.entries = [e for e in self.entries if not e[2].over]
            heapify(self.entries)
            self.aside = deque(e for e in self.aside if not e[2].over)


@dataclass(slots=True)
class _Pass:
    """One pass of grant: what it was given, and what came of it."""

    now: float
    lease: Callable[[RouteRequest, bool], Lease | None]
    only_avoids: Callable[[RouteRequest], bool]
    most: int
    granted: list[tuple[QueuedRequest, Lease]] = field(default_factory=list)
    blocked: float = math.inf  # rank of the first request that found no room
    cut: bool = False

    def block(self, rank: float, *, cut: bool = False) -> None:
        """End the pass at a request of that rank."""
        self.blocked, self.cut = rank, cut


class RequestQueue:
    """The requests that wait. Counts are of now; turned_late is of requests that ever turned late.

    cut: the last pass ended because it had granted as many as it was to, not for want of room.
    """

    def __init__(self, most: int, late_bound_s: float | None) -> None:
        """Start empty. most: requests held at once. late_bound_s: None for one lane."""
        self.most = most
        self.late_bound_s = late_bound_s
        self.held = 0
        self.low = 0  # of those, of low priority
        self.work = 0.0
        self.prompt_tokens = 0
        self.late = 0
        self.turned_late = 0
        self.cut = False
        self.in_time_lane = Lane()
        self.late_lane = Lane()
        self._ahead = [0.0, 0.0, 0.0]  # work of the requests that can be in time, by priority
        self.came: deque[QueuedRequest] = deque()  # all, as they came
        self._numbers = numbers()
        self._blocked = math.inf  # a new request of this rank or a higher one must wait

    def ahead_of(self, priority: int) -> float:
        """Return the work that would be served before a request of that priority that came now."""
        return sum(self._ahead[: priority + 1])

    def hold(
        self,
        ask: RouteRequest,
        until: float,
        now: float,
        until_late_s: float,
        wait_s: float,
        *,
        blocks: bool,
        count: int | None = None,
    ) -> QueuedRequest | None:
        """Give a request a place in its lane, or None when as many are held as may be.

        until_late_s: how long it may wait and be in time. wait_s: how long it is expected to wait. blocks:
        whether those that come after it must wait, too (not if it only avoids the instances with room).
        """
        low = ask.priority == LOW
        if self.held >= self.most or (low and self.low >= LOW_SHARE * self.most):
            return None
        queued = QueuedRequest(ask, count, until, now, now + until_late_s)
        self._trim()
        self.held += 1
        self.low += low
        self.work += ask.work
        self.prompt_tokens += ask.prompt_tokens
        self.came.append(queued)
        entry = (rank(ask, now), next(self._numbers), queued)
        if self.late_bound_s is not None and wait_s > until_late_s:
            self._turn_late(entry)
        else:
            if blocks:
                self._blocked = min(self._blocked, entry[0])
            heappush(self.in_time_lane.entries, entry)
            self._ahead[ask.priority] += ask.work
        return queued

    def _turn_late(self, entry: Entry) -> None:
        entry[2].turn_late()
        heappush(self.late_lane.entries, entry)
        self.late += 1
        self.turned_late += 1

    def _trim(self) -> None:
        self.in_time_lane.trim(self.held - self.late)
        self.late_lane.trim(self.late)
        if len(self.came) > 2 * self.held + 64:
            self.came = deque(w for w in self.came if not w.over)

    def cancel(self, queued: QueuedRequest) -> None:
        """Let a request wait no more."""
        if queued.over:
            return
        queued.leave()
        self.held -= 1
        self.low -= queued.ask.priority == LOW
        self.work = self.work - queued.ask.work if self.held else 0.0
        self.prompt_tokens -= queued.ask.prompt_tokens
        if queued.late:
            self.late -= 1
        else:
            self._leave_ahead(queued)

    def _leave_ahead(self, queued: QueuedRequest) -> None:
        if self.held > self.late:
            left = self._ahead[queued.ask.priority] - queued.ask.work
            self._ahead[queued.ask.priority] = max(0.0, left)
        else:
            self._ahead = [0.0, 0.0, 0.0]

    def grant(
        self,
        now: float,
        lease: Callable[[RouteRequest, bool], Lease | None],
        only_avoids: Callable[[RouteRequest], bool],
        most: int | None = None,
    ) -> list[tuple[QueuedRequest, Lease]]:
        """Give leases to the requests that can be served now: the overdue, those in time, the late.

        lease is also told whether its request hurries: late, in one lane for all. A request that could be
        served but for the instances it avoids (only_avoids) lets the others pass. most: so many at once;
        `cut` says then that there may be more.
        """
        this = _Pass(now, lease, only_avoids, self.most if most is None else most)
        self._blocked = math.inf
        if self.held:
            if self._overdue(now) and not self._serve(self.late_lane, this, only_overdue=True):
                self._blocked = -math.inf
            elif self._serve(self.in_time_lane, this):
                self._serve(self.late_lane, this)  # new requests go before these, which get what is left
            else:
                self._blocked = this.blocked
        self.cut = this.cut
        return this.granted

    def _serve(self, lane: Lane, this: _Pass, *, only_overdue: bool = False) -> bool:
        """Give leases along the lane; False when a request found no room, or enough have been given."""
        for _ in range(min(len(lane.aside), ASIDE_FEW)):
            entry = lane.aside.popleft()
            if not self._serve_until(entry[0], lane, this, only_overdue=only_overdue):
                lane.aside.appendleft(entry)
                return False
            if only_overdue and not self._is_overdue(entry, this.now):
                lane.aside.append(entry)
            elif not self._serve_one(entry, lane, this):
                return False
        return self._serve_until(math.inf, lane, this, only_overdue=only_overdue)

    def _serve_until(self, end: float, lane: Lane, this: _Pass, *, only_overdue: bool) -> bool:
        while (entry := lane.head()) is not None and entry[0] <= end:
            if only_overdue and not self._is_overdue(entry, this.now):
                break
            if not self._serve_one(heappop(lane.entries), lane, this):
                return False
        return True

    def _serve_one(self, entry: Entry, lane: Lane, this: _Pass) -> bool:
        """Give a request a lease or put it where it belongs; False when the pass is to end."""
        queued, now = entry[2], this.now
        in_time = lane is self.in_time_lane and self.late_bound_s is not None
        if queued.over:
            return True
        if queued.until <= now:
            self.cancel(queued)
        elif in_time and queued.give_by < now:
            self._turn_late(entry)
            self._leave_ahead(queued)
        elif len(this.granted) == this.most:
            heappush(lane.entries, entry)
            this.block(entry[0], cut=True)
            return False
        elif (given := this.lease(queued.ask, self._hurries(queued, now))) is not None:
            self.cancel(queued)
            this.granted.append((queued, given))
            self.turned_late += queued.give_by < now and not queued.late  # in one lane for all
        elif this.only_avoids(queued.ask):
            lane.aside.append(entry)
        else:
            heappush(lane.entries, entry)
            this.block(entry[0])
            return False
        return True

    def _hurries(self, queued: QueuedRequest, now: float) -> bool:
        return self.late_bound_s is None and queued.give_by < now

    def blocks(self, ask: RouteRequest, now: float, only_avoids: Callable[[RouteRequest], bool]) -> bool:
        """Return whether a new request must wait behind others."""
        if rank(ask, now) >= self._blocked:
            return True
        first = self.late_lane.head()
        return first is not None and self._is_overdue(first, now) and not only_avoids(first[2].ask)

    def _is_overdue(self, entry: Entry, now: float) -> bool:
        return self.late_bound_s is not None and now - entry[0] > self.late_bound_s

    def _overdue(self, now: float) -> bool:
        """Return whether a late request has waited for as long as it may."""
        first, aside = self.late_lane.head(), self.late_lane.aside
        return any(self._is_overdue(e, now) for e in (first, aside[0] if aside else None) if e is not None)

    def oldest_wait_s(self, now: float) -> float:
        """Return for how long the request has waited that came first."""
        while self.came and self.came[0].over:
            self.came.popleft()
        return max(0.0, now - self.came[0].since) if self.came else 0.0


def rank(ask: RouteRequest, since: float) -> float:
    """Return its rank in a lane; the lower goes first."""
    return since + (ask.priority - 1) * CLASS_S
