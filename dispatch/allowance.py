"""How many leases a client may have that it has not used: who asks for a million starves nobody.

A lease is unused from when it is given until the instance says that its request has started, or it ends in
any other way: given back, failed, expired. Bounded per client:

    leases   most_unused at once
    work     SHARE of what all hot instances may hold, while others ask

so a client that hoards is refused until its oldest lease expires, and one that is alone may have everything.
An honest client's starts are known with the next report, within a second or so; what it may be given in that
time is seconds of the whole fleet's work.

A client is whoever has its key; where no keys are wanted, whoever has its address. Times are epoch seconds.
"""

from dataclasses import dataclass, field

from dispatch.types import Lease

MOST_UNUSED = 100_000
"""Half of the unfinished leases there may be in all. An honest client has fewer: it is given 50,000 a second
at most (bench/route), and their starts are known after a second; or 10,000 a second by a fleet so large
that each instance is asked for its report only every 10 s."""

SHARE = 0.5
"""An instance may hold several seconds of its work, and starts are known after one: an honest client gets
there only by asking for more in a second than the fleet can do in half of those."""

OTHERS_S = 10.0
"""Others are asking if one has within so long: about how often a program of few requests asks."""

KNOWN_S = 2.0
"""So long after a lease was given it may be that its request has started and no report has said so."""


@dataclass(slots=True)
class _Unused:
    """Of one client."""

    leases: int = 0
    work: float = 0.0
    given: dict[int, int] = field(default_factory=dict)  # second -> leases given in it


class Allowance:
    """Unused leases by client."""

    def __init__(self, most_unused: int, lease_s: float) -> None:
        """Nobody has any. lease_s: after so long an unused lease expires."""
        self.most_unused = most_unused
        self.refused = 0
        self._lease_s = lease_s
        self._clients: dict[str, _Unused] = {}
        self._last: tuple[str, float] | None = None  # who asked last, and when
        self._other_at: float | None = None  # when somebody else asked last

    def __len__(self) -> int:
        """Clients with unused leases."""
        return len(self._clients)

    def unused(self, client: str) -> tuple[int, float]:
        """(leases, their work) that it has not used."""
        it = self._clients.get(client)
        return (it.leases, it.work) if it is not None else (0, 0.0)

    def left(self, client: str) -> int:
        """Leases that it may be given by their number."""
        it = self._clients.get(client)
        return self.most_unused - (it.leases if it is not None else 0)

    def asks(self, client: str, capacity_work: float, now: float) -> float | None:
        """It asks: None, or in how many seconds to ask again because it has too many unused leases.

        capacity_work: what all hot instances may hold.
        """
        if self._last is None or self._last[0] == client:
            self._last = client, now
        else:
            self._last, self._other_at = (client, now), self._last[1]
        it = self._clients.get(client)
        if it is None:
            return None
        others = self._other_at is not None and now - self._other_at <= OTHERS_S
        if it.leases < self.most_unused and not (others and it.work > SHARE * capacity_work):
            return None
        self.refused += 1
        oldest = min(it.given)
        return 1.0 if now - oldest < KNOWN_S else max(1.0, oldest + 1.0 + self._lease_s - now)

    def given(self, lease: Lease) -> None:
        """It is given that lease."""
        it = self._clients.get(lease.client)
        if it is None:
            it = self._clients[lease.client] = _Unused()
        second = int(lease.given_at)
        it.leases += 1
        it.work += lease.work
        it.given[second] = it.given.get(second, 0) + 1

    def settled(self, lease: Lease) -> None:
        """That lease is used, or over; call it once for each."""
        it = self._clients[lease.client]
        second = int(lease.given_at)
        it.leases -= 1
        it.work -= lease.work
        if not it.leases:
            del self._clients[lease.client]
        elif it.given[second] == 1:
            del it.given[second]
        else:
            it.given[second] -= 1
