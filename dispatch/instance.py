"""What is known of one instance: leases and other requests, tokens, reports, speed, failures.

The work that an instance has left is an estimate, kept as the time when it will have drained, `free_at`:

    a lease of work w:   free_at = now + (work left + w) / throughput
    a load report:       free_at = now + work of all unfinished leases / throughput
    in between:          free_at stays, and the work (free_at - now) * throughput drains by itself

The estimate never leaves [FLOOR, 1] * the work of the unfinished leases: a lease counts until its end is
reported, however long ago it was given.
"""

import math

from dispatch.circuit_breaker import CircuitBreaker
from dispatch.lease import Lease
from dispatch.measured_capacity import CAPACITY_RANGE, RATE_RANGE, RATE_WEIGHT, SLOW_SHARE, CapacityMeter
from dispatch.predicted_load import LoadTable, PredictedLoad
from dispatch.report_history import ReportHistory
from dispatch.step_times import StepTimes
from dispatch.token_stock import TokenStock
from engine.forward import COL_PROMPT_S, LEFT, PROMPT, UNREAD, Floats
from engine.step_time_constants import like
from web.messages.hot_set import HotInstance
from web.messages.reports import LoadReport

FLOOR = 0.5
"""Least share of its work that an unfinished lease counts for: on average half of it is left."""

CLASS_RATIO = 1.25
"""Ratio of throughputs, and of seconds of capacity, within which instances are of one class of speed."""

READING_S = 1.0
"""Most seconds of prompts to read with which an instance is given another request: half of the objective."""

READ_LEAST = 0.1
"""Least share of an instance's time that must be left for prompts, or it is given no more requests."""

MOST_OTHERS = 1024
"""Requests of other loadbalancers that are believed of an instance, and no more than twice what it can run at
once where that is known: what it says beyond that it cannot hold."""

KV_SHARE = 0.96
"""Admit until predicted peak KV use reaches this share of the memory: an instance that runs full puts
requests back and reads their prompts again. By present use first tokens came 1.6 times later at 95 % load on
unequal machines; 0.90 and 1.0 are worse, too (bench/dispatch)."""


class KvMemory:
    """The KV memory that an instance has since one boot; its `instance` is None once that boot is over."""

    __slots__ = ("instance",)

    def __init__(self, instance: "ServingInstance | None" = None) -> None:
        """Start as the memory of an instance's present boot; None: of no boot."""
        self.instance = instance

    def lose(self) -> None:
        """Note that what the KV memory held is lost: its instance has rebooted or left."""
        self.instance = None


class ServingInstance:
    """What is known of one instance of the hot set, under one address. Times are epoch seconds."""

    def __init__(self, spec: HotInstance, table: LoadTable, now: float) -> None:
        """Start an instance without tokens and requests. table: where all instances' load is predicted."""
        self.id = spec.id
        self.spec = spec
        self.draining = spec.draining
        self.timed = spec.timing is not None  # how long its steps take was told
        self.throughput = spec.throughput_work_s
        self.capacity = spec.capacity_work
        self.measured = False  # the throughput
        self.speed_class = (0, 0)
        self.boot_id: str | None = None
        self.memory = KvMemory()
        self.stock = TokenStock(now)
        self.circuit = CircuitBreaker()
        self.reports = ReportHistory(now)
        self.step_times = StepTimes(spec.timing.timing() if spec.timing else like(spec.throughput_work_s))
        self.load = PredictedLoad(table, self.step_times.constants, self.throughput, now)
        self.leases: dict[str, Lease] = {}
        self.leased_work = 0.0  # of those that do not rest
        self._resting = 0  # leases
        self.other_requests: dict[str, float] = {}  # of other loadbalancers, started there -> work
        self.other_work = 0.0  # theirs, also of those that are known by number only
        self.free_at = now
        self.read_at = now  # when it will have read the prompts that it was given
        self._measure_room()
        self._read_share = 1.0  # of its time, that may go into reading
        self._meter = CapacityMeter()
        self._working_s = 0.0
        self._working_since = now
        self._classify()

    def update(self, spec: HotInstance, now: float) -> None:
        """Take over what a new hot set says of this instance; what was measured of it stays."""
        told = self.spec
        self.capacity *= spec.capacity_work / told.capacity_work
        if spec.timing is not None and spec.timing != told.timing:
            self.step_times.tell(spec.timing.timing())
            self.load.set_step_times(self.step_times.constants)
            self._measure_room()
        self.spec, self.draining, self.timed = spec, spec.draining, spec.timing is not None
        if not self.measured:
            self._set_throughput(spec.throughput_work_s, now)
        self._classify()

    def leave(self) -> None:
        """Free its rows in shared tables, because it left the hot set. Call it once, without leases."""
        self.load.close()
        self.memory.lose()

    def reboot(self, boot_id: str, seq: int, now: float) -> None:
        """Begin another boot, when all leases have ended: tokens, other requests and KV memory are lost."""
        self.boot_id = boot_id
        self.stock.clear()
        self.reports.reboot(seq)
        self._meter.reset()
        self.step_times.pause()
        self.load.clear(now)
        self.memory.lose()
        self.memory = KvMemory(self)
        self.other_requests.clear()
        self.other_work = 0.0
        self.free_at = now

    # -- work --

    def work(self, now: float) -> float:
        """Return the estimate of the work that the instance has left, in output-token equivalents."""
        total = self.leased_work + self.other_work
        left = (self.free_at - now) * self.throughput
        if left > total:
            return total
        return left if left > FLOOR * total else FLOOR * total

    @property
    def idle(self) -> bool:
        """Whether the instance has no request but resting leases: then it may be given one of any size."""
        return len(self.leases) == self._resting and self.other_work == 0.0

    def working_s(self, now: float) -> float:
        """Return for how many seconds so far the instance has had at least one unfinished lease."""
        return self._working_s + (now - self._working_since if self.leases else 0.0)

    def add_lease(self, lease: Lease, prompt_work: float, now: float) -> None:
        """Take in a lease that is given now. prompt_work: the part of its work that is reading the prompt."""
        self._add_work(lease.work, now)
        if not self.leases:
            self._working_since = now
            self.reports.look_again(now)
        self.leases[lease.request_id] = lease
        self.load.add(lease.request_id, lease.row, now)
        self.leased_work += lease.work
        self._add_reading(prompt_work, lease.row, now)
        self.circuit.given(lease.request_id, now)

    def end_lease(self, lease: Lease, now: float) -> None:
        """Remove a lease of this instance that is over in whatever way."""
        request_id = lease.request_id
        self.circuit.over(request_id)
        del self.leases[request_id]
        if lease.rests:
            self._resting -= 1
        else:
            self._free(lease, now)
        if not self.leases:
            self._working_s += now - self._working_since
            self.read_at = min(self.read_at, now)  # nothing is left that it could be reading
        self._cap_work(now)

    def _free(self, lease: Lease, now: float) -> None:
        """Give the room that a lease takes on this instance to other requests."""
        self.load.remove(lease.request_id, now)
        self.leased_work = self.leased_work - lease.work if len(self.leases) > self._resting else 0.0

    def rest_unstarted(self, given_until: float, now: float) -> None:
        """Let those leases rest (take no room) that were given until `given_until` and have not started."""
        for lease in self.leases.values():  # as they were given
            if lease.given_at > given_until:
                break
            if not (lease.started or lease.rests):
                lease.rest()
                self._resting += 1
                self._free(lease, now)
                self._cap_work(now)

    def wake_lease(self, lease: Lease, now: float) -> None:
        """Let a resting lease take room on this instance again, because its request has started."""
        lease.wake()
        self._resting -= 1
        self._add_work(lease.work, now)
        self.load.add(lease.request_id, lease.row, now)
        self.leased_work += lease.work

    def add_other(self, request_id: str, row: Floats, prefill_weight: float, now: float) -> None:
        """Take in a request that another loadbalancer sent and that has started on this instance."""
        self.load.add(request_id, row, now)
        work = float(row[PROMPT] * prefill_weight + row[LEFT])
        self._add_work(work, now)
        self.other_requests[request_id] = work
        self.other_work += work
        self._add_reading(float(row[PROMPT]) * prefill_weight, row, now)

    def end_other(self, request_id: str, now: float) -> None:
        """Remove a request of another loadbalancer that has ended on this instance."""
        self.load.remove(request_id, now)
        left = self.other_work - self.other_requests.pop(request_id)
        self.other_work = left if left > 1e-6 else 0.0  # exactly 0 where nothing is left: then it is idle
        self._cap_work(now)

    @property
    def most_others(self) -> int:
        """Most requests of other loadbalancers that this instance can hold, with those waiting inside."""
        return min(MOST_OTHERS, 2 * int(self.step_times.told.max_seqs)) if self.timed else MOST_OTHERS

    @property
    def takes_others(self) -> bool:
        """Whether one more start of another loadbalancer's request is believed of this instance."""
        return len(self.other_requests) < self.most_others

    def count_requests(self, load: LoadReport, mean_work: float, now: float) -> None:
        """Set the work left to that of all requests that a load report counts, each as if just begun.

        mean_work: of a request that the report counts but of which neither a lease nor a start is known.
        """
        present = load.running + load.waiting
        unknown = max(0, present - len(self.leases) + self._resting - len(self.other_requests))
        unknown = min(unknown, self.most_others - min(self.most_others, len(self.other_requests)))
        self.other_work = sum(self.other_requests.values()) + unknown * mean_work
        self.free_at = now + (self.leased_work + self.other_work) / self.throughput

    def drop_missing_others(self, load: LoadReport, now: float) -> None:
        """Remove the oldest requests of other loadbalancers until they are as few as a load report counts."""
        if not self.other_requests:
            return
        own = sum(1 for lease in self.leases.values() if lease.started)
        others = max(0, load.running + load.waiting - own)
        while len(self.other_requests) > others:
            self.end_other(next(iter(self.other_requests)), now)

    def _add_work(self, work: float, now: float) -> None:
        """Let the instance have drained later by this work, which the caller will count as its work."""
        self.free_at = now + self.work(now) / self.throughput + work / self.throughput

    def _cap_work(self, now: float) -> None:
        """Let the instance have at most the work that leased_work and other_work count."""
        self.free_at = min(self.free_at, now + (self.leased_work + self.other_work) / self.throughput)

    def _add_reading(self, prompt_work: float, row: Floats, now: float) -> None:
        """Let the instance have read all of its prompts later by the time that this prompt takes."""
        if self.timed:
            read_s = float(row[UNREAD] * self.step_times.constants[COL_PROMPT_S]) / max(
                self._read_share, READ_LEAST
            )
        else:
            read_s = prompt_work / self.throughput
        self.read_at = max(now, self.read_at) + read_s

    # -- room --

    @property
    def places_left(self) -> float:
        """How many more requests the instance may run at once; infinite where its limit is not known."""
        return self.step_times.told.max_seqs - len(self.load.ids) if self.timed else math.inf

    def _measure_room(self) -> None:
        """Set which share of the instance's room one running request and one token of KV memory are."""
        told = self.step_times.told
        self._place_room, self._token_room = 1.0 / told.max_seqs, 1.0 / told.kv_tokens

    def room_of(self, work: float, row: Floats) -> float:
        """Return the share of the instance that a request takes: of places or memory, or else of capacity."""
        if not self.timed:
            return min(1.0, work / self.capacity)
        tokens: float = row.item(PROMPT) + row.item(LEFT)
        return min(1.0, max(self._place_room, tokens * self._token_room))

    @property
    def can_serve(self) -> bool:
        """Whether the instance may be given requests: it has tokens, does not drain, and is not avoided."""
        return not self.draining and self.stock.size > 0 and self.circuit.left > 0

    def has_room(self, work: float, left: float, now: float) -> bool:
        """Return whether the instance may be given the work: within its capacity, or because it is idle.

        left: the work that it has, in output-token equivalents.
        """
        return (left + work <= self.capacity and self.read_at - now <= READING_S) or self.idle

    def admits(
        self, row: Floats, lengths: Floats, output_token_s: float, now: float, *, hurries: bool
    ) -> bool:
        """Return whether the instance would read the request at once, and still make all its tokens in time.

        lengths: expected lengths (dispatch/output_lengths.py). output_token_s: the objective, seconds between
        tokens. A step of step_s makes a token for each request; with a share r of the time spent on prompts
        tokens come each step_s / (1 - r). So prompts may take no more time than leaves the requests within
        the objective. For a request that hurries (it is late, no other is to be served before it) all time
        may go into prompts.
        """
        if not self.timed or self.idle:
            return True
        free, unread_s, step_s = self.load.room(lengths, KV_SHARE, now)
        self._read_share = 1.0 if hurries else 1.0 - step_s / (SLOW_SHARE * output_token_s)
        if self._read_share < READ_LEAST or self.read_at - now > READING_S:
            return False
        return unread_s <= READING_S and float(row[PROMPT]) + 1.0 <= free

    # -- speed --

    def learn_speed(self, load: LoadReport, prefill_weight: float, output_token_s: float, now: float) -> None:
        """Learn the instance's throughput and capacity from a load report. output_token_s: the objective."""
        leases = len(self.leases) - self._resting
        seen = self.leased_work * min(1.0, (load.running + load.waiting) / leases) if leases else 0.0
        rate, factor = self._meter.observe(
            load,
            load.generation_tokens_total + prefill_weight * load.prompt_tokens_total,
            seen,
            self.throughput,
            self.capacity,
            output_token_s,
            now,
            reading=now < self.read_at,
        )
        if factor != 1.0:
            told = self.spec.capacity_work
            self.capacity = min(told * CAPACITY_RANGE, max(told / CAPACITY_RANGE, self.capacity * factor))
            self._classify()
        if rate is not None:
            self.measured = True
            self._set_throughput(self.throughput + RATE_WEIGHT * (rate - self.throughput), now)

    def learn_step_times(self, load: LoadReport, prompt: float, squares: float, now: float) -> None:
        """Correct the step times by a report. prompt, squares: mean tokens of prompts, and mean square."""
        if not load.model_up or not load.running:
            self.step_times.pause()
            return
        reading, context = self.load.in_memory(now)
        made, read = load.generation_tokens_total, load.prompt_tokens_total
        if self.step_times.report(
            now, max(1.0, load.running - reading), context, made, read, prompt, squares
        ):
            self.load.set_step_times(self.step_times.constants)

    def _set_throughput(self, throughput: float, now: float) -> None:
        """Set the throughput (work a second): the work left stays as it is, the time to drain it changes."""
        told = self.spec.throughput_work_s
        left = self.work(now)
        self.throughput = min(told * RATE_RANGE, max(told / RATE_RANGE, throughput))
        self.load.set_work_rate(self.throughput)
        self.free_at = now + left / self.throughput
        self._classify()

    def _classify(self) -> None:
        step = math.log(CLASS_RATIO)
        self.speed_class = (
            round(math.log(self.throughput) / step),
            round(math.log(self.capacity / self.throughput) / step),
        )
