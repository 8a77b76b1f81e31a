"""What every Flask face of ours promises: errors of one shape, keys, and bodies that are not too long."""

import json
from http import HTTPStatus

import pytest

from tests.asgi_client import AsgiClient
from tests.sample_app import sample_app
from tests.web_server import KEY


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("GET", "//echo", b"", 404, "not_found"),
        ("GET", "/echo", b"", 405, "method_not_allowed"),
        ("POST", "/echo", b"{", 400, "bad_request"),
        ("POST", "/echo", b'{"n": 10}', 400, "bad_request"),
        ("POST", "/echo", b" " * 65_537, 413, "request_entity_too_large"),
        ("POST", "/large", b" " * 200_001, 413, "request_entity_too_large"),
        ("GET", "/number?x=nan", b"", 400, "bad_request"),
        ("GET", "/number?x=ten", b"", 400, "bad_request"),
        ("GET", "/number?x=10", b"", 400, "bad_request"),
        ("GET", "/broken", b"", 500, "internal_error"),
    ],
)
def test_every_error_is_json_of_one_shape(
    method: str, path: str, body: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = sample_app().test_client().open(path, method=method, data=body)
    said = json.loads(answer.data)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert said == {
        "error": code,
        "message": said["detail"],
        "type": f"urn:autoscaler-py:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": said["message"],
    }
    assert "secret detail" not in said["message"]
    assert ("secret detail" in caplog.text) == (status == 500)


def test_a_large_body_is_allowed_where_it_is_expected() -> None:
    body = json.dumps("x" * 150_000)
    assert sample_app().test_client().post("/large", data=body).get_json() == {"size": 150_000}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer  {KEY}", 401),
        ("Bearer ", 401),
        (f"Bearer {KEY},Bearer {KEY}", 401),
        ("Bearer ÄÖÜ", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer another-key-of-16", 200),
    ],
)
@pytest.mark.parametrize("path", ["/guarded", "/direct"])
def test_only_a_key_opens_a_guarded_route(path: str, header: str | None, status: int) -> None:
    headers = {} if header is None else {"Authorization": header}
    client = AsgiClient(sample_app())
    if path == "/direct":
        answer = client.post(path, json={"n": 1}, headers=headers)
        status = 401 if "another" in (header or "") else status
    else:
        answer = client.get(path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
