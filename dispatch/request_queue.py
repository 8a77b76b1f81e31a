"""The requests that wait for a lease, in two lanes; in a lane clients take turns, one's own go as they came.

    comes ──► in time ──────────────► served first ◄─┐ before all others of its client
                 │ cannot be in time any more        │
                 ▼                                   │
               late ──► served from what is left ──► overdue

A request that cannot be in time any more (engine/slo.py), by the work ahead of it when it came or because its
time has passed since, is late: in one lane a burst would spoil every request behind it until it is worked
off. A request that has been late for late_bound_s is overdue and goes before all others of its client, so
that none starves.

Clients take turns (dispatch/client_turns.py): what one has waiting keeps no other waiting. No client holds
more than HELD_RATIO times as many places as are free.

Priority: a request stands in its lane as if it had come CLASS_S sooner (high) or later (low) than it did.

    rank = when it came + (-CLASS_S, 0, CLASS_S)[priority]        the lower goes first

So a request that comes more than 2 * CLASS_S after another of its client can never go before it in its lane,
whatever its class and however many they are: none starves. It needs no weights, and within a class it is
first come, first served.

True after every call: no new request overtakes one that goes before it, waits for room and can still be in
time, or is overdue. A pass looks at the requests that it serves, at the first that it does not, and at
ASIDE_FEW of those that stand aside; so it costs the same with five that wait and with 100,000.

How leases are given and whether there is room is not known here: grant and blocks take functions.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count as numbers

from dispatch.client_turns import CLASS_S, ClientTurns
from dispatch.lease import Lease
from dispatch.route_request import QueuedRequest, RouteRequest
from dispatch.waiting_lane import Entry, Lane

LATE_BOUND_S = 300.0
"""Most seconds that a late request waits while others are in time: in the study of the policies none waited
for much longer (docs/reference/policy-study.md), so the bound seldom costs another request its time."""

ASIDE_FEW = 32
"""Requests tried in one pass, in turns, of those that wait only because of the instances that they avoid."""

LOW_SHARE = 0.75
"""Most share of the places for low priority: filling the queue with it keeps no other request out."""

HELD_RATIO = 9.0
"""Most places of one client, as a ratio to those that are free: one that is alone has 90 % of them, and
however many want all of them, some are left to a client that wants few."""

LOW = 2

OVERDUE = 1e12
"""Seconds by which an overdue request stands before all others of its client."""


@dataclass(slots=True)
class _Pass:
    """One call of RequestQueue.grant: its arguments, and the leases given so far."""

    now: float
    lease: Callable[[RouteRequest, bool], Lease | None]
    only_avoids: Callable[[RouteRequest], bool]
    shut: Callable[[str], bool]
    most: int
    granted: list[tuple[QueuedRequest, Lease]] = field(default_factory=list)
    blocked: Entry | None = None  # the first request that found no room
    cut: bool = False

    def block(self, entry: Entry, *, cut: bool = False) -> None:
        """End the pass at a waiting request. cut: because enough were granted, not for want of room."""
        self.blocked, self.cut = entry, cut


class RequestQueue:
    """The requests that wait for a lease, in a lane of those that can be in time and one of the late.

    Counts are of now; turned_late is of all requests that ever turned late. cut: the last pass ended because
    it had granted as many as it was to, not for want of room.
    """

    def __init__(self, most: int, late_bound_s: float | None) -> None:
        """Start without requests. most: how many may wait at once. late_bound_s: None for one lane."""
        self.most = most
        self.late_bound_s = late_bound_s
        self.held = 0
        self.held_of = [0, 0, 0]  # of those, by priority
        self.work = 0.0
        self.prompt_tokens = 0
        self.late = 0
        self.turned_late = 0
        self.cut = False
        self._turns = turns = ClientTurns()
        self.in_time_lane = Lane(turns, lambda queued: queued.over)
        self.late_lane = Lane(turns, lambda queued: queued.over or queued.overdue)
        self._ageing: list[Entry] = []  # a heap of those in the late lane
        self._overdue = 0  # of those held
        self._ahead = [0.0, 0.0, 0.0]  # work of the requests that can be in time, by priority
        self.came: deque[QueuedRequest] = deque()  # all, as they came
        self._numbers = numbers()
        self._blocked: Entry | None = None  # a new request that does not go before this one must wait

    def work_by_client(self) -> dict[str, float]:
        """Return the work of each client's requests that wait."""
        return self._turns.waiting_work()

    def ahead_of(self, priority: int) -> float:
        """Return the waiting work that would be served before a request of that priority if it came now."""
        return sum(self._ahead[: priority + 1])

    def ahead_of_client(self, ask: RouteRequest) -> float:
        """Return the waiting work that would be served before such a request, where clients take turns."""
        return self._turns.ahead_of(ask.client, ask.priority, ask.work, self.ahead_of(ask.priority))

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
        takes_s: float = 0.0,
        arrives: bool = False,
    ) -> QueuedRequest | None:
        """Let a request wait in its lane; return None when as many wait as may, in all or of its client.

        until: when it loses its place. until_late_s: how long it may wait and be in time. wait_s: how long it
        is expected to wait. blocks: whether those that come after it must wait, too (not if it only avoids
        the instances with room). count: leases that it asked for, None for one. takes_s: seconds of the whole
        fleet's work. arrives: it counts as an arrival when it is granted.
        """
        low, turns = ask.priority == LOW, self._turns
        if self.held >= self.most or (low and self.held_of[LOW] >= LOW_SHARE * self.most):
            return None
        if ask.client and turns.held(ask.client) >= HELD_RATIO * (self.most - self.held):
            return None
        queued = QueuedRequest(ask, count, until, now, now + until_late_s, takes_s, arrives)
        self._trim()
        turns.join(ask.client, ask.work)
        self.held += 1
        self.held_of[ask.priority] += 1
        self.work += ask.work
        self.prompt_tokens += ask.prompt_tokens
        self.came.append(queued)
        entry = (rank(ask, now), next(self._numbers), queued)
        if self.late_bound_s is not None and wait_s > until_late_s:
            self._turn_late(entry)
        else:
            self.in_time_lane.push(entry)
            if blocks and (self._blocked is None or self.in_time_lane.is_before(entry, self._blocked)):
                self._blocked = entry
            self._ahead[ask.priority] += ask.work
            turns.count_ahead(ask.client, ask.priority, ask.work)
        return queued

    def _turn_late(self, entry: Entry) -> None:
        entry[2].turn_late()
        self.late_lane.push(entry)
        heappush(self._ageing, entry)
        self.late += 1
        self.turned_late += 1

    def _trim(self) -> None:
        self.in_time_lane.trim(self.held - self.late + self._overdue)
        self.late_lane.trim(self.late - self._overdue)
        if len(self._ageing) > 2 * self.late + 64:
            self._ageing = sorted(e for e in self._ageing if not (e[2].over or e[2].overdue))
        if len(self.came) > 2 * self.held + 64:
            self.came = deque(w for w in self.came if not w.over)

    def cancel(self, queued: QueuedRequest) -> None:
        """Take a request out of the queue, if it has not left already."""
        if queued.over:
            return
        queued.leave()
        self.held -= 1
        self.held_of[queued.ask.priority] -= 1
        self.work = self.work - queued.ask.work if self.held else 0.0
        self.prompt_tokens -= queued.ask.prompt_tokens
        self._overdue -= queued.overdue
        if queued.late:
            self.late -= 1
        else:
            self._leave_ahead(queued)
        self._turns.leave(queued.ask.client, queued.ask.work)
        if not self.held:
            self.in_time_lane.clear()
            self.late_lane.clear()

    def _leave_ahead(self, queued: QueuedRequest) -> None:
        self._turns.count_ahead(queued.ask.client, queued.ask.priority, -queued.ask.work)
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
        shut: Callable[[str], bool] = lambda _: False,
    ) -> list[tuple[QueuedRequest, Lease]]:
        """Give leases to the requests that can be served now: those in time or overdue, then the late.

        lease: gives a request a lease or None; it is also told whether the request hurries: late, in one lane
        for all. A request that could be served but for the instances it avoids (only_avoids) lets the others
        pass, and so do those of a client that may have no more leases (shut). most: so many at once; `cut`
        says then that there may be more.
        """
        this = _Pass(now, lease, only_avoids, shut, self.most if most is None else most)
        self._blocked = None
        if self.held:
            self._move_overdue(now)
            if self._serve(self.in_time_lane, this):
                self._serve(self.late_lane, this)  # new requests go before these, which get what is left
            else:
                self._blocked = this.blocked
        self.cut = this.cut
        return this.granted

    def _move_overdue(self, now: float) -> None:
        """Put requests that have been late for late_bound_s before all others of their clients."""
        while (first := self._oldest_late()) is not None and self._is_overdue(first, now):
            rank, number, queued = heappop(self._ageing)
            queued.turn_overdue()
            self._overdue += 1
            self.in_time_lane.push((rank - OVERDUE, number, queued))

    def _oldest_late(self) -> Entry | None:
        while self._ageing and self._ageing[0][2].over:
            heappop(self._ageing)
        return self._ageing[0] if self._ageing else None

    def _serve(self, lane: Lane, this: _Pass) -> bool:
        """Give leases along a lane; return False when a request found no room or enough have been given."""
        lane.reopen()
        for _ in range(min(len(lane.aside), ASIDE_FEW)):
            if not lane.aside:
                break  # the last that waited has been served
            entry = lane.aside.popleft()
            if not self._serve_until(entry, lane, this):
                lane.aside.appendleft(entry)
                return False
            if not self._serve_one(entry, lane, this):
                return False
        return self._serve_until(None, lane, this)

    def _serve_until(self, end: Entry | None, lane: Lane, this: _Pass) -> bool:
        """Give leases to the requests of a lane that go before `end`, or to all; return as `_serve` does."""
        while (entry := lane.head()) is not None and (end is None or lane.is_before(entry, end)):
            if this.shut(entry[2].ask.client):
                lane.shut(entry[2].ask.client)
                continue
            lane.pop(entry)
            if not self._serve_one(entry, lane, this):
                return False
        return True

    def _serve_one(self, entry: Entry, lane: Lane, this: _Pass) -> bool:
        """Give a request a lease or put it where it belongs; return False when the pass is to end."""
        queued, now = entry[2], this.now
        in_time = lane is self.in_time_lane and self.late_bound_s is not None and not queued.late
        if queued.over or (queued.overdue and lane is self.late_lane):
            return True
        if queued.until <= now:
            self.cancel(queued)
        elif in_time and queued.give_by < now:
            self._turn_late(entry)
            self._leave_ahead(queued)
        elif len(this.granted) == this.most:
            lane.push(entry)
            this.block(entry, cut=True)
            return False
        elif this.shut(queued.ask.client):
            lane.aside.append(entry)
        elif (given := this.lease(queued.ask, self._hurries(queued, now))) is not None:
            self._turns.served(queued.ask.client, queued.takes_s)
            self.cancel(queued)
            this.granted.append((queued, given))
            self.turned_late += queued.give_by < now and not queued.late  # in one lane for all
        elif this.only_avoids(queued.ask):
            lane.aside.append(entry)
        else:
            lane.push(entry)
            this.block(entry)
            return False
        return True

    def _hurries(self, queued: QueuedRequest, now: float) -> bool:
        return self.late_bound_s is None and queued.give_by < now

    def blocks(self, ask: RouteRequest, now: float, only_avoids: Callable[[RouteRequest], bool]) -> bool:
        """Return whether a new request must wait behind requests that wait already."""
        if self._blocked is not None and not self._goes_before(ask, now, self._blocked):
            return True
        first = self._oldest_late()
        return (
            first is not None
            and first[2].ask.client == ask.client
            and self._is_overdue(first, now)
            and not only_avoids(first[2].ask)
        )

    def _goes_before(self, ask: RouteRequest, now: float, waiting: Entry) -> bool:
        """Return whether a new request goes before one that waits already."""
        own = waiting if waiting[2].ask.client == ask.client else self.in_time_lane.first_of(ask.client)
        if own is not None and (own is waiting or own[0] <= rank(ask, now)):
            return rank(ask, now) < own[0]
        return self._turns.key(ask.client, ask.priority) < self._turns.key(
            waiting[2].ask.client, waiting[2].ask.priority
        )

    def _is_overdue(self, entry: Entry, now: float) -> bool:
        return self.late_bound_s is not None and now - entry[0] > self.late_bound_s

    def oldest_wait_s(self, now: float) -> float:
        """Return how many seconds the oldest of the waiting requests has waited."""
        while self.came and self.came[0].over:
            self.came.popleft()
        return max(0.0, now - self.came[0].since) if self.came else 0.0


def rank(ask: RouteRequest, since: float) -> float:
    """Return a request's rank among those of its client in a lane; the lower goes first."""
    return since + (ask.priority - 1) * CLASS_S
