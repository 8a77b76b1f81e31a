"""HTTP/1.1 over sockets that are kept open, for the threads of `fleet_client.FleetTransport`.

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
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

import httptools

Header = tuple[bytes, bytes]


class Wire:
    """One connection, with one request at a time."""

    def __init__(self, address: str, context: ssl.SSLContext | None, connect_s: float) -> None:
        """Connects; raises OSError."""
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or (80 if context is None else 443)
        self.idle_since = 0.0
        self.fresh = True
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
        self._head_only = head_only
        self.status = 0
        self.reason = b""
        self.headers: list[Header] = []
        self.chunks: list[bytes] = []
        self._headed = False
        self._framed = False
        self.complete = False
        self._reusable = False

    # -- what httptools calls

    def on_message_begin(self) -> None:
        """A status line: the first, or the one after an interim answer."""
        self.headers, self.reason, self._framed = [], b"", False

    def on_status(self, reason: bytes) -> None:
        """The words after the status."""
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.headers.append((name, value))
        low = name.lower()
        self._framed = self._framed or low == b"content-length" or low == b"transfer-encoding"

    def on_headers_complete(self) -> None:
        """All headers."""
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self._headed = True
            self._reusable = self._parser.should_keep_alive() and not self._head_only
            self.complete = self._head_only

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self.chunks.append(body)

    def on_message_complete(self) -> None:
        """The end."""
        self.complete = self.complete or self._headed

    # -- what is asked of it

    def send(self, method: str, target: str, headers: Iterable[Header], body: bytes) -> None:
        """The request is sent; raises OSError."""
        self._begin(method == "HEAD")
        lines = [b"%b: %b\r\n" % header for header in headers]
        length = b"Content-Length: %d\r\n" % len(body) if body or method in ("POST", "PUT", "PATCH") else b""
        first = b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method.encode(), target.encode(), self._host)
        self._sock.sendall(b"".join((first, *lines, length, b"\r\n", body)))

    def head(self) -> None:
        """Status and headers are here; raises OSError."""
        while not self._headed:
            self._receive()

    def body(self) -> Iterator[bytes]:
        """The body as it comes; raises OSError."""
        while True:
            if self.chunks:
                chunks, self.chunks = self.chunks, []
                yield chunks[0] if len(chunks) == 1 else b"".join(chunks)
            elif self.complete:
                return
            else:
                self._receive()

    def _receive(self) -> None:
        data = self._sock.recv(65_536)
        if not data:
            if not self._headed or self._framed:
                raise ConnectionResetError("the connection was closed")
            self.complete, self._reusable = True, False
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise BadHttp("an answer that changes the protocol") from None
        except httptools.HttpParserError as e:
            raise BadHttp(f"an answer that is no HTTP: {e}") from None

    def wait(self, limit_s: float | None) -> None:
        """Each read and each write may take so long from now on."""
        self._sock.settimeout(limit_s)

    def alive(self) -> bool:
        """Whether it can be used again: the server has neither closed it nor said anything unasked."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def finish(self, moment_s: float) -> bool:
        """Whether it can be used again, after waiting at most so long for the end of the answer."""
        try:
            if not self.complete:
                self.wait(moment_s)
                self._receive()
        except OSError:
            return False
        return self.complete and self._reusable and not self.chunks

    def close(self) -> None:
        """Close it at once, also when another thread is reading."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class BadHttp(OSError):
    """What came is no answer."""


Key = tuple[str, str | None]


class Wires:
    """Kept-alive connections, by address and certificate."""

    def __init__(self, keep_alive_s: float) -> None:
        self._keep_alive_s = keep_alive_s
        self._lock = threading.RLock()  # a collection of garbage may close a forgotten transport anywhere
        self._idle: dict[Key, list[Wire]] = {}
        self._busy: weakref.WeakSet[Wire] = weakref.WeakSet()
        self._swept_at = 0.0
        self._closed = False

    def take(self, key: Key) -> Wire | None:
        """One that can be used again."""
        now = time.monotonic()
        while True:
            with self._lock:
                wires = self._idle.get(key)
                if not wires:
                    return None
                wire = wires.pop()
                self._busy.add(wire)
            if now - wire.idle_since < self._keep_alive_s and wire.alive():
                wire.fresh = False
                return wire
            self.drop(wire)

    def add(self, wire: Wire) -> None:
        """A new one is in use; raises OSError after `close`."""
        with self._lock:
            if not self._closed:
                self._busy.add(wire)
                return
        wire.close()
        raise ConnectionAbortedError("the transport is closed")

    def put(self, key: Key, wire: Wire) -> None:
        """It can be used again; those that nobody has used for long are closed."""
        wire.idle_since = now = time.monotonic()
        with self._lock:
            self._busy.discard(wire)
            old = [wire] if self._closed else []
            if not self._closed:
                self._idle.setdefault(key, []).append(wire)
                if now - self._swept_at > self._keep_alive_s:
                    self._swept_at = now
                    old = self._sweep(now)
        for one in old:
            one.close()

    def _sweep(self, now: float) -> list[Wire]:
        old = []
        for key, wires in list(self._idle.items()):
            old += [w for w in wires if now - w.idle_since >= self._keep_alive_s]
            kept = [w for w in wires if now - w.idle_since < self._keep_alive_s]
            if kept:
                self._idle[key] = kept
            else:
                del self._idle[key]
        return old

    def drop(self, wire: Wire) -> None:
        """It is of no more use."""
        with self._lock:
            self._busy.discard(wire)
        wire.close()

    def close(self) -> None:
        """Close all, also those in use."""
        with self._lock:
            self._closed = True
            wires = [*self._busy, *(w for wires in self._idle.values() for w in wires)]
            self._busy, self._idle = weakref.WeakSet(), {}
        for wire in wires:
            wire.close()
