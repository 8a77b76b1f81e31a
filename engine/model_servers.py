"""Many model servers in time, compiled: the rule of engine/reference.py on tables of servers and of requests.

    server row ──► waits: head ──► … ──► tail             request rows, chained by `next` and `previous`
              └──► runs:  first ──► … ──► reads ──► … ──► last
                          make tokens      read their prompts

Requests are read in the order they came, so those that still read are the last of those that run. A request
ends at a count of steps that is known when it makes its first token, so a stretch costs the same with one
request as with hundreds: those that run are gone through only when one ends or is put back.

It is for a simulator, which wants of a request its first token and its end: `play` goes through the changes
of all servers in the order of time and returns when a request has ended. Cached prefixes and events of single
tokens are in engine/reference.py only. A test gives both the same requests and compares every time to the
last digit. A request takes 6 µs, with engine/reference.py's objects 24 (50 servers, 2026-11).

Times are seconds on the caller's clock. Row 0 of either table is empty: 0 ends a chain.
"""

from typing import Any

import numpy as np

from engine.step_time_constants import Timing
from process.compiled import njit

LIMITS = ("kv_tokens", "max_seqs", "step_tokens")

SERVER = np.dtype(
    [
        *((name, "f8") for name in "abcdef"),  # milliseconds, as in engine/step_time_constants.py
        *((name, "i8") for name in LIMITS),
        ("first", "i8"),  # those that run, as admitted
        ("reads", "i8"),
        ("last", "i8"),
        ("head", "i8"),  # those that wait
        ("tail", "i8"),
        ("ended", "i8"),  # those that have ended in the call under way, in that order
        ("ended_last", "i8"),
        ("running", "i8"),
        ("waiting", "i8"),
        ("batch", "i8"),  # so many make tokens
        ("context", "i8"),  # KV tokens that these hold
        ("used", "i8"),  # KV tokens that all hold
        ("count", "i8"),  # steps that made tokens, so far
        ("next_end", "i8"),  # the count at which the first of the batch ends
        ("made_total", "i8"),  # tokens
        ("read_total", "i8"),
        # The stretch under way: its step k, from 1, ends at _end(k); no steps means idle.
        ("begun", "f8"),
        ("first_s", "f8"),
        ("longer_s", "f8"),  # each step takes so much longer than the one before
        ("steps", "i8"),
        ("done", "i8"),
        ("frozen", "i8"),
        ("due", "f8"),  # when the stretch ends; inf when it is idle or frozen
        ("turn", "i8"),  # of servers due at once the one scheduled first goes first; row 0: the last turn
    ]
)

REQUEST = np.dtype(
    [
        ("server", "i8"),  # 0 when it has ended
        *((name, "i8") for name in ("next", "previous", "prompt", "wanted")),
        ("made", "i8"),  # as it was when it began to make tokens
        ("held", "i8"),  # KV tokens then; 0: it waits
        ("unread", "i8"),
        ("part", "i8"),  # of it, in the step under way
        ("since", "i8"),  # the count of steps then
        ("ends", "i8"),  # the count at which it ends
        ("first_at", "f8"),  # its first token
        ("ended_at", "f8"),
    ]
)

NEVER = 2**62
ROWS = 64
"""Rows that a table begins with; its size doubles when it is full."""

Table = Any
"""A numpy array of SERVER or REQUEST rows; numba knows its fields, mypy does not."""


class ModelServers:
    """The simulated model servers of a fleet and their requests, by row number; free rows are used again."""

    def __init__(self) -> None:
        self._servers: Table = np.zeros(ROWS, SERVER)
        self._requests: Table = np.zeros(ROWS, REQUEST)
        self._servers["due"] = np.inf
        self._next_due = np.inf  # nothing changes before; -inf: look at the table
        self._free_servers, self._free = (list(range(ROWS - 1, 0, -1)) for _ in range(2))
        self._look_at_fields()

    def _look_at_fields(self) -> None:
        self._next, self._first_at, self._ended_at = (
            self._requests[name] for name in ("next", "first_at", "ended_at")
        )

    def add(self, timing: Timing) -> int:
        """Add an idle model server with these step-time constants; return its row number."""
        if not self._free_servers:
            old = len(self._servers)
            self._servers = np.concatenate([self._servers, np.zeros(old, SERVER)])
            self._servers["due"][old:] = np.inf
            self._free_servers.extend(range(2 * old - 1, old - 1, -1))
        server = self._free_servers.pop()
        self._servers[server] = np.zeros((), SERVER)
        row = self._servers[server]
        for name in (*"abcdef", *LIMITS):
            row[name] = getattr(timing, name)
        row["due"], row["next_end"] = np.inf, NEVER
        return server

    def remove(self, server: int) -> None:
        """Remove a model server; the caller must then release each request that it had."""
        self._servers[server]["due"] = np.inf
        self._free_servers.append(server)

    def submit(self, server: int, prompt_tokens: int, output_tokens: int, now: float) -> tuple[int, int]:
        """Queue a request on a server; return its row, and the first request that ended there by now or 0.

        Raises ValueError for counts below 1, and a request that is larger than the KV memory.
        """
        if not self._free:
            old = len(self._requests)
            self._requests = np.concatenate([self._requests, np.zeros(old, REQUEST)])
            self._free.extend(range(2 * old - 1, old - 1, -1))
            self._look_at_fields()
        request = self._free[-1]
        ended, due = _submit(
            self._servers, self._requests, server, request, prompt_tokens, output_tokens, now
        )
        if ended < 0:
            raise ValueError(
                f"{prompt_tokens} + {output_tokens} tokens: wanted counts of 1 or more that fit the KV memory"
            )
        self._free.pop()
        if due < self._next_due:
            self._next_due = due
        return request, ended

    def cancel(self, request: int, server: int, now: float) -> None:
        """Remove a request and free its row; requests that ended on that server by now are not returned."""
        _cancel(self._servers, self._requests, server, request, now)
        self._next_due = -np.inf
        self._free.append(request)

    def release(self, request: int) -> None:
        """Free the row of a request that has ended, or whose server was removed."""
        self._free.append(request)

    def after(self, ended: int) -> tuple[float, float, int]:
        """Return an ended request's times of first token and end, and the next one that ended, or 0."""
        return self._first_at.item(ended), self._ended_at.item(ended), self._next.item(ended)

    def play(self, until_s: float, every_change: bool) -> tuple[int, float, int]:
        """Let all servers run until a request ends; return (server, time, row of the first that ended).

        every_change: return also when a request got its first token or was admitted. Rows count from 1: the
        third is 0 where no request has ended, and (0, until_s, 0) says that nothing happened before until_s.
        """
        if self._next_due >= until_s:  # a third of all calls, that need not ask the table
            return 0, until_s, 0
        server, at, ended, self._next_due = _play(self._servers, self._requests, until_s, every_change)
        return server, at, ended

    def look(self, server: int, now: float) -> tuple[int, int, int, int, int]:
        """Return a server's (first request ended by now, running, waiting, tokens read, tokens made)."""
        return _look(self._servers, self._requests, server, now)

    def freeze(self, server: int, frozen: bool) -> None:
        """Hold back a server's events while it is frozen; later they come with the times they had."""
        self._servers[server]["frozen"] = frozen
        _schedule(self._servers, server)
        self._next_due = -np.inf

    def kv_tokens_used(self, server: int) -> int:
        """Return how many tokens of KV memory a server used at its last event or `look`."""
        return int(self._servers[server]["used"])

    def made_tokens(self, server: int) -> int:
        """Return how many tokens a server has made up to its last event or `look`."""
        return int(self._servers[server]["made_total"])


# -- what is asked -----------------------------------------------------------------------------------------


@njit
def _play(
    servers: Table, requests: Table, until_s: float, every_change: bool
) -> tuple[int, float, int, float]:
    """Do the compiled part of `ModelServers.play`; return also a time before which nothing changes."""
    while True:
        first, at = 0, np.inf
        for i in range(1, len(servers)):
            due = servers[i].due
            if due < at or (due == at and first and servers[i].turn < servers[first].turn):
                first, at = i, due
        if at >= until_s:
            return 0, until_s, 0, at
        s = servers[first]
        s.due = np.inf
        s.ended = 0
        _catch_up(s, requests, at)
        _schedule(servers, first)
        if s.ended or every_change:
            return first, at, s.ended, at


@njit
def _submit(
    servers: Table, requests: Table, server: int, request: int, prompt: int, wanted: int, now: float
) -> tuple[int, float]:
    """Queue a request; return (first that ended, -1 if the new one does not fit; time of the next change)."""
    s, r = servers[server], requests[request]
    if prompt < 1 or wanted < 1 or prompt + wanted > s.kv_tokens:
        return -1, s.due
    s.ended = 0
    _catch_up(s, requests, now)
    r.server, r.prompt, r.wanted = server, prompt, wanted
    r.made = r.held = r.unread = r.part = r.next = 0
    r.previous = s.tail
    if s.tail:
        requests[s.tail].next = request
    else:
        s.head = request
    s.tail = request
    s.waiting += 1
    _replan(s, requests, now)
    _schedule(servers, server)
    return s.ended, s.due


@njit
def _cancel(servers: Table, requests: Table, server: int, request: int, now: float) -> None:
    s, r = servers[server], requests[request]
    s.ended = 0
    _catch_up(s, requests, now)
    if r.server:
        if r.held:
            _leaves(s, requests, request)
            s.next_end = _first_end(s, requests)
        else:
            _unqueue(s, requests, request)
        r.server = 0
        _replan(s, requests, now)
    _schedule(servers, server)


@njit
def _look(servers: Table, requests: Table, server: int, now: float) -> tuple[int, int, int, int, int]:
    s = servers[server]
    s.ended = 0
    _catch_up(s, requests, now)
    _schedule(servers, server)
    return s.ended, s.running, s.waiting, s.read_total, s.made_total


@njit
def _schedule(servers: Table, server: int) -> None:
    """Set the time at which the state of a server changes next, infinite for an idle or frozen server."""
    s = servers[server]
    due = _end(s, s.steps) if s.steps and not s.frozen else np.inf
    if due != s.due:
        s.due = due
        servers[0].turn += 1
        s.turn = servers[0].turn


# -- steps -------------------------------------------------------------------------------------------------


@njit
def _end(s: Table, steps: int) -> float:
    """Return when a server's step ends, counted from its last change so that no rounding adds up."""
    return s.begun + steps * s.first_s + s.longer_s * (steps * (steps - 1) // 2)  # type: ignore[no-any-return]


@njit
def _catch_up(s: Table, requests: Table, now: float) -> None:
    while s.steps:
        ends = _end(s, s.steps)
        if ends > now:
            break
        _complete(s, requests, s.steps - s.done, ends)
        _plan(s, requests, ends)
    if s.done + 1 < s.steps and _end(s, s.done + 1) <= now:
        low, high = s.done + 1, s.steps  # the last step that has ended is one of low..high-1
        while high - low > 1:
            middle = (low + high) // 2
            if _end(s, middle) <= now:
                low = middle
            else:
                high = middle
        _complete(s, requests, low - s.done, _end(s, low))


@njit
def _replan(s: Table, requests: Table, now: float) -> None:
    """Plan a server's steps anew after a request came or went; the step under way stays as it was planned."""
    if s.running and s.steps:
        s.steps = s.done + 1
    else:
        _plan(s, requests, now)


@njit
def _complete(s: Table, requests: Table, steps: int, at: float) -> None:
    s.done += steps
    if s.batch:
        s.count += steps
        made = steps * s.batch
        s.used += made
        s.context += made
        s.made_total += made
        if s.count >= s.next_end:
            i = s.first
            while i != s.reads:
                following = requests[i].next
                if requests[i].ends <= s.count:
                    _finish(s, requests, i, at)
                i = following
            s.next_end = _first_end(s, requests)
    i = s.reads
    while i and requests[i].part:
        r = requests[i]
        following = r.next
        r.unread -= r.part
        r.part = 0
        if not r.unread:
            if not r.made:
                s.read_total += r.prompt
                r.first_at = at
            r.made += 1
            s.made_total += 1
            if r.made == r.wanted:
                _finish(s, requests, i, at)
            else:
                s.reads = following
                s.batch += 1
                s.context += r.held
                r.since = s.count
                r.ends = s.count + r.wanted - r.made
                s.next_end = min(s.next_end, r.ends)
        i = following


@njit
def _first_end(s: Table, requests: Table) -> int:
    """Return the count of steps at which the first of the requests that make tokens on this server ends."""
    ends = NEVER
    i = s.first
    while i != s.reads:
        ends = min(ends, requests[i].ends)
        i = requests[i].next
    return ends


@njit
def _finish(s: Table, requests: Table, request: int, at: float) -> None:
    _leaves(s, requests, request)
    r = requests[request]
    r.ended_at = at
    r.server = r.next = 0
    if s.ended:
        requests[s.ended_last].next = request
    else:
        s.ended = request
    s.ended_last = request


@njit
def _leaves(s: Table, requests: Table, request: int) -> None:
    """Take a request off its server's running ones and free its KV memory; the caller updates next_end."""
    r = requests[request]
    if not r.unread and r.made < r.wanted:  # it makes tokens: its last one is not read
        more = s.count - r.since
        r.made += more
        r.held += more
        s.batch -= 1
        s.context -= r.held
    if s.reads == request:
        s.reads = r.next
    s.used -= r.held
    if r.previous:
        requests[r.previous].next = r.next
    else:
        s.first = r.next
    if r.next:
        requests[r.next].previous = r.previous
    else:
        s.last = r.previous
    s.running -= 1


@njit
def _unqueue(s: Table, requests: Table, request: int) -> None:
    """Remove a request from the queue of its server."""
    r = requests[request]
    if r.previous:
        requests[r.previous].next = r.next
    else:
        s.head = r.next
    if r.next:
        requests[r.next].previous = r.previous
    else:
        s.tail = r.previous
    s.waiting -= 1


@njit
def _plan(s: Table, requests: Table, at: float) -> None:
    """Plan a server's next steps, up to a change: preempt, read on, admit, and compute their length."""
    preempted = False
    while s.used + s.batch > s.kv_tokens:
        _preempt(s, requests)
        preempted = True
    budget = s.step_tokens - s.batch
    tokens = squares = 0
    i = s.reads
    while i and budget:
        r = requests[i]
        r.part = min(r.unread, budget)
        read = r.held - 1 - r.unread
        tokens += r.part
        squares += (read + r.part) ** 2 - read**2
        budget -= r.part
        i = r.next
    while s.head and budget and s.running < s.max_seqs and not preempted:
        i = s.head
        r = requests[i]
        need = r.prompt + r.made + 1  # what it has, and room for the token that reading it gives
        if s.used + s.batch + need > s.kv_tokens:
            break
        _admit(s, requests, i, need)
        r.part = min(r.unread, budget)
        tokens += r.part
        squares += r.part**2
        budget -= r.part
    _measure(s, at, tokens, squares)


@njit
def _preempt(s: Table, requests: Table) -> None:
    i = s.last
    r = requests[i]
    _leaves(s, requests, i)
    s.next_end = _first_end(s, requests)
    r.held = r.unread = r.part = r.previous = 0
    r.next = s.head
    if s.head:
        requests[s.head].previous = i
    else:
        s.tail = i
    s.head = i
    s.waiting += 1


@njit
def _admit(s: Table, requests: Table, request: int, need: int) -> None:
    _unqueue(s, requests, request)
    r = requests[request]
    r.held, r.unread = need, need - 1
    r.next, r.previous = 0, s.last
    if s.last:
        requests[s.last].next = request
    else:
        s.first = request
    s.last = request
    if not s.reads:
        s.reads = request
    s.running += 1
    s.used += need


@njit
def _measure(s: Table, at: float, tokens: int, squares: int) -> None:
    """Set how many steps a server makes up to its next change and how long; the first reads `tokens`."""
    s.begun, s.done, s.longer_s = at, 0, 0.0
    if not s.batch and not tokens:
        s.steps = 0
        return
    bound_ms = s.e * (s.batch + tokens) / 1e3
    if tokens:
        floor = max(s.a if s.batch else 0.0, s.d)
        linear_ms = floor + s.b * s.batch + s.c * s.context / 1e3 + s.e * tokens / 1e3 + s.f * squares / 1e6
        s.first_s, s.steps = max(linear_ms, bound_ms) / 1e3, 1
        return
    linear_ms = s.a + s.b * s.batch + s.c * s.context / 1e3
    step_ms = max(linear_ms, bound_ms)
    s.first_s = step_ms / 1e3
    s.steps = min(s.next_end - s.count, (s.kv_tokens - s.used) // s.batch)
    longer_ms = s.c * s.batch / 1e3
    if linear_ms < step_ms:
        # Bound by computation: of equal length until the growing context takes longer than that.
        if longer_ms > 0.0:
            s.steps = min(s.steps, 1 + int((step_ms - linear_ms) / longer_ms))
    else:
        s.longer_s = longer_ms / 1e3
