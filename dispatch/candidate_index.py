"""The instances of one class of speed that can serve, ordered by when they will have drained."""

import math
from bisect import bisect_left, insort

from dispatch.instance import FLOOR, Instance

Entry = tuple[float, float, int, Instance, float]
"""(key, random, counter, instance, when it is at its floor): ties are broken by chance, then by age."""


class Queue:
    """The instances of one class that can serve, in two sorted lists whose keys do not age.

    A place is found by bisection; to make room for it is one move of memory, 80 kB for 10,000 instances.
    """

    def __init__(self) -> None:
        self.draining: list[Entry] = []  # by free_at
        self.steady: list[Entry] = []  # by seconds of work: at their floor, or idle

    def add(self, inst: Instance, tie: tuple[float, int], now: float) -> None:
        """It has its place; it must have none."""
        floor_s = FLOOR * (inst.given + inst.foreign) / inst.throughput
        floor_at = inst.free_at - floor_s
        if floor_at <= now:
            inst.entry = (floor_s, *tie, inst, -math.inf)
            insort(self.steady, inst.entry)
        else:
            inst.entry = (inst.free_at, *tie, inst, floor_at)
            insort(self.draining, inst.entry)
        inst.queue = self

    def remove(self, inst: Instance) -> None:
        """It has no place any more; it must have one here."""
        entry = inst.entry
        if entry is not None:
            entries = self.steady if entry[4] == -math.inf else self.draining
            del entries[bisect_left(entries, entry)]
        inst.entry = inst.queue = None

    def first(self, few: int, now: float) -> list[tuple[float, float, int, Instance]]:
        """(seconds of work, random, counter, instance) of the first so many of either list."""
        while self.draining and self.draining[0][4] <= now:
            inst = self.draining[0][3]
            tie = self.draining.pop(0)[1:3]
            self.add(inst, tie, now)
        out = [entry[:4] for entry in self.steady[:few]]
        for free_at, chance, age, inst, floor_at in self.draining[:few]:
            # Of those behind the first some may be at their floor by now.
            seconds = free_at - now if floor_at > now else free_at - floor_at
            out.append((seconds, chance, age, inst))
        return out
