"""What every HTTP face of ours promises, and how it is served on one event loop."""

import asyncio
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flask
import pytest
from flask import Flask, jsonify

from fleet_client import flags, private_files
from process.errors import ConfigError
from tests.paths import ROOT
from web import http_face
from web.http_face import Answer, BadField, Boolean, Choice, Held, ListOf, Mapping, Number, Text, Whole

KEY = "k" * 32


def wait_until(true: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
    """Return when it is; fail when it is not in time."""
    limit = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < limit, f"waited {limit_s:g} s for: {what}"
        time.sleep(0.002)


def nested(deep: int) -> list[Any]:
    """A list in a list in a list, as JSON may have it."""
    found: list[Any] = []
    for _ in range(deep):
        found = [found]
    return found


# -- fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Whole(0, 10), 10),
        (Number(0.0, 10.0), 10),
        (Number(0.0, 10.0), 0.5),
        (Text(1, 3), "abc"),
        (Boolean(), False),
        (Choice(("a", "b")), "b"),
        (ListOf(Whole(0, 9), 2), [1, 2]),
        (Mapping(), {"x": 1}),
    ],
    ids=str,
)
def test_a_good_value_passes(field: http_face.Field, value: object) -> None:
    assert http_face.check_fields({"f": value}, {"f": field}) == {"f": value}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (Whole(0, 10), [-1, 11, 1.0, "1", None, True, [1], 10**400]),
        (
            Number(0.0, 10.0),
            [-0.1, 10.1, "1", None, False, float("nan"), float("inf"), -float("inf"), 10**400],
        ),
        (Text(1, 3), ["", "abcd", 1, None, ["a"]]),
        (Text(1, 3, form=(re.compile("[a-c]*"), "a to c")), ["", "abca", 1, "d", "ad", "a\n"]),
        (Boolean(), [0, 1, "true", None]),
        (Choice(("a", "b")), ["c", 1, None, ["a"]]),
        (ListOf(Whole(0, 9), 2), [[1, 2, 3], [1, -1], ["1"], 1, "12", {"0": 1}]),
        (ListOf(Whole(0, 9), 9), [nested(900)]),
        (Mapping(), [[], 1, "x", None]),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_the_name_of_its_field(
    field: http_face.Field, values: list[object]
) -> None:
    for value in values:
        with pytest.raises(BadField, match=r"^f(\[\d\])?: wanted"):
            http_face.check_fields({"f": value}, {"f": field})


def test_a_missing_field_is_named_and_an_optional_one_may_be_absent_or_null() -> None:
    fields = {"a": Whole(0, 9), "b": Whole(0, 9, optional=True)}
    with pytest.raises(BadField, match=r"^a: is missing"):
        http_face.check_fields({"b": 1}, fields)
    assert http_face.check_fields({"a": 1}, fields) == {"a": 1}
    assert http_face.check_fields({"a": 1, "b": None}, fields) == {"a": 1}


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(BadField, match=r"^list\[3\]\.colour: unknown field; known are a"):
        http_face.check_fields({"a": 1, "colour": 2}, {"a": Whole(0, 9)}, "list[3].")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000,
    ],
    ids=["empty", "cut", "word", "nan", "infinity", "not-utf8", "deep", "long-number"],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadField, match=r"^body: not JSON"):
        http_face.parse_json(raw)


@pytest.mark.parametrize("said", [[], 1, "x", None, True], ids=str)
def test_json_that_is_no_object_is_refused(said: object) -> None:
    with pytest.raises(BadField, match=r"^body: wanted a JSON object"):
        http_face.check_fields(said, {})


# -- the app ---------------------------------------------------------------------------------------------


def make() -> Flask:
    """An app with one of each kind of view."""
    app = http_face.make_app("test", large_bodies={"/large": 200_000})

    @app.post("/echo")
    def echo() -> Any:
        return jsonify(http_face.body({"n": Whole(0, 9)}))

    @app.post("/large")
    def large() -> Any:
        return jsonify(size=len(http_face.json_body(200_000)))

    @app.get("/broken")
    def broken() -> Any:
        raise RuntimeError("secret detail")

    @app.get("/number")
    def number() -> Any:
        return jsonify(http_face.query_number("x", 7.0, 0.0, 9.0))

    @app.get("/guarded")
    @http_face.requires(lambda: {KEY, "another-key-of-16"})
    def guarded() -> Any:
        return jsonify(fine=True)

    @app.get("/slow")
    def slow() -> Any:
        return jsonify(thread=threading.current_thread().name)

    @http_face.direct(app, "/direct", {"n": Whole(0, 9)}, lambda: {KEY})
    def direct(said: dict[str, Any], client: str) -> Answer:
        if said["n"] == 9:
            raise RuntimeError("secret detail")
        return Answer({"n": said["n"]}, 200, (("X-Kind", "direct"),))

    return app


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
    answer = make().test_client().open(path, method=method, data=body)
    said = json.loads(answer.data)
    assert (answer.status_code, said["error"], set(said)) == (status, code, {"error", "message"})
    assert "secret detail" not in said["message"]
    assert ("secret detail" in caplog.text) == (status == 500)


def test_a_large_body_is_allowed_where_it_is_expected() -> None:
    body = json.dumps("x" * 150_000)
    assert make().test_client().post("/large", data=body).get_json() == {"size": 150_000}


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
    client = make().test_client()
    if path == "/direct":
        answer = client.post(path, json={"n": 1}, headers=headers)
        status = 401 if "another" in (header or "") else status
    else:
        answer = client.get(path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"


# -- keys, directories, sockets --------------------------------------------------------------------------


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "control.key"
    key = private_files.load_or_make_key(path)
    assert len(key) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert private_files.load_or_make_key(path) == key


def test_processes_that_make_a_key_at_once_get_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "control.key"
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(private_files.load_or_make_key(path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["control.key"]


@pytest.mark.parametrize(
    ("content", "mode", "what"),
    [
        (KEY, 0o640, "can be read by others"),
        (KEY, 0o604, "can be read by others"),
        ("", 0o600, "at least 16"),
        ("short", 0o600, "at least 16"),
        (f"{KEY}\nshort", 0o600, "at least 16"),
    ],
)
def test_a_key_file_that_is_open_or_weak_is_refused(
    tmp_path: Path, content: str, mode: int, what: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=what):
        private_files.load_keys(path)


def test_a_key_file_that_is_missing_binary_or_unwritable_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        private_files.load_keys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(ConfigError, match="not text"):
        private_files.load_keys(tmp_path / "binary")
    with pytest.raises(ConfigError, match="cannot be made"):
        private_files.load_or_make_key(tmp_path / "nowhere" / "key")


def test_a_file_of_several_keys_is_no_control_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n{'z' * 32}\n")
    path.chmod(0o600)
    assert private_files.load_keys(path) == {KEY, "z" * 32}
    with pytest.raises(ConfigError, match="wanted one key, got 2"):
        private_files.load_or_make_key(path)


def test_the_state_directory_is_private(tmp_path: Path) -> None:
    made = private_files.make_private_dir(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        private_files.make_private_dir(made)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        private_files.make_private_dir(tmp_path / "file")


@pytest.mark.parametrize("label", ["", "a/b", "..", ".", "a\n", "x" * 65])
def test_a_label_that_is_no_file_name_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match="--label"):
        private_files.default_state_dir(label)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    http_face.check_bind(host, 8200, keys_present=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_listening_elsewhere_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        http_face.check_bind(host, 8200, keys_present=False)
    http_face.check_bind(host, 8200, keys_present=True)


def test_a_port_in_use_is_a_config_error() -> None:
    with (
        http_face.bind_socket("127.0.0.1", 0) as sock,
        pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:"),
    ):
        http_face.bind_socket("127.0.0.1", sock.getsockname()[1])
    for host, port in (("127.0.0.1", 70_000), ("no-such-host.invalid", 80)):
        with pytest.raises(ConfigError, match="cannot listen"):
            http_face.bind_socket(host, port)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (None, 0, ""),
        (ConfigError("--port 0: wanted 1"), 2, "--port 0: wanted 1\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["fine", "config-error", "ctrl-c"],
)
def test_a_main_ends_with_one_line_at_most(
    fault: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if fault is not None:
            raise fault

    with pytest.raises(SystemExit) as ended:
        flags.run_main(main)
    assert ended.value.code == code
    assert capsys.readouterr().err.endswith(said)
    assert capsys.readouterr().err.count("\n") <= 1


# -- served ----------------------------------------------------------------------------------------------


@contextmanager
def served(app: Flask, **more: Any) -> Iterator[int]:
    """The port of a server that runs in a thread; it must end within a few seconds."""
    sock = http_face.bind_socket("127.0.0.1", 0)
    port: int = sock.getsockname()[1]
    server = http_face.Server(app, sock, **more)
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


BEARER = f"Bearer {KEY}"


def test_flask_views_and_direct_views_are_served() -> None:
    with served(make()) as port:
        assert call(port, "POST", "/echo", b'{"n": 3}') == (200, {"n": 3})
        assert call(port, "GET", "/number?x=2.5") == (200, 2.5)
        assert call(port, "POST", "/direct", b'{"n": 3}', Authorization=BEARER) == (200, {"n": 3})
        assert call(port, "GET", "/number?x=%6e%61n")[0] == 400
        assert call(port, "GET", "/nowhere%2f%ff")[0] == 404


def test_a_direct_view_has_the_same_checks_as_any(caplog: pytest.LogCaptureFixture) -> None:
    with served(make()) as port:
        assert call(port, "POST", "/direct", b'{"n": 3}')[0] == 401
        assert call(port, "POST", "/direct", b'{"n": 3}', Authorization="Bearer wrong")[0] == 401
        status, said = call(port, "POST", "/direct", b'{"n": 10}', Authorization=BEARER)
        assert (status, said["error"]) == (400, "bad_request")
        assert said["message"].startswith("n: wanted a whole number 0 to 9")
        assert call(port, "POST", "/direct", b" " * 65_537, Authorization=BEARER)[0] == 413
        assert call(port, "GET", "/direct")[0] == 405
        status, said = call(port, "POST", "/direct", b'{"n": 9}', Authorization=BEARER)
        assert (status, said["error"]) == (500, "internal_error")
    assert "secret detail" in caplog.text
    assert "secret detail" not in said["message"]


def test_a_direct_view_is_told_who_asks_by_his_key_and_without_keys_by_his_address() -> None:
    app = http_face.make_app("who")
    keys: set[str] = set()

    @http_face.direct(app, "/who", {}, lambda: keys)
    def who(said: dict[str, Any], client: str) -> Answer:
        return Answer({"client": client})

    with served(app) as port:
        assert call(port, "POST", "/who", b"{}") == (200, {"client": "127.0.0.1"})
        assert call(port, "POST", "/who", b"{}", Authorization="Bearer made-up") == (
            200,
            {"client": "127.0.0.1"},
        )
        keys |= {KEY, "other" * 8}
        named = [call(port, "POST", "/who", b"{}", Authorization=f"Bearer {key}")[1] for key in keys]
    names = {one["client"] for one in named}
    assert len(names) == 2
    assert all(re.fullmatch("key-[0-9a-f]{16}", name) for name in names)
    assert app.test_client().post("/who", json={}, headers={"Authorization": BEARER}).get_json() in named


def test_a_signed_view_gets_the_body_as_it_came_and_answers_without_flask() -> None:
    app = http_face.make_app("signed", large_bodies={"/long": 100_000})

    def view(body: bytes, authorization: str | None) -> Answer:
        if body == b"wrong":
            raise BadField("body", "is wrong")
        return Answer({"bytes": len(body), "by": authorization, "flask": flask.has_request_context()})

    http_face.signed(app, "/short")(view)

    @http_face.signed(app, "/long")
    def long_view(body: bytes, authorization: str | None) -> Answer:
        return view(body, authorization)

    said = {"bytes": 3, "by": "Fleet a:b", "flask": False}
    with served(app) as port:
        assert call(port, "POST", "/short", b"\0\xff{", Authorization="Fleet a:b") == (200, said)
        assert call(port, "POST", "/short", b"wrong") == (
            400,
            {"error": "bad_request", "message": "body: is wrong"},
        )
        assert call(port, "POST", "/short", b" " * 65_537)[0] == 413
        assert call(port, "POST", "/long", b" " * 65_537)[0] == 200
        assert call(port, "POST", "/long", b" " * 100_001)[0] == 413
        assert call(port, "GET", "/short")[0] == 405
    through_flask = app.test_client()
    answer = through_flask.post("/short", data=b"\0\xff{", headers={"Authorization": "Fleet a:b"})
    assert answer.get_json() == said | {"flask": True}
    assert through_flask.post("/short", data=b" " * 65_537).status_code == 413
    assert through_flask.post("/long", data=b" " * 65_537).status_code == 200


def test_json_nested_as_deep_as_may_be_is_refused_and_breaks_nothing() -> None:
    app = make()
    with served(app) as port:
        for deep in (*range(700, 1000, 7), 30_000):
            body = b'{"n": ' + b"[" * deep + b"]" * deep + b"}"
            assert call(port, "POST", "/direct", body, Authorization=BEARER)[0] == 400


def test_an_answer_may_be_json_already() -> None:
    app = http_face.make_app("ready")

    @http_face.direct(app, "/ready", {}, lambda: ())
    def ready(said: dict[str, Any], client: str) -> Answer:
        return Answer(b'{"it": "is"}')

    with served(app) as port:
        assert call(port, "POST", "/ready", b"{}") == (200, {"it": "is"})
    assert app.test_client().post("/ready", json={}).get_json() == {"it": "is"}


def rebuilt(raw: bytes) -> Any:
    """What the parts say, as one."""
    out: dict[str, Any] = {}
    for name, value, entry in http_face.json_parts(raw, "list"):
        if entry:
            out[name].append(value)
        else:
            out[name] = value
    return out


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"a": 1},
        {"list": []},
        {"list": [1]},
        {"list": [[], {}, "x,]}", [1, [2]], None]},
        {"a": {"list": [1, 2]}, "list": [{"list": [3]}], "b": [4, 5], "c": "}"},
        {"list": {"not": "a list"}},
        {"list": 5, "ü": "\u2028"},
    ],
    ids=str,
)
def test_json_read_in_parts_is_the_same_json(said: dict[str, Any]) -> None:
    for indent in (None, 1):
        assert rebuilt(json.dumps(said, indent=indent).encode()) == said
        assert rebuilt(b" \n" + json.dumps(said, ensure_ascii=False).encode() + b"\t ") == said


def test_what_is_not_json_is_refused_in_parts_too() -> None:
    whole = json.dumps({"a": 1, "list": [1, {"b": 2}], "c": "d"}).encode()
    bad = [whole[:n] for n in range(len(whole))]
    bad += [whole + b"x", whole + whole, b"[]", b"5", b'{"a": 1,}', b'{"list": [1,]}', b'{"list": [1 2]}']
    bad += [b"{5: 1}", b"{'a': 1}", b'{"a" 1}', b'{"list": [NaN]}', b'{"a": Infinity}', b"\xff", b"{,}"]
    bad += [b'{"list": [' + b"[" * 100_000 + b"]}"]
    for raw in bad:
        with pytest.raises(BadField, match=r"^body: not JSON"):
            rebuilt(raw)


def slowly() -> Flask:
    """An app whose PUT /slow lets others go between."""
    app = http_face.make_app("slowly", large_bodies={"/slow": 200_000})

    @http_face.awaited(app, "PUT", "/slow", lambda: {KEY})
    async def slow(raw: bytes) -> Answer:
        if raw == b"bad":
            raise BadField("f", "is bad")
        if raw == b"worse":
            raise RuntimeError("secret detail")
        while raw == b"wait" and not app.config.get("go"):
            await asyncio.sleep(0.001)
        return Answer({"length": len(raw)})

    @app.get("/go")
    def go() -> Any:
        app.config["go"] = True
        return jsonify()

    return app


def test_an_awaited_view_lets_others_be_answered_meanwhile() -> None:
    with served(slowly()) as port:
        answers: list[Any] = []
        thread = threading.Thread(
            target=lambda: answers.append(call(port, "PUT", "/slow", b"wait", Authorization=BEARER))
        )
        thread.start()
        assert call(port, "GET", "/go")[0] == 200
        thread.join(20.0)
    assert answers == [(200, {"length": 4})]


def test_an_awaited_view_has_the_same_checks_as_any(caplog: pytest.LogCaptureFixture) -> None:
    app = slowly()
    with served(app) as port:
        assert call(port, "PUT", "/slow", b"x")[0] == 401
        assert call(port, "PUT", "/slow", b" " * 150_000, Authorization=BEARER) == (200, {"length": 150_000})
        assert call(port, "PUT", "/slow", b" " * 200_001, Authorization=BEARER)[0] == 413
        assert call(port, "PUT", "/slow", b"x", Host="evil.example", Authorization=BEARER)[0] == 403
        assert call(port, "PUT", "/slow", b"bad", Authorization=BEARER)[1]["message"] == "f: is bad"
        status, said = call(port, "PUT", "/slow", b"worse", Authorization=BEARER)
    assert (status, said["error"]) == (500, "internal_error")
    assert "secret detail" in caplog.text
    client = app.test_client()
    assert client.put("/slow", data=b"x").status_code == 401
    assert client.put("/slow", data=b"xy", headers={"Authorization": BEARER}).get_json() == {"length": 2}
    assert client.put("/slow", data=b" " * 200_001, headers={"Authorization": BEARER}).status_code == 413


def test_two_authorization_headers_open_nothing() -> None:
    head = (
        f"Host: 127.0.0.1\r\nContent-Length: 8\r\nAuthorization: {BEARER}\r\nAuthorization: {BEARER}\r\n\r\n"
    )
    with served(make()) as port:
        for request in ("POST /direct", "GET /guarded"):
            assert b" 401 " in raw(port, f"{request} HTTP/1.1\r\n{head}".encode() + b'{"n": 1}')


@pytest.mark.parametrize("path", ["/echo", "/direct"])
def test_a_body_that_is_too_long_is_refused_however_it_is_sent(path: str) -> None:
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with served(make()) as port:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {BEARER}\r\n"
        assert b" 413 " in raw(port, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8)
        assert b" 413 " in raw(port, head.encode() + b"Content-Length: 9999999\r\n\r\n" + b" " * 70_000)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("LOCALHOST:8200", 200),
        ("[::1]:8200", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.1:8200", 403),
        ("", 403),
    ],
)
def test_loopback_answers_under_its_own_name_only(host: str, status: int) -> None:
    with served(make()) as port:
        assert call(port, "POST", "/echo", b'{"n": 1}', Host=host)[0] == status
        assert call(port, "POST", "/direct", b'{"n": 1}', Host=host, Authorization=BEARER)[0] == status
    with served(make(), any_host=True) as port:
        assert call(port, "POST", "/echo", b'{"n": 1}', Host=host)[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["no-http", "path-bytes"],
)
def test_what_is_not_http_gets_a_400(data: bytes) -> None:
    with served(make()) as port:
        assert b" 400 " in raw(port, data)
        assert call(port, "POST", "/echo", b'{"n": 1}')[0] == 200


def test_a_view_named_blocking_runs_beside_the_loop_and_the_others_on_it() -> None:
    with served(make(), blocking=["/slow"]) as port:
        assert call(port, "GET", "/slow")[1]["thread"].startswith("view")
    with served(make()) as port:
        assert not call(port, "GET", "/slow")[1]["thread"].startswith("view")


def test_everybody_is_let_in_before_anybody_has_had_many_answers() -> None:
    """A hundred clients that ask again as soon as they are answered, all connected before the server runs."""
    request = b"GET /work HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answers = [0] * 100
    app = http_face.make_app("working")

    @app.get("/work")
    def work() -> Any:
        time.sleep(0.002)  # on the loop: a turn in which many are answered takes long
        return jsonify()

    async def client(n: int, port: int, connected: asyncio.Barrier) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await connected.wait()
        while min(answers) == 0:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
            answers[n] += 1
        writer.close()
        await writer.wait_closed()

    async def all_of_them(port: int, start: Callable[[], None]) -> None:
        connected = asyncio.Barrier(len(answers) + 1)
        clients = [asyncio.create_task(client(n, port, connected)) for n in range(len(answers))]
        await connected.wait()
        start()
        await asyncio.gather(*clients)

    sock = http_face.bind_socket("127.0.0.1", 0)
    server = http_face.Server(app, sock)
    thread = threading.Thread(target=server.run)
    try:
        asyncio.run(asyncio.wait_for(all_of_them(sock.getsockname()[1], thread.start), 60.0))
    finally:
        server.stop()
        thread.join(timeout=10.0)
    assert max(answers) <= 20


# -- requests that wait ----------------------------------------------------------------------------------


class Waiting:
    """An app whose one route parks every request; what became of each is in `events`."""

    def __init__(self, wait_s: float) -> None:
        self.app = http_face.make_app("waiting")
        self.held: list[Held] = []
        self.events: list[str] = []

        @http_face.direct(self.app, "/wait", {}, lambda: ())
        def wait(said: dict[str, Any], client: str) -> Held:
            self.held.append(Held(wait_s, self.late, lambda: self.events.append("gave up")))
            return self.held[-1]

        @self.app.post("/free")
        def free() -> Any:
            """Answer the oldest."""
            held = self.held.pop(0)
            sent = held.answer(Answer({"it": "is yours"}), lambda: self.events.append("undelivered"))
            return jsonify(sent=sent)

    def late(self) -> Answer:
        """The time is over."""
        self.events.append("late")
        return Answer({"error": "late"}, 503)


@contextmanager
def client_of(port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection on which a request that waits has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20.0)
    connection.request("POST", "/wait", b"{}")
    try:
        yield connection
    finally:
        connection.close()


def test_a_request_that_waits_is_answered_when_somebody_answers_it() -> None:
    waiting = Waiting(20.0)
    with served(waiting.app) as port, client_of(port) as client:
        wait_until(lambda: waiting.held, "the request to be parked")
        assert call(port, "POST", "/free", b"{}") == (200, {"sent": True})
        answer = client.getresponse()
        assert (answer.status, json.loads(answer.read())) == (200, {"it": "is yours"})
    assert waiting.events == []


def test_a_request_that_waits_is_answered_late_when_its_time_is_over() -> None:
    waiting = Waiting(0.05)
    with served(waiting.app) as port, client_of(port) as client:
        assert client.getresponse().status == 503
        assert call(port, "POST", "/free", b"{}") == (200, {"sent": False})
    assert waiting.events == ["late", "undelivered"]


def test_a_request_whose_client_goes_away_is_forgotten() -> None:
    waiting = Waiting(20.0)
    with served(waiting.app) as port:
        with client_of(port):
            wait_until(lambda: waiting.held, "the request to be parked")
        wait_until(lambda: waiting.events, "the disconnect to be seen")
        assert call(port, "POST", "/free", b"{}") == (200, {"sent": False})
    assert waiting.events == ["gave up", "undelivered"]


def test_an_answer_made_before_the_request_is_parked_is_sent() -> None:
    app = http_face.make_app("early")

    @http_face.direct(app, "/wait", {}, lambda: ())
    def wait(said: dict[str, Any], client: str) -> Held:
        held = Held(20.0, lambda: Answer({}, 503), lambda: None)
        held.answer(Answer({"early": True}))
        return held

    with served(app) as port:
        assert call(port, "POST", "/wait", b"{}") == (200, {"early": True})


def test_under_another_server_a_request_that_would_wait_is_late_at_once() -> None:
    waiting = Waiting(20.0)
    assert waiting.app.test_client().post("/wait", json={}).status_code == 503
    assert waiting.events == ["late"]


def test_the_server_ends_with_a_503_for_everybody_who_waits() -> None:
    waiting = Waiting(600.0)
    with served(waiting.app) as port:
        clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=20.0) for _ in range(50)]
        for client in clients:
            client.request("POST", "/wait", b"{}")
        wait_until(lambda: len(waiting.held) == 50, "50 requests to be parked")
        begun = time.monotonic()
    took_s = time.monotonic() - begun
    answers = [client.getresponse() for client in clients]
    assert [a.status for a in answers] == [503] * 50
    assert json.loads(answers[0].read())["error"] == "shutting_down"
    for client in clients:
        client.close()
    assert waiting.events == ["gave up"] * 50
    assert took_s < 5.0


# -- background tasks and the end ------------------------------------------------------------------------


def test_a_background_task_that_crashes_is_logged_and_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_face, "RESTART_PAUSE_S", 0.01)
    starts: list[int] = []
    ended: list[int] = []

    async def shaky() -> None:
        starts.append(1)
        if len(starts) < 3:
            raise RuntimeError("it broke")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    with caplog.at_level(logging.ERROR), served(make(), background=[shaky]) as port:
        wait_until(lambda: len(starts) == 3, "the third start")
        assert call(port, "POST", "/echo", b'{"n": 1}')[0] == 200
    assert ended == [1]
    assert caplog.text.count("background task shaky failed") == 2
    assert "it broke" in caplog.text


SCRIPT = """
import asyncio, sys
from fleet_client import flags
from web import http_face
app = http_face.make_app("script")

@http_face.direct(app, "/wait", {}, lambda: ())
def wait(said, client):
    print("parked", flush=True)
    return http_face.Held(600.0, lambda: http_face.Answer({}), lambda: print("gave up", flush=True))

async def background():
    try:
        await asyncio.Event().wait()
    finally:
        print("background ended", flush=True)

def main():
    sock = http_face.bind_socket("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    try:
        http_face.serve(app, sock, background=[background])
    finally:
        print("cleaned up", flush=True)

flags.run_main(main)
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_a_signal_ends_the_process_cleanly(sig: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline())
        with client_of(port) as client:
            assert process.stdout.readline() == "parked\n"
            process.send_signal(sig)
            assert client.getresponse().status == 503
        said, complaints = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=10.0) == 0
    assert said.splitlines() == ["gave up", "background ended", "cleaned up"]
    assert complaints == ""
