"""Contracts that come to their ends: seen early, replaced before, never a surprise.

    now ─────────── margin: two loads and a start ─────────── drain ─── the contract ends: stopped for ever
         another is rented; it serves on until that one is hot     it drains at the latest

A stopped instance is replaced in the same way, and destroyed once the others hold the model: after the end
its data would be deleted, and until then billed. Offers whose contract is too short for a load and a useful
life are not rented. Times are epoch seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from fleet.instance import Instance
from fleet.states import GIVEN_UP
from vast.rows import Offer

USEFUL_LOADS = 20.0
"""How many times as long as its load an instance must be of use for its load and its bytes to be worth it."""


@dataclass(frozen=True)
class Horizon:
    """How far ahead the end of a contract matters, by the seconds that loads, starts and drains take."""

    load_s: float = 0.0
    start_s: float = 0.0
    drain_s: float = 0.0

    @property
    def margin_s(self) -> float:
        """Seconds before the end of a contract at which another instance is rented."""
        return 2.0 * self.load_s + self.start_s

    def is_ending(self, i: Instance, now: float) -> bool:
        """Return whether another instance must take the place of this one."""
        end_at = i.terms.ends_at
        return end_at is not None and end_at - now <= self.margin_s

    def must_leave(self, i: Instance, now: float) -> bool:
        """Return whether it must go out of service now, so that its requests end before its contract does."""
        end_at = i.terms.ends_at
        return end_at is not None and end_at - now <= min(self.drain_s + self.start_s, self.margin_s / 2.0)

    def is_too_short(self, offer: Offer) -> bool:
        """Return whether the contract of an offer ends before the instance would have been of use."""
        least_s = self.margin_s + USEFUL_LOADS * self.load_s
        return offer.duration_s is not None and offer.duration_s < least_s


def ending(instances: Iterable[Instance], horizon: Horizon, now: float) -> dict[str, str]:
    """Return a sentence for each instance whose contract ends soon, by its label."""
    return {i.label: ends_said(i) for i in instances if i.state not in GIVEN_UP and horizon.is_ending(i, now)}


def ends_said(i: Instance) -> str:
    """Return when the contract of an instance ends, in words."""
    end_at = i.terms.ends_at
    when = "" if end_at is None else f" {datetime.fromtimestamp(end_at, UTC):%Y-%m-%d %H:%M} UTC"
    return f"the contract of {i.id} ends{when}, and another takes its place"
