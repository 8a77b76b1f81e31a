"""The local cloud's face: the service's routes and words as the CLI needs them, and faults of calls."""

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from localcloud.api import create_app
from localcloud.cloud import Cloud
from localcloud.machines import MACHINES
from localcloud.world import World

KEY = "k-of-a-test-0123456789"
AUTH = {"Authorization": f"Bearer {KEY}"}
OFFER = 4201 * 100
ORDER: dict[str, Any] = {
    "client_id": "me",
    "image": "vllm/vllm-openai:x",
    "env": {"A": "1", "-p 8000:8000": "1"},
    "disk": 40.0,
    "label": "fleet/a",
    "onstart": "echo hi",
    "price": None,
    "runtype": "ssh_direc ssh_proxy",
    "cancel_unavail": True,
}


class Face:
    """A face whose world never runs: time stands still unless `now` is moved."""

    def __init__(self, root: Path) -> None:
        self.now = 1000.0
        self.cloud = Cloud(MACHINES, Random(1), speedup=60.0)
        self.world = World(self.cloud, root / "cloud", "paced", clock=lambda: self.now)
        self.client: FlaskClient = create_app(self.world, KEY).test_client()

    def ask(self, method: str, path: str, body: Any = None, headers: Any = AUTH) -> TestResponse:
        return self.client.open(path, method=method, json=body, headers=headers)

    def rent(self, **other: Any) -> int:
        reply = self.ask("PUT", f"/api/v0/asks/{other.pop('offer', OFFER)}/", {**ORDER, **other})
        assert reply.status_code == 200, reply.text
        return int(reply.get_json()["new_contract"])

    def listing(self, query: str = "") -> Any:
        return self.ask("GET", f"/api/v1/instances/{query}").get_json()

    def fault(self, name: str, **args: Any) -> None:
        reply = self.ask("POST", "/localcloud/faults", {"name": name, **args})
        assert reply.status_code == 201, reply.text


@pytest.fixture
def face(tmp_path: Path) -> Iterator[Face]:
    face = Face(tmp_path)
    yield face
    face.world.stop()


# -- who may call --------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/api/v0/users/current"),
    ("GET", "/api/v0/users/current/"),
    ("GET", "/api/v0/ssh/"),
    ("POST", "/api/v0/ssh/"),
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
    ("PUT", "/api/v0/instances/request_logs/1/"),
    ("PUT", "/api/v0/instances/command/1/"),
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
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            shape = "/".join("*" if part.startswith("<") else part for part in rule.rule.split("/"))
            assert (method, rule.rule) in OPEN or (method, shape) in shapes, (method, rule.rule)


def test_a_refused_key_is_told_in_the_services_words(face: Face) -> None:
    said = face.ask("GET", "/api/v1/instances/", headers={}).get_json()
    assert said == {"success": False, "error": "auth_error", "msg": "Invalid user key"}


def test_a_page_under_another_name_gets_nothing(face: Face) -> None:
    """DNS rebinding: a browser that asks loopback under a name of somebody else's."""
    assert face.ask("GET", "/localcloud/status", headers={"Host": "evil.example"}).status_code == 400


# -- what the CLI needs --------------------------------------------------------------------------------


def test_a_search_is_json_of_exactly_that_type(face: Face) -> None:
    """The CLI prints "invalid return Content-Type" for anything else (vast-contract 0, row 10)."""
    reply = face.ask("POST", "/api/v0/bundles/", {"num_gpus": {"eq": "1"}, "order": [["dph_total", "asc"]]})
    offers = reply.get_json()["offers"]
    assert reply.headers["Content-Type"] == "application/json"
    assert offers == sorted(offers, key=lambda o: o["dph_total"])
    assert {o["num_gpus"] for o in offers} == {1}


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


def test_a_label_with_half_a_character_is_shown(face: Face) -> None:
    face.rent(label="half \ud800")
    assert "half ?" in face.client.get("/").text


def test_state_label_and_reboot_are_changed_by_put(face: Face) -> None:
    instance_id = face.rent()
    url = f"/api/v0/instances/{instance_id}/"
    assert face.ask("PUT", url, {"label": "b"}).get_json() == {"success": True}
    assert face.listing()["instances"][0]["label"] == "b"
    assert face.ask("PUT", url, {"state": "stopped"}).get_json() == {"success": True}
    assert face.listing()["instances"][0]["actual_status"] == "exited"
    assert face.ask("PUT", url, {"state": "running"}).get_json() == {"success": True}
    assert face.ask("PUT", url, {"state": "odd"}).status_code == 400
    assert face.ask("PUT", url, {}).status_code == 400
    assert face.ask("PUT", f"/api/v0/instances/reboot/{instance_id}/", {}).status_code == 400, (
        "it does not run"
    )
    assert (
        face.ask("PUT", "/api/v0/instances/5/", {"state": "running"}).get_json()["error"]
        == "no_such_instance"
    )


def test_a_log_is_fetched_in_three_steps(face: Face) -> None:
    instance_id = face.rent()
    folder = face.world.root / "instances" / str(instance_id)
    folder.mkdir(parents=True)
    (folder / "console.log").write_text("one\ntwo x\nthree x\n")
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {"tail": "1", "filter": "x"})
    path = asked.get_json()["result_url"].removeprefix("http://localhost")
    assert face.client.get(path).status_code == 403, "it is being uploaded"
    face.now += 1.0
    reply = face.client.get(path)
    assert (reply.status_code, reply.text, reply.mimetype) == (200, "three x\n", "text/plain")


def test_the_daemons_log_tells_what_happened_to_it(face: Face) -> None:
    instance_id = face.rent()
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}", {"daemon_logs": "true"})
    face.now += 1.0
    assert "rented" in face.client.get(asked.get_json()["result_url"].removeprefix("http://localhost")).text


def test_only_three_commands_can_be_executed(face: Face) -> None:
    instance_id = face.rent()
    (face.world.root / "instances" / str(instance_id) / "home").mkdir(parents=True)
    url = f"/api/v0/instances/command/{instance_id}/"
    assert face.ask("PUT", url, {"command": "ls"}).status_code == 200
    for command in ("cat /etc/passwd", "", "bash", "x" * 513, 5):
        assert face.ask("PUT", url, {"command": command}).status_code == 400


@pytest.mark.parametrize("path", ["{outside}", "../../../kept", "link", "-- ../../../kept"])
def test_a_command_reaches_no_file_but_those_of_its_instance(face: Face, path: str) -> None:
    instance_id = face.rent()
    home = face.world.root / "instances" / str(instance_id) / "home"
    home.mkdir(parents=True)
    kept = face.world.root / "kept"
    kept.mkdir()
    (home / "link").symlink_to(kept)
    (home / "mine").touch()
    path = path.format(outside=kept)
    assert "not on this instance's disk" in face.world.command(instance_id, f"rm -rf {path}")
    assert kept.exists()
    assert face.world.command(instance_id, "rm mine") == ""
    assert not (home / "mine").exists()


def test_the_account_knows_its_keys_and_dollars(face: Face) -> None:
    key = "ssh-ed25519 AAAA me"
    assert face.ask("POST", "/api/v0/ssh/", {"ssh_key": key}).get_json()["success"] is True
    assert [k["public_key"] for k in face.ask("GET", "/api/v0/ssh/").get_json()] == [key]
    assert face.ask("GET", "/api/v0/users/current").get_json()["credit"] == 100.0
    assert face.ask("POST", "/api/v0/ssh/", {"ssh_key": "no-key"}).status_code == 400


def test_the_credit_shown_is_that_of_now(face: Face) -> None:
    face.rent()
    face.now += 3600.0
    assert face.ask("GET", "/api/v0/users/current").get_json()["credit"] < 100.0


# -- faults of calls -----------------------------------------------------------------------------------


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


def test_a_log_is_never_uploaded(face: Face) -> None:
    instance_id = face.rent()
    face.fault("log-never", count=1)
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {})
    face.now += 3600.0
    assert face.client.get(asked.get_json()["result_url"].removeprefix("http://localhost")).status_code == 403
    asked = face.ask("PUT", f"/api/v0/instances/request_logs/{instance_id}/", {})
    face.now += 1.0
    assert face.client.get(asked.get_json()["result_url"].removeprefix("http://localhost")).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"name": 5},
        {"name": "no-such"},
        {"name": "list-500", "count": 0},
        {"name": "list-500", "odd": 1},
    ],
)
def test_a_fault_that_there_is_not_is_refused(face: Face, body: Any) -> None:
    reply = face.ask("POST", "/localcloud/faults", body)
    assert reply.status_code == 400
    assert face.ask("GET", "/localcloud/faults").get_json()["on"] == []


# -- for people ----------------------------------------------------------------------------------------


def test_the_page_says_what_it_is_and_escapes_what_renters_wrote(face: Face) -> None:
    face.rent(label="<script>alert(1)</script>")
    page = face.client.get("/").text
    assert "This is not Vast.ai" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_status_shows_no_script_and_no_key(face: Face) -> None:
    face.rent(onstart="secret-of-a-script")
    shown = json.dumps(face.client.get("/localcloud/status").get_json())
    assert '"engine": "paced"' in shown
    assert "secret-of-a-script" not in shown
    assert KEY not in shown


def test_no_key_is_logged(face: Face, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        face.rent()
        face.fault("list-500")
        face.listing()
    assert KEY not in caplog.text


def test_killing_what_does_not_run_is_refused(face: Face) -> None:
    instance_id = face.rent()
    assert face.ask("POST", f"/localcloud/instances/{instance_id}/kill", {}).status_code == 400
    assert face.ask("POST", "/localcloud/instances/5/kill", {}).status_code == 404
    assert face.ask("POST", f"/localcloud/instances/{instance_id}/kill", {"part": "x"}).status_code == 400
