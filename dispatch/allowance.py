"""How many leases a client may have that it has not used: a client that asks for a million starves no other.

A lease is unused from when it is given until the instance says that its request has started, or it ends in
any other way: given back, failed, expired. It takes a share of its instance's room, whatever its client says
that its work is: a place among the requests that may run, or memory (ServingInstance.share_of). Bounded are,
for each client,

    leases   most_unused at once
    room     what all hot instances have while no other client asks; else as much as all clients leave, or
             1 / (n + 1) of it where n clients have unused leases, so that hoarders leave as much as one has

so a client that hoards is refused until its oldest lease expires, and one that is alone may have everything.
An honest client's starts are known with the next report, within a second or so; what it may be given in that
time is seconds of the whole fleet's work.

A lease that has not started when its instance reports after REST_S rests: its client may still use it and it
counts here, but its room is free for others until it starts (dispatch/lease_book.py).

A client is known by its key; where no keys are wanted, by its address. One without a name is this process's
own (virtual time). Times are epoch seconds.
"""

import math
from dataclasses import dataclass, field

from dispatch.lease import Lease

MOST_UNUSED = 100_000
"""Unused leases of one client: half of the unfinished leases there may be in all. An honest client has fewer:
it is given 50,000 a second at most (bench/route), and their starts are known after a second; or 10,000 a
second by a fleet so large that each instance is asked for its report only every 10 s."""

REST_S = 3.0
"""Seconds after which a lease that has not started rests: a client needs one to connect and send, and the
report is up to another one late. Leases fetched ahead may rest: what is lost is that they hold room."""

OTHERS_S = 10.0
"""Seconds for which another client counts as asking: about how often a program of few requests asks."""

KNOWN_S = 2.0
"""Seconds after a lease was given in which its request may have started without a report having said so."""

ROUNDING = 1e-9
"""Room by which sums of shares may be wrong."""


@dataclass(slots=True)
class UnusedLeases:
    """The unused leases of one client. room: that they take, in instances."""

    leases: int = 0
    room: float = 0.0
    given: dict[int, int] = field(default_factory=dict)  # second -> leases given in it

    def add(self, lease: Lease) -> None:
        """Count a lease that it is given."""
        second = int(lease.given_at)
        self.leases += 1
        self.room += lease.room
        self.given[second] = self.given.get(second, 0) + 1

    def remove(self, lease: Lease) -> None:
        """Count a lease no more."""
        second = int(lease.given_at)
        self.leases -= 1
        self.room -= lease.room
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
        self._room = 0.0  # that the unused leases of all clients take
        self._last: tuple[str, float] | None = None  # the client that asked last, and when
        self._other_at: float | None = None  # when another client than that asked last

    def __len__(self) -> int:
        """Return the number of clients with unused leases."""
        return len(self._clients)

    def unused(self, client: str) -> tuple[int, float]:
        """Return (leases, instances' worth of room) that the client has not used."""
        it = self._clients.get(client)
        return (it.leases, it.room) if it is not None else (0, 0.0)

    def fit(self, client: str, room: float, hot: int, now: float) -> int:
        """Return how many more leases of that room the client may have; the last may go over."""
        unused, used = self.unused(client)
        most = self.most_unused - unused
        if client and hot:
            most = min(most, 1 + math.floor((self._room_left(used, hot, now) + ROUNDING) / room))
        return max(0, most)

    def _room_left(self, used: float, hot: int, now: float) -> float:
        """Return the room that a client may have beside what it has; negative when that is too much."""
        if self._other_at is None or now - self._other_at > OTHERS_S:
            return hot - used
        return max((hot - self._room - used) / 2.0, hot / (len(self._clients) + 1) - used)

    def is_used_up(self, client: str, hot: int, now: float) -> bool:
        """Return whether the client has as many as it may. hot: instances, without which there is no room."""
        it = self._clients.get(client)
        if it is None:
            return False
        if it.leases >= self.most_unused:
            return True
        if not client or not hot:
            return False
        return self._room_left(it.room, hot, now) < -ROUNDING

    def asks(self, client: str, hot: int, now: float) -> float | None:
        """Note that a client asks; return the seconds until it may ask again if it has too many, or None.

        hot: instances.
        """
        if self._last is None or self._last[0] == client:
            self._last = client, now
        else:
            self._last, self._other_at = (client, now), self._last[1]
        return self.refuse(client, hot, now)

    def refuse(self, client: str, hot: int, now: float) -> float | None:
        """Return the seconds until a client that has too many may ask again, and count that; None: it may."""
        if not self.is_used_up(client, hot, now):
            return None
        self.refused += 1
        oldest = min(self._clients[client].given)
        return 1.0 if now - oldest < KNOWN_S else max(1.0, oldest + 1.0 + self._lease_s - now)

    def given(self, lease: Lease) -> None:
        """Count a lease as unused."""
        it = self._clients.get(lease.client)
        if it is None:
            it = self._clients[lease.client] = UnusedLeases()
        it.add(lease)
        self._room += lease.room

    def settled(self, lease: Lease) -> None:
        """Count a lease no more that is used, or over; call it once for each."""
        it = self._clients[lease.client]
        it.remove(lease)
        self._room -= lease.room
        if not it.leases:
            del self._clients[lease.client]
            if not self._clients:
                self._room = 0.0
