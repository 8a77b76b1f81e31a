"""The hard limits on instances and dollars per hour, and the guard that alone checks them."""

from collections.abc import Iterable
from dataclasses import dataclass

from fleet.instance import Instance


@dataclass(frozen=True)
class Limits:
    """The hard limits on the fleet. Instances that failed or are being destroyed count until gone."""

    max_instances: int = 8
    max_usd_h: float = 10.0
    max_creates_per_turn: int = 4


@dataclass(frozen=True)
class Commitment:
    """The instances and $/h of the fleet if every order goes through, to hold against the hard limits."""

    instances: int
    usd_h: float


def commitment(instances: Iterable[Instance], vanished_usd_h: Iterable[float]) -> Commitment:
    """Return how many instances there may be and what they may cost together, in $/h.

    vanished_usd_h: prices of instances that vanished lately, which may still exist.
    """
    prices, vanished = [i.committed_usd_h for i in instances], list(vanished_usd_h)
    return Commitment(len(prices) + len(vanished), sum(prices) + sum(vanished))


class LimitGuard:
    """Admits the orders of one decision while the hard limits leave room; the only place that checks them."""

    def __init__(self, limits: Limits, committed: Commitment, notes: list[str]) -> None:
        """Begin with what is committed already. notes: gets a sentence for each order that is refused."""
        self._limits = limits
        self._notes = notes
        self._instances, self._usd_h = committed.instances, committed.usd_h

    def admit_start(self, more_usd_h: float) -> bool:
        """Return whether an instance may be started that then costs more_usd_h more; if so, count that."""
        return self._admit("start", more_usd_h)

    def admit_create(self, usd_h: float) -> bool:
        """Return whether an instance may be rented at that price; if so, count it."""
        most = self._limits.max_instances
        if self._instances + 1 > most:
            self._notes.append(f"create refused: {self._instances} of {most} instances")
            return False
        if not self._admit("create", usd_h):
            return False
        self._instances += 1
        return True

    def _admit(self, what: str, more_usd_h: float) -> bool:
        most = self._limits.max_usd_h
        if self._usd_h + more_usd_h > most + 1e-9:
            self._notes.append(f"{what} refused: {self._usd_h:.3f} + {more_usd_h:.3f} $/h is over {most:g}")
            return False
        self._usd_h += more_usd_h
        return True
