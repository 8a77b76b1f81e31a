"""What every HTTP face of ours shares: JSON errors, checked bodies, keys, and how Flask is served.

One process serves Flask inline on an event loop: uvicorn parses, a small bridge calls the WSGI app,
and only requests that must wait are parked: 130 µs of processor an answer and thousands of waiting
clients in two threads, where a thread per client took twice to nine times that (measured 2026-11).
So all views run on one thread, the loop's, unless their path is named blocking. State that only views
and the `background` coroutines touch needs no lock.

    request ─┬─► Flask view ─────► answer
             └─► direct view ─┬──► answer           without Flask's part of the time
                              └──► Held ─► its answer    from whoever frees capacity,
                                      ├──► late()        when its time is over,
                                      ├──► 503           when the server ends,
                                      └──► gave_up()     when its client has gone
"""

import asyncio
import contextlib
import functools
import gc
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingType
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar, cast
from urllib.parse import unquote_to_bytes

import uvicorn
import uvloop
from flask import Flask, Response, request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from werkzeug.exceptions import HTTPException

from process.errors import ConfigError

log = logging.getLogger("http")

P = ParamSpec("P")
R = TypeVar("R")

MAX_BODY = 65536
"""Bytes of a request body: none of our routes takes a prompt, and all else is small."""

KEEP_ALIVE_S = 120.0
"""An idle connection is kept so long: opening one costs a client more than an answer does."""

ACCEPT_AT_ONCE = 64
"""Connections let in at a time; each takes about 0.1 ms, in which nothing is answered."""

GRACE_S = 3.0
"""How long the server's end waits for answers that are still being made."""

FULL_COLLECTION_AFTER = 1000
"""Middle garbage collections, of which there are 5 a second when 2,500 requests come; by default it is 10. A
full one looks at all that a server remembers: at 100,000 leases for 70 ms, each time there were a quarter
more of them, and found nothing (2026-11). It is there for cycles that have become old, which are few."""

RESTART_PAUSE_S = 1.0
"""Before a crashed background task starts again: a lasting fault must not fill the disk with logs."""


# -- bodies ----------------------------------------------------------------------------------------------


class BadField(Exception):
    """A request said something that cannot be: 400, with the field named."""

    def __init__(self, name: str, message: str) -> None:
        """name: of the field; message: what was wanted and what came."""
        super().__init__(f"{name}: {message}")


@dataclass(frozen=True)
class Text:
    """A string of so many characters. form: a regular expression for all of it, and in words for people."""

    least: int
    most: int
    optional: bool = False
    form: tuple[re.Pattern[str], str] | None = None

    def check(self, name: str, value: object) -> str:
        """The value, or BadField."""
        if not isinstance(value, str) or not self.least <= len(value) <= self.most:
            raise BadField(
                name, f"wanted text of {self.least} to {self.most} characters, got {_shown(value)}"
            )
        if self.form is not None and self.form[0].fullmatch(value) is None:
            raise BadField(name, f"wanted {self.form[1]}, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    least: int
    most: int
    optional: bool = False

    def check(self, name: str, value: object) -> int:
        """The value, or BadField. true and false are no numbers here."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            raise BadField(name, f"wanted a whole number {self.least} to {self.most}, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number in a range."""

    least: float
    most: float
    optional: bool = False

    def check(self, name: str, value: object) -> float:
        """The value as float, or BadField."""
        # The range also refuses NaN, infinity and whole numbers too long for a float.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not self.least <= value <= self.most
        ):
            raise BadField(name, f"wanted a number {self.least:g} to {self.most:g}, got {_shown(value)}")
        return float(value)


@dataclass(frozen=True)
class Boolean:
    """true or false."""

    optional: bool = False

    def check(self, name: str, value: object) -> bool:
        """The value, or BadField."""
        if not isinstance(value, bool):
            raise BadField(name, f"wanted true or false, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]
    optional: bool = False

    def check(self, name: str, value: object) -> str:
        """The value, or BadField."""
        if not isinstance(value, str) or value not in self.words:
            raise BadField(name, f"wanted one of {', '.join(self.words)}, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Mapping:
    """A JSON object; its inside is checked by the view."""

    optional: bool = False

    def check(self, name: str, value: object) -> dict[str, Any]:
        """The value, or BadField."""
        if not isinstance(value, dict):
            raise BadField(name, f"wanted an object, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class ListOf:
    """A list of at most so many of one kind."""

    kind: "Field"
    most: int
    optional: bool = False

    def check(self, name: str, value: object) -> list[Any]:
        """The value, or BadField naming the entry."""
        if not isinstance(value, list) or len(value) > self.most:
            raise BadField(name, f"wanted a list of at most {self.most}, got {_shown(value)}")
        check = self.kind.check
        try:
            return [check(name, one) for one in value]
        except BadField:  # which one is looked for only now: to name every one takes as long as to check it
            return [check(f"{name}[{n}]", one) for n, one in enumerate(value)]


Field = Text | Whole | Number | Boolean | Choice | Mapping | ListOf


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # JSON may be nested as deep as we can just read it
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def check_fields(said: object, fields: MappingType[str, Field], inside: str = "") -> dict[str, Any]:
    """The object with every field checked; BadField names the first that is wrong, missing or unknown.

    inside: what to put before the names, as in "instances[3].". Absent optional fields stay absent.
    """
    if not isinstance(said, dict):
        raise BadField(inside.rstrip(".") or "body", f"wanted a JSON object, got {_shown(said)}")
    for name in said:
        if name not in fields:
            raise BadField(inside + _shown(name)[1:-1], f"unknown field; known are {', '.join(fields)}")
    out: dict[str, Any] = {}
    for name, kind in fields.items():
        if name in said and not (kind.optional and said[name] is None):
            out[name] = kind.check(inside + name, said[name])
        elif not kind.optional:
            raise BadField(inside + name, "is missing")
    return out


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one a call: 20 µs


def parse_json(raw: bytes) -> Any:
    """The JSON in raw, NaN and Infinity refused; raises BadField."""
    try:
        return _DECODER.decode(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadField("body", f"not JSON: {e}") from None


_SPACE = re.compile(r"[ \t\n\r]*")


def json_parts(raw: bytes, name: str) -> Iterator[tuple[str, Any, bool]]:
    """(field, value, False) of the JSON object in raw; a list under that name comes empty.

    Then its entries come one by one, with True: so a long list is not decoded in one go, in which nothing
    else happens. Raises BadField.
    """
    try:
        text = raw.decode()
        at = _after(text, 0, "{")
        more = text[at : at + 1] != "}"
        while more:
            if text[at : at + 1] != '"':
                _after(text, at, '"')
            key, at = _DECODER.raw_decode(text, at)
            at = _after(text, at, ":")
            if key == name and text[at : at + 1] == "[":
                yield key, [], False
                at = _after(text, at, "[")
                more = text[at : at + 1] != "]"
                while more:
                    value, at = _DECODER.raw_decode(text, at)
                    yield key, value, True
                    more, at = _comma(text, at)
                at = _after(text, at, "]")
            else:
                value, at = _DECODER.raw_decode(text, at)
                yield key, value, False
            more, at = _comma(text, at)
        at = _after(text, at, "}")
        if at < len(text):
            _after(text, at, "")
    except (ValueError, RecursionError) as e:
        raise BadField("body", f"not JSON: {e}") from None


def _comma(text: str, at: int) -> tuple[bool, int]:
    """Whether a comma comes, and where it goes on after it."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    return (True, _after(text, at, ",")) if text[at : at + 1] == "," else (False, at)


def _after(text: str, at: int, sign: str) -> int:
    """Where it goes on after that sign, or the end, and spaces around it."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text[at : at + 1] != sign:
        raise ValueError(f"wanted {sign or 'the end'} at character {at}")
    return _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]


def json_body(most: int | None = None) -> Any:
    """The JSON of the request being served, unchecked; most: bytes, where a path may have larger bodies."""
    if most is not None:
        request.max_content_length = most
    return parse_json(request.get_data(cache=False))


def body(fields: MappingType[str, Field]) -> dict[str, Any]:
    """The checked body of the request being served."""
    return check_fields(json_body(), fields)


def query_number(name: str, default: float, least: float, most: float) -> float:
    """A number of the query string, or the default."""
    raw = request.args.get(name)
    if raw is None:
        return default
    try:
        return Number(least, most).check(name, float(raw))
    except ValueError:
        raise BadField(name, f"wanted a number, got {_shown(raw)}") from None


# -- the app ---------------------------------------------------------------------------------------------

_EXTENSION = "http_face"


@dataclass(frozen=True, slots=True)
class Answer:
    """A JSON answer. said: also as JSON, where it is worth putting that together by hand."""

    said: MappingType[str, Any] | bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Extension:
    """What our bridge must know of an app."""

    large_bodies: dict[str, int]
    direct: "dict[str, DirectAnswer]"  # by path: all are POST
    awaited: "dict[tuple[str, str], _Awaited]"


def _extension(app: Flask) -> _Extension:
    found: _Extension = app.extensions[_EXTENSION]
    return found


def error(status: int, code: str, message: str) -> Response:
    """The one shape errors have."""
    return response(error_answer(status, code, message))


def error_answer(status: int, code: str, message: str, *headers: tuple[str, str]) -> Answer:
    return Answer({"error": code, "message": message}, status, headers)


def _payload(answer: Answer) -> bytes:
    said = answer.said
    return said if isinstance(said, bytes) else json.dumps(said).encode()


def response(answer: Answer) -> Response:
    """The answer as Flask wants it."""
    response = Response(_payload(answer), answer.status, mimetype="application/json")
    for name, value in answer.headers:
        response.headers[name] = value
    return response


_UNAUTHORIZED = error_answer(
    401, "unauthorized", "this route needs Authorization: Bearer <key>", ("WWW-Authenticate", "Bearer")
)
_OUR_FAULT = error_answer(500, "internal_error", "a fault of ours; the log has it")
_CLOSING = error_answer(503, "shutting_down", "the server is shutting down: ask again")


def make_app(
    name: str, max_body: int = MAX_BODY, *, large_bodies: MappingType[str, int] | None = None
) -> Flask:
    """A Flask app whose every error is JSON, without a traceback to the client.

    max_body: bytes; a longer body gets 413, however it is sent. large_bodies: path -> bytes, for routes
    between our own processes that grow with the fleet; their views read with json_body(most).
    """
    app = Flask(name, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body
    app.extensions[_EXTENSION] = _Extension(dict(large_bodies or {}), {}, {})
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # //route is an unknown route, not a redirect

    @app.errorhandler(BadField)
    def bad_field(e: BadField) -> Response:
        return error(400, "bad_request", str(e))

    @app.errorhandler(HTTPException)
    def http_error(e: HTTPException) -> Response:
        status = e.code or 500
        answer = error(status, (e.name or "error").lower().replace(" ", "_"), e.description or e.name)
        for header, value in e.get_headers():
            if header.lower() == "allow":
                answer.headers[header] = value
        return answer

    @app.errorhandler(Exception)
    def crashed(e: Exception) -> Response:
        log.error("%s %s failed", request.method, request.path, exc_info=e)
        return response(_OUR_FAULT)

    return app


def requires(keys: Callable[[], Collection[str]]) -> Callable[[Callable[P, R]], Callable[P, R | Response]]:
    """Let a view be reached only with `Authorization: Bearer <one of the keys>`; with no keys it is open.

    Compared in constant time; 401 otherwise.
    """

    def decorate(view: Callable[P, R]) -> Callable[P, R | Response]:
        @functools.wraps(view)
        def guarded(*args: P.args, **more: P.kwargs) -> R | Response:
            known = keys()
            if known and not bearer_is(request.headers.get("Authorization"), known):
                return response(_UNAUTHORIZED)
            return view(*args, **more)

        return guarded

    return decorate


DirectView = Callable[[dict[str, Any], str], "Answer | Held"]
"""Of the checked body and of who asks: see `client_name`."""

SignedView = Callable[[bytes, str | None], "Answer"]
"""Of the unchecked body and the Authorization header."""

DirectAnswer = Callable[[bytes, str | None, str], "Answer | Held"]
"""Of body, Authorization header and address: a direct view with all that is checked before it."""


@dataclass(frozen=True)
class _Direct:
    """A direct view with its rules."""

    view: DirectView
    fields: MappingType[str, Field]
    keys: Callable[[], Collection[str]]

    def answer(self, raw: bytes, authorization: str | None, peer: str) -> "Answer | Held":
        known = self.keys()
        if known and not bearer_is(authorization, known):
            return _UNAUTHORIZED
        try:
            said = check_fields(parse_json(raw), self.fields)
            return self.view(said, client_name(authorization, peer) if known else peer)
        except BadField as e:
            return error_answer(400, "bad_request", str(e))


def direct(
    app: Flask,
    path: str,
    fields: MappingType[str, Field],
    keys: Callable[[], Collection[str]],
) -> Callable[[DirectView], DirectView]:
    """Make a function of the checked body a POST route that our bridge answers without Flask; it may wait.

    For the few routes where Flask's part of the time counts. It is a Flask route too, with the same checks,
    for every other server and the test client; there a request that would wait is late at once.
    """

    def register(view: DirectView) -> DirectView:
        _add_direct(app, path, view.__name__, _Direct(view, fields, keys).answer)
        return view

    return register


def signed(app: Flask, path: str) -> Callable[[SignedView], SignedView]:
    """Make a function of the unchecked body a direct POST route: for bodies whose sender has signed them.

    The view itself looks who that is, before it looks at anything else.
    """

    def register(view: SignedView) -> SignedView:
        def answer(raw: bytes, authorization: str | None, _: str) -> Answer:
            try:
                return view(raw, authorization)
            except BadField as e:
                return error_answer(400, "bad_request", str(e))

        _add_direct(app, path, view.__name__, answer)
        return view

    return register


def _add_direct(app: Flask, path: str, name: str, answer: DirectAnswer) -> None:
    extension = _extension(app)
    extension.direct[path] = answer

    def through_flask() -> Response:
        request.max_content_length = extension.large_bodies.get(path, app.config["MAX_CONTENT_LENGTH"])
        found = answer(
            request.get_data(cache=False),
            request.headers.get("Authorization"),
            request.remote_addr or "",
        )
        return response(found.late() if isinstance(found, Held) else found)

    app.add_url_rule(path, name, through_flask, methods=["POST"])


AwaitedView = Callable[[bytes], Coroutine[Any, Any, Answer]]


@dataclass(frozen=True)
class _Awaited:
    """A coroutine that answers, with who may call it."""

    view: AwaitedView
    keys: Callable[[], Collection[str]]

    async def answer(self, raw: bytes, authorization: str | None) -> Answer:
        known = self.keys()
        if known and not bearer_is(authorization, known):
            return _UNAUTHORIZED
        try:
            return await self.view(raw)
        except BadField as e:
            return error_answer(400, "bad_request", str(e))


def awaited(
    app: Flask, method: str, path: str, keys: Callable[[], Collection[str]]
) -> Callable[[AwaitedView], AwaitedView]:
    """Make a coroutine function of the unchecked body a route: for long work that lets others go between.

    It is a Flask route too, for every other server and the test client, and there runs to its end.
    """

    def register(view: AwaitedView) -> AwaitedView:
        rules = _extension(app).awaited[method, path] = _Awaited(view, keys)

        def through_flask() -> Response:
            request.max_content_length = _extension(app).large_bodies.get(path, MAX_BODY)
            raw = request.get_data(cache=False)
            return response(asyncio.run(rules.answer(raw, request.headers.get("Authorization"))))

        app.add_url_rule(path, view.__name__, through_flask, methods=[method])
        return view

    return register


def client_name(authorization: str | None, peer: str) -> str:
    """Whom a request comes from: the beginning of the SHA-256 of its key, or without one its address."""
    if authorization is None:
        return peer
    return "key-" + hashlib.sha256(authorization[7:].encode()).hexdigest()[:16]


def bearer_is(header: str | None, keys: Collection[str]) -> bool:
    """Whether the header carries one of the keys; every key is compared, each in constant time."""
    if header is None or header[:7].lower() != "bearer ":
        return False
    given = header[7:].encode()
    good = False
    for key in keys:
        good |= hmac.compare_digest(given, key.encode())
    return good


# --- outside world ---------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether that address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_bind(host: str, port: int, *, keys_present: bool) -> None:
    """Raises ConfigError unless the address is loopback or there are keys."""
    if not is_loopback(host) and not keys_present:
        raise ConfigError(f"listening on {host}:{port} needs keys: everybody could reach it without")


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(4096)
    except (OSError, OverflowError) as e:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {getattr(e, 'strerror', None) or e}") from e
    return sock


def allow_many_files() -> None:
    """As many open files as the system lets us have, up to 65,536: each client and each instance is one.

    The usual soft limit of 1,024 is there for programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Held:
    """A request that waits: a direct view returns it, somebody calls `answer` later, once.

    All of it happens on the loop's thread. Of late, gave_up and undelivered at most one is called.
    """

    def __init__(self, wait_s: float, late: Callable[[], Answer], gave_up: Callable[[], None]) -> None:
        """What becomes of the request.

        late: called after wait_s without an answer, it makes one. gave_up: called when the client has gone or
        the server ends: forget the waiter.
        """
        self.wait_s = wait_s
        self.late = late
        self.gave_up = gave_up
        self.undelivered: Callable[[], None] = lambda: None
        self._future: asyncio.Future[Answer] | None = None
        self._answer: Answer | None = None

    def answer(self, answer: Answer, undelivered: Callable[[], None] = lambda: None) -> bool:
        """Send it; False when it is answered or forgotten already.

        undelivered is called if it does not reach its client: take back what the answer gave.
        """
        if self._answer is not None or (self._future is not None and self._future.done()):
            undelivered()
            return False
        self._answer, self.undelivered = answer, undelivered
        if self._future is not None:
            self._future.set_result(answer)
        return True

    def future(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[Answer]":
        """What the bridge waits for."""
        self._future = loop.create_future()
        if self._answer is not None:
            self._future.set_result(self._answer)
        return self._future


Background = Callable[[], Awaitable[None]]


class AsgiApp(Protocol):
    """What speaks ASGI itself, in place of a Flask app; all of it happens on the loop's thread."""

    async def __call__(self, scope: MappingType[str, Any], receive: Any, send: Any) -> None:
        """One request."""

    def close(self) -> None:
        """The server ends: answer those who wait."""


_Plain = tuple[int, list[tuple[bytes, bytes]], bytes]


@functools.lru_cache(maxsize=256)
def _environ_name(header: bytes) -> str:
    name = header.decode("latin-1").upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + name


@functools.lru_cache(maxsize=256)
def names_loopback(host_header: bytes) -> bool:
    """Whether a Host header, or what follows http:// in an Origin, is a name of this machine."""
    host = host_header.decode("latin-1")
    if host.startswith("["):
        return is_loopback(host[1:].split("]")[0])
    return is_loopback(host.split(":")[0])


class _Bridge:
    """The ASGI application around one Flask app."""

    def __init__(
        self, app: Flask, blocking: Collection[str], pool: ThreadPoolExecutor, loopback: bool
    ) -> None:
        """loopback: refuse requests whose Host header names another machine."""
        self._app = app
        self._blocking = frozenset(blocking)
        self._pool = pool
        self._loopback = loopback
        self._max_body: int = app.config["MAX_CONTENT_LENGTH"]
        self._large = _extension(app).large_bodies
        self._direct = _extension(app).direct
        self._awaited = _extension(app).awaited
        self._held: set[Held] = set()
        self._closing = False

    async def __call__(self, scope: MappingType[str, Any], receive: Any, send: Any) -> None:
        path = scope["path"]
        most = self._large.get(path, self._max_body)
        raw = await self._read(receive, most)
        if raw is None:
            return
        strange = self._strange_host(scope["headers"])
        direct = self._direct.get(path) if scope["method"] == "POST" else None
        if strange is not None:
            answer = _plain(strange)
        elif direct is not None:
            found = self._answer_directly(direct, scope, raw, most)
            if isinstance(found, Held):
                later = await self._wait(found, receive)
                if later is None:
                    return
                found = later
            answer = _plain(found)
        elif (scope["method"], path) in self._awaited:
            answer = _plain(await self._await(self._awaited[scope["method"], path], scope, raw, most))
        elif path in self._blocking:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._pool, self._call_flask, self._environ(scope, raw))
        else:
            answer = self._call_flask(self._environ(scope, raw))
        status, headers, payload = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": payload})

    async def _read(self, receive: Any, most: int) -> bytes | None:
        """The body, or its beginning when it is longer than allowed; None when the client has gone."""
        message = await receive()
        raw: bytes = message.get("body", b"")
        while message["type"] == "http.request" and message.get("more_body") and len(raw) <= most:
            message = await receive()
            raw += message.get("body", b"")
        return None if message["type"] == "http.disconnect" else raw

    def _strange_host(self, headers: Sequence[tuple[bytes, bytes]]) -> Answer | None:
        """A refusal when the request came under a name of another machine.

        A page in the operator's browser can reach loopback under a name of its own (DNS rebinding).
        """
        if self._loopback:
            for name, value in headers:
                if name == b"host" and not names_loopback(value):
                    shown = value[:100].decode("latin-1")
                    return error_answer(403, "wrong_host", f"Host: {shown} is not this machine")
        return None

    def _answer_directly(
        self, direct: DirectAnswer, scope: MappingType[str, Any], raw: bytes, most: int
    ) -> Answer | Held:
        if len(raw) > most:
            return _too_long(most)
        try:
            return direct(raw, _authorization(scope), (scope.get("client") or ("",))[0])
        except Exception:
            log.exception("a direct view failed")
            return _OUR_FAULT

    async def _await(self, rules: _Awaited, scope: MappingType[str, Any], raw: bytes, most: int) -> Answer:
        if len(raw) > most:
            return _too_long(most)
        try:
            return await rules.answer(raw, _authorization(scope))
        except Exception:
            log.exception("an awaited view failed")
            return _OUR_FAULT

    def _environ(self, scope: MappingType[str, Any], raw: bytes) -> dict[str, Any]:
        server = scope.get("server") or ("localhost", 80)
        environ: dict[str, Any] = {
            "REQUEST_METHOD": scope["method"],
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(scope["raw_path"]).decode("latin-1"),
            "QUERY_STRING": scope["query_string"].decode("latin-1"),
            "SERVER_NAME": str(server[0]),
            "SERVER_PORT": str(server[1]),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": (scope.get("client") or ("",))[0],
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(raw),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in scope["headers"]:
            key = _environ_name(name)
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ["CONTENT_LENGTH"] = str(len(raw))  # what has come, also of a chunked body
        return environ

    def _call_flask(self, environ: dict[str, Any]) -> _Plain:
        status = 500
        headers: list[tuple[bytes, bytes]] = []

        def start_response(line: str, given: list[tuple[str, str]], exc_info: Any = None) -> Any:  # noqa: ARG001
            nonlocal status, headers
            status, headers = int(line[:3]), _encoded(given)

        chunks = self._app.wsgi_app(environ, start_response)
        try:
            payload = b"".join(chunks)
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()
        return status, headers, payload

    async def _wait(self, held: Held, receive: Any) -> Answer | None:
        """The answer of a request that waits; None when its client went away first."""
        if self._closing:
            held.gave_up()
            return _CLOSING
        future = held.future(asyncio.get_running_loop())
        gone = asyncio.ensure_future(_disconnected(receive))
        self._held.add(held)
        try:
            both: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(both, timeout=held.wait_s, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                if gone.done():
                    held.undelivered()
                    return None
                return future.result()
            future.cancel()
            if gone.done():
                held.gave_up()
                return None
            return held.late()
        finally:
            self._held.discard(held)
            gone.cancel()

    def close(self) -> None:
        """Answer every request that waits 503, now and from now on."""
        self._closing = True
        for held in list(self._held):
            if held.answer(_CLOSING):
                held.gave_up()


def _too_long(most: int) -> Answer:
    return error_answer(413, "request_entity_too_large", f"a body may have {most} bytes here")


def _authorization(scope: MappingType[str, Any]) -> str:
    # Given twice they are joined, so two Authorization headers match no key.
    return b",".join([value for name, value in scope["headers"] if name == b"authorization"]).decode(
        "latin-1"
    )


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _plain(answer: Answer) -> _Plain:
    payload = _payload(answer)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(payload))]
    return answer.status, headers + _encoded(answer.headers) if answer.headers else headers, payload


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _keep(make: Background) -> None:
    """Run a background coroutine until it returns: when it crashes it is logged and started again."""
    name = getattr(make, "__name__", repr(make))
    while True:
        try:
            await make()
        except Exception:
            log.exception("background task %s failed; it starts again in %g s", name, RESTART_PAUSE_S)
        else:
            return
        await asyncio.sleep(RESTART_PAUSE_S)


class _Corked:
    """A transport that sends what is written in one turn of the loop in one piece.

    uvicorn writes head and body apart, which wakes the client twice; on a virtual machine, where waking
    another core is slow, that was a quarter of an answer's time (measured 2026-11).
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._transport.write(b"".join(waiting))


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP on a corked transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Corked(transport)))


class _Uvicorn(uvicorn.Server):
    """uvicorn that lets everybody in at once, ends when told to, and lets its caller go on afterwards."""

    def __init__(self, config: uvicorn.Config, bridge: AsgiApp) -> None:
        super().__init__(config)
        self._bridge = bridge
        self._connecting: set[asyncio.Future[Any]] = set()
        self._told_to_end = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        uvloop's own server lets in one connection per turn of the loop, and a turn is all requests that are
        ready: of 1,000 busy clients 150 were still outside after 3 s (uvloop 0.23.0, measured 2026-11).
        """
        await self.lifespan.startup()
        self.servers = []
        for sock in sockets or []:
            sock.setblocking(False)
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)
        self.started = True

    async def main_loop(self) -> None:
        """Wait until told to end: uvicorn's own looks ten times a second, 0.2 % of a core (2026-11)."""
        await self._told_to_end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, then uvicorn's own end."""
        for sock in sockets or []:
            asyncio.get_running_loop().remove_reader(sock)
        await super().shutdown(sockets)

    def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:  # no file descriptors left: those who are in are served, the others wait
                log.warning("a connection cannot be taken, the next try is in a second: %s", e.strerror)
                loop.remove_reader(sock)
                loop.call_later(1.0, self._accept_again, sock)
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
            self._connecting.add(task)
            task.add_done_callback(self._connected)

    def _connected(self, task: "asyncio.Future[Any]") -> None:
        self._connecting.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.debug("a client went away while it was let in: %s", task.exception())

    def _accept_again(self, sock: socket.socket) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _protocol(self) -> asyncio.Protocol:
        return _Protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )

    def end(self) -> None:
        """Answer who waits, then end; a second time, end without waiting for answers being made."""
        # uvicorn waits for connections to end: with clients parked that took over 12 s (measured 2026-11).
        self._bridge.close()
        self.force_exit = self.should_exit
        self.should_exit = True
        self._told_to_end.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM and Ctrl-C, in a callback of the loop.

        uvicorn's own handler runs between any two bytecodes, so also in the middle of a view, and
        raises the signal again at the end, so the process would die without the caller's clean-up.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for sig in signals:
            loop.add_signal_handler(sig, self.end)
        try:
            yield
        finally:
            for sig in signals:
                loop.remove_signal_handler(sig)


class Server:
    """One app on one socket; `run` returns when SIGTERM, Ctrl-C or `stop` has ended it."""

    def __init__(
        self,
        app: Flask | AsgiApp,
        sock: socket.socket,
        background: Sequence[Background] = (),
        blocking: Collection[str] = (),
        *,
        any_host: bool = False,
    ) -> None:
        """Nothing runs yet.

        background: coroutine functions that run on the same loop as long as the server does.
        blocking: paths whose views may take long; they run in a thread pool, and must lock what they touch.
        any_host: answer also under foreign host names on loopback (a proxy in front, with keys).
        Both are for a Flask app; one that speaks ASGI sees to that itself.
        """
        self._app = app
        self._sock = sock
        self._background = background
        self._blocking = blocking
        self._loopback = is_loopback(sock.getsockname()[0]) and not any_host
        self._loop: asyncio.AbstractEventLoop | None = None
        self._uvicorn: _Uvicorn | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Serve until the end; the socket is closed then. Outside the main thread only `stop` ends it."""
        allow_many_files()
        gc.collect()
        gc.freeze()  # what is there now stays: full collections then look at 150,000 objects less, some 80 ms
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION_AFTER)
        with self._sock, ThreadPoolExecutor(max_workers=4, thread_name_prefix="view") as pool:
            bridge: AsgiApp = (
                _Bridge(self._app, self._blocking, pool, self._loopback)
                if isinstance(self._app, Flask)
                else self._app
            )
            config = uvicorn.Config(
                bridge,
                http=_Protocol,
                loop="uvloop",
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=int(KEEP_ALIVE_S),
                timeout_graceful_shutdown=int(GRACE_S),
                backlog=4096,
            )
            # uvicorn logs each malformed request at WARNING; those are the clients' affair.
            logging.getLogger("uvicorn").setLevel(logging.ERROR)
            self._uvicorn = _Uvicorn(config, bridge)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._run(self._uvicorn))

    def stop(self) -> None:
        """End it; from any thread."""
        self._stopped.set()
        if self._loop is not None and self._uvicorn is not None:
            self._loop.call_soon_threadsafe(self._uvicorn.end)

    async def _run(self, server: _Uvicorn) -> None:
        self._loop = asyncio.get_running_loop()
        if self._stopped.is_set():
            return
        tasks = [asyncio.create_task(_keep(make)) for make in self._background]
        try:
            await server.serve(sockets=[self._sock])
        finally:
            self._loop = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def serve(
    app: Flask | AsgiApp,
    sock: socket.socket,
    background: Sequence[Background] = (),
    blocking: Collection[str] = (),
    *,
    any_host: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then return; the arguments are those of `Server`."""
    Server(app, sock, background, blocking, any_host=any_host).run()
