"""Which clients are connected to a server, and which connection ends when there are too many. No I/O.

    silent     no request has come yet, or the handshake of TLS is not over       MAX_SILENT
    working    a request is being answered                                        never ended for another
    rested     an answer was given, and the next request may come                 MAX_RESTED
    address    three quarters of all; a network of IPv6 (/64) is one address
    all        half of the files that this process may have open

When a client comes and a bound is reached, those connections end that have been silent or rested longest,
among the ones of the address that has most of them. So who opens many ends his own, and others are let in.
Where all are working, the new one is refused.
"""

import ipaddress
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable

MAX_SILENT = 512
"""Connections without a request; under TLS each takes 51 kB (uvloop 0.23, measured 2026-11), else 7."""

MAX_RESTED = 2048
"""Connections between two requests, 9 kB each; a client whose connection has ended opens another."""

MOST_SHARE = 0.5
"""Share of the files that clients may take; a loadbalancer needs one for each instance, too."""

ADDRESS_SHARE = 0.75
"""Share of all connections that one address may have: all clients may be behind one proxy."""

END_AT_ONCE = 32
"""Connections that end when there are too many: looking for them takes as long as letting in a few."""


class Seat:
    """The place of one connection in a ConnectionTable; its protocol says here what the connection does."""

    __slots__ = ("_close", "_place", "_table", "address")

    def __init__(self, table: "ConnectionTable", address: str, close: Callable[[], object]) -> None:
        """Sit among the silent connections of a table; `ConnectionTable.admit` does this."""
        self._table = table
        self._close = close
        self._place: OrderedDict[Seat, None] | None = table.silent
        self.address = address
        table.silent[self] = None

    def closes(self, close: Callable[[], object]) -> None:
        """Set the function that ends the connection from now on."""
        self._close = close

    def works(self) -> None:
        """Note that a request of the connection is being answered."""
        if self._place is not None:
            self._place.pop(self, None)
            self._place = None

    def rests(self) -> None:
        """Note that an answer was given and no other request of the connection waits."""
        if self._place is not None:
            self._place.pop(self, None)
        self._place = self._table.rested
        self._place[self] = None

    def leave(self) -> None:
        """Remove the connection from the table, because it has ended; a second call changes nothing."""
        self.works()
        self._table.forget(self)

    def end(self) -> None:
        """End the connection and leave the table."""
        self.leave()
        self._close()


class ConnectionTable:
    """The connections of one server, as seats. silent, rested: those that are it longest come first."""

    def __init__(self, files: int) -> None:
        """Start without connections. files: how many this process may open; below 0: without a limit."""
        self._most = max(1, int(files * MOST_SHARE)) if files >= 0 else sys.maxsize
        self._most_of_address = max(1, int(self._most * ADDRESS_SHARE))
        self._seats: set[Seat] = set()
        self._of_address: Counter[str] = Counter()
        self.silent: OrderedDict[Seat, None] = OrderedDict()
        self.rested: OrderedDict[Seat, None] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of connections."""
        return len(self._seats)

    def admit(self, address: str, close: Callable[[], object]) -> Seat | None:
        """Return a seat for a new connection from that address, or None when it is refused.

        close: a function that ends the connection.
        """
        address = network_of(address)
        if self._of_address[address] >= self._most_of_address and not self.end_oldest(address=address):
            return None
        if len(self._seats) >= self._most and not self.end_oldest():
            return None
        if len(self.silent) >= MAX_SILENT:
            self.end_oldest(self.silent)
        if len(self.rested) >= MAX_RESTED:
            self.end_oldest(self.rested)
        seat = Seat(self, address, close)
        self._seats.add(seat)
        self._of_address[address] += 1
        return seat

    def end_oldest(self, *places: "OrderedDict[Seat, None]", address: str | None = None) -> bool:
        """End the connections that waited longest in these places, by default all; return if there were any.

        address: whose; None: of the address that has most of them.
        """
        waiting = [seat for place in places or (self.silent, self.rested) for seat in place]
        if address is None and waiting:
            address = Counter(seat.address for seat in waiting).most_common(1)[0][0]
        found = [seat for seat in waiting if seat.address == address][:END_AT_ONCE]
        for seat in found:
            seat.end()
        return bool(found)

    def forget(self, seat: Seat) -> None:
        """Remove a seat; only `Seat.leave` calls this."""
        if seat in self._seats:
            self._seats.remove(seat)
            self._of_address[seat.address] -= 1
            if not self._of_address[seat.address]:
                del self._of_address[seat.address]


def network_of(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 network of an IPv6 one.

    One client usually has the whole of such a network.
    """
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
