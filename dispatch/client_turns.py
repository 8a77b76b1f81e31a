"""Whose turn it is among the clients whose requests wait: each is served as much as any other that wants it.

Each client has a turn, in seconds of the whole fleet's work (start-time fair queueing, Goyal et al. 1996):

    begins to wait   its turn is the earliest of all clients that wait, or its own if that is later
    is served        its turn is later by what its request takes of the whole fleet

and the client with the earliest turn goes first, so however many requests one client has waiting, another
client's first request goes before the first client's second. A higher or lower class of priority is worth
CLASS_S, as within one client; it moves no turn, or a client that asks for low and normal by turns would be
before those that ask now and then.

A request without a client's name is this process's own (virtual time); all those are one client.
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

CLASS_S = 30.0
"""Seconds that a class of priority is worth. Far more than the seconds in which a request can be in time, so
that there a higher class always goes first; about what a stopped machine takes to serve, so that in a burst
it goes first until there is help; and a tenth of LATE_BOUND_S, so that no class waits much longer than
that."""

KEPT = 64
"""Clients that do not wait any more and are remembered in any case."""


@dataclass(slots=True)
class WaitingClient:
    """One client with waiting requests, and its turn in seconds of the whole fleet's work.

    held: its requests that wait, and work their work. ahead: that of those that can be in time, by priority.
    """

    turn: float = 0.0
    held: int = 0
    work: float = 0.0
    ahead: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def begin(self, turn: float) -> None:
        """Note that the client begins to wait; its turn is that one, or its own if that is later."""
        self.turn = max(self.turn, turn)

    def count(self, more: int, work: float) -> None:
        """Count `more` requests of the client that wait, with their work; negative: so many fewer."""
        self.held += more
        self.work += work
        if not self.held:
            self.work = 0.0
            self.ahead = [0.0, 0.0, 0.0]

    def move_on(self, takes_s: float) -> None:
        """Let the client's turn be later by takes_s."""
        self.turn += takes_s


class ClientTurns:
    """The clients whose requests wait, and whose turn it is."""

    def __init__(self) -> None:
        """Start without clients."""
        self.waiting = 0  # clients with requests that wait
        self._clients: dict[str, WaitingClient] = {}
        self._turn = 0.0  # where a client begins
        self._earliest: list[tuple[float, str]] = []  # a heap of those that wait; turns may have moved on

    def held(self, client: str) -> int:
        """Return how many requests of that client wait."""
        it = self._clients.get(client)
        return it.held if it is not None else 0

    def key(self, client: str, priority: int) -> float:
        """Return where a request of that client stands among those of other clients; the lower goes first."""
        it = self._clients.get(client)
        turn = it.turn if it is not None and it.held else max(it.turn if it else 0.0, self._begin())
        return turn + (priority - 1) * CLASS_S

    def _begin(self) -> float:
        """Return the turn of a client that begins to wait and was not served lately."""
        earliest = self._earliest
        while earliest:
            turn, client = earliest[0]
            it = self._clients.get(client)
            if it is None or not it.held:
                heappop(earliest)
            elif it.turn != turn:
                heapreplace(earliest, (it.turn, client))
            else:
                self._turn = max(self._turn, turn)
                break
        return self._turn

    def waiting_work(self) -> dict[str, float]:
        """Return the work of each client's requests that wait."""
        return {client: it.work for client, it in self._clients.items() if it.held}

    def join(self, client: str, work: float) -> None:
        """Count one more waiting request of a client, with its work."""
        it = self._clients.get(client)
        if it is None:
            it = self._clients[client] = WaitingClient()
        if not it.held:
            self.waiting += 1
            it.begin(self._begin())
            heappush(self._earliest, (it.turn, client))
            if len(self._earliest) > 2 * self.waiting + KEPT:
                self._earliest = sorted((x.turn, c) for c, x in self._clients.items() if x.held or x is it)
        it.count(1, work)

    def leave(self, client: str, work: float) -> None:
        """Count one waiting request of a client less, with its work: it was served or cancelled."""
        it = self._clients[client]
        it.count(-1, -work)
        if it.held:
            return
        self.waiting -= 1
        if not self.waiting:
            self._clients.clear()
            self._earliest.clear()
            self._turn = 0.0
        elif len(self._clients) > 2 * self.waiting + KEPT:
            begin = self._begin()
            self._clients = {c: x for c, x in self._clients.items() if x.held or x.turn > begin}

    def served(self, client: str, takes_s: float) -> None:
        """Move a client's turn on by what its request takes; call it before `leave`."""
        self._clients[client].move_on(takes_s)

    def count_ahead(self, client: str, priority: int, work: float) -> None:
        """Add work of a client's requests that can be in time; negative: work that has left or is late."""
        ahead = self._clients[client].ahead
        ahead[priority] = max(0.0, ahead[priority] + work)

    def ahead_of(self, client: str, priority: int, work: float, all_work: float) -> float:
        """Return how much of all_work, which waits, is served before such a request of that client.

        Of the client's own work all is; of each other client no more than the client is given until then.
        """
        it = self._clients.get(client)
        own = 0.0 if it is None else sum(it.ahead[: priority + 1])
        others = self.waiting - (it is not None and it.held > 0)
        return min(all_work, own + others * (own + work)) if others else all_work
