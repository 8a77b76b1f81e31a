"""The market: offers, their prices, and the query language with which they are searched."""

from typing import Any

import pytest

from engine.profiles import PROFILES, get_profile
from localcloud.machines import MACHINES, Machine, machines_from
from localcloud.offers import Slot, min_bid, offer
from localcloud.query import OFFER_LIMIT, BadQuery, Query, in_order, matches
from process.errors import ConfigError

CARD = Machine(7, "RTX 4090", 0.50, slots=2, storage_usd_gb_month=0.72, geolocation="Norway, NO")


def row(**other: Any) -> dict[str, Any]:
    return offer(Slot(CARD, 0, 500.0), 40.0, 0.0, bid=False) | other


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"num_gpus": {"eq": "1"}}, True),
        ({"num_gpus": {"eq": "2"}}, False),
        ({"gpu_ram": {"gte": 22_000.0}}, True),
        ({"gpu_ram": {"gt": 24_564}}, False),
        ({"gpu_ram": {"lte": "24564"}}, True),
        ({"dph_total": {"lt": "0.54"}}, False),
        ({"gpu_name": {"eq": "RTX 4090"}}, True),
        ({"gpu_name": {"in": ["RTX 3090", "RTX 4090"]}}, True),
        ({"machine_id": {"notin": [7, 8]}}, False),
        ({"machine_id": {"neq": "8"}}, True),
        ({"geolocation": {"in": ["NO", "SE"]}}, True),
        ({"geolocation": {"notin": ["NO"]}}, False),
        ({"verified": {"eq": True}}, True),
        ({"rentable": {"eq": "true"}}, True),
        ({"external": {"eq": False}}, True),
        ({"driver_version": {"gte": "535086005"}}, True),
        ({"cluster_id": {"gt": 1}}, False),
        ({"cluster_id": {"eq": None}}, True),
        ({"reliability": {"gt": "0.9", "lt": "0.95"}}, False),
    ],
)
def test_operands_are_read_as_what_the_offer_has_there(filters: dict[str, Any], found: bool) -> None:
    """Numbers travel as text (vast-contract 2.1)."""
    assert matches(row(), filters) is found


@pytest.mark.parametrize(
    "body",
    [
        {"no_such_field": {"eq": 1}},
        {"num_gpus": 1},
        {"num_gpus": {"like": 1}},
        {"num_gpus": {"eq": "many"}},
        {"num_gpus": {"in": "12"}},
        {"num_gpus": {"eq": "nan"}},
        {"rentable": {"eq": "perhaps"}},
        {"order": "score"},
        {"order": [["score"]]},
        {"order": [["score", "up"]]},
        {"limit": 0},
        {"limit": "5"},
        {"type": "free"},
        {"allocated_storage": "much"},
        {"allocated_storage": True},
    ],
)
def test_a_query_that_means_nothing_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadQuery):
        Query.read(body).answer([Slot(CARD, 0, 500.0)], 0.0)


def test_an_answer_is_ordered_and_cut() -> None:
    slots = [Slot(m, s, 500.0) for m in MACHINES for s in range(m.slots)]
    found = Query.read({"order": [["dph_total", "asc"]], "limit": 3}).answer(slots, 0.0)
    prices = sorted(m.usd_h + m.storage_usd_h(5.0) for m in MACHINES for _ in range(m.slots))
    assert [o["dph_total"] for o in found] == pytest.approx(prices[:3])
    assert len(Query.read({}).answer(slots, 0.0)) == min(OFFER_LIMIT, len(slots))


def test_the_price_of_an_offer_has_the_disk_in_it() -> None:
    priced = row()
    assert (priced["dph_base"], priced["storage_total_cost"]) == pytest.approx((0.5, 0.04))
    assert priced["dph_total"] == priced["search"]["totalHour"] == pytest.approx(0.54)


def test_a_bid_pays_less_and_must_beat_who_is_there() -> None:
    assert min_bid(Slot(CARD, 0, 500.0)) == pytest.approx(0.25)
    assert min_bid(Slot(CARD, 0, 500.0, holder_bid=0.40)) == pytest.approx(0.401)
    assert offer(Slot(CARD, 0, 500.0), 40.0, 0.0, bid=True)["dph_base"] == pytest.approx(0.25)


def test_a_machine_without_the_disk_is_no_offer() -> None:
    slots = [Slot(CARD, 0, 30.0), Slot(CARD, 1, 50.0)]
    found = Query.read({"allocated_storage": 40.0}).answer(slots, 0.0)
    assert [o["id"] for o in found] == [CARD.offer_id(1)]


def test_rows_without_a_value_come_first_and_equal_ones_by_id() -> None:
    rows: list[dict[str, Any]] = [{"id": 3, "x": 1}, {"id": 1, "x": None}, {"id": 2, "x": 1}]
    assert [r["id"] for r in in_order(rows, [("x", False)])] == [1, 2, 3]
    assert [r["id"] for r in in_order(rows, [("x", True)])] == [2, 3, 1]


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_built_in_market_has_offers_for_every_profile_and_some_that_do_not_fit(name: str) -> None:
    """The query as the CLI sends it is tested with real processes; here by its words."""
    words = get_profile(name).offer_query.split()
    fits = [m for m in MACHINES if _fits(m, words)]
    assert 0 < len(fits) < len(MACHINES)


def _fits(machine: Machine, words: list[str]) -> bool:
    shown = offer(Slot(machine, 0, 500.0), 40.0, 0.0, bid=False)
    for word in words:
        for sign in (">=", "<=", ">", "="):
            if sign in word:
                field, _, value = word.partition(sign)
                break
        number = float(value) * (1000.0 if field in ("gpu_ram", "gpu_total_ram") else 1.0)
        ours = float(shown[field])
        if not {">=": ours >= number, "<=": ours <= number, ">": ours > number, "=": ours == number}[sign]:
            return False
    return True


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "at least one machine"),
        ({}, "wanted a list"),
        ([5], "wanted an object"),
        ([{"machine_id": 1}], "missing"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.5, "odd": 1}], "unknown field 'odd'"),
        ([{"machine_id": 1, "gpu_name": "GTX 1", "usd_gpu_h": 0.5}], "gpu_name"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": "0.5"}], "usd_gpu_h: wanted float"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.0}], "usd_gpu_h"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.5}] * 2, "given twice"),
        (
            [{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.5, "driver_version": "x"}],
            "driver_version",
        ),
    ],
)
def test_a_file_of_machines_is_refused_by_what_is_wrong(data: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        machines_from(data)


def test_a_file_of_machines_is_a_market() -> None:
    (machine,) = machines_from([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 1, "slots": 3}])
    assert (machine.usd_h, machine.slots, machine.offer_id(2)) == (1, 3, 102)
