"""The instances that can serve, by class of speed, ordered by when they will have drained their work.

There is one order per class of speed, because an idle fast instance and an idle slow one have the same
`free_at` and are not equally good: the first few of each class are looked at. An order is two sorted lists
whose keys do not age, so a choice costs O(log n) comparisons: the instances that drain, by `free_at`, and
those at their floor or idle, by seconds of work. An instance crosses from the first to the second when it is
met there, once per change. A place is found by bisection; to make room for it is one move of memory, 80 kB
for 10,000 instances.
"""

import math
import random
from bisect import bisect_left, insort
from itertools import count

from dispatch.instance import FLOOR, ServingInstance

Entry = tuple[float, float, int, ServingInstance, float]
"""(key, random, number, instance, when it is at its floor): ties are broken by chance, then by age."""

Candidate = tuple[float, float, int, ServingInstance]
"""(seconds of work left, random, number, instance)."""

AT_FLOOR = -math.inf


class SpeedClass:
    """The instances of one class of speed that can serve, in two lists ordered by the work they have left."""

    __slots__ = ("draining", "steady")

    def __init__(self) -> None:
        """Start without instances."""
        self.draining: list[Entry] = []  # by free_at
        self.steady: list[Entry] = []  # by seconds of work: at their floor, or idle

    def add(self, inst: ServingInstance, chance: float, number: int, now: float) -> Entry:
        """Insert an instance, which must not be in this class yet; return its entry, by which it is removed.

        chance, number: what breaks ties between instances with equal work.
        """
        floor_s = FLOOR * (inst.leased_work + inst.other_work) / inst.throughput
        floor_at = inst.free_at - floor_s
        if floor_at <= now:
            entry = (floor_s, chance, number, inst, AT_FLOOR)
            insort(self.steady, entry)
        else:
            entry = (inst.free_at, chance, number, inst, floor_at)
            insort(self.draining, entry)
        return entry

    def remove(self, entry: Entry) -> None:
        """Remove the entry of an instance, which must be in this class."""
        entries = self.steady if entry[4] == AT_FLOOR else self.draining
        del entries[bisect_left(entries, entry)]


class CandidateIndex:
    """The instances that can serve, ordered within each class of speed by the work they have left."""

    def __init__(self, rng: random.Random) -> None:
        """Start without instances. rng: breaks ties between instances with equal work."""
        self._rng = rng
        self._numbers = count()
        self._classes: dict[tuple[int, int], SpeedClass] = {}
        self._places: dict[ServingInstance, tuple[SpeedClass, Entry]] = {}

    def __contains__(self, inst: ServingInstance) -> bool:
        """Return whether the instance is in the index."""
        return inst in self._places

    @property
    def classes(self) -> int:
        """The number of classes of speed; instances of one class work about equally fast."""
        return len(self._classes)

    def update(self, inst: ServingInstance, now: float) -> None:
        """Index an instance anew after any change: in its class of speed, or nowhere when it cannot serve."""
        place = self._places.pop(inst, None)
        if place is not None:
            place[0].remove(place[1])
        if not inst.can_serve:
            return
        speed_class = self._classes.get(inst.speed_class)
        if speed_class is None:
            speed_class = self._classes[inst.speed_class] = SpeedClass()
        entry = speed_class.add(inst, self._rng.random(), next(self._numbers), now)
        self._places[inst] = speed_class, entry

    def discard(self, inst: ServingInstance) -> None:
        """Remove an instance from the index if it is there."""
        place = self._places.pop(inst, None)
        if place is not None:
            place[0].remove(place[1])

    def first(self, few: int, now: float) -> list[Candidate]:
        """Return the instances with least work: of each class of speed the first `few` of both lists."""
        out: list[Candidate] = []
        for speed_class in self._classes.values():
            draining, steady = speed_class.draining, speed_class.steady
            while draining and draining[0][4] <= now:
                _, chance, number, inst, _ = draining.pop(0)
                self._places[inst] = speed_class, speed_class.add(inst, chance, number, now)
            out += [entry[:4] for entry in steady[:few]]
            for free_at, chance, number, inst, floor_at in draining[:few]:
                # Those behind the first may be at their floor by now.
                seconds = free_at - now if floor_at > now else free_at - floor_at
                out.append((seconds, chance, number, inst))
        return out

    def drop_empty_classes(self) -> None:
        """Forget the classes of speed that have no instances."""
        self._classes = {key: c for key, c in self._classes.items() if c.draining or c.steady}
