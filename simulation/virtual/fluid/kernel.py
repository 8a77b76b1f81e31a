"""The compiled part of the fluid model: what happens in each second."""

import math
from typing import NamedTuple

import numpy as np

from policies.objective import ROUND, SETTLE_S
from policies.types import BIN_S
from process.compiled import njit
from simulation.virtual.fluid.bins import Floats
from simulation.virtual.fluid.fleet import Ints

TICK_S = 5
"""Seconds between two questions to our policy; the width of one bin of `FleetSnapshot.arriving`."""

NEVER = 1 << 62

# Places in FluidState.whole (integers) ...
HOT, STARTING, LOADING, STOPPING, COLD = 0, 1, 2, 3, 4
HEAD, LATE_HEAD, WANTED, NEXT_EVENT = 5, 6, 7, 8
STARTS, STOPS, CREATES, DESTROYS, MOST_HOT, PEAK_WANTED = 9, 10, 11, 12, 13, 14
SEC_HOT, SEC_STARTING, SEC_LOADING, SEC_STOPPING, SEC_COLD = 15, 16, 17, 18, 19
SEC_WANTED, SEC_UNCOVERED = 20, 21
WHOLES = 22
# ... and in FluidState.real: the queues in work, the counts in requests.
QUEUED, LATE, MISSED, SERVED, LATE_ENDED, LATE_WAITED, LATE_MOST = 0, 1, 2, 3, 4, 5, 6
BEGAN, BEGAN_PROMPT, ON, ON_WORK, ON_PROMPT = 7, 8, 9, 10, 11
REALS = 12


class FluidState(NamedTuple):
    """All that changes in a run of the fluid model.

    The lists end at the counts in `whole` and are in the order of the commands. queue, late: work left of
    each bin on time and late; undefined where nothing waited. waits: late requests by seconds waited. began,
    began_work, began_prompt: requests, their work and prompt tokens whose service began in each second; empty
    where no policy is asked. BEGAN… are their sums, ON… those of the last service seconds: what instances
    have at hand. record: the series; empty where none is kept.
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


class FluidConstants(NamedTuple):
    """All that does not change in a run of the fluid model.

    patience: the first wait, in whole seconds, that is too long, by bin. per_work: requests in a unit of
    work, by bin.
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


class LevelRule(NamedTuple):
    """The policy of policies/objective.py with its parameters, for compiled code; k = 0: no policy.

    level: its F after the hold, work/s, by bin. settled: the pool may shrink in the SETTLE_S from here.
    """

    level: Floats
    k: float
    drain: float
    min_hot: int
    pool: int
    headroom: float
    settled: int


NO_RULE = LevelRule(np.zeros(0), 0.0, 1.0, 0, 0, 1.0, -NEVER)


@njit
def start_draw(seed: int, at: int, n: int) -> float:
    """Return a number from 0 to 1, evenly drawn, for the n-th start in second `at`.

    splitmix64 (Steele et al. 2014): a hash of the arguments and not a stream, so that one start more leaves
    the others as they were.
    """
    z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(at) * np.uint64(0xD1B54A32D192ED03)
    z = z + np.uint64(n + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@njit
def _next_event(s: FluidState) -> None:
    """Store when the next starting, loading or stopping instance of the fleet changes by itself."""
    soonest = NEVER
    for n in range(s.whole[STARTING]):
        soonest = min(soonest, s.ready[n])
    for n in range(s.whole[LOADING]):
        soonest = min(soonest, s.loaded[n])
    for n in range(s.whole[STOPPING]):
        soonest = min(soonest, s.stopped[n])
    s.whole[NEXT_EVENT] = soonest


@njit
def _pass_events(s: FluidState, g: FluidConstants, now: int) -> None:
    """Make started instances hot, loaded ones hot or stopping as wanted, and stopped ones cold."""
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
def _stop(s: FluidState, g: FluidConstants, now: int) -> None:
    """Begin to stop one instance; the caller has taken it from the count of its old state."""
    s.stopped[s.whole[STOPPING]] = now + g.stop
    s.whole[STOPPING] += 1
    if g.score_from <= now < g.score_to:
        s.whole[STOPS] += 1


@njit
def _order(s: FluidState, g: FluidConstants, now: int, hot: int, total: int) -> None:
    """Start, stop, create and destroy to get `hot` hot and `total` in all, as InstanceSet.decide orders."""
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
def _count_late(s: FluidState, g: FluidConstants, b: int, wait: int, part: float) -> None:
    """Count a part of the work that came in second b as late, after a wait of so many seconds."""
    requests = part * g.per_work[b]
    s.waits[min(wait, len(s.waits) - 1)] += requests
    s.real[LATE_ENDED] += requests
    s.real[LATE_WAITED] += requests * wait
    s.real[LATE_MOST] = max(s.real[LATE_MOST], float(wait))


@njit
def _serve(s: FluidState, g: FluidConstants, now: int) -> None:
    """Let the work of this second arrive, and the hot instances serve for one second.

    They serve late work that has waited over the bound, then what is on time, then late work.
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
def pass_seconds(s: FluidState, g: FluidConstants, start: int, end: int, rule: LevelRule) -> None:
    """Simulate the seconds from start to end; at each tick the fleet follows the rule, if there is one.

    In most seconds nothing waits and all fits, and at most ticks there is no command: these are done here
    without a call, which counts the references of a dozen arrays. So a day takes milliseconds.
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
def _count_seconds(s: FluidState, g: FluidConstants, start: int, end: int) -> None:
    """Add instances by state to the sums, for the scored seconds from start to end, without a change."""
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
def _count_on(s: FluidState, g: FluidConstants, now: int) -> None:
    """Count the requests on instances: those begun in the last service_s seconds (Little's law)."""
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
def pass_turn(
    s: FluidState, g: FluidConstants, now: int, end: int, hot: int, total: int, no_rule: LevelRule
) -> None:
    """Simulate one tick of any policy: its commands, then the seconds until it is asked again.

    What is due at `end` has happened when it returns, so that the policy sees it.
    """
    _order(s, g, now, hot, total)
    pass_seconds(s, g, now, end, no_rule)
    if end >= s.whole[NEXT_EVENT]:
        _pass_events(s, g, end)


@njit
def count_waiting(s: FluidState, g: FluidConstants, end: int) -> None:
    """Count the requests that still wait at the run's end and are late, or cannot be in time any more."""
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
    """Return the exponential mean of the arrivals after each bin, over `values` bins at most.

    It is the mean over mean_s seconds of policies/objective.py.
    """
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
    """Return for each value the largest of itself and the `back` values before it."""
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
