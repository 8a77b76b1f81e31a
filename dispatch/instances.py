"""What is known of one instance, and the queue of those that can serve."""

import heapq
import math

from dispatch.belief import Belief
from dispatch.pace import Pace, Span
from dispatch.stock import Stock
from dispatch.types import HotInstance, Lease
from model_timing import like

FLOOR = 0.5
"""An unfinished lease counts for at least this share of its work: on average half of it is left."""

CLASS_RATIO = 1.25
"""Instances whose throughputs (and whose seconds of capacity) are within this ratio share a queue."""

FEW = 3
"""Places of a heap that are compared: among machines of about one speed the first ones are near enough."""

READING_S = 1.0
"""Seconds of prompts an instance may have to read before it is given another: half of the objective."""

STOCK_LEAST, STOCK_MOST = 400, 2000
"""Tokens kept for an instance, and a bound. An idle one has enough for a burst and for a while of use: with
64 a thousand that begin to be used together were refilled twice in their first seconds, which took a sixth
of the rate (bench/route.py, 2026-11). 400 are 40 kB."""

AVOID_S = (1.0, 30.0)
"""How long it is avoided at least: the first, doubling up to the second until a request is finished there."""


class Instance:
    """What is known of one instance of the hot set, under one address."""

    def __init__(self, told: HotInstance, now: float) -> None:
        self.told = told
        self.throughput = told.throughput_work_s
        self.capacity = told.capacity_work
        self.crowded = False  # requests waited inside it at the last report
        self.measured = False
        self.cls = (0, 0)
        self.leases: dict[str, Lease] = {}
        self.given = 0.0  # work of the unfinished leases
        self.foreign = 0.0  # work that others gave it, by the last report
        self.free_at = now
        self.read_at = now  # when it will have read the prompts that it was given
        self.entry: Entry | None = None  # its place in the queue; None when it cannot serve
        self.stock = Stock()
        self.belief = Belief(now)
        self.pace = Pace(told.timing or like(told.throughput_work_s))
        self.strangers: dict[str, None] = {}  # requests in its belief that we gave no lease for
        self.span: Span | None = None
        self.boot_id: str | None = None
        self.level = STOCK_LEAST
        self.taken = 0
        self.counted_from = now
        self.refilling = False
        self.refill_failures = 0
        self.retry_at = now
        self.seq = 0
        self.push_number = -1
        self.pushes = 0
        self.polling = False
        self.polled_at = now
        self.reports = 0
        # (time, work total, tokens made) that the next rate is taken from
        self.base: tuple[float, float, int] | None = None
        self.was_saturated = False
        self.quiet = False
        self.running = 0
        self.waiting = 0
        self.failures = 0
        self.streak = 0
        self.avoided_until: float | None = None
        self.avoid_s = AVOID_S[0]
        self.working_s = 0.0
        self.working_since = now
        self.classify()

    @property
    def id(self) -> int:
        return self.told.id

    def classify(self) -> None:
        step = math.log(CLASS_RATIO)
        self.cls = (
            round(math.log(self.throughput) / step),
            round(math.log(self.capacity / self.throughput) / step),
        )

    def work(self, now: float) -> float:
        """The work it has left, by the estimate."""
        total = self.given + self.foreign
        left = (self.free_at - now) * self.throughput
        if left > total:
            return total
        return left if left > FLOOR * total else FLOOR * total

    def at_floor(self, now: float) -> bool:
        """Whether its work stays what it is until something happens."""
        return (self.free_at - now) * self.throughput <= FLOOR * (self.given + self.foreign)

    def has_room(self, work: float, left: float, now: float) -> bool:
        """Whether work may be given to one that has left: within its capacity, or because it is idle."""
        if left + work <= self.capacity and self.read_at - now <= READING_S:
            return True
        return not self.leases and self.foreign == 0.0

    def is_low(self, now: float) -> bool:
        """Whether tokens are to be fetched for it."""
        low = max(STOCK_LEAST // 2, self.level // 4)
        return not self.told.draining and not self.refilling and self.stock.fresh(now) < low

    def working(self, now: float) -> float:
        """Seconds with a request under way, so far."""
        return self.working_s + (now - self.working_since if self.leases else 0.0)


Entry = tuple[float, float, int, Instance]
"""(key, random, counter, instance): ties are broken by chance, then by age. Void unless it is inst.entry."""


class Queue:
    """The instances of one class that can serve. No entry is ever taken out, they become void."""

    def __init__(self) -> None:
        self.draining: list[Entry] = []  # by free_at
        self.steady: list[Entry] = []  # by seconds of work: at their floor, or idle

    def add(self, inst: Instance, tie: tuple[float, int], most: int, now: float) -> None:
        steady = inst.at_floor(now)
        heap = self.steady if steady else self.draining
        key = inst.work(now) / inst.throughput if steady else inst.free_at
        inst.entry = (key, *tie, inst)
        heapq.heappush(heap, inst.entry)
        if len(heap) > most:
            heap[:] = [e for e in heap if e[3].entry is e]
            heapq.heapify(heap)

    def first(self, now: float) -> list[Entry]:
        """The first of both heaps: their first places, in which the two smallest keys are for certain."""
        self._mend(now)
        return self.draining[:FEW] + self.steady[:FEW]

    def take(self, most: int) -> "list[tuple[list[Entry], Entry]]":
        """Take the first so many out of each heap: (heap, entry). Put them back."""
        taken = []
        for heap in (self.draining, self.steady):
            found = 0
            while heap and found < most:
                entry = heapq.heappop(heap)
                if entry[3].entry is entry:
                    taken.append((heap, entry))
                    found += 1
        return taken

    def _mend(self, now: float) -> None:
        """Make the first entry of each heap a true one."""
        while self.draining:
            inst = self.draining[0][3]
            if inst.entry is self.draining[0]:
                if not inst.at_floor(now):
                    break
                _, chance, age, _ = self.draining[0]
                inst.entry = (inst.work(now) / inst.throughput, chance, age, inst)
                heapq.heappush(self.steady, inst.entry)
            heapq.heappop(self.draining)
        while self.steady and self.steady[0][3].entry is not self.steady[0]:
            heapq.heappop(self.steady)
