"""An attacker with the network gets nothing: real HTTP, byte for byte, at the real model server.

The paced engine behind the real token check is served by uvicorn, in two processes on one home, as vLLM with
two API processes is. Whatever is sent without a token of its own is refused before the engine hears of it:
the event ring of the instance and the engine's own /metrics say so. Where HTTP is ambiguous only raw bytes
will do, because every client library would tidy them up.
"""

import asyncio
import base64
import contextlib
import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localcloud.paced.machine import SimulatedMachine
from process.children import dying_with_parent
from remote import events, tokens
from remote.events import Events
from remote.tokens import LIFE_S, Issuer, request_id
from tests.paths import ROOT
from tests.waiting import wait_for

LOCAL_KEY = "local-key-of-this-boot"
MASTER = "master-token-of-this-instance"

PROMPT_TOKENS = 2
BODY = json.dumps({"prompt": "8 signs.", "max_tokens": 1}).encode()
HIDDEN = json.dumps({"prompt": "smuggled" * 50, "max_tokens": 1}).encode()
"""A prompt of 100 tokens, so that the engine's count tells it from the other."""

GENEROUS_S = 30.0
"""For what takes milliseconds. It is never waited for in a test that passes."""


# -- the machine ---------------------------------------------------------------------------------------


@dataclass
class Server:
    """Two model servers on one home, and what its auth_server could issue."""

    boot: Path
    ports: tuple[int, int]
    issuer: Issuer
    ring: Events

    @property
    def port(self) -> int:
        """Of the first."""
        return self.ports[0]

    def token(self) -> str:
        """A fresh one."""
        return self.issuer.issue(1, time.monotonic())[0]

    def expired(self) -> str:
        """One whose time was over a millisecond ago; all else about it is right."""
        return self.issuer.issue(1, time.monotonic() - LIFE_S - 0.001)[0]

    def seen(self) -> tuple[int, int]:
        """(requests that were let in, prompt tokens that the engines have read)."""
        kinds = [e.kind for e in self.ring.after(0).events]
        return kinds.count("started"), sum(figure(port, "prompt_tokens_total") for port in self.ports)


def under_way(port: int) -> int:
    """Requests that the engine works on."""
    return figure(port, "num_requests_running") + figure(port, "num_requests_waiting")


def figure(port: int, name: str) -> int:
    """What the engine itself says, to the holder of the key of this boot."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GENEROUS_S)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {LOCAL_KEY}"})
        reply = connection.getresponse()
        text = reply.read().decode()
        assert reply.status == 200
    finally:
        connection.close()
    found = re.search(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def make_boot(directory: Path) -> Path:
    """A boot directory as remote/boot.py makes it."""
    directory.mkdir(parents=True, mode=0o700)
    tokens.make_store(str(directory))
    events.make_ring(str(directory))
    (directory / "local.key").write_text(LOCAL_KEY)
    return directory


@contextlib.contextmanager
def model_server(home: Path, number: int) -> Iterator[int]:
    """The port of a model server that runs with that home."""
    machine = home / "machine.json"
    SimulatedMachine("H100 SXM", 1, load_s=0.0, start_s=0.0, fatal_line=None, loaded=None).write(machine)
    log = home / f"model-{number}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/name"]
    command += ["--served-model-name", "vllm-13", "--host", "127.0.0.1", "--port", "0"]
    command += ["--middleware", "remote.token_check.TokenCheck"]
    environ = {
        "HOME": str(home),
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": os.pathsep.join((str(ROOT / "localcloud" / "image"), str(ROOT))),
        "LOCALCLOUD_MACHINE": str(machine),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(dying_with_parent(command), env=environ, stdout=out, stderr=out, cwd=home)
    try:
        up = wait_for(
            "it serves",
            lambda: re.search(rb"Uvicorn running on http://127.0.0.1:(\d+)", log.read_bytes()),
        )
        yield int(up[1])
        assert process.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    boot = make_boot(home / "fleet" / "boot")
    with model_server(home, 0) as first, model_server(home, 1) as second:
        yield Server(boot, (first, second), Issuer(str(boot), time.monotonic()), Events(str(boot)))


@contextlib.contextmanager
def lets_in(server: Server, requests: int, *, at_most: bool = False) -> Iterator[None]:
    """So many of our ordinary requests are let in meanwhile and read by the engine, and nothing else is.

    at_most: or fewer, and of those that are let in the engine may refuse some, unread.
    """
    started, read = server.seen()
    yield
    settle(server)
    now_started, now_read = server.seen()
    new, new_read = now_started - started, (now_read - read) / PROMPT_TOKENS
    if at_most:
        assert new_read <= new <= requests
    else:
        assert (new, new_read) == (requests, requests)


def settle(server: Server) -> None:
    """What was sent before has been looked at, and what of it was let in is over."""
    for port in server.ports:
        look_around(port)
        wait_for("the engine is idle", lambda port=port: under_way(port) == 0)  # type: ignore[misc]


def look_around(port: int) -> None:
    """A server of one thread has looked at all that came before: it answers what came later, later.

    Three times, because it may read in one turn of its loop and begin an answer in the next.
    """
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=GENEROUS_S) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")


# -- bytes ---------------------------------------------------------------------------------------------


def bearer(token: str) -> bytes:
    return b"Authorization: Bearer " + token.encode()


def request(
    *headers: bytes,
    line: bytes = b"POST /v1/completions HTTP/1.1",
    body: bytes = BODY,
    length: bytes | None = b"",
) -> bytes:
    """A request; length: another Content-Length line than the right one, None for none at all."""
    if length == b"":
        length = b"Content-Length: %d" % len(body)
    head = [line, b"Host: x", b"Content-Type: application/json", *headers, *([length] if length else [])]
    return b"\r\n".join((*head, b"", body))


def get(path: str, *headers: bytes, method: str = "GET", version: str = "1.1") -> bytes:
    line = f"{method} {path} HTTP/{version}".encode()
    return request(*headers, line=line, body=b"", length=None)


class Told:
    """Answers in what a server has said, as they come. bare: to a HEAD, so without bodies."""

    def __init__(self, *, bare: bool) -> None:
        self.raw = b""
        self.answers: list[tuple[int, bytes]] = []
        self._bare = bare

    @property
    def final(self) -> int:
        """How many, "100 Continue" not counted."""
        return sum(status >= 200 for status, _ in self.answers)

    def feed(self, chunk: bytes) -> None:
        """Take in what was received."""
        self.raw += chunk
        while (one := self._first()) is not None:
            self.answers.append(one)

    def _first(self) -> tuple[int, bytes] | None:
        head, gap, rest = self.raw.partition(b"\r\n\r\n")
        if not gap:
            return None
        status = int(re.match(rb"HTTP/1\.1 (\d{3}) ", head)[1])  # type: ignore[index]
        if self._bare or status < 200:
            size, body = 0, b""
        elif length := re.search(rb"(?im)^content-length: (\d+)", head):
            size = int(length[1])
            body = rest[:size]
        else:
            assert b"transfer-encoding: chunked" in head.lower()
            body, end, _ = rest.partition(b"0\r\n\r\n")
            size = len(body) + len(end) if end else len(rest) + 1
        if len(rest) < size:
            return None
        self.raw = rest[size:]
        return status, body


def answers(port: int, *sent: bytes, count: int = 1) -> list[tuple[int, bytes]]:
    """(status, body) of all that the server says to those bytes.

    Read until `count` came or it hung up, and then on, until it has looked at all that was sent.
    """
    told = Told(bare=sent[0].startswith(b"HEAD "))
    with socket.create_connection(("127.0.0.1", port), timeout=GENEROUS_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for piece in sent:
                sock.sendall(piece)
        # What it said before it hung up can be read, also when it did not wait for all of the request.
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while told.final < count:
                if not (chunk := sock.recv(65_536)):
                    return told.answers
                told.feed(chunk)
            look_around(port)
            sock.setblocking(False)
            while chunk := sock.recv(65_536):
                told.feed(chunk)
    return told.answers


def statuses(port: int, *sent: bytes, count: int = 1) -> list[int]:
    return [status for status, _ in answers(port, *sent, count=count)]


def refused(found: list[int]) -> bool:
    """Whether nothing was answered but errors of the client's, or nothing at all."""
    return all(400 <= status < 500 for status in found)


# -- no token of this boot -----------------------------------------------------------------------------


def used(server: Server) -> str:
    token = server.token()
    assert statuses(server.port, request(bearer(token))) == [200]
    return token


def others(server: Server) -> str:
    """Of another instance, with a number that is good here."""
    elsewhere = server.boot.parent / "another"
    if not elsewhere.exists():
        make_boot(elsewhere)
    here = number(server.token())
    issuer, now = Issuer(str(elsewhere), time.monotonic()), time.monotonic()
    (token,) = issuer.issue(1, now)
    return token if number(token) == here else issuer.issue(here - number(token), now)[-1]


def number(token: str) -> int:
    """The number of a token, with which it begins."""
    return int.from_bytes(base64.urlsafe_b64decode(token + "==")[:4], "big")


NOT_TOKENS: dict[str, Callable[[Server], list[bytes]]] = {
    "none": lambda s: [],
    "an empty one": lambda s: [b"Authorization: Bearer "],
    "nothing at all": lambda s: [b"Authorization:"],
    "a wrong one": lambda s: [bearer("A" * tokens.TOKEN_CHARS)],
    "a used one": lambda s: [bearer(used(s))],
    "an expired one": lambda s: [bearer(s.expired())],
    "another instance's": lambda s: [bearer(others(s))],
    "the master token": lambda s: [bearer(MASTER)],
    "the master token's hash": lambda s: [bearer("a" * 64)],
    "the key of the metrics": lambda s: [bearer(LOCAL_KEY)],
    "the id of a request": lambda s: [bearer(request_id(s.token()))],
    "a token in the wrong case": lambda s: [bearer(s.token().swapcase())],
    "a token and more": lambda s: [bearer(s.token() + "A")],
    "less than a token": lambda s: [bearer(s.token()[:-1])],
    "two tokens": lambda s: [bearer(s.token() + s.token())],
    "1 MB": lambda s: [bearer("A" * 1_000_000)],
    "1 MB of tokens": lambda s: [bearer((s.token() + " ") * 26_000)],
    "10,000 headers of it": lambda s: [bearer("A" * tokens.TOKEN_CHARS)] * 10_000,
    "a null byte": lambda s: [b"Authorization: Bearer \0" + s.token().encode()],
    "a null byte behind": lambda s: [bearer(s.token() + "\0")],
    "control characters": lambda s: [b"Authorization: Bearer\x0b" + s.token().encode()],
    "not ascii": lambda s: [b"Authorization: Bearer \xff\xfe\xc3\xa9"],
}


@pytest.mark.parametrize("what", NOT_TOKENS)
def test_what_is_no_token_of_this_boot_lets_nobody_in(server: Server, what: str) -> None:
    headers = NOT_TOKENS[what](server)
    with lets_in(server, 0):
        found = statuses(server.port, request(*headers))
    assert refused(found)


ELSEWHERE: dict[str, Callable[[bytes], bytes]] = {
    "in the query": lambda t: request(line=b"POST /v1/completions?token=" + t + b" HTTP/1.1"),
    "in the query as vLLM's key": lambda t: request(line=b"POST /v1/completions?api_key=" + t + b" HTTP/1.1"),
    "in the path": lambda t: request(line=b"POST /" + t + b"/v1/completions HTTP/1.1"),
    "as user of the URI": lambda t: request(line=b"POST http://" + t + b"@x/v1/completions HTTP/1.1"),
    "in the fragment": lambda t: request(line=b"POST /v1/completions#" + t + b" HTTP/1.1"),
    "in a cookie": lambda t: request(b"Cookie: Authorization=Bearer " + t),
    "in the body": lambda t: request(body=json.dumps({"prompt": "x", "api_key": t.decode()}).encode()),
    "in a form": lambda t: request(body=b"authorization=Bearer+" + t),
    "in X-API-Key": lambda t: request(b"X-API-Key: " + t),
    "in Proxy-Authorization": lambda t: request(b"Proxy-Authorization: Bearer " + t),
    "in X-Authorization": lambda t: request(b"X-Authorization: Bearer " + t),
    "in Authorization_": lambda t: request(b"Authorization_: Bearer " + t),
    "without a scheme": lambda t: request(b"Authorization: " + t),
    "by Basic": lambda t: request(b"Authorization: Basic " + t),
    "by Token": lambda t: request(b"Authorization: Token " + t),
    "in a list": lambda t: request(b"Authorization: Bearer x, Bearer " + t),
    "behind a comma": lambda t: request(b"Authorization: Bearer " + t + b", x"),
    "in two headers": lambda t: request(b"Authorization: Bearer " + t, b"Authorization: Bearer " + t),
    "in the first of two": lambda t: request(b"Authorization: Bearer " + t, b"authorization: Bearer x"),
    "in the second of two": lambda t: request(b"AUTHORIZATION: Basic x", b"Authorization: Bearer " + t),
    "in a tabbed header": lambda t: request(b"Authorization: Bearer\t" + t),
    "in quotes": lambda t: request(b'Authorization: Bearer "' + t + b'"'),
    "percent-encoded": lambda t: request(b"Authorization: Bearer " + b"".join(b"%%%02x" % c for c in t)),
    "for a websocket": lambda t: get(
        "/v1/realtime",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        b"Sec-WebSocket-Protocol: openai-insecure-api-key." + t,
    ),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_token_counts_in_its_header_only_and_is_not_lost_elsewhere(server: Server, where: str) -> None:
    token = server.token()
    with lets_in(server, 0):
        found = statuses(server.port, ELSEWHERE[where](token.encode()))
    assert refused(found)
    assert found, "it is told so"
    with lets_in(server, 1):
        assert statuses(server.port, request(bearer(token))) == [200], "the token itself is still good"


SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "a scheme in lower case": lambda t: request(b"authorization: bearer " + t),
    "a scheme in odd case": lambda t: request(b"AuThOrIzAtIoN: bEaReR " + t),
    "spaces before the value": lambda t: request(b"Authorization:    Bearer " + t),
    "spaces behind it": lambda t: request(b"Authorization: Bearer " + t + b"   "),
    "tabs around it": lambda t: request(b"Authorization:\tBearer " + t + b"\t"),
    "two spaces inside": lambda t: request(b"Authorization: Bearer  " + t),
    "a folded line": lambda t: request(b"Authorization: Bearer\r\n " + t),
    "a line folded with a tab": lambda t: request(b"Authorization: Bearer \r\n\t" + t),
    "a fold behind it": lambda t: request(b"Authorization: Bearer " + t + b"\r\n x"),
    "a space before the colon": lambda t: request(b"Authorization : Bearer " + t),
    "bare line feeds": lambda t: request(bearer(t.decode())).replace(b"\r\n", b"\n"),
    "a bare carriage return": lambda t: request(b"X-A: b\rAuthorization: Bearer " + t),
    "a leading space": lambda t: request(b" Authorization: Bearer " + t),
    "an empty line in front": lambda t: b"\r\n" + request(bearer(t.decode())),
    "HTTP/1.0": lambda t: request(bearer(t.decode()), line=b"POST /v1/completions HTTP/1.0"),
    "HTTP/1.2": lambda t: request(bearer(t.decode()), line=b"POST /v1/completions HTTP/1.2"),
    "an absolute URI": lambda t: request(bearer(t.decode()), line=b"POST http://y/v1/completions HTTP/1.1"),
    "a method in lower case": lambda t: request(bearer(t.decode()), line=b"post /v1/completions HTTP/1.1"),
    "chunks": lambda t: request(
        bearer(t.decode()),
        b"Transfer-Encoding: chunked",
        length=None,
        body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    ),
    "a trailer": lambda t: request(
        b"Transfer-Encoding: chunked",
        b"Trailer: Authorization",
        length=None,
        body=b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(BODY), BODY, bearer(t.decode())),
    ),
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_however_a_token_is_spelled_it_admits_one_request(server: Server, how: str) -> None:
    """HTTP allows some of these and forbids others: whichever the server takes, it takes once."""
    token = server.token()
    with lets_in(server, 1):
        found = statuses(server.port, SPELLINGS[how](token.encode()))
        assert found in ([200], [400], [401])
        again = statuses(server.port, SPELLINGS[how](token.encode()))
        assert again in ([400], [401])
        plain = statuses(server.ports[1], request(bearer(token)))
        assert [found, plain] in ([[200], [401]], [[400], [200]], [[401], [200]])


def test_a_token_with_any_bit_changed_lets_nobody_in(server: Server) -> None:
    """Also the four bits that stand for nothing: a second spelling would be a second request."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    token = server.token()
    with lets_in(server, 0):
        for at, sign in enumerate(token):
            for bit in range(6):
                other = alphabet[alphabet.index(sign) ^ (1 << bit)]
                changed = token[:at] + other + token[at + 1 :]
                assert statuses(server.port, get("/v1/models", bearer(changed))) == [401]
    with lets_in(server, 1):
        assert statuses(server.port, request(bearer(token))) == [200]


# -- other doors ---------------------------------------------------------------------------------------

CLOSED = (
    *("/", "/metrics", "/metrics/", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/version"),
    *("/v1/models", "/v1/models/vllm-13", "/v1/completions", "/v1/chat/completions", "/v1/responses"),
    *("/tokenize", "/detokenize", "/load", "/ping", "/invocations", "/server_info", "/v1/embeddings"),
    *("/reset_prefix_cache", "/sleep", "/wake_up", "/start_profile", "/v1/load_lora_adapter", "/pooling"),
    *("//health", "/health/", "/HEALTH", "/Health", "/health;x", "/health.json", "/health%20", "/health%00"),
    *("/%2fhealth", "/%252fhealth", "/./health", "/x/../health", "/health/../v1/models", "/health/..%2fv1"),
    *("/health%2f..%2fv1%2fmodels", "/health/../../v1/completions", "/health\\..\\v1", "/healthz"),
    *("http://x//health", "http://x/health/../v1/models", "http://health/", "//x/health", "/health%3f"),
)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_no_other_path_opens_without_a_token(server: Server, method: str) -> None:
    with lets_in(server, 0):
        for path in CLOSED:
            for more in (
                (),
                (b"Host: health",),
                (b"X-Forwarded-Prefix: /health", b"X-Original-URL: /health"),
            ):
                found = statuses(server.port, get(path, *more, method=method))
                assert found in ([401], [400]), path


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
def test_health_is_open_to_get_only(server: Server, method: str) -> None:
    line = f"{method} {'x:80' if method == 'CONNECT' else '/health'} HTTP/1.1".encode()
    with lets_in(server, 0):
        for more in ((), (b"X-HTTP-Method-Override: GET", b"X-Method: GET")):
            found = statuses(server.port, request(*more, line=line, body=b"", length=None))
            assert found == [400 if method == "CONNECT" else 401], "before the engine can say 405"


@pytest.mark.parametrize(
    "uri", ["/health", "/health?x", "/health?/v1/models", "http://x/health", "/%68ealth"]
)
def test_health_says_nothing_however_it_is_written(server: Server, uri: str) -> None:
    with lets_in(server, 0):
        assert answers(server.port, get(uri)) == [(200, b"")]


@pytest.mark.parametrize("uri", ["health", "%2fhealth", "*", "x:80", "", "/v1/models /health", "/health\x01"])
def test_a_uri_that_is_none_is_refused(server: Server, uri: str) -> None:
    with lets_in(server, 0):
        assert refused(statuses(server.port, get(uri)))


def test_the_key_of_the_metrics_opens_nothing_else(server: Server) -> None:
    key = bearer(LOCAL_KEY)
    with lets_in(server, 0):
        assert statuses(server.port, get("/metrics?x", key)) == [200]
        for method in ("POST", "HEAD", "PUT", "OPTIONS"):
            assert statuses(server.port, get("/metrics", key, method=method)) == [401]
        for path in ("/metrics/", "//metrics", "/METRICS", "/metrics/../v1/models", "/v1/models", "/version"):
            assert statuses(server.port, get(path, key)) == [401]
        assert statuses(server.port, get("/metrics", key, key)) == [401]
        assert statuses(server.port, request(key)) == [401]


ODD_PROTOCOLS = {
    "HTTP/2 with prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/2 in the request line": request(line=b"POST /v1/completions HTTP/2.0"),
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/0.9 with a version": get("/v1/models", version="0.9"),
    "HTTP/1.0": get("/v1/models", version="1.0"),
    "HTTP/1.0, kept alive": get("/v1/models", b"Connection: keep-alive", version="1.0") * 2,
    "HTTP/9.9": get("/v1/models", version="9.9"),
    "h2c": get(
        "/v1/models", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"
    ),
    "h2c at the open door": get("/health", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c")
    + get("/v1/models"),
    "a websocket": get(
        "/v1/realtime",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ),
    "a websocket at the open door": get(
        "/health",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    + request(),
    "TLS": bytes.fromhex("160301007a010000760303") + bytes(111),
    "TLS, by its first bytes": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "an RTSP request": b"OPTIONS * RTSP/1.0\r\n\r\n",
    "ICY": b"SOURCE /v1/models ICE/1.0\r\n\r\n",
    "nothing but line ends": b"\r\n" * 1000 + b"x",
    "noise": bytes(range(256)) * 4,
    "a proxy's greeting": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + get("/v1/models"),
}


@pytest.mark.parametrize("what", ODD_PROTOCOLS)
def test_another_protocol_is_no_way_in(server: Server, what: str) -> None:
    with lets_in(server, 0):
        found = statuses(server.port, ODD_PROTOCOLS[what])
    opened = [200] if "open door" in what else []
    assert found[: len(opened)] == opened
    assert refused(found[len(opened) :])


# -- one connection, several requests ------------------------------------------------------------------


def hidden(*headers: bytes) -> bytes:
    """A request that nobody has paid for."""
    return request(*headers, body=HIDDEN)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


CHUNKS = b"Transfer-Encoding: chunked"

SMUGGLED: dict[str, Callable[[bytes], bytes]] = {
    "CL.TE": lambda key: request(key, CHUNKS, body=b"0\r\n\r\n" + hidden()),
    "CL.TE, the other order": lambda key: request(
        CHUNKS, b"Content-Length: %d" % len(hidden()), key, length=None, body=b"0\r\n\r\n" + hidden()
    ),
    "TE.CL": lambda key: request(key, CHUNKS, length=b"Content-Length: 4", body=chunked(hidden())),
    "TE.CL after a body": lambda key: request(
        key, b"Content-Length: %d" % len(BODY), CHUNKS, length=None, body=BODY + hidden()
    ),
    "TE.TE": lambda key: request(
        key, CHUNKS, b"Transfer-Encoding: identity", length=None, body=chunked(BODY) + hidden()
    ),
    "xchunked": lambda key: request(
        key, b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + hidden(), length=None
    ),
    "xchunked and a length": lambda key: request(
        key, b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + hidden()
    ),
    "chunked, not last": lambda key: request(
        key, b"Transfer-Encoding: chunked, gzip", length=None, body=chunked(BODY) + hidden()
    ),
    "chunked twice": lambda key: request(
        key, b"Transfer-Encoding: chunked, chunked", length=None, body=chunked(BODY) + hidden()
    ),
    "chunked behind a vertical tab": lambda key: request(
        key, b"Transfer-Encoding:\x0bchunked", body=b"0\r\n\r\n" + hidden()
    ),
    "chunked before a colon with space": lambda key: request(
        key, b"Transfer-Encoding : chunked", body=b"0\r\n\r\n" + hidden()
    ),
    "chunked on a folded line": lambda key: request(
        key, b"X-A: b\r\n Transfer-Encoding: chunked", body=b"0\r\n\r\n" + hidden()
    ),
    "two lengths": lambda key: request(
        key, b"Content-Length: %d" % len(BODY), b"Content-Length: 0", length=None, body=BODY + hidden()
    ),
    "two lengths, the other order": lambda key: request(
        key, b"Content-Length: 0", b"Content-Length: %d" % len(BODY), length=None, body=BODY + hidden()
    ),
    "two equal lengths": lambda key: request(key, b"Content-Length: %d" % len(BODY)) + hidden(),
    "a list of lengths": lambda key: request(key, length=b"Content-Length: 0, 9", body=hidden()),
    "a length with a sign": lambda key: request(key, length=b"Content-Length: +0", body=hidden()),
    "a negative length": lambda key: request(key, length=b"Content-Length: -1", body=hidden()),
    "a length in hex": lambda key: request(key, length=b"Content-Length: 0x0", body=hidden()),
    "a length over all bounds": lambda key: request(
        key, length=b"Content-Length: 18446744073709551616", body=hidden()
    ),
    "a length that wraps to ours": lambda key: request(
        key, length=b"Content-Length: %d" % (2**64 + len(BODY)), body=BODY + hidden()
    ),
    "no length": lambda key: request(key, length=None, body=hidden()),
    "a chunk's size that wraps": lambda key: request(
        key, CHUNKS, length=None, body=b"1%016x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n" + hidden()
    ),
    "a chunk's size with a sign": lambda key: request(
        key, CHUNKS, length=None, body=b"+%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n" + hidden()
    ),
    "a line feed ends a chunk's size": lambda key: request(
        key, CHUNKS, length=None, body=b"%x\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n" + hidden()
    ),
    "a chunk longer than it says": lambda key: request(
        key, CHUNKS, length=None, body=b"1\r\n" + BODY + b"\r\n0\r\n\r\n" + hidden()
    ),
    "a chunk's extension with a line": lambda key: request(
        key, CHUNKS, length=None, body=b"%x;a=b\nX\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n" + hidden()
    ),
    "in the chunk": lambda key: request(key, CHUNKS, length=None, body=chunked(hidden())),
    "in the trailers": lambda key: request(
        key, CHUNKS, length=None, body=chunked(BODY)[:-2] + b"X-A: b\r\n" + hidden()
    ),
    "in the body": lambda key: request(key, body=hidden()),
    "in a header's value": lambda key: request(key, b"X-A: b\r\n\r\n" + hidden()),
    "in a header with bare returns": lambda key: request(
        key, b"X-A: b\r\r" + hidden().replace(b"\r\n", b"\r")
    ),
    "in a header's name": lambda key: request(key, b"X-A\r\n\r\n" + hidden() + b": b"),
    "behind a null byte": lambda key: request(key, b"X-A: b\0\r\n\r\n" + hidden()),
    "behind Connection: close": lambda key: request(key, b"Connection: close") + hidden(),
    "behind an upgrade": lambda key: request(key, b"Connection: Upgrade", b"Upgrade: h2c") + hidden(),
    "behind a websocket": lambda key: request(key, b"Connection: Upgrade", b"Upgrade: websocket") + hidden(),
    "behind HTTP/1.0": lambda key: request(key, line=b"POST /v1/completions HTTP/1.0") + hidden(),
    "behind Expect": lambda key: request(key, b"Expect: 100-continue") + hidden(),
    "behind a wrong Expect": lambda key: request(key, b"Expect: 200-ok") + hidden(),
    "behind noise": lambda key: request(key) + b"\0\0\0\0" + hidden(),
    "in the same packet": lambda key: request(key) + hidden(),
    "twice in the same packet": lambda key: request(key) + hidden() + hidden(),
    "with the token named to be hop-by-hop": lambda key: (
        request(key, b"Connection: Authorization") + hidden()
    ),
}


@pytest.mark.parametrize("paid", [True, False], ids=["behind a token", "behind nothing"])
@pytest.mark.parametrize("how", SMUGGLED)
def test_a_request_hidden_in_another_is_never_served(server: Server, how: str, paid: bool) -> None:
    """The one in front may be served, for its token; what hides in it has none."""
    token = server.token()
    key = bearer(token) if paid else b"X-A: b"
    with lets_in(server, 1 if paid else 0, at_most=True):
        found = statuses(server.port, SMUGGLED[how](key))
    assert found.count(200) <= (1 if paid else 0)
    assert refused([status for status in found if status not in (100, 200)])


@pytest.mark.parametrize("how", SMUGGLED)
def test_nor_is_it_behind_the_open_door(server: Server, how: str) -> None:
    raw = SMUGGLED[how](b"X-A: b").replace(b"POST /v1/completions ", b"GET /health ", 1)
    with lets_in(server, 0):
        found = answers(server.port, raw)
    assert [body for status, body in found if status == 200] in ([], [b""])
    assert refused([status for status, _ in found if status != 200])


def test_a_token_behind_a_token_is_served_in_order(server: Server) -> None:
    """Pipelining, HTTP/1.1: answers come in the order of the requests, each for a token of its own."""

    def ask(text: str, token: str) -> bytes:
        return request(
            bearer(token), body=json.dumps({"prompt": text, "max_tokens": 0, "echo": True}).encode()
        )

    with lets_in(server, 3):
        raw = b"".join(ask(text, server.token()) for text in ("prompt 1", "prompt 2", "prompt 3"))
        found = answers(server.port, raw, count=3)
    assert [status for status, _ in found] == [200, 200, 200]
    texts = [json.loads(body)["choices"][0]["text"] for _, body in found]
    assert texts == ["prompt 1", "prompt 2", "prompt 3"]


def test_a_token_is_good_for_the_request_it_came_with_only(server: Server) -> None:
    token = server.token()
    with lets_in(server, 1):
        assert statuses(server.port, request(bearer(token)) + request(), count=2) == [200, 401]
    token = server.token()
    with lets_in(server, 1):
        assert statuses(server.port, request(bearer(token)) * 2, count=2) == [200, 401]
    token = server.token()
    with lets_in(server, 0):
        # What stands behind a refused request is not read: its sender cannot mean this connection any more.
        assert statuses(server.port, request() + request(bearer(token)), count=2) == [401]
    with lets_in(server, 1):
        assert statuses(server.port, request(bearer(token))) == [200]


def test_a_request_in_single_bytes_is_checked_like_any_other(server: Server) -> None:
    def bytewise(raw: bytes) -> list[bytes]:
        return [raw[i : i + 1] for i in range(len(raw))]

    with lets_in(server, 1):
        assert statuses(server.port, *bytewise(request())) == [401]
        assert statuses(server.port, *bytewise(request(bearer(server.token())))) == [200]


# -- size and time -------------------------------------------------------------------------------------


def test_a_body_of_a_gigabyte_is_refused_before_it_is_sent(server: Server) -> None:
    huge = b"Content-Length: %d" % 2**30
    with lets_in(server, 0):
        assert statuses(server.port, request(length=huge)) == [401]
        expecting = request(b"Expect: 100-continue", length=huge, body=b"")
        assert statuses(server.port, expecting) == [401], "nobody is told to go on"
        assert statuses(server.port, request(CHUNKS, length=None, body=b"40000000\r\nx")) == [401]


def test_who_sends_headers_slowly_holds_up_nobody(server: Server) -> None:
    """Two hundred of them, each with half of a header; and they get nothing for it."""
    with contextlib.ExitStack() as stack, lets_in(server, 20):
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=GENEROUS_S))
            for _ in range(200)
        ]
        for sock in slow:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bea")
        for _ in range(20):
            assert statuses(server.port, request(bearer(server.token()))) == [200]
            for sock in slow:
                sock.sendall(b"r")


@pytest.mark.parametrize("what", ["noise", "h2c"])
def test_strangers_cannot_fill_the_disk_with_lines_of_the_log(server: Server, what: str) -> None:
    log = server.boot.parent.parent / "model-0.log"
    statuses(server.port, request())
    before = log.stat().st_size
    for _ in range(10):
        assert refused(statuses(server.port, ODD_PROTOCOLS[what]))
    assert log.stat().st_size == before


# -- a race --------------------------------------------------------------------------------------------


class Line:
    """A kept-alive connection of a racer; opened again when the server has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ready(self) -> None:
        """It is connected."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)

    def send(self, raw: bytes) -> None:
        """It is on its way."""
        assert self._streams is not None
        self._streams[1].write(raw)

    async def status(self) -> int:
        """Of the next answer."""
        assert self._streams is not None
        reader, writer = self._streams
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
        if b"connection: close" in head:
            writer.close()
            self._streams = None
        return int(head.split()[1])

    async def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()


@pytest.mark.parametrize("processes", [1, 2])
def test_of_two_requests_that_race_for_a_token_one_is_served(server: Server, processes: int) -> None:
    """A thousand times: at one process, and at two that share nothing but the file of spent tokens."""
    issued = server.issuer.issue(1000, time.monotonic())
    waiting = list(issued)
    outcomes: dict[str, list[int]] = {}

    async def race() -> None:
        lines = [Line(server.ports[0]), Line(server.ports[processes - 1])]
        while waiting:
            token = waiting.pop()
            for line in lines:
                await line.ready()
            for line in lines:
                line.send(request(bearer(token)))
            outcomes[token] = sorted(await asyncio.gather(*(line.status() for line in lines)))
            lines.reverse()
        for line in lines:
            await line.close()

    async def races() -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(*(race() for _ in range(32)))

    with lets_in(server, 1000):
        before = server.ring.newest()
        asyncio.run(races())
    assert outcomes == {token: [200, 401] for token in issued}
    started = [e.request_id for e in server.ring.after(before).events if e.kind == "started"]
    assert sorted(started) == sorted(request_id(token) for token in issued)


# -- a client that goes away ---------------------------------------------------------------------------

TOKEN_S = 0.0047
"""Seconds a token of a stream alone, on the GPU that the machine is said to have."""


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


LEAVE: dict[str, Callable[[socket.socket], None]] = {
    "hangs up": lambda sock: sock.close(),
    "resets": reset,
    "stops talking": lambda sock: sock.shutdown(socket.SHUT_WR),
}


@pytest.mark.alone
@pytest.mark.parametrize("stream", [True, False], ids=["in a stream", "before an answer"])
@pytest.mark.parametrize("how", LEAVE)
def test_a_client_that_vanishes_is_noted_within_a_second(server: Server, how: str, stream: bool) -> None:
    """The engine's pace is the clock: an answer of 3,000 tokens takes 14 s; not a second of it is made."""
    token = server.token()
    name = request_id(token)
    body = {"prompt": "8 signs.", "max_tokens": 3000, "ignore_eos": True, "stream": stream}

    def noted() -> list[events.Event]:
        return [e for e in server.ring.after(0).events if e.request_id == name]

    connect = socket.create_connection(("127.0.0.1", server.port), timeout=GENEROUS_S)
    with lets_in(server, 1, at_most=True), connect as sock:
        sock.sendall(request(bearer(token), body=json.dumps(body).encode()))
        if stream:
            got = sock.recv(65_536)
            while got.count(b"data: {") < 5:
                got += sock.recv(65_536)
        else:
            wait_for("it is let in", lambda: noted())
        LEAVE[how](sock)
        wait_for("its end is noted", lambda: len(noted()) == 2)
    end = noted()[1]
    assert end.kind == "aborted"
    if stream:
        assert end.size < got.count(b"data: {") + 1.0 / TOKEN_S
