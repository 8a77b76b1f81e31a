"""A model server run forward: when each of its requests would have its first token and its end.

It is the rule of engine/reference.py on a table with a row a request, in the order in which the server got
them. A step makes one token for every request that is past its prompt and reads prompts with what is left
of its budget of tokens; the request that came first is admitted first, while there is KV memory; the one
that came last is put back when there is none. Steps in which no request comes, ends or is put back are one
stretch in closed form,

    k = min(tokens until a request ends, KV memory left / n, steps until a request comes)
    dt = k * (a + b*n + c*context) + c*n * k*(k-1)/2

so a run costs O(n) stretches and a choice among eight servers some twenty microseconds, compiled. `njit`
keeps the plain function, and a test runs both.

The price of giving a request to a server is what it does to all requests (docs/reference/dispatch-study.md):

    own end + w * own first token
      + the same, as it grows for all that are there, and for those that will come in the next seconds

Times are seconds from now; rows, constants and asks are float64 tables with the columns below.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.step_time_constants import Timing
from process.compiled import njit

Floats = NDArray[np.float64]

PROMPT, UNREAD, LEFT, HELD, MADE, MOST, KIND, COLUMNS = 0, 1, 2, 3, 4, 5, 6, 7
"""Columns of a request: tokens of the prompt (once it was put back its own, too), those of them still to
read, tokens still to make, KV tokens held (0: it waits), tokens made, tokens it may make, its kind
(dispatch/output_lengths.py)."""

COL_BASE_S, COL_REQUEST_S, COL_CONTEXT_S, COL_PREFILL_S, COL_PROMPT_S, COL_SQUARE_S = 0, 1, 2, 3, 4, 5
COL_KV_TOKENS, COL_MAX_SEQS, COL_STEP_TOKENS, CONSTANT_COLUMNS = 6, 7, 8, 9
"""Columns of a server: its constants a to f (engine/step_time_constants.py), in seconds a step, a request, a
token or a token²; its limits."""

STEP_TIMES = slice(COL_BASE_S, COL_SQUARE_S + 1)
"""The columns of the constants a to f."""

NEVER_S = 1e9
"""Seconds to the first token and to the end of a request that is larger than the KV memory."""

BEHIND_S, MOST_BEHIND = 3.0, 8.0
"""Seconds and number of later requests whose delay counts in the price: with 64 nothing is better (4 seeds of
conv, bench/dispatch), and a choice takes half as long again."""


def constants(t: Timing) -> Floats:
    """Return the step-time constants and limits of a server as one row of floats, in the columns COL_…."""
    return np.array(
        [
            t.a / 1e3,
            t.b / 1e3,
            t.c / 1e6,
            t.d / 1e3,
            t.e / 1e6,
            t.f / 1e9,
            t.kv_tokens,
            t.max_seqs,
            t.step_tokens,
        ]
    )


@njit
def _step_s(s: Floats, batch: int, context: float, prompt: float, squares: float) -> float:
    floor = s[COL_BASE_S] if batch else 0.0
    if prompt > 0.0 and s[COL_PREFILL_S] > floor:
        floor = s[COL_PREFILL_S]
    linear = (
        floor
        + s[COL_REQUEST_S] * batch
        + s[COL_CONTEXT_S] * context
        + s[COL_PROMPT_S] * prompt
        + s[COL_SQUARE_S] * squares
    )
    bound = s[COL_PROMPT_S] * (batch + prompt)
    return linear if linear > bound else bound  # type: ignore[no-any-return]


class Scratch(NamedTuple):
    """Arrays that are allocated once and used by call after call of `run` and `price`."""

    order: NDArray[np.int64]
    since: Floats
    ends: Floats
    reads: NDArray[np.int64]
    table: Floats
    come: Floats
    first: Floats
    end: Floats


@njit
def scratch_for(total: int) -> Scratch:
    """Allocate the working memory for runs of up to `total` requests."""
    return Scratch(
        np.empty(total, np.int64),
        np.empty(total),
        np.empty(total),
        np.empty(total, np.int64),
        np.empty((total, COLUMNS)),
        np.empty(total),
        np.empty(total),
        np.empty(total),
    )


@njit
def behind(gap_s: float) -> int:
    """Return how many requests come in BEHIND_S seconds, one each gap_s seconds; at most MOST_BEHIND."""
    return int(min(BEHIND_S / gap_s, MOST_BEHIND))


@njit
def run(
    rows: Floats,
    come: Floats,
    s: Floats,
    start_s: float,
    until_s: float,
    first: Floats,
    end: Floats,
    scratch: Scratch,
) -> float:
    """Simulate a model server from start_s until all its requests have ended; return the time of the end.

    rows: one request a row, in the order in which they came; changed. come: when each comes (0: it is already
    there); those that come later stand last, in that order. s: the server's constants. first, end: filled
    with the times of each request's first token and end. With a finite until_s the run stops at the first
    step that ends then or later; all requests must be there from start_s on, and each is taken to run on
    beyond its expected length, since which of them would have ended is not known.
    """
    total = len(rows)
    endless = until_s < np.inf
    t, count = start_s, 0.0
    used = context = 0.0
    running = alive = 0
    # Those that make tokens, since which step and until which, the next to end last; those that read.
    order, since, ends, batch = scratch.order, scratch.since, scratch.ends, 0
    reads, reading = scratch.reads, 0
    for i in range(total):
        if rows[i, LEFT] <= 0.0 and not endless:
            continue
        alive += 1
        if rows[i, HELD] > 0.0:
            used += rows[i, HELD]
            running += 1
            if rows[i, UNREAD] > 0.0:
                reads[reading] = i
                reading += 1
            else:
                context += rows[i, HELD]
                since[i] = 0.0
                batch = _insert(order, ends, batch, i, np.inf if endless else np.ceil(rows[i, LEFT]))
    waits = 0  # none that waits stands before this row
    while alive > 0 and t < until_s:
        put_back = False
        while used + batch > s[COL_KV_TOKENS] and running > 1:
            i = total - 1
            while rows[i, HELD] <= 0.0:
                i -= 1
            if rows[i, UNREAD] > 0.0:
                reading -= 1  # it came last, so it reads last
            else:
                _settle(rows, i, count - since[i])
                context -= rows[i, HELD]
                batch = _take_out(order, ends, batch, i)
                rows[i, PROMPT] = rows[i, HELD]  # as many as its prompt and its own tokens
            used -= rows[i, HELD]
            running -= 1
            rows[i, UNREAD], rows[i, HELD] = rows[i, PROMPT], 0.0
            waits = i
            put_back = True
        budget = s[COL_STEP_TOKENS] - batch
        tokens = squares = 0.0
        parts = 0  # of those that read, so many get a part of this step
        while parts < reading and budget > 0.0:
            i = reads[parts]
            part = min(rows[i, UNREAD], budget)
            at = rows[i, PROMPT] - rows[i, UNREAD]
            tokens += part
            squares += (at + part) ** 2 - at**2
            budget -= part
            parts += 1
        next_s = np.inf
        while not put_back:
            while waits < total and (rows[waits, HELD] > 0.0 or (rows[waits, LEFT] <= 0.0 and not endless)):
                waits += 1
            if waits == total:
                break
            if come[waits] > t:
                next_s = come[waits]
                break
            need = rows[waits, PROMPT] + 1.0
            if need > s[COL_KV_TOKENS] and running == 0:
                first[waits] = end[waits] = NEVER_S  # it never fits
                rows[waits, LEFT] = 0.0
                alive -= 1
                if endless:
                    waits += 1
                continue
            if budget <= 0.0 or running >= s[COL_MAX_SEQS] or used + batch + need > s[COL_KV_TOKENS]:
                break
            rows[waits, HELD] = need
            used += need
            running += 1
            part = min(rows[waits, UNREAD], budget)
            at = rows[waits, PROMPT] - rows[waits, UNREAD]
            tokens += part
            squares += (at + part) ** 2 - at**2
            budget -= part
            reads[reading] = waits
            reading += 1
            parts += 1
        if parts > 0:
            k, dt = 1.0, _step_s(s, batch, context, tokens, squares)
        elif batch > 0:
            one_s = s[COL_BASE_S] + s[COL_REQUEST_S] * batch + s[COL_CONTEXT_S] * context
            grows_s = s[COL_CONTEXT_S] * batch
            if one_s < s[COL_PROMPT_S] * batch:
                one_s, grows_s = s[COL_PROMPT_S] * batch, 0.0
            k = ends[batch - 1] - count
            room = np.floor((s[COL_KV_TOKENS] - used) / batch)
            if running > 1 and room < k:
                k = room if room > 1.0 else 1.0
            stop = until_s if until_s < next_s else next_s
            if stop < np.inf:
                k = min(k, _steps_until(stop - t, one_s, grows_s))
            dt = k * one_s + grows_s * k * (k - 1.0) / 2.0
        elif next_s < np.inf:
            t = next_s
            continue
        else:
            break
        t += dt
        count += k
        used += k * batch
        context += k * batch
        while batch > 0 and ends[batch - 1] <= count:
            batch -= 1
            i = order[batch]
            _settle(rows, i, count - since[i])
            end[i] = t
            used -= rows[i, HELD]
            context -= rows[i, HELD]
            rows[i, HELD] = rows[i, LEFT] = 0.0
            running -= 1
            alive -= 1
        kept = 0
        for j in range(reading):
            i = reads[j]
            part = min(rows[i, UNREAD], tokens) if j < parts else 0.0
            rows[i, UNREAD] -= part
            tokens -= part
            if rows[i, UNREAD] > 0.0:
                reads[kept] = i
                kept += 1
                continue
            if rows[i, MADE] < 1.0:
                first[i] = t
            rows[i, MADE] += 1.0
            rows[i, LEFT] -= 1.0
            if rows[i, LEFT] <= 0.0 and not endless:
                end[i] = t
                used -= rows[i, HELD]
                rows[i, HELD] = 0.0
                running -= 1
                alive -= 1
            else:
                context += rows[i, HELD]
                since[i] = count
                batch = _insert(order, ends, batch, i, np.inf if endless else count + np.ceil(rows[i, LEFT]))
        reading = kept
    if endless:
        for j in range(batch):
            _settle(rows, order[j], count - since[order[j]])
    return t


@njit
def _steps_until(dt: float, one_s: float, grows_s: float) -> float:
    """Return how many steps, at least one, pass until a step ends dt seconds from now or just after.

    The first step takes one_s seconds, and each step grows_s seconds more than the one before.
    """
    if grows_s <= 0.0:
        return max(1.0, np.ceil(dt / one_s))  # type: ignore[no-any-return]
    half = one_s - grows_s / 2.0
    steps = (np.sqrt(half * half + 2.0 * grows_s * max(dt, 0.0)) - half) / grows_s
    return max(1.0, np.ceil(steps - 1e-9))  # type: ignore[no-any-return]


@njit
def _settle(rows: Floats, i: int, steps: float) -> None:
    """Add to row i of the request table the tokens that the request made in `steps` steps, one in each."""
    rows[i, HELD] += steps
    rows[i, MADE] += steps
    rows[i, LEFT] -= steps


@njit
def _insert(order: NDArray[np.int64], ends: Floats, batch: int, i: int, at: float) -> int:
    j = batch
    while j > 0 and ends[j - 1] < at:
        order[j], ends[j] = order[j - 1], ends[j - 1]
        j -= 1
    order[j], ends[j] = i, at
    return batch + 1


@njit
def _take_out(order: NDArray[np.int64], ends: Floats, batch: int, i: int) -> int:
    j = 0
    while order[j] != i:
        j += 1
    while j + 1 < batch:
        order[j], ends[j] = order[j + 1], ends[j + 1]
        j += 1
    return batch - 1


@njit
def price_below(
    rows: Floats,
    s: Floats,
    start_s: float,
    ask: Floats,
    gap_s: float,
    usual: Floats,
    weight: float,
    most_s: float,
    scratch: Scratch,
) -> tuple[float, float, float]:
    """Return the same as `price`, but an infinite price if the request alone would cost most_s or more.

    The request's own part is its end plus weight times its first token; to see that it is too much costs half
    a full price. scratch: working memory for the rows, the request and those expected behind it.
    """
    count, later = len(rows), behind(gap_s)
    table, come, first, end = scratch.table, scratch.come, scratch.first, scratch.end
    price_s = 0.0
    own_first = own_end = 0.0
    for given in (1, 0):
        total = count + given + later
        table[:count] = rows
        come[: count + given] = 0.0
        first[:total] = 0.0
        if given:
            table[count] = ask
        for n in range(later):
            table[count + given + n] = usual
            come[count + given + n] = (n + 1) * gap_s
        run(table[:total], come, s, start_s, np.inf, first, end, scratch)
        sign = 1.0 if given else -1.0
        for i in range(total):
            price_s += sign * (end[i] + weight * first[i])
        if given:
            own_first, own_end = first[count], end[count]
            if own_end + weight * own_first >= most_s:
                return np.inf, own_first, own_end
    return price_s, own_first, own_end


@njit
def price(
    rows: Floats,
    s: Floats,
    start_s: float,
    ask: Floats,
    gap_s: float,
    usual: Floats,
    weight: float,
) -> tuple[float, float, float]:
    """Return (price, own first token, own end), in seconds, of giving one more request to a server.

    The price is by how much the ends and the weighted first tokens of all requests grow, the new one's
    included. rows: the server's table of requests, as it will be at start_s. s: the server's constants. ask:
    the row of the new request. usual: the row of a typical request, one of which is expected each gap_s
    seconds for BEHIND_S seconds; gap_s inf: none. weight: of the first token against the end.
    """
    scratch = scratch_for(len(rows) + 1 + behind(gap_s))
    return price_below(rows, s, start_s, ask, gap_s, usual, weight, np.inf, scratch)
