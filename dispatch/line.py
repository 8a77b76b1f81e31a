"""Those who wait for a lease, in two lanes, first come first served within each.

    comes ──► in time ──────────────► served first
                 │ could not be in time any more
                 ▼
               late ──► served from what the others leave; overdue: before all others

A request that could not be in time any more (slo.py), by the work ahead of it when it came or because its
time has passed since, is late: in one line a burst would spoil every request behind it until it is worked
off. Who has been late for late_bound_s is overdue and goes before all others, so that nobody starves.

True after every call: nobody who asks overtakes somebody who waits and can still be in time, or is overdue.

Who gives leases and whether there is room is not known here: grant and blocks are given functions.
"""

from collections import deque
from collections.abc import Callable

from dispatch.types import Ask, Lease, Waiter

LATE_BOUND_S = 300.0
"""So long a late request waits at most while there are others in time: in the study of the policies none
waited for much longer (reference/policy-study.md), so the bound seldom costs anybody his time."""


class Line:
    """Who waits. Counts are of now; turned_late is of requests that could not be in time any more, so far."""

    def __init__(self, most: int, late_bound_s: float | None) -> None:
        """Nobody waits. most: held at once. late_bound_s: None for one line of all."""
        self.most = most
        self.late_bound_s = late_bound_s
        self.held = 0
        self.work = 0.0
        self.prompt_tokens = 0
        self.late = 0
        self.turned_late = 0
        self.work_ahead = 0.0  # of those who can be in time
        self._in_time: deque[Waiter] = deque()
        self._late: deque[Waiter] = deque()
        self._must_queue = False

    def hold(
        self, ask: Ask, until: float, now: float, time_to_give_s: float, wait_s: float, *, blocked: bool
    ) -> Waiter | None:
        """A place at the end of its lane, or None when as many are held as may be.

        time_to_give_s: for so long it may wait and be in time. wait_s: how long it is expected to wait.
        blocked: whether whoever asks after it must wait, too (not if it only avoids what has room).
        """
        if self.held >= self.most:
            return None
        waiter = Waiter(ask, until, now, now + time_to_give_s)
        self.held += 1
        self.work += ask.work
        self.prompt_tokens += ask.prompt_tokens
        if self.late_bound_s is not None and wait_s > time_to_give_s:
            self._turn_late(waiter)
        else:
            self._must_queue = self._must_queue or blocked
            self._in_time.append(waiter)
            self.work_ahead += ask.work
        return waiter

    def _turn_late(self, waiter: Waiter) -> None:
        waiter.late = True
        place = len(self._late)
        while place and self._late[place - 1].since > waiter.since:
            place -= 1  # those were late at once; he came before them
        self._late.insert(place, waiter)
        self.late += 1
        self.turned_late += 1

    def cancel(self, waiter: Waiter) -> None:
        """It waits no more."""
        if waiter.over:
            return
        waiter.over = True
        self.held -= 1
        self.work = self.work - waiter.ask.work if self.held else 0.0
        self.prompt_tokens -= waiter.ask.prompt_tokens
        if waiter.late:
            self.late -= 1
        else:
            self._leaves(waiter)

    def _leaves(self, waiter: Waiter) -> None:
        more = self.held > self.late
        self.work_ahead = max(0.0, self.work_ahead - waiter.ask.work) if more else 0.0

    def grant(
        self, now: float, lease: Callable[[Ask], Lease | None], only_avoids: Callable[[Ask], bool]
    ) -> list[tuple[Waiter, Lease]]:
        """Leases for those who may be served now: the overdue, those in time, the late; each in their order.

        Who could be served but for the instances he avoids (only_avoids) lets the others pass.
        """
        granted: list[tuple[Waiter, Lease]] = []
        self._must_queue = False
        if self.held:
            if self._overdue(now):
                self._serve(self._late, granted, now, lease, only_avoids, only_overdue=True)
            if not self._must_queue:
                self._serve(self._in_time, granted, now, lease, only_avoids)
            if not self._must_queue and self._late:
                self._serve(self._late, granted, now, lease, only_avoids)
                self._must_queue = False  # new ones go before the late, who get what is left
        for lane in (self._in_time, self._late):
            while lane and (lane[0].over or (lane is self._in_time and lane[0].late)):
                lane.popleft()
        if len(self._in_time) > 2 * (self.held - self.late) + 64:
            self._in_time = deque(w for w in self._in_time if not (w.over or w.late))
        if len(self._late) > 2 * self.late + 64:
            self._late = deque(w for w in self._late if not w.over)
        return granted

    def _serve(
        self,
        lane: deque[Waiter],
        granted: list[tuple[Waiter, Lease]],
        now: float,
        lease: Callable[[Ask], Lease | None],
        only_avoids: Callable[[Ask], bool],
        *,
        only_overdue: bool = False,
    ) -> None:
        """Give leases along the lane, until one finds no room: then _must_queue is set."""
        in_time = lane is self._in_time and self.late_bound_s is not None
        for waiter in lane:
            if waiter.over or (in_time and waiter.late):
                continue
            if waiter.until <= now:
                self.cancel(waiter)
                continue
            if in_time and waiter.give_by < now:
                self._turn_late(waiter)
                self._leaves(waiter)
                continue
            if only_overdue and now - waiter.since <= (self.late_bound_s or 0.0):
                break
            given = lease(waiter.ask)
            if given is not None:
                self.cancel(waiter)
                granted.append((waiter, given))
                self.turned_late += waiter.give_by < now and not waiter.late  # all in one line
            elif not only_avoids(waiter.ask):
                self._must_queue = True
                break

    def blocks(self, now: float, only_avoids: Callable[[Ask], bool]) -> bool:
        """Whether one who asks now must wait behind others."""
        return self._must_queue or (self._overdue(now) and not only_avoids(self._late[0].ask))

    def _overdue(self, now: float) -> bool:
        """Whether a late one has waited for as long as it may."""
        late = self._late
        while late and late[0].over:
            late.popleft()
        return bool(late) and self.late_bound_s is not None and now - late[0].since > self.late_bound_s

    def oldest_wait_s(self, now: float) -> float:
        """For how long the one who waits longest has waited; the lanes are in the order of their coming."""
        first = [
            next((w.since for w in lane if not (w.over or w.late is not late)), now)
            for lane, late in ((self._in_time, False), (self._late, True))
        ]
        return max(0.0, now - min(first))
