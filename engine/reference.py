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

Steps in which no request comes, ends or runs out of memory differ by a constant, so they are one *stretch*
whose ends are known in closed form: a caller that looks seldom pays for changes, not for tokens. A change
costs O(log n): steps that make tokens are counted, a request that makes them ends at a count known when it
begins, and of all together only the batch and its context are kept.

Of requests submitted with the ids of their blocks the longest prefix that is cached need not be read, but
for the last token. Blocks are cached when they have been read, and those of the answer when it ends. Blocks
that no running request has keep the KV memory that running requests leave, and the least recently used go
first when that is needed. A prefix that two running requests share is in memory twice, unlike in an engine:
it counts for both. Without blocks nothing is cached.

True after every call:
- KV memory in use is the sum over the running requests, and never over capacity, with what is cached
  beside them as soon as a request is admitted or ends;
- requests are admitted in the order they came, those that were preempted before all others;
- the answer depends on what was submitted and cancelled when, not on how often the caller looked.

Times are seconds on the caller's clock; the constants are milliseconds, as in their source.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from enum import Enum
from heapq import heappop, heappush
from typing import NamedTuple

from engine.block_cache import BlockCache
from engine.server_job import ServerJob
from engine.step_time_constants import Timing


class EventKind(Enum):
    """What can happen to a request in a model server."""

    ADMITTED = "admitted"
    TOKENS = "tokens"
    FINISHED = "finished"
    PREEMPTED = "preempted"


class ServerEvent(NamedTuple):
    """One event of a request in a model server, in seconds on the caller's clock.

    tokens: how many the request made since its previous event, the last one at `at`; FINISHED may have some
    too.
    """

    at: float
    id: str
    kind: EventKind
    tokens: int = 0


class _Stretch:
    """A series of steps in which no request comes or ends, each longer than the one before by the same time.

    Step k, counted from 1, ends at end(k). A stretch without steps stands for an idle server.
    """

    __slots__ = ("_begun", "_first_s", "_longer_s", "done", "steps")

    def __init__(
        self, begun: float = 0.0, steps: int = 0, first_s: float = 0.0, longer_s: float = 0.0
    ) -> None:
        """Make a stretch of `steps` steps that begins at `begun`, seconds; the first takes first_s.

        longer_s: by how many seconds each step is longer than the one before.
        """
        self.steps = steps
        self.done = 0
        self._begun = begun
        self._first_s = first_s
        self._longer_s = longer_s

    def end(self, step: int) -> float:
        """Return when a step of this series ends, counted from its start so that no rounding adds up."""
        return self._begun + step * self._first_s + self._longer_s * (step * (step - 1) // 2)

    def advance(self, now: float) -> tuple[int, float]:
        """Count the steps of this series that end by now as done; return how many, and the last one's end."""
        done, last = self.done, self.steps
        if done == last:
            return 0, now
        at = self.end(last)
        if at > now:
            if done + 1 == last or self.end(done + 1) > now:
                return 0, now
            last = bisect_right(range(last), now, lo=done + 2, key=self.end) - 1
            at = self.end(last)
        self.done = last
        return last - done, at

    def cut(self) -> None:
        """Shorten this series of steps so that the step under way is its last one."""
        self.steps = self.done + 1


def _check_size(id: str, prompt_tokens: int, output_tokens: int, kv_tokens: int) -> None:
    """Raise ValueError for a request that could never be served: empty, or larger than the KV memory."""
    if prompt_tokens < 1 or output_tokens < 1:
        raise ValueError(f"request {id}: wanted counts of 1 or more, got {prompt_tokens}, {output_tokens}")
    if prompt_tokens + output_tokens > kv_tokens:
        raise ValueError(
            f"request {id}: {prompt_tokens} + {output_tokens} tokens, the KV memory has {kv_tokens}"
        )


def _decoding(at: float, t: Timing, batch: int, context: int, most: int) -> _Stretch:
    """Return the next series of up to `most` steps, in which requests make tokens and none reads."""
    linear_ms = t.a + t.b * batch + t.c * context / 1e3
    step_ms = max(linear_ms, t.bound_ms(batch))
    longer_ms = t.c * batch / 1e3
    if linear_ms == step_ms:
        return _Stretch(at, most, step_ms / 1e3, longer_ms / 1e3)
    # Bound by computation: of equal length until the growing context takes longer than that.
    if longer_ms:
        most = min(most, 1 + int((step_ms - linear_ms) / longer_ms))
    return _Stretch(at, most, step_ms / 1e3)


class SteppedModelServer:
    """A simulated model server in which time passes step by step; a `now` before the last one counts as that.

    It belongs to one thread. cached_tokens_total: tokens of prompts that were in the prefix cache and not
    read. waiting_tokens: tokens that requests in the queue have to read, some of them maybe cached.
    """

    def __init__(
        self,
        timing: Timing,
        max_seqs: int | None = None,
        step_tokens: int | None = None,
        *,
        every_token: bool = True,
    ) -> None:
        """Make an idle server; max_seqs and step_tokens replace the timing's own limits.

        ValueError unless 1 <= max_seqs <= step_tokens. every_token: report all; without it a request has one
        TOKENS event, of its first token, and one FINISHED, of the others: cheaper, for simulators.
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
        self.cached_tokens_total = self.waiting_tokens = 0
        self._now = float("-inf")
        self._waiting: OrderedDict[str, ServerJob] = OrderedDict()
        self._running: OrderedDict[str, ServerJob] = OrderedDict()
        self._every_token = every_token
        self._places = 0
        self._used = 0
        self._events: list[ServerEvent] = []
        self._stretch = _Stretch()  # under way
        self._count = 0  # of steps so far
        self._batch = self._context = 0  # requests that make tokens, and KV tokens that these hold
        self._ends: list[tuple[int, int, ServerJob]] = []  # (count at which it ends, place, request)
        self._unread: OrderedDict[str, ServerJob] = OrderedDict()  # those with prompt to read, as admitted
        self._reading: list[tuple[ServerJob, int]] = []  # in the stretch under way
        self._cache: BlockCache | None = None

    @property
    def running(self) -> int:
        """The number of requests that the server is working on, those in its batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of requests in the server's queue."""
        return len(self._waiting)

    @property
    def kv_tokens_used(self) -> int:
        """The server's KV memory in use, in tokens."""
        return self._used

    @property
    def kv_use(self) -> float:
        """The server's KV memory in use, as a share of its capacity, 0 to 1."""
        return self._used / self.timing.kv_tokens

    def submit(
        self,
        id: str,
        prompt_tokens: int,
        output_tokens: int,
        now: float,
        blocks: Sequence[Hashable] = (),
        block_tokens: int = 16,
    ) -> list[ServerEvent]:
        """Put a request at the end of the server's queue; return the events since the last call.

        It will make exactly output_tokens. blocks: ids of its first tokens in groups of block_tokens (always
        the same number), for the prefix cache: the prompt's, then maybe the answer's; equal ids are equal
        tokens with equal ones before. ValueError, without any change: id under way, counts below 1, over KV
        memory.
        """
        if id in self._running or id in self._waiting:
            raise ValueError(f"request {id}: is under way already")
        _check_size(id, prompt_tokens, output_tokens, self.timing.kv_tokens)
        if blocks:
            if block_tokens < 1 or (self._cache and self._cache.block_tokens != block_tokens):
                raise ValueError(f"request {id}: blocks of {block_tokens} tokens, unlike those before")
            if self._cache is None:
                self._cache = BlockCache(block_tokens)
        self._catch_up(now)
        self._waiting[id] = ServerJob(id, prompt_tokens, output_tokens, blocks)
        self.waiting_tokens += prompt_tokens
        self._replan()
        return self._take_events()

    def cancel(self, id: str, now: float) -> list[ServerEvent]:
        """Remove a request from the server and free its memory; return the events since the last call.

        The step under way takes as long as it would have. A request that has already ended is ignored.
        """
        self._catch_up(now)
        if job := self._running.pop(id, None):
            self._leaves(job)
            self._reading = [(j, part) for j, part in self._reading if j is not job]
            self._replan()
        elif job := self._waiting.pop(id, None):
            self.waiting_tokens -= job.to_read
            self._replan()
        return self._take_events()

    def cached_tokens(self, blocks: Sequence[Hashable]) -> int:
        """Return how many tokens at the start of these blocks are in the server's prefix cache now."""
        cache = self._cache
        if cache is None:
            return 0
        cache.shrink(self.timing.kv_tokens - self._used)
        return cache.prefix(blocks) * cache.block_tokens

    def next_event(self) -> float | None:
        """Return when the step under way ends and gives tokens; None when the server is idle."""
        stretch = self._stretch
        return stretch.end(stretch.done + 1) if stretch.steps else None

    def next_change(self) -> float | None:
        """Return when the next first token, end, admission or preemption can come; None when idle.

        For a simulator: until then the requests that run get tokens, and nothing else happens.
        """
        stretch = self._stretch
        return stretch.end(stretch.steps) if stretch.steps else None

    def advance(self, now: float) -> list[ServerEvent]:
        """Let time pass on the server; return what happened, oldest first, a request's tokens together."""
        self._catch_up(now)
        return self._take_events()

    # -- steps --

    def _take_events(self) -> list[ServerEvent]:
        events, self._events = self._events, []
        return events

    def _catch_up(self, now: float) -> None:
        self._now = max(self._now, now)
        while True:
            stretch = self._stretch
            steps, at = stretch.advance(self._now)
            if not steps:
                return
            self._complete(steps, at)
            if stretch.done < stretch.steps:
                return
            self._plan(at)

    def _replan(self) -> None:
        """Plan the server's steps anew after a request came or went; the step under way is kept."""
        if self._running and self._stretch.steps:
            self._stretch.cut()
        else:
            self._plan(self._now)

    def _complete(self, steps: int, at: float) -> None:
        batch = self._batch
        if batch:
            self._count += steps
            self._used += steps * batch
            self._context += steps * batch
            self.generation_tokens_total += steps * batch
            if self._every_token:
                self._report_all(steps, at)
            else:
                ends, count = self._ends, self._count
                while ends and ends[0][0] <= count:
                    _, place, job = heappop(ends)
                    if job.place == place:
                        self._finish(job, job.wanted - 1, at)
        for job, part in self._reading:
            if job.read(part):
                self._has_read(job, at)

    def _has_read(self, job: ServerJob, at: float) -> None:
        """Note that a request's prompt has been read whole, which makes a token."""
        del self._unread[job.id]
        if job.made == 1:
            self.prompt_tokens_total += job.prompt
        self.generation_tokens_total += 1
        if job.blocks and self._cache:
            self._cache.keep(job)
        if job.made == job.wanted:
            # Its first token was reported, those after it were not, unless every token is.
            self._finish(job, job.wanted - 1 if job.wanted > 1 and not self._every_token else 1, at)
            return
        if self._every_token or job.made == 1:
            self._events.append(ServerEvent(at, job.id, EventKind.TOKENS, 1))
        self._batch += 1
        self._context += job.held
        heappush(self._ends, (job.begin_tokens(self._count), job.place, job))

    def _report_all(self, steps: int, at: float) -> None:
        """Report the tokens that running requests made in these steps, in order of admission."""
        count = self._count
        for job in list(self._running.values()):
            if job.since < 0:
                continue
            if job.made + count - job.since < job.wanted:
                self._events.append(ServerEvent(at, job.id, EventKind.TOKENS, steps))
            else:
                self._finish(job, steps, at)

    def _finish(self, job: ServerJob, tokens: int, at: float) -> None:
        self._events.append(ServerEvent(at, job.id, EventKind.FINISHED, tokens))
        del self._running[job.id]
        self._leaves(job)

    def _leaves(self, job: ServerJob) -> None:
        """Remove a request from the running ones: free its KV memory and take it out of the token counts."""
        if job.leave(self._count):
            self._batch -= 1
            self._context -= job.held
        else:
            self._unread.pop(job.id, None)
        if self._cache:  # what has gone because memory was needed until now is gone
            self._cache.shrink(self.timing.kv_tokens - self._used)
        self._used -= job.held
        if job.blocks and self._cache:
            if not job.unread:  # its last token has been made, but never went through the model
                self._cache.keep(job)
            self._cache.unpin(job)
            self._cache.shrink(self.timing.kv_tokens - self._used)

    def _plan(self, at: float) -> None:
        """Begin the next series of steps at `at`: preempt, read on, admit, and compute how long it lasts."""
        kv_tokens = self.timing.kv_tokens
        preempted = False
        while self._used + self._batch > kv_tokens:
            self._preempt(at)
            preempted = True
        budget = self.step_tokens - self._batch
        reading: list[tuple[ServerJob, int]] = []
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
                if self._used + self._batch + job.to_read + 1 > kv_tokens:
                    break
                self._admit(job, at)
                part = min(job.unread, budget)
                reading.append((job, part))
                budget -= part
        self._reading = reading
        self._stretch = self._next_stretch(at)

    def _preempt(self, at: float) -> None:
        id, job = self._running.popitem()
        self._leaves(job)
        job.put_back()
        self._waiting[id] = job
        self._waiting.move_to_end(id, last=False)
        self.waiting_tokens += job.to_read
        self.preemptions += 1
        self._events.append(ServerEvent(at, id, EventKind.PREEMPTED))

    def _admit(self, job: ServerJob, at: float) -> None:
        del self._waiting[job.id]
        self._running[job.id] = self._unread[job.id] = job
        cached = 0
        if job.blocks and self._cache:
            self._cache.shrink(self.timing.kv_tokens - self._used)
            cached = self._cache.admit(job)
            self.cached_tokens_total += cached
        self.waiting_tokens -= job.to_read
        job.admit(self._places, cached)
        self._places += 1
        self._used += job.held
        if self._cache:
            self._cache.shrink(self.timing.kv_tokens - self._used)
        self._events.append(ServerEvent(at, job.id, EventKind.ADMITTED))

    def _next_stretch(self, at: float) -> _Stretch:
        """Return the steps until the next request ends or memory runs out, with the time that they take."""
        t, batch, context, reading, ends = self.timing, self._batch, self._context, self._reading, self._ends
        if not batch and not reading:
            ends.clear()  # of those that were cancelled
            return _Stretch()
        if reading:
            tokens = squares = 0
            for job, part in reading:
                tokens += part
                squares += job.squares(part)
            return _Stretch(at, 1, t.step_ms(batch, context, tokens, squares) / 1e3)
        while ends[0][2].place != ends[0][1]:
            heappop(ends)
        most = min(ends[0][0] - self._count, (t.kv_tokens - self._used) // batch)
        return _decoding(at, t, batch, context, most)
