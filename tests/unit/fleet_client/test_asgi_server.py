"""One event loop accepts clients, keeps background tasks running and ends cleanly."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import jsonify

from fleet_client import asgi_server
from fleet_client.asgi_server import AsgiServer
from fleet_client.listening import bind_socket
from tests.paths import ROOT
from tests.web_server import call, client_of, served, wait_until
from web.app import make_app
from web.bridge import FlaskBridge


def test_everybody_is_let_in_before_anybody_has_had_many_answers() -> None:
    """A hundred clients that ask again as soon as they are answered, all connected before the server runs."""
    request = b"GET /work HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answers = [0] * 100
    app = make_app("working")

    @app.get("/work")
    def work() -> Any:
        time.sleep(0.002)  # on the loop: a turn in which many are answered takes long
        return jsonify()

    async def client(n: int, port: int, connected: asyncio.Barrier) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await connected.wait()
        while min(answers) == 0:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
            answers[n] += 1
        writer.close()
        await writer.wait_closed()

    async def all_of_them(port: int, start: Callable[[], None]) -> None:
        connected = asyncio.Barrier(len(answers) + 1)
        clients = [asyncio.create_task(client(n, port, connected)) for n in range(len(answers))]
        await connected.wait()
        start()
        await asyncio.gather(*clients)

    sock = bind_socket("127.0.0.1", 0)
    bridge = FlaskBridge(app)
    server = AsgiServer(bridge, sock)
    thread = threading.Thread(target=server.run)
    try:
        asyncio.run(asyncio.wait_for(all_of_them(sock.getsockname()[1], thread.start), 60.0))
    finally:
        server.stop()
        thread.join(timeout=10.0)
    assert max(answers) <= 20


def test_a_background_task_that_crashes_is_logged_and_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asgi_server, "RESTART_PAUSE_S", 0.01)
    starts: list[int] = []
    ended: list[int] = []

    async def shaky() -> None:
        starts.append(1)
        if len(starts) < 3:
            raise RuntimeError("it broke")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    with caplog.at_level(logging.ERROR), served(make_app("calm"), background=[shaky]) as port:
        wait_until(lambda: len(starts) == 3, "the third start")
        assert call(port, "GET", "/nowhere")[0] == 404
    assert ended == [1]
    assert caplog.text.count("background task shaky failed") == 2
    assert "it broke" in caplog.text


SCRIPT = """
import asyncio, sys
from fleet_client import flags
from fleet_client.listening import bind_socket
from web.answers import JsonAnswer
from web.app import make_app
from web.bridge import serve_flask
from msgspec import Struct
from web.direct import DirectRoutes, Held
app = make_app("script")

@DirectRoutes(app).post("/wait", Struct, lambda: ())
def wait(said, client):
    print("parked", flush=True)
    return Held(600.0, lambda: JsonAnswer({}), lambda: print("gave up", flush=True))

async def background():
    try:
        await asyncio.Event().wait()
    finally:
        print("background ended", flush=True)

def main():
    sock = bind_socket("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    try:
        serve_flask(app, sock, background=[background])
    finally:
        print("cleaned up", flush=True)

flags.run_main(main)
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-c"])
def test_a_signal_ends_the_process_cleanly(sig: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline())
        with client_of(port) as client:
            assert process.stdout.readline() == "parked\n"
            process.send_signal(sig)
            assert client.getresponse().status == 503
        said, complaints = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=10.0) == 0
    assert said.splitlines() == ["gave up", "background ended", "cleaned up"]
    assert complaints == ""


def test_what_uvloop_says_of_a_connection_that_was_closed_meanwhile_is_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`make chaos` found it where an instance's connection was aborted in the middle of a read."""
    closed = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
    loop = asyncio.new_event_loop()
    try:
        asgi_server.tell_loop_error(
            loop, {"message": "Fatal error on SSL protocol", "exception": closed, "transport": None}
        )
        assert not [r for r in caplog.records if r.levelno > logging.DEBUG]
        asgi_server.tell_loop_error(loop, {"message": "something else", "exception": RuntimeError("x")})
        assert [r.exc_info is not None for r in caplog.records if r.levelno > logging.DEBUG] == [True]
    finally:
        loop.close()
