"""The contract of one rental: when it ends, and what its host asks for going on (vast-contract 6, row 14).

    begins ──────────────── the host asks for more ─── ends ─────────── deleted
                             pending until accepted      stopped, and      with its disk
                             or rejected                 no start

A host that raises its price does not change a contract that runs: an accepted increase holds from its end on
and makes it longer. A rejected or unanswered one lets it end. Times are epoch seconds.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from localcloud.machines import DAY_S, Machine
from localcloud.realism import Realism

DELETED_AFTER_S = 48 * 3600.0
"""Seconds after the end of a contract, or of the credit without a card, until the disk is deleted."""

ASKS_BEFORE_S = 3 * DAY_S
"""Seconds before the end of a contract at which a host asks for more; at the latest in the middle of it."""


LEAST_DAYS = 0.01
"""Days that a contract lasts at least, however fast the cloud is."""


def with_terms(machine: Machine, realism: Realism, speedup: float) -> Machine:
    """Return the machine with the terms that hold: contracts that end do so sooner in a fast cloud."""
    days = max(LEAST_DAYS, machine.rental_days / speedup) if realism.contract_ends else machine.rental_days
    usd_gb = machine.inet_usd_gb if realism.bandwidth else 0.0
    return replace(machine, rental_days=days, inet_usd_gb=usd_gb)


class ContractEvent(StrEnum):
    """What happens to a contract as time passes."""

    ASKS = "host asks"
    ENDS = "contract ends"


@dataclass(frozen=True)
class AskedPrice:
    """A higher price that a host asks for from the end of a contract on, $/h. number: to answer it by."""

    number: int
    gpu_usd_h: float
    old_gpu_usd_h: float
    asked_at: float
    new_end_at: float


class Contract:
    """One contract; who owns the rental carries out what it says."""

    def __init__(self, number: int, machine: Machine, realism: Realism, speedup: float, now: float) -> None:
        """Begin a contract now. number: of the rental. speedup: divides its times where it ends at all."""
        self._machine = machine
        self._number = number
        self._share = realism.price_increase
        self._ends = realism.contract_ends
        self._divisor = speedup if realism.contract_ends else 1.0
        self._asks = 0
        self.end_at = now + self._lasts_s
        self.ended_at: float | None = None
        self.pending: AskedPrice | None = None
        self.accepted: AskedPrice | None = None
        before_s = min(ASKS_BEFORE_S / self._divisor, self._lasts_s / 2.0)
        self._asks_at = self.end_at - before_s if self._share > 0.0 else None

    @property
    def _lasts_s(self) -> float:
        return self._machine.rental_days * DAY_S

    @property
    def deleted_at(self) -> float | None:
        """When the disk is deleted; None while the contract lasts."""
        return None if self.ended_at is None else self.ended_at + DELETED_AFTER_S / self._divisor

    def next_event(self) -> tuple[float, str] | None:
        """Return what happens next to it as (time, name); None for nothing."""
        events = []
        if self._asks_at is not None:
            events.append((self._asks_at, str(ContractEvent.ASKS)))
        if self._ends and self.ended_at is None:
            events.append((self.end_at, str(ContractEvent.ENDS)))
        return min(events, default=None)

    def end_in(self, seconds: float, now: float) -> None:
        """Let the contract end so soon, whatever was agreed."""
        self._ends, self.end_at = True, min(self.end_at, now + seconds)

    def ask(self, share: float | None, gpu_usd_h: float, now: float) -> None:
        """Have the host ask for that share more; None: for its usual share."""
        self._asks_at = None
        self._asks += 1
        more = self._share if share is None else share
        number = 100 * self._number + self._asks
        self.pending = AskedPrice(
            number, gpu_usd_h * (1.0 + more), gpu_usd_h, now, self.end_at + self._lasts_s
        )

    def answer(self, *, accept: bool) -> None:
        """Accept the increase that is asked for, or reject it."""
        self.accepted = self.pending if accept else self.accepted
        self.pending = None

    def end(self, now: float) -> AskedPrice | None:
        """Come to the end: return the increase at which it goes on, None where it is over."""
        going_on, self.accepted, self.pending = self.accepted, None, None
        if going_on is None:
            self.ended_at = now
        else:
            self.end_at = going_on.new_end_at
        return going_on
