"""The fluid model: a fleet over days of traffic in milliseconds, one second at a time.

Work is a liquid. What arrived in one second is a *bin*; instances that are hot draw c work/s each out of one
queue. It knows nothing of batching, prefill or single instances (simulation/ has the step-level model for
that); it is what a level is tuned with, because it can be run hundreds of times.

          arrive                 on time: first come, first served
    bins ───────┬──────────────► ░░░░░░░░░░░░ ───────────────► c * hot work a second
                │ would be late       │ its limit passed            ▲
                └────────► late: ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ ─────────────────┘ only what is left over,
                                                                      unless the oldest waits late_bound_s
    cold ──start──► starting ──start_lo_s…start_hi_s──► hot ──stop──► stopping ──stop_s──► cold ──destroy──►
      ▲                 └──────────cancel────────────────────────────────▲
      └──or hot──◄── loading ◄──create──

Order within a second: what is ready becomes hot; at a tick the policy is asked and its orders are given; the
second's bin arrives; the instances serve. Time is whole seconds: a bin of second b served in second s has
waited s - b, which is right in the mean, and it is late when that is over its limit. A bin that is served in
parts counts in parts. Whether an arrival would be late is judged in the same whole seconds, as if the hot
instances of this moment were all there will be.

True after every run (checked by the tests):
- work that arrived = work served + work on time + work late;
- nothing is served faster than c a second for each hot instance;
- the same arguments give the same result, and a start takes the same time in every run that orders its n-th
  start of a second at that second, so that two levels are compared on the same luck.

Costs: a hot, starting, loading or stopping instance costs running_usd_h, a cold one stopped_usd_h.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policies.objective import ROUND, SETTLE_S, Objective, window
from policies.types import BIN_S, Capacity, FleetSnapshot, Policy, Traffic
from process.compiled import njit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TICK_S = 5
"""How often our policy is asked, seconds; one bin of `FleetSnapshot.arriving`."""

PREFILL_WEIGHT = 0.1
"""Work of a prompt token, in output tokens."""

LATE_WAITS_S = 7200
"""Late waits are counted in seconds up to this; the rest in the last place."""

MOST_INSTANCES = 4096
"""Room in the lists of what is starting, loading and stopping."""

NEVER = 1 << 62


# -- what is simulated -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bins:
    """A trace, one value per second, all of the same length.

    work: output-token equivalents that arrived. requests: how many. limit_s: mean over these of the delay
    before service that is still in time. prompt_tokens, output_tokens: their sums; where not given they
    follow from work and limit as the objective defines them (2 s + 1 ms a prompt token).
    """

    work: Floats
    requests: Floats
    limit_s: Floats
    prompt_tokens: Floats | None = None
    output_tokens: Floats | None = None

    def __post_init__(self) -> None:
        """Refuse what is no trace, with ValueError."""
        for name in ("work", "requests", "limit_s", "prompt_tokens", "output_tokens"):
            given = getattr(self, name)
            if given is None:
                continue
            values = np.ascontiguousarray(given, dtype=np.float64)
            if values.ndim != 1 or len(values) == 0:
                raise ValueError(f"{name}: wanted a list of numbers, one per second")
            if not np.all(np.isfinite(values)) or values.min() < 0.0:
                raise ValueError(f"{name}: wanted finite numbers, none negative")
            if len(values) != len(self.work):
                raise ValueError(f"{name}: {len(values)} values, but work has {len(self.work)}")
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        """How many seconds."""
        return len(self.work)

    def between(self, start_s: int, end_s: int) -> "Bins":
        """The seconds start_s to end_s, as views of the same arrays."""
        part = slice(start_s, end_s)
        prompt, output = self.prompt_tokens, self.output_tokens
        return Bins(
            self.work[part],
            self.requests[part],
            self.limit_s[part],
            None if prompt is None else prompt[part],
            None if output is None else output[part],
        )

    @cached_property
    def arriving(self) -> Floats:
        """Work per second in each whole bin of BIN_S, as `FleetSnapshot.arriving` has it."""
        width = int(BIN_S)
        whole = len(self.work) // width
        return cast("Floats", self.work[: whole * width].reshape(whole, width).mean(axis=1))

    @cached_property
    def patience(self) -> Floats:
        """The first wait that is too long, in whole seconds, for each bin."""
        return np.floor(self.limit_s) + 1.0

    @cached_property
    def per_work(self) -> Floats:
        """Requests in a unit of work, for each bin; 0 where there is none."""
        return np.divide(self.requests, self.work, out=np.zeros(len(self)), where=self.work > 0.0)

    @cached_property
    def sums(self) -> tuple[Floats, Floats]:
        """Requests and work that arrived before each second, and in all; one longer than the bins."""
        requests, work = (np.concatenate(([0.0], np.cumsum(v))) for v in (self.requests, self.work))
        return requests, work

    def tokens(self) -> tuple[Floats, Floats]:
        """Prompt and output tokens that arrived in each second; as given, or as they follow."""
        prompt, output = self.prompt_tokens, self.output_tokens
        if prompt is None:
            prompt = np.maximum(self.limit_s - 2.0, 0.0) * 1000.0 * self.requests
            prompt = np.minimum(prompt, self.work / PREFILL_WEIGHT)
        if output is None:
            output = np.maximum(self.work - PREFILL_WEIGHT * prompt, 0.0)
        return prompt, output


def bins_of(
    arrival_s: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    seconds: int | None = None,
    first_token_s: float = 2.0,
    prompt_token_s: float = 0.001,
    reading_s: ArrayLike = 0.0,
) -> Bins:
    """The requests in bins of one second; those from `seconds` on are left out.

    reading_s: how long an idle instance takes over the prompt of each, which the limit on the first token
    leaves less for waiting; 0 where it is not known.
    """
    at = np.floor(np.asarray(arrival_s, dtype=np.float64)).astype(np.int64)
    prompt = np.asarray(prompt_tokens, dtype=np.float64)
    output = np.asarray(output_tokens, dtype=np.float64)
    limit = np.maximum(0.0, first_token_s + prompt_token_s * prompt - np.asarray(reading_s, np.float64))
    length = seconds if seconds is not None else (int(at.max()) + 1 if len(at) else 1)
    kept = at < length
    at = at[kept]

    def total(values: Floats) -> Floats:
        return np.bincount(at, weights=values[kept], minlength=length).astype(np.float64)

    requests = np.bincount(at, minlength=length).astype(np.float64)
    mean_limit = total(limit) / np.maximum(requests, 1.0)
    work = total(PREFILL_WEIGHT * prompt + output)
    return Bins(work, requests, mean_limit, total(prompt), total(output))


@dataclass(frozen=True)
class Fleet:
    """What the instances and their cloud are like, all alike.

    capacity: of one hot instance. start_lo_s, start_hi_s: a start from cold takes a time drawn evenly from
    between these. load_s: order to hot. stop_s: hot to cold, paid as running. Prices in $/h of one instance.
    late_lane: whether late requests make way; late_bound_s: until they have waited so long.
    """

    capacity: Capacity
    start_lo_s: float = 60.0
    start_hi_s: float = 120.0
    load_s: float = 600.0
    stop_s: float = 15.0
    running_usd_h: float = 0.78
    stopped_usd_h: float = 0.0083
    late_lane: bool = True
    late_bound_s: float = 300.0
    max_instances: int = 1000

    def __post_init__(self) -> None:
        """Refuse what cannot be, with ValueError."""
        for name, most in (("work_s", 1e9), ("requests_s", 1e9), ("concurrency", 1e9)):
            _wanted(f"capacity.{name}", getattr(self.capacity, name), 1e-6, most)
        for name in ("start_lo_s", "start_hi_s", "load_s", "stop_s", "late_bound_s"):
            _wanted(name, getattr(self, name), 0.0, 7 * 86_400.0)
        for name in ("running_usd_h", "stopped_usd_h"):
            _wanted(name, getattr(self, name), 0.0, 1e4)
        _wanted("max_instances", self.max_instances, 1, MOST_INSTANCES)
        if self.start_hi_s < self.start_lo_s:
            raise ValueError(f"start_hi_s {self.start_hi_s:g}: wanted at least start_lo_s")

    @property
    def service_s(self) -> float:
        """How long a request stays on an instance that is full (Little's law)."""
        return self.capacity.concurrency / self.capacity.requests_s


def _wanted(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} {value!r}: wanted {least:g} to {most:g}")


@dataclass(frozen=True)
class Series:
    """A run at each tick, for plots: at_s, and per tick the instances by state and what was wanted hot."""

    at_s: Ints
    hot: Ints
    starting: Ints
    loading: Ints
    cold: Ints
    wanted: Ints
    demand: Floats
    """Work that arrived since the tick before, in instances' worth."""


@dataclass(frozen=True)
class FluidResult:
    """What a run cost and how many requests it failed, all of the scored seconds only.

    missed: requests served late, or certain to be. late_*: how long these waited, seconds; to the end of
    the run where they still do. uncovered: share of the wanted hot instances that was neither hot nor
    coming nor could be started, because no more were loaded. peak_wanted: most hot wanted at once.
    """

    requests: float
    missed: float
    gpu_h: float
    usd_hot: float
    usd_starting: float
    usd_loading: float
    usd_stopping: float
    usd_stopped: float
    starts: int
    stops: int
    creates: int
    destroys: int
    late_mean_s: float
    late_p50_s: float
    late_p95_s: float
    late_max_s: float
    uncovered: float
    most_hot: int
    peak_wanted: int
    work_arrived: float
    work_served: float
    work_waiting: float
    series: Series | None = None

    @property
    def misses(self) -> float:
        """Share of the requests that was late; 0 of none."""
        return self.missed / self.requests if self.requests > 0.0 else 0.0

    @property
    def usd(self) -> float:
        """Dollars in all."""
        return self.usd_hot + self.usd_starting + self.usd_loading + self.usd_stopping + self.usd_stopped

    @property
    def usd_serving(self) -> float:
        """Dollars without the pool: no storage, no loads."""
        return self.usd_hot + self.usd_starting + self.usd_stopping


# -- the compiled part -----------------------------------------------------------------------------------

# Places in State.whole (integers) ...
HOT, STARTING, LOADING, STOPPING, COLD = 0, 1, 2, 3, 4
HEAD, LATE_HEAD, WANTED, NEXT_EVENT = 5, 6, 7, 8
STARTS, STOPS, CREATES, DESTROYS, MOST_HOT, PEAK_WANTED = 9, 10, 11, 12, 13, 14
SEC_HOT, SEC_STARTING, SEC_LOADING, SEC_STOPPING, SEC_COLD = 15, 16, 17, 18, 19
SEC_WANTED, SEC_UNCOVERED = 20, 21
WHOLES = 22
# ... and in State.real: the queues in work, the counts in requests.
QUEUED, LATE, MISSED, SERVED, LATE_ENDED, LATE_WAITED, LATE_MOST = 0, 1, 2, 3, 4, 5, 6
BEGAN, BEGAN_PROMPT, ON, ON_WORK, ON_PROMPT = 7, 8, 9, 10, 11
REALS = 12


class State(NamedTuple):
    """All that changes in a run. The lists end at the counts in `whole` and are in the order of the orders.

    queue, late: work left of each bin on time and late; garbage where nothing waited.
    waits: requests late by seconds waited. began, began_work, began_prompt: requests, their work and prompt
    tokens whose service began in each second; empty where nobody asks. BEGAN… are their sums, ON… those of
    the last service seconds: what instances have at hand. record: the series; empty where none is kept.
    """

    whole: Ints
    real: Floats
    queue: Floats
    late: Floats
    ready: Ints
    loaded: Ints
    stopped: Ints
    waits: Floats
    began: Floats
    began_work: Floats
    began_prompt: Floats
    record: Ints


class Given(NamedTuple):
    """All that does not change. patience: the first wait, in whole seconds, that is too long, by bin.

    per_work: requests in a unit of work, by bin.
    """

    work: Floats
    requests: Floats
    per_work: Floats
    prompt: Floats
    patience: Floats
    capacity: float
    lane: bool
    late_bound: int
    start_lo: float
    start_span: float
    load: int
    stop: int
    most: int
    score_from: int
    score_to: int
    service: int
    seed: int


class Rule(NamedTuple):
    """The rule of policies/objective.py with its level; k = 0: there is none.

    level: its F after the hold, work/s, by bin. settled: the pool may shrink in the SETTLE_S from here.
    """

    level: Floats
    k: float
    drain: float
    min_hot: int
    pool: int
    headroom: float
    settled: int


NO_RULE = Rule(np.zeros(0), 0.0, 1.0, 0, 0, 1.0, -NEVER)


@njit
def start_draw(seed: int, at: int, n: int) -> float:
    """Evenly from 0 to 1 for the n-th start ordered at a second: splitmix64 of all (Steele et al. 2014).

    A hash and not a stream, so that one start more or less leaves the others as they were.
    """
    z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(at) * np.uint64(0xD1B54A32D192ED03)
    z = z + np.uint64(n + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@njit
def _next_event(s: State) -> None:
    """Remember when the next instance changes by itself."""
    soonest = NEVER
    for n in range(s.whole[STARTING]):
        soonest = min(soonest, s.ready[n])
    for n in range(s.whole[LOADING]):
        soonest = min(soonest, s.loaded[n])
    for n in range(s.whole[STOPPING]):
        soonest = min(soonest, s.stopped[n])
    s.whole[NEXT_EVENT] = soonest


@njit
def _pass_events(s: State, g: Given, now: int) -> None:
    """What is ready is hot, what is loaded is hot if that is wanted, what is stopped is cold."""
    kept = 0
    for n in range(s.whole[STARTING]):
        if s.ready[n] > now:
            s.ready[kept] = s.ready[n]
            kept += 1
    s.whole[HOT] += s.whole[STARTING] - kept
    s.whole[STARTING] = kept
    kept = 0
    for n in range(s.whole[STOPPING]):
        if s.stopped[n] > now:
            s.stopped[kept] = s.stopped[n]
            kept += 1
    s.whole[COLD] += s.whole[STOPPING] - kept
    s.whole[STOPPING] = kept
    kept = 0
    for n in range(s.whole[LOADING]):
        if s.loaded[n] > now:
            s.loaded[kept] = s.loaded[n]
            kept += 1
        elif s.whole[HOT] + s.whole[STARTING] < s.whole[WANTED]:
            s.whole[HOT] += 1
        else:
            _stop(s, g, now)
    s.whole[LOADING] = kept
    _next_event(s)


@njit
def _stop(s: State, g: Given, now: int) -> None:
    """One more is stopping. Who calls it has taken it from where it was."""
    s.stopped[s.whole[STOPPING]] = now + g.stop
    s.whole[STOPPING] += 1
    if g.score_from <= now < g.score_to:
        s.whole[STOPS] += 1


@njit
def _order(s: State, g: Given, now: int, hot: int, total: int) -> None:
    """Give the orders that lead to `hot` hot and `total` in all, as InstanceSet.decide would."""
    w = s.whole
    hot = min(max(hot, 0), g.most)
    total = max(hot, min(max(total, 0), g.most))
    w[WANTED] = hot
    scored = g.score_from <= now < g.score_to
    missing = hot - w[HOT] - w[STARTING]
    if missing > 0:
        starts = min(missing, w[COLD])
        for n in range(starts):
            took = g.start_lo + g.start_span * start_draw(g.seed, now, n)
            s.ready[w[STARTING]] = now + math.floor(took + 0.5)
            w[STARTING] += 1
        w[COLD] -= starts
        if scored:
            w[STARTS] += starts
    else:
        surplus = -missing
        cancelled = min(surplus, w[STARTING])
        w[STARTING] -= cancelled
        taken = min(surplus - cancelled, w[HOT])
        w[HOT] -= taken
        for _ in range(cancelled + taken):
            _stop(s, g, now)
    missing = total - w[HOT] - w[STARTING] - w[LOADING] - w[STOPPING] - w[COLD]
    if missing > 0:
        for _ in range(missing):
            s.loaded[w[LOADING]] = now + g.load
            w[LOADING] += 1
        if scored:
            w[CREATES] += missing
    else:
        destroyed = min(-missing, w[COLD])
        w[COLD] -= destroyed
        if scored:
            w[DESTROYS] += destroyed
    _next_event(s)
    if scored:
        w[PEAK_WANTED] = max(w[PEAK_WANTED], hot)


@njit
def _count_late(s: State, g: Given, b: int, wait: int, part: float) -> None:
    """So much work of bin b was late and waited so long."""
    requests = part * g.per_work[b]
    s.waits[min(wait, len(s.waits) - 1)] += requests
    s.real[LATE_ENDED] += requests
    s.real[LATE_WAITED] += requests * wait
    s.real[LATE_MOST] = max(s.real[LATE_MOST], float(wait))


@njit
def _serve(s: State, g: Given, now: int) -> None:
    """The bin of this second arrives and the hot instances serve for a second.

    One part after another: late work that has waited over the bound, then what is on time, then late work.
    """
    w, r = s.whole, s.real
    queue, late, patience, per_work, waits = s.queue, s.late, g.patience, g.per_work, s.waits
    tracked = len(s.began) > 0
    rate = g.capacity * w[HOT]
    budget = rate
    queued, behind = r[QUEUED], r[LATE]
    head = now if queued <= 0.0 else w[HEAD]
    late_head = now if behind <= 0.0 else w[LATE_HEAD]
    missed = 0.0
    on_time = g.work[now]
    if g.lane:
        on_time = min(on_time, max(0.0, patience[now] * rate - queued))
    queue[now] = on_time
    late[now] = g.work[now] - on_time
    queued += on_time
    behind += late[now]
    if late[now] > 0.0 and g.score_from <= now < g.score_to:
        missed += late[now] * per_work[now]
    while True:
        # An error of addition may leave a little in a sum when nothing is left in the bins, or the reverse.
        while queued > 0.0 and queue[head] <= 0.0:
            head += 1
            if head > now:
                queued = 0.0
        while behind > 0.0 and late[late_head] <= 0.0:
            late_head += 1
            if late_head > now:
                behind = 0.0
        if queued <= 0.0 and behind <= 0.0:
            break
        if queued > 0.0 and g.lane and now - head >= patience[head]:
            part = queue[head]
            queue[head] = 0.0
            queued -= part
            if behind <= 0.0:
                late_head = head
                for b in range(head, now + 1):
                    late[b] = 0.0
            late_head = min(late_head, head)
            late[head] += part
            behind += part
            if g.score_from <= head < g.score_to:
                missed += part * per_work[head]
            continue
        if budget <= 0.0:
            break
        is_late = behind > 0.0 and (queued <= 0.0 or now - late_head > g.late_bound)
        b = late_head if is_late else head
        wait = now - b
        if is_late:
            part = min(late[b], budget)
            late[b] = 0.0 if part == late[b] else late[b] - part
            behind -= part
        else:
            part = min(queue[b], budget)
            queue[b] = 0.0 if part == queue[b] else queue[b] - part
            queued -= part
            is_late = wait >= patience[b]
            if is_late and g.score_from <= b < g.score_to:
                missed += part * per_work[b]
        budget -= part
        r[SERVED] += part
        if tracked:
            s.began[now] += part * per_work[b]
            s.began_work[now] += part
            s.began_prompt[now] += part / g.work[b] * g.prompt[b]
        if is_late and g.score_from <= b < g.score_to:
            requests = part * per_work[b]
            waits[min(wait, len(waits) - 1)] += requests
            r[LATE_ENDED] += requests
            r[LATE_WAITED] += requests * wait
            r[LATE_MOST] = max(r[LATE_MOST], float(wait))
    r[MISSED] += missed
    r[QUEUED] = max(queued, 0.0)
    r[LATE] = max(behind, 0.0)
    w[HEAD] = head
    w[LATE_HEAD] = late_head


@njit
def _seconds(s: State, g: Given, start: int, end: int, rule: Rule) -> None:
    """Pass the seconds from start to end; at each tick under the rule, if there is one.

    Most seconds nothing waits and all fits, and at most ticks there is nothing to order: these are done
    here, with no call (a call counts the references of a dozen arrays), and that is what makes a day take
    milliseconds.
    """
    w, r = s.whole, s.real
    work, began = g.work, s.began
    tracked = len(began) > 0
    kept = len(s.record) > 0
    ruled = rule.k > 0.0
    rate = g.capacity * w[HOT]
    next_event = w[NEXT_EVENT]
    exists = w[HOT] + w[STARTING] + w[LOADING] + w[STOPPING] + w[COLD]
    counted = start  # up to here the seconds are in the sums
    calm = r[QUEUED] == 0.0 and r[LATE] == 0.0
    tick = start
    for now in range(start, end):
        if now >= next_event:
            _count_seconds(s, g, counted, now)
            counted = now
            _pass_events(s, g, now)
            rate = g.capacity * w[HOT]
            next_event = w[NEXT_EVENT]
        if now == tick:
            tick += TICK_S
            if ruled:
                need = 0.0
                if now >= TICK_S:
                    need = rule.k * rule.level[now // TICK_S - 1] / g.capacity
                steady = max(rule.min_hot, math.ceil(need - ROUND))
                hot = steady
                if not calm:
                    need += (r[QUEUED] + r[LATE]) / (g.capacity * rule.drain)
                    hot = max(rule.min_hot, math.ceil(need - ROUND))
                    hot = min(hot, max(steady, exists))
                spare = math.ceil(rule.headroom * steady - ROUND)
                total = max(rule.pool, spare, hot, w[HOT] + w[STARTING])
                if not 0 <= now - rule.settled <= SETTLE_S:
                    total = max(total, exists)
                if hot != w[HOT] + w[STARTING] or hot != w[WANTED] or total != exists:
                    _count_seconds(s, g, counted, now)
                    counted = now
                    _order(s, g, now, hot, total)
                    rate = g.capacity * w[HOT]
                    next_event = w[NEXT_EVENT]
                    exists = w[HOT] + w[STARTING] + w[LOADING] + w[STOPPING] + w[COLD]
            if kept:
                for place in range(5):
                    s.record[now // TICK_S, place] = w[place]
                s.record[now // TICK_S, 5] = w[WANTED]
        if calm and work[now] <= rate:
            r[SERVED] += work[now]
            if tracked:
                began[now] = g.requests[now]
                s.began_work[now] = work[now]
                s.began_prompt[now] = g.prompt[now]
        else:
            _serve(s, g, now)
            calm = r[QUEUED] == 0.0 and r[LATE] == 0.0
        if tracked:
            _count_on(s, g, now)
    _count_seconds(s, g, counted, end)


@njit
def _count_seconds(s: State, g: Given, start: int, end: int) -> None:
    """The scored seconds from start to end, in which no instance changed, are in the sums."""
    w = s.whole
    seconds = min(end, g.score_to) - max(start, g.score_from)
    if seconds <= 0:
        return
    w[SEC_HOT] += seconds * w[HOT]
    w[SEC_STARTING] += seconds * w[STARTING]
    w[SEC_LOADING] += seconds * w[LOADING]
    w[SEC_STOPPING] += seconds * w[STOPPING]
    w[SEC_COLD] += seconds * w[COLD]
    w[SEC_WANTED] += seconds * w[WANTED]
    w[SEC_UNCOVERED] += seconds * max(0, w[WANTED] - w[HOT] - w[STARTING] - w[STOPPING] - w[COLD])
    w[MOST_HOT] = max(w[MOST_HOT], w[HOT])


@njit
def _count_on(s: State, g: Given, now: int) -> None:
    """What instances have at hand: all whose service began in the last service seconds (Little's law)."""
    r = s.real
    r[BEGAN] += s.began[now]
    r[BEGAN_PROMPT] += s.began_prompt[now]
    r[ON] += s.began[now]
    r[ON_WORK] += s.began_work[now]
    r[ON_PROMPT] += s.began_prompt[now]
    gone = now - g.service
    if gone >= 0:
        r[ON] = max(0.0, r[ON] - s.began[gone])
        r[ON_WORK] = max(0.0, r[ON_WORK] - s.began_work[gone])
        r[ON_PROMPT] = max(0.0, r[ON_PROMPT] - s.began_prompt[gone])


@njit
def _turn(s: State, g: Given, now: int, end: int, hot: int, total: int, none: Rule) -> None:
    """One tick of any policy: its orders, then the seconds until it is asked again.

    What is due at `end` has happened when it returns, so that the policy is asked about what is.
    """
    _order(s, g, now, hot, total)
    _seconds(s, g, now, end, none)
    if end >= s.whole[NEXT_EVENT]:
        _pass_events(s, g, end)


@njit
def _close(s: State, g: Given, end: int) -> None:
    """Count what still waits at the end: late requests so far, and those on time that will not make it."""
    w, r = s.whole, s.real
    for b in range(w[LATE_HEAD], end):
        if r[LATE] > 0.0 and s.late[b] > 0.0 and g.score_from <= b < g.score_to:
            _count_late(s, g, b, end - b, s.late[b])
    ahead = 0.0
    for b in range(w[HEAD], end):
        if r[QUEUED] > 0.0 and s.queue[b] > 0.0:
            ahead += s.queue[b]
            wait = end - b + math.floor(ahead / max(1e-9, g.capacity * w[HOT]))
            if wait >= g.patience[b] and g.score_from <= b < g.score_to:
                r[MISSED] += s.queue[b] * g.per_work[b]
                _count_late(s, g, b, end - b, s.queue[b])


@njit
def mean_series(arriving: Floats, mean_s: float, values: int) -> Floats:
    """The exponential mean of policies/objective.py after each bin; over `values` bins at most."""
    decay = math.exp(-BIN_S / mean_s)
    forgotten = decay**values
    out = np.empty(len(arriving))
    total = 0.0
    for n in range(len(arriving)):
        total = total * decay + arriving[n]
        if n >= values:
            total -= forgotten * arriving[n - values]
        out[n] = total * (1.0 - decay) / (1.0 - decay ** min(n + 1, values))
    return out


@njit
def held_series(values: Floats, back: int) -> Floats:
    """The largest of each value and the `back` before it."""
    out = np.empty(len(values))
    at = 0
    for n in range(len(values)):
        if n == 0 or values[n] >= values[at]:
            at = n
        elif at < n - back:
            at = n - back
            for m in range(n - back, n + 1):
                if values[m] >= values[at]:
                    at = m
        out[n] = values[at]
    return out


# -- runs ------------------------------------------------------------------------------------------------


def level_series(arriving: Floats, level: Objective) -> Floats:
    """The level F of `Objective` after its hold, work/s, at the end of each bin of BIN_S."""
    fast = mean_series(arriving, level.fast_s, window(level.fast_s))
    slow = mean_series(arriving, level.slow_s, window(level.slow_s))
    return held_series(np.maximum(fast, level.slow_share * slow), round(level.hold_s / BIN_S))


T = TypeVar("T")


class Tail(Sequence[T]):
    """The last of a list that grows, as it is now: a view that costs nothing to make.

    A policy gets one at every tick; copying hours of history each time would cost more than the simulation.
    `array`, if given, holds the same values for numpy.
    """

    __slots__ = ("_array", "_end", "_of", "_start")

    def __init__(self, of: list[T], start: int, end: int, array: Floats | None = None) -> None:
        self._of, self._start, self._end, self._array = of, max(0, start), end, array

    def __len__(self) -> int:
        """How many there are."""
        return self._end - self._start

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """One value, or a part as a list."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self._of[self._start : self._end][index]
            return self._of[self._start + start : self._start + max(start, stop)]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._of[(self._end if index < 0 else self._start) + index]

    def __iter__(self) -> Iterator[T]:
        """Oldest first."""
        return iter(self._of[self._start : self._end])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The values for numpy: a view where an array is at hand."""
        if self._array is None:
            return np.asarray(self._of[self._start : self._end], dtype=dtype)
        return np.array(self._array[self._start : self._end], dtype=dtype, copy=copy)


class Run:
    """A run that can be led by one policy after another; `level` and `policy` go on where the last ended.

    score_from_s, score_to_s: the seconds that count. hot, cold: the instances there are at the start, for
    which nothing was paid. tracked: whether a policy will be asked, which needs to know what is at hand.
    """

    def __init__(
        self,
        bins: Bins,
        fleet: Fleet,
        *,
        seed: int = 1,
        score_from_s: int = 0,
        score_to_s: int | None = None,
        hot: int = 1,
        cold: int = 0,
        tracked: bool = False,
        series: bool = False,
    ) -> None:
        seconds = len(bins)
        score_to = seconds if score_to_s is None else min(score_to_s, seconds)
        if not 0 <= score_from_s <= score_to:
            raise ValueError(f"scored seconds {score_from_s} to {score_to}: wanted a part of 0 to {seconds}")
        if hot < 0 or cold < 0 or hot + cold > fleet.max_instances:
            raise ValueError(f"{hot} hot and {cold} cold: wanted 0 to {fleet.max_instances} in all")
        self.bins, self.fleet, self.now = bins, fleet, 0
        self._arriving = bins.arriving
        at_hand = seconds if tracked else 0
        prompt, output = bins.tokens() if tracked else (np.zeros(0), np.zeros(0))
        self._totals = [*bins.sums, *(np.concatenate(([0.0], np.cumsum(v))) for v in (prompt, output))]
        self._given = Given(
            bins.work,
            bins.requests,
            bins.per_work,
            prompt,
            bins.patience,
            float(fleet.capacity.work_s),
            bool(fleet.late_lane),
            round(fleet.late_bound_s),
            float(fleet.start_lo_s),
            float(fleet.start_hi_s - fleet.start_lo_s),
            round(fleet.load_s),
            round(fleet.stop_s),
            int(fleet.max_instances),
            int(score_from_s),
            int(score_to),
            max(1, round(fleet.service_s)),
            int(seed) & 0x7FFFFFFFFFFFFFFF,
        )
        whole = np.zeros(WHOLES, dtype=np.int64)
        whole[HOT], whole[COLD], whole[WANTED], whole[NEXT_EVENT] = hot, cold, hot, NEVER
        ready, loaded, stopped = (np.empty(2 * MOST_INSTANCES, dtype=np.int64) for _ in range(3))
        self._state = State(
            whole,
            np.zeros(REALS),
            np.empty(seconds),
            np.empty(seconds),
            ready,
            loaded,
            stopped,
            np.zeros(LATE_WAITS_S + 1),
            np.zeros(at_hand),
            np.zeros(at_hand),
            np.zeros(at_hand),
            np.zeros(((seconds + TICK_S - 1) // TICK_S if series else 0, 6), dtype=np.int64),
        )

    def level(self, level: Objective, until_s: int | None = None, levels: Floats | None = None) -> None:
        """Go on to until_s under `Objective`, compiled. levels: its `level_series`, if that is at hand.

        Gives what `policy` would give with the same object at a tick of 5 s.
        """
        end = len(self.bins) if until_s is None else min(until_s, len(self.bins))
        if self.now % TICK_S:
            raise ValueError(f"second {self.now}: a level begins at a multiple of {TICK_S}")
        known = level_series(self._arriving, level) if levels is None else levels
        settled = -NEVER if level.settled_at == -math.inf else int(level.settled_at)
        rule = Rule(
            known,
            float(level.factor),
            float(level.drain_s),
            int(level.min_hot),
            int(level.pool),
            float(level.pool_headroom),
            settled,
        )
        _seconds(self._state, self._given, self.now, end, rule)
        self.now = max(self.now, end)

    def policy(self, policy: Policy, until_s: int | None = None, tick_s: int = TICK_S) -> None:
        """Go on to until_s and ask the policy every tick_s; between ticks the seconds are compiled."""
        end = len(self.bins) if until_s is None else min(until_s, len(self.bins))
        seen = _Eyes(self, policy.memory_s)
        while self.now < end:
            targets = policy.targets(seen.look(self.now))
            until = min(self.now + tick_s, end)
            _turn(self._state, self._given, self.now, until, targets.hot, targets.total, NO_RULE)
            self.now = until

    @property
    def instances(self) -> tuple[int, int]:
        """How many are hot or coming, and how many exist."""
        w = self._state.whole
        return int(w[HOT] + w[STARTING]), int(w[HOT : COLD + 1].sum())

    @property
    def scored_so_far(self) -> tuple[float, float]:
        """Requests that came in the scored seconds up to now, and those of them that were missed."""
        g, requests = self._given, self._totals[0]
        first = min(self.now, g.score_from)
        return float(requests[min(self.now, g.score_to)] - requests[first]), float(self._state.real[MISSED])

    def result(self) -> FluidResult:
        """What happened up to now; what still waits is counted. The run is over."""
        s, g, fleet = self._state, self._given, self.fleet
        _close(s, g, self.now)
        w, r = s.whole, s.real
        counted = np.cumsum(s.waits)

        def waited(share: float) -> float:
            return float(np.searchsorted(counted, share * counted[-1])) if counted[-1] > 0.0 else 0.0

        def usd(place: int) -> float:
            price = fleet.stopped_usd_h if place == SEC_COLD else fleet.running_usd_h
            return float(w[place]) / 3600.0 * price

        arrived = float(self._totals[1][self.now])
        return FluidResult(
            requests=self.scored_so_far[0],
            missed=float(r[MISSED]),
            gpu_h=float(w[SEC_HOT : SEC_STOPPING + 1].sum()) / 3600.0,
            usd_hot=usd(SEC_HOT),
            usd_starting=usd(SEC_STARTING),
            usd_loading=usd(SEC_LOADING),
            usd_stopping=usd(SEC_STOPPING),
            usd_stopped=usd(SEC_COLD),
            starts=int(w[STARTS]),
            stops=int(w[STOPS]),
            creates=int(w[CREATES]),
            destroys=int(w[DESTROYS]),
            late_mean_s=float(r[LATE_WAITED] / r[LATE_ENDED]) if r[LATE_ENDED] > 0.0 else 0.0,
            late_p50_s=waited(0.5),
            late_p95_s=waited(0.95),
            late_max_s=float(r[LATE_MOST]),
            uncovered=float(w[SEC_UNCOVERED] / w[SEC_WANTED]) if w[SEC_WANTED] else 0.0,
            most_hot=int(w[MOST_HOT]),
            peak_wanted=int(w[PEAK_WANTED]),
            work_arrived=arrived,
            work_served=float(r[SERVED]),
            work_waiting=float(r[QUEUED] + r[LATE]),
            series=self._series() if len(s.record) else None,
        )

    def _series(self) -> Series:
        ticks = (self.now + TICK_S - 1) // TICK_S
        at = np.arange(ticks, dtype=np.int64) * TICK_S
        rows = self._state.record[:ticks]
        work = self._totals[1]
        before = work[np.minimum(at + TICK_S, self.now)] - work[at]
        demand = before / (TICK_S * self.fleet.capacity.work_s)
        hot, starting, loading, stopping, cold, wanted = (rows[:, n] for n in range(6))
        return Series(at, hot, starting, loading, cold + stopping, wanted, demand)


class _Eyes:
    """What a policy sees of a run: FleetSnapshot as the autoscaler would make it."""

    def __init__(self, run: Run, memory_s: float) -> None:
        if not len(run._state.began):
            raise ValueError("a policy is asked only in a run that is tracked")
        self._run = run
        self._memory_s = memory_s
        self._arriving = run._arriving.tolist()
        self._demand: list[tuple[float, float]] = []
        fleet = run.fleet
        self._start_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
        self._holds = fleet.capacity.work_s * fleet.service_s

    def look(self, now: int) -> FleetSnapshot:
        """The fleet and its load at this second, before what arrives in it."""
        run, fleet = self._run, self._run.fleet
        hot, starting, loading, stopping, cold, head, late_head = run._state.whole[:7].tolist()
        real = run._state.real.tolist()
        requests, work, prompt, output = (float(total[now]) for total in run._totals)
        held_work = real[QUEUED] + real[LATE]
        waits = held_work > 0.0
        oldest = 0.0
        if waits:
            first = head if real[QUEUED] > 0.0 else now
            oldest = float(now - min(first, late_head if real[LATE] > 0.0 else now))
        self._demand.append((float(now), (real[ON_WORK] + held_work) / self._holds))
        while self._demand[0][0] < now - self._memory_s:
            if len(self._demand) == 1:
                break
            self._demand.pop(0)
        ended = now // int(BIN_S)
        return FleetSnapshot(
            now=float(now),
            demand=self._demand,
            hot=hot,
            coming=starting,
            loading=loading,
            cold=cold + stopping,
            draining=0,
            start_time_s=self._start_s,
            load_time_s=fleet.load_s,
            traffic=Traffic(
                requests_total=requests,
                prompt_tokens_total=prompt,
                output_tokens_total=output,
                work_total=work,
                in_flight=real[ON],
                held=max(0.0, requests - real[BEGAN]) if waits else 0.0,
                held_work=held_work,
                held_prompt_tokens=max(0.0, prompt - real[BEGAN_PROMPT]) if waits else 0.0,
                oldest_wait_s=oldest,
                kv_tokens=real[ON_PROMPT] + max(0.0, real[ON_WORK] - PREFILL_WEIGHT * real[ON_PROMPT]) / 2.0,
            ),
            capacity=fleet.capacity,
            arriving=Tail(self._arriving, 0, ended, run._arriving),
            running_usd_h=fleet.running_usd_h,
            stopped_usd_h=fleet.stopped_usd_h,
        )


def run_level(
    bins: Bins,
    level: Objective,
    fleet: Fleet,
    *,
    seed: int = 1,
    score_from_s: int = 0,
    score_to_s: int | None = None,
    hot: int | None = None,
    cold: int | None = None,
    levels: Floats | None = None,
    series: bool = False,
) -> FluidResult:
    """The whole trace under one level, compiled: one to three milliseconds for a day.

    hot, cold: instances at the start; where not given, what the level wants before anything has arrived.
    """
    hot, cold = _first(level, fleet, hot, cold)
    run = Run(
        bins,
        fleet,
        seed=seed,
        score_from_s=score_from_s,
        score_to_s=score_to_s,
        hot=hot,
        cold=cold,
        series=series,
    )
    run.level(level, levels=levels)
    return run.result()


def run_policy(
    bins: Bins,
    policy: Policy,
    fleet: Fleet,
    *,
    tick_s: int = TICK_S,
    seed: int = 1,
    score_from_s: int = 0,
    score_to_s: int | None = None,
    hot: int | None = None,
    cold: int | None = None,
    series: bool = False,
) -> FluidResult:
    """The whole trace under any policy, asked every tick_s; for `Objective` at 5 s the same as run_level."""
    hot, cold = _first(policy, fleet, hot, cold)
    run = Run(
        bins,
        fleet,
        seed=seed,
        score_from_s=score_from_s,
        score_to_s=score_to_s,
        hot=hot,
        cold=cold,
        tracked=True,
        series=series,
    )
    run.policy(policy, tick_s=tick_s)
    return run.result()


def _first(policy: Policy, fleet: Fleet, hot: int | None, cold: int | None) -> tuple[int, int]:
    """The instances at the start: as given, or what the policy wants of an empty fleet without load."""
    if hot is not None and cold is not None:
        return hot, cold
    start_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
    wanted = policy.targets(
        FleetSnapshot(0.0, (), 0, 0, 0, 0, 0, start_s, fleet.load_s, capacity=fleet.capacity)
    )
    first = min(fleet.max_instances, max(0, wanted.hot)) if hot is None else hot
    total = min(fleet.max_instances, max(first, wanted.total))
    return first, total - first if cold is None else cold
