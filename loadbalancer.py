"""Which instance serves the next request, and how much is going on: no I/O, no clock, no locks.

Every instance has an estimate of when it would have drained the work it was given, `free_at`:

    a lease of work w:   free_at = now + (work left + w) / throughput
    a load report:       free_at = now + work of all unfinished leases / throughput
    in between:          it stays, and the work (free_at - now) * throughput drains by itself

The estimate never leaves [FLOOR, 1] * the work of the unfinished leases: what a report has not said to
be over is not over, however long ago it was given. Seconds compare between machines of unequal speed.

There is one queue per class of speed, because an idle fast machine and an idle slow one have the same
`free_at` and not the same answer: the first few of each class are looked at, and the best few of all by their
work are predicted in full (engine/forward.py): the request goes where it does least to everybody. A queue
is two sorted lists whose keys do not age, so a choice costs O(log n) comparisons: those that drain, by
`free_at`, and those at their floor or idle, by seconds. An instance crosses from the first to the second when
it is met there, once per change. Only instances that can serve are in a queue: hot, with tokens in stock, not
failing.

    hot set ──► instances ◄── token batches, load reports, failures
                   │
    route ─► lease ┤ released by: ended in a report, /done, expiry if it never started, reboot
                   │
    hold ─► waiter ┴► granted when capacity appears: who can still be in time, then who is late

Who waits stands in the line (dispatch/request_queue.py: two lanes, priorities). Where the best instance has
no room he waits for that one, and nobody who comes later is given it before him; others pass to other
instances.

Room is memory for what those there will grow to, and no more prompts to read than it reads in READING_S:
what waits inside an instance can be put into no order. Where step times are not known it is capacity in work.

True after every call:
- the work given to an instance is the sum over its unfinished leases; a token is leased once;
- every unfinished lease of an instance stands in its belief;
- an instance of which only the capacity is known is not given more than that, unless it is idle;
- nobody who asks is given an instance that somebody before him in the line waits for.

Times are epoch seconds, work is in output-token equivalents. All methods belong to one thread.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import count, islice, repeat
from typing import Any

from dispatch.allowance import MOST_UNUSED, Allowance
from dispatch.candidate_index import Queue
from dispatch.circuit_breaker import ALONE, State
from dispatch.instance import READING_S, STOCK_LEAST, STOCK_MOST, Instance
from dispatch.output_lengths import Lengths
from dispatch.predicted_load import Beliefs, row, warm_up
from dispatch.prefix_cache import Prefixes
from dispatch.prompt_lengths import Sizes
from dispatch.request_queue import LATE_BOUND_S, Line
from dispatch.step_times import SPAN_S, Pace, Span
from dispatch.token_stock import Batch
from dispatch.types import (
    Ask,
    InstanceUse,
    Lease,
    Poll,
    Refill,
    Usage,
    Waiter,
)
from engine.forward import COL_PROMPT_S, KIND, LEFT, PROMPT, UNREAD, Floats
from engine.slo import Slo
from web.messages.hot_set import HotSet
from web.messages.reports import LoadReport, PushedReport, RequestEnd

RATE_WEIGHT = 0.3
"""Weight of one observed rate in the measured throughput: settles in about five reports."""

RATE_INTERVAL_S = (0.5, 30.0)
"""Intervals a rate is taken over: shorter ones see single steps, longer ones mix idle and busy."""

RATE_UP_S = 10.0
"""A rate that is above the throughput is believed of an instance that is not full after so long."""

RATE_RANGE = 8.0
"""A measured throughput stays within this ratio of the told one: a wrong counter must not take one out."""

SATURATED = 0.9
"""From this share of its capacity on an instance counts as saturated, so that its rate is its throughput."""

CAPACITY_STEPS = (0.9, 1.05)
"""What an instance may hold is multiplied by the first when requests wait inside it or its tokens come too
slowly, by the second when it was full and neither was so: by a report each. Down faster than up."""

CAPACITY_RANGE = 6.0
"""It stays within this ratio of what was told: that is for a usual mix, and memory holds what it holds."""

WAITING_SHARE = 0.1
"""Of the requests there: more of them waiting, and at least 2, in two reports in a row is too many.

A few wait for a moment whenever prompts come together."""

SLOW_SHARE = 0.8
"""Of the objective: tokens this far apart are too slow, because answers grow and prompts come between."""

READ_LEAST = 0.1
"""Share of an instance's time that is left for prompts at least, or it is given no more requests."""

KV_SHARE = 0.96
"""Of its memory an instance is given requests until those there will need so much together, by what is
expected of their lengths: one that runs full puts requests back and reads their prompts again. By what they
hold now first tokens came 1.6 times later at 95 % load on unequal machines; 0.90 and 1.0 are worse, too
(bench/dispatch)."""

BEST_FEW = 8
"""So many, the best by the work they have, are predicted in full: of 32 servers 8 are enough (+2 %)."""

PREDICT_MOST = 512
"""Requests that are run forward for one choice: with many on each instance fewer of them are predicted, and
two at least. More would take longer than it may be worth."""

FIRST_TOKEN_WEIGHT = 10.0
"""Seconds of whole latency that a second of first token is worth; 1 is better for the whole latency on
unequal machines, by 4 to 7 %, and costs 12 to 18 % of first token (dispatch-study.md)."""

ARRIVALS_WEIGHT = 0.02
"""Of a second's arrivals in what is expected to come: of the last minute, for a burst is soon over."""

MIX_MEMORY = 500.0
"""Requests of about this number make up what is usual: prompt, work, pace of arrivals."""

STOCK_S = 40.0
"""Seconds of use a full stock lasts; it is refilled at a quarter, or at half of the least."""

USE_INTERVAL_S = 1.0
"""How much an instance is used is measured over at least so long."""

BATCH = 1000
"""Tokens fetched at a time: 1000 are parsed in about 3 ms, for so long nothing is answered."""

TOKEN_LIFE_S = 5.0
"""Tokens of a shorter life are of no use: they would be renewed all the time."""

REFILL_DRY, REFILL_LOW = 20, 4
"""Refills begun in one call: each is about 0.6 ms of processor in which nothing is answered."""

REFILL_LOOK = 4 * (REFILL_DRY + REFILL_LOW)
"""Instances looked at in one call, those longest in want first: a thousand may run low in the same second."""

REFILL_RETRY_S = (0.25, 10.0)
"""A failed refill is repeated after the first, doubling up to the second."""

ALONE_SHARE = 0.1
"""Of the hot instances, and at least one: so many may be avoided by one client's word alone
(dispatch/circuit_breaker.py). A client that finds more of them broken, which nobody and no report confirms,
is more likely broken itself."""

SILENT = 3
"""Reports in a row that did not come after which the requests there are taken to be lost."""

IDLE_POLL_RATIO = 5.0
"""An instance without work is polled so many times less often."""

MAX_POLLS_S = 200.0
"""Load reports asked for in all; at about 0.25 ms of processor each, 5 % of one core."""

MAX_PUSHES_S, MAX_PUSHES_SOON_S = 400.0, 1000.0
"""Reports that instances push in all, and where others give requests, too: at about 0.15 ms of
processor each 6 and 15 % of one core."""

PUSH_INTERVAL_S = 0.1
"""Between two of one instance, at least: with what it takes to see and to send, well below 250 ms."""

PUSH_SOON_S = 0.02
"""The same where other loadbalancers give requests, too: what they gave is known only from there. With 0.1 s
first tokens came 7 % later (equal machines at 80 %, four loadbalancers; bench/dispatch)."""

SWEEP, POLL_FEW = 10, 4
"""Calls of polls in which every instance is looked at, 0.2 s, and reports asked for in one call."""

MAX_SERVE_S = 3600.0
"""A started lease whose end nobody ever told is released after so long."""

MAX_LEASES = 200_000
"""Unfinished leases in all, a bound on memory (about 0.5 kB each)."""

REFUSED_S = 10.0
"""Refused work counts as demand for so long, about one request's life: that much would be under way now."""

RETRY_UNKNOWN_S = 30.0
"""Said when nothing is hot and the autoscaler has not said when something will be."""

CAPACITY_UNKNOWN = 30.0
"""Until an instance was known, one is taken to hold so many requests of the expected length."""

ENDS = ("finished", "aborted", "failed", "unused", "expired", "lost")
"""How a lease ends: the first three by a report or its client, unused by its client; expired without having
started; lost with its instance, or because nobody told."""

REMEMBER_DONE = 10_000
"""So many leases ended by their client are remembered until the report that tells their length."""


class LoadBalancer:
    """The hot set with its work, tokens and leases, and those who wait."""

    def __init__(
        self,
        rng: random.Random,
        request_id: Callable[[str], str],
        lease_s: float = 60.0,
        max_held: int = 5000,
        poll_interval_s: float = 1.0,
        slo: Slo | None = None,
        late_bound_s: float | None = LATE_BOUND_S,
        first_token_weight: float = FIRST_TOKEN_WEIGHT,
        max_unused: int = MOST_UNUSED,
    ) -> None:
        """Knows no instance yet.

        request_id: the public id of a token. lease_s: a lease not started by then is released.
        max_held: requests held at once. poll_interval_s: how old a working instance's report may get.
        slo: what late means. late_bound_s: None for one line of all, first come first served.
        first_token_weight: seconds of whole latency that a second of first token is worth.
        max_unused: leases that one client may have and not have used.
        """
        self.lease_s = lease_s
        self.slo = slo or Slo()
        self.line = Line(max_held, late_bound_s)
        self.allowance = Allowance(max_unused, lease_s)
        self.first_token_weight = first_token_weight
        self._claimed: set[int] = set()  # instances that somebody waits for
        self._waits_for_one: Ask | None = None
        self.poll_interval_s = poll_interval_s
        self.epoch: str | None = None
        self.version: int | None = None
        self.model = ""
        self.prefill_weight = 0.1
        self.expected_output_tokens = 200.0
        self.arrivals = 0
        self.arrived_work = 0.0
        self.routed = 0
        self.refused = 0
        self.arrived_prompt_tokens = 0
        self.arrived_output_tokens = 0.0
        self.ends: dict[str, int] = {}  # how leases ended -> how many
        self._rng = rng
        self._request_id = request_id
        self._counter = count()
        self._instances: dict[int, Instance] = {}
        self._beliefs = Beliefs()
        self._queues: dict[tuple[int, int], Queue] = {}
        self._leases: dict[str, Lease] = {}
        self._expiring: deque[Lease] = deque()  # by expires_at
        self._serving: deque[Lease] = deque()  # started when they would have expired; by given_at
        self._done_early: dict[str, int] = {}  # request id -> kind
        self._thirsty: dict[int, None] = {}
        self._doubted: dict[int, None] = {}  # to be asked for a report at once
        self._by_word: set[int] = set()  # avoided by one client's word alone, or have been
        self._left_epochs: deque[str] = deque(maxlen=16)
        self._hot_expected_at: float | None = None
        warm_up()
        self._lengths = Lengths(self.expected_output_tokens)
        self._sizes = Sizes()
        self._prefixes = Prefixes()
        self._memories: dict[int, Instance] = {}  # by the number of its memory
        self._mean_work = self.expected_output_tokens
        self._mean_prompt = 0.0
        self._mean_squares = 0.0  # of prompts
        self._prompts, self._prompt_sum, self._square_sum = 0, 0.0, 0.0  # of those given since the last tick
        self._usual = row(1.0, self.expected_output_tokens, math.inf, 0)
        self._arrivals_s = 0.0  # a second
        self._ticked: tuple[float, int, int] | None = None
        self._starts = 0  # requests that were seen to start, those of others too
        self._ticks = 0
        self._refused_work: deque[list[float]] = deque()  # [second, work]
        self._working = 0  # instances with a lease
        self._to_poll: list[Instance] = []
        self._hot = 0
        self._hot_throughput = 0.0
        self._typical_capacity = CAPACITY_UNKNOWN * self.expected_output_tokens

    # -- the hot set --

    def replace_hot(self, told: HotSet, now: float) -> bool:
        """Make the hot set what it is told to be; False when the news is older than what is known.

        What stays keeps its leases, tokens and measurements. An instance that is not named any more is
        forgotten with its leases; one that drains keeps them and gets none. A new address is a new instance.
        """
        if told.epoch == self.epoch:
            if self.version is not None and told.version < self.version:
                return False
        elif told.epoch in self._left_epochs:
            return False
        elif self.epoch is not None:
            self._left_epochs.append(self.epoch)
        self.epoch, self.version = told.epoch, told.version
        self.model = told.model
        self.prefill_weight = told.prefill_weight
        if not self._lengths.completions:
            self._mean_work = told.expected_output_tokens
        if told.expected_output_tokens != self._lengths.told:
            self._lengths.tell(told.expected_output_tokens)
        self.expected_output_tokens = told.expected_output_tokens
        self.expect_hot(told.expected_hot_s, now)
        named = {i.id: i for i in told.instances}
        for instance_id, inst in list(self._instances.items()):
            new = named.get(instance_id)
            if new is None or (new.address, new.auth_url) != (inst.told.address, inst.told.auth_url):
                self._forget(inst, now)
        for new in named.values():
            known = self._instances.get(new.id)
            if known is None:
                known = self._instances[new.id] = Instance(new, self._beliefs, now)
            elif known.told is new:
                continue  # of 10,000 few have changed
            else:
                known.capacity *= new.capacity_work / known.told.capacity_work
                if new.timing is not None and new.timing != known.told.timing:
                    known.pace = Pace(new.timing.timing())
                    known.belief.follow(known.pace.constants)
                known.told = new
                if not known.measured:
                    self._set_throughput(known, new.throughput_work_s, now)
                known.classify()
            self._wants_tokens(known, now)
            self._requeue(known, now)
        self._survey()
        return True

    def expect_hot(self, expected_hot_s: float | None, now: float) -> None:
        """The next instance becomes hot in so many seconds, or nobody knows when."""
        self._hot_expected_at = None if expected_hot_s is None else now + expected_hot_s

    @property
    def hot(self) -> int:
        """Instances that are hot, whether or not they can serve at this moment."""
        return self._hot

    def _survey(self) -> None:
        hot = [i for i in self._instances.values() if not i.told.draining]
        self._hot = len(hot)
        self._hot_throughput = sum(i.throughput for i in hot)
        if hot:
            self._typical_capacity = sum(i.capacity for i in hot) / len(hot)

    def _forget(self, inst: Instance, now: float) -> None:
        for lease in list(inst.leases.values()):
            self._release(inst, lease, "lost", now)
        inst.leave_queue()
        inst.belief.close()
        self._memories.pop(inst.memory, None)
        del self._instances[inst.id]
        self._thirsty.pop(inst.id, None)

    # -- requests --

    def work_of(self, prompt_tokens: int, max_tokens: int | None) -> float:
        """The work such a request is expected to be."""
        return max(1.0, prompt_tokens * self.prefill_weight + self.expected_output(max_tokens, prompt_tokens))

    def expected_output(self, max_tokens: int | None, prompt_tokens: int = 0) -> float:
        """Mean tokens that requests like it were answered with (dispatch/output_lengths.py)."""
        return self._lengths.mean(self._lengths.kind(prompt_tokens, max_tokens), max_tokens)

    def arrived(self, ask: Ask) -> None:
        """Count a new request; once, whatever becomes of it."""
        self.arrivals += 1
        self.arrived_work += ask.work
        self.arrived_prompt_tokens += ask.prompt_tokens
        self.arrived_output_tokens += ask.work - ask.prompt_tokens * self.prefill_weight

    def route(self, ask: Ask, now: float) -> Lease | None:
        """A lease for it, or None when no instance may take it now or others wait already (see grant)."""
        return None if self._must_wait(ask, now) else self._lease(ask, now)

    def _must_wait(self, ask: Ask, now: float) -> bool:
        """Whether others wait whom it must not pass."""
        if self.line.held:
            return self.line.blocks(ask, now, lambda other: self._only_avoids(other, now))
        self._claimed.clear()  # nobody waits any more
        return False

    def over_allowance(self, ask: Ask, now: float) -> float | None:
        """None, or in how many seconds its client may ask again, who has too many unused leases."""
        return self.allowance.asks(ask.client, self._typical_capacity * self._hot, now)

    def lease_many(self, ask: Ask, count: int, now: float) -> list[Lease]:
        """Up to count leases for requests like it: none when it may not have one, or others wait.

        They go where one after the other would go by the work that each instance has: the prediction in full
        is for a request that comes at once, and of a batch nobody knows when.
        """
        if self._must_wait(ask, now):
            return []
        count = min(count, MAX_LEASES - len(self._leases), self.allowance.left(ask.client))
        given: list[Lease] = []
        request = self._row(ask)
        for inst, n in self._spread(ask, count, now):
            here = self._row_at(inst, ask, request)
            last = None
            for token, batch in inst.stock.take_some(n, now):
                name = self._request_id(token)
                if name not in self._leases:
                    last = self._give(inst, name, token, batch, ask, here, now, more=True)
                    given.append(last)
            self._wants_tokens(inst, now)
            if last is not None and ask.affinity:
                self._prefixes.served(ask.affinity, inst.memory)
            self._requeue(inst, now)
        if not given and count > 0:
            lease = self._lease(ask, now)
            return [] if lease is None else [lease]
        return given

    def _spread(self, ask: Ask, count: int, now: float) -> list[tuple[Instance, int]]:
        """(instance, how many of count such requests), as one choice after the other would spread them."""
        # (score, number, how many there, work, seconds to read, who), of more than there are leases
        heap: list[tuple[float, int, int, float, float, Instance]] = []
        work, not_these = ask.work, {*ask.avoid, *self._claimed}
        few = max(BEST_FEW, count // max(1, len(self._queues))) + len(not_these)
        for queue in self._queues.values():
            for left_s, _, _, inst in queue.first(few, now):
                if inst.told.id not in not_these:
                    left = left_s * inst.throughput
                    heap.append(
                        (left_s + work / inst.throughput, len(heap), 0, left, inst.read_at - now, inst)
                    )
        heapify(heap)
        share: dict[int, tuple[Instance, int]] = {}
        prompt_work = ask.prompt_tokens * self.prefill_weight
        while heap and count > 0:
            _, tie, n, left, reading_s, inst = heap[0]
            fits = left + work <= inst.capacity and reading_s <= READING_S
            if n >= inst.stock.size or n >= inst.circuit.left or not (fits or (n == 0 and inst.idle)):
                heappop(heap)
                continue
            n += 1
            share[tie] = inst, n
            count -= 1
            left += work
            reading_s = max(0.0, reading_s) + prompt_work / inst.throughput
            heapreplace(heap, ((left + work) / inst.throughput, tie, n, left, reading_s, inst))
        return list(share.values())

    def refuse(self, ask: Ask, now: float) -> tuple[str, float]:
        """Why it gets no lease, and in how many seconds to ask again. It counts as demand."""
        self.refused += 1
        second = math.floor(now)
        if self._refused_work and self._refused_work[-1][0] == second:
            self._refused_work[-1][1] += ask.work
        else:
            self._refused_work.append([second, ask.work])
        return "all_busy" if self._hot else "nothing_hot", self.retry_after_s(ask, now)

    def retry_after_s(self, ask: Ask, now: float) -> float:
        """Seconds until there may be room for it, by what is known: at least 1, at most an hour."""
        if not self._hot:
            expected = RETRY_UNKNOWN_S if self._hot_expected_at is None else self._hot_expected_at - now
            return min(3600.0, max(1.0, expected))
        first = [found for queue in self._queues.values() for found in queue.first(BEST_FEW, now)]
        if not first:
            return 1.0  # no tokens, or all are being avoided: that is over in a moment or known soon
        room_s = min(left_s + (ask.work - i.capacity) / i.throughput for left_s, _, _, i in first)
        return min(3600.0, max(1.0, room_s + self._line_s(room_s, now)))

    def _line_s(self, room_s: float, now: float) -> float:
        """Seconds until all who wait are served once there is room, also by what will be hot by then."""
        seconds = self.line.work / self._hot_throughput
        help_s = math.inf if self._hot_expected_at is None else max(0.0, self._hot_expected_at - now) - room_s
        if seconds <= help_s:
            return seconds
        before_s = max(0.0, help_s)
        one = self._hot_throughput / self._hot
        return before_s + (self.line.work - before_s * self._hot_throughput) / (self._hot_throughput + one)

    def _lease(self, ask: Ask, now: float, *, hurries: bool = False) -> Lease | None:
        if len(self._leases) >= MAX_LEASES:
            return None
        request = self._row(ask)
        while (inst := self._best_for(ask, request, now, hurries)) is not None:
            taken = inst.stock.take(now)
            self._wants_tokens(inst, now)
            if taken is None:
                inst.leave_queue()  # its tokens had become too old
                continue
            token, batch = taken
            request_id = self._request_id(token)
            # An instance that gives a token twice must not upset the books.
            if request_id not in self._leases:
                return self._give(inst, request_id, token, batch, ask, self._row_at(inst, ask, request), now)
        return None

    def _best_for(self, ask: Ask, request: Floats, now: float, hurries: bool) -> Instance | None:
        """The instance where it does least to everybody: the best few by their work are predicted in full.

        hurries: it is late, and nobody else is to be served before it (dispatch/request_queue.py).
        """
        found = self._candidates(ask.work, {*ask.avoid, *self._claimed}, now, memory_known=True)
        for memory in self._prefixes.holders(ask.affinity):
            inst = self._memories.get(memory)
            if inst is None or inst.entry is None or inst.id in ask.avoid or inst.id in self._claimed:
                continue
            if (inst.told.timing is not None or inst.has_room(ask.work, inst.work(now), now)) and all(
                inst is not other for other in found
            ):
                found.append(inst)
        if not found or (len(found) == 1 and found[0].told.timing is None):
            return found[0] if found else None
        if self.line.held and not any(self._has_room(request, inst, now, hurries) for inst in found):
            # It would wait for the best of them, whichever that is: who comes later must not take it.
            self._wait_for(found[0], ask)
            return None
        cached = None
        if ask.affinity:
            cached = [self._prefixes.cached_tokens(ask.affinity, inst.memory) for inst in found]
        best = found[
            self._beliefs.best(
                [inst.belief.place for inst in found],
                request,
                cached,
                self._usual,
                # What comes to each anyway, by its share of what all can do.
                self._arrivals_s / max(self._hot_throughput, 1e-9),
                self._lengths.table,
                self.first_token_weight,
                PREDICT_MOST,
                now,
            )
        ]
        if self._has_room(request, best, now, hurries):
            return best
        self._wait_for(best, ask)
        return None

    def _has_room(self, request: Floats, inst: Instance, now: float, hurries: bool) -> bool:
        """Whether it would be admitted and read at once, and those there get their tokens in time.

        A step of step_s makes a token for each; with a share r of the time spent on prompts tokens come each
        step_s / (1 - r). So prompts may take no more than what leaves them within the objective. For who is
        late all the same that would be waiting for nothing: he hurries, and all of the time may go into it.
        """
        if inst.idle or inst.told.timing is None:
            return True
        free, unread_s, step_s = inst.belief.room(self._lengths.table, KV_SHARE, now)
        inst.read_share = 1.0 if hurries else 1.0 - step_s / (SLOW_SHARE * self.slo.output_token_s)
        if inst.read_share < READ_LEAST or inst.read_at - now > READING_S:
            return False
        return unread_s <= READING_S and float(request[PROMPT]) + 1.0 <= free

    def _wait_for(self, inst: Instance, ask: Ask) -> None:
        """It waits for that one, and nobody who comes later is given it before."""
        self._claimed.add(inst.id)
        self._waits_for_one = ask

    def _row(self, ask: Ask) -> Floats:
        """The request as an instance would see it that has served nothing like it."""
        kind = self._lengths.kind(ask.prompt_tokens, ask.max_tokens)
        expected = self._lengths.mean(kind, ask.max_tokens)
        prompt = float(ask.prompt_tokens)
        if not ask.prompt_tokens:  # only its work was told
            prompt = max(0.0, ask.work - expected) / max(self.prefill_weight, 1e-3)
        most = math.inf if ask.max_tokens is None else float(ask.max_tokens)
        return row(prompt, expected, most, kind)

    def _row_at(self, inst: Instance, ask: Ask, request: Floats) -> Floats:
        """The same as this one sees it: without the prefix that it has served lately."""
        cached = self._prefixes.cached_tokens(ask.affinity, inst.memory) if ask.affinity else 0.0
        if not cached:
            return request
        here = request.copy()
        here[UNREAD] = max(1.0, request[UNREAD] - cached)
        return here

    def _choose(self, work: float, avoid: Collection[int], now: float) -> Instance | None:
        """The instance that would be done with it first by its work; None where none has room."""
        found = self._candidates(work, avoid, now)
        return found[0] if found else None

    def _candidates(
        self, work: float, avoid: Collection[int], now: float, *, memory_known: bool = False
    ) -> list[Instance]:
        """The best few with room, those first that would be done with it first by their work.

        memory_known: whether there is room is found out later, where it can be known.
        """
        found: list[tuple[float, float, int, Instance]] = []
        for queue in self._queues.values():
            for left_s, chance, age, inst in queue.first(BEST_FEW + len(avoid), now):
                told = inst.told
                if (not avoid or told.id not in avoid) and (
                    (memory_known and told.timing is not None)
                    or inst.has_room(work, left_s * inst.throughput, now)
                ):
                    found.append((left_s + work / inst.throughput, chance, age, inst))
        found.sort()
        return [inst for _, _, _, inst in found[:BEST_FEW]]

    def _give(
        self,
        inst: Instance,
        request_id: str,
        token: str,
        batch: Batch,
        ask: Ask,
        request: Floats,
        now: float,
        *,
        more: bool = False,
    ) -> Lease:
        """Enter the lease in the books. request: as the instance sees it. more: the next goes there, too."""
        told = inst.told
        lease = Lease(
            request_id=request_id,
            token=token,
            instance_id=told.id,
            told=told,
            work=ask.work,
            max_tokens=ask.max_tokens,
            given_at=now,
            expires_at=min(now + self.lease_s, batch.expires_at),
            batch=batch,
            boot_id=inst.boot_id,
            row=request,
            client=ask.client,
        )
        inst.gets(ask.work, now)
        if not inst.leases:
            inst.working_since = now
            inst.look_at = now
            self._working += 1
        inst.taken += 1
        inst.leases[request_id] = lease
        inst.belief.add(request_id, request, now)
        inst.given += ask.work
        self._reads(inst, ask.prompt_tokens, request, now)
        self._leases[request_id] = lease
        self._expiring.append(lease)
        self.allowance.given(lease)
        inst.circuit.given(request_id, now)
        self.routed += 1
        self._mean_work += (ask.work - self._mean_work) / MIX_MEMORY
        prompt = float(request[PROMPT])
        self._prompts += 1
        self._prompt_sum += prompt
        self._square_sum += prompt * prompt
        if more:
            return lease
        if ask.affinity:
            self._prefixes.served(ask.affinity, inst.memory)
        self._requeue(inst, now)
        return lease

    def _reads(self, inst: Instance, prompt_tokens: float, request: Floats, now: float) -> None:
        """It will have read the prompts that it was given, and this one, so much later."""
        if inst.told.timing is None:
            read_s = prompt_tokens * self.prefill_weight / inst.throughput
        else:
            read_s = float(request[UNREAD] * inst.pace.constants[COL_PROMPT_S]) / max(
                inst.read_share, READ_LEAST
            )
        inst.read_at = max(now, inst.read_at) + read_s

    def _learn_mix(self) -> None:
        """What was given since the last time changes what is usual."""
        if self._prompts:
            share = self._prompts / min(MIX_MEMORY + self._prompts, self.routed)
            self._mean_prompt += share * (self._prompt_sum / self._prompts - self._mean_prompt)
            self._mean_squares += share * (self._square_sum / self._prompts - self._mean_squares)
            self._prompts, self._prompt_sum, self._square_sum = 0, 0.0, 0.0
        self._usual[PROMPT] = self._usual[UNREAD] = max(1.0, self._mean_prompt)
        self._usual[LEFT] = self._lengths.mean(0)

    def done(
        self, request_id: str, outcome: str, now: float, *, blame: bool = True, impostor: bool = False
    ) -> bool:
        """A client says how its lease ended: finished, failed or unused. False when none such is known.

        An unused token goes back into stock, unless a report said that it was taken. blame: whether it failed
        in a way that may be the instance's fault. impostor: who answered there had another certificate.
        """
        lease = self._leases.get(request_id)
        if lease is None:
            return False
        inst = self._instances[lease.instance_id]
        if outcome == "finished":
            inst.circuit.finished(request_id)
            self._done_early[request_id] = int(lease.row[KIND])
            if len(self._done_early) > REMEMBER_DONE:
                del self._done_early[next(iter(self._done_early))]
        elif outcome == "failed":
            self._word(inst, lease, now, blame=blame, weight=ALONE if impostor else 1)
        elif not lease.started and lease.boot_id == inst.boot_id:
            inst.stock.give_back(lease.token, lease.batch)
            inst.taken -= 1
        self._release(inst, lease, outcome, now)
        self._requeue(inst, now)
        return True

    def _release(self, inst: Instance, lease: Lease, how: str, now: float) -> None:
        """Take its work off the instance; the caller requeues."""
        lease.over = True
        if not lease.started:
            self.allowance.settled(lease)
        inst.circuit.over(lease.request_id)
        del self._leases[lease.request_id]
        del inst.leases[lease.request_id]
        inst.belief.remove(lease.request_id, now)
        inst.given = inst.given - lease.work if inst.leases else 0.0
        if not inst.leases:
            inst.working_s += now - inst.working_since
            self._working -= 1
            inst.read_at = min(inst.read_at, now)  # nothing is left that it could be reading
        inst.loses(now)
        self.ends[how] = self.ends.get(how, 0) + 1

    def tick(self, now: float) -> None:
        """Release what has expired, renew what will. Call it every second or so."""
        while self._expiring and (self._expiring[0].over or self._expiring[0].expires_at <= now):
            lease = self._expiring.popleft()
            if lease.started and not lease.over:
                self._serving.append(lease)
            else:
                self._expire(lease, "expired", now)
        while self._serving and (self._serving[0].over or self._serving[0].given_at + MAX_SERVE_S <= now):
            self._expire(self._serving.popleft(), "lost", now)
        if len(self._expiring) > 2 * len(self._leases) + 1000:
            self._expiring = deque(lease for lease in self._expiring if not lease.over)
        for inst in self._instances.values():
            inst.stock.drop_old(now)
            if inst.circuit.tick(now) or (inst.entry is not None and not inst.stock.size):
                self._requeue(inst, now)
            self._wants_tokens(inst, now)
        if self._ticked is not None and now > self._ticked[0]:
            # Other loadbalancers' requests are seen when they start; our own may still be held.
            came = max(self.arrivals - self._ticked[1], self._starts - self._ticked[2])
            arrived_s = came / (now - self._ticked[0])
            self._ticks += 1
            self._arrivals_s += max(ARRIVALS_WEIGHT, 1.0 / self._ticks) * (arrived_s - self._arrivals_s)
        self._ticked = now, self.arrivals, self._starts
        self._learn_mix()
        self._queues = {cls: q for cls, q in self._queues.items() if q.draining or q.steady}
        self._survey()

    def _expire(self, lease: Lease, how: str, now: float) -> None:
        if not lease.over:
            inst = self._instances[lease.instance_id]
            self._release(inst, lease, how, now)
            self._requeue(inst, now)

    # -- those who wait --

    def hold(self, ask: Ask, until: float, now: float) -> Waiter | None:
        """A place at the end of its lane, or None when as many are held as may be."""
        blocked = not self._only_avoids(ask, now)
        return self.line.hold(
            ask, until, now, self._time_to_give_s(ask), self._wait_s(ask, now), blocked=blocked
        )

    def _time_to_give_s(self, ask: Ask) -> float:
        """For so long it may wait and still be in time: what reading it takes is not left for waiting."""
        read_s = ask.prompt_tokens * self.prefill_weight * self._hot / max(self._hot_throughput, 1e-9)
        return self.slo.first_token_limit_s(ask.prompt_tokens) - read_s

    def _wait_s(self, ask: Ask, now: float) -> float:
        """How long it would wait if it came now, by the work ahead and by when something will be hot."""
        if self._hot:
            return self.line.ahead_of(ask.priority) / max(self._hot_throughput, 1e-9)
        return 0.0 if self._hot_expected_at is None else max(0.0, self._hot_expected_at - now)

    def cancel(self, waiter: Waiter) -> None:
        """It waits no more: the client went away, or its time is over."""
        self.line.cancel(waiter)

    def grant(self, now: float, most: int | None = None) -> list[tuple[Waiter, Lease]]:
        """Leases for those who may be served now, in the order of the line; most: so many at once.

        Call it whenever capacity may have appeared, also with time alone, and again when line.cut says so.
        """
        self._claimed.clear()
        self._waits_for_one = None
        return self.line.grant(
            now,
            lambda ask, hurries: self._lease(ask, now, hurries=hurries),
            lambda ask: self._only_avoids(ask, now),
            most,
        )

    def _only_avoids(self, ask: Ask, now: float) -> bool:
        """Whether it waits for one instance only, or all that has room is one it must not go to."""
        if self._waits_for_one is ask:
            return True
        return bool(ask.avoid) and self._choose(ask.work, (), now) is not None

    # -- tokens --

    def refills(self, now: float) -> list[Refill]:
        """What to fetch now; each is under way until its answer is given back. Call it every 20 ms or so.

        Instances that came together run low together, so a few are refilled in one call, more of those
        that are dry.
        """
        dry: list[Instance] = []
        low: list[Instance] = []
        for instance_id in list(islice(self._thirsty, REFILL_LOOK)):
            inst = self._instances[instance_id]
            if not inst.is_low(now):
                del self._thirsty[instance_id]  # it has been filled since
            elif now >= inst.retry_at:
                (low if inst.stock.size else dry).append(inst)
            else:  # it failed lately: the others first
                del self._thirsty[instance_id]
                self._thirsty[instance_id] = None
        out: list[Refill] = []
        for inst in dry[:REFILL_DRY] + low[:REFILL_LOW]:
            del self._thirsty[inst.id]
            inst.refilling = True
            # By its use until now: one that has just begun to be used is not refilled in two steps.
            inst.level = max(inst.level, self._wanted_level(inst, now))
            count = min(BATCH, inst.level - inst.stock.fresh(now))
            out.append(Refill(inst.told, count))
        return out

    def add_tokens(
        self,
        refill: Refill,
        boot_id: str,
        tokens: Sequence[str],
        expires_in_s: float,
        seq: int,
        now: float,
    ) -> None:
        """A batch came, all with the same life from now. seq: the number of the instance's last event."""
        inst = self._same(refill)
        if inst is None:
            return
        if not tokens or expires_in_s < TOKEN_LIFE_S:
            self.refill_failed(refill, now)
            return
        inst.refilling = False
        inst.refill_failures = 0
        if inst.boot_id != boot_id:
            self._booted(inst, boot_id, seq, now)
        level = self._wanted_level(inst, now)
        if now - inst.counted_from < USE_INTERVAL_S:
            inst.level = max(inst.level, level)  # too short to say that it is used less
        else:
            inst.level, inst.counted_from, inst.taken = level, now, 0
        inst.stock.add(tokens, expires_in_s, now)
        self._wants_tokens(inst, now)
        self._requeue(inst, now)

    def _wanted_level(self, inst: Instance, now: float) -> int:
        """Tokens that last STOCK_S by its use since counted_from."""
        level = STOCK_S * inst.taken / max(now - inst.counted_from, 0.05)
        if not inst.stock.size and inst.taken:
            level = max(level, 2.0 * inst.level)  # it ran dry, so how much was wanted is not known
        return round(min(STOCK_MOST, max(STOCK_LEAST, level)))

    def refill_failed(self, refill: Refill, now: float) -> None:
        """No tokens came: it is tried again later, and counts as a failure of the instance."""
        inst = self._same(refill)
        if inst is None:
            return
        inst.refilling = False
        inst.retry_at = now + min(REFILL_RETRY_S[1], REFILL_RETRY_S[0] * 2.0 ** min(inst.refill_failures, 10))
        inst.refill_failures += 1
        self._wants_tokens(inst, now)
        inst.failures += 1
        self._doubt(inst, now)
        self._requeue(inst, now)

    def _new_memory(self, inst: Instance) -> None:
        """It holds no prefix that it has served."""
        self._memories.pop(inst.memory, None)
        inst.memory = next(self._counter)
        self._memories[inst.memory] = inst

    def _wants_tokens(self, inst: Instance, now: float) -> None:
        if inst.is_low(now):
            self._thirsty[inst.id] = None

    def _booted(self, inst: Instance, boot_id: str, seq: int, now: float) -> None:
        """It is another boot than the one we knew: the old one's tokens and requests have died with it."""
        for lease in list(inst.leases.values()):
            self._release(inst, lease, "lost", now)
        inst.stock.clear()
        inst.boot_id, inst.seq, inst.push_number = boot_id, seq, -1
        inst.base, inst.foreign, inst.quiet, inst.free_at = None, 0.0, False, now
        inst.belief.clear(now)
        self._new_memory(inst)
        inst.strangers.clear()
        inst.span = None
        self._wants_tokens(inst, now)

    # -- load reports --

    def polls(self, now: float) -> list[Poll]:
        """Whom to ask for a load report now; nobody is asked twice at once. Call it every 20 ms or so.

        A part of the instances is looked at in each call and a few are asked: neither comes in bursts.
        """
        out: list[Poll] = []
        for instance_id in list(islice(self._doubted, POLL_FEW)):
            del self._doubted[instance_id]
            inst = self._instances.get(instance_id)
            if inst is None or inst.boot_id is None or not inst.circuit.to_ask:
                continue
            if inst.polling:
                self._doubted[instance_id] = None  # that one was asked for before
            else:
                out.append(self._poll(inst, now))
        for _ in range(math.ceil(len(self._instances) / SWEEP)):
            if len(out) == POLL_FEW:
                break
            if not self._to_poll:
                self._to_poll = list(self._instances.values())
            inst = self._to_poll.pop()
            if inst.look_at > now or inst.polling or inst.boot_id is None:
                continue
            due_at = inst.polled_at + self._poll_interval_of(inst)
            if due_at > now:
                inst.look_at = min(due_at, now + self.poll_interval_s)
            elif self._instances.get(inst.told.id) is inst:
                out.append(self._poll(inst, now))
        return out

    def _poll(self, inst: Instance, now: float) -> Poll:
        inst.polling = True
        inst.asked_at = now
        inst.circuit.asked(now)
        return Poll(inst.told, inst.seq)

    def _poll_interval_of(self, inst: Instance) -> float:
        """How old its report may get: what is half empty does not look full by mistake, so it can wait."""
        if inst.circuit.state is not State.CLOSED:
            return self.poll_interval_s
        if not (inst.leases or inst.foreign or inst.told.draining):
            return IDLE_POLL_RATIO * self.poll_interval_s
        half_full = 2.0 * (inst.given + inst.foreign) >= inst.capacity
        share = (1.0 if half_full else 2.0) * self._working / MAX_POLLS_S
        return max(self.poll_interval_s, share)

    def report(self, poll: Poll, load: LoadReport, now: float) -> None:
        """A load report came: what ended is released, and the estimate starts again from what is left."""
        inst = self._same(poll)
        if inst is None:
            return
        asked_at = inst.asked_at if inst.polling else now
        inst.polling = False
        inst.polled_at = now
        inst.reports += 1
        inst.silent = 0
        if inst.boot_id != load.boot_id:
            self._booted(inst, load.boot_id, load.seq, now)
        inst.seq = load.seq
        inst.running, inst.waiting = load.running, load.waiting
        self._learn_throughput(inst, load, now)
        self._take_events(inst, load, inst.reports, now)
        inst.belief.heard(now)
        self._release_lost(inst, load, now)
        self._count_strangers(inst, load, now)
        self._learn_pace(inst, load, now)
        unknown = max(0, load.running + load.waiting - len(inst.leases) - len(inst.strangers))
        inst.foreign = sum(inst.strangers.values()) + unknown * self._mean_work
        inst.free_at = now + (inst.given + inst.foreign) / inst.throughput
        if load.model_up:
            inst.circuit.well(asked_at, now)
        else:
            self._broke(inst, now)
            if inst.down:  # for the second time: what it was answering has died with it
                self._lose(inst, now, started_only=True)
        inst.down = not load.model_up
        self._requeue(inst, now)

    def poll_failed(self, poll: Poll, now: float) -> None:
        """No load report came; a failure of the instance."""
        inst = self._same(poll)
        if inst is not None:
            inst.polling = False
            inst.polled_at = now
            inst.silent += 1
            self._broke(inst, now)
            if inst.silent >= SILENT:
                self._lose(inst, now, started_only=False)
            self._requeue(inst, now)

    def pushed(self, instance_id: int, push: PushedReport, now: float) -> float | None:
        """An instance said by itself what happened: seconds until it may speak again.

        None when it is not believed: of a boot that we do not know, or heard before. What it cannot say, how
        busy its engine is, is polled; what it leaves out too.
        """
        inst = self._instances.get(instance_id)
        if inst is None or inst.boot_id != push.boot_id or push.number <= inst.push_number:
            return None
        inst.push_number = push.number
        inst.pushes += 1
        self._take_events(inst, push, inst.reports + 1, now)
        inst.belief.heard(now)
        if push.missed or push.after > inst.seq:
            inst.polled_at = -math.inf
            inst.look_at = now
        else:
            inst.seq = max(inst.seq, push.seq)
        if not push.model_up:
            self._broke(inst, now)
        self._requeue(inst, now)
        if inst.strangers:
            return max(PUSH_SOON_S, self._working / MAX_PUSHES_SOON_S)
        return max(PUSH_INTERVAL_S, self._working / MAX_PUSHES_S)

    def _take_events(self, inst: Instance, said: LoadReport | PushedReport, report: int, now: float) -> None:
        for request_id, size in zip(said.started, said.started_bytes or repeat(0), strict=False):
            lease = inst.leases.get(request_id)
            if lease is None:
                if request_id not in inst.strangers:
                    self._starts += 1
                    if request_id not in self._done_early:
                        self._stranger(inst, request_id, size, now)
            elif not lease.started:
                self.allowance.settled(lease)
                inst.circuit.started(request_id)
                lease.started = report
                self._starts += 1
                if size:
                    self._sizes.own(size, float(lease.row[PROMPT]))
        for end in said.ended:
            if end.id in inst.strangers:
                self._stranger_left(inst, end.id, now)
            self._ended(inst, end, now)

    def _stranger(self, inst: Instance, request_id: str, size: int, now: float) -> None:
        """A request that we gave no lease for has started there: it is as long as it says, or as usual."""
        prompt, request = self._sizes.prompt_tokens(size), self._usual
        if prompt is not None:
            kind = self._lengths.kind(round(prompt), None)
            request = row(prompt, self._lengths.mean(kind, None), math.inf, kind)
        inst.belief.add(request_id, request, now)
        work = float(request[PROMPT] * self.prefill_weight + request[LEFT])
        inst.gets(work, now)
        inst.strangers[request_id] = work
        inst.foreign += work
        self._reads(inst, float(request[PROMPT]), request, now)

    def _stranger_left(self, inst: Instance, request_id: str, now: float) -> None:
        inst.belief.remove(request_id, now)
        left = inst.foreign - inst.strangers.pop(request_id)
        inst.foreign = left if left > 1e-6 else 0.0  # exactly 0 where nothing is left: then it is idle
        inst.loses(now)

    def _count_strangers(self, inst: Instance, load: LoadReport, now: float) -> None:
        """No more of other loadbalancers' requests are believed to be there than the instance has."""
        if not inst.strangers:
            return
        own = sum(1 for lease in inst.leases.values() if lease.started)
        foreign = max(0, load.running + load.waiting - own)
        while len(inst.strangers) > foreign:
            self._stranger_left(inst, next(iter(inst.strangers)), now)

    def _learn_pace(self, inst: Instance, load: LoadReport, now: float) -> None:
        """Compare how long its steps took with what was expected of them (dispatch/step_times.py)."""
        made, read = load.generation_tokens_total, load.prompt_tokens_total
        if not load.model_up or not load.running:
            inst.span = None  # it may have paused
            return
        reading, context = inst.belief.at_work(now)
        at_work = max(1.0, load.running - reading)
        if inst.span is None or not inst.span.goes_on(now, made, read):
            inst.span = Span(now, at_work, context, made, read)
            return
        inst.span.take(now, at_work, context)
        if now - inst.span.from_s >= SPAN_S:
            inst.pace.observe(inst.span, made, read, self._mean_prompt, self._mean_squares)
            inst.belief.follow(inst.pace.constants)
            inst.span = Span(now, at_work, context, made, read)

    def _ended(self, inst: Instance, end: RequestEnd, now: float) -> None:
        lease = inst.leases.get(end.id)
        if lease is not None:
            if end.status == "finished":
                inst.circuit.finished(end.id)
            elif end.status == "failed":
                self._word(inst, lease, now)
            self._release(inst, lease, end.status if end.status in ENDS else "failed", now)
            kind = int(lease.row[KIND])
        elif end.id in self._done_early:
            kind = self._done_early.pop(end.id)
        else:
            return
        if end.status == "finished":
            self._lengths.ended(end.output_tokens, kind)

    def _release_lost(self, inst: Instance, load: LoadReport, now: float) -> None:
        """Leases known to have started are over when two reports in a row say that nothing is under way.

        Their ends were lost: the instance keeps a bounded number of events, and its report can lag by a step.
        """
        quiet = load.model_up and load.running + load.waiting == 0
        if quiet and inst.quiet:
            for lease in [x for x in inst.leases.values() if 0 < x.started < inst.reports]:
                self._release(inst, lease, "lost", now)
        inst.quiet = quiet

    def _learn_throughput(self, inst: Instance, load: LoadReport, now: float) -> None:
        """Follow the observed rate: up at any time, down only when it had all the work it can hold.

        What is not full shows a higher rate now and then by chance, so it is watched for RATE_UP_S first.
        """
        if not load.model_up:
            inst.base = None
            return
        total = load.generation_tokens_total + self.prefill_weight * load.prompt_tokens_total
        present = load.running + load.waiting
        seen_work = inst.given * min(1.0, present / len(inst.leases)) if inst.leases else 0.0
        saturated = load.waiting > 0 or seen_work >= SATURATED * inst.capacity
        if inst.base is not None:
            at, before, generated = inst.base
            if total >= before and now - at < RATE_INTERVAL_S[0]:
                return
            full = saturated and inst.was_saturated
            if total >= before and now - at < RATE_UP_S and saturated == inst.was_saturated and not full:
                return
            if total >= before and now - at <= RATE_INTERVAL_S[1]:
                rate = (total - before) / (now - at)
                made = load.generation_tokens_total - generated
                self._learn_capacity(inst, load, saturated, made / (now - at), now)
                if full or (rate > inst.throughput and now - at >= RATE_UP_S):
                    inst.measured = True
                    self._set_throughput(inst, inst.throughput + RATE_WEIGHT * (rate - inst.throughput), now)
        inst.base, inst.was_saturated = (now, total, load.generation_tokens_total), saturated

    def _learn_capacity(
        self, inst: Instance, load: LoadReport, saturated: bool, tokens_s: float, now: float
    ) -> None:
        """Less while requests wait inside it or get their tokens too slowly, more while it is full and well.

        So it settles where its memory is full or the objective would be missed, whatever the mix of lengths.
        """
        present = load.running + load.waiting
        # Prompts that it was given a moment ago wait to be read: that is no lack of memory.
        crowded = load.waiting >= max(2.0, WAITING_SHARE * present) and now >= inst.read_at
        # Without tokens all of the time went into prompts, which says nothing of how far tokens are apart.
        slow = load.running > 1 and 0.0 < tokens_s * SLOW_SHARE * self.slo.output_token_s < load.running
        if (crowded and inst.crowded) or (slow and saturated):
            factor = CAPACITY_STEPS[0]
        elif saturated and inst.was_saturated and not crowded:
            factor = CAPACITY_STEPS[1]
        else:
            factor = 1.0
        inst.crowded = crowded
        if factor != 1.0:
            told = inst.told.capacity_work
            inst.capacity = min(told * CAPACITY_RANGE, max(told / CAPACITY_RANGE, inst.capacity * factor))
            inst.classify()

    def _set_throughput(self, inst: Instance, throughput: float, now: float) -> None:
        """Its work stays what it is; the time to drain it changes."""
        told = inst.told.throughput_work_s
        left = inst.work(now)
        inst.throughput = min(told * RATE_RANGE, max(told / RATE_RANGE, throughput))
        inst.belief.does(inst.throughput)
        inst.free_at = now + left / inst.throughput
        inst.classify()

    # -- failures --

    def _word(self, inst: Instance, lease: Lease, now: float, *, blame: bool = True, weight: int = 1) -> None:
        """The lease's request failed there, by its client's word or by its status."""
        inst.failures += 1
        if not blame:
            return
        self._by_word = {i for i in self._by_word if self._is_away(i)}
        alone = inst.id in self._by_word or len(self._by_word) < max(1.0, ALONE_SHARE * self._hot)
        inst.circuit.word(lease.client, now, alone=alone, probe=lease.request_id, weight=weight)
        if inst.circuit.state is State.OPEN:
            self._by_word.add(inst.id)
        self._ask_at_once(inst)

    def _is_away(self, instance_id: int) -> bool:
        inst = self._instances.get(instance_id)
        return inst is not None and inst.circuit.state is not State.CLOSED

    def _doubt(self, inst: Instance, now: float) -> None:
        inst.circuit.doubt(now)
        self._ask_at_once(inst)

    def _ask_at_once(self, inst: Instance) -> None:
        if inst.circuit.to_ask:
            self._doubted[inst.id] = None

    def _broke(self, inst: Instance, now: float) -> None:
        """We saw it ourselves: it is avoided at once."""
        inst.failures += 1
        inst.circuit.broke(now)

    def _lose(self, inst: Instance, now: float, *, started_only: bool) -> None:
        """The requests that it had are lost; their clients have been told so by their connections."""
        for lease in list(inst.leases.values()):
            if lease.started or not started_only:
                self._release(inst, lease, "lost", now)

    # -- the queue --

    def _requeue(self, inst: Instance, now: float) -> None:
        """Put it where it belongs after any change: in the queue of its class, or nowhere."""
        inst.leave_queue()
        if inst.told.draining or not inst.stock.size or not inst.circuit.left:
            return
        queue = self._queues.get(inst.cls)
        if queue is None:
            queue = self._queues[inst.cls] = Queue()
        queue.add(inst, (self._rng.random(), next(self._counter)), now)

    def _same(self, errand: Refill | Poll) -> Instance | None:
        """The instance an errand was for; None when it is gone or has become another."""
        inst = self._instances.get(errand.instance_id)
        return inst if inst is not None and inst.told.auth_url == errand.told.auth_url else None

    # -- what it looks like --

    def usage(self, now: float) -> Usage:
        """How much is going on, for the autoscaler."""
        self._forget_old_refusals(now)
        uses: dict[int, InstanceUse] = {}
        shares = 0.0
        for i in self._instances.values():
            work = i.work(now)
            # Draining instances count with what they have: the work is there, and more like it will come.
            shares += work / i.capacity
            uses[i.told.id] = InstanceUse(len(i.leases), work, i.working(now), i.throughput, i.failures)
        unserved = self.line.work + sum(work for _, work in self._refused_work)
        return Usage(
            busy=min(float(self._hot), shares),
            demand=shares + unserved / self._typical_capacity,
            held=self.line.held,
            held_work=self.line.work,
            arrivals=self.arrivals,
            arrived_work=self.arrived_work,
            instances=uses,
            arrived_prompt_tokens=self.arrived_prompt_tokens,
            arrived_output_tokens=self.arrived_output_tokens,
            in_flight=len(self._leases),
            late=self.line.late,
            held_prompt_tokens=self.line.prompt_tokens,
            oldest_wait_s=self.line.oldest_wait_s(now),
            turned_late=self.line.turned_late,
        )

    def describe(self, now: float) -> list[dict[str, Any]]:
        """One row per instance for an operator; no tokens."""
        return [
            {
                "id": i.id,
                "state": "draining" if i.told.draining else "hot",
                "address": i.told.address,
                "in_queue": i.entry is not None,
                "unfinished": len(i.leases),
                "work": round(i.work(now), 1),
                "capacity_work": round(i.capacity, 1),
                "seconds_to_drain": round(i.work(now) / i.throughput, 3),
                "throughput_work_s": round(i.throughput, 1),
                "throughput_measured": i.measured,
                "running": i.running,
                "waiting": i.waiting,
                "tokens_in_stock": i.stock.size,
                "reports_pushed": i.pushes,
                "failures": i.failures,
                "avoided": i.circuit.state is State.OPEN,
                "circuit": i.circuit.state.value,
                "working_s": round(i.working(now), 1),
            }
            for i in self._instances.values()
        ]

    def _forget_old_refusals(self, now: float) -> None:
        while self._refused_work and self._refused_work[0][0] < now - REFUSED_S:
            self._refused_work.popleft()
