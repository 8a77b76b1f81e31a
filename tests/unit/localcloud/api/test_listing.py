"""The listing: rows, pages, filters, and its faults."""

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest

from localcloud.machines import MACHINES
from tests.unit.localcloud.api.face import OFFER, Face


def test_a_rental_is_listed_with_what_the_cli_requires_of_a_row(face: Face) -> None:
    instance_id = face.rent()
    said = face.listing()
    (row,) = said["instances"]
    assert (row["id"], row["label"], row["actual_status"]) == (instance_id, "fleet/a", None)
    assert isinstance(row["start_date"], float)
    assert row["extra_env"] == [["A", "1"], ["-p 8000:8000", "1"]]
    assert row["ports"] == {}, "null would crash ssh-url"
    assert {k: v for k, v in said.items() if k != "instances"} == {
        "success": True,
        "instances_found": 1,
        "total_instances": 1,
        "label_counts": {"fleet/a": 1},
        "next_token": None,
    }


def test_the_listing_comes_in_pages_of_25(face: Face) -> None:
    many = [face.rent(offer=m.machine_id * 100 + s, disk=8.0) for m in MACHINES[:8] for s in range(4)]
    first = face.listing("?order_by=" + quote('[{"col":"id","dir":"asc"}]'))
    second = face.listing(f"?after_token={quote(first['next_token'])}")
    assert [r["id"] for r in first["instances"]] == many[:25]
    assert [r["id"] for r in second["instances"]] == many[25:]
    assert (first["total_instances"], second["next_token"]) == (32, None)
    assert len(face.listing("?limit=1000")["instances"]) == 25
    assert len(face.listing("?limit=0")["instances"]) == 5
    assert face.ask("GET", "/api/v1/instances/?after_token=x").get_json()["error"] == "invalid_token"


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_a_page_begins_where_the_last_one_ended_whatever_has_gone_meanwhile(
    face: Face, direction: str
) -> None:
    many = [face.rent(offer=m.machine_id * 100 + s, disk=8.0) for m in MACHINES[:8] for s in range(4)]
    many = many if direction == "asc" else many[::-1]
    query = "?order_by=" + quote(f'[{{"col":"id","dir":"{direction}"}}]')
    token = face.listing(query)["next_token"]
    for gone in (many[3], many[24], many[30]):
        face.ask("DELETE", f"/api/v0/instances/{gone}/", {})
    second = face.listing(f"{query}&after_token={quote(token)}")
    assert [r["id"] for r in second["instances"]] == [*many[25:30], many[31]]


def test_the_listing_is_filtered_and_cut_as_asked(face: Face) -> None:
    face.rent(label="a")
    other = face.rent(offer=OFFER + 1, label=None)
    unlabelled = face.listing(
        "?select_filters=" + quote('{"label":{"in":[""]}}') + "&select_cols=" + quote('["label"]')
    )
    assert unlabelled["instances"] == [{"id": other, "label": None}]
    for odd in ("x", '{"dph_total":{"lt":1}}', '{"label":1}'):
        assert face.ask("GET", "/api/v1/instances/?select_filters=" + quote(odd)).status_code == 400


def test_the_old_listing_is_retired(face: Face) -> None:
    reply = face.ask("GET", "/api/v0/instances/")
    assert (reply.status_code, reply.get_json()["error"]) == (410, "deprecated_endpoint")


def test_one_instance_is_an_object_under_a_plural_and_null_when_gone(face: Face) -> None:
    instance_id = face.rent()
    assert face.ask("GET", f"/api/v0/instances/{instance_id}/").get_json()["instances"]["id"] == instance_id
    assert face.ask("DELETE", f"/api/v0/instances/{instance_id}/", {}).get_json() == {"success": True}
    reply = face.ask("GET", f"/api/v0/instances/{instance_id}/")
    assert (reply.status_code, reply.get_json()) == (200, {"instances": None})
    assert face.ask("DELETE", f"/api/v0/instances/{instance_id}/", {}).status_code == 404


@pytest.mark.parametrize("field", ["limit", "after_token", "select_filters", "order_by", "select_cols"])
def test_nothing_that_a_query_can_say_is_a_crash(face: Face, field: str) -> None:
    face.rent()

    def token(values: Any) -> str:
        return base64.b64encode(json.dumps({"values": values}).encode()).decode()

    odd: tuple[Any, ...] = (5, [], "abc", {"id": None}, {"id": float("inf")}, {"id": [1]})
    tokens = [token(values) for values in odd]
    for said in (
        *("\u00b2", "--5", "9" * 5_000, "[" * 30_000, "null", '"x"', "[1]", "[{}]", '[{"col":{}}]'),
        *('{"label":5}', '{"label":{"in":[{}]}}', '{"ports":{"gt":"x"}}', '{"start_date":{"gt":"x"}}'),
        *tokens,
    ):
        reply = face.ask("GET", f"/api/v1/instances/?{field}={quote(said)}")
        assert reply.status_code < 500, (said[:60], reply.text)


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [("list-429", 429, b"API requests too frequent"), ("list-500", 500, None), ("list-empty", 200, b"{}\n")],
)
def test_a_listing_lies_while_it_was_told_to(face: Face, name: str, status: int, body: bytes | None) -> None:
    face.rent()
    face.fault(name, count=1)
    reply = face.ask("GET", "/api/v1/instances/")
    assert reply.status_code == status
    assert body is None or reply.data == body
    assert len(face.listing()["instances"]) == 1


@pytest.mark.parametrize(("total", "shown"), [("short", 1), ("full", 2)])
def test_a_listing_loses_its_newest_rows(face: Face, total: str, shown: int) -> None:
    first = face.rent()
    face.rent(offer=OFFER + 1)
    face.fault("list-missing", share=0.5, total=total)
    said = face.listing()
    assert ([r["id"] for r in said["instances"]], said["total_instances"]) == ([first], shown)
    face.ask("DELETE", "/localcloud/faults/list-missing")
    assert len(face.listing()["instances"]) == 2


def test_a_listing_loses_other_rows_each_time(face: Face) -> None:
    many = [face.rent(offer=m.machine_id * 100) for m in MACHINES[:4]]
    face.fault("list-missing", share=0.5, which="random")
    shown = [tuple(row["id"] for row in face.listing()["instances"]) for _ in range(40)]
    assert {len(ids) for ids in shown} == {2}
    assert {i for ids in shown for i in ids} == set(many)


@pytest.mark.parametrize(("value", "found"), [("null", None), ("-3", -3), ("NaN or so", "NaN or so")])
def test_the_oldest_row_has_a_value_that_cannot_be(face: Face, value: str, found: Any) -> None:
    face.rent()
    face.rent(offer=OFFER + 1)
    face.fault("list-odd", column="machine_id", value=value)
    odd, sound = face.listing()["instances"]
    assert odd["machine_id"] == found
    assert isinstance(sound["machine_id"], int)
