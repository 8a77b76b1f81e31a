"""How long a model server takes: continuous batching with prefill, decode, KV memory and a queue.

Work is done in steps. A step makes one token for every request that is past its prompt, and with what is
left of its token budget reads prompts, a part of one if need be. A prompt that is read whole gives its
first token at the end of that step.

       submit ──► waiting ──► running: prompt ──► running: tokens ──► finished
                     ▲                    │             │
                     └── preempted: no KV memory left ──┘   (the last to come goes first)

    decode     step_ms    = a + b*batch + c*context/1000
    prefill    prefill_ms = d + e*P/1000 + f*(P/1000)²       a part from s to t: f*(t² - s²)/1000²
    both       max(a, d) + the other terms: the weights are read once for all of the step
    at least   e*tokens/1000, because every token of a step passes through the same multiplications

Steps in which nobody comes, ends or runs out of memory differ by a constant, so they are one *stretch*
whose ends are known in closed form: whoever asks seldom pays for changes, not for tokens. A change costs
O(log n): steps that make tokens are counted, a request that makes them ends at a count known when it begins,
and of all together only the batch and its context are kept.

Of requests submitted with the ids of their blocks the longest prefix that is cached need not be read, but
for the last token. Blocks are cached when they have been read, and those of the answer when it ends; what
no running request has keeps the KV memory that running requests leave, and goes when they need it, that
which was used longest ago first. A prefix that two running requests share is in memory twice, unlike in an
engine: it counts as theirs. Without blocks nothing is cached.

True after every call:
- KV memory in use is the sum over the running requests, and never over capacity, with what is cached
  beside them as soon as somebody is admitted or ends;
- requests are admitted in the order they came, those that were preempted before all others;
- the answer depends on what was submitted and cancelled when, not on how often one looked.

Times are seconds on the caller's clock; the constants are milliseconds, as in their source.
"""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from enum import Enum
from heapq import heappop, heappush
from typing import NamedTuple

from engine.timing import Timing


class Kind(Enum):
    """What happened to a request."""

    ADMITTED = "admitted"
    TOKENS = "tokens"
    FINISHED = "finished"
    PREEMPTED = "preempted"


class Event(NamedTuple):
    """Something that happened. tokens: new ones, the last of them at `at`; FINISHED has some too."""

    at: float
    id: str
    kind: Kind
    tokens: int = 0


class _Job:
    """A request. held: KV tokens it has; unread: prompt (after a preemption also its own tokens) to read.

    While it makes tokens (`since` is the count of steps at which it began) made and held are what they were
    then. place: its admissions in order; an entry of the heap with another place is void. blocks: their ids,
    pinned: so many of them are in the cache because it runs.
    """

    __slots__ = ("blocks", "held", "id", "made", "pinned", "place", "prompt", "since", "unread", "wanted")

    def __init__(self, id: str, prompt: int, wanted: int, blocks: Sequence[Hashable] = ()) -> None:
        self.id = id
        self.prompt = prompt
        self.wanted = wanted
        self.made = 0
        self.unread = 0
        self.held = 0
        self.since = -1
        self.place = -1
        self.blocks = blocks
        self.pinned = 0


class _Cache:
    """Blocks whose KV memory is there: those that running requests pin, and the others, the oldest first."""

    def __init__(self) -> None:
        self.block_tokens = 0
        self._pins: Counter[Hashable] = Counter()
        self._loose: OrderedDict[Hashable, None] = OrderedDict()

    @property
    def loose_tokens(self) -> int:
        """In blocks that no running request has."""
        return len(self._loose) * self.block_tokens

    def prefix(self, blocks: Sequence[Hashable]) -> int:
        """So many of them, from the first on, are there."""
        for n, block in enumerate(blocks):
            if block not in self._loose and block not in self._pins:
                return n
        return len(blocks)

    def pin(self, job: _Job, upto: int) -> None:
        """The request has its first `upto` blocks."""
        for block in job.blocks[job.pinned : upto]:
            self._loose.pop(block, None)
            self._pins[block] += 1
        job.pinned = max(job.pinned, upto)

    def unpin(self, job: _Job) -> None:
        """It runs no more; the end of a prefix is of no use without its begin, so it is thrown away first."""
        for block in reversed(job.blocks[: job.pinned]):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._loose[block] = None
        job.pinned = 0

    def shrink(self, room_tokens: int) -> None:
        """No more than so much is for those that nobody has."""
        most = max(0, room_tokens) // self.block_tokens
        while len(self._loose) > most:
            self._loose.popitem(last=False)


class ModelServer:
    """One model server in time. A `now` before the last one counts as the last one; belongs to one thread."""

    def __init__(
        self,
        timing: Timing,
        max_seqs: int | None = None,
        step_tokens: int | None = None,
        *,
        every_token: bool = True,
    ) -> None:
        """Idle. max_seqs and step_tokens replace the timing's own; ValueError if they fit no token.

        every_token: tell of all tokens. Without it a request has one TOKENS event, of its first token, and
        one FINISHED, of all the others or of the only one: what a simulator needs, at a fraction of the cost.
        """
        self.timing = timing
        self.max_seqs = timing.max_seqs if max_seqs is None else max_seqs
        self.step_tokens = timing.step_tokens if step_tokens is None else step_tokens
        # Otherwise a step full of decodes would leave prompts unread for ever.
        if not 1 <= self.max_seqs <= self.step_tokens:
            raise ValueError(f"wanted 1 <= max_seqs <= step_tokens, got {self.max_seqs}, {self.step_tokens}")
        self.preemptions = 0
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.cached_tokens_total = 0  # of prompts, not read because they were there
        # What those in the queue have to read: prompts, and of those that were put back their own tokens. How
        # much of it is cached is seen when they are admitted.
        self.waiting_tokens = 0
        self._now = float("-inf")
        self._waiting: OrderedDict[str, _Job] = OrderedDict()
        self._running: OrderedDict[str, _Job] = OrderedDict()
        self._every_token = every_token
        self._places = 0
        self._used = 0
        self._events: list[Event] = []
        # The stretch under way: step k (from 1) ends at _end(k); no steps means idle.
        self._begun = 0.0
        self._first_s = 0.0
        self._longer_s = 0.0  # each step takes so much longer than the one before
        self._steps = 0
        self._done = 0
        self._count = 0  # of steps so far
        self._batch = 0  # requests that make tokens
        self._context = 0  # KV tokens that these hold
        self._ends: list[tuple[int, int, _Job]] = []  # (count at which it ends, place, request)
        self._unread: OrderedDict[str, _Job] = OrderedDict()  # those with prompt to read, as admitted
        self._reading: list[tuple[_Job, int]] = []  # in the stretch under way
        self._cache: _Cache | None = None

    @property
    def running(self) -> int:
        """Requests that are being worked on."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def kv_tokens_used(self) -> int:
        """KV memory in use, in tokens."""
        return self._used

    @property
    def kv_use(self) -> float:
        """The same as a share of the capacity."""
        return self._used / self.timing.kv_tokens

    def submit(
        self,
        id: str,
        prompt_tokens: int,
        output_tokens: int,
        now: float,
        blocks: Sequence[Hashable] = (),
        block_tokens: int = 16,
    ) -> list[Event]:
        """Put a request at the end of the queue, and return what happened until now.

        It gets exactly output_tokens. blocks: ids of what is in its first tokens, block_tokens each (always
        the same number), prompt first and then maybe its answer; those of equal id are of equal tokens, all
        before them included. Raises ValueError, and changes nothing, for an id that is under way, counts
        below 1, and a request that is larger than the KV memory.
        """
        if id in self._running or id in self._waiting:
            raise ValueError(f"request {id}: is under way already")
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(
                f"request {id}: wanted counts of 1 or more, got {prompt_tokens}, {output_tokens}"
            )
        if prompt_tokens + output_tokens > self.timing.kv_tokens:
            raise ValueError(
                f"request {id}: {prompt_tokens} + {output_tokens} tokens, the KV memory has "
                f"{self.timing.kv_tokens}"
            )
        if blocks:
            if block_tokens < 1 or (self._cache and self._cache.block_tokens != block_tokens):
                raise ValueError(f"request {id}: blocks of {block_tokens} tokens, unlike those before")
            if self._cache is None:
                self._cache = _Cache()
                self._cache.block_tokens = block_tokens
        self._catch_up(now)
        self._waiting[id] = _Job(id, prompt_tokens, output_tokens, blocks)
        self.waiting_tokens += prompt_tokens
        self._replan()
        return self._take_events()

    def cancel(self, id: str, now: float) -> list[Event]:
        """Forget a request and free its memory at once; return what happened until now.

        The step under way takes as long as it would have. Nothing is cancelled if it is not there any more.
        """
        self._catch_up(now)
        if job := self._running.pop(id, None):
            self._leaves(job)
            self._reading = [(j, part) for j, part in self._reading if j is not job]
            self._replan()
        elif job := self._waiting.pop(id, None):
            self.waiting_tokens -= job.prompt + job.made
            self._replan()
        return self._take_events()

    def cached_tokens(self, blocks: Sequence[Hashable]) -> int:
        """Tokens of the longest prefix of these blocks that is cached now."""
        cache = self._cache
        if cache is None:
            return 0
        cache.shrink(self.timing.kv_tokens - self._used)
        return cache.prefix(blocks) * cache.block_tokens

    def next_event(self) -> float | None:
        """When the step under way ends, so when tokens come next; None when idle."""
        return self._end(self._done + 1) if self._steps else None

    def next_change(self) -> float | None:
        """When somebody's first token, end, admission or preemption can come next; None when idle.

        For a simulator: what happens until then is only that everybody who runs gets tokens.
        """
        return self._end(self._steps) if self._steps else None

    def advance(self, now: float) -> list[Event]:
        """Let time pass; return what happened, oldest first, tokens of a stretch in one event a request."""
        self._catch_up(now)
        return self._take_events()

    # -- steps --

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _end(self, steps: int) -> float:
        """When that step of the stretch ends: always from its begin, so that looking changes no digit."""
        return self._begun + steps * self._first_s + self._longer_s * (steps * (steps - 1) // 2)

    def _catch_up(self, now: float) -> None:
        if now > self._now:
            self._now = now
        while self._steps and (ends := self._end(self._steps)) <= self._now:
            self._complete(self._steps - self._done, ends)
            self._plan(ends)
        if self._done + 1 < self._steps and self._end(self._done + 1) <= self._now:
            ended = bisect_right(range(self._steps), self._now, lo=self._done + 2, key=self._end) - 1
            self._complete(ended - self._done, self._end(ended))

    def _replan(self) -> None:
        """Somebody came or went: the step under way is the last that was planned without knowing."""
        if self._running and self._steps:
            self._steps = self._done + 1
        else:
            self._plan(self._now)

    def _complete(self, steps: int, at: float) -> None:
        self._done += steps
        batch = self._batch
        if batch:
            self._count += steps
            self._used += steps * batch
            self._context += steps * batch
            self.generation_tokens_total += steps * batch
            if self._every_token:
                self._tell_all(steps, at)
            else:
                ends, count = self._ends, self._count
                while ends and ends[0][0] <= count:
                    _, place, job = heappop(ends)
                    if job.place == place:
                        self._finish(job, job.wanted - 1, at)
        for job, part in self._reading:
            job.unread -= part
            if not job.unread:
                del self._unread[job.id]
                if not job.made:
                    self.prompt_tokens_total += job.prompt
                job.made += 1
                self.generation_tokens_total += 1
                if job.blocks and self._cache:
                    self._cache.pin(job, (job.held - 1) // self._cache.block_tokens)
                if job.made == job.wanted:
                    self._finish(job, job.wanted - 1 if self._only_rest(job) else 1, at)
                    continue
                if self._every_token or job.made == 1:
                    self._events.append(Event(at, job.id, Kind.TOKENS, 1))
                job.since = self._count
                self._batch += 1
                self._context += job.held
                heappush(self._ends, (self._count + job.wanted - job.made, job.place, job))

    def _only_rest(self, job: _Job) -> bool:
        """Whether its end tells of more than one token: its first was told of, those after it were not."""
        return not self._every_token and job.wanted > 1

    def _tell_all(self, steps: int, at: float) -> None:
        """An event for each request that made tokens in these steps, in the order of their admission."""
        count = self._count
        for job in list(self._running.values()):
            if job.since < 0:
                continue
            if job.made + count - job.since < job.wanted:
                self._events.append(Event(at, job.id, Kind.TOKENS, steps))
            else:
                self._finish(job, steps, at)

    def _finish(self, job: _Job, tokens: int, at: float) -> None:
        self._events.append(Event(at, job.id, Kind.FINISHED, tokens))
        del self._running[job.id]
        self._leaves(job)

    def _leaves(self, job: _Job) -> None:
        """It runs no more: its memory is free, and it makes no tokens."""
        if job.since >= 0:
            more = self._count - job.since
            job.made += more
            job.held += more
            job.since = -1
            self._batch -= 1
            self._context -= job.held
        else:
            self._unread.pop(job.id, None)
        if self._cache:  # what has gone because memory was needed until now is gone
            self._cache.shrink(self.timing.kv_tokens - self._used)
        self._used -= job.held
        job.place = -1
        if job.blocks and self._cache:
            if not job.unread:  # its last token has been made, but never went through the model
                self._cache.pin(job, (job.held - 1) // self._cache.block_tokens)
            self._cache.unpin(job)
            self._cache.shrink(self.timing.kv_tokens - self._used)

    def _plan(self, at: float) -> None:
        """Begin a stretch: preempt, go on reading, admit, and say how long it is."""
        kv_tokens = self.timing.kv_tokens
        preempted = False
        while self._used + self._batch > kv_tokens:
            self._preempt(at)
            preempted = True
        budget = self.step_tokens - self._batch
        reading: list[tuple[_Job, int]] = []
        if self._unread:
            for job in self._unread.values():
                if not budget:
                    break
                part = min(job.unread, budget)
                reading.append((job, part))
                budget -= part
        if self._waiting and not preempted:
            while self._waiting and budget and len(self._running) < self.max_seqs:
                job = next(iter(self._waiting.values()))
                # What it has, and room for the token that reading it gives.
                need = job.prompt + job.made + 1
                if self._used + self._batch + need > kv_tokens:
                    break
                self._admit(job, need, at)
                part = min(job.unread, budget)
                reading.append((job, part))
                budget -= part
        self._reading = reading
        self._measure(at)

    def _preempt(self, at: float) -> None:
        id, job = self._running.popitem()
        self._leaves(job)
        job.held = job.unread = 0
        self._waiting[id] = job
        self._waiting.move_to_end(id, last=False)
        self.waiting_tokens += job.prompt + job.made
        self.preemptions += 1
        self._events.append(Event(at, id, Kind.PREEMPTED))

    def _admit(self, job: _Job, need: int, at: float) -> None:
        del self._waiting[job.id]
        self._running[job.id] = self._unread[job.id] = job
        job.held, job.unread = need, need - 1
        if job.blocks and self._cache:
            self._take_cached(job)
        self.waiting_tokens -= need - 1
        job.place = self._places
        self._places += 1
        self._used += need
        if self._cache:
            self._cache.shrink(self.timing.kv_tokens - self._used)
        self._events.append(Event(at, job.id, Kind.ADMITTED))

    def _take_cached(self, job: _Job) -> None:
        """What is cached of it need not be read; its last token always is, because it gives the next."""
        cache = self._cache
        if cache is None:
            return
        cache.shrink(self.timing.kv_tokens - self._used)
        there = min(cache.prefix(job.blocks), job.unread // cache.block_tokens)
        cache.pin(job, there)
        cached = min(there * cache.block_tokens, job.unread - 1)
        job.unread -= cached
        self.cached_tokens_total += cached

    def _measure(self, at: float) -> None:
        """How many steps this stretch has, and how long they take."""
        self._begun, self._done = at, 0
        batch, context, reading = self._batch, self._context, self._reading
        if not batch and not reading:
            self._steps = 0
            self._ends.clear()  # of those that were cancelled
            return
        t = self.timing
        if reading:
            tokens = squares = 0
            for job, part in reading:
                read = job.held - 1 - job.unread
                tokens += part
                squares += (read + part) ** 2 - read**2
            self._first_s, self._longer_s = t.step_ms(batch, context, tokens, squares) / 1e3, 0.0
            self._steps = 1
            return
        linear_ms = t.a + t.b * batch + t.c * context / 1e3
        step_ms = max(linear_ms, t.bound_ms(batch))
        self._first_s, self._longer_s = step_ms / 1e3, 0.0
        ends = self._ends
        while ends[0][2].place != ends[0][1]:
            heappop(ends)
        self._steps = min(ends[0][0] - self._count, (t.kv_tokens - self._used) // batch)
        longer_ms = t.c * batch / 1e3
        if linear_ms < step_ms:
            # Bound by computation: of equal length until the growing context takes longer than that.
            if longer_ms:
                self._steps = min(self._steps, 1 + int((step_ms - linear_ms) / longer_ms))
        else:
            self._longer_s = longer_ms / 1e3
