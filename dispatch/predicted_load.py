"""What goes on inside the instances as far as it can be predicted, and what one more request would do there.

A request that is given to an instance has a row in its table (engine/forward.py) from then on. The rows are
moved along by the engine's own rule, with the instance's own constants, whenever they are looked at; a report
removes the requests that have ended. So the prediction is as new as the last request, however old the last
report is, and it counts what was given since: without that the first token came 2.6 times later in the study
(dispatch-study 2).

A table is always as it will be at the end of the step under way, because no request can join before.

The tables of all instances are blocks of one array, so that a choice among many is one compiled call:

    rows     [ ..block of a.. | ..block of b.. | free | ..block of c.. ]      a block doubles when it is full
    servers  one row an instance: its constants, the time that its rows are of, where its block is

Times are epoch seconds, lengths tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dispatch.output_lengths import OutputLengths, expect
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
"""Rows of a new block."""

AT, REPORTED_AT, START, COUNT, RATE, WIDTH = (CONSTANT_COLUMNS + i for i in range(6))
"""Columns of `servers` behind the constants: the time that its rows are of, and until when its ends are known
(epoch seconds); where its block begins, and the rows in use there; work a second, by which it has its share
of the requests to come."""


def request_row(prompt_tokens: float, left: float, most: float, kind: int) -> Floats:
    """Return the table row of a request that has not begun: all of its prompt is still to be read.

    left: expected tokens of the answer; most: the most it may have; kind: see dispatch/output_lengths.py.
    """
    out = np.zeros(COLUMNS)
    out[PROMPT] = out[UNREAD] = max(1.0, prompt_tokens)
    out[LEFT], out[MOST], out[KIND] = left, most, kind
    return out


class LoadTable:
    """The predicted requests of all instances, in one array of rows; each instance has a place in it."""

    def __init__(self) -> None:
        """Start an empty table, without instances."""
        self.rows = np.zeros((64 * ROWS, COLUMNS))
        self.servers = np.zeros((64, WIDTH))
        self._places = 0  # places that have ever been in use
        self._end = 0  # rows from here on have never been in use
        self._free: list[int] = []  # places
        self._blocks: dict[int, list[int]] = {}  # length -> free blocks of it

    def open(self, now: float) -> int:
        """Reserve a place for an instance without requests; return the number of the place."""
        if self._free:
            place = self._free.pop()
        else:
            place = self._places
            self._places += 1
            if place == len(self.servers):
                self.servers = np.concatenate([self.servers, np.zeros_like(self.servers)])
        server = self.servers[place]
        server[AT] = server[REPORTED_AT] = now
        server[START], server[COUNT] = self.block(ROWS), 0.0
        return place

    def close(self, place: int, length: int) -> None:
        """Free the place of an instance that is gone, and its block of `length` rows."""
        self._free.append(place)
        self._blocks.setdefault(length, []).append(int(self.servers[place, START]))

    def widen(self, place: int, length: int) -> None:
        """Double the block of rows of a place; length: its rows now, all in use."""
        old, new = int(self.servers[place, START]), self.block(2 * length)
        self.rows[new : new + length] = self.rows[old : old + length]
        self.servers[place, START] = new
        self._blocks.setdefault(length, []).append(old)

    def block(self, length: int) -> int:
        """Reserve a block of `length` rows; return the index of its first row."""
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
        """Return the index in `places` of the instance where a request's price is least (engine/forward.py).

        request: its row. cached: prompt tokens that each instance need not read; None: none. usual: the row
        of a request to come. arrivals: requests a second to expect for each work a second that an instance
        does. table: expected lengths (dispatch/output_lengths.py). weight: seconds of whole latency that a
        second of first token is worth. most: requests to run forward in all; with more of them only the first
        places are looked at, and two at least. Give likely places first: those behind are often dismissed at
        half the cost.
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


class PredictedLoad:
    """The predicted requests of one instance, in the order in which the instance was given them."""

    def __init__(self, table: LoadTable, constants: Floats, rate: float, now: float) -> None:
        """Start without requests. constants: of the steps (engine/forward.py). rate: work a second."""
        self.ids: list[str] = []
        self._table = table
        self._length = ROWS
        self.place = table.open(now)
        self.set_step_times(constants)
        self.set_work_rate(rate)

    def close(self) -> None:
        """Free the instance's place in the table, because it is gone. Call it once, and nothing after it."""
        self._table.close(self.place, self._length)

    def set_step_times(self, constants: Floats) -> None:
        """Set the instance's step-time constants (engine/forward.py)."""
        self._table.servers[self.place, :CONSTANT_COLUMNS] = constants

    def set_work_rate(self, rate: float) -> None:
        """Set the work that the instance does in a second."""
        self._table.servers[self.place, RATE] = rate

    def mark_reported(self, now: float) -> None:
        """Note that the instance has reported all ends of requests until now."""
        self._table.servers[self.place, REPORTED_AT] = now

    def add(self, request_id: str, request: Floats, now: float) -> None:
        """Add a request to those of the instance. request: its row (see `request_row`)."""
        if len(self.ids) == self._length:
            self._table.widen(self.place, self._length)
            self._length *= 2
        _add(self._table.rows, self._table.servers, self.place, request, now)
        self.ids.append(request_id)

    def remove(self, request_id: str, now: float) -> None:
        """Remove a request that has ended or will not come from those of the instance, if it is there."""
        try:
            i = self.ids.index(request_id)
        except ValueError:
            return
        _remove(self._table.rows, self._table.servers, self.place, i, now)
        del self.ids[i]

    def clear(self, now: float) -> None:
        """Remove all requests of the instance, because it has rebooted."""
        self.ids.clear()
        server = self._table.servers[self.place]
        server[COUNT], server[AT] = 0.0, now

    def age(self, now: float) -> None:
        """Move the prediction of all requests of the instance along to now."""
        _age(self._table.rows, self._table.servers, self.place, now)

    def room(self, table: Floats, share: float, now: float) -> tuple[float, float, float]:
        """Return what a request that came now would find: (free KV tokens, seconds to read, step seconds).

        Free is what the requests never need together of this share of the memory; negative when as many run
        as may. The seconds to read are those of the prompts before it. table: expected lengths
        (dispatch/output_lengths.py).
        """
        return _room(self._table.rows, self._table.servers, self.place, table, share, now)

    def in_memory(self, now: float) -> tuple[float, float]:
        """Return (requests whose prompt is being read, KV tokens in use) of the instance."""
        return _in_memory(self._table.rows, self._table.servers, self.place, now)

    @property
    def at(self) -> float:
        """The time that the rows predict: the end of the step that is under way, in epoch seconds."""
        return float(self._table.servers[self.place, AT])

    @property
    def rows(self) -> Floats:
        """The table rows of the instance's requests, one a request, as an array that shares memory."""
        start = int(self._table.servers[self.place, START])
        return self._table.rows[start : start + len(self.ids)]


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
def _in_memory(rows: Floats, servers: Floats, place: int, now: float) -> tuple[float, float]:
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
    unreported_s = now - s[REPORTED_AT]
    # They need most together when one of them ends: the others have grown until then.
    most = alive = held = 0.0
    for i in np.argsort(-there[:, LEFT]):
        steps, share, has = there[i, LEFT], 1.0, there[i, PROMPT] + 1.0
        if there[i, HELD] > 0.0:
            # It may have ended since the last report: where nothing is known it does at this rate.
            share, has = np.exp(-unreported_s / (steps * step_s)), there[i, HELD]
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
    """Load or compile the compiled functions: about a second, for which no request has to wait later."""
    learned = OutputLengths(2.0)
    learned.ended(2, 0)
    table, usual, lengths = LoadTable(), request_row(2.0, learned.mean(0), 4.0, 0), learned.table
    load = PredictedLoad(table, np.ones(CONSTANT_COLUMNS), 1.0, 0.0)
    load.add("", usual, 0.0)
    load.age(1.0)
    load.in_memory(1.0)
    load.room(lengths, 1.0, 2.0)
    table.best([load.place], usual, None, usual, 1.0, lengths, 1.0, 2, 2.0)
    load.remove("", 3.0)
