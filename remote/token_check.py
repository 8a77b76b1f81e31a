"""The token check in front of vLLM: ASGI middleware, `--middleware remote.token_check.TokenCheck`.

    request ─► one Bearer token, taken? ─► no: 401, the engine sees nothing
                                     └──► yes: event "started" ─► vLLM ─► event "finished|aborted|failed"

Open is only `GET /health`. `GET /metrics` is also for the auth_server beside it, which has the key of this
boot. What the answer says is not looked at, but for the number of its tokens. Nothing here logs.
"""

import hmac
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from remote import events, tokens

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST_HEADER = 512
"""Bytes of an Authorization header that is looked at; ours has 45."""

TAIL = 48
"""Bytes of a piece of an answer that are looked at again with the next: more than a usage figure has."""

_USAGE = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,9})')

_REFUSAL = (
    b'{"error":{"message":"A single-use token is needed: ask the loadbalancer for a lease.",'
    b'"type":"invalid_request_error","param":null,"code":"invalid_api_key"}}'
)


def bearer(scope: Scope) -> str | None:
    """The token of the only Authorization header; None for anything else."""
    found = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if len(found) != 1 or len(found[0]) > LONGEST_HEADER or found[0][:7].lower() != b"bearer ":
        return None
    try:
        token: str = found[0][7:].decode("ascii")
    except UnicodeDecodeError:
        return None
    return token


class Watched:
    """One admitted request: it passes everything on and notes how it goes."""

    def __init__(self, name: str, ring: events.Events, receive: Receive, send: Send) -> None:
        """The event "started" is written."""
        self._name = name
        self._ring = ring
        self._receive = receive
        self._send = send
        self._status = 0
        self._stream = False
        self._chunks = 0
        self._usage: int | None = None
        self._tail = b""
        self._broken = False
        self._complete = False
        self._ended = False
        ring.write(name, events.STARTED)

    async def receive(self) -> Message:
        """ASGI receive; a client that goes away before the answer is complete ends the request at once."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self.end(events.ABORTED)
        return message

    async def send(self, message: Message) -> None:
        """ASGI send."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        elif message["type"] == "http.response.body":
            self._look(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        await self._send(message)
        if self._complete:
            self.end(events.FAILED if self._broken or self._status >= 500 else events.FINISHED)

    def _look(self, body: bytes) -> None:
        if self._stream:
            # vLLM sends one event a token; the role of a chat and the end are no tokens.
            # An event begins a line; in a text, which may be the client's own (echo), line ends are escaped.
            begun = b"\n" if self._tail[-1:] in (b"", b"\n") else b""
            self._chunks += (begun + body).count(b"\ndata: {") - body.count(b'"role":')
            self._broken = self._broken or b'data: {"error"' in body
        # Quotes inside a text are escaped, so this is a key of vLLM's own.
        body = self._tail + body
        if b'"completion_tokens"' in body and (found := _USAGE.findall(body)):
            self._usage = int(found[-1])
        self._tail = body[-TAIL:]

    def end(self, kind: int) -> None:
        """The request is over; the first to say how is believed."""
        if self._ended:
            return
        self._ended = True
        self._ring.write(self._name, kind, max(0, self._chunks) if self._usage is None else self._usage)


class TokenCheck:
    """The middleware. Whatever is missing or wrong in the boot directory refuses everybody."""

    def __init__(
        self, app: App, boot_dir: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """boot_dir: default fleet/boot in the home directory, or FLEET_BOOT_DIR."""
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
        """ASGI."""
        kind = scope["type"]
        if kind != "lifespan" and not self._quiet:
            # uvicorn has said that it is ready; from here on each malformed request would be a line.
            self._quiet = True
            logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif kind != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] == "GET" and scope["path"] == "/health":
            await self._app(scope, receive, send)
        else:
            await self._check(scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = bearer(scope)
        if token is None or self._gate is None:
            await _refuse(send)
            return
        local = scope["method"] == "GET" and scope["path"] == "/metrics"
        if local and self._local_key and hmac.compare_digest(token.encode(), self._local_key):
            await self._app(_without_token(scope), receive, send)
        elif self._gate.take(token, self._clock()):
            await self._serve(tokens.request_id(token), scope, receive, send)
        else:
            await _refuse(send)

    async def _serve(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        watched = Watched(name, self._ring, receive, send)
        how = events.FAILED
        try:
            await self._app(_without_token(scope), watched.receive, watched.send)
        except BaseException as e:
            # Cancelled: the server gave the connection up, because its client or itself goes away.
            how = events.FAILED if isinstance(e, Exception) else events.ABORTED
            raise
        finally:
            watched.end(how)


def _without_token(scope: Scope) -> Scope:
    """What the app sees: it has no use for the token, and cannot log it."""
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
