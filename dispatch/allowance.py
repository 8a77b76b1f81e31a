"""How many unused leases a client may have: so one that asks for a million leases starves no other client.

A lease is unused from when it is given until the instance says that its request has started, or until the
lease ends in another way: given back, failed, expired. It takes a share of its instance's room, whatever its
client says that its work is: one of the places for requests that run at once, or KV memory
(ServingInstance.room_of). For each client these are bounded:

    leases   most_unused at once
    room     what all hot instances have while no other client asks; else as much as all clients leave, or
             1 / (n + 1) of it where n clients have unused leases, so that hoarders leave as much as one has

So a client that hoards is refused until its oldest lease expires, and one that is alone may have everything.
The starts of an honest client's requests are known with the next report, within a second or so; what it may
be given in that time is seconds of the whole fleet's work.

A lease that has not started when its instance reports after REST_S rests: its client may still use it and it
counts here, but its room is free for others until it starts (dispatch/lease_book.py).

A client is known by its key; where no keys are wanted, by its address. A client without a name is this
process itself (virtual time). Times are epoch seconds.
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
    """The unused leases of one client, and the room that they take together, in instances' worth."""

    leases: int = 0
    room: float = 0.0
    given: dict[int, int] = field(default_factory=dict)  # second -> leases given in it

    def add(self, lease: Lease) -> None:
        """Count a lease that the client is given."""
        second = int(lease.given_at)
        self.leases += 1
        self.room += lease.room
        self.given[second] = self.given.get(second, 0) + 1

    def remove(self, lease: Lease) -> None:
        """Count a lease of the client no longer: it is used, or over."""
        second = int(lease.given_at)
        self.leases -= 1
        self.room -= lease.room
        if self.given[second] == 1:
            del self.given[second]
        else:
            self.given[second] -= 1


class Allowance:
    """The unused leases of each client, and how many more a client may have."""

    def __init__(self, most_unused: int, lease_s: float) -> None:
        """Start without clients. most_unused: leases of one client; lease_s: a lease's life in seconds."""
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
        """Return the unused leases of a client: (how many, the room they take in instances' worth)."""
        it = self._clients.get(client)
        return (it.leases, it.room) if it is not None else (0, 0.0)

    def fit(self, client: str, room: float, hot: int, now: float) -> int:
        """Return how many more leases the client may have; the last one may exceed its bound of room.

        room: of one lease, as a share of an instance. hot: number of hot instances.
        """
        unused, used = self.unused(client)
        most = self.most_unused - unused
        if client and hot:
            most = min(most, 1 + math.floor((self._room_left(used, hot, now) + ROUNDING) / room))
        return max(0, most)

    def _room_left(self, used: float, hot: int, now: float) -> float:
        """Return how much room the client may still take, beside `used`; negative when it has too much."""
        if self._other_at is None or now - self._other_at > OTHERS_S:
            return hot - used
        return max((hot - self._room - used) / 2.0, hot / (len(self._clients) + 1) - used)

    def is_used_up(self, client: str, hot: int, now: float) -> bool:
        """Return whether the client has as many unused leases as it may. hot: number of hot instances."""
        it = self._clients.get(client)
        if it is None:
            return False
        if it.leases >= self.most_unused:
            return True
        if not client or not hot:
            return False
        return self._room_left(it.room, hot, now) < -ROUNDING

    def asks(self, client: str, hot: int, now: float) -> float | None:
        """Note that a client asks for leases; return in how many seconds it may, None if it may now.

        hot: number of hot instances.
        """
        if self._last is None or self._last[0] == client:
            self._last = client, now
        else:
            self._last, self._other_at = (client, now), self._last[1]
        return self.refuse(client, hot, now)

    def refuse(self, client: str, hot: int, now: float) -> float | None:
        """Refuse a client that has too many unused leases; return in how many seconds it may ask again.

        None: it may have a lease, and is not refused. hot: number of hot instances.
        """
        if not self.is_used_up(client, hot, now):
            return None
        self.refused += 1
        oldest = min(self._clients[client].given)
        return 1.0 if now - oldest < KNOWN_S else max(1.0, oldest + 1.0 + self._lease_s - now)

    def given(self, lease: Lease) -> None:
        """Count a lease that was just given among the unused ones of its client."""
        it = self._clients.get(lease.client)
        if it is None:
            it = self._clients[lease.client] = UnusedLeases()
        it.add(lease)
        self._room += lease.room

    def settled(self, lease: Lease) -> None:
        """Count a lease as unused no longer: its request has started, or it ended. Call it once a lease."""
        it = self._clients[lease.client]
        it.remove(lease)
        self._room -= lease.room
        if not it.leases:
            del self._clients[lease.client]
            if not self._clients:
                self._room = 0.0
