"""Know how long every answer will be and how every server stands, and take the best for each request.

Greedy: of requests to come it knows no more than how many usual ones do, so it is no optimum; a search in
hindsight found 0.03 % below one like it on equal servers and 1.5 % on mixed ones
(docs/reference/dispatch-study.md). Its price is that of ours (engine/forward.py),

    own end + w * own first token + the same, as it grows for all that are there or usually come in 3 s

from the servers' own tables and the true lengths. Without those to come it is up to 13 % worse in J (mixed
servers at 90 %, 8,000 requests of conv), and up to 0.6 % better (equal ones).
"""

import math
import random
from collections.abc import Sequence

import numpy as np

from bench.dispatch.rules.rule import DispatchRequest, DispatchRule, ServerFleet
from engine.forward import COLUMNS, HELD, LEFT, MADE, PROMPT, UNREAD, Floats, constants, price
from engine.reference import SteppedModelServer

WEIGHT = 10.0


class Snapshot:
    """A server's table as it will be at the end of the step under way, when the next can join."""

    def __init__(self, server: SteppedModelServer) -> None:
        """Follow that server."""
        self._server = server
        self._key: tuple[object, int, int] | None = None
        self._count = 0
        self._rows: Floats = np.zeros((0, COLUMNS))
        self._makes = np.zeros(0, bool)

    def take(self, now: float) -> tuple[Floats, float]:
        """Return (rows, when that is)."""
        server = self._server
        due = server.next_event()
        at = now if due is None else due
        key = (server._stretch, server.waiting, server.running)
        if key != self._key or server._reading or server._cache:
            self._key = key
            self._build()
        elif server._count != self._count:
            # None came or went: those that make tokens have made so many more.
            steps = server._count - self._count
            self._count = server._count
            rows, makes = self._rows, self._makes
            rows[makes, HELD] += steps
            rows[makes, MADE] += steps
            rows[makes, LEFT] -= steps
            if (rows[:, LEFT] < 0.5).any():  # ends with this step
                keep = rows[:, LEFT] > 0.5
                return rows[keep], at
        return self._rows, at

    def _build(self) -> None:
        server = self._server
        self._count = server._count
        under_way = 0 if server.next_event() is None else 1
        reading = {id(job): part for job, part in server._reading} if under_way else {}
        rows: list[tuple[float, ...]] = []
        makes: list[bool] = []
        for job in server._running.values():
            if job.since >= 0:
                more = server._count - job.since + under_way
                made, held, unread = job.made + more, job.held + more, 0
            else:
                unread = job.unread - reading.get(id(job), 0)
                made, held = job.made + (not unread), job.held
            if job.wanted > made:
                rows.append((held - 1, unread, job.wanted - made, held, made))
                makes.append(not unread)
        for job in server._waiting.values():
            prompt = job.prompt + job.made
            cached = min(server.cached_tokens(job.blocks), prompt - 1) if job.blocks else 0
            rows.append((prompt, prompt - cached, job.wanted - job.made, 0, job.made))
            makes.append(False)
        self._rows = np.zeros((len(rows), COLUMNS))
        if rows:
            self._rows[:, [PROMPT, UNREAD, LEFT, HELD, MADE]] = rows
        self._makes = np.array(makes, bool)


class Clairvoyant(DispatchRule):
    """The least price by the truth.

    weight: of a first token; others: of what grows for the others; behind: whether requests to come count.
    """

    weight, others, behind = WEIGHT, 1.0, True

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """See the servers of the fleet."""
        super().__init__(fleet, rng)
        self._snapshots = [Snapshot(server) for server in fleet.live]
        self._constants = [constants(timing) for timing in fleet.timings]
        self._usual = np.zeros(COLUMNS)
        self._usual[[PROMPT, UNREAD, LEFT]] = fleet.mean_prompt, fleet.mean_prompt, fleet.mean_output
        share = fleet.arrivals_s / sum(fleet.requests_s) if self.behind else 0.0
        self._gap_s = [1.0 / (share * rate) if share else math.inf for rate in fleet.requests_s]

    def price(self, request: DispatchRequest, server: int, now: float) -> float:
        """Return the price in seconds."""
        rows, at = self._snapshots[server].take(now)
        ask = np.zeros(COLUMNS)
        cached = 0
        if request.blocks:
            cached = min(self.fleet.live[server].cached_tokens(request.prefix), request.prompt - 1)
        ask[PROMPT], ask[UNREAD], ask[LEFT] = request.prompt, request.prompt - cached, request.output
        total, first_s, end_s = price(
            rows,
            self._constants[server],
            at - now,
            ask,
            self._gap_s[server],
            self._usual,
            self.weight,
        )
        own = end_s + self.weight * first_s
        return own + self.others * (total - own)

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int:
        """Choose the least price."""
        return self.least(among, [self.price(request, server, now) for server in among])


class ClairvoyantWhole(Clairvoyant):
    """Weights 1, 1, 0.5 and no requests to come: the whole latency before the first token."""

    weight, others, behind = 1.0, 0.5, False


class ClairvoyantHere(Clairvoyant):
    """Only requests that are there count."""

    behind = False
