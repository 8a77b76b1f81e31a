"""Views that are answered without Flask: direct, signed and awaited ones, and requests that wait."""

import asyncio
import hashlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, request

from fleet_client.bearer import bearer_is
from web.answers import UNAUTHORIZED, JsonAnswer, error_answer, response
from web.bodies import Field, check_fields, parse_json
from web.messages.decoding import BadField

EXTENSION = "direct_routes"


@dataclass(frozen=True)
class DirectRoutes:
    """What our bridge must know of an app."""

    large_bodies: dict[str, int]
    direct: "dict[str, DirectAnswer]"  # by path: all are POST
    awaited: "dict[tuple[str, str], AwaitedRoute]"


def direct_routes(app: Flask) -> DirectRoutes:
    found: DirectRoutes = app.extensions[EXTENSION]
    return found


DirectView = Callable[[dict[str, Any], str], "JsonAnswer | Held"]
"""Of the checked body and of who asks: see `client_name`."""

SignedView = Callable[[bytes, str | None], "JsonAnswer"]
"""Of the unchecked body and the Authorization header."""

DirectAnswer = Callable[[bytes, str | None, str], "JsonAnswer | Held"]
"""Of body, Authorization header and address: a direct view with all that is checked before it."""


@dataclass(frozen=True)
class _Direct:
    """A direct view with its rules."""

    view: DirectView
    fields: Mapping[str, Field]
    keys: Callable[[], Collection[str]]

    def answer(self, raw: bytes, authorization: str | None, peer: str) -> "JsonAnswer | Held":
        known = self.keys()
        if known and not bearer_is(authorization, known):
            return UNAUTHORIZED
        try:
            said = check_fields(parse_json(raw), self.fields)
            return self.view(said, client_name(authorization, peer) if known else peer)
        except BadField as e:
            return error_answer(400, "bad_request", str(e))


def direct(
    app: Flask,
    path: str,
    fields: Mapping[str, Field],
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
        def answer(raw: bytes, authorization: str | None, _: str) -> JsonAnswer:
            try:
                return view(raw, authorization)
            except BadField as e:
                return error_answer(400, "bad_request", str(e))

        _add_direct(app, path, view.__name__, answer)
        return view

    return register


def _add_direct(app: Flask, path: str, name: str, answer: DirectAnswer) -> None:
    extension = direct_routes(app)
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


AwaitedView = Callable[[bytes], Coroutine[Any, Any, JsonAnswer]]


@dataclass(frozen=True)
class AwaitedRoute:
    """A coroutine that answers, with who may call it."""

    view: AwaitedView
    keys: Callable[[], Collection[str]]

    async def answer(self, raw: bytes, authorization: str | None) -> JsonAnswer:
        known = self.keys()
        if known and not bearer_is(authorization, known):
            return UNAUTHORIZED
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
        rules = direct_routes(app).awaited[method, path] = AwaitedRoute(view, keys)

        def through_flask() -> Response:
            request.max_content_length = direct_routes(app).large_bodies.get(
                path, app.config["MAX_CONTENT_LENGTH"]
            )
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


class Held:
    """A request that waits: a direct view returns it, somebody calls `answer` later, once.

    All of it happens on the loop's thread. Of late, gave_up and undelivered at most one is called.
    """

    def __init__(self, wait_s: float, late: Callable[[], JsonAnswer], gave_up: Callable[[], None]) -> None:
        """What becomes of the request.

        late: called after wait_s without an answer, it makes one. gave_up: called when the client has gone or
        the server ends: forget the waiter.
        """
        self.wait_s = wait_s
        self.late = late
        self.gave_up = gave_up
        self.undelivered: Callable[[], None] = lambda: None
        self._future: asyncio.Future[JsonAnswer] | None = None
        self._answer: JsonAnswer | None = None

    def answer(self, answer: JsonAnswer, undelivered: Callable[[], None] = lambda: None) -> bool:
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

    def future(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[JsonAnswer]":
        """What the bridge waits for."""
        self._future = loop.create_future()
        if self._answer is not None:
            self._future.set_result(self._answer)
        return self._future
