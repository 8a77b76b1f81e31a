"""The hard limits on instances and dollars per hour, and the guard that alone checks them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fleet.budget import CreateCost
from fleet.instance import Instance
from fleet.purse import Purse
from fleet.states import GIVEN_UP
from vast.rows import Offer


@dataclass(frozen=True)
class Limits:
    """The hard limits on the fleet. Instances that failed or are being destroyed count until gone.

    budget_usd_day, budget_usd_month: fleet/budget.py; None: no such budget. min_credit_hours: nothing is
    rented while the account's credit lasts for less.
    """

    max_instances: int = 8
    max_usd_h: float = 10.0
    max_creates_per_turn: int = 4
    budget_usd_day: float | None = None
    budget_usd_month: float | None = None
    min_credit_hours: float = 0.0


@dataclass(frozen=True)
class Commitment:
    """The instances and $/h of the fleet if every order goes through, to hold against the hard limits.

    by_host: instances by the host_id of their machine, without those that are given up.
    """

    instances: int
    usd_h: float
    by_host: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


def commitment(instances: Iterable[Instance], vanished_usd_h: Iterable[float]) -> Commitment:
    """Return how many instances there may be and what they may cost together, in $/h.

    vanished_usd_h: prices of instances that vanished lately, which may still exist.
    """
    there, vanished = list(instances), list(vanished_usd_h)
    usd_h = sum(i.committed_usd_h for i in there) + sum(vanished)
    kept = Counter(i.host_id for i in there if i.host_id is not None and i.state not in GIVEN_UP)
    return Commitment(len(there) + len(vanished), usd_h, kept)


class LimitGuard:
    """Admits the orders of one decision while the hard limits leave room; the only place that checks them."""

    def __init__(self, limits: Limits, committed: Commitment, notes: list[str], purse: Purse) -> None:
        """Begin with what is committed already. notes: gets a sentence for each order that is refused.

        purse: what budgets and credit allow.
        """
        self._by_host = Counter(committed.by_host)
        self._limits = limits
        self._notes = notes
        self._purse = purse
        self._admitted: list[CreateCost] = []
        self._instances, self._usd_h = committed.instances, committed.usd_h

    def admit_start(self, more_usd_h: float) -> bool:
        """Return whether an instance may be started that then costs more_usd_h more; if so, count that."""
        if refusal := self._too_dear(more_usd_h):
            self._notes.append(f"start refused: {refusal}")
            return False
        self._usd_h += more_usd_h
        return True

    def has_room_at(self, host_id: int | None, most: int | None) -> bool:
        """Return whether a host that may have `most` instances has room for one more; None: any number."""
        return most is None or host_id is None or self._by_host[host_id] < most

    def admit_create(self, offer: Offer) -> bool:
        """Return whether that offer may be rented at its price; if so, count it."""
        most, cost = self._limits.max_instances, self._purse.cost_of(offer)
        if self._instances + 1 > most:
            refusal: str | None = f"{self._instances} of {most} instances"
        else:
            refusal = self._too_dear(offer.dph_total) or self._purse.refusal(
                cost, self._usd_h + offer.dph_total, self._admitted
            )
        if refusal is not None:
            self._notes.append(f"create refused: {refusal}")
            return False
        self._instances += 1
        self._usd_h += offer.dph_total
        self._admitted.append(cost)
        if offer.host_id is not None:
            self._by_host[offer.host_id] += 1
        return True

    def _too_dear(self, more_usd_h: float) -> str | None:
        most = self._limits.max_usd_h
        if self._usd_h + more_usd_h > most + 1e-9:
            return f"{self._usd_h:.3f} + {more_usd_h:.3f} $/h is over {most:g}"
        return None
