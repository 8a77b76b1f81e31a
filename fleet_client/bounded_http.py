"""HTTP/1.1 as all our servers read it: uvicorn's, with a bound on what a client can make it keep.

head, trailer        MAX_HEAD bytes and MAX_HEADERS headers      431, and the connection is closed
time for a head      HEAD_S, also for the first byte             closed
time for a body      BODY_RATE over each BODY_S                  closed
a body not wanted    MAX_DRAINED bytes of it are dropped,        then closed
                     after the first DRAINED_AT_ONCE slowly
an answer            read by its client for WRITE_S              closed
pipelined requests   MAX_PIPELINED wait for the one in work      the rest is not read, then closed
Upgrade              ignored, as RFC 9110 7.8 allows             the request is served in HTTP/1.1
"""

import asyncio
import json
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleet_client.connection_table import Seat

MAX_HEAD = 65_536
"""Bytes of a request's line and headers together, or of a trailer; browsers and proxies send under 16 KiB."""

MAX_HEADERS = 128
"""Headers of a request, those of a trailer included; what aiohttp takes in an answer, too."""

HEAD_S = 10.0
"""Seconds in which a head must have come, and the first byte of a new connection."""

BODY_S = 10.0
"""Seconds after which it is looked how much of a body has come."""

BODY_RATE = 1000.0
"""Bytes a second of a body, at least, while it is waited for: the slowest of modems."""

MAX_DRAINED = 64 * 2**20
"""Bytes of a body that come after its answer and are dropped: then a client that still sends reads it."""

DRAINED_AT_ONCE, DRAIN_RATE = 2**18, 2.0**20
"""Of these the bytes that are dropped as they come, and bytes a second of those after them: 20 clients that
sent 32 MiB each to a route whose key they had not took half of the loop's time (2026-11)."""

WRITE_S = 120.0
"""Seconds in which a client must take something of its answer."""

MAX_PIPELINED = 16
"""Requests that wait on a connection for the one before. One packet can hold thousands, of some kB each."""

_OF_THE_UPGRADE = frozenset((b"connection", b"upgrade", b"http2-settings"))

_TOO_LARGE_BODY = json.dumps(
    {"error": "headers_too_large", "message": f"a head may have {MAX_HEAD} bytes and {MAX_HEADERS} headers"}
).encode()
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TOO_LARGE_BODY), _TOO_LARGE_BODY)
)


class _OverBound(Exception):
    """A client sends more than a server keeps for one connection."""


class Corked:
    """A transport that collects all that is written in one turn of the loop and sends it in one piece.

    uvicorn writes head and body apart, which wakes the client twice; on a virtual machine, where waking
    another core is slow, that was a quarter of an answer's time (measured 2026-11).
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        """Send what is written to that transport."""
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        """Return all other attributes of the transport."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Keep the bytes, and send them at the end of this turn of the loop."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        """Send what was written, then close the transport."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            if not self._transport.is_closing():  # its client may have reset it in this turn
                self._transport.write(b"".join(waiting))


class BoundedHttp(HttpToolsProtocol):
    """The HTTP protocol of one connection: uvicorn's, with writes collected, within this module's bounds."""

    def __init__(self, seat: Seat, **more: Any) -> None:
        """Serve one connection. seat: its place in the ConnectionTable; more: uvicorn's arguments."""
        super().__init__(**more)
        self._seat = seat
        self._begun = False  # a byte of a request has come, and not its end
        self._in_head = True
        self._head_size = 0  # bytes of complete headers, and of a trailer's
        self._calls = 0  # of the parser: it keeps no more than what came since the last one
        self._unparsed = 0
        self._deaf = False  # what comes is not read any more
        self._upgrading = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._body_timer: asyncio.TimerHandle | None = None
        self._body_came = 0  # bytes since the timer was set
        self._drained = 0
        self._drain_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to serve the connection; its first head must come within HEAD_S from now on."""
        super().connection_made(cast(asyncio.Transport, Corked(transport)))
        self._seat.closes(transport.abort)
        self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up: the connection has ended."""
        self._seat.leave()
        self._stop_head_timer()
        for timer in (self._body_timer, self._drain_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that came; refuse the client where they exceed a bound."""
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        calls = self._calls
        try:
            self._feed(data)
            self._unparsed = 0 if self._calls != calls else self._unparsed + len(data)
        except httptools.HttpParserError as e:
            self._refuse(too_large=isinstance(e.__context__, _OverBound))
        else:
            if self._unparsed > MAX_HEAD:
                self._refuse(too_large=True)
            elif self._begun or self._unparsed or self._head_timer is not None or self._is_answered:
                self._set_timers()

    def _set_timers(self) -> None:
        """Limit the time for what has to come: the rest of a head or of a body, or the next request."""
        if self._in_head and not self._between_requests:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)
            return
        self._stop_head_timer()
        if self._in_body:
            if self._body_timer is None:
                self._time_body()
        elif self.cycle is not None and self.cycle.response_complete and self.timeout_keep_alive_task is None:
            # What came was the rest of a body whose request has been answered.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @property
    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _between_requests(self) -> bool:
        return not self._begun and self._unparsed == 0

    def _feed(self, data: bytes) -> None:
        """Parse bytes; a request that offers another protocol is parsed again as one that does not."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as e:
                if not self._upgrading:  # CONNECT, which is no request to us
                    raise httptools.HttpParserError("no upgrade") from None
                data = self._plain_head() + data[e.args[0] :]
                self._upgrading = False
                self.parser = httptools.HttpRequestParser(self)
            else:
                return

    def _plain_head(self) -> bytes:
        """Return the head that was just parsed, without its offer of another protocol (Upgrade)."""
        kept = [b"%b: %b\r\n" % one for one in self.headers if one[0] not in _OF_THE_UPGRADE]
        method = self.parser.get_method()
        return b"".join((b"%b %b HTTP/1.1\r\n" % (method, self.url), *kept, b"\r\n"))

    # -- what httptools calls

    def on_message_begin(self) -> None:
        """Begin a request; refuse it when MAX_PIPELINED wait already. The parser calls this."""
        self._calls += 1
        if len(self.pipeline) >= MAX_PIPELINED:
            self._deaf = True
            raise _OverBound
        self._begun, self._in_head, self._head_size = True, True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add a piece of the request line's URL. The parser calls this."""
        self._calls += 1
        self._head_size += len(url)
        if self._head_size > MAX_HEAD:
            raise _OverBound
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, also of a trailer. The parser calls this."""
        self._calls += 1
        self._head_size += len(name) + len(value) + 4
        if self._head_size > MAX_HEAD or len(self.headers) >= MAX_HEADERS:
            raise _OverBound
        # What uvicorn does; calling it for each header took 1 % of a request.
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin to answer the request, whose head is complete. The parser calls this."""
        self._calls += 1
        if self.parser.should_upgrade():
            self._upgrading = self.parser.get_method() != b"CONNECT"
            return
        self._in_head, self._in_body = False, True
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Add a piece of the body, or drop it when its request has been answered. The parser calls this."""
        self._calls += 1
        self._body_came += len(body)
        if self.cycle.response_complete:
            self._drained += len(body)
            if self._drained > MAX_DRAINED:
                raise _OverBound
            if self._drained > DRAINED_AT_ONCE and self._drain_timer is None:
                self.flow.pause_reading()
                self._drain_timer = self.loop.call_later(len(body) / DRAIN_RATE, self._drain_on)
        else:
            super().on_body(body)

    def _drain_on(self) -> None:
        self._drain_timer = None
        self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """Note that the request has been received whole. The parser calls this."""
        self._calls += 1
        if self.parser.should_upgrade():  # it is parsed again
            return
        self._begun, self._in_head, self._in_body, self._drained = False, True, False, 0
        if not self.cycle.response_complete:
            self._seat.works()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on to the next request, because the answer has been sent."""
        if not self.pipeline:
            self._seat.rests()
        super().on_response_complete()

    # -- a client that does not read its answer

    def pause_writing(self) -> None:
        """Stop writing until the client takes something of its answer, for WRITE_S at most."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing, because the client has taken something of its answer."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # -- the end of what is too much

    def _refuse(self, *, too_large: bool) -> None:
        """Read no more of this client, and tell it why, where no answer is being sent on the connection."""
        self._stop_head_timer()
        waiting = self.pipeline[0][0] if self.pipeline else self.cycle
        if self._drained > MAX_DRAINED:
            self._deaf = True
            self.transport.abort()
        elif self._deaf and waiting is not None:
            waiting.keep_alive = False  # the last that is answered
        elif self.cycle is not None and not self.cycle.response_complete:
            self._deaf = True
            self.transport.abort()
        elif too_large:
            self._deaf = True
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        else:
            self._deaf = True
            self.send_400_response("Invalid HTTP request received.")

    def _time_body(self) -> None:
        self._body_came = 0
        self._body_timer = self.loop.call_later(BODY_S, self._look_at_body)

    def _look_at_body(self) -> None:
        """End the connection when too little of the body has come in BODY_S, though it was being read."""
        self._body_timer = None
        if self._in_body and not self.transport.is_closing():
            if self._body_came >= BODY_RATE * BODY_S or self.flow.read_paused:
                self._time_body()
            else:
                self.transport.abort()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
