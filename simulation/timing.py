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
whose ends are known in closed form: whoever asks seldom pays for changes, not for tokens.

True after every call:
- KV memory in use is the sum over the running requests, and never over capacity;
- requests are admitted in the order they came, those that were preempted before all others;
- the answer depends on what was submitted and cancelled when, not on how often one looked.

Times are seconds on the caller's clock; the constants are milliseconds, as in their source.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

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


def timing_for(profile: str, gpu_name: str, num_gpus: int = 1) -> Timing:
    """The constants of a profile on so many of these GPUs; `name` says which were taken.

    Where the table has no such row, what is taken promises too little rather than too much:
    - more GPUs than it knows of that kind: the row with the most that is not more, the others idle;
    - fewer, or another kind: the slowest row of the model;
    - a profile it does not know: as if it were vllm-13.
    """
    model, quant = PROFILE_MODELS.get(profile, PROFILE_MODELS["vllm-13"])
    rows = {key: timing for key, timing in TIMINGS.items() if key[:2] == (model, quant)}
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
    """A request. held: KV tokens it has; unread: prompt (after a preemption also its own tokens) to read."""

    __slots__ = ("held", "id", "made", "prompt", "unread", "wanted")

    def __init__(self, id: str, prompt: int, wanted: int) -> None:
        self.id = id
        self.prompt = prompt
        self.wanted = wanted
        self.made = 0
        self.unread = 0
        self.held = 0


class ModelServer:
    """One model server in time. A `now` before the last one counts as the last one; belongs to one thread."""

    def __init__(self, timing: Timing, max_seqs: int | None = None, step_tokens: int | None = None) -> None:
        """Idle. max_seqs and step_tokens replace the timing's own; ValueError if they fit no token."""
        self.timing = timing
        self.max_seqs = timing.max_seqs if max_seqs is None else max_seqs
        self.step_tokens = timing.step_tokens if step_tokens is None else step_tokens
        # Otherwise a step full of decodes would leave prompts unread for ever.
        if not 1 <= self.max_seqs <= self.step_tokens:
            raise ValueError(f"wanted 1 <= max_seqs <= step_tokens, got {self.max_seqs}, {self.step_tokens}")
        self.preemptions = 0
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self._now = float("-inf")
        self._waiting: OrderedDict[str, _Job] = OrderedDict()
        self._running: OrderedDict[str, _Job] = OrderedDict()
        self._used = 0
        self._events: list[Event] = []
        # The stretch under way: step k (from 1) ends at _end(k); no steps means idle.
        self._begun = 0.0
        self._first_s = 0.0
        self._longer_s = 0.0  # each step takes so much longer than the one before
        self._steps = 0
        self._done = 0
        self._decoding: list[_Job] = []
        self._reading: list[tuple[_Job, int]] = []

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
        self._replan()
        return self._take_events()

    def cancel(self, id: str, now: float) -> list[Event]:
        """Forget a request and free its memory at once; return what happened until now.

        The step under way takes as long as it would have. Nothing is cancelled if it is not there any more.
        """
        self._catch_up(now)
        if job := self._running.pop(id, None):
            self._used -= job.held
            self._decoding = [j for j in self._decoding if j is not job]
            self._reading = [(j, part) for j, part in self._reading if j is not job]
            self._replan()
        elif self._waiting.pop(id, None):
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
        self._now = max(self._now, now)
        while self._steps and self._end(self._done + 1) <= self._now:
            ended = bisect_right(range(self._steps + 1), self._now, lo=self._done + 1, key=self._end) - 1
            self._complete(ended - self._done)
            if self._done == self._steps:
                self._plan(self._end(self._steps))

    def _replan(self) -> None:
        """Somebody came or went: the step under way is the last that was planned without knowing."""
        if self._running and self._steps:
            self._steps = self._done + 1
        else:
            self._plan(self._now)

    def _complete(self, steps: int) -> None:
        self._done += steps
        at = self._end(self._done)
        self._used += steps * len(self._decoding)
        for job in self._decoding:
            job.made += steps
            job.held += steps
            self._made(job, steps, at)
        self.generation_tokens_total += steps * len(self._decoding)
        for job, part in self._reading:
            job.unread -= part
            if not job.unread:
                if not job.made:
                    self.prompt_tokens_total += job.prompt
                job.made += 1
                self.generation_tokens_total += 1
                self._made(job, 1, at)

    def _made(self, job: _Job, tokens: int, at: float) -> None:
        if job.made < job.wanted:
            self._events.append(Event(at, job.id, Kind.TOKENS, tokens))
        else:
            self._events.append(Event(at, job.id, Kind.FINISHED, tokens))
            self._used -= self._running.pop(job.id).held

    def _plan(self, at: float) -> None:
        """Begin a stretch: preempt, go on reading, admit, and say how long it is."""
        decoding = [job for job in self._running.values() if not job.unread]
        preempted = False
        while self._used + len(decoding) > self.timing.kv_tokens:
            self._preempt(at)
            preempted = True
            decoding = [job for job in decoding if job.id in self._running]
        budget = self.step_tokens - len(decoding)
        reading: list[tuple[_Job, int]] = []
        for job in self._running.values():
            if job.unread and budget:
                reading.append((job, min(job.unread, budget)))
                budget -= reading[-1][1]
        while self._waiting and budget and not preempted and len(self._running) < self.max_seqs:
            job = next(iter(self._waiting.values()))
            # What it has, and room for the token that reading it gives.
            need = job.prompt + job.made + 1
            if self._used + len(decoding) + need > self.timing.kv_tokens:
                break
            self._admit(job, need, at)
            reading.append((job, min(job.unread, budget)))
            budget -= reading[-1][1]
        self._decoding, self._reading = decoding, reading
        self._measure(at)

    def _preempt(self, at: float) -> None:
        id, job = self._running.popitem()
        self._used -= job.held
        job.held = job.unread = 0
        self._waiting[id] = job
        self._waiting.move_to_end(id, last=False)
        self.preemptions += 1
        self._events.append(Event(at, id, Kind.PREEMPTED))

    def _admit(self, job: _Job, need: int, at: float) -> None:
        del self._waiting[job.id]
        self._running[job.id] = job
        job.held, job.unread = need, need - 1
        self._used += need
        self._events.append(Event(at, job.id, Kind.ADMITTED))

    def _measure(self, at: float) -> None:
        """How many steps this stretch has, and how long they take."""
        self._begun, self._done = at, 0
        batch = len(self._decoding)
        context = sum(job.held for job in self._decoding)
        if not batch and not self._reading:
            self._steps = 0
            return
        t = self.timing
        squares = 0
        for job, part in self._reading:
            read = job.held - 1 - job.unread
            squares += (read + part) ** 2 - read**2
        step_ms = t.step_ms(batch, context, sum(part for _, part in self._reading), squares)
        self._first_s, self._longer_s = step_ms / 1e3, 0.0
        if self._reading:
            self._steps = 1
            return
        self._steps = min(
            min(job.wanted - job.made for job in self._decoding),
            (t.kv_tokens - self._used) // batch,
        )
        longer_ms = t.c * batch / 1e3
        linear_ms = t.a + t.b * batch + t.c * context / 1e3
        if linear_ms < step_ms:
            # Bound by computation: of equal length until the growing context takes longer than that.
            if longer_ms:
                self._steps = min(self._steps, 1 + int((step_ms - linear_ms) / longer_ms))
        else:
            self._longer_s = longer_ms / 1e3
