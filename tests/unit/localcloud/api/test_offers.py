"""Searching offers and renting one, as the CLI does."""

from typing import Any

import pytest

from tests.unit.localcloud.api.face import OFFER, ORDER, Face


def test_a_search_is_json_of_exactly_that_type(face: Face) -> None:
    """The CLI prints "invalid return Content-Type" for anything else (vast-contract 0.10)."""
    reply = face.ask("POST", "/api/v0/bundles/", {"num_gpus": {"eq": "1"}, "order": [["dph_total", "asc"]]})
    offers = reply.get_json()["offers"]
    assert reply.headers["Content-Type"] == "application/json"
    assert offers == sorted(offers, key=lambda o: o["dph_total"])
    assert {o["num_gpus"] for o in offers} == {1}


def test_an_offer_that_is_gone_says_no_such_ask(face: Face) -> None:
    face.rent()
    for offer, status in ((OFFER, 410), (999_999_99, 404)):
        reply = face.ask("PUT", f"/api/v0/asks/{offer}/", ORDER)
        said = reply.get_json()
        assert (reply.status_code, said["success"], said["ask_id"]) == (status, False, offer)
        assert "no_such_ask" in said["msg"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", None),
        ("image", "x" * 1025),
        ("disk", 7.0),
        ("disk", "40"),
        ("disk", True),
        ("label", "x" * 257),
        ("onstart", "x" * 16_385),
        ("env", ["A"]),
        ("env", {"A": 1}),
        ("env", {"A": "x" * 32_768}),
        ("env", {f"A{n}": "x" for n in range(257)}),
        ("args", "x"),
        ("price", 0.0),
        ("price", "cheap"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_and_nothing_is_rented(
    face: Face, field: str, value: Any
) -> None:
    reply = face.ask("PUT", f"/api/v0/asks/{OFFER}/", {**ORDER, field: value})
    assert (reply.status_code, face.cloud.rentals) == (400, {})
    assert reply.get_json()["msg"]


def test_a_create_has_its_effect_and_its_reply_is_lost(face: Face) -> None:
    face.fault("create-lost", count=1)
    assert face.ask("PUT", f"/api/v0/asks/{OFFER}/", ORDER).status_code == 504
    assert [r["label"] for r in face.listing()["instances"]] == ["fleet/a"]
    assert face.ask("PUT", f"/api/v0/asks/{OFFER + 1}/", ORDER).status_code == 200


def test_a_create_meets_an_offer_that_has_gone(face: Face) -> None:
    face.fault("create-410", count=1)
    assert face.ask("PUT", f"/api/v0/asks/{OFFER}/", ORDER).status_code == 410
    assert face.listing()["instances"] == []
    face.rent()
