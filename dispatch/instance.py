"""What is known of one instance, and the queue of those that can serve."""

import math
from typing import TYPE_CHECKING

from dispatch.circuit_breaker import Circuit
from dispatch.predicted_load import Belief, Beliefs
from dispatch.step_times import Pace, Span
from dispatch.token_stock import Stock
from dispatch.types import Lease
from engine.timing import like
from web.messages.hot_set import HotInstance

if TYPE_CHECKING:
    from dispatch.candidate_index import Entry, Queue

FLOOR = 0.5
"""An unfinished lease counts for at least this share of its work: on average half of it is left."""

CLASS_RATIO = 1.25
"""Instances whose throughputs (and whose seconds of capacity) are within this ratio share a queue."""

READING_S = 1.0
"""Seconds of prompts an instance may have to read before it is given another: half of the objective."""

STOCK_LEAST, STOCK_MOST = 400, 2000
"""Tokens kept for an instance, and a bound. An idle one has enough for a burst and for a while of use: with
64 a thousand that begin to be used together were refilled twice in their first seconds, which took a sixth
of the rate (bench/route, 2026-11). 400 are 40 kB."""


class Instance:
    """What is known of one instance of the hot set, under one address."""

    def __init__(self, told: HotInstance, beliefs: Beliefs, now: float) -> None:
        self.told = told
        self.throughput = told.throughput_work_s
        self.capacity = told.capacity_work
        self.crowded = False  # requests waited inside it at the last report
        self.measured = False
        self.cls = (0, 0)
        self.leases: dict[str, Lease] = {}
        self.given = 0.0  # work of the unfinished leases
        self.foreign = 0.0  # work that others gave it, by what it said
        self.free_at = now
        self.read_at = now  # when it will have read the prompts that it was given
        self.read_share = 1.0  # of its time, that may go into that
        self.entry: Entry | None = None  # its place in the queue; None when it cannot serve
        self.queue: Queue | None = None
        self.stock = Stock()
        self.pace = Pace(told.timing.timing() if told.timing else like(told.throughput_work_s))
        self.belief = Belief(beliefs, self.pace.constants, self.throughput, now)
        self.memory = -1  # the number of its KV memory, another after a reboot
        self.strangers: dict[str, float] = {}  # requests in its belief that we gave no lease for -> work
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
        self.look_at = now  # until then no report is due
        self.reports = 0
        # (time, work total, tokens made) that the next rate is taken from
        self.base: tuple[float, float, int] | None = None
        self.was_saturated = False
        self.quiet = False
        self.running = 0
        self.waiting = 0
        self.failures = 0
        self.circuit = Circuit()
        self.silent = 0  # reports in a row that did not come
        self.asked_at = now
        self.down = False  # by the last report its engine is
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

    def gets(self, work: float, now: float) -> None:
        """Work is coming, which is not counted yet: it will have drained so much later."""
        self.free_at = now + self.work(now) / self.throughput + work / self.throughput

    def loses(self, now: float) -> None:
        """Work has gone, which is not counted any more: no more is left than what is."""
        self.free_at = min(self.free_at, now + (self.given + self.foreign) / self.throughput)

    @property
    def idle(self) -> bool:
        """Whether nothing goes on there: it may be given a request of any size."""
        return not self.leases and self.foreign == 0.0

    def has_room(self, work: float, left: float, now: float) -> bool:
        """Whether work may be given to one that has left: within its capacity, or because it is idle."""
        if left + work <= self.capacity and self.read_at - now <= READING_S:
            return True
        return self.idle

    def leave_queue(self) -> None:
        """It gets no more requests."""
        if self.queue is not None:
            self.queue.remove(self)

    def is_low(self, now: float) -> bool:
        """Whether tokens are to be fetched for it."""
        if self.refilling or self.told.draining:
            return False
        stock = self.stock  # what is to be renewed counts for nothing
        return stock.size < max(STOCK_LEAST // 2, self.level // 4) or now >= stock.renew_at

    def working(self, now: float) -> float:
        """Seconds with a request under way, so far."""
        return self.working_s + (now - self.working_since if self.leases else 0.0)
