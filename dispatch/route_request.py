"""What a client asks for and what becomes of it: leases, a place in the queue, or a refusal."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dispatch.lease import Lease


@dataclass(slots=True)
class RouteRequest:
    """A client's request for a lease.

    work: in output-token equivalents. max_tokens: the limit of the answer, if known. avoid: ids of instances
    that must not serve it. prompt_tokens: part of the work; 0 where only the work was told. affinity: the
    client's salted hashes of the prompt's prefixes (dispatch/prefix_cache.py). priority: 0 is served first, 2
    last. client: whose allowance it counts against (dispatch/allowance.py). trace: the id under which its
    client finds it in logs, "" without one.
    """

    work: float
    max_tokens: int | None = None
    avoid: Collection[int] = ()
    prompt_tokens: int = 0
    affinity: Sequence[str] = ()
    priority: int = 1
    client: str = ""
    trace: str = ""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request for a lease that waits in the queue. Times are epoch seconds.

    count: leases that it asked for, None for one. until: when its place is lost; since: when it came.
    give_by: when it is late. takes_s: seconds of the whole fleet's work. over: it was granted or cancelled,
    or its time is up. arrives: it counts as an arrival when it is granted, because its client asks for more
    than it can be given.
    """

    ask: RouteRequest
    count: int | None
    until: float
    since: float
    give_by: float
    takes_s: float = 0.0
    arrives: bool = False
    late: bool = False
    overdue: bool = False
    over: bool = False

    def turn_late(self) -> None:
        """Note that the request cannot be in time any more."""
        self.late = True

    def turn_overdue(self) -> None:
        """Note that the request has been late for as long as it may."""
        self.overdue = True

    def leave(self) -> None:
        """Note that the request does not wait any more."""
        self.over = True


class Granted(NamedTuple):
    """The leases that a request was given: one, or up to the count that it asked for."""

    leases: list[Lease]


class RouteRefused(NamedTuple):
    """The refusal of a request: there is no lease and no place in the queue for it.

    why: nothing_hot, all_busy, or too_many_unused leases of this client. retry_after_s: seconds after which
    to ask again. unused: (leases, instances' worth of room) that the client has not used.
    """

    why: str
    retry_after_s: float
    unused: tuple[int, float] = (0, 0.0)
