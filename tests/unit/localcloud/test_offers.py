"""Offers and their prices."""

import pytest

from localcloud.offers import Slot, min_bid, offer
from tests.unit.localcloud.cards import CARD, row


def test_the_price_of_an_offer_has_the_disk_in_it() -> None:
    priced = row()
    assert (priced["dph_base"], priced["storage_total_cost"]) == pytest.approx((0.5, 0.04))
    assert priced["dph_total"] == priced["search"]["totalHour"] == pytest.approx(0.54)


def test_a_bid_pays_less_and_must_beat_who_is_there() -> None:
    assert min_bid(Slot(CARD, 0, 500.0)) == pytest.approx(0.25)
    assert min_bid(Slot(CARD, 0, 500.0, holder_bid=0.40)) == pytest.approx(0.401)
    assert offer(Slot(CARD, 0, 500.0), 40.0, 0.0, bid=True)["dph_base"] == pytest.approx(0.25)
