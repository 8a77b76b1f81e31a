"""Serves an ASGI app as vLLM does: its log lines, TLS, and answers that break off when the process ends."""

import asyncio
import socket

import uvicorn
import uvloop

from fleet_client.asgi_server import UvicornServer
from fleet_client.listening import allow_many_files
from localcloud.paced.engine import App


def serve(app: App, sock: socket.socket, certfile: str | None = None, keyfile: str | None = None) -> None:
    """Serve an ASGI app until SIGTERM or Ctrl-C; answers then break off, as when a container ends.

    Logs as uvicorn does, so that the ready line is the real one. certfile, keyfile: of TLS; without them
    plain HTTP.
    """
    allow_many_files()
    config = uvicorn.Config(
        app,
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
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(UvicornServer(config, break_off=True).serve(sockets=[sock]))
