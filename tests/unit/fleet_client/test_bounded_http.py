"""What a client can make our servers keep is bounded, and what they need not understand they ignore."""

import asyncio
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleet_client import asgi_server, bounded_http, connection_table
from fleet_client.bounded_http import Corked
from fleet_client.own_tls import server_tls
from tests.fake_fleet import make_certificate
from tests.sample_app import sample_app
from tests.web_server import BEARER, call, raw, served, served_asgi

ECHO = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20.0) as sock:
        yield sock


def all_of(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    got = b""
    try:
        while more := sock.recv(65536):
            got += more
    except ConnectionResetError:
        pass
    return got


@pytest.mark.parametrize("path", [b"/echo", b"/direct"])
def test_an_offer_of_http_2_is_ignored_and_the_body_is_read(path: bytes) -> None:
    head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nAuthorization: " + BEARER.encode() + b"\r\n"
    whole = head + H2C + b"Content-Length: 8\r\n\r\n" + b'{"n": 3}'
    chunked = head + H2C + b"Transfer-Encoding: chunked\r\n\r\n8\r\n" + b'{"n": 3}\r\n0\r\n\r\n'
    with served(sample_app()) as port:
        for request in (whole, chunked):
            for cut in (len(request), len(request) - 4, 50):
                with connected(port) as sock:
                    sock.sendall(request[:cut])
                    sock.sendall(request[cut:])
                    assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
                    sock.sendall(request)  # on the same connection
                    assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_connect_is_no_request() -> None:
    with served(sample_app()) as port:
        assert b" 400 " in raw(port, b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n")


@pytest.mark.parametrize(
    "headers",
    [
        b"X: " + b"a" * 70_000 + b"\r\n",
        b"".join(b"X-%d: %b\r\n" % (n, b"a" * 1000) for n in range(100)),
        b"X: 1\r\n" * 200,
    ],
    ids=["one-long", "many-long", "many"],
)
def test_a_head_that_is_too_large_gets_431_and_the_connection_ends(headers: bytes) -> None:
    with served(sample_app()) as port, connected(port) as sock:
        sock.sendall(ECHO + headers + b"\r\n" + b'{"n": 3}')
        assert all_of(sock).startswith(b"HTTP/1.1 431 ")
        assert call(port, "POST", "/echo", b'{"n": 3}') == (200, {"n": 3})


@pytest.mark.parametrize("part", [b"a" * 65_536, b"X: 1\r\n" * 1000], ids=["value", "headers"])
def test_a_head_or_trailer_without_an_end_is_cut(part: bytes) -> None:
    chunked = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    with served(sample_app()) as port:
        for start in (b"GET / HTTP/1.1\r\nX: ", chunked + b"X: "):
            with connected(port) as sock, pytest.raises((BrokenPipeError, ConnectionResetError)):
                sock.sendall(start + part * (2**26 // len(part)))


def test_a_head_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.2)
    with served(sample_app()) as port:
        for begun in (b"", b"GET / HT", ECHO + b"\r\n" + b'{"n": 3}' + b"GET / HT"):
            with connected(port) as sock:
                sock.sendall(begun)
                all_of(sock)  # returns: the server has closed it
        with connected(port) as sock:
            for _ in range(2):
                sock.sendall(ECHO + b"\r\n" + b'{"n": 3}')
                assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
                sock.settimeout(0.5)
                with pytest.raises(TimeoutError):  # between requests it may rest
                    sock.recv(1)


def test_pipelined_requests_are_answered_up_to_a_bound() -> None:
    with served(sample_app()) as port, connected(port) as sock:
        sock.sendall((ECHO + b"\r\n" + b'{"n": 3}') * 3000)
        answers = all_of(sock).count(b"HTTP/1.1 200 ")
    assert answers == bounded_http.MAX_PIPELINED + 1


class ResetInBetween(asyncio.Transport):
    """A transport whose client resets it in the turn in which something is written."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.closed, "written to a closed transport"
        self.written.append(data)


def test_what_was_written_before_a_reset_is_not_sent_after_it() -> None:
    complaints: list[object] = []

    async def reset_between(transport: ResetInBetween, *, reset: bool) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, said: complaints.append(said))
        Corked(transport).write(b"answer")
        transport.closed = reset
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    for reset, written in ((False, [b"answer"]), (True, [])):
        transport = ResetInBetween()
        asyncio.run(reset_between(transport, reset=reset))
        assert transport.written == written
    assert complaints == []


def test_a_client_that_resets_its_connection_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with served(sample_app()) as port:
        for _ in range(30):
            sock = socket.create_connection(("127.0.0.1", port), timeout=20.0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(ECHO + b"\r\n" + b'{"n": 3}')
            sock.close()
        assert call(port, "POST", "/echo", b'{"n": 3}') == (200, {"n": 3})
    assert "Traceback" not in caplog.text
    assert not caplog.records


def test_a_head_has_its_time_from_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.2)
    with served(sample_app()) as port:
        for begun in (b"G", b"\r\n", ECHO + b"\r\n" + b'{"n": 3}' + b"P"):
            with connected(port) as sock:
                sock.sendall(begun)
                all_of(sock)  # returns: the server has closed it


def test_a_body_that_stands_still_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "BODY_S", 0.2)
    chunked = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    refused = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    with served(sample_app()) as port:
        for begun in (ECHO + b"\r\n", ECHO + b'\r\n{"n"', chunked, chunked + b"0\r\nX: 1\r\n", refused):
            with connected(port) as sock:
                sock.sendall(begun)
                all_of(sock)


def test_a_body_that_comes_slowly_but_surely_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "BODY_S", 0.5)
    with served(sample_app()) as port, connected(port) as sock:
        sock.sendall(b"POST /large HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60002\r\n\r\n" + b'"')
        for _ in range(6):
            sock.sendall(b"a" * 10_000)
            time.sleep(0.15)  # in all longer than the time after which is looked
        sock.sendall(b'"')
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_body_without_an_end_is_dropped_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "MAX_DRAINED", 2**20)
    with served(sample_app()) as port, connected(port) as sock:
        sock.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall((b"100000\r\n" + b"a" * 2**20 + b"\r\n") * 100)


def test_a_body_that_nobody_wants_is_dropped_slowly_and_the_next_request_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else 20 clients without a key took half of a loadbalancer's time; the answer is there at once."""
    rate, body = 2.0**22, b"a" * (4 * 2**20)
    monkeypatch.setattr(bounded_http, "DRAIN_RATE", rate)
    with served(sample_app()) as port, connected(port) as sock:
        head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
        begun = time.monotonic()
        sock.sendall(body)
        sock.sendall(ECHO + b"\r\n" + b'{"n": 3}')
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        at_once = bounded_http.DRAINED_AT_ONCE + 2**18  # what is read in one piece
        assert time.monotonic() - begun > (len(body) - at_once) / rate * 0.9


def test_a_connection_rests_no_longer_than_it_may_whatever_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the rest of a body whose request has been answered already."""
    monkeypatch.setattr(asgi_server, "KEEP_ALIVE_S", 1.0)
    with served(sample_app()) as port:
        for path in (b"/echo", b"/nowhere"):
            with connected(port) as sock:
                sock.sendall(ECHO.replace(b"/echo", path) + b"\r\n")
                if path == b"/nowhere":
                    assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
                sock.sendall(b'{"n": 3}')
                all_of(sock)


def test_a_client_that_does_not_read_its_answer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "WRITE_S", 0.2)
    ended = threading.Event()

    class Endless:
        """An answer without an end."""

        async def __call__(self, scope: object, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            gone = asyncio.ensure_future(receive())
            while not gone.done() or (await gone)["type"] != "http.disconnect":
                if gone.done():
                    gone = asyncio.ensure_future(receive())
                await send({"type": "http.response.body", "body": b"a" * 65_536, "more_body": True})
                await asyncio.sleep(0)
            ended.set()

        def close(self) -> None:
            """Part of AsgiApp."""

    with served_asgi(Endless()) as port, connected(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(20.0)


def test_idle_connections_of_one_client_end_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "MAX_SILENT", 50)
    monkeypatch.setattr(connection_table, "MAX_RESTED", 50)
    with served(sample_app()) as port, ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(200)]
        assert call(port, "POST", "/echo", b'{"n": 3}') == (200, {"n": 3})
        assert sum(has_ended(sock) for sock in silent) >= 150
        rested = []
        for _ in range(200):
            sock = stack.enter_context(connected(port))
            sock.sendall(ECHO + b"\r\n" + b'{"n": 3}')
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            rested.append(sock)
        assert call(port, "POST", "/echo", b'{"n": 3}') == (200, {"n": 3})
        ended = [has_ended(sock) for sock in rested]
        assert sum(ended) >= 120
        assert ended == sorted(ended, reverse=True), "the oldest"


def has_ended(sock: socket.socket) -> bool:
    """Whether the server has ended it, which is silent otherwise."""
    sock.settimeout(0.0)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


def test_handshakes_of_tls_that_do_not_end_are_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(connection_table, "MAX_SILENT", 50)
    certificate, key = make_certificate()
    (tmp_path / "tls.crt").write_text(certificate)
    (tmp_path / "tls.key").write_text(key)
    (tmp_path / "tls.key").chmod(0o600)
    tls = server_tls(tmp_path / "tls.crt", tmp_path / "tls.key")
    context = ssl.create_default_context(cadata=certificate)
    context.check_hostname = False
    with served(sample_app(), tls=tls) as port, ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(200)]
        with connected(port) as sock, context.wrap_socket(sock) as secure:
            secure.sendall(ECHO + b"\r\n" + b'{"n": 3}')
            assert secure.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert sum(has_ended(sock) for sock in silent) >= 150
