"""The queue of orders that are to be sent to the cloud, the most urgent first."""

import itertools
import queue
from collections.abc import Mapping

from fleet.commands import AskPage, Command, Create, Destroy, LookForOffers, Start, Stop

URGENCY: Mapping[type, int] = {Start: 0, Stop: 0, Destroy: 1, AskPage: 1, LookForOffers: 2, Create: 2}
"""Rank in which orders are sent: a create must wait 4.5 s for the one before, and may wait 12 (vast-contract
1.3), so what costs money or serves does not wait behind it."""

_END = 9


class OrderQueue:
    """Orders that were begun and are to be sent. Any thread may put some; one thread takes them."""

    def __init__(self) -> None:
        """Begin without orders."""
        self._orders: queue.PriorityQueue[tuple[int, int, Command | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def put(self, command: Command) -> None:
        """Add a command behind those that are as urgent; drop one that asks nothing of the cloud."""
        if type(command) in URGENCY:
            self._orders.put((URGENCY[type(command)], next(self._numbers), command))

    def end(self) -> None:
        """Let `take` return None after all commands that were put are taken."""
        self._orders.put((_END, next(self._numbers), None))

    def take(self) -> Command | None:
        """Wait for a command and return it; None after `end`."""
        return self._orders.get()[2]

    def first(self) -> Command | None:
        """Return the command that `take` would return now, without taking it; None when there is none."""
        with self._orders.mutex:
            return self._orders.queue[0][2] if self._orders.queue else None
