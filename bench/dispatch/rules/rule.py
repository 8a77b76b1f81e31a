"""What a rule is told, and what it answers."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.reference import SteppedModelServer
from engine.step_time_constants import Timing

BLOCK_TOKENS = 512
"""Tokens behind one id of a prefix: that of Mooncake's hash_ids."""


class DispatchRequest:
    """One request on its way. blocks: of its prompt and then its answer, for the servers' prefix caches."""

    __slots__ = (
        "at",
        "blocks",
        "ended_at",
        "first_at",
        "given_at",
        "max_tokens",
        "number",
        "output",
        "prompt",
        "router",
        "server",
    )

    def __init__(
        self,
        number: int,
        at: float,
        prompt: int,
        output: int,
        blocks: Sequence[Hashable] = (),
        max_tokens: int | None = None,
    ) -> None:
        self.number = number
        self.at = at
        self.prompt = prompt
        self.output = output
        self.blocks = blocks
        self.max_tokens = max_tokens or output
        self.router = 0
        self.server = -1
        self.given_at = at
        self.first_at = -1.0
        self.ended_at = -1.0

    def come_to(self, router: int) -> int:
        """Note the loadbalancer that it comes to, and return it."""
        self.router = router
        return router

    def give(self, server: int, now: float) -> None:
        """Note the server that it is given."""
        self.server, self.given_at = server, now

    def make_token(self, at: float) -> bool:
        """Note a token; return whether it is the first."""
        if self.first_at >= 0.0:
            return False
        self.first_at = at
        return True

    def end(self, at: float) -> None:
        """Note its end, which may be its first token, too."""
        self.ended_at = at
        self.make_token(at)

    @property
    def prefix(self) -> Sequence[Hashable]:
        """The blocks that lie within its prompt."""
        return self.blocks[: self.prompt // BLOCK_TOKENS]


class ServerReport(NamedTuple):
    """How a server stands. waiting_tokens: of the prompts in its queue; totals are counters."""

    at: float
    running: int
    waiting: int
    kv_use: float
    waiting_tokens: int
    read_total: int
    made_total: int


@dataclass(frozen=True)
class ServerFleet:
    """The servers. requests_s, tokens_s: what each serves, and makes, when it is saturated with this trace.

    arrivals_s: requests a second in all. live: the servers themselves, for rules that may know their state
    (the clairvoyant, and events of KV caches).
    """

    timings: Sequence[Timing]
    requests_s: Sequence[float]
    tokens_s: Sequence[float]
    mean_prompt: float = 1000.0
    mean_output: float = 200.0
    arrivals_s: float = 0.0
    live: list[SteppedModelServer] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.timings)


class DispatchRule:
    """Chooses a server. This one counts what it has under way; that is what most rules know.

    A subclass may hold a request by answering None: it is asked again whenever something has changed.
    """

    def __init__(self, fleet: ServerFleet, rng: random.Random) -> None:
        """Begin with nothing under way. rng: for ties and chances."""
        self.fleet = fleet
        self.rng = rng
        self.in_flight = [0] * len(fleet)

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> int | None:
        """Return the server it goes to, one of `among`, or None to hold it."""
        raise NotImplementedError

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:  # noqa: ARG002 told to all rules
        """Note that it has been given to that server."""
        self.in_flight[server] += 1

    def first_token(self, request: DispatchRequest, server: int, now: float) -> None:
        """Note that one of its own requests has its first token."""

    def ended(self, request: DispatchRequest, server: int, now: float) -> None:  # noqa: ARG002 told to all rules
        """Note that one of its own requests has its answer."""
        self.in_flight[server] -= 1

    def report(self, server: int, report: ServerReport) -> None:
        """Take in a server's report."""

    def least(self, among: Sequence[int], scores: Sequence[float]) -> int:
        """Return the server with the least score; chance among equals. scores: one for each of `among`."""
        best = min(scores)
        equal = [server for server, score in zip(among, scores, strict=True) if score == best]
        return equal[0] if len(equal) == 1 else self.rng.choice(equal)


class Index:
    """Which blocks each server has been sent: what a router without events believes to be cached."""

    def __init__(self, servers: int) -> None:
        """Begin with nothing sent."""
        self._all = (1 << servers) - 1
        self._servers = servers
        self._holders: dict[Hashable, int] = {}

    def matched(self, prefix: Sequence[Hashable]) -> list[int]:
        """Return, by server, how many of these blocks it has, from the first on."""
        found = [len(prefix)] * self._servers
        have = self._all
        for n, block in enumerate(prefix):
            still = have & self._holders.get(block, 0)
            if still != have:
                gone = have ^ still
                while gone:
                    lowest = gone & -gone
                    found[lowest.bit_length() - 1] = n
                    gone ^= lowest
                have = still
                if not have:
                    break
        return found

    def sent(self, prefix: Sequence[Hashable], server: int) -> None:
        """Note that the server gets a prompt with these."""
        bit = 1 << server
        for block in prefix:
            self._holders[block] = self._holders.get(block, 0) | bit
