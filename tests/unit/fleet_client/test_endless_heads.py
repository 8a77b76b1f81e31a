"""Whoever answers a client of ours cannot make it keep much, nor wait beyond its timeout."""

import itertools
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from fleet_client.connection_pool import BadHttp, Connection
from tests.fake_fleet import FakeFleet
from tests.unit.fleet_client.users import Make

OK = b"HTTP/1.1 200 OK\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEADER = b"X: " + b"a" * 1000 + b"\r\n"
PARTS = {
    "headers": ((OK,), HEADER),
    "one-header": ((OK + b"X: ",), b"a" * 65_536),
    "small-headers": ((OK,), b"X: 1\r\n" * 1000),
    "interim": ((), CONTINUE),
}


@contextmanager
def answering(parts: Iterator[bytes], pause_s: float = 0.0) -> Iterator[str]:
    """The address of a server that answers one request with these bytes."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65_536)
            try:
                for part in parts:
                    sock.sendall(part)
                    if over.wait(pause_s):
                        return
            except OSError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()
        thread.join(10.0)


@contextmanager
def asked(*begin: bytes, then: bytes, pause_s: float = 0.0) -> Iterator[Connection]:
    """A connection on which a request was sent, which is answered with that, and then this for ever."""
    with answering(itertools.chain(begin, itertools.repeat(then)), pause_s) as address:
        connection = Connection(address, None, 5.0)
        try:
            connection.limit(5.0)
            connection.send("GET", "/", (), b"")
            yield connection
        finally:
            connection.close()


@pytest.mark.parametrize("kind", PARTS)
def test_a_head_without_an_end_is_no_answer(kind: str) -> None:
    begin, then = PARTS[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with asked(*begin, then=then) as connection, pytest.raises(BadHttp):
        connection.head(20.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_a_trailer_without_an_end_is_no_answer() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n"
    with asked(head, then=HEADER) as connection:
        connection.head(20.0)
        with pytest.raises(BadHttp):
            b"".join(connection.body())


@pytest.mark.parametrize(("begin", "then"), [((OK + b"X: ",), b"a"), ((), CONTINUE)], ids=["byte", "interim"])
def test_the_timeout_is_for_the_whole_head(begin: tuple[bytes, ...], then: bytes) -> None:
    begun = time.monotonic()
    with asked(*begin, then=then, pause_s=0.1) as connection, pytest.raises(TimeoutError):
        connection.head(0.5)
    assert time.monotonic() - begun < 3.0


@pytest.mark.parametrize(
    ("then", "pause_s", "error"),
    [(b"a" * 10_000, 0.0, BadHttp), (b"a", 0.1, TimeoutError)],
    ids=["long", "slow"],
)
def test_an_answer_that_is_read_whole_has_a_size_and_a_time(
    then: bytes, pause_s: float, error: type[OSError]
) -> None:
    head = OK + b"Content-Length: 99999999\r\n\r\n"
    with asked(head, then=then, pause_s=pause_s) as connection:
        connection.head(5.0)
        with pytest.raises(error):
            connection.whole_body(100_000, 1.0 if pause_s else 20.0)


# -- the same through both transports -----------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTS)
def test_no_transport_keeps_a_head_without_an_end(user: Make, fleet: FakeFleet, kind: str) -> None:
    begin, then = PARTS[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with answering(itertools.chain(begin, itertools.repeat(then))) as address:
        fleet.loadbalancer.wrong = {n: {"address": address, "certificate": None} for n in (1, 2)}
        with pytest.raises(httpx2.RemoteProtocolError):
            user(fleet.url).request("GET", "/v1/models")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


@pytest.mark.parametrize(("begin", "then"), [((OK + b"X: ",), b"a"), ((), CONTINUE)], ids=["byte", "interim"])
def test_a_transports_timeout_is_for_the_whole_head(
    user: Make, fleet: FakeFleet, begin: tuple[bytes, ...], then: bytes
) -> None:
    begun = time.monotonic()
    with answering(itertools.chain(begin, itertools.repeat(then)), 0.2) as address:
        fleet.loadbalancer.wrong = {n: {"address": address, "certificate": None} for n in (1, 2)}
        with pytest.raises(httpx2.ReadTimeout):
            user(fleet.url).request("GET", "/v1/models", timeout=0.5)
    assert time.monotonic() - begun < 5.0
