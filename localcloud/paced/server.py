"""Serving ASGI as vLLM does: its log lines, TLS, and answers that break off when the process ends."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from localcloud.paced.engine import App
from process.errors import ConfigError


class PacedServer(uvicorn.Server):
    """uvicorn that sleeps until it is told to end, and then waits for no answer.

    fleet_client/asgi_server.py does not fit: it has no lifespan, no TLS and none of uvicorn's log lines, of
    which vLLM's ready line is one, and it lets answers end.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            # uvicorn says it only of sockets that it opened itself.
            logging.getLogger("uvicorn.error").info(
                "Uvicorn running on http://%s:%d (Press CTRL+C to quit)", *sock.getsockname()[:2]
            )

    async def main_loop(self) -> None:
        """uvicorn's own wakes up ten times a second, to keep a date header that we do not send."""
        await self.on_tick(0)
        await self._told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Break the answers off, as a container's end does; that ends their work."""
        for connection in self.server_state.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM and Ctrl-C, as a callback of the loop."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._end)
        yield

    def _end(self) -> None:
        self.should_exit = True
        self._told.set()


def serve(app: App, sock: socket.socket, certfile: str | None = None, keyfile: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. Logs as uvicorn does, so that the ready line is the real one.

    certfile, keyfile: of TLS; without them plain HTTP.
    """
    config = uvicorn.Config(
        app,
        http=HttpToolsProtocol,
        loop="uvloop",
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        date_header=False,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
        timeout_graceful_shutdown=2,
        backlog=2048,
    )

    async def run() -> None:
        await PacedServer(config).serve(sockets=[sock])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address and does not listen yet; raise ConfigError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    return sock
