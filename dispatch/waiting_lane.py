"""One lane of waiting requests: a line for each client, which take turns.

client a   ▸ ▸ ▸ ▸ ▸      lowest rank first
client b   ▸              the line whose client has the earliest turn goes first (dispatch/client_turns.py)
client c   ▸ ▸

aside      requests for which there is room, but only on instances that they must avoid
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
    """The waiting requests of one lane: a line for each client, and those that stand aside."""

    def __init__(self, turns: ClientTurns, gone: Callable[[QueuedRequest], bool]) -> None:
        """Start without requests. gone: a function that tells whether a request has left this lane."""
        self.aside: deque[Entry] = deque()
        self._turns = turns
        self._gone = gone
        self._lines: dict[str, list[Entry]] = {}  # heaps; requests that left stay until they would be served
        self._order: list[Turn] = []  # a heap of the lines; those that are not in _listed are void
        self._listed: dict[str, Turn] = {}
        self._shut: list[str] = []  # clients that are passed over in this pass
        self._entries = 0  # in lines

    def __len__(self) -> int:
        """Return the number of entries, with those of requests that have left."""
        return self._entries + len(self.aside)

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Iterate over the lane's requests in the order of rank. It sorts them: for operators and tests."""
        entries = [entry for line in self._lines.values() for entry in line]
        return (entry[2] for entry in sorted((*entries, *self.aside)) if not self._gone(entry[2]))

    def push(self, entry: Entry) -> None:
        """Put a request into the line of its client."""
        client = entry[2].ask.client
        line = self._lines.setdefault(client, [])
        heappush(line, entry)
        self._entries += 1
        if line[0] is entry and client not in self._shut:
            self._list(client, entry)

    def head(self) -> Entry | None:
        """Return the request whose turn is next, or None when all lines are empty or passed over."""
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
        """Return the first request of a client that does not stand aside, or None."""
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
        """Remove a request from the line of its client, in which it is the first."""
        heappop(self._lines[entry[2].ask.client])
        self._entries -= 1

    def shut(self, client: str) -> None:
        """Pass over the line of a client until `reopen` is called."""
        self._listed.pop(client, None)
        self._shut.append(client)

    def reopen(self) -> None:
        """Pass over no client's line any more."""
        shut, self._shut = self._shut, []
        for client in shut:
            if (first := self.first_of(client)) is not None:
                self._list(client, first)

    def is_before(self, one: Entry, other: Entry) -> bool:
        """Return whether one request goes before another: by rank for one client, else by clients' turns."""
        a, b = one[2].ask.client, other[2].ask.client
        return one < other if a == b else self._turn_of(a, one)[:3] < self._turn_of(b, other)[:3]

    def _turn_of(self, client: str, first: Entry) -> Turn:
        return self._turns.key(client, first[2].ask.priority), first[0], first[1], client

    def _list(self, client: str, first: Entry) -> None:
        turn = self._listed[client] = self._turn_of(client, first)
        heappush(self._order, turn)

    def clear(self) -> None:
        """Remove all requests: none waits any more, and the clients' turns begin anew."""
        self.aside.clear()
        self._lines.clear()
        self._order.clear()
        self._listed.clear()
        self._entries = 0

    def trim(self, living: int) -> None:
        """Forget the requests that left when most entries are theirs, at a cost of O(1) for each.

        living: how many requests of the lane have not left.
        """
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
