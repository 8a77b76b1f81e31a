"""What a client asks for and what becomes of it: leases, a place in the queue, or a refusal."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dispatch.lease import Lease


@dataclass(slots=True)
class RouteRequest:
    """A request for a lease.

    work: in output-token equivalents. max_tokens: the limit of its answer, if known. avoid: ids of instances
    that must not serve it. prompt_tokens: part of the work; 0 where only the work was told. affinity: the
    client's salted hashes of the prompt's prefixes (dispatch/prefix_cache.py). priority: 0 is served first,
    2 last. client: whose allowance it counts against (dispatch/allowance.py).
    """

    work: float
    max_tokens: int | None = None
    avoid: Collection[int] = ()
    prompt_tokens: int = 0
    affinity: Sequence[str] = ()
    priority: int = 1
    client: str = ""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that waits.

    count: leases that it asked for, None for one. until: when its place is lost; since: when it came.
    give_by: when it is late. takes_s: of the whole fleet. over: it was granted or
    cancelled, or its time is up.
    """

    ask: RouteRequest
    count: int | None
    until: float
    since: float
    give_by: float
    takes_s: float = 0.0
    late: bool = False
    overdue: bool = False
    over: bool = False

    def turn_late(self) -> None:
        """Note that it cannot be in time any more."""
        self.late = True

    def turn_overdue(self) -> None:
        """Note that it has been late for as long as it may."""
        self.overdue = True

    def leave(self) -> None:
        """Note that it does not wait any more."""
        self.over = True


class Granted(NamedTuple):
    """Leases that were given at once: one, or up to the count that was asked for."""

    leases: list[Lease]


class RouteRefused(NamedTuple):
    """No lease and no place in the queue.

    why: nothing_hot, all_busy, or too_many_unused leases of this client. retry_after_s: when to ask again.
    unused: (leases, instances' worth of room) that the client has not used.
    """

    why: str
    retry_after_s: float
    unused: tuple[int, float] = (0, 0.0)
