"""Kept-alive HTTP/1.1 connections over blocking sockets, for the threads of `FleetTransport`.

Our own, parsed by httptools, because what httpx2 offers cannot wait a moment for the end of an answer: openai
stops reading at [DONE], and each request would need a new TLS connection.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import urlsplit

import httptools

Header = tuple[bytes, bytes]

MAX_HEAD = 65_536
"""Bytes of an answer's head, and of its trailer, in all interim answers together."""

MAX_HEADERS = 128
"""Headers of an answer; aiohttp's bound, too."""

MAX_INTERIM = 16
"""Interim answers (1xx) before the answer: vLLM sends none, a proxy one or two."""


SILENT_S, LOOK_S = 10.0, 5.0
"""Seconds without a byte after which the loadbalancer is asked whether the instance is still well, and until
it is asked again. A token takes 0.1 s; before the first one a prompt is read, and may wait for others."""


class Connection:
    """One connection to a server, with one request at a time."""

    def __init__(self, address: str, context: ssl.SSLContext | None, connect_s: float) -> None:
        """Connect to an address, under TLS if there is a context; raise OSError.

        connect_s: seconds that connecting and the handshake may take each.
        """
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or (80 if context is None else 443)
        self.fresh = True  # whether it has had no request before the one under way
        self.inherited = False  # whether it is of the process that this one is a fork of
        self._idle_since = 0.0
        self._limit_s: float | None = connect_s
        self._host = parts.netloc.encode()
        sock = socket.create_connection((host, port), connect_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock = sock if context is None else context.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
        self._begin(head_only=False)

    def _begin(self, head_only: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._look: Callable[[], None] | None = None
        self._head_only = head_only
        self.status = 0
        self.headers: list[Header] = []
        self._chunks: list[bytes] = []
        self.headed = False
        self._framed = False
        self.complete = False
        self._reusable = False
        self._head_size = 0  # bytes that came while no body did
        self._interim = 0
        self._over: str | None = None  # which bound was passed

    # -- what httptools calls

    def on_message_begin(self) -> None:
        """Begin a status line, the first or one after an interim answer. The parser calls this."""
        self.headers, self._framed = [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header of the answer, also of a trailer. The parser calls this."""
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADERS:
            self._break(f"over {MAX_HEADERS} headers")
        low = name.lower()
        self._framed = self._framed or low == b"content-length" or low == b"transfer-encoding"

    def on_headers_complete(self) -> None:
        """Take the status; after an interim answer (below 200) another comes. The parser calls this."""
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self.headed = True
            self._reusable = self._parser.should_keep_alive() and not self._head_only
            self.complete = self._head_only
            self._head_size = 0
            return
        self._interim += 1
        if self._interim > MAX_INTERIM:
            self._break(f"over {MAX_INTERIM} interim answers")

    def _break(self, why: str) -> None:
        """End the parsing of an answer, from within one of the parser's calls."""
        self._over = why
        raise ValueError(why)

    def on_body(self, body: bytes) -> None:
        """Add a piece of the answer's body. The parser calls this."""
        self._chunks.append(body)
        self._head_size = 0

    def on_message_complete(self) -> None:
        """Note that the answer is complete. The parser calls this."""
        self.complete = self.complete or self.headed

    # -- one request

    def send(self, method: str, target: str, headers: Iterable[Header], body: bytes) -> None:
        """Send a request; raise OSError."""
        self._begin(method == "HEAD")
        lines = [b"%b: %b\r\n" % header for header in headers]
        length = b"Content-Length: %d\r\n" % len(body) if body or method in ("POST", "PUT", "PATCH") else b""
        first = b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method.encode(), target.encode(), self._host)
        self._sock.sendall(b"".join((first, *lines, length, b"\r\n", body)))

    def head(self, limit_s: float | None) -> None:
        """Wait for the answer's status and headers, limit_s seconds in all; raise OSError.

        Each read of the body may take so long, too.
        """
        end = None if limit_s is None else time.monotonic() + limit_s
        while not self.headed:
            self._limit_until(end)
            self._receive()
        self.limit(limit_s)

    def first_part(self, limit_s: float) -> None:
        """Wait for the first bytes of the answer's body; raise OSError where it breaks or they are late."""
        end = time.monotonic() + limit_s
        while not self._chunks and not self.complete:
            self._limit_until(end)
            self._receive()

    def whole_body(self, most: int, limit_s: float) -> bytes:
        """Return the answer's body, of at most `most` bytes within limit_s seconds; raise OSError."""
        end = time.monotonic() + limit_s
        parts: list[bytes] = []
        size = 0
        while not self.complete or self._chunks:
            if not self._chunks:
                self._limit_until(end)
                self._receive()
            size += sum(map(len, self._chunks))
            parts += self._chunks
            self._chunks = []
            if size > most:
                raise BadHttp(f"an answer of over {most} bytes")
        return b"".join(parts)

    def _limit_until(self, end: float | None) -> None:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0.0:
            raise TimeoutError("timed out")
        self.limit(left)

    def body(self) -> Iterator[bytes]:
        """Yield the answer's body in the pieces it comes in; raise OSError."""
        while True:
            if self._chunks:
                chunks, self._chunks = self._chunks, []
                yield chunks[0] if len(chunks) == 1 else b"".join(chunks)
            elif self.complete:
                return
            else:
                self._receive()

    def watch(self, look: Callable[[], None]) -> None:
        """Call `look` now and then while nothing comes; it raises OSError when nothing more will come."""
        self._look = look
        self.limit(self._limit_s)

    def _read(self) -> bytes:
        try:
            return self._sock.recv(65_536)
        except TimeoutError:
            if self._look is None:
                raise
            return self._read_on(self._look)

    def _read_on(self, look: Callable[[], None]) -> bytes:
        """Go on reading after a first time of silence, calling `look` every LOOK_S."""
        limit_s, silent_s = self._limit_s, self._sock.gettimeout() or 0.0
        while limit_s is None or silent_s < limit_s:
            look()
            wait_s = LOOK_S if limit_s is None else min(LOOK_S, limit_s - silent_s)
            self._sock.settimeout(wait_s)
            try:
                data = self._sock.recv(65_536)
            except TimeoutError:
                silent_s += wait_s
                continue
            self.limit(limit_s)
            return data
        raise TimeoutError("timed out")

    def _receive(self) -> None:
        data = self._read()
        if not data:
            if not self.headed or self._framed:
                raise ConnectionResetError("the connection was closed")
            self.complete, self._reusable = True, False
            return
        self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise BadHttp(f"an answer with {self._over}") from None
        except httptools.HttpParserUpgrade:
            raise BadHttp("an answer that changes the protocol") from None
        except httptools.HttpParserError as e:
            raise BadHttp(f"an answer that is no HTTP: {e}") from None
        if self._head_size > MAX_HEAD and not self.complete:
            raise BadHttp(f"an answer with a head or trailer of over {MAX_HEAD} bytes")

    def limit(self, limit_s: float | None) -> None:
        """Let each read and each write take limit_s seconds from now on; None: no limit."""
        self._limit_s = limit_s
        if self._look is not None:
            limit_s = SILENT_S if limit_s is None else min(SILENT_S, limit_s)
        self._sock.settimeout(limit_s)

    # -- between requests

    def rest(self, now: float) -> None:
        """Note that the connection is idle from now on."""
        self._idle_since = now

    def idle_for(self, now: float) -> float:
        """Return for how many seconds the connection has been idle."""
        return now - self._idle_since

    def use_again(self) -> bool:
        """Return whether another request may be sent: the server has not closed it nor sent more bytes."""
        self.fresh = False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def finish(self, moment_s: float) -> bool:
        """Wait moment_s at most for the end of the answer; return whether the connection is usable again."""
        try:
            if not self.complete:
                self.limit(moment_s)
                self._receive()
        except OSError:
            return False
        return self.complete and self._reusable and not self._chunks

    def disown(self) -> None:
        """Close the socket in a fork only: no shutdown, no goodbye of TLS, which would end the parent's."""
        self.inherited = True
        self._sock.close()

    def close(self) -> None:
        """Close the connection at once, also when another thread is reading from it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class BadHttp(OSError):
    """A server sent bytes that are no HTTP answer."""


Key = tuple[str, str | None]
"""Address and certificate."""


class ConnectionPool:
    """Kept-alive connections to servers, by address and certificate. Threads may share it."""

    def __init__(self, keep_alive_s: float) -> None:
        """Start without connections. keep_alive_s: seconds for which an idle connection is kept."""
        self._keep_alive_s = keep_alive_s
        self._lock = threading.RLock()  # a collection of garbage may close a forgotten transport anywhere
        self._idle: dict[Key, list[Connection]] = {}
        self._busy: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._swept_at = 0.0
        self._closed = False

    def take(self, key: Key) -> Connection | None:
        """Return an idle connection that can be used again; None when there is none."""
        now = time.monotonic()
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                connection = idle.pop()
                self._busy.add(connection)
            if connection.idle_for(now) < self._keep_alive_s and connection.use_again():
                return connection
            self.drop(connection)

    def connect(self, key: Key, context: ssl.SSLContext | None, connect_s: float) -> Connection:
        """Open and return a new connection; raise OSError."""
        connection = Connection(key[0], context, connect_s)
        with self._lock:
            self._busy.add(connection)
        return connection

    def put(self, key: Key, connection: Connection) -> None:
        """Keep a connection for another request; close those that were idle for too long."""
        now = time.monotonic()
        connection.rest(now)
        with self._lock:
            self._busy.discard(connection)
            old = [connection] if self._closed else []
            if not self._closed:
                self._idle.setdefault(key, []).append(connection)
                if now - self._swept_at > self._keep_alive_s:
                    self._swept_at = now
                    old = self._sweep(now)
        for one in old:
            one.close()

    def _sweep(self, now: float) -> list[Connection]:
        old = []
        for key, idle in list(self._idle.items()):
            old += [one for one in idle if one.idle_for(now) >= self._keep_alive_s]
            kept = [one for one in idle if one.idle_for(now) < self._keep_alive_s]
            if kept:
                self._idle[key] = kept
            else:
                del self._idle[key]
        return old

    def drop(self, connection: Connection) -> None:
        """Close a connection that cannot be used again."""
        with self._lock:
            self._busy.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close the idle connections now, and those in use when their answers have ended."""
        with self._lock:
            self._closed = True
            idle = [one for some in self._idle.values() for one in some]
            self._idle = {}
        for connection in idle:
            connection.close()

    def start_anew(self) -> None:
        """Forget all connections, which in a fork are the parent's, and make a new lock.

        The old lock may have been held when the parent forked.
        """
        inherited = [*self._busy, *(one for idle in self._idle.values() for one in idle)]
        self._lock = threading.RLock()
        self._busy, self._idle = weakref.WeakSet(), {}
        for connection in inherited:
            connection.disown()
