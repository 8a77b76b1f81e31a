"""The query language with which offers and instances are searched."""

from typing import Any

import pytest

from localcloud.machines import MACHINES
from localcloud.offers import Slot
from localcloud.query import OFFER_LIMIT, BadQuery, Query, in_order, matches
from tests.unit.localcloud.cards import CARD, row


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


def test_a_machine_without_the_disk_is_no_offer() -> None:
    slots = [Slot(CARD, 0, 30.0), Slot(CARD, 1, 50.0)]
    found = Query.read({"allocated_storage": 40.0}).answer(slots, 0.0)
    assert [o["id"] for o in found] == [CARD.offer_id(1)]


def test_rows_without_a_value_come_first_and_equal_ones_by_id() -> None:
    rows: list[dict[str, Any]] = [{"id": 3, "x": 1}, {"id": 1, "x": None}, {"id": 2, "x": 1}]
    assert [r["id"] for r in in_order(rows, [("x", False)])] == [1, 2, 3]
    assert [r["id"] for r in in_order(rows, [("x", True)])] == [2, 3, 1]
