"""How a Flask app and its direct views are served on one event loop."""

import asyncio
import http.client
import json
import re
import threading
import time
from typing import Any

import flask
import pytest
from flask import Flask, jsonify

from tests.asgi_client import AsgiClient
from tests.sample_app import Empty, sample_app
from tests.web_server import BEARER, KEY, call, client_of, raw, served, wait_until
from web.answers import JsonAnswer, problem
from web.app import make_app
from web.direct import Asker, DirectRoutes, Held
from web.messages.decoding import BadField


def test_flask_views_and_direct_views_are_served() -> None:
    with served(sample_app()) as port:
        assert call(port, "POST", "/echo", b'{"n": 3}') == (200, {"n": 3})
        assert call(port, "GET", "/number?x=2.5") == (200, 2.5)
        assert call(port, "POST", "/direct", b'{"n": 3}', Authorization=BEARER) == (200, {"n": 3})
        assert call(port, "GET", "/number?x=%6e%61n")[0] == 400
        assert call(port, "GET", "/nowhere%2f%ff")[0] == 404


def test_a_direct_view_has_the_same_checks_as_any(caplog: pytest.LogCaptureFixture) -> None:
    with served(sample_app()) as port:
        assert call(port, "POST", "/direct", b'{"n": 3}')[0] == 401
        assert call(port, "POST", "/direct", b'{"n": 3}', Authorization="Bearer wrong")[0] == 401
        status, said = call(port, "POST", "/direct", b'{"n": 10}', Authorization=BEARER)
        assert (status, said["error"]) == (400, "bad_request")
        assert said["message"].startswith("n: wanted `int` <= 9")
        assert call(port, "POST", "/direct", b" " * 65_537, Authorization=BEARER)[0] == 413
        assert call(port, "GET", "/direct")[0] == 405
        status, said = call(port, "POST", "/direct", b'{"n": 9}', Authorization=BEARER)
        assert (status, said["error"]) == (500, "internal_error")
    assert "secret detail" in caplog.text
    assert "secret detail" not in said["message"]


def test_a_direct_view_is_told_who_asks_by_his_key_and_without_keys_by_his_address() -> None:
    app = make_app("who")
    keys: set[str] = set()

    @DirectRoutes(app).post("/who", Empty, lambda: keys)
    def who(said: Empty, client: str) -> JsonAnswer:
        return JsonAnswer({"client": client})

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


def test_a_signed_view_gets_the_body_as_it_came_and_answers_without_flask() -> None:
    app = make_app("signed", large_bodies={"/long": 100_000})

    def view(body: bytes, asker: Asker) -> JsonAnswer:
        if body == b"wrong":
            raise BadField("body", "is wrong")
        return JsonAnswer(
            {"bytes": len(body), "by": asker.authorization, "flask": flask.has_request_context()}
        )

    routes = DirectRoutes(app)
    routes.add("POST", "/short", view)
    routes.add("POST", "/long", view)
    said = {"bytes": 3, "by": "Fleet a:b", "flask": False}
    with served(app) as port:
        assert call(port, "POST", "/short", b"\0\xff{", Authorization="Fleet a:b") == (200, said)
        assert call(port, "POST", "/short", b"wrong") == (
            400,
            problem(400, "bad_request", "body: is wrong"),
        )
        assert call(port, "POST", "/short", b" " * 65_537)[0] == 413
        assert call(port, "POST", "/long", b" " * 65_537)[0] == 200
        assert call(port, "POST", "/long", b" " * 100_001)[0] == 413
        assert call(port, "GET", "/short")[0] == 405


def test_json_nested_as_deep_as_may_be_is_refused_and_breaks_nothing() -> None:
    app = sample_app()
    with served(app) as port:
        for deep in (*range(700, 1000, 7), 30_000):
            body = b'{"n": ' + b"[" * deep + b"]" * deep + b"}"
            assert call(port, "POST", "/direct", body, Authorization=BEARER)[0] == 400


def test_a_direct_route_is_answered_with_its_own_methods_only() -> None:
    app = make_app("methods")
    routes = DirectRoutes(app)
    routes.add("PUT", "/it", lambda *_: JsonAnswer({}))
    routes.add("POST", "/it", lambda *_: JsonAnswer({}))
    client = AsgiClient(app)
    answer = client.get("/it")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST, PUT")
    assert answer.get_json()["error"] == "method_not_allowed"
    assert client.put("/it").status_code == 200
    assert app.test_client().post("/it").status_code == 404, "Flask does not know it"


def test_an_answer_may_be_json_already() -> None:
    app = make_app("ready")

    @DirectRoutes(app).post("/ready", Empty, lambda: ())
    def ready(said: Empty, client: str) -> JsonAnswer:
        return JsonAnswer(b'{"it": "is"}')

    with served(app) as port:
        assert call(port, "POST", "/ready", b"{}") == (200, {"it": "is"})


def slowly() -> Flask:
    """An app whose PUT /slow lets others go between."""
    app = make_app("slowly", large_bodies={"/slow": 200_000})

    @DirectRoutes(app).put("/slow", lambda: {KEY})
    async def slow(raw: bytes) -> JsonAnswer:
        if raw == b"bad":
            raise BadField("f", "is bad")
        if raw == b"worse":
            raise RuntimeError("secret detail")
        while raw == b"wait" and not app.config.get("go"):
            await asyncio.sleep(0.001)
        return JsonAnswer({"length": len(raw)})

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


def test_two_authorization_headers_open_nothing() -> None:
    head = (
        f"Host: 127.0.0.1\r\nContent-Length: 8\r\nAuthorization: {BEARER}\r\nAuthorization: {BEARER}\r\n\r\n"
    )
    with served(sample_app()) as port:
        for request in ("POST /direct", "GET /guarded"):
            assert b" 401 " in raw(port, f"{request} HTTP/1.1\r\n{head}".encode() + b'{"n": 1}')


@pytest.mark.parametrize("path", ["/echo", "/direct"])
def test_a_body_that_is_too_long_is_refused_however_it_is_sent(path: str) -> None:
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with served(sample_app()) as port:
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
    with served(sample_app()) as port:
        assert call(port, "POST", "/echo", b'{"n": 1}', Host=host)[0] == status
        assert call(port, "POST", "/direct", b'{"n": 1}', Host=host, Authorization=BEARER)[0] == status
    with served(sample_app(), loopback=False) as port:
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
    with served(sample_app()) as port:
        assert b" 400 " in raw(port, data)
        assert call(port, "POST", "/echo", b'{"n": 1}')[0] == 200


def test_a_view_named_blocking_runs_beside_the_loop_and_the_others_on_it() -> None:
    with served(sample_app(), blocking=["/slow"]) as port:
        assert call(port, "GET", "/slow")[1]["thread"].startswith("view")
    with served(sample_app()) as port:
        assert not call(port, "GET", "/slow")[1]["thread"].startswith("view")


# -- requests that wait ----------------------------------------------------------------------------------


class Waiting:
    """An app whose one route parks every request; what became of each is in `events`."""

    def __init__(self, wait_s: float) -> None:
        self.app = make_app("waiting")
        self.held: list[Held] = []
        self.events: list[str] = []

        @DirectRoutes(self.app).post("/wait", Empty, lambda: ())
        def wait(said: Empty, client: str) -> Held:
            self.held.append(Held(wait_s, self.late, lambda: self.events.append("gave up")))
            return self.held[-1]

        @self.app.post("/free")
        def free() -> Any:
            """Answer the oldest."""
            held = self.held.pop(0)
            sent = held.answer(JsonAnswer({"it": "is yours"}), lambda: self.events.append("undelivered"))
            return jsonify(sent=sent)

    def late(self) -> JsonAnswer:
        """The time is over."""
        self.events.append("late")
        return JsonAnswer({"error": "late"}, 503)


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
    app = make_app("early")

    @DirectRoutes(app).post("/wait", Empty, lambda: ())
    def wait(said: Empty, client: str) -> Held:
        held = Held(20.0, lambda: JsonAnswer({}, 503), lambda: None)
        held.answer(JsonAnswer({"early": True}))
        return held

    with served(app) as port:
        assert call(port, "POST", "/wait", b"{}") == (200, {"early": True})


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
