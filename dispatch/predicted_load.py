"""What the loadbalancer believes to go on inside the instances, and what a request would do there.

A request that is given to an instance stands in a table (engine/forward.py) from then on and is moved along
by the engine's own rule, with the instance's own constants, whenever somebody asks; a report takes out what
has ended. So the belief is as new as the last request, however old the report, and what was given since
counts: without that the first token came 2.6 times later in the study (dispatch-study.md).

A table is always as it will be at the end of the step under way, because nobody can join before.

The tables of all instances are blocks of one, so that a choice among many is one compiled call:

    rows     [ ..block of a.. | ..block of b.. | free | ..block of c.. ]      a block doubles when it is full
    servers  a row an instance: its constants, as of when, where its block is

Times are epoch seconds, lengths tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dispatch.output_lengths import Lengths, expect
from engine.forward import (
    COL_BASE_S,
    COL_CONTEXT_S,
    COL_KV_TOKENS,
    COL_MAX_SEQS,
    COL_PROMPT_S,
    COL_REQUEST_S,
    COLUMNS,
    CONSTANT_COLUMNS,
    HELD,
    KIND,
    LEFT,
    MOST,
    PROMPT,
    UNREAD,
    Floats,
    behind,
    price_below,
    run,
    scratch_for,
)
from process.compiled import njit

Ints = NDArray[np.int64]

ROWS = 16
"""Rows that a block begins with."""

AT, HEARD_AT, START, COUNT, RATE, WIDTH = (CONSTANT_COLUMNS + i for i in range(6))
"""A row of `servers`, behind its constants: as of when its table is and until when its ends are known, epoch
seconds; its block and the rows in use there; work a second, by which it has its share of what comes."""


def row(prompt_tokens: float, left: float, most: float, kind: int) -> Floats:
    """A request that has not begun, all of whose prompt is to be read."""
    out = np.zeros(COLUMNS)
    out[PROMPT] = out[UNREAD] = max(1.0, prompt_tokens)
    out[LEFT], out[MOST], out[KIND] = left, most, kind
    return out


class Beliefs:
    """Of all instances, each of which has a place here."""

    def __init__(self) -> None:
        """Of none."""
        self.rows = np.zeros((64 * ROWS, COLUMNS))
        self.servers = np.zeros((64, WIDTH))
        self._places = 0  # so many have been in use
        self._end = 0  # rows behind this have never been in use
        self._left: list[int] = []  # places that are free
        self._blocks: dict[int, list[int]] = {}  # length -> free blocks of it

    def open(self, now: float) -> int:
        """A place for an instance where nothing goes on."""
        if self._left:
            place = self._left.pop()
        else:
            place = self._places
            self._places += 1
            if place == len(self.servers):
                self.servers = np.concatenate([self.servers, np.zeros_like(self.servers)])
        server = self.servers[place]
        server[AT] = server[HEARD_AT] = now
        server[START], server[COUNT] = self.block(ROWS), 0.0
        return place

    def close(self, place: int, length: int) -> None:
        """It is free again, with its block of so many rows."""
        self._left.append(place)
        self._blocks.setdefault(length, []).append(int(self.servers[place, START]))

    def widen(self, place: int, length: int) -> None:
        """Its block was full with so many rows: now there is room for as many more."""
        old, new = int(self.servers[place, START]), self.block(2 * length)
        self.rows[new : new + length] = self.rows[old : old + length]
        self.servers[place, START] = new
        self._blocks.setdefault(length, []).append(old)

    def block(self, length: int) -> int:
        """Where a free block of so many rows begins; it is taken."""
        if free := self._blocks.get(length):
            return free.pop()
        start, self._end = self._end, self._end + length
        if self._end > len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros((max(len(self.rows), length), COLUMNS))])
        return start

    def best(
        self,
        places: Sequence[int],
        request: Floats,
        cached: Sequence[float] | None,
        usual: Floats,
        arrivals: float,
        table: Floats,
        weight: float,
        most: int,
        now: float,
    ) -> int:
        """Which of these instances, by its number among them, has the least price (engine/forward.py).

        cached: tokens of the prompt that each need not read; None: none. arrivals: requests that come for
        each work a second that an instance does, each like usual, a second. table: expected lengths
        (dispatch/output_lengths.py). weight: of a first token. most: requests that are run forward in all;
        if there are more only the first instances are looked at, and two at least. An instance that stands
        earlier is the better guess: those behind are often dismissed at half the cost.
        """
        return _best(
            self.rows,
            self.servers,
            np.array(places),
            request,
            np.zeros(len(places)) if cached is None else np.array(cached, float),
            usual,
            arrivals,
            table,
            weight,
            most,
            now,
        )


class Belief:
    """The requests of one instance, in the order in which it was given them."""

    def __init__(self, beliefs: Beliefs, constants: Floats, rate: float, now: float) -> None:
        """Nothing goes on there. constants: of its steps (engine/forward.py). rate: work a second."""
        self.ids: list[str] = []
        self._beliefs = beliefs
        self._length = ROWS
        self.place = beliefs.open(now)
        self.follow(constants)
        self.does(rate)

    def close(self) -> None:
        """The instance is gone. To be called once, and nothing after it."""
        self._beliefs.close(self.place, self._length)

    def __len__(self) -> int:
        """Requests there."""
        return len(self.ids)

    def __contains__(self, request_id: str) -> bool:
        """Whether it is there."""
        return request_id in self.ids

    def follow(self, constants: Floats) -> None:
        """How long its steps take is known better."""
        self._beliefs.servers[self.place, :CONSTANT_COLUMNS] = constants

    def does(self, rate: float) -> None:
        """How much work a second it does is known better."""
        self._beliefs.servers[self.place, RATE] = rate

    def heard(self, now: float) -> None:
        """All that has ended until now is known."""
        self._beliefs.servers[self.place, HEARD_AT] = now

    def add(self, request_id: str, request: Floats, now: float) -> None:
        """It was given this request (see `row`)."""
        if len(self.ids) == self._length:
            self._beliefs.widen(self.place, self._length)
            self._length *= 2
        _add(self._beliefs.rows, self._beliefs.servers, self.place, request, now)
        self.ids.append(request_id)

    def remove(self, request_id: str, now: float) -> None:
        """That one has ended, or will not come."""
        try:
            i = self.ids.index(request_id)
        except ValueError:
            return
        _remove(self._beliefs.rows, self._beliefs.servers, self.place, i, now)
        del self.ids[i]

    def clear(self, now: float) -> None:
        """It has rebooted: nothing goes on there."""
        self.ids.clear()
        server = self._beliefs.servers[self.place]
        server[COUNT], server[AT] = 0.0, now

    def age(self, now: float) -> None:
        """Time has passed."""
        _age(self._beliefs.rows, self._beliefs.servers, self.place, now)

    def room(self, table: Floats, share: float, now: float) -> tuple[float, float, float]:
        """(KV tokens free, seconds of reading before it, of a step) for a request that came now.

        Free is what those who are there never need together of this share of the memory; less than nothing
        where as many run as may. table: expected lengths (dispatch/output_lengths.py).
        """
        return _room(self._beliefs.rows, self._beliefs.servers, self.place, table, share, now)

    def at_work(self, now: float) -> tuple[float, float]:
        """(requests whose prompt is being read, KV tokens in use)."""
        return _at_work(self._beliefs.rows, self._beliefs.servers, self.place, now)

    @property
    def at(self) -> float:
        """As of when it is, at the end of a step."""
        return float(self._beliefs.servers[self.place, AT])

    @property
    def rows(self) -> Floats:
        """Its table."""
        start = int(self._beliefs.servers[self.place, START])
        return self._beliefs.rows[start : start + len(self.ids)]


@njit
def _table(rows: Floats, server: Floats) -> Floats:
    start = int(server[START])
    return rows[start : start + int(server[COUNT])]


@njit
def _age(rows: Floats, servers: Floats, place: int, now: float) -> None:
    server = servers[place]
    if now > server[AT]:
        table = _table(rows, server)
        if len(table):
            scratch, from_s = scratch_for(len(table)), server[AT] - now
            scratch.come[:] = from_s
            took = run(table, scratch.come, server, from_s, 0.0, scratch.first, scratch.end, scratch)
            # Everything there may wait for ever: then nothing is under way.
            server[AT] = now + max(took, 0.0)
        else:
            server[AT] = now


@njit
def _add(rows: Floats, servers: Floats, place: int, request: Floats, now: float) -> None:
    _age(rows, servers, place, now)
    server = servers[place]
    rows[int(server[START] + server[COUNT])] = request
    server[COUNT] += 1.0


@njit
def _remove(rows: Floats, servers: Floats, place: int, i: int, now: float) -> None:
    _age(rows, servers, place, now)
    server = servers[place]
    table = _table(rows, server)
    for j in range(i + 1, len(table)):
        table[j - 1] = table[j]
    server[COUNT] -= 1.0


@njit
def _at_work(rows: Floats, servers: Floats, place: int, now: float) -> tuple[float, float]:
    _age(rows, servers, place, now)
    there = _table(rows, servers[place])
    reading = context = 0.0
    for i in range(len(there)):
        context += there[i, HELD]
        if there[i, HELD] > 0.0 and there[i, UNREAD] > 0.0:
            reading += 1.0
    return reading, context


@njit
def _room(
    rows: Floats, servers: Floats, place: int, table: Floats, of_memory: float, now: float
) -> tuple[float, float, float]:
    _age(rows, servers, place, now)
    s = servers[place]
    there = _table(rows, s)
    count = len(there)
    expect(there, table)
    unread, context = 0.0, 0.0
    for i in range(count):
        context += there[i, HELD]
        unread += there[i, UNREAD]
    step_s = s[COL_BASE_S] + s[COL_REQUEST_S] * count + s[COL_CONTEXT_S] * context
    unheard_s = now - s[HEARD_AT]
    # What they need together is most when one of them ends: the others have grown until then.
    most = alive = held = 0.0
    for i in np.argsort(-there[:, LEFT]):
        steps, share, has = there[i, LEFT], 1.0, there[i, PROMPT] + 1.0
        if there[i, HELD] > 0.0:
            # It may have ended since something was heard: where nothing is known it does at this rate.
            share, has = np.exp(-unheard_s / (steps * step_s)), there[i, HELD]
        alive += share
        held += share * has
        most = max(most, held + steps * (alive + 1.0))
    free = of_memory * s[COL_KV_TOKENS] - most if count < s[COL_MAX_SEQS] else -1.0
    return free, s[COL_PROMPT_S] * unread, step_s


@njit
def _best(
    rows: Floats,
    servers: Floats,
    places: Ints,
    request: Floats,
    cached: Floats,
    usual: Floats,
    arrivals: float,
    lengths: Floats,
    weight: float,
    most: int,
    now: float,
) -> int:
    longest = wide = 0
    for place in places:
        count, gap_s = int(servers[place, COUNT]), 1.0 / (arrivals * servers[place, RATE])
        longest = max(longest, count)
        wide = max(wide, count + 1 + behind(gap_s))
    looked_at = min(len(places), max(2, most // max(longest, 1)))
    scratch, ask = scratch_for(wide), request.copy()
    best, best_s = 0, np.inf
    for n in range(looked_at):
        _age(rows, servers, places[n], now)
        s = servers[places[n]]
        there = _table(rows, s)
        expect(there, lengths)
        ask[UNREAD] = max(1.0, request[UNREAD] - cached[n])
        gap_s = 1.0 / (arrivals * s[RATE])
        offered_s, _, _ = price_below(there, s, s[AT] - now, ask, gap_s, usual, weight, best_s, scratch)
        if offered_s < best_s:
            best, best_s = n, offered_s
    return best


def warm_up() -> None:
    """What is compiled is loaded, or compiled where no cache has it: a second or so that no request waits."""
    learned = Lengths(2.0)
    learned.ended(2, 0)
    beliefs, usual, lengths = Beliefs(), row(2.0, learned.mean(0), 4.0, 0), learned.table
    belief = Belief(beliefs, np.ones(CONSTANT_COLUMNS), 1.0, 0.0)
    belief.add("", usual, 0.0)
    belief.age(1.0)
    belief.at_work(1.0)
    belief.room(lengths, 1.0, 2.0)
    beliefs.best([belief.place], usual, None, usual, 1.0, lengths, 1.0, 2, 2.0)
    belief.remove("", 3.0)
