"""The account's secret variables, and what a key may do that lacks a permission."""

import pytest

from tests.unit.localcloud.api.face import OFFER, ORDER, Face

PATH = "/api/v0/secrets/"


def test_secret_variables_are_set_changed_listed_and_deleted(face: Face) -> None:
    assert face.ask("GET", PATH).get_json() == {"success": True, "secrets": {}}
    added = face.ask("POST", PATH, {"key": "hf_token", "value": "hf_1"})
    assert added.get_json() == {"success": True, "msg": "Environment variable added successfully"}
    assert face.ask("POST", PATH, {"key": "HF_TOKEN", "value": "hf_2"}).status_code == 400, "it is there"
    assert face.ask("PUT", PATH, {"key": "HF_TOKEN", "value": "hf_2"}).status_code == 200
    assert face.ask("GET", PATH).get_json()["secrets"] == {"HF_TOKEN": "hf_2"}
    assert face.ask("DELETE", PATH, {"key": "HF_TOKEN"}).status_code == 200
    assert face.ask("DELETE", PATH, {"key": "HF_TOKEN"}).status_code == 404
    assert face.ask("PUT", PATH, {"key": "HF_TOKEN", "value": "x"}).status_code == 404


@pytest.mark.parametrize(
    "body", [{}, {"key": "A B", "value": "x"}, {"key": "A", "value": "x y"}, {"key": "A"}]
)
def test_what_is_no_variable_is_refused(face: Face, body: dict[str, str]) -> None:
    assert face.ask("POST", PATH, body).status_code == 400


def test_a_listing_shows_no_secret_variable_and_no_login(face: Face) -> None:
    face.ask("POST", PATH, {"key": "HF_TOKEN", "value": "hf_secret"})
    face.rent(image_login="-u anna -p s3cr3t ghcr.io")
    for shown in (str(face.listing()), face.ask("GET", "/localcloud/status").text):
        assert "hf_secret" not in shown
        assert "s3cr3t" not in shown


@pytest.mark.parametrize(
    ("permission", "method", "path"),
    [
        ("instance_read", "GET", "/api/v1/instances/"),
        ("instance_write", "PUT", f"/api/v0/asks/{OFFER}/"),
        ("misc", "POST", "/api/v0/bundles/"),
        ("user_read", "GET", "/api/v0/users/current"),
        ("user_write", "POST", PATH),
    ],
)
def test_a_key_without_a_permission_is_refused_where_it_needs_it_and_nowhere_else(
    face: Face, permission: str, method: str, path: str
) -> None:
    face.fault("key-lacks", permission=permission)
    refused = face.ask(method, path, ORDER)
    assert (refused.status_code, refused.get_json()["error"]) == (401, "auth_error")
    assert permission in refused.get_json()["msg"]
    for other in ("/api/v0/users/current", "/api/v1/instances/"):
        if permission not in ("user_read", "instance_read"):
            assert face.ask("GET", other).status_code == 200
