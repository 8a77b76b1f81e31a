"""What can be rented now, for an operator: the cloud is asked at most every half minute."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from fleet.candidates import candidates
from fleet.commands import Command, LookForOffers, Performed
from fleet.market import sorted_out
from fleet.outside.turns import Autoscaler
from vast.rows import Offer

log = logging.getLogger("autoscaler")

KEPT_S = 30.0
"""Seconds for which an answer holds: a search is a call of the command line, which the cloud counts."""

OFFERS_SHOWN = 40
"""The cheapest for their work."""


class MarketView:
    """Looks at the market for an operator; any thread may call, and waits for the cloud."""

    def __init__(self, scaler: Autoscaler, perform: Callable[[Command], Performed]) -> None:
        """Look by that function. scaler: knows the profile, and the machines that are not to be rented."""
        self._scaler = scaler
        self._perform = perform
        self._lock = threading.Lock()
        self._looked: tuple[float, tuple[Offer, ...]] | None = None

    def offers(self) -> dict[str, Any]:
        """Return the offers, the cheapest for its work first, as JSON for people.

        Raises LookupError with what the cloud said when the search failed.
        """
        with self._lock:
            now = self._scaler.clock()
            if self._looked is None or now - self._looked[0] > KEPT_S:
                found = self._perform(LookForOffers("an operator looks at the market"))
                if found.offers is None:
                    raise LookupError(found.why or "the search failed")
                self._looked = now, found.offers
            at, offers = self._looked
        with self._scaler.lock:
            fleet = self._scaler.instances
            avoided = dict(fleet.market.bad_machines)
        wanted, refused = sorted_out(offers, fleet.profile, fleet.preferences)
        cheapest = candidates(wanted, fleet.profile)[:OFFERS_SHOWN]
        shown = [c.shown() | {"avoided": avoided.get(c.offer.machine_id, now) > now} for c in cheapest]
        return {"at": at, "found": len(wanted), "refused": dict(refused), "offers": shown}
