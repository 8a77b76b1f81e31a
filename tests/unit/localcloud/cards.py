"""A machine with one offer, as tests of the market need it."""

from typing import Any

from localcloud.machines import Machine
from localcloud.offers import Slot, offer

CARD = Machine(7, "RTX 4090", 0.50, slots=2, storage_usd_gb_month=0.72, geolocation="Norway, NO")


def row(**other: Any) -> dict[str, Any]:
    return offer(Slot(CARD, 0, 500.0), 40.0, 0.0, bid=False) | other
