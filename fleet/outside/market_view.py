"""What can be rented now, for an operator: the cloud is asked at most every half minute."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from fleet.commands import Command, LookForOffers, Performed
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
        rows = [_row(o, profile.throughput_on(o.gpu_name, o.num_gpus), avoided, now) for o in offers]
        rows.sort(key=lambda row: (row["usd_per_million_work"], row["offer"]))
        return {"at": at, "found": len(rows), "offers": rows[:OFFERS_SHOWN]}


def _row(o: Offer, work_s: float, avoided: dict[int, float], now: float) -> dict[str, Any]:
    return {
        "offer": o.id,
        "machine": o.machine_id,
        "gpu_name": o.gpu_name,
        "num_gpus": o.num_gpus,
        "place": o.geolocation,
        "usd_h": round(o.dph_total, 5),
        "usd_per_million_work": round(o.dph_total / work_s / 3600.0 * 1e6, 4),
        "reliability": o.reliability,
        "inet_down_mbps": o.inet_down_mbps,
        "days": None if o.duration_s is None else round(o.duration_s / 86_400.0, 1),
        "avoided": avoided.get(o.machine_id, now) > now,
    }
