"""Routes that are answered without Flask, and requests that wait.

For the few routes where Flask's part of the time counts, or that must wait or let others go between. They are
registered here only, not with Flask: FlaskBridge serves both.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from flask import Flask

from web.answers import JsonAnswer
from web.app import HeadCheck, key_check
from web.messages.decoding import decode

T = TypeVar("T")

Handler = Callable[[bytes, str | None, str], "JsonAnswer | Held | Awaitable[JsonAnswer]"]
"""Of body, Authorization header and the peer's address; raises BadField."""

_EXTENSION = "direct_routes"


@dataclass(frozen=True, slots=True)
class DirectRoute:
    """One route. check: who may ask, by the head alone; handle: what is answered, once the body is here."""

    check: HeadCheck
    handle: Handler


class DirectRoutes:
    """The direct routes of one app, by path and method."""

    def __init__(self, app: Flask) -> None:
        """Register the routes with the app, where FlaskBridge looks for them."""
        self._routes: dict[str, dict[str, DirectRoute]] = {}
        app.extensions[_EXTENSION] = self

    @staticmethod
    def of(app: Flask) -> "DirectRoutes":
        """Return the direct routes of the app; it may have none."""
        found: DirectRoutes = app.extensions.get(_EXTENSION) or DirectRoutes(app)
        return found

    @property
    def by_path(self) -> Mapping[str, Mapping[str, DirectRoute]]:
        """Path -> method -> route."""
        return self._routes

    def add(self, method: str, path: str, handler: Handler, check: HeadCheck = lambda _: None) -> None:
        """Answer that route with the handler. check: who may ask, before the body is read; all by default."""
        self._routes.setdefault(path, {})[method] = DirectRoute(check, handler)

    def post(
        self, path: str, kind: type[T], keys: Callable[[], Collection[str]]
    ) -> Callable[[Callable[[T, str], "JsonAnswer | Held"]], None]:
        """Make a view of a decoded body and a client's name (see `client_name`) a POST route; it may wait."""

        def register(view: Callable[[T, str], JsonAnswer | Held]) -> None:
            def handle(raw: bytes, authorization: str | None, peer: str) -> JsonAnswer | Held:
                return view(decode(raw, kind), client_name(authorization, peer) if keys() else peer)

            self.add("POST", path, handle, key_check(keys))

        return register

    def put(
        self, path: str, keys: Callable[[], Collection[str]]
    ) -> Callable[[Callable[[bytes], Awaitable[JsonAnswer]]], None]:
        """Make a coroutine function of the body a PUT route: for long work that lets others go between."""

        def register(view: Callable[[bytes], Awaitable[JsonAnswer]]) -> None:
            self.add("PUT", path, lambda raw, *_: view(raw), key_check(keys))

        return register


def client_name(authorization: str | None, peer: str) -> str:
    """Return a name for a client: the beginning of the SHA-256 of its key, or without one its address."""
    if authorization is None:
        return peer
    return "key-" + hashlib.sha256(authorization[7:].encode()).hexdigest()[:16]


class Held:
    """A request that waits: a direct view returns it, and `answer` is called later, once.

    All of it happens on the loop's thread. Of late, gave_up and undelivered at most one is called.
    """

    def __init__(self, wait_s: float, late: Callable[[], JsonAnswer], gave_up: Callable[[], None]) -> None:
        """Say what becomes of the request.

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
        """Return what the bridge waits for."""
        self._future = loop.create_future()
        if self._answer is not None:
            self._future.set_result(self._answer)
        return self._future
