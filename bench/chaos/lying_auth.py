"""The auth_server of a host that lies: the real one, which the host has changed in one way.

It runs on the instance in place of `remote.auth_server` (kinds_host.py), and gives real tokens, so that the
loadbalancers go on listening to what it says.
"""

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

STRANGERS = 150_000
"""Requests that nobody knows, in one report: 4 MB of JSON."""

FLOOD = 2_000
"""The same in a pushed one."""

SURROGATE = "\ud800 broken \x00\x1b[2J"
GIANT = 10**300


def _strange(count: int) -> list[str]:
    return [os.urandom(8).hex() for _ in range(count)]


def _events(news: Any, **lies: Any) -> dict[str, object]:
    from remote.events import events_told

    return {**events_told(news), **lies}


def _ended(output_tokens: object) -> Callable[[Any], dict[str, object]]:
    def told(news: Any) -> dict[str, object]:
        ids = [e.request_id for e in news.events] or _strange(3)
        return _events(
            news, ended=[{"id": i, "status": "finished", "output_tokens": output_tokens} for i in ids]
        )

    return told


def _nested(news: Any) -> dict[str, object]:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    return _events(news, started=deep)


REPORTS: Mapping[str, Callable[[Any], dict[str, object]]] = {
    "huge-load": lambda news: _events(news, started=_strange(STRANGERS), started_bytes=[1000] * STRANGERS),
    "strangers": lambda news: _events(news, started=_strange(FLOOD), started_bytes=[10_000] * FLOOD),
    "giant-numbers": _ended(GIANT),
    "negative-numbers": _ended(-5),
    "texts-for-numbers": lambda news: _events(news, seq="\ud800", missed="no"),
    "missed-for-ever": lambda news: _events(news, missed=True, seq=0),
    "number-of-the-future": lambda news: _events(news, seq=2**62),
    "nested": _nested,
    "surrogates": lambda news: _events(news, boot_id=SURROGATE, started=[SURROGATE]),
}
"""What reports say."""


def _main_with(change: Callable[[Any], None]) -> None:
    from remote import true_auth_server as true  # type: ignore[attr-defined]

    change(true)
    true.main()


def _with_report(told: Callable[[Any], dict[str, object]]) -> None:
    from remote import speaker

    speaker.events_told = told  # type: ignore[assignment,attr-defined]
    _main_with(lambda true: setattr(true, "events_told", told))


def _with_answer(answer: Callable[[], Any]) -> None:
    """Answer every call but GET /health so."""

    def change(true: Any) -> None:
        make = true.create_app

        def create_app(*args: Any, **options: Any) -> Any:
            app = make(*args, **options)
            app.before_request_funcs[None].insert(0, answer)
            return app

        true.create_app = create_app

    _main_with(change)


def _surrogate_error() -> Any:
    from flask import jsonify

    return jsonify(error=SURROGATE, message=1000 * SURROGATE), 500


def _redirect() -> Any:
    from flask import redirect

    return redirect("http://127.0.0.1:9/elsewhere", 307)


def _endless_body() -> Any:
    from flask import Response

    def body() -> Iterator[bytes]:
        yield json.dumps({"boot_id": ""}).encode()[:-2]
        while True:
            yield 65_536 * b"x"

    return Response(body(), mimetype="application/json")


ANSWERS: Mapping[str, Callable[[], Any]] = {
    "error-with-surrogates": _surrogate_error,
    "auth-redirects": _redirect,
    "endless-body": _endless_body,
}
"""What it answers in place of what was asked."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

PIECES: Mapping[str, tuple[bytes, bytes, float]] = {
    "endless-headers": (HEAD, 64 * b"X-More: " + 4000 * b"x" + b"\r\n", 0.0),
    "endless-interim": (b"", 64 * b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "slow-head": (HEAD, b"X-More: x\r\n", 0.5),
    "no-http": (b"\x16\x03\x01 garbage\r\n", b"\x00\xff", 1.0),
}
"""What it says byte by byte: first, then again and again, with a pause."""


def _serve_raw(name: str, port_name: str, home: str) -> None:
    first, again, pause_s = PIECES[name]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(home, "tls.crt"), os.path.join(home, "tls.key"))
    address = os.environ.get("FLEET_BIND", "127.0.0.1"), int(os.environ[port_name])

    def talk(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as tls:
                tls.recv(65_536)
                tls.sendall(first)
                while True:
                    tls.sendall(again)
                    time.sleep(pause_s or 0.005)  # else the liar alone takes a core of this machine
        except OSError:
            return

    with socket.create_server(address) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=talk, args=(connection,), daemon=True).start()


def _flood_ready() -> None:
    """Say that the model is ready twenty times a second, each time with another sentence."""
    from remote import speaker

    begin = speaker.Speaker.begin

    def flood(self: Any, ready_url: str, *, again: bool) -> None:
        begin(self, ready_url, again=again)
        line = speaker._Line(ready_url)
        number = 0
        while True:
            number += 1
            self._post(line, {"state": "ready", "why": f"{number} times"})
            time.sleep(0.05)

    def in_thread(self: Any, ready_url: str, *, again: bool) -> None:
        threading.Thread(target=flood, args=(self, ready_url), kwargs={"again": again}, daemon=True).start()

    with patch.object(speaker.Speaker, "begin", in_thread):
        _main_with(lambda _: None)


LIES = (*REPORTS, *ANSWERS, *PIECES, "ready-flood")


def main(lie: str) -> None:
    """Serve, and lie so."""
    if lie in REPORTS:
        _with_report(REPORTS[lie])
    elif lie in ANSWERS:
        _with_answer(ANSWERS[lie])
    elif lie in PIECES:
        _serve_raw(lie, "FLEET_PORT_3000", os.path.expanduser("~/fleet"))
    else:
        _flood_ready()
