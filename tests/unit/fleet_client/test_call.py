"""What of a request is passed on, and what is for us."""

from typing import Any

import httpx2
import pytest

from fleet_client.call import Call, forwarded, priority_in
from fleet_client.token_estimate import TokenEstimate


def test_headers_pass_but_for_keys_and_those_of_the_connection() -> None:
    headers = [
        (b"Host", b"fleet"),
        (b"Authorization", b"Bearer sk-user"),
        (b"API-Key", b"sk-user"),
        (b"X-Api-Key", b"sk-user"),
        (b"Proxy-Authorization", b"Basic x"),
        (b"Connection", b"keep-alive, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"TE", b"trailers"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"Expect", b"100-continue"),
        (b"Content-Length", b"5"),
        (b"Content-Type", b"application/json"),
        (b"X-Fleet-Priority", b"high"),
        (b"X-Mine", b"a"),
        (b"X-Mine", b"b"),
    ]
    assert forwarded(headers, "TOKEN") == [
        (b"Content-Type", b"application/json"),
        (b"X-Mine", b"a"),
        (b"X-Mine", b"b"),
        (b"Authorization", b"Bearer TOKEN"),
    ]


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/", [(b"X", b"a\r\nEvil: 1")]),
        ("GET", "/", [(b"X: 1\r\nEvil", b"a")]),
        ("GET", "/", [(b"", b"a")]),
        ("GET", "/ HTTP/1.1\r\nEvil: 1", []),
        ("GET", "@evil.example/", []),
        ("GET", "http://evil.example/", []),
        ("GET /x HTTP/1.1\r\n", "/", []),
        ("", "/", []),
    ],
    ids=str,
)
def test_what_http_cannot_carry_is_refused(method: str, target: str, headers: list[Any]) -> None:
    with pytest.raises(httpx2.LocalProtocolError):
        Call(method, target, headers, b"", TokenEstimate(0, 1))


def test_a_request_says_its_priority_in_a_header() -> None:
    assert priority_in([(b"X-Mine", b"a")]) is None
    assert priority_in([(b"x-fleet-PRIORITY", b" low ")]) == "low"


@pytest.mark.parametrize(
    "values", [[b""], [b"urgent"], [b"High"], [b"1"], [b"high", b"low"], [b"high", b"high"], [b"\xff" * 999]]
)
def test_a_wrong_priority_names_the_header(values: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"^X-Fleet-Priority: wanted high, normal or low, got '.{0,160}'$"):
        priority_in([(b"X-Fleet-Priority", value) for value in values])
