"""The account's charges and the hosts' price increases, as the service answers them."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from localcloud.machines import DAY_S
from localcloud.realism import HARSH
from tests.unit.localcloud.api.face import OFFER, Face


def charges(face: Face, more: str = "") -> dict[str, Any]:
    day = quote(json.dumps({"day": {"gte": 0, "lte": int(face.now)}}))
    reply = face.ask("GET", f"/api/v0/charges/?select_filters={day}{more}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.get_json()
    return found


def test_charges_are_by_instance_with_gpu_storage_and_bytes(tmp_path: Path) -> None:
    face = Face(tmp_path, HARSH.only(["bandwidth"]))
    rented = face.rent()
    face.now += 3600.0
    said = charges(face)
    assert (said["success"], said["count"], said["total"], said["next_token"]) == (True, 1, 1, None)
    (row,) = said["results"]
    assert (row["type"], row["source"], row["metadata"]["label"]) == (
        "instance",
        f"instance-{rented}",
        "fleet/a",
    )
    assert [item["type"] for item in row["items"]] == ["gpu", "disk", "bwd", "bwu"]
    assert row["amount"] == pytest.approx(sum(item["amount"] for item in row["items"]))
    assert row["amount"] == pytest.approx(100.0 - face.cloud.account.credit_usd(face.now), abs=1e-6)
    assert "hours at $" in row["items"][1]["description"]
    face.world.stop()


def test_charges_come_page_by_page_and_without_days_not_at_all(tmp_path: Path) -> None:
    face = Face(tmp_path)
    rented = [face.rent(offer=OFFER + n, label=f"fleet/{n}") for n in range(3)]
    face.now += 600.0
    seen, token = [], ""
    for _ in range(3):
        said = charges(face, f"&limit=1{token}")
        seen += [row["source"] for row in said["results"]]
        token = f"&after_token={said['next_token']}"
    assert seen == [f"instance-{n}" for n in rented]
    assert said["next_token"] is None
    assert face.ask("GET", "/api/v0/charges/").status_code == 400
    tomorrow = quote(json.dumps({"day": {"gte": 2 * DAY_S, "lte": 3 * DAY_S}}))
    assert face.ask("GET", f"/api/v0/charges/?select_filters={tomorrow}").get_json()["results"] == []
    face.world.stop()


def test_a_price_increase_is_shown_and_answered_once(tmp_path: Path) -> None:
    face = Face(tmp_path)
    rented = face.rent()
    assert face.ask("GET", "/api/v0/instances/pending-price-increases/").get_json()["count"] == 0
    face.fault("price-increase", share=0.5)
    (row,) = face.ask("GET", "/api/v0/instances/pending-price-increases/").get_json()[
        "pending_price_increases"
    ]
    assert row["contract_id"] == rented
    assert row["new_gpu_costpersec"] == pytest.approx(1.5 * row["old_gpu_costpersec"])
    assert row["ask_end_date"] > row["contract_end_date"]
    number = {"pending_price_increase_id": row["pending_price_increase_id"]}
    refused = face.ask("PUT", "/api/v0/instances/accept-price-increase/", {**number, "more": 1})
    assert refused.status_code == 400
    taken = face.ask("PUT", "/api/v0/instances/accept-price-increase/", number).get_json()
    assert taken == {"success": True, **number, "contract_id": rented}
    stale = face.ask("PUT", "/api/v0/instances/reject-price-increase/", number)
    assert (stale.status_code, stale.get_json()["error"]) == (404, "no_pending_price_increase")
    face.world.stop()
