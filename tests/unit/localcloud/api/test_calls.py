"""What every route does: the key, faults of calls, rate limits."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from localcloud.realism import HARSH
from tests.unit.localcloud.api.face import AUTH, KEY, OFFER, ORDER, Face

ROUTES = [
    ("GET", "/api/v0/template/"),
    ("PUT", "/api/v0/instances/update_template/1/"),
    ("PUT", "/api/v0/commands/copy_direct/"),
    ("GET", "/api/v0/users/current"),
    ("GET", "/api/v0/users/current/"),
    ("GET", "/api/v0/ssh/"),
    ("POST", "/api/v0/ssh/"),
    ("GET", "/api/v0/charges/"),
    ("GET", "/api/v0/instances/pending-price-increases/"),
    ("PUT", "/api/v0/instances/accept-price-increase/"),
    ("PUT", "/api/v0/instances/reject-price-increase/"),
    ("POST", "/api/v0/bundles/"),
    ("PUT", "/api/v0/search/asks/"),
    ("PUT", "/api/v0/asks/420100/"),
    ("GET", "/api/v0/instances/"),
    ("GET", "/api/v1/instances/"),
    ("GET", "/api/v0/instances/filters/"),
    ("GET", "/api/v0/instances/1/"),
    ("PUT", "/api/v0/instances/1/"),
    ("PUT", "/api/v0/instances/"),
    ("DELETE", "/api/v0/instances/1/"),
    ("DELETE", "/api/v0/instances/"),
    ("PUT", "/api/v0/instances/reboot/1/"),
    ("PUT", "/api/v0/instances/recycle/1/"),
    ("PUT", "/api/v0/instances/bid_price/1/"),
    ("POST", "/api/v0/instances/1/ssh/"),
    ("PUT", "/api/v0/ssh/1/"),
    ("DELETE", "/api/v0/ssh/1/"),
    ("DELETE", "/api/v0/instances/1/ssh/1/"),
    ("PUT", "/api/v0/instances/request_logs/1/"),
    ("PUT", "/api/v0/instances/command/1/"),
    *((method, "/api/v0/secrets/") for method in ("GET", "POST", "PUT", "DELETE")),
    ("POST", "/localcloud/faults"),
    ("DELETE", "/localcloud/faults/list-500"),
    ("POST", "/localcloud/instances/1/kill"),
]


OPEN = {
    ("GET", "/api/v0/gpu_names/unique/"),
    ("GET", "/instance_logs/<name>"),
    ("GET", "/localcloud/status"),
    ("GET", "/localcloud/faults"),
    ("GET", "/"),
}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}])
def test_each_route_refuses_the_wrong_caller(face: Face, method: str, path: str, headers: Any) -> None:
    assert face.ask(method, path, {}, headers).status_code == 401
    assert face.cloud.rentals == {}


def test_every_route_is_tested_or_open(face: Face) -> None:
    shapes = {(m, p.replace("420100", "*").replace("/1/", "/*/").replace("list-500", "*")) for m, p in ROUTES}
    for rule in face.client.application.url_map.iter_rules():
        if rule.endpoint == "others.unknown":  # tested in test_others.py
            continue
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            shape = "/".join("*" if part.startswith("<") else part for part in rule.rule.split("/"))
            assert (method, rule.rule) in OPEN or (method, shape) in shapes, (method, rule.rule)


def test_a_refused_key_is_told_in_the_services_words(face: Face) -> None:
    said = face.ask("GET", "/api/v1/instances/", headers={}).get_json()
    assert said == {"success": False, "error": "auth_error", "msg": "Invalid user key"}


def test_a_page_under_another_name_gets_nothing(face: Face) -> None:
    """DNS rebinding: a browser that asks loopback under a name of somebody else's."""
    assert face.ask("GET", "/localcloud/status", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null"])
@pytest.mark.parametrize(
    ("method", "path"), [r for r in ROUTES if r[0] != "GET" and "localcloud" not in r[1]]
)
def test_a_body_that_is_no_object_is_never_a_crash(face: Face, method: str, path: str, body: bytes) -> None:
    reply = face.client.open(path, method=method, data=body, headers=AUTH)
    assert 400 <= reply.status_code < 500


ODD_BODIES = [
    b"[" * 60_000,
    b"\xff",
    b"9" * 5_000,
    *(
        json.dumps({field: value}).encode()
        for field in ("num_gpus", "allocated_storage", "disk", "price", "label", "tail", "ids", "command")
        for value in (
            10**400,
            {"eq": 10**400},
            {"in": [10**400]},
            {"eq": [1]},
            float("inf"),
            "\ud800",
            "\u00b2",
        )
    ),
]


@pytest.mark.parametrize(
    ("method", "path"), [r for r in ROUTES if r[0] != "GET" and not r[1].endswith("1/ssh/")]
)
def test_nothing_that_a_body_can_say_is_a_crash(face: Face, method: str, path: str) -> None:
    path = path.replace("/1/", f"/{face.rent()}/")
    for body in ODD_BODIES:
        reply = face.client.open(path, method=method, data=body, headers=AUTH)
        assert reply.status_code < 500, (body[:60], reply.text)
    assert face.client.get("/").status_code == 200


@pytest.mark.parametrize(("when", "rented"), [("before", 0), ("after", 1)])
def test_an_error_comes_before_or_after_the_effect(face: Face, when: str, rented: int) -> None:
    face.fault("api-error", route="create", status=502, when=when, count=1)
    assert face.ask("PUT", f"/api/v0/asks/{OFFER}/", ORDER).status_code == 502
    assert len(face.listing()["instances"]) == rented


@pytest.mark.parametrize(
    ("fault", "path"), [("list-hangs", "/api/v1/instances/"), ("api-hangs", "/api/v0/ssh/")]
)
def test_a_call_that_hangs_is_kept_until_the_cloud_ends(face: Face, fault: str, path: str) -> None:
    face.fault(fault, count=1)
    face.world.stopping.set()
    assert face.ask("GET", path).status_code == 504
    assert face.ask("GET", path).status_code == 200


def test_a_limit_is_of_one_endpoint_and_strikes_only_who_is_too_fast(face: Face) -> None:
    instance_id = face.rent()
    face.fault("rate-limits", count=2)
    url = f"/api/v0/instances/{instance_id}/"
    asks: list[tuple[str, str, Any]] = [
        ("GET", "/api/v1/instances/", None),
        ("GET", "/api/v0/instances/filters/", None),
        ("GET", url, None),
        ("PUT", url, {"label": "b"}),
        ("PUT", f"/api/v0/instances/bid_price/{instance_id}/", {"price": 0.3}),
    ]
    assert [face.ask(*ask).status_code for ask in asks] == [200, 200, 200, 200, 400]
    assert [face.ask(*ask).status_code for ask in asks] == [429, 200, 429, 200, 400], "count is 2"


def test_calls_faster_than_the_service_allows_are_refused(face: Face) -> None:
    face.fault("rate-limits")
    assert [face.ask("GET", "/api/v1/instances/").status_code for _ in range(2)] == [200, 429]
    face.now += 1.01 / 60.0
    assert face.ask("GET", "/api/v1/instances/").status_code == 200
    assert face.rent()
    assert face.ask("PUT", f"/api/v0/asks/{OFFER + 1}/", ORDER).status_code == 429
    face.now += 4.6 / 60.0
    assert face.ask("PUT", f"/api/v0/asks/{OFFER + 1}/", ORDER).status_code == 429, "the penalty is 12 s"
    face.ask("DELETE", "/localcloud/faults/rate-limits")
    assert face.ask("PUT", f"/api/v0/asks/{OFFER + 1}/", ORDER).status_code == 200


def test_the_limits_are_always_there_where_the_cloud_is_as_real(tmp_path: Path) -> None:
    face = Face(tmp_path, HARSH.only(["rate_limits"]))
    assert [face.ask("GET", "/api/v1/instances/").status_code for _ in range(2)] == [200, 429]
    face.now += 1.01 / 60.0
    assert face.ask("GET", "/api/v1/instances/").status_code == 200
    face.world.stop()


def test_no_key_is_logged(face: Face, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        face.rent()
        face.fault("list-500")
        face.listing()
    assert KEY not in caplog.text
