"""What the loadbalancer believes to go on inside one instance, and what a request would do there.

A request that is given to an instance stands in a table (forward.py) from then on and is moved along by
the engine's own rule, with the instance's own constants, whenever somebody asks; a report takes out what has
ended. So the belief is as new as the last request, however old the report, and what was given since counts:
without that the first token came 2.6 times later in the study (dispatch-study.md).

The table is always as it will be at the end of the step under way, because nobody can join before.

Times are epoch seconds, lengths tokens.
"""

import numpy as np

from compiled import njit
from dispatch.forward import (
    COLUMNS,
    CONSTANTS,
    HELD,
    KIND,
    KV,
    LEFT,
    MOST,
    PROMPT,
    UNREAD,
    A,
    B,
    C,
    E,
    Floats,
    price,
    run,
)
from dispatch.lengths import BINS, expect

ROWS = 16
"""Rows that a table begins with; it doubles when it is full."""


def row(prompt_tokens: float, cached_tokens: float, left: float, most: float, kind: int) -> Floats:
    """A request that has not begun. cached_tokens of the prompt need not be read, but for the last one."""
    out = np.zeros(COLUMNS)
    out[PROMPT] = max(1.0, prompt_tokens)
    out[UNREAD] = max(1.0, out[PROMPT] - cached_tokens)
    out[LEFT], out[MOST], out[KIND] = left, most, kind
    return out


class Belief:
    """The requests of one instance, in the order in which it was given them."""

    def __init__(self, now: float) -> None:
        """Nothing goes on there."""
        self.at = now
        self.heard_at = now  # so far its ends are known
        self.ids: list[str] = []
        self.rows = np.zeros((ROWS, COLUMNS))

    def __len__(self) -> int:
        """Requests there."""
        return len(self.ids)

    def add(self, request_id: str, request: Floats, constants: Floats, now: float) -> None:
        """It was given this request (see `row`)."""
        self.age(constants, now)
        n = len(self.ids)
        if n == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[n] = request
        self.ids.append(request_id)

    def remove(self, request_id: str, constants: Floats, now: float) -> None:
        """That one has ended, or will not come."""
        try:
            i = self.ids.index(request_id)
        except ValueError:
            return
        self.age(constants, now)
        del self.ids[i]
        n = len(self.ids)
        self.rows[i:n] = self.rows[i + 1 : n + 1]

    def clear(self, now: float) -> None:
        """It has rebooted: nothing goes on there."""
        self.ids.clear()
        self.at = now

    def age(self, constants: Floats, now: float) -> None:
        """Time has passed."""
        if now > self.at:
            self.at = _age(self.rows, len(self.ids), constants, self.at, now) if self.ids else now

    def offer(
        self,
        request: Floats,
        constants: Floats,
        table: Floats,
        usual: Floats,
        gap_s: float,
        weight: float,
        now: float,
    ) -> tuple[float, float, float, float]:
        """(price, KV tokens free, seconds of reading before it, of a step) if it were given this request.

        The price is that of forward.py. KV memory is free that those who are there will never need together.
        """
        offered, free, unread_s, step_s, self.at = _offer(
            self.rows,
            len(self.ids),
            constants,
            self.at,
            now,
            request,
            gap_s,
            usual,
            weight,
            table,
            now - self.heard_at,
        )
        return offered, free, unread_s, step_s

    def __contains__(self, request_id: str) -> bool:
        """Whether it is there."""
        return request_id in self.ids

    def room(self, constants: Floats, table: Floats, now: float) -> tuple[float, float, float]:
        """(KV tokens free, seconds of reading before it, of a step) for a request that came now."""
        free, unread_s, step_s, self.at = _room(
            self.rows, len(self.ids), constants, self.at, now, table, now - self.heard_at
        )
        return free, unread_s, step_s

    @property
    def context(self) -> float:
        """KV tokens in use."""
        return float(self.rows[: len(self.ids), HELD].sum())

    @property
    def reading(self) -> int:
        """Requests that have memory and whose prompt is not read yet."""
        rows = self.rows[: len(self.ids)]
        return int(((rows[:, HELD] > 0.0) & (rows[:, UNREAD] > 0.0)).sum())


@njit
def _age(rows: Floats, count: int, s: Floats, at: float, now: float) -> float:
    if count == 0:
        return max(at, now)
    come, never = np.full(count, at - now), np.empty(count)
    took = run(rows[:count], come, s, at - now, 0.0, never, never)
    # Everything there may wait for ever: then nothing is under way.
    return now + max(took, 0.0)


@njit
def _room(
    rows: Floats, count: int, s: Floats, at: float, now: float, table: Floats, unheard_s: float
) -> tuple[float, float, float, float]:
    if now > at:
        at = _age(rows, count, s, at, now)
    expect(rows, count, table)
    unread, context = 0.0, 0.0
    for i in range(count):
        context += rows[i, HELD]
        unread += rows[i, UNREAD]
    step_s = s[A] + s[B] * count + s[C] * context
    # What they need together is most when one of them ends: the others have grown until then.
    most = there = held = 0.0
    for i in np.argsort(-rows[:count, LEFT]):
        steps, alive, has = rows[i, LEFT], 1.0, rows[i, PROMPT] + 1.0
        if rows[i, HELD] > 0.0:
            # It may have ended since something was heard: where nothing is known it does at this rate.
            alive, has = np.exp(-unheard_s / (steps * step_s)), rows[i, HELD]
        there += alive
        held += alive * has
        most = max(most, held + steps * (there + 1.0))
    return s[KV] - most, s[E] * unread, step_s, at


@njit
def _offer(
    rows: Floats,
    count: int,
    s: Floats,
    at: float,
    now: float,
    ask: Floats,
    gap_s: float,
    usual: Floats,
    weight: float,
    table: Floats,
    unheard_s: float,
) -> tuple[float, float, float, float, float]:
    free, unread_s, step_s, at = _room(rows, count, s, at, now, table, unheard_s)
    priced, _, _ = price(rows, count, s, at - now, ask, gap_s, usual, weight)
    return priced, free, unread_s, step_s, at


def warm_up() -> None:
    """What is compiled is loaded, or compiled where no cache has it: a second or so that no request waits."""
    constants, usual = np.ones(CONSTANTS), row(2.0, 0.0, 2.0, 4.0, 0)
    belief = Belief(0.0)
    belief.add("", usual, constants, 0.0)
    belief.age(constants, 1.0)
    belief.room(constants, np.ones((1, BINS)), 2.0)
    belief.offer(usual, constants, np.ones((1, BINS)), usual, 1.0, 1.0, 2.0)
