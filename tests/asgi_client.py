"""Ask an app in this process; a Flask one through the bridge that serves it, with its direct routes."""

import asyncio
import json
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Flask
from werkzeug.datastructures import Headers

from web.bridge import FlaskBridge

Asgi = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Answered:
    """What came back."""

    status_code: int
    headers: Headers
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode()

    def get_json(self) -> Any:
        return json.loads(self.data)


class AsgiClient:
    """A client on 127.0.0.1 that waits for each answer; all of it happens on one event loop."""

    def __init__(self, app: Flask | Asgi) -> None:
        self._app: Asgi = FlaskBridge(app) if isinstance(app, Flask) else app
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close)

    def open(
        self,
        path: str,
        *,
        method: str,
        json: Any = None,
        data: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        """Send one request; json: the body as an object, data: as it is."""
        return self._runner.run(self._open(path, method, _body(json, data), headers or {}))

    def get(self, path: str, **more: Any) -> Answered:
        return self.open(path, method="GET", **more)

    def post(self, path: str, **more: Any) -> Answered:
        return self.open(path, method="POST", **more)

    def put(self, path: str, **more: Any) -> Answered:
        return self.open(path, method="PUT", **more)

    async def _open(self, path: str, method: str, body: bytes, headers: Mapping[str, str]) -> Answered:
        sent: list[dict[str, Any]] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not parts:
                await asyncio.Event().wait()  # the client does not go away
            return parts.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self._app(scope, receive, send)
        start, rest = sent
        found = Headers([(name.decode(), value.decode()) for name, value in start["headers"]])
        return Answered(start["status"], found, rest["body"])


def _body(said: Any, data: bytes | str | None) -> bytes:
    if data is not None:
        return data.encode() if isinstance(data, str) else data
    return b"" if said is None else json.dumps(said).encode()
