"""Who may ask is known from a request's head: without a key none of its body is waited for, or kept."""

import re
import socket
from random import Random
from unittest.mock import MagicMock

import pytest
from flask import Flask

import autoscaler_server
import loadbalancer_server
from dispatch.outside.service import LoadBalancerService
from fleet_client.gateway import Gateway
from loadbalancer import LoadBalancer
from tests.sample_app import sample_app
from tests.web_server import BEARER, raw, served, served_asgi
from web.direct import DirectRoutes
from web.keys import AccessKeys
from web.page_files import KINDS

KEYS = AccessKeys("c" * 32, frozenset({"u" * 32}), frozenset({"o" * 32}))

OPEN = {"/health", "/openapi.json", "/", *(f"/page/{name}" for name in KINDS)}
"""Routes without a key."""


def face_of_the_loadbalancer() -> Flask:
    service = LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    return loadbalancer_server.create_app(service, KEYS)


def face_of_the_autoscaler() -> Flask:
    return autoscaler_server.create_app(MagicMock(), KEYS, 5.0, str)


def guarded(app: Flask) -> list[tuple[str, str]]:
    """(method, path) of every route that has a key."""
    rules = [(re.sub(r"<(\w+:)?\w+>", "7", r.rule), r.methods or ()) for r in app.url_map.iter_rules()]
    found = [(m, path) for path, methods in rules for m in methods if m != "OPTIONS"]
    found += [(m, path) for path, methods in DirectRoutes.of(app).by_path.items() for m in methods]
    return sorted((m, path) for m, path in found if path not in OPEN)


def head(method: str, path: str, *more: str, size: int = 2**25) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", *more, "", ""]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("face", [face_of_the_loadbalancer, face_of_the_autoscaler])
@pytest.mark.parametrize("key", [None, "Bearer wrong", f"Fleet {'0' * 16}:{'0' * 64}"])
def test_every_route_with_a_key_refuses_by_the_head_alone(face: object, key: str | None) -> None:
    app = face()  # type: ignore[operator]
    routes = guarded(app)
    assert len(routes) >= 6
    more = () if key is None else (f"Authorization: {key}",)
    with served(app) as port:
        for method, path in routes:
            answer = raw(port, head(method, path, *more))  # the body never comes
            assert answer.startswith(b"HTTP/1.1 401 "), (method, path, answer)
            assert b"100 Continue" not in raw(port, head(method, path, "Expect: 100-continue", *more))


def test_the_gateway_refuses_by_the_head_alone() -> None:
    gateway = Gateway(MagicMock(), {"k" * 32}, loopback=True)
    with served_asgi(gateway) as port:
        for path in ("/v1/chat/completions", "/v1/models", "/anything"):
            assert raw(port, head("POST", path)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/nowhere", 404),
        ("PUT", "/echo", 405),
        ("PUT", "/direct", 405),
        ("POST", "/echo", 413),
        ("POST", "/direct", 413),
    ],
)
def test_what_no_view_would_serve_is_refused_by_the_head_too(method: str, path: str, status: int) -> None:
    with served(sample_app()) as port:
        answer = raw(port, head(method, path, f"Authorization: {BEARER}"))
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert (status == 405) == (re.search(rb"\r\nallow: ", answer, re.I) is not None)


def test_the_body_of_a_refused_request_is_not_kept_and_the_next_request_is_served() -> None:
    with served(sample_app()) as port, socket.create_connection(("127.0.0.1", port), timeout=20.0) as sock:
        sock.sendall(head("POST", "/direct"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")
        for _ in range(2**25 // 2**20):
            sock.sendall(b" " * 2**20)
        sock.sendall(head("POST", "/direct", f"Authorization: {BEARER}", size=8) + b'{"n": 3}')
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
