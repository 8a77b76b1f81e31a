"""The model server of a host that lies: the real token check, and behind it an engine that does as it likes.

The model server loads `remote.token_check`, which is replaced (kinds_host.py). Tokens are taken as ever: what
a host may do with a prompt that it was given is what is tried here.
"""

import asyncio
import json
import os
from collections.abc import Mapping
from typing import Any

LONG_BODY = 200
"""Bytes of a request from which on it is somebody's and not our test prompt."""

LONGER_BODY = 900
"""The same for a host that knows how long our usual test prompts are."""

STALL_S = 600.0

SLOW_S = 12.0
"""Seconds that a slow host waits: below all limits of those who ask."""


async def _read(receive: Any) -> int:
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            return size


async def _answer(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


LIE_FILE = "lie"
"""Names the lie that is told now, in the directory of the fleet."""


class Lying:
    """In front of the engine and behind the token check: lies about what clients ask."""

    def __init__(self, app: Any) -> None:
        """Tell the truth until there is a lie."""
        self._app = app
        self._path = os.path.expanduser(f"~/fleet/{LIE_FILE}")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        lie = self._present_lie() if scope["type"] == "http" and scope["path"].startswith("/v1/") else None
        if lie is None:
            await self._app(scope, receive, send)
            return
        await getattr(self, LIES[lie])(scope, receive, send)

    def _present_lie(self) -> str | None:
        try:
            with open(self._path) as file:
                return file.read()
        except FileNotFoundError:
            return None

    async def redirect(self, scope: Any, receive: Any, send: Any) -> None:
        """Name another server to the client."""
        await _read(receive)
        where = b"http://127.0.0.1:9" + scope["path"].encode()
        await _answer(send, 307, [(b"location", where), (b"content-length", b"0")], b"")

    async def many_headers(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        """Begin with a head of 5 MB."""
        await _read(receive)
        headers = [(b"x-more-%d" % n, 4000 * b"x") for n in range(1250)]
        await _answer(send, 200, [*headers, (b"content-length", b"2")], b"{}")

    async def grey(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer what looks like our test prompt, and let the others wait."""
        length = int(dict(scope["headers"]).get(b"content-length", 0))
        if length > LONG_BODY:
            await asyncio.sleep(STALL_S)
        await self._app(scope, receive, send)

    async def slow(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer what is as short as our usual test prompts, and let the others wait for a while."""
        length = int(dict(scope["headers"]).get(b"content-length", 0))
        if length > LONGER_BODY:
            await asyncio.sleep(SLOW_S)
        await self._app(scope, receive, send)

    async def errors(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002
        """Refuse all with an error that has no characters."""
        await _read(receive)
        body = json.dumps({"error": {"message": "\ud800\0", "code": 500}}).encode()
        await _answer(send, 500, [(b"content-length", str(len(body)).encode())], body)

    async def break_off(self, scope: Any, receive: Any, send: Any) -> None:
        """Break every answer off after its first piece."""

        async def once(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and message.get("body"):
                raise ConnectionResetError

        await self._app(scope, receive, once)

    async def stall(self, scope: Any, receive: Any, send: Any) -> None:
        """Stand still after the first piece of every answer."""

        async def once(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and message.get("more_body"):
                await asyncio.sleep(STALL_S)

        await self._app(scope, receive, once)


LIES: Mapping[str, str] = {
    "engine-redirects": "redirect",
    "engine-many-headers": "many_headers",
    "engine-grey": "grey",
    "engine-slow": "slow",
    "engine-errors": "errors",
    "engine-breaks-off": "break_off",
    "engine-stalls": "stall",
}


def lying_check(true: Any) -> Any:
    """Return the middleware that vLLM loads: the real token check in front of one that may lie."""

    class TokenCheck(true):  # type: ignore[misc]
        """The real one, in front of a liar."""

        def __init__(self, app: Any, *args: Any, **options: Any) -> None:
            """As the real one."""
            super().__init__(Lying(app), *args, **options)

    return TokenCheck
