"""One lane of requests that wait: a line for each client, which take turns.

client a   ▸ ▸ ▸ ▸ ▸      lowest rank first
client b   ▸              the line whose client has the earliest turn goes first (dispatch/client_turns.py)
client c   ▸ ▸

aside      those for which there is room, but where they must not go
"""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace

from dispatch.client_turns import ClientTurns
from dispatch.route_request import QueuedRequest

Entry = tuple[float, int, QueuedRequest]
"""(rank, number, request): of equal rank the first to come goes first."""

Turn = tuple[float, float, int, str]
"""(key of the client's turn, rank and number of its first request, client)."""


class Lane:
    """The requests of one lane."""

    def __init__(self, turns: ClientTurns, gone: Callable[[QueuedRequest], bool]) -> None:
        """Start empty. gone: whether a request is not in this lane any more."""
        self.aside: deque[Entry] = deque()
        self._turns = turns
        self._gone = gone
        self._lines: dict[str, list[Entry]] = {}  # heaps; requests that left stay until they would be served
        self._order: list[Turn] = []  # a heap of the lines; those that are not in _listed are void
        self._listed: dict[str, Turn] = {}
        self._shut: list[str] = []  # clients that are passed over in this pass
        self._entries = 0  # in lines

    def __len__(self) -> int:
        """Return the number of entries, also of requests that left."""
        return self._entries + len(self.aside)

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Go through the requests by their ranks. It sorts: for operators and tests."""
        entries = [entry for line in self._lines.values() for entry in line]
        return (entry[2] for entry in sorted((*entries, *self.aside)) if not self._gone(entry[2]))

    def push(self, entry: Entry) -> None:
        """Let a request wait in the line of its client."""
        client = entry[2].ask.client
        line = self._lines.setdefault(client, [])
        heappush(line, entry)
        self._entries += 1
        if line[0] is entry and client not in self._shut:
            self._list(client, entry)

    def head(self) -> Entry | None:
        """Return the request whose turn is next."""
        order = self._order
        while order:
            turn = order[0]
            client = turn[3]
            if self._listed.get(client) is not turn:
                heappop(order)
            elif (first := self.first_of(client)) is None:
                heappop(order)
                del self._listed[client]
            elif (now := self._turn_of(client, first)) != turn:
                heapreplace(order, now)
                self._listed[client] = now
            else:
                return first
        return None

    def first_of(self, client: str) -> Entry | None:
        """Return the first request of a client that does not stand aside."""
        line = self._lines.get(client)
        if line is None:
            return None
        while line and self._gone(line[0][2]):
            heappop(line)
            self._entries -= 1
        if line:
            return line[0]
        del self._lines[client]
        return None

    def pop(self, entry: Entry) -> None:
        """Remove the first request of its client."""
        heappop(self._lines[entry[2].ask.client])
        self._entries -= 1

    def shut(self, client: str) -> None:
        """Pass over a client until `reopen`."""
        self._listed.pop(client, None)
        self._shut.append(client)

    def reopen(self) -> None:
        """Pass over nobody any more."""
        shut, self._shut = self._shut, []
        for client in shut:
            if (first := self.first_of(client)) is not None:
                self._list(client, first)

    def is_before(self, one: Entry, other: Entry) -> bool:
        """Return whether one goes before the other: by rank for one client, else by the clients' turns."""
        a, b = one[2].ask.client, other[2].ask.client
        return one < other if a == b else self._turn_of(a, one)[:3] < self._turn_of(b, other)[:3]

    def _turn_of(self, client: str, first: Entry) -> Turn:
        return self._turns.key(client, first[2].ask.priority), first[0], first[1], client

    def _list(self, client: str, first: Entry) -> None:
        turn = self._listed[client] = self._turn_of(client, first)
        heappush(self._order, turn)

    def clear(self) -> None:
        """Forget all: nobody waits, and the clients' turns begin anew."""
        self.aside.clear()
        self._lines.clear()
        self._order.clear()
        self._listed.clear()
        self._entries = 0

    def trim(self, living: int) -> None:
        """Forget the requests that left when most entries are theirs, so that it costs O(1) for each."""
        if len(self) <= 2 * living + 64:
            return
        self.aside = deque(e for e in self.aside if not self._gone(e[2]))
        kept = {c: [e for e in line if not self._gone(e[2])] for c, line in self._lines.items()}
        self._lines = {c: line for c, line in kept.items() if line}
        self._order, self._listed = [], {}
        for client, line in self._lines.items():
            heapify(line)
            if client not in self._shut:
                self._list(client, line[0])
        self._entries = sum(map(len, self._lines.values()))
