"""One keep-alive HTTP connection of a driver, and the requests that it sends."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any, cast


def request_of(path: str, body: bytes, more: str = "", method: str = "POST") -> bytes:
    """Return the request as it goes over the wire; more: further header lines."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{more}"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


# -- the driver ------------------------------------------------------------------------------------------


def post_route(said: dict[str, Any]) -> bytes:
    """Return a POST /route."""
    return request_of("/route", json.dumps(said).encode())


_LEASE = re.compile(rb'"request_id": ?"([0-9a-f]{16})", ?"instance_id": ?(\d+)')


def leases_in(head: bytes, body: bytes) -> list[tuple[bytes, bytes]]:
    """Return (request id, instance id) of each lease in an answer; none unless its status is 200."""
    return _LEASE.findall(body) if head.startswith(b"HTTP/1.1 200") else []


class KeepAliveClient(asyncio.Protocol):
    """One keep-alive connection: sends when it is told to, and says what came and how long it took."""

    def __init__(self, heard: "Callable[[KeepAliveClient, bytes, bytes, float], None]") -> None:
        """heard: called with head, body and seconds of each answer."""
        self._heard = heard
        self._buffer = b""
        self._since = 0.0
        self.answers = 0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by descent

    @property
    def connected(self) -> bool:
        """Whether it can still ask."""
        return not self._transport.is_closing()

    def send(self, request: bytes, since: float | None = None) -> None:
        """Ask once. since: from when its time counts."""
        self.waiting = True
        self._since = time.perf_counter() if since is None else since
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        at = self._buffer.lower().find(b"content-length:", 0, end)
        length = int(self._buffer[at + 15 : self._buffer.find(b"\r\n", at)])
        if len(self._buffer) < end + 4 + length:
            return
        took_s = time.perf_counter() - self._since
        head, body, self._buffer = self._buffer[:end], self._buffer[end + 4 :], b""
        self.waiting = False
        self.answers += 1
        self._heard(self, head, body, took_s)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()
