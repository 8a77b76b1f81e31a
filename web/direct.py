"""Routes that are answered without Flask, and requests that are held until there is an answer.

They are for the few routes where Flask's part of the time counts, or that must wait or let others go between.
They are registered here only, not with Flask: FlaskBridge serves both.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from flask import Flask

from web.answers import Answer, JsonAnswer
from web.app import HeadCheck, key_check
from web.messages.decoding import decode

T = TypeVar("T")


class Asker(NamedTuple):
    """Who sent a request. authorization: the header, "" without one; peer: the address; said: the headers.

    Headers of one name are joined with commas, so two Authorization headers match no key.
    """

    authorization: str
    peer: str
    said: Mapping[bytes, bytes]


Handler = Callable[[bytes, Asker], "JsonAnswer | Held | Awaitable[Answer]"]
"""Of the body, and of who asks; raises BadField."""

_EXTENSION = "direct_routes"


@dataclass(frozen=True, slots=True)
class DirectRoute:
    """One route that is answered without Flask.

    check: of a request's Authorization header, before its body is read. handle: makes the answer from the
    body.
    """

    check: HeadCheck
    handle: Handler


class DirectRoutes:
    """The routes of one Flask app that are answered without Flask, by path and method."""

    def __init__(self, app: Flask) -> None:
        """Make the table of an app's direct routes, without routes yet, where FlaskBridge looks for it."""
        self._routes: dict[str, dict[str, DirectRoute]] = {}
        app.extensions[_EXTENSION] = self

    @staticmethod
    def of(app: Flask) -> "DirectRoutes":
        """Return the table of the app's direct routes, an empty one if it has none."""
        found: DirectRoutes = app.extensions.get(_EXTENSION) or DirectRoutes(app)
        return found

    @property
    def by_path(self) -> Mapping[str, Mapping[str, DirectRoute]]:
        """The direct routes of the app, as {path: {method: route}}."""
        return self._routes

    def add(self, method: str, path: str, handler: Handler, check: HeadCheck = lambda _: None) -> None:
        """Let the handler answer that route. check: who may ask, before the body is read; all by default."""
        self._routes.setdefault(path, {})[method] = DirectRoute(check, handler)

    def post(
        self, path: str, kind: type[T], keys: Callable[[], Collection[str]]
    ) -> Callable[[Callable[[T, str], "JsonAnswer | Held"]], None]:
        """Return a decorator that makes a view a POST route; the view may return a request that waits.

        The view gets the body, decoded as `kind`, and the client's name (see `client_name`). keys: one of
        them is wanted, unless there are none.
        """

        def register(view: Callable[[T, str], JsonAnswer | Held]) -> None:
            def handle(raw: bytes, asker: Asker) -> JsonAnswer | Held:
                return view(decode(raw, kind), client_name(asker) if keys() else asker.peer)

            self.add("POST", path, handle, key_check(keys))

        return register

    def put(
        self, path: str, keys: Callable[[], Collection[str]]
    ) -> Callable[[Callable[[bytes], Awaitable[JsonAnswer]]], None]:
        """Return a decorator that makes a coroutine function of the body a PUT route, for long work.

        While it works it lets other requests go between. keys: one of them is wanted, unless there are none.
        """

        def register(view: Callable[[bytes], Awaitable[JsonAnswer]]) -> None:
            self.add("PUT", path, lambda raw, _: view(raw), key_check(keys))

        return register

    def get(
        self, path: str, keys: Callable[[], Collection[str]]
    ) -> Callable[[Callable[[str], Awaitable[Answer]]], None]:
        """Return a decorator that makes a coroutine function of the Accept header a GET route, as `put`."""

        def register(view: Callable[[str], Awaitable[Answer]]) -> None:
            self.add(
                "GET",
                path,
                lambda _, asker: view(asker.said.get(b"accept", b"").decode("latin-1")),
                key_check(keys),
            )

        return register


def client_name(asker: Asker) -> str:
    """Return a name for a client: of its key the beginning of the SHA-256, without one its address."""
    if not asker.authorization:
        return asker.peer
    return key_name(asker.authorization[7:])


def key_name(key: str) -> str:
    """Return the name of the client that has this key."""
    return "key-" + hashlib.sha256(key.encode()).hexdigest()[:16]


class Held:
    """A request that waits for its answer: a direct view returns it, and `answer` is called later, once.

    All of it happens on the loop's thread. Of late, gave_up and undelivered at most one is called.
    """

    def __init__(self, wait_s: float, late: Callable[[], JsonAnswer], gave_up: Callable[[], None]) -> None:
        """Make a request that waits up to wait_s seconds.

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
        """Send the answer to the request; return False when it has one already or is forgotten.

        undelivered is called if the answer does not reach its client: take back what it gave.
        """
        if self._answer is not None or (self._future is not None and self._future.done()):
            undelivered()
            return False
        self._answer, self.undelivered = answer, undelivered
        if self._future is not None:
            self._future.set_result(answer)
        return True

    def future(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[JsonAnswer]":
        """Return the future of the request's answer, for which the bridge waits."""
        self._future = loop.create_future()
        if self._answer is not None:
            self._future.set_result(self._answer)
        return self._future
