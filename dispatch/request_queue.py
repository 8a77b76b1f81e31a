"""Those who wait for a lease, in two lanes; within a lane, higher priority first and then as they came.

    comes ──► in time ──────────────► served first
                 │ could not be in time any more
                 ▼
               late ──► served from what the others leave; overdue: before all others

A request that could not be in time any more (engine/slo.py), by the work ahead of it when it came or
because its time has passed since, is late: in one line a burst would spoil every request behind it until it
is worked off. Who has been late for late_bound_s is overdue and goes before all others, so that nobody
starves.

Priority: a request stands in its lane as if it had come CLASS_S sooner (high) or later (low) than it did.

    rank = when it came + (-CLASS_S, 0, CLASS_S)[priority]        the lower goes first

So whoever comes more than 2 * CLASS_S after a request can never go before it in its lane, whatever his class
and however many they are: nobody starves. It needs no counters and no weights, and within a class it is first
come, first served.

True after every call: nobody who asks overtakes somebody of a lower rank who waits for room and can still
be in time, or is overdue. A pass looks at who is served, at the first who is not, and at ASIDE_FEW of those
who stand aside; so it costs the same with five who wait and with 100,000.

Who gives leases and whether there is room is not known here: grant and blocks are given functions.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

from dispatch.types import Ask, Lease, Waiter

LATE_BOUND_S = 300.0
"""So long a late request waits at most while there are others in time: in the study of the policies none
waited for much longer (reference/policy-study.md), so the bound seldom costs anybody his time."""

CLASS_S = 30.0
"""What a class is worth. Far more than the seconds in which a request can be in time, so that there a higher
class always goes first; about what a stopped machine takes to serve, so that in a burst it goes first until
there is help; and a tenth of LATE_BOUND_S, so that no class waits much longer than that."""

ASIDE_FEW = 32
"""Of those who wait only for another instance than they avoid, so many are tried in a pass, in turns."""

LOW_SHARE = 0.75
"""Of the places, low priority may have so many: who fills the line with it keeps nobody else out."""

LOW = 2

Entry = tuple[float, int, Waiter]
"""(rank, number, who): of equal rank the first to come goes first."""


class Lane:
    """Those who wait in one lane, the lowest rank first. aside: who has room, but where he must not go."""

    def __init__(self) -> None:
        """Nobody waits."""
        self.entries: list[Entry] = []  # a heap; who has gone stays until he would be served
        self.aside: deque[Entry] = deque()

    def __iter__(self) -> Iterator[Waiter]:
        """Who waits here, in order. It sorts: for tests and operators."""
        return (entry[2] for entry in sorted((*self.entries, *self.aside)) if not entry[2].over)

    def __getitem__(self, n: int) -> Waiter:
        """The nth of them."""
        return list(self)[n]

    def head(self) -> Entry | None:
        """Who is next, but for those who stand aside."""
        while self.entries and self.entries[0][2].over:
            heappop(self.entries)
        return self.entries[0] if self.entries else None

    def trim(self, living: int) -> None:
        """Forget those who have gone when they are the most; each is looked at once per time he could be."""
        if len(self.entries) + len(self.aside) > 2 * living + 64:
            self.entries = [e for e in self.entries if not e[2].over]
            heapify(self.entries)
            self.aside = deque(e for e in self.aside if not e[2].over)


@dataclass(slots=True)
class _Pass:
    """One pass of grant."""

    now: float
    lease: Callable[[Ask, bool], Lease | None]
    only_avoids: Callable[[Ask], bool]
    most: int
    granted: list[tuple[Waiter, Lease]] = field(default_factory=list)
    blocked: float = math.inf  # rank of the first who found no room
    cut: bool = False


class Line:
    """Who waits. Counts are of now; turned_late is of requests that could not be in time any more, so far.

    cut: the last pass ended because it had granted as many as it was to, not for want of room.
    """

    def __init__(self, most: int, late_bound_s: float | None) -> None:
        """Nobody waits. most: held at once. late_bound_s: None for one line of all."""
        self.most = most
        self.late_bound_s = late_bound_s
        self.held = 0
        self.low = 0  # of those, of low priority
        self.work = 0.0
        self.prompt_tokens = 0
        self.late = 0
        self.turned_late = 0
        self.cut = False
        self._ahead = [0.0, 0.0, 0.0]  # work of those who can be in time, by priority
        self._in_time = Lane()
        self._late = Lane()
        self._came: deque[Waiter] = deque()  # all, as they came
        self._numbers = count()
        self._blocked = math.inf  # whoever asks with this rank or a later one must wait

    @property
    def work_ahead(self) -> float:
        """Of those who can be in time."""
        return sum(self._ahead)

    def ahead_of(self, priority: int) -> float:
        """The same, of those who would be served before one of that priority who came now."""
        return sum(self._ahead[: priority + 1])

    def hold(
        self, ask: Ask, until: float, now: float, time_to_give_s: float, wait_s: float, *, blocked: bool
    ) -> Waiter | None:
        """A place in its lane, or None when as many are held as may be.

        time_to_give_s: for so long it may wait and be in time. wait_s: how long it is expected to wait.
        blocked: whether whoever asks after it must wait, too (not if it only avoids what has room).
        """
        low = ask.priority == LOW
        if self.held >= self.most or (low and self.low >= LOW_SHARE * self.most):
            return None
        waiter = Waiter(ask, until, now, now + time_to_give_s)
        self._trim()
        self.held += 1
        self.low += low
        self.work += ask.work
        self.prompt_tokens += ask.prompt_tokens
        self._came.append(waiter)
        entry = (rank(ask, now), next(self._numbers), waiter)
        if self.late_bound_s is not None and wait_s > time_to_give_s:
            self._turn_late(entry)
        else:
            if blocked:
                self._blocked = min(self._blocked, entry[0])
            heappush(self._in_time.entries, entry)
            self._ahead[ask.priority] += ask.work
        return waiter

    def _turn_late(self, entry: Entry) -> None:
        entry[2].late = True
        heappush(self._late.entries, entry)
        self.late += 1
        self.turned_late += 1

    def _trim(self) -> None:
        self._in_time.trim(self.held - self.late)
        self._late.trim(self.late)
        if len(self._came) > 2 * self.held + 64:
            self._came = deque(w for w in self._came if not w.over)

    def cancel(self, waiter: Waiter) -> None:
        """It waits no more."""
        if waiter.over:
            return
        waiter.over = True
        self.held -= 1
        self.low -= waiter.ask.priority == LOW
        self.work = self.work - waiter.ask.work if self.held else 0.0
        self.prompt_tokens -= waiter.ask.prompt_tokens
        if waiter.late:
            self.late -= 1
        else:
            self._leaves(waiter)

    def _leaves(self, waiter: Waiter) -> None:
        if self.held > self.late:
            left = self._ahead[waiter.ask.priority] - waiter.ask.work
            self._ahead[waiter.ask.priority] = max(0.0, left)
        else:
            self._ahead = [0.0, 0.0, 0.0]

    def grant(
        self,
        now: float,
        lease: Callable[[Ask, bool], Lease | None],
        only_avoids: Callable[[Ask], bool],
        most: int | None = None,
    ) -> list[tuple[Waiter, Lease]]:
        """Leases for those who may be served now: the overdue, those in time, the late; each in their order.

        lease is also told whether its request hurries: late, in one line of all. Who could be served but for
        the instances he avoids (only_avoids) lets the others pass. most: so many at once; `cut` says then
        that there may be more.
        """
        this = _Pass(now, lease, only_avoids, self.most if most is None else most)
        self._blocked = math.inf
        if self.held:
            if self._overdue(now) and not self._serve(self._late, this, only_overdue=True):
                self._blocked = -math.inf
            elif self._serve(self._in_time, this):
                self._serve(self._late, this)  # new ones go before these, who get what is left
            else:
                self._blocked = this.blocked
        self.cut = this.cut
        return this.granted

    def _serve(self, lane: Lane, this: _Pass, *, only_overdue: bool = False) -> bool:
        """Give leases along the lane; False when one found no room, or enough have been given."""
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
        """Give it a lease or put it where it belongs; False when the pass is to end."""
        waiter, now = entry[2], this.now
        in_time = lane is self._in_time and self.late_bound_s is not None
        if waiter.over:
            return True
        if waiter.until <= now:
            self.cancel(waiter)
        elif in_time and waiter.give_by < now:
            self._turn_late(entry)
            self._leaves(waiter)
        elif len(this.granted) == this.most:
            heappush(lane.entries, entry)
            this.blocked, this.cut = entry[0], True
            return False
        elif (given := this.lease(waiter.ask, self._hurries(waiter, now))) is not None:
            self.cancel(waiter)
            this.granted.append((waiter, given))
            self.turned_late += waiter.give_by < now and not waiter.late  # all in one line
        elif this.only_avoids(waiter.ask):
            lane.aside.append(entry)
        else:
            heappush(lane.entries, entry)
            this.blocked = entry[0]
            return False
        return True

    def _hurries(self, waiter: Waiter, now: float) -> bool:
        return self.late_bound_s is None and waiter.give_by < now

    def blocks(self, ask: Ask, now: float, only_avoids: Callable[[Ask], bool]) -> bool:
        """Whether one who asks for this now must wait behind others."""
        if rank(ask, now) >= self._blocked:
            return True
        first = self._late.head()
        return first is not None and self._is_overdue(first, now) and not only_avoids(first[2].ask)

    def _is_overdue(self, entry: Entry, now: float) -> bool:
        return self.late_bound_s is not None and now - entry[0] > self.late_bound_s

    def _overdue(self, now: float) -> bool:
        """Whether a late one has waited for as long as it may."""
        first = self._late.head()
        if first is not None and self._is_overdue(first, now):
            return True
        return bool(self._late.aside) and self._is_overdue(self._late.aside[0], now)

    def oldest_wait_s(self, now: float) -> float:
        """For how long the one who waits longest has waited."""
        while self._came and self._came[0].over:
            self._came.popleft()
        return max(0.0, now - self._came[0].since) if self._came else 0.0


def rank(ask: Ask, since: float) -> float:
    """Whoever has the lower one goes first in a lane."""
    return since + (ask.priority - 1) * CLASS_S
