"""The other customers of the marketplace: they take free GPUs, give them back, and move prices.

    arrivals ── Poisson, for each machine ──► a free slice of it, for a while ──► free again
    price    ── each PRICE_S ──► within ±price_moves of the machine's own

All of it follows from the seed and from which slots our customer holds when somebody comes: what happened by
`now` does not depend on how often it was asked. One that finds no free slice of its size takes a smaller
one, or goes away.
They rent on demand, so an interruptible rental of ours gives way to them.
"""

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from heapq import heappop, heappush

from localcloud.machines import Machine, Slice
from localcloud.realism import Realism

STAY_S = 6 * 3600.0
"""Mean seconds for which another customer keeps a machine. An assumption: no figure is published."""

BEFORE_STAYS = 4.0
"""Stays that have passed when our customer comes, so that the market is in its usual state by then."""

SIZES: tuple[tuple[int, float], ...] = ((1, 0.6), (2, 0.2), (4, 0.12), (8, 0.08))
"""How many slots another customer wants of a machine that is rented in slices, and how often. Assumed."""

PRICE_S = 3 * 3600.0
"""Seconds between two prices of a machine. An assumption."""

Take = Callable[[Machine, Collection[int], float], None]
"""Called with a machine, the slots of it that another customer has just taken, and when."""


class OtherRenters:
    """All other customers of a cloud. Methods that take `now`, epoch seconds, expect it to grow."""

    def __init__(
        self, machines: Iterable[Machine], realism: Realism, speedup: float, rng: random.Random
    ) -> None:
        """Make the customers of these machines; none has come before the first `advance`."""
        self._machines = {m.machine_id: m for m in machines}
        self._realism = realism
        self._speedup = speedup
        self._rng = rng
        self._seed = rng.getrandbits(32) if realism.price_moves else 0
        self._held: dict[int, set[int]] = {}
        self._events: list[tuple[float, int, int, Slice | None]] = []  # an arrival has no slice yet
        self._order = 0
        self._begun_at: float | None = None
        self._priced: dict[int, tuple[int, Machine]] = {}

    def held(self, machine: Machine) -> Collection[int]:
        """Return the slots of a machine that other customers hold now."""
        return self._held.get(machine.machine_id, ())

    def offered(self, machine: Machine, now: float) -> Machine:
        """Return the machine at the price at which it is offered now."""
        most = self._realism.price_moves
        if not most or self._begun_at is None:
            return machine
        period = int((now - self._begun_at) * self._speedup // PRICE_S)
        known = self._priced.get(machine.machine_id)
        if known is None or known[0] != period:
            move = random.Random(f"{self._seed} {machine.machine_id} {period}").uniform(-most, most)
            price = round(machine.usd_gpu_h * (1.0 + move), 4)
            known = self._priced[machine.machine_id] = (period, replace(machine, usd_gpu_h=price))
        return known[1]

    def advance(self, now: float, ours: Callable[[Machine], Collection[int]], take: Take) -> None:
        """Let everybody come and go who was due by now.

        ours: returns the slots of a machine that our customer holds on demand. take: see Take.
        """
        if self._begun_at is None:
            self._begun_at = now
            if self._realism.renters:
                self._open(now)
        while self._events and self._events[0][0] <= now:
            at, _, machine_id, leaving = heappop(self._events)
            machine = self._machines[machine_id]
            if leaving is not None:
                self._held[machine_id].difference_update(leaving.places)
                continue
            self._expect(machine, at)
            free = self._free(machine, ours(machine))
            if free:
                self.move_in(machine, self._rng.choice(free), at, take)

    def are_faster(self) -> bool:
        """Return whether another customer takes the offer that ours has chosen just before it does."""
        share = self._realism.offers_vanish
        return bool(share) and self._rng.random() < share

    def move_in(self, machine: Machine, wanted: Slice, at: float, take: Take) -> None:
        """Let another customer have a slice of a machine from now on, for a while."""
        self._held.setdefault(machine.machine_id, set()).update(wanted.places)
        self._add(at + self._rng.expovariate(1.0) * STAY_S / self._speedup, machine, wanted)
        take(machine, wanted.places, at)

    def _open(self, now: float) -> None:
        """Draw the first customer of each machine, some stays ago."""
        for machine in self._machines.values():
            self._expect(machine, now - BEFORE_STAYS * STAY_S / self._speedup)

    def _expect(self, machine: Machine, after: float) -> None:
        """Draw when the next customer comes to a machine."""
        sizes = self._sizes(machine)
        mean = sum(size * weight for size, weight in sizes) / sum(weight for _, weight in sizes)
        every_s = mean * STAY_S / (self._realism.renters * machine.slots)
        self._add(after + self._rng.expovariate(1.0) * every_s / self._speedup, machine, None)

    def _add(self, at: float, machine: Machine, leaving: Slice | None) -> None:
        self._order += 1
        heappush(self._events, (at, self._order, machine.machine_id, leaving))

    def _free(self, machine: Machine, ours: Collection[int]) -> list[Slice]:
        """Return the free slices of the size that the next customer wants, or of the next smaller one."""
        sizes = self._sizes(machine)
        (size,) = self._rng.choices([s for s, _ in sizes], [w for _, w in sizes])
        taken = {*self.held(machine), *ours}
        free = [s for s in machine.slices() if s.count <= size and taken.isdisjoint(s.places)]
        largest = max((s.count for s in free), default=0)
        return [s for s in free if s.count == largest]

    @staticmethod
    def _sizes(machine: Machine) -> tuple[tuple[int, float], ...]:
        return tuple((s, w) for s, w in SIZES if s == 1 or (machine.sliced and s <= machine.slots))
