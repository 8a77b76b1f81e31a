"""TODO: say what this is."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from localcloud.paced.completion_request import Refused
from localcloud.paced.pacer import _News

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 32 * 2**20
"""Bytes of a request body; the longest context of our profiles is some 64 kB of text."""


async def _watch(receive: Receive, news: _News) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    news.leave()


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, None when the client went away before; raises Refused when it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise Refused(f"the body: at most {MAX_BODY} bytes are taken", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


async def _respond(
    send: Send, status: int, kind: bytes, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    most = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": most})
    await send({"type": "http.response.body", "body": body})
