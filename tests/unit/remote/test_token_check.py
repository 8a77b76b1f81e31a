"""The token check: nobody without a token reaches the engine, and what becomes of requests is noted."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from remote import events, tokens
from remote.events import Event, Events, events_told
from remote.token_check import TokenCheck, Watched
from remote.tokens import LIFE_S, Issuer, request_id
from tests.waiting import wait_for

LOCAL_KEY = "local-key-of-this-boot"
USAGE = (
    b'{"id":"x","choices":[{"text":"a"}],"usage":{"prompt_tokens":3,"total_tokens":10,"completion_tokens":7}}'
)


@pytest.fixture
def boot(tmp_path: Path) -> str:
    tokens.make_store(str(tmp_path))
    events.make_ring(str(tmp_path))
    (tmp_path / "local.key").write_text(LOCAL_KEY)
    return str(tmp_path)


class Engine:
    """An ASGI app that answers with those chunks. `reached` holds the scopes it was shown."""

    def __init__(
        self,
        *chunks: bytes,
        status: int = 200,
        content_type: bytes = b"application/json",
        then: BaseException | None = None,
    ) -> None:
        self.chunks = chunks or (USAGE,)
        self.status = status
        self.content_type = content_type
        self.then = then
        self.reached: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope)
        if scope["type"] == "lifespan":
            return
        await receive()
        headers = [(b"content-type", self.content_type)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for n, chunk in enumerate(self.chunks):
            last = n == len(self.chunks) - 1 and self.then is None
            await send({"type": "http.response.body", "body": chunk, "more_body": not last})
        if self.then is not None:
            raise self.then


def request(
    *headers: tuple[bytes, bytes], path: str = "/v1/completions", method: str = "POST", query: bytes = b""
) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(b"host", b"x"), *headers],
    }


def bearing(token: str) -> tuple[bytes, bytes]:
    return (b"authorization", b"Bearer " + token.encode())


def ask(check: TokenCheck, scope: dict[str, Any]) -> tuple[int | None, bytes]:
    """The status and body of the answer."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(check(scope, receive, send))
    status = next((m["status"] for m in sent if m["type"] == "http.response.start"), None)
    return status, b"".join(m.get("body", b"") for m in sent)


def check_of(engine: Engine, boot: str, now: float = 0.0) -> TokenCheck:
    return TokenCheck(engine, boot, clock=lambda: now)


def fresh(boot: str, count: int = 1) -> list[str]:
    return Issuer(boot, 0.0).issue(count, 0.0)


def noted(boot: str) -> tuple[Event, ...]:
    return Events(boot).after(0).events


# -- who gets in ---------------------------------------------------------------------------------------


def test_a_token_admits_one_request(boot: str) -> None:
    engine, (token,) = Engine(), fresh(boot)
    check = check_of(engine, boot)
    assert ask(check, request(bearing(token))) == (200, USAGE)
    status, body = ask(check, request(bearing(token)))
    assert status == 401
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert len(engine.reached) == 1


def test_the_engine_does_not_see_the_token(boot: str) -> None:
    engine, (token,) = Engine(), fresh(boot)
    ask(check_of(engine, boot), request(bearing(token)))
    assert token not in repr(engine.reached)


MASTER = "a" * 64


def bad_requests(token: str) -> dict[str, dict[str, Any]]:
    return {
        "no token": request(),
        "an empty one": request((b"authorization", b"Bearer ")),
        "another scheme": request((b"authorization", b"Basic " + token.encode())),
        "no scheme": request((b"authorization", token.encode())),
        "the master token": request(bearing(MASTER)),
        "the key for metrics": request(bearing(LOCAL_KEY)),
        "the key for metrics, posted": request(bearing(LOCAL_KEY), path="/metrics"),
        "in the query string": request(query=b"token=" + token.encode(), path="/v1/models", method="GET"),
        "in another header": request((b"x-api-key", token.encode())),
        "twice": request(bearing(token), bearing(token)),
        "with another one": request(bearing("x"), bearing(token)),
        "a list": request((b"authorization", b"Bearer x, Bearer " + token.encode())),
        "1 MB": request((b"authorization", b"Bearer " + b"A" * 1_000_000)),
        "a space behind": request((b"authorization", b"Bearer " + token.encode() + b" ")),
        "not ascii": request((b"authorization", b"Bearer \xff\xfe")),
        "health by POST": request(path="/health"),
        "health with a slash": request(path="/health/", method="GET"),
        "health in front": request(path="/health/../v1/models", method="GET"),
        "metrics without key": request(path="/metrics", method="GET"),
        "the documentation": request(path="/docs", method="GET"),
        "OPTIONS": request(method="OPTIONS"),
    }


@pytest.mark.parametrize("name", list(bad_requests("")))
def test_nobody_else_reaches_the_engine(boot: str, name: str) -> None:
    engine, (token,) = Engine(), fresh(boot)
    check = check_of(engine, boot)
    status, _ = ask(check, bad_requests(token)[name])
    assert (status, engine.reached, noted(boot)) == (401, [], ())
    assert ask(check, request(bearing(token)))[0] == 200, "the token itself is still good"


def test_an_expired_token_is_refused(boot: str) -> None:
    engine, (token,) = Engine(), fresh(boot)
    assert ask(check_of(engine, boot, now=LIFE_S), request(bearing(token)))[0] == 401
    assert engine.reached == []


def test_a_websocket_is_closed_before_the_engine_hears_of_it(boot: str) -> None:
    engine, (token,) = Engine(), fresh(boot)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {**request(bearing(token)), "type": "websocket"}
    asyncio.run(check_of(engine, boot)(scope, None, send))  # type: ignore[arg-type]
    assert (sent, engine.reached) == ([{"type": "websocket.close", "code": 1008}], [])


def test_health_is_open_and_makes_no_event(boot: str) -> None:
    engine = Engine(b"")
    assert ask(check_of(engine, boot), request(path="/health", method="GET"))[0] == 200
    assert noted(boot) == ()


def test_the_auth_server_beside_it_may_read_the_metrics(boot: str) -> None:
    engine = Engine(b"vllm:x 1")
    asked = request(bearing(LOCAL_KEY), path="/metrics", method="GET")
    assert ask(check_of(engine, boot), asked) == (200, b"vllm:x 1")
    assert noted(boot) == ()


def test_the_lifespan_goes_through(boot: str) -> None:
    engine = Engine()
    asyncio.run(check_of(engine, boot)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert len(engine.reached) == 1


@pytest.mark.parametrize("missing", ["spent", "token.key", "events", "local.key"])
def test_without_its_files_it_refuses_everybody(boot: str, missing: str) -> None:
    (token,) = fresh(boot)
    (Path(boot) / missing).unlink()
    engine = Engine()
    assert ask(check_of(engine, boot), request(bearing(token)))[0] == 401
    assert ask(check_of(engine, boot), request(path="/health", method="GET"))[0] == 200


# -- what is noted -------------------------------------------------------------------------------------


def events_of(boot: str, engine: Engine) -> tuple[tuple[str, int], ...]:
    """(kind, tokens) of the events of one request; all have its name."""
    (token,) = fresh(boot)
    with contextlib.suppress(RuntimeError, asyncio.CancelledError):
        ask(check_of(engine, boot), request(bearing(token)))
    found = noted(boot)
    assert {e.request_id for e in found} == {request_id(token)}
    return tuple((e.kind, e.size) for e in found)


def events_of_stream(boot: str, *said: str) -> tuple[tuple[str, int], ...]:
    (token,) = fresh(boot)
    seen = len(noted(boot))
    ask(check_of(Engine(*sse(*said, "[DONE]"), content_type=STREAM), boot), request(bearing(token)))
    return tuple((e.kind, e.size) for e in noted(boot)[seen:])


def sse(*said: str) -> tuple[bytes, ...]:
    return tuple(b"data: " + s.encode() + b"\n\n" for s in said)


STREAM = b"text/event-stream; charset=utf-8"
TOKEN = '{"choices":[{"text":"a","finish_reason":null}]}'


def test_how_long_a_request_is_is_noted_when_the_engine_has_all_of_it(boot: str) -> None:
    """By its text: the head may not say, and a picture has many bytes and few tokens."""
    (token,) = fresh(boot)
    parts = [b'{"prompt": "', b"x" * 100_000, b'"}']
    seen: list[tuple[Event, ...]] = []

    async def receive() -> dict[str, Any]:
        seen.append(noted(boot))
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        seen.append(noted(boot))

    async def send(message: Any) -> None:
        pass

    check = TokenCheck(engine, boot, clock=lambda: 0.0)
    asyncio.run(check(request(bearing(token)), receive, send))
    started = Event(request_id(token), "started", 100_000)
    assert seen == [(), (), (), (started,)]
    told = events_told(Events(boot).after(0))
    assert (told["started"], told["started_bytes"]) == ([request_id(token)], [100_000])


def test_a_request_whose_body_nobody_reads_has_started_when_it_is_answered(boot: str) -> None:
    (token,) = fresh(boot)

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert [e.kind for e in noted(boot)] == ["started"]
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message: Any) -> None:
        pass

    asyncio.run(TokenCheck(engine, boot, clock=lambda: 0.0)(request(bearing(token)), send, send))  # type: ignore[arg-type]
    assert [e.kind for e in noted(boot)] == ["started", "finished"]


def test_a_finished_answer_counts_the_tokens_of_its_usage(boot: str) -> None:
    assert events_of(boot, Engine()) == (("started", 0), ("finished", 7))


def test_an_answer_in_pieces_counts_them_too(boot: str) -> None:
    pieces = [USAGE[i : i + 5] for i in range(0, len(USAGE), 5)]
    assert events_of(boot, Engine(*pieces)) == (("started", 0), ("finished", 7))


def test_what_stands_behind_the_usage_does_not_hide_it(boot: str) -> None:
    """As vLLM's prompt_logprobs, which may be long."""
    behind = b',"prompt_logprobs":[' + b"0," * 10_000 + b"0]}"
    assert events_of(boot, Engine(USAGE[:-1] + behind)) == (("started", 0), ("finished", 7))


def test_a_text_that_looks_like_a_usage_is_none(boot: str) -> None:
    text = json.dumps({"choices": [{"text": '{"completion_tokens": 5000}'}]})
    assert events_of(boot, Engine(text.encode())) == (("started", 0), ("finished", 7)), "its characters"
    assert events_of_stream(boot, text) == (("started", 0), ("finished", 7))


def test_a_stream_counts_its_events(boot: str) -> None:
    engine = Engine(*sse(TOKEN, TOKEN, TOKEN, "[DONE]"), content_type=STREAM)
    assert events_of(boot, engine) == (("started", 0), ("finished", 3))


def test_the_usage_of_a_stream_is_believed_before_its_events(boot: str) -> None:
    usage = '{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":9}}'
    engine = Engine(*sse(TOKEN, TOKEN, usage, "[DONE]"), content_type=STREAM)
    assert events_of(boot, engine) == (("started", 0), ("finished", 9))


@pytest.mark.parametrize("size", [1, 7, 48, 49, 50, 128, 1000, 10**6])
def test_a_stream_counts_its_events_however_it_is_cut(boot: str, size: int) -> None:
    """Also at the ends of what is looked at together, and of what is looked at twice."""
    role = '{"choices":[{"delta":{"role":"assistant","content":""}}]}'
    echo = json.dumps({"choices": [{"text": '\ndata: {"error" "role": "completion_tokens": 5\n\ndata: {'}]})
    whole = b"".join(sse(role, *[*[TOKEN] * 14, echo] * 20, "[DONE]"))
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert events_of(boot, Engine(*pieces, content_type=STREAM)) == (("started", 0), ("finished", 300))


@pytest.mark.parametrize("before", [0, 1, 62, 63, 64, 65, 200])
@pytest.mark.parametrize("after", [0, 62, 63, 64, 200])
def test_what_a_stream_says_once_is_heard_wherever_it_stands(boot: str, before: int, after: int) -> None:
    usage, error = '{"usage":{"prompt_tokens":1,"completion_tokens":9}}', '{"error":{"message":"dead"}}'
    for said, ends in ((usage, ("finished", 9)), (error, ("failed", before + after))):
        assert events_of_stream(boot, *[TOKEN] * before, said, *[TOKEN] * after) == (("started", 0), ends)


def test_of_the_usage_in_every_event_the_last_counts(boot: str) -> None:
    """As vLLM's continuous_usage_stats."""
    said = [f'{{"choices":[],"usage":{{"completion_tokens":{n}}}}}' for n in range(1, 131)]
    assert events_of_stream(boot, *said) == (("started", 0), ("finished", 130))


@pytest.mark.parametrize("events_before", [1, 63, 64, 65, 130])
def test_an_answer_that_is_cancelled_counts_what_was_sent(boot: str, events_before: int) -> None:
    engine = Engine(*sse(*[TOKEN] * events_before), content_type=STREAM, then=asyncio.CancelledError())
    assert events_of(boot, engine) == (("started", 0), ("aborted", events_before))


class Piece(bytearray):
    """Bytes of which one can see whether anything keeps them."""


def test_pieces_are_passed_on_as_they_are_and_by_the_servers_own_hand(boot: str) -> None:
    """No coroutine of ours stands between, and no more than so many pieces are kept."""
    passed: list[Any] = []
    pieces: list[weakref.ref[Piece]] = []

    def server(message: Any) -> Any:
        passed[:] = [message]
        return passed

    watched: Any = Watched("00" * 8, Events(boot), None, server)  # type: ignore[arg-type]
    send = watched.sender()
    for n in range(1000):
        message: dict[str, Any] = {"type": "http.response.body", "body": Piece(b"%d" % n), "more_body": True}
        pieces.append(weakref.ref(message["body"]))
        assert send(message) is passed
        assert passed == [message]
        assert sum(piece() is not None for piece in pieces) <= 64


def test_the_role_of_a_chat_is_no_token(boot: str) -> None:
    role = '{"choices":[{"delta":{"role":"assistant","content":""}}]}'
    token = '{"choices":[{"delta":{"content":"a"}}]}'
    engine = Engine(*sse(role, token, "[DONE]"), content_type=STREAM)
    assert events_of(boot, engine) == (("started", 0), ("finished", 1))


def test_an_error_of_the_engine_is_a_failure(boot: str) -> None:
    assert events_of(boot, Engine(b"{}", status=500)) == (("started", 0), ("failed", 0))


def test_an_error_within_a_stream_is_a_failure(boot: str) -> None:
    engine = Engine(*sse(TOKEN, '{"error":{"message":"dead"}}', "[DONE]"), content_type=STREAM)
    assert [kind for kind, _ in events_of(boot, engine)] == ["started", "failed"]


def test_a_request_that_the_engine_refuses_is_over(boot: str) -> None:
    assert events_of(boot, Engine(b"{}", status=400)) == (("started", 0), ("finished", 0))


def test_an_engine_that_breaks_has_failed(boot: str) -> None:
    engine = Engine(*sse(TOKEN, TOKEN), content_type=STREAM, then=RuntimeError("dead"))
    assert events_of(boot, engine) == (("started", 0), ("failed", 2))


def test_an_answer_that_is_cancelled_was_aborted(boot: str) -> None:
    engine = Engine(*sse(TOKEN), content_type=STREAM, then=asyncio.CancelledError())
    assert events_of(boot, engine) == (("started", 0), ("aborted", 1))


def test_a_client_that_goes_away_frees_its_request_at_once(boot: str) -> None:
    """Also when the engine has not noticed yet."""
    (token,) = fresh(boot)

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", STREAM)]})
        await send({"type": "http.response.body", "body": sse(TOKEN)[0], "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        assert [e.kind for e in noted(boot)] == ["started", "aborted"]
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    check = TokenCheck(engine, boot, clock=lambda: 0.0)
    asyncio.run(check(request(bearing(token)), receive, send))
    assert noted(boot)[-1] == Event(request_id(token), "aborted", 1)


@pytest.mark.alone
def test_a_check_takes_far_less_than_a_millisecond(boot: str) -> None:
    """At the cap of outstanding tokens; the limit leaves a slow machine thirty times what was measured."""
    issuer = Issuer(boot, 0.0)
    made = issuer.issue(tokens.CAP, 0.0)
    check = check_of(Engine(b"x"), boot)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def many() -> list[float]:
        took = []
        for token in made[:2000]:
            begun = time.perf_counter()
            await check(request(bearing(token)), receive, send)
            took.append(time.perf_counter() - begun)
        return sorted(took)

    took = asyncio.run(many())
    assert took[len(took) // 2] < 1e-3


# -- behind a real server ------------------------------------------------------------------------------


class NeverEnds:
    """Sends one event of a stream, and listens as vLLM does until its client goes away."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
            assert (await receive())["type"] == "lifespan.shutdown"
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.reached.append(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", STREAM)]})
        await send({"type": "http.response.body", "body": sse(TOKEN)[0], "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass


@pytest.fixture
def served(boot: str) -> Iterator[tuple[int, NeverEnds]]:
    """The port of a real server with the check in front of an engine, and the engine."""
    engine = NeverEnds()
    check = TokenCheck(engine, boot, clock=lambda: 0.0)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(check, lifespan="on", log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_for("it serves", lambda: server.started)
        yield listening.getsockname()[1], engine
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()


def spoken(port: int, *lines: bytes) -> bytes:
    """The first that the server says to those header lines."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock, contextlib.suppress(OSError):
        sock.sendall(b"\r\n".join((*lines, b"host: x", b"", b"")))
        return sock.recv(65_536)
    return b""


def test_a_client_that_hangs_up_in_a_stream_is_noted_at_once(
    served: tuple[int, NeverEnds], boot: str
) -> None:
    port, engine = served
    (token,) = fresh(boot)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(
            b"GET /v1/x HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + token.encode() + b"\r\n\r\n"
        )
        assert b" 200 " in sock.recv(65_536)
        assert noted(boot) == (Event(request_id(token), "started"),)
        assert engine.reached == ["http"]
    wait_for("it is noted", lambda: len(noted(boot)) == 2)
    assert noted(boot)[1] == Event(request_id(token), "aborted", 1)


@pytest.mark.parametrize(
    "how", ["websocket", "twice", "1 MB", "in the query", "in lower case and upper case"]
)
def test_what_a_server_lets_through_the_check_does_not(
    served: tuple[int, NeverEnds], boot: str, how: str
) -> None:
    port, engine = served
    word = fresh(boot)[0].encode()
    get, key = b"GET /v1/models HTTP/1.1", b"authorization: Bearer " + word
    said = spoken(
        port,
        *{
            "websocket": (
                get,
                b"connection: upgrade",
                b"upgrade: websocket",
                b"sec-websocket-version: 13",
                b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
            ),
            "twice": (get, key, key),
            "1 MB": (get, key + b"A" * 1_000_000),
            "in the query": (b"GET /v1/models?token=" + word + b" HTTP/1.1",),
            "in lower case and upper case": (get, key, key.replace(b"authorization", b"AUTHORIZATION")),
        }[how],
    )
    assert b" 101 " not in said
    assert b" 200 " not in said
    assert (engine.reached, noted(boot)) == ([], ())


def test_other_headers_reach_the_engine_untouched(boot: str) -> None:
    """So does a traceparent, by which the engine's traces are found beside ours."""
    engine = Engine()
    more = [
        (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        (b"tracestate", b"a=b"),
    ]
    (token,) = fresh(boot)
    assert ask(check_of(engine, boot), request(bearing(token), *more))[0] == 200
    assert set(more) <= set(engine.reached[0]["headers"])
