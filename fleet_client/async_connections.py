"""HTTP connections of an event loop, by aiohttp.

Its C parser is why: 500 streams of 50 events/s take 0.7 of a core and keep up, where httpx2's own pool takes
all of one and falls behind.
"""

import asyncio
import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import aiohttp
from multidict import CIMultiDict

from fleet_client.bounded_answers import BoundedConnector
from fleet_client.connection_pool import MAX_HEADERS, Header
from fleet_client.transport import CLOSE_S, KEPT_ANSWER, MOMENT_S


class Stage:
    """How far a request has come: whether it has a connection, and a new one; aiohttp's errors do not say."""

    __slots__ = ("connected", "fresh")

    def __init__(self) -> None:
        """Begin before the request has a connection."""
        self.connected = False
        self.fresh = False

    def connect(self) -> None:
        """Note that the request has a connection."""
        self.connected = True

    def open(self) -> None:
        """Note that the connection of the request is a new one."""
        self.fresh = True


_STAGE: ContextVar[Stage | None] = ContextVar("fleet_client_stage", default=None)


@contextmanager
def staged() -> Iterator[Stage]:
    """Give a Stage that follows the request which is sent inside the context."""
    stage = Stage()
    token = _STAGE.set(stage)
    try:
        yield stage
    finally:
        _STAGE.reset(token)


class _Connector(BoundedConnector):
    """A connector that notes the stage of each request, and remembers the connections that it made."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        connection = await super().connect(req, traces, timeout)
        if (stage := _STAGE.get()) is not None:
            stage.connect()
        return connection

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        made = await super()._create_connection(req, traces, timeout)
        self._made.add(made)
        if (stage := _STAGE.get()) is not None:
            stage.open()
        return made

    def disown(self, nowhere: socket.socket) -> None:
        """Replace the sockets of all its connections by `nowhere`."""
        for protocol in list(self._made):
            transport = protocol.transport
            number = -1 if transport is None else transport.get_extra_info("socket").fileno()
            if number >= 0:
                os.dup2(nowhere.fileno(), number, inheritable=False)


def disown(session: aiohttp.ClientSession, nowhere: socket.socket) -> None:
    """Let go of a session in a fork of the process: what is written to its connections goes nowhere.

    They cannot be closed: the goodbye of TLS would reach the other side, and a selector of Linux that both
    processes share would forget the parent's.
    """
    if isinstance(session.connector, _Connector):  # None: it is closed
        session.connector.disown(nowhere)


def new_session(keep_alive_s: float | None) -> aiohttp.ClientSession:
    """Return an aiohttp session that keeps idle connections for so long; None: a new one each time."""
    if keep_alive_s is None:
        connector = _Connector(limit=0, force_close=True)
    else:
        connector = _Connector(limit=0, keepalive_timeout=keep_alive_s)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy from the environment must not see tokens or prompts
        auto_decompress=False,
        max_line_size=65_536,
        max_field_size=16_384,
        max_headers=MAX_HEADERS,  # 2 MiB a head
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


def header_texts(headers: Iterable[Header]) -> CIMultiDict[str]:
    """Return headers as aiohttp wants them: texts, which it sends as UTF-8."""
    out: CIMultiDict[str] = CIMultiDict()
    for name, value in headers:
        try:
            out.add(name.decode("ascii"), value.decode())
        except UnicodeDecodeError:
            out.add(name.decode("latin-1"), value.decode("latin-1"))
    return out


def abort(source: aiohttp.ClientResponse) -> None:
    """Close an answer's connection at once, without waiting for TLS to say goodbye."""
    connection = source.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    source.close()


async def await_end(source: aiohttp.ClientResponse) -> None:
    """Wait a moment for the end of an answer whose last event was read, so that its connection is kept."""
    try:
        async with asyncio.timeout(MOMENT_S):
            if await source.content.readany() == b"":
                return
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    finally:
        if not source.content.is_eof():
            abort(source)


async def read_whole(source: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body of an answer; raise aiohttp.ClientPayloadError when it has over `most` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in source.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > most:
            abort(source)
            raise aiohttp.ClientPayloadError(f"an answer of over {most} bytes")
    return b"".join(parts)


async def read_some(source: aiohttp.ClientResponse) -> bytes:
    """Return the body of an answer that is not wanted, as far as it comes soon and is not long."""
    raw = b""
    try:
        async with asyncio.timeout(CLOSE_S):
            async for part in source.content.iter_any():
                raw += part
                if len(raw) > KEPT_ANSWER:
                    abort(source)
                    return raw[:KEPT_ANSWER]
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    except BaseException:
        abort(source)
        raise
    source.close()
    return raw
