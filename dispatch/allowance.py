"""How many leases a client may have that it has not used: a client that asks for a million starves no other.

A lease is unused from when it is given until the instance says that its request has started, or it ends in
any other way: given back, failed, expired. Bounded per client:

    leases   most_unused at once
    work     SHARE of what all hot instances may hold, while other clients ask

so a client that hoards is refused until its oldest lease expires, and one that is alone may have everything.
An honest client's starts are known with the next report, within a second or so; what it may be given in that
time is seconds of the whole fleet's work.

A client is known by its key; where no keys are wanted, by its address. Times are epoch seconds.
"""

from dataclasses import dataclass, field

from dispatch.lease import Lease

MOST_UNUSED = 100_000
"""Unused leases of one client: half of the unfinished leases there may be in all. An honest client has fewer:
it is given 50,000 a second at most (bench/route), and their starts are known after a second; or 10,000 a
second by a fleet so large that each instance is asked for its report only every 10 s."""

SHARE = 0.5
"""Most unused work of one client, as a share of all capacity. An instance may hold several seconds of its
work, and starts are known after one: an honest client gets there only by asking for more in a second than the
fleet can do in half of those."""

OTHERS_S = 10.0
"""Seconds for which another client counts as asking: about how often a program of few requests asks."""

KNOWN_S = 2.0
"""Seconds after a lease was given in which its request may have started without a report having said so."""


@dataclass(slots=True)
class UnusedLeases:
    """The unused leases of one client."""

    leases: int = 0
    work: float = 0.0
    given: dict[int, int] = field(default_factory=dict)  # second -> leases given in it

    def add(self, lease: Lease) -> None:
        """Count a lease that it is given."""
        second = int(lease.given_at)
        self.leases += 1
        self.work += lease.work
        self.given[second] = self.given.get(second, 0) + 1

    def remove(self, lease: Lease) -> None:
        """Count a lease no more."""
        second = int(lease.given_at)
        self.leases -= 1
        self.work -= lease.work
        if self.given[second] == 1:
            del self.given[second]
        else:
            self.given[second] -= 1


class Allowance:
    """Unused leases by client."""

    def __init__(self, most_unused: int, lease_s: float) -> None:
        """Start without clients. lease_s: an unused lease expires after so long."""
        self.most_unused = most_unused
        self.refused = 0
        self._lease_s = lease_s
        self._clients: dict[str, UnusedLeases] = {}
        self._last: tuple[str, float] | None = None  # the client that asked last, and when
        self._other_at: float | None = None  # when another client than that asked last

    def __len__(self) -> int:
        """Return the number of clients with unused leases."""
        return len(self._clients)

    def unused(self, client: str) -> tuple[int, float]:
        """Return (leases, their work) that the client has not used."""
        it = self._clients.get(client)
        return (it.leases, it.work) if it is not None else (0, 0.0)

    def left(self, client: str) -> int:
        """Return how many leases the client may be given by their number."""
        it = self._clients.get(client)
        return self.most_unused - (it.leases if it is not None else 0)

    def asks(self, client: str, capacity_work: float, now: float) -> float | None:
        """Note that a client asks; return the seconds until it may ask again if it has too many, or None.

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
        """Count a lease as unused."""
        it = self._clients.get(lease.client)
        if it is None:
            it = self._clients[lease.client] = UnusedLeases()
        it.add(lease)

    def settled(self, lease: Lease) -> None:
        """Count a lease no more that is used, or over; call it once for each."""
        it = self._clients[lease.client]
        it.remove(lease)
        if not it.leases:
            del self._clients[lease.client]
