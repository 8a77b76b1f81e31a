"""What can be rented now, for an operator: the cloud is asked at most every half minute."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from engine.profiles import Profile
from fleet.commands import Command, LookForOffers, Performed
from fleet.market import ranked, usd_per_million_work
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
            profile = self._scaler.instances.profile
            avoided = dict(self._scaler.instances.market.bad_machines)
        cheapest = ranked(offers, profile)[:OFFERS_SHOWN]
        return {"at": at, "found": len(offers), "offers": [_row(o, profile, avoided, now) for o in cheapest]}


def _row(o: Offer, profile: Profile, avoided: dict[int, float], now: float) -> dict[str, Any]:
    return {
        "offer": o.id,
        "machine": o.machine_id,
        "gpu_name": o.gpu_name,
        "num_gpus": o.num_gpus,
        "place": o.geolocation,
        "usd_h": round(o.dph_total, 5),
        "usd_per_million_work": round(usd_per_million_work(o, profile), 4),
        "reliability": o.reliability,
        "inet_down_mbps": o.inet_down_mbps,
        "days": None if o.duration_s is None else round(o.duration_s / 86_400.0, 1),
        "avoided": avoided.get(o.machine_id, now) > now,
    }
