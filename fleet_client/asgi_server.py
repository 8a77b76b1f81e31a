"""Serve one ASGI application on one event loop, with background tasks beside it.

Requests and background tasks share one thread, the loop's: state that only they touch needs no lock.
"""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
import uvloop
from uvicorn.config import STARTUP_FAILURE

from fleet_client.allocator import give_large_blocks_back
from fleet_client.bounded_http import BoundedHttp
from fleet_client.connection_table import ConnectionTable, Seat
from fleet_client.listening import allow_many_files

if TYPE_CHECKING:  # it takes 5 MB of memory, and the paced engine serves without
    from fleet_client.own_tls import ServerTls

log = logging.getLogger("http")

KEEP_ALIVE_S = 120.0
"""Seconds an idle connection is kept: opening one costs a client more than an answer does."""

ACCEPT_AT_ONCE = 64
"""Connections accepted in one turn of the loop; each takes 0.1 ms, in which nothing is answered."""

HANDSHAKE_S = 10.0
"""Seconds for the handshake of TLS."""

FAREWELL_S = 5.0
"""Seconds that a client has to end TLS in order."""

COMPLAINT_S = 60.0
"""Seconds between two lines of the log that say that clients are refused."""

GRACE_S = 3.0
"""Seconds the server's end waits for answers that are still being made."""

FULL_COLLECTION_AFTER = 1000
"""Middle garbage collections before a full one; Python's default is 10, and at 2,500 requests/s there are 5 a
second. A full one visits all that a server remembers: at 100,000 leases 70 ms, each time they had grown by a
quarter, and it found nothing (2026-11). It is for cycles that have become old, which are few."""

RESTART_PAUSE_S = 1.0
"""Seconds before a crashed background task starts again: a lasting fault must not fill the disk with logs."""


Background = Callable[[], Awaitable[None]]


class AsgiApp(Protocol):
    """An ASGI application; all of it runs on the thread of the event loop."""

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""

    def close(self) -> None:
        """Answer every request that still waits, because the server ends."""


async def _keep_running(make: Background) -> None:
    """Run a background coroutine until it returns; log a crash and start the coroutine again."""
    name = getattr(make, "__name__", repr(make))
    while True:
        try:
            await make()
        except Exception:
            log.exception("background task %s failed; it starts again in %g s", name, RESTART_PAUSE_S)
        else:
            return
        await asyncio.sleep(RESTART_PAUSE_S)


class UvicornServer(uvicorn.Server):
    """A uvicorn that accepts many clients a turn, ends when told to, and lets its caller go on afterwards.

    It speaks HTTP within the bounds of bounded_http.py and connection_table.py.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_end: Callable[[], None] = lambda: None,
        *,
        break_off: bool = False,
        tls: "ServerTls | None" = None,
    ) -> None:
        """Make a server that does not listen yet. on_end: called when the server is told to end.

        break_off: cut the answers that are being made then; otherwise they have the graceful timeout of the
        config to end. tls: what the server shows, where that may change; else the config says it.
        """
        super().__init__(config)
        self._tls = tls
        self._on_end = on_end
        self._break_off = break_off
        self._connecting: set[asyncio.Future[Any]] = set()
        self._table = ConnectionTable(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._complain_at = float("-inf")
        self._told_to_end = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets once the application has started, and accept many clients a turn.

        uvloop's own server accepts one connection per turn of the loop, and a turn is all requests that are
        ready: of 1,000 busy clients 150 were still outside after 3 s (uvloop 0.23.0, measured 2026-11).
        """
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        self.servers = []
        scheme = "https" if self.config.ssl else "http"
        for sock in sockets or []:
            sock.listen(self.config.backlog)
            sock.setblocking(False)
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)
            # uvicorn says it only of sockets that it opened itself.
            logging.getLogger("uvicorn.error").info(
                "Uvicorn running on %s://%s:%d (Press CTRL+C to quit)", scheme, *sock.getsockname()[:2]
            )
        self.started = True

    async def main_loop(self) -> None:
        """Wait until told to end: uvicorn's own loop looks ten times a second, 0.2 % of a core (2026-11)."""
        await self.on_tick(0)  # sets the headers that every answer has; a date would stand still
        await self._told_to_end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, then do what uvicorn does at its end."""
        for sock in sockets or []:
            asyncio.get_running_loop().remove_reader(sock)
        if self._break_off:
            for connection in self.server_state.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await super().shutdown(sockets)

    def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, peer = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:  # no file descriptors left, because the process itself took so many
                ended = self._table.end_oldest()
                self._complain(f"a connection cannot be taken, the next try is in a second: {e.strerror}")
                loop.remove_reader(sock)
                loop.call_later(0.1 if ended else 1.0, self._accept_again, sock)
                return
            seat = self._table.admit(str(peer[0]), partial(_hang_up, connection))
            if seat is None:
                self._complain("a connection is refused: there are as many as may be, and all are in use")
                connection.close()
                continue
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            context = self.config.ssl if self._tls is None else self._tls.value
            limits = {} if context is None else _TLS_LIMITS
            accepted = loop.connect_accepted_socket(
                partial(self._protocol, seat), connection, ssl=context, **limits
            )
            task = loop.create_task(accepted)
            self._connecting.add(task)
            task.add_done_callback(partial(self._connected, seat))

    def _connected(self, seat: Seat, task: "asyncio.Future[Any]") -> None:
        self._connecting.discard(task)
        if task.cancelled() or task.exception() is not None:
            seat.leave()
            log.debug("a client went away while it was let in")

    def _complain(self, why: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAINT_S
            log.warning("%s (%d connections)", why, len(self._table))

    def _accept_again(self, sock: socket.socket) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _protocol(self, seat: Seat) -> asyncio.Protocol:
        return BoundedHttp(
            seat,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )

    def end(self) -> None:
        """Call on_end, then end the server; a second call does not wait for answers that are being made."""
        self._on_end()
        self.force_exit = self.should_exit
        self.should_exit = True
        self._told_to_end.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End the server on SIGTERM and Ctrl-C, in a callback of the loop.

        uvicorn's own handler runs between any two bytecodes, so also in the middle of a view, and raises the
        signal again at the end, so the process would die without the caller's clean-up.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for sig in signals:
            loop.add_signal_handler(sig, self.end)
        try:
            yield
        finally:
            for sig in signals:
                loop.remove_signal_handler(sig)


_TLS_LIMITS = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": FAREWELL_S}


def _hang_up(connection: socket.socket) -> None:
    """Shut down a connection whose protocol is not there yet; the loop, which owns it, then sees its end."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def tell_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error outside of all requests; one of uvloop that means nothing as one quiet line.

    A TLS connection that was aborted while its last bytes are read is written to once more (uvloop 0.23).
    """
    error = context.get("exception")
    if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
        log.debug("a connection was closed while it was read: %s", error)
    else:
        loop.default_exception_handler(context)


class AsgiServer:
    """Serves one application on one socket; `run` returns when SIGTERM, Ctrl-C or `stop` has ended it."""

    def __init__(
        self,
        app: AsgiApp,
        sock: socket.socket,
        background: Sequence[Background] = (),
        tls: "ServerTls | None" = None,
    ) -> None:
        """Start nothing yet.

        background: coroutine functions that run on the same loop as long as the server does. tls: the
        certificate that the server shows; None for plain HTTP.
        """
        self._app = app
        self._sock = sock
        self._background = background if tls is None else [*background, tls.watch]
        self._tls = tls
        self._loop: asyncio.AbstractEventLoop | None = None
        self._uvicorn: UvicornServer | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Serve until the end, then close the socket. Outside the main thread only `stop` ends the server."""
        allow_many_files()
        give_large_blocks_back()
        gc.collect()
        gc.freeze()  # what is there now stays: full collections then look at 150,000 objects less, some 80 ms
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION_AFTER)
        config = uvicorn.Config(
            self._app,
            loop="uvloop",
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            timeout_graceful_shutdown=int(GRACE_S),
            backlog=4096,
        )
        # uvicorn logs each malformed request at WARNING; those are the clients' affair.
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        # uvicorn waits for connections to end: with clients parked that took over 12 s (measured 2026-11).
        self._uvicorn = UvicornServer(config, self._app.close, tls=self._tls)
        with self._sock, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run(self._uvicorn))

    def stop(self) -> None:
        """End the server; may be called from any thread."""
        self._stopped.set()
        if self._loop is not None and self._uvicorn is not None:
            self._loop.call_soon_threadsafe(self._uvicorn.end)

    async def _run(self, server: UvicornServer) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(tell_loop_error)
        if self._stopped.is_set():
            return
        tasks = [asyncio.create_task(_keep_running(make)) for make in self._background]
        try:
            await server.serve(sockets=[self._sock])
        finally:
            self._loop = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
