"""The token check in front of vLLM: ASGI middleware, `--middleware remote.token_check.TokenCheck`.

    request ─► one Bearer token, taken? ─► no: 401, the engine sees nothing
                                     └──► yes: event "started" ─► vLLM ─► event "finished|aborted|failed"

Open is only `GET /health`. `GET /metrics` is also for the auth_server on the same machine, which has the key
of this boot. What is asked and answered is not looked at, but for its length (lengths.py), which
loadbalancers that did not send it cannot know. Nothing here logs.
"""

import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from remote import events, tokens
from remote.lengths import AnswerLength, request_size

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LONGEST_HEADER = 512
"""Bytes of an Authorization header that is looked at; ours has 45."""

_PIECES = 64
"""Pieces of an answer that are looked at together: a search has a price, however short the text is."""

_REFUSAL = (
    b'{"error":{"message":"A single-use token is needed: ask the loadbalancer for a lease.",'
    b'"type":"invalid_request_error","param":null,"code":"invalid_api_key"}}'
)


def bearer(scope: Scope) -> str | None:
    """Return the token in the request's only Authorization header; None for anything else."""
    found = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if len(found) != 1 or len(found[0]) > _LONGEST_HEADER or found[0][:7].lower() != b"bearer ":
        return None
    try:
        token: str = found[0][7:].decode("ascii")
    except UnicodeDecodeError:
        return None
    return token


class Watched:
    """One admitted request: all of it is passed on, and its start, end and lengths are recorded."""

    def __init__(self, name: str, ring: events.Events, receive: Receive, send: Send) -> None:
        """Begin before the first byte of the request. name: its id in events."""
        self._name = name
        self._ring = ring
        self._receive = receive
        self._send = send
        self._asked: list[bytes] | None = []
        self._status = 0
        self._stream = False
        self._pieces: list[bytes] = []
        self._length = AnswerLength()
        self._complete = False
        self._ended = False

    async def receive(self) -> Message:
        """Receive a part of the request, as ASGI does; if the client leaves early the request is over."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            if not self._complete:
                self.end(events.ABORTED)
        elif self._asked is not None:
            self._asked.append(message.get("body", b""))
            if not message.get("more_body"):
                self._start()
        return message

    def _start(self) -> None:
        """Record once that the request has started: the engine has all of it, or answers, or will not."""
        if self._asked is not None:
            asked, self._asked = b"".join(self._asked), None
            self._ring.write(self._name, events.STARTED, request_size(asked))

    def sender(self) -> Send:
        """Return an ASGI send that also keeps what the pieces of the answer say.

        For a piece that others follow it makes no coroutine.
        """
        pieces, send, keep = self._pieces, self._send, self._pieces.append

        def pass_on(message: Message) -> Awaitable[None]:
            if not message.get("more_body"):
                return self._begin_or_end(message)
            keep(message.get("body", b""))
            if len(pieces) == _PIECES:
                self._look(False)
            return send(message)

        return pass_on

    async def _begin_or_end(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start()
            self._status = message["status"]
            self._stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        elif message["type"] == "http.response.body":
            self._pieces.append(message.get("body", b""))
            self._complete = True
        await self._send(message)
        if self._complete:
            self.end(events.FINISHED)

    def _look(self, last: bool) -> None:
        """Count the tokens in the pieces kept so far, and drop them."""
        self._length.look(b"".join(self._pieces), self._stream, last)
        self._pieces.clear()

    def end(self, kind: int) -> None:
        """Record that the request is over; a second call changes nothing.

        kind: how it ended; an answer that tells of an error has failed.
        """
        if self._ended:
            return
        self._ended = True
        self._start()
        self._look(True)
        if kind == events.FINISHED and (self._length.failed or self._status >= 500):
            kind = events.FAILED
        self._ring.write(self._name, kind, self._length.tokens(kind == events.FINISHED))


class TokenCheck:
    """ASGI middleware that admits a request once for each single-use token, and refuses all others with 401.

    If anything is missing or wrong in the boot directory, it refuses every request.
    """

    def __init__(
        self, app: App, boot_dir: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Check the requests to an app. boot_dir: has the keys of this boot's tokens.

        Its default is $FLEET_BOOT_DIR, else ~/fleet/boot.
        """
        self._app = app
        self._clock = clock
        boot_dir = boot_dir or os.environ.get("FLEET_BOOT_DIR") or os.path.expanduser("~/fleet/boot")
        self._gate: tokens.Gate | None = None
        self._local_key = b""
        self._quiet = False
        try:
            with open(os.path.join(boot_dir, "local.key"), "rb") as f:
                self._local_key = f.read().strip()
            self._ring = events.Events(boot_dir)
            self._gate = tokens.Gate(boot_dir)
        except (OSError, ValueError):
            self._gate = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request, in one coroutine, because each event would pass through every other."""
        kind = scope["type"]
        if kind != "lifespan" and not self._quiet:
            # uvicorn has said that it is ready; from here on each malformed request would be a line.
            self._quiet = True
            logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        if kind == "lifespan" or (kind == "http" and _asks(scope, "/health")):
            await self._app(scope, receive, send)
        elif kind != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (name := self._admitted(scope)) is None:
            await _refuse(send)
        elif not name:
            await self._app(_without_token(scope), receive, send)
        else:
            watched = Watched(name, self._ring, receive, send)
            how = events.FAILED
            try:
                await self._app(_without_token(scope), watched.receive, watched.sender())
            except BaseException as e:
                # Cancelled: the server gave the connection up, because its client or itself goes away.
                how = events.FAILED if isinstance(e, Exception) else events.ABORTED
                raise
            finally:
                watched.end(how)

    def _admitted(self, scope: Scope) -> str | None:
        """Return the name of an admitted request, "" for the auth_server's own; None: it is refused."""
        token = bearer(scope)
        if token is None or self._gate is None:
            return None
        own = self._local_key if _asks(scope, "/metrics") else b""
        if own and hmac.compare_digest(token.encode(), own):
            return ""
        return tokens.request_id(token) if self._gate.take(token, self._clock()) else None


def _asks(scope: Scope, path: str) -> bool:
    return (scope["method"], scope["path"]) == ("GET", path)


def _without_token(scope: Scope) -> Scope:
    """Return the request as the app sees it: without the token, which it does not need and could log."""
    return {**scope, "headers": [h for h in scope["headers"] if h[0].lower() != b"authorization"]}


async def _refuse(send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_REFUSAL)).encode()),
        (b"www-authenticate", b"Bearer"),
        # The body was not read, so the next request on this connection would begin inside it.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSAL})
