"""The customer's account, its dollars and ssh keys, and the bill of each rental."""

from localcloud.charges import RentalCharges
from localcloud.faults import Faults
from localcloud.machines import Machine
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import BILLS


class Account:
    """The customer's credit, dollars spent by what they were spent on, and ssh keys.

    Times are epoch seconds.
    """

    def __init__(self, credit_usd: float, faults: Faults) -> None:
        """Make an account with that many dollars of credit and no ssh keys."""
        self.ssh_keys: dict[int, tuple[str, float]] = {}
        self.secrets: dict[str, str] = {}
        self._credit_usd = credit_usd
        self._faults = faults
        self._open_bills: list[Bill] = []
        self.charges: dict[int, RentalCharges] = {}  # of all rentals so far, by number
        self.gone_since: float | None = None  # the credit
        self._ended_usd = dict.fromkeys(BILLS, 0.0)
        self._ended_gpu_usd = 0.0

    def credit_usd(self, now: float) -> float:
        """Return the dollars left to spend; 0 while the fault credit-zero is on."""
        return 0.0 if self._faults.strikes("credit-zero", now) is not None else self._credit_usd

    def lasts_until(self, burn_usd_h: float, now: float) -> float | None:
        """Return when the credit is used up at that rate, $/h; None for never, or if it is already."""
        if burn_usd_h <= 0 or self._credit_usd <= 0:
            return None
        return now + self._credit_usd / burn_usd_h * 3600.0

    def note_credit(self, now: float) -> bool:
        """Return whether the credit is gone now; since when is kept."""
        gone = self.credit_usd(now) <= 0
        self.gone_since = (now if self.gone_since is None else self.gone_since) if gone else None
        return gone

    def check_create(self, offer_id: int, usd_h: float, most_usd_h: float, now: float) -> None:
        """Raise CloudRefusal where the account may not rent that offer. usd_h: what it then spends an hour.

        most_usd_h: what it may spend; 0 for any.
        """
        if self.credit_usd(now) <= 0:
            text = "error 400/3470: insufficient credit"
            raise CloudRefusal(400, "insufficient_credit", text, ask_id=offer_id)
        if most_usd_h and usd_h > most_usd_h:
            text = f"error 400/3471: spend_rate_limit: new accounts may spend ${most_usd_h:.2f}/h"
            raise CloudRefusal(400, "spend_rate_limit", text, ask_id=offer_id)

    def open_bill(self, number: int, machine: Machine, order: Order, now: float) -> "Bill":
        """Return the bill of a rental that begins now, whose number that is."""
        charges = self.charges[number] = RentalCharges(number, order.label)
        bill = Bill(self, machine, order, charges, now)
        self._open_bills.append(bill)
        return bill

    def close_bill(self, bill: "Bill") -> None:
        """Add the dollars of a rental that has ended to the totals of ended rentals."""
        self._open_bills.remove(bill)
        for state, usd in bill.usd.items():
            self._ended_usd[state] += usd
        self._ended_gpu_usd += bill.gpu_usd

    def charge(self, usd: float) -> None:
        """Take that many dollars from the credit."""
        self._credit_usd -= usd

    def spent_usd(self) -> dict[str, float]:
        """Return the dollars of all rentals so far, by state, in total, and for GPUs."""
        spent = {
            state: self._ended_usd[state] + sum(b.usd[state] for b in self._open_bills) for state in BILLS
        }
        gpu = self._ended_gpu_usd + sum(b.gpu_usd for b in self._open_bills)
        return spent | {"total": sum(spent.values()), "gpu": gpu}

    def add_key(self, key: str, now: float) -> int:
        """Add an ssh key for rentals from now on; return its number, the old one for a known key."""
        for number, (known, _) in self.ssh_keys.items():
            if known == key:
                return number
        number = max(self.ssh_keys, default=0) + 1
        self.ssh_keys[number] = (key, now)
        return number

    def set_secret(self, name: str, value: str) -> None:
        """Set a secret variable for containers from now on."""
        self.secrets[name] = value

    def delete_secret(self, name: str) -> None:
        """Delete a secret variable; containers that are there keep it."""
        self.secrets.pop(name, None)

    def change_key(self, number: int, key: str) -> None:
        """Replace one ssh key; raise CloudRefusal for one that the account does not have."""
        self.ssh_keys[number] = (key, self._key(number)[1])

    def remove_key(self, number: int) -> None:
        """Remove an ssh key, for rentals from now on; raise CloudRefusal if it is not there."""
        self._key(number)
        del self.ssh_keys[number]

    def key(self, number: int) -> str:
        """Return an ssh key of the account; raise CloudRefusal if it is not there."""
        return self._key(number)[0]

    def _key(self, number: int) -> tuple[str, float]:
        if number not in self.ssh_keys:
            raise CloudRefusal(404, "not_found", f"error 404/3301: ssh key {number} not found")
        return self.ssh_keys[number]

    @property
    def public_keys(self) -> tuple[str, ...]:
        """The account's ssh keys in the order in which they were added."""
        return tuple(key for key, _ in self.ssh_keys.values())


class Bill:
    """What one rental costs: its prices, and the dollars charged so far by the state they were charged in."""

    def __init__(
        self, account: Account, machine: Machine, order: Order, charges: RentalCharges, now: float
    ) -> None:
        """Open the bill of a rental that begins now; its dollars are taken from that account."""
        self.bid = order.price  # $/h; None on demand
        self.storage_usd_h = machine.storage_usd_h(order.disk_gb)
        self.usd = dict.fromkeys(BILLS, 0.0)
        self.gpu_usd = 0.0
        self._account = account
        self._on_demand_usd_h = machine.usd_h
        self._charges = charges
        self._settled_to = now

    @property
    def gpu_usd_h(self) -> float:
        """The price of the GPUs while the rental runs, $/h."""
        return self._on_demand_usd_h if self.bid is None else self.bid

    def change_bid(self, bid: float) -> float:
        """Change the bid of an interruptible rental, $/h, and return it; the bill must be settled before."""
        self.bid = bid
        return bid

    def reprice(self, gpu_usd_h: float) -> None:
        """Charge another price for the GPUs from now on; the bill must be settled before."""
        self._on_demand_usd_h = gpu_usd_h

    def relabel(self, label: str | None) -> None:
        """Show the rental under that label in the account's charges."""
        self._charges.relabel(label)

    def add_bytes(self, usd_gb: float, gb: float, now: float) -> None:
        """Charge so many GB that came to the rental."""
        usd = usd_gb * gb
        self.usd["traffic"] += usd
        self._charges.add_bytes("bwd", usd, gb, now)
        self._account.charge(usd)

    def settle(self, state: str, gpu_usd_h: float, storage_usd_h: float, now: float) -> None:
        """Charge the rental at these prices, $/h, for the time since the bill was settled last."""
        hours = (now - self._settled_to) / 3600.0
        if hours <= 0:
            return
        usd = (gpu_usd_h + storage_usd_h) * hours
        self.usd[state] += usd
        self.gpu_usd += gpu_usd_h * hours
        self._charges.add_hours("gpu", gpu_usd_h, self._settled_to, now)
        self._charges.add_hours("disk", storage_usd_h, self._settled_to, now)
        self._account.charge(usd)
        self._settled_to = now
