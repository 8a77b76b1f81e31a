"""The cloud model: the rentals, the slots of machines that they hold, and what time brings.

    Cloud ── which rental gets a slot, in which order things happen
      ├── Rental (one each)   phases, boots, times; its Bill
      ├── Account             credit, dollars spent, ssh keys
      └── Faults              what goes wrong, by name

Pure: nothing here does I/O. What must happen in the world comes out of `take_effects`, and what happened
there is told by `booted`, `boot_failed` and `crashed`. A rental holds its slot of the machine from creation
until it is stopped or outbid, and must wait for a slot to start again.

Invariants
- No slot has two holders.
- All chance comes from the generator passed in, which seeds one for each rental.
"""

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from localcloud.account import Account
from localcloud.contract import DELETED_AFTER_S, with_terms
from localcloud.durations import Downloads, Times
from localcloud.effects import Effect, End, Moved
from localcloud.faults import Faults
from localcloud.images import with_its_tag
from localcloud.machines import Machine
from localcloud.offers import Slot, min_bid
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import WAITING, Phase
from localcloud.query import Query
from localcloud.realism import NONE, Realism
from localcloud.rental import RECHECK_S, Rental
from localcloud.rental_state import Surroundings
from localcloud.renters import OtherRenters

T = TypeVar("T")


class Cloud:
    """The cloud model: all rentals of one account, without any I/O.

    Methods that take `now` (epoch seconds) first carry out what was due by then.
    """

    def __init__(
        self,
        machines: Iterable[Machine],
        rng: random.Random,
        *,
        speedup: float = 1.0,
        times: Times | None = None,
        faults: Faults | None = None,
        credit_usd: float = 100.0,
        first_id: int = 1001,
        realism: Realism = NONE,
    ) -> None:
        """Make a cloud of these machines in which nothing is rented yet.

        rng: the source of all chance. speedup divides the times, not prices; first_id: the first rental's
        number. realism: how unkind it is.
        """
        self.machines = {m.machine_id: with_terms(m, realism, speedup) for m in machines}
        self._slices = {m.machine_id: m.slices() for m in self.machines.values()}
        # Alone in the market no chance is drawn for others: seeded runs stay as they are.
        crowd = random.Random(rng.getrandbits(64)) if realism.crowded else random.Random(0)
        self._others = OtherRenters(self.machines.values(), realism, speedup, crowd)
        self.speedup = speedup
        self.realism = realism
        self.faults = faults or Faults()
        self.account = Account(credit_usd, self.faults)
        self.rentals: dict[int, Rental] = {}
        self.destroyed = 0
        self._rng = rng
        self._next_id = first_id
        self._effects: list[Effect] = []
        self._surroundings = Surroundings(
            times or Times(),
            speedup,
            self.faults,
            self.account,
            self._effects.append,
            Downloads(speedup),
            realism,
        )

    # -- time, and what the outside world reports -----------------------------------------------------

    def sample(self, rows: Sequence[T], count: int) -> list[T]:
        """Return `count` of the rows, chosen at random in each call, in their order."""
        return [rows[n] for n in sorted(self._rng.sample(range(len(rows)), count))]

    def take_effects(self) -> list[Effect]:
        """Return what must be done to the real processes since the last call, in order."""
        effects = self._effects.copy()
        self._effects.clear()
        return effects

    def next_event(self, now: float) -> float | None:
        """Return by when `advance` must be called again; None when nothing is under way."""
        times = [event[0] for r in self.rentals.values() if (event := r.next_event())]
        if any(r.phase in WAITING for r in self.rentals.values()):
            times.append(now + RECHECK_S)
        ends = (
            self.faults.next_end(),
            self.account.lasts_until(self.burn_usd_h(), now),
            *(r.contract.deleted_at for r in self.rentals.values()),
        )
        return min((*times, *(at for at in ends if at is not None)), default=None)

    def advance(self, now: float) -> None:
        """Carry out everything that was due until now, in the order of its times."""
        while True:
            due = [
                (event, r.id)
                for r in self.rentals.values()
                if (event := r.next_event()) is not None and event[0] <= now
            ]
            if not due:
                break
            (at, what), rental_id = min(due)
            self.rentals[rental_id].happen(what, at, now)
        self._others.advance(now, self._held_on_demand, self._clear)
        self.faults.expire(now)
        for r in self.rentals.values():
            r.settle(now)
        if self.account.note_credit(now):
            for r in self.rentals.values():
                if r.phase not in (Phase.STOPPED, Phase.STOPPING) or r.wanted:
                    r.stop(now, "stopped: the account has no credit")
        for r in self.rentals.values():
            r.follow_faults(now)
        self._delete_ended(now)
        self._give_slots(now)

    def _delete_ended(self, now: float) -> None:
        """Delete the rentals whose contract, or whose account's credit, ended two days ago."""
        gone = self.account.gone_since if self.realism.no_card else None
        unpaid = gone is not None and now >= gone + DELETED_AFTER_S / self.speedup
        for number, r in list(self.rentals.items()):
            if unpaid or (r.contract.deleted_at is not None and now >= r.contract.deleted_at):
                why = "the account has no credit and no card" if unpaid else "its contract has ended"
                self._end(self.rentals.pop(number), why, now)

    def booted(self, rental_id: int, boot: int, ports: Mapping[str, int], now: float) -> None:
        """Note that the processes of a rental's boot run and have these ports.

        Ignored if no such boot is awaited.
        """
        self.advance(now)
        if rental_id in self.rentals:
            self.rentals[rental_id].booted(boot, ports, now)

    def boot_failed(self, rental_id: int, boot: int, why: str, now: float) -> None:
        """Note that the host could not start the processes of a rental's boot.

        Ignored if no such boot is awaited.
        """
        self.advance(now)
        if rental_id in self.rentals:
            self.rentals[rental_id].boot_failed(boot, why, now)

    def crashed(self, rental_id: int, boot: int, now: float) -> None:
        """Note that all processes of a rental's boot ended although the cloud did not order it."""
        self.advance(now)
        if rental_id in self.rentals:
            self.rentals[rental_id].crashed(boot, now)

    # -- what its owner may ask -----------------------------------------------------------------------

    def search(self, query: Query, now: float) -> list[dict[str, Any]]:
        """Return the offers that match a query, as the service shows them."""
        self.advance(now)
        offered = (self._others.offered(m, now) for m in self.machines.values())
        return query.answer((slot for m in offered for slot in self.slots(m)), now)

    def create(self, offer_id: int, order: Order, now: float) -> int:
        """Rent the offer of that id; return the new rental's id. Raises CloudRefusal."""
        self.advance(now)
        machine = self.machines.get(offer_id // 100)
        index = offer_id % 100
        if machine is None or index >= len(self._slices[machine.machine_id]):
            raise CloudRefusal(
                404,
                "invalid_args",
                f"error 404/3603: no_such_ask Instance type by id {offer_id} is not available.",
                ask_id=offer_id,
            )
        slot = self.slots(self._others.offered(machine, now))[index]
        most = self.realism.spend_limit_usd_h
        self.account.check_create(offer_id, self.burn_usd_h() + slot.machine.usd_h, most, now)
        if order.disk_gb > slot.free_disk_gb:
            raise CloudRefusal(
                400,
                "invalid_args",
                f"error 400/3467: Invalid args: disk {order.disk_gb:g} GB, {slot.free_disk_gb:g} available",
                ask_id=offer_id,
            )
        place = self._slices[machine.machine_id][index]
        if not slot.rented and self._others.are_faster():
            self._others.move_in(machine, place, now, self._clear)
            slot = replace(slot, rented=True)
        gets_it = not slot.rented and (order.price is None or order.price >= min_bid(slot))
        if self.faults.strikes("create-410", now) is not None or (order.cancel_unavail and not gets_it):
            raise CloudRefusal(
                410,
                "no_such_ask",
                f"error 410/3907: no_such_ask Instance type {offer_id} is no longer available.",
                ask_id=offer_id,
            )
        if gets_it:
            self._clear(machine, place.places, now)
        chance = random.Random(self._rng.getrandbits(64))
        order = replace(order, image=with_its_tag(order.image, slot.machine))
        rental = Rental(
            self._next_id, order, slot.machine, index if gets_it else None, self._surroundings, chance, now
        )
        self._next_id += 1
        self.rentals[rental.id] = rental
        return rental.id

    @contextmanager
    def changing(self, rental_id: int, now: float) -> Iterator[Rental]:
        """Give a rental, as of now, to the call of its customer that runs inside this context.

        Then free slots are handed out. Raises CloudRefusal when there is no such rental.
        """
        self.advance(now)
        if rental_id not in self.rentals:
            raise CloudRefusal(404, "no_such_instance", f"Instance {rental_id} not found.")
        yield self.rentals[rental_id]
        self._give_slots(now)

    def change_bid(self, rental_id: int, price: float | None, now: float) -> None:
        """Change the bid of an interruptible rental, $/h.

        None bids the least that wins. Raises CloudRefusal, also for a rental on demand.
        """
        with self.changing(rental_id, now) as rental:
            # With all slots rented on demand no bid wins now; its own stands until one is free.
            bids = [
                min_bid(slot)
                for slot in self._slots_for(rental)
                if not slot.rented or slot.index == rental.slot
            ]
            rental.change_bid(price, min(bids, default=0.0), now)

    def destroy(self, rental_id: int, now: float) -> None:
        """End a rental and delete its disk; its dollars stay spent. Raises CloudRefusal."""
        self.advance(now)
        rental = self.rentals.pop(rental_id, None)
        if rental is None:
            raise CloudRefusal(404, "not_found", f"Instance {rental_id} not found.")
        self._end(rental, "destroyed", now)
        self._give_slots(now)

    def _end(self, rental: Rental, why: str, now: float) -> None:
        rental.settle(now)
        self.account.close_bill(rental.bill)
        self.destroyed += 1
        self._effects += [
            End(rental.id, wipe=True),
            Moved(rental.id, rental.phase, "gone", why, now - rental.since),
        ]

    def burn_usd_h(self) -> float:
        """Return what all rentals together cost now, $/h."""
        return sum(sum(r.usd_h_now()) for r in self.rentals.values())

    # -- slots ----------------------------------------------------------------------------------------

    def slots(self, machine: Machine) -> list[Slot]:
        """Return what can be rented of the machine, as it is now, by index; priced as the machine is."""
        here = [r for r in self.rentals.values() if r.machine.machine_id == machine.machine_id]
        slices = self._slices[machine.machine_id]
        others = self._others.held(machine)
        free_disk_gb = machine.disk_gb * (1.0 - len(others) / machine.slots) - sum(
            r.order.disk_gb for r in here
        )
        bids = [(slices[r.slot].places, r.bill.bid) for r in here if r.slot is not None]
        slots = []
        for part in slices:
            held = [bid for places, bid in bids if not set(places).isdisjoint(part.places)]
            slots.append(
                Slot(
                    machine.share(part.count),
                    part.index,
                    free_disk_gb,
                    rented=None in held or not set(others).isdisjoint(part.places),
                    holder_bid=sum(bid for bid in held if bid is not None) if held else None,
                )
            )
        return slots

    def _slots_for(self, r: Rental) -> list[Slot]:
        """Return the slots of a rental's machine that are as large as what it rents."""
        slots = self.slots(self.machines[r.machine.machine_id])
        return [slot for slot in slots if slot.machine.num_gpus == r.machine.num_gpus]

    def _held_on_demand(self, machine: Machine) -> set[int]:
        """Return the slots of a machine that rentals on demand hold."""
        slices = self._slices[machine.machine_id]
        return {
            place
            for r in self.rentals.values()
            if r.slot is not None and r.bill.bid is None and r.machine.machine_id == machine.machine_id
            for place in slices[r.slot].places
        }

    def _give_slots(self, now: float) -> None:
        """Give free slots to the rentals that wait: on demand first, then by bid, then by time."""
        waiting = [r for r in self.rentals.values() if r.phase in WAITING]
        for r in sorted(waiting, key=lambda r: (r.bill.bid is not None, -(r.bill.bid or 0.0), r.since, r.id)):
            if self.faults.strikes("outbid", now, r.on_boot) is not None:
                continue
            if self.faults.strikes("start-waits", now, (r.id, r.boot + 1)) is not None:
                continue
            fitting = [
                slot
                for slot in self._slots_for(r)
                if not slot.rented and (r.bill.bid is None or r.bill.bid >= min_bid(slot))
            ]
            if fitting:
                slot = min(fitting, key=lambda slot: (slot.holder_bid or 0.0, slot.index))
                machine_id = r.machine.machine_id
                self._clear(r.machine, self._slices[machine_id][slot.index].places, now)
                r.take_slot(slot.index, now)

    def _clear(self, machine: Machine, places: Collection[int], now: float) -> None:
        """Take slots of a machine from the rentals that hold any of them."""
        slices = self._slices[machine.machine_id]
        for r in self.rentals.values():
            if r.slot is None or r.machine.machine_id != machine.machine_id:
                continue
            if not set(places).isdisjoint(slices[r.slot].places):
                r.lose_slot(now)
