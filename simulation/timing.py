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

True after every call:
- KV memory in use is the sum over the running requests, and never over capacity;
- requests are admitted in the order they came, those that were preempted before all others;
- the answer depends on what was submitted and cancelled when, not on how often one looked.

Times are seconds on the caller's clock; the constants are milliseconds, as in their source.
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from errors import ConfigError

# -- the constants ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One model in one quantization on `tp` GPUs; a to f as in the formulas above, KV capacity in tokens.

    max_seqs, step_tokens: vLLM's limits on requests at once and on tokens in a step.
    """

    name: str
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float
    kv_tokens: int
    max_seqs: int = 256
    step_tokens: int = 2048

    def step_ms(self, batch: int, context_tokens: int, prompt_tokens: int = 0, squares: int = 0) -> float:
        """Milliseconds of a step that makes `batch` tokens over so much context, and reads prompt_tokens.

        squares: sum of t² - s² over the parts of prompts read, in tokens².
        """
        floor = max(self.a if batch else 0.0, self.d if prompt_tokens else 0.0)
        linear = (
            floor
            + self.b * batch
            + self.c * context_tokens / 1e3
            + self.e * prompt_tokens / 1e3
            + self.f * squares / 1e6
        )
        return max(linear, self.bound_ms(batch + prompt_tokens))

    def prefill_ms(self, prompt_tokens: int) -> float:
        """Milliseconds to read a prompt in one step, alone."""
        return self.step_ms(0, 0, prompt_tokens, prompt_tokens * prompt_tokens)

    def bound_ms(self, tokens: int) -> float:
        """No step with so many tokens is faster: what they take to compute."""
        return self.e * tokens / 1e3


PREFILL_OPTIMISM: Mapping[str, float] = MappingProxyType({"A100 SXM4": 1.2, "L40S": 1.2, "H100 SXM": 1.35})
"""e is multiplied by this: kernels measured alone run faster than in a server (timing.md 3a: judged, not
fitted). The other cards' e are arithmetic that needs no such factor."""

LARGE_STEPS = frozenset({"H100 SXM"})
"""vLLM 0.11 takes 1,024 requests and 8,192 tokens a step where the GPU has 70 GiB and is no A100; else 256
and 2,048 (EngineArgs defaults for its API server, looked up 2026-11)."""

# (model, quantization, GPU as Vast names it, number of GPUs): a, b, c, d, e, f, KV tokens.
# A100, H100, L40S: timing.md 3a, composed from measured vLLM kernels, 2 to 7 % mean error of the linear form.
# RTX cards: timing.md 3c, bandwidth arithmetic without an error bar.
_ROWS: Mapping[tuple[str, str, str, int], tuple[float, float, float, float, float, float, int]] = {
    ("13B", "awq4", "RTX 3090", 1): (11.52, 0.072, 1.094, 9.9, 402.1, 12.0, 15_500),
    ("13B", "awq4", "RTX 4090", 1): (9.99, 0.067, 1.016, 9.0, 188.6, 5.65, 15_500),
    ("13B", "awq4", "RTX A6000", 1): (13.70, 0.088, 1.333, 11.2, 237.8, 7.12, 41_900),
    ("13B", "awq4", "L40S", 1): (11.72, 0.092, 1.159, 9.4, 103.3, 3.27, 41_300),
    ("13B", "awq4", "A100 SXM4", 1): (7.90, 0.114, 0.506, 12.6, 96.9, 2.27, 76_400),
    ("13B", "awq4", "H100 SXM", 1): (4.59, 0.064, 0.262, 5.6, 31.2, 1.79, 76_400),
    ("70B", "awq4", "RTX 3090", 4): (19.95, 0.489, 0.109, 15.0, 925.8, 9.64, 131_000),
    ("70B", "awq4", "RTX 4090", 2): (29.64, 0.439, 0.203, 20.8, 761.7, 9.04, 8_800),
    ("70B", "awq4", "RTX A6000", 1): (66.83, 0.465, 0.533, 43.1, 1259.6, 22.8, 13_300),
    ("70B", "awq4", "RTX A6000", 2): (39.01, 0.495, 0.267, 26.4, 892.0, 11.4, 141_000),
    ("70B", "awq4", "L40S", 1): (54.82, 0.360, 0.427, 42.3, 527.9, 12.1, 11_800),
    ("70B", "awq4", "A100 SXM4", 1): (33.94, 0.524, 0.200, 29.6, 514.6, 4.43, 99_700),
    ("70B", "awq4", "A100 SXM4", 2): (21.36, 0.289, 0.101, 26.5, 267.3, 2.00, 313_000),
    ("70B", "awq4", "H100 SXM", 1): (20.50, 0.201, 0.106, 14.1, 177.9, 4.74, 99_700),
}


def _timing(key: tuple[str, str, str, int]) -> Timing:
    model, quant, gpu, tp = key
    a, b, c, d, e, f, kv_tokens = _ROWS[key]
    limits = (1024, 8192) if gpu in LARGE_STEPS else (256, 2048)
    name = f"{model} {quant} on {tp}x {gpu}"
    return Timing(name, a, b, c, d, e * PREFILL_OPTIMISM.get(gpu, 1.0), f, kv_tokens, *limits)


TIMINGS: Mapping[tuple[str, str, str, int], Timing] = MappingProxyType({key: _timing(key) for key in _ROWS})

PROFILE_MODELS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"vllm-13": ("13B", "awq4"), "vllm-70": ("70B", "awq4")}
)
"""Model and quantization behind the names of profiles.py."""


Key = tuple[str, str, str, int]
"""Model, quantization, GPU as Vast names it, number of GPUs."""

_TEXTS = ("model", "quantization", "gpu")
_NUMBERS = ("a", "b", "c", "d", "e", "f")
_COUNTS = {"num_gpus": None, "kv_tokens": None, "max_seqs": 256, "step_tokens": 2048}


def read_timings(path: Path) -> Mapping[Key, Timing]:
    """Constants of your own, from a JSON file; raises ConfigError naming file, entry and field.

    A list of objects; max_seqs (256) and step_tokens (2048) may be left out:

        [{"model": "13B", "quantization": "awq4", "gpu": "RTX 5090", "num_gpus": 1,
          "a": 6.0, "b": 0.05, "c": 0.6, "d": 6.0, "e": 110.0, "f": 3.5, "kv_tokens": 25000}]
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as wrong:
        raise ConfigError(f"{path}: {wrong}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: wanted a list of at least one object")
    found: dict[Key, Timing] = {}
    for n, entry in enumerate(entries):
        where = f"{path}: entry {n}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: wanted an object, got {entry!r:.60}")
        for name in entry:
            if name not in (*_TEXTS, *_NUMBERS, *_COUNTS):
                raise ConfigError(f"{where}: unknown field {name!r:.60}")
        model, quantization, gpu = (_text(where, entry, name) for name in _TEXTS)
        numbers = [_number(where, entry, name) for name in _NUMBERS]
        num_gpus, kv_tokens, max_seqs, step_tokens = (
            _count(where, entry, name, default) for name, default in _COUNTS.items()
        )
        if max_seqs > step_tokens:
            raise ConfigError(f"{where}: max_seqs: wanted at most step_tokens, {step_tokens}, got {max_seqs}")
        label = f"{model} {quantization} on {num_gpus}x {gpu}, {path.name}"
        a, b, c, d, e, f = numbers
        timing = Timing(label, a, b, c, d, e, f, kv_tokens, max_seqs, step_tokens)
        if found.setdefault((model, quantization, gpu, num_gpus), timing) is not timing:
            raise ConfigError(f"{where}: {model} {quantization} on {num_gpus}x {gpu} is there already")
    return MappingProxyType(found)


def _text(where: str, entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        raise ConfigError(f"{where}: {name}: wanted text, got {value!r:.60}")
    return value


def _number(where: str, entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1e6:
        raise ConfigError(f"{where}: {name}: wanted 0 to 1e6 ms, got {value!r:.60}")
    return float(value)


def _count(where: str, entry: Mapping[str, Any], name: str, default: int | None) -> int:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
        raise ConfigError(f"{where}: {name}: wanted a whole number of 1 or more, got {value!r:.60}")
    return value


def timing_for(
    profile: str, gpu_name: str, num_gpus: int = 1, own: Mapping[Key, Timing] = MappingProxyType({})
) -> Timing:
    """The constants of a profile on so many of these GPUs; `name` says which were taken.

    own: constants that go before the table's, and add to it (`read_timings`).

    Where the table has no such row, what is taken promises too little rather than too much:
    - more GPUs than it knows of that kind: the row with the most that is not more, the others idle;
    - fewer, or another kind: the slowest row of the model;
    - a profile it does not know: as if it were vllm-13.
    """
    model, quant = PROFILE_MODELS.get(profile, PROFILE_MODELS["vllm-13"])
    rows = {key: timing for key, timing in {**TIMINGS, **own}.items() if key[:2] == (model, quant)}
    fitting = [key for key in rows if key[2] == gpu_name and key[3] <= num_gpus]
    if fitting:
        return rows[max(fitting, key=lambda key: key[3])]
    return max(rows.values(), key=lambda timing: timing.a)


# -- the server ------------------------------------------------------------------------------------------


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
    then. place: its admissions in order; an entry of the heap with another place is void.
    """

    __slots__ = ("held", "id", "made", "place", "prompt", "since", "unread", "wanted")

    def __init__(self, id: str, prompt: int, wanted: int) -> None:
        self.id = id
        self.prompt = prompt
        self.wanted = wanted
        self.made = 0
        self.unread = 0
        self.held = 0
        self.since = -1
        self.place = -1


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
        # What those in the queue have to read: prompts, and of those that were put back their own tokens.
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

    def submit(self, id: str, prompt_tokens: int, output_tokens: int, now: float) -> list[Event]:
        """Put a request at the end of the queue, and return what happened until now.

        It gets exactly output_tokens. Raises ValueError, and changes nothing, for an id that is under way,
        counts below 1, and a request that is larger than the KV memory.
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
        self._catch_up(now)
        self._waiting[id] = _Job(id, prompt_tokens, output_tokens)
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
        self._used -= job.held
        job.place = -1

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
        self.waiting_tokens -= need - 1
        job.place = self._places
        self._places += 1
        self._used += need
        self._events.append(Event(at, job.id, Kind.ADMITTED))

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
