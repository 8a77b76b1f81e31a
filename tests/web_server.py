"""Run a Flask app on its real server in a thread, and ask it over real sockets."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flask import Flask

from fleet_client.asgi_server import AsgiApp, AsgiServer, Background
from fleet_client.listening import bind_socket
from fleet_client.own_tls import ServerTls
from web.bridge import FlaskBridge

KEY = "k" * 32
BEARER = f"Bearer {KEY}"


def wait_until(true: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
    """Return when it is; fail when it is not in time."""
    limit = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < limit, f"waited {limit_s:g} s for: {what}"
        time.sleep(0.002)


@contextmanager
def served(
    app: Flask,
    background: Sequence[Background] = (),
    blocking: Collection[str] = (),
    *,
    loopback: bool = True,
    tls: ServerTls | None = None,
) -> Iterator[int]:
    """The port of a server that runs in a thread; it must end within a few seconds."""
    with (
        FlaskBridge(app, blocking, loopback=loopback) as bridge,
        served_asgi(bridge, background, tls) as port,
    ):
        yield port


@contextmanager
def served_asgi(
    app: AsgiApp, background: Sequence[Background] = (), tls: ServerTls | None = None
) -> Iterator[int]:
    """The same of any application."""
    sock = bind_socket("127.0.0.1", 0)
    port: int = sock.getsockname()[1]
    server = AsgiServer(app, sock, background, tls)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield port
    finally:
        server.stop()
        thread.join(timeout=10.0)
        assert not thread.is_alive()


def call(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    """Status and decoded answer of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20.0)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def raw(port: int, data: bytes) -> bytes:
    """What comes back for these bytes, until the server closes or has answered in full."""
    with socket.create_connection(("127.0.0.1", port), timeout=20.0) as sock:
        sock.sendall(data)
        got = b""
        while b"\r\n\r\n" not in got:
            more = sock.recv(65536)
            if not more:
                break
            got += more
        return got


@contextmanager
def client_of(port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection on which a request that waits has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20.0)
    connection.request("POST", "/wait", b"{}")
    try:
        yield connection
    finally:
        connection.close()
