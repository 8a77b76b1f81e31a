"""The auth_server of an instance: gives tokens and load reports to whoever has the master token.

    POST /tokens   {"count": n}   fresh single-use tokens, and the load at that moment;
                   "report_to": URL   where to send reports from now on (speaker.py)
    GET  /load?after=SEQ          events since that number, and how busy the model server is
    GET  /health                  200, and nothing else

The master token itself is not on the machine: its SHA-256 is, and what is sent is hashed and compared.
Everything travels under TLS, with the machine's certificate; uvicorn, which vLLM brings, serves it.
"""

import asyncio
import hashlib
import hmac
import json
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs

from remote.events import Events, News, events_told
from remote.model_load import ModelLoad
from remote.tokens import LIFE_S, Issuer, TooMany

MAX_BODY = 65_536
MOST_TOKENS = 2_000

_MOST_NEW = 99
"""Connections of which the first request has not come: strangers can open many."""

_THREADS = 4
"""Requests that are answered at a time: one may wait for the model server's figures."""

_END_S = 0.5
"""It may take so long to see that it shall end; the supervisor waits for 8 s."""

_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,255}(/[A-Za-z0-9._~/-]{0,255})?")

_METHODS = {"/health": "GET", "/load": "GET", "/tokens": "POST"}

_Answer = tuple[int, dict[str, Any]]
_Receive = Callable[[], Awaitable[Mapping[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


def _error(status: int, code: str, message: str) -> _Answer:
    return status, {"error": code, "message": message}


def first_certificate(pem: str) -> str:
    """Return the first certificate of a file, the machine's: after it come those of its authority."""
    begin, end = (f"-----{what} CERTIFICATE-----" for what in ("BEGIN", "END"))
    inside = pem.partition(begin)[2].partition(end)[0]
    return f"{begin}{inside}{end}\n".replace("\r", "")


def create_app(
    master_sha256: str,
    boot_id: str,
    issuer: Issuer,
    ring: Events,
    model_load: Callable[[], ModelLoad],
    clock: Callable[[], float] = time.monotonic,
    listen: Callable[[str], None] = lambda _: None,
) -> Callable[[Mapping[str, Any], _Receive, _Send], Awaitable[None]]:
    """Make the auth_server's three routes as an ASGI app, which needs nothing but what vLLM brings.

    model_load: returns how busy the model server is. clock: monotonic seconds. listen: called with the URL to
    which reports are to be sent from now on.
    """
    issuing = threading.Lock()
    threads = ThreadPoolExecutor(_THREADS)

    def is_master(header: bytes) -> bool:
        given = hashlib.sha256(header[7:]).hexdigest()
        return header[:7].lower() == b"bearer " and hmac.compare_digest(given, master_sha256)

    def report(news: News) -> dict[str, Any]:
        load = model_load()
        return {
            "boot_id": boot_id,
            **events_told(news),
            "running": load.running,
            "waiting": load.waiting,
            "kv_use": load.kv_use,
            "model_up": load.model_up,
            "prompt_tokens_total": load.prompt_tokens_total,
            "generation_tokens_total": load.generation_tokens_total,
            "tokens_s": round(load.tokens_s, 1),
        }

    def tokens(body: bytes) -> _Answer:
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            said = None
        count = said.get("count") if isinstance(said, dict) else None
        if type(count) is not int or not 1 <= count <= MOST_TOKENS:
            return _error(400, "bad_request", f"count: wanted a whole number from 1 to {MOST_TOKENS}")
        report_to = said.get("report_to")
        if report_to is not None and not _URL.fullmatch(str(report_to)):
            return _error(400, "bad_request", "report_to: wanted http://… or https://…")
        try:
            with issuing:
                made = issuer.issue(count, clock())
        except TooMany as e:
            return _error(429, "too_many_tokens", str(e))
        if report_to is not None:
            listen(report_to)
        return 200, {
            "tokens": made,
            "boot_id": boot_id,
            "expires_at": round(time.time() + LIFE_S, 3),
            "expires_in_s": LIFE_S,
            "load": report(News(ring.newest(), False, ())),
        }

    def load(query: str) -> _Answer:
        after = parse_qs(query, keep_blank_values=True).get("after", ["0"])[0]
        if not re.fullmatch(r"\d{1,16}", after):
            return _error(400, "bad_request", "after: wanted the number of an event")
        return 200, report(ring.after(int(after)))

    async def answer(scope: Mapping[str, Any], receive: _Receive) -> _Answer:
        path, method = scope["path"], scope["method"]
        if path == "/health" and method == "GET":
            return 200, {"status": "ok"}
        # Everything else, unknown paths too, is for the master token only; no body is read before.
        if not is_master(dict(scope["headers"]).get(b"authorization", b"")):
            return _error(401, "unauthorized", "the master token is needed")
        if path not in _METHODS:
            return _error(404, "not_found", "no such path")
        if method != _METHODS[path]:
            return _error(405, "method_not_allowed", f"wanted {_METHODS[path]}")
        body, more = b"", True
        while more:
            part = await receive()
            body += part.get("body", b"")
            more = part.get("more_body", False)
            if len(body) > MAX_BODY:
                return _error(413, "too_large", f"at most {MAX_BODY} bytes")
        return await asyncio.get_running_loop().run_in_executor(
            threads, lambda: load(scope["query_string"].decode()) if path == "/load" else tokens(body)
        )

    async def app(scope: Mapping[str, Any], receive: _Receive, send: _Send) -> None:
        status, said = await answer(scope, receive)
        body = json.dumps(said).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 401 or scope["path"] == "/health":  # strangers keep no connection
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


# --- outside world ---------------------------------------------------------------------------------


def _http() -> Any:
    """Return uvicorn's class of HTTP connections, with a bound on those that have sent no request yet."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Http(H11Protocol):
        """A connection by h11, which bounds a head (64 KiB) and reads requests that offer HTTP/2."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Begin a connection, and end the oldest new one without a request if there are too many."""
            super().connection_made(transport)
            new.append(self)
            if len(new) > _MOST_NEW:
                old = new.pop(0)
                if not old.cycle:
                    old.transport.abort()

    new: list[Http] = []
    return Http


def main() -> None:
    """Run the auth_server until SIGTERM, with what is in the home directory and the environment.

    supervise.py puts it there.
    """
    import uvicorn

    from remote.disk import Disk
    from remote.model_load import ModelServer
    from remote.speaker import Speaker, Watch

    fleet = os.path.expanduser("~/fleet")
    boot = os.path.join(fleet, "boot")

    def text(*path: str) -> str:
        with open(os.path.join(*path)) as f:
            return f.read().strip()

    class Server(uvicorn.Server):
        """A uvicorn server that looks rarely whether it shall end; its own looks ten times a second."""

        async def main_loop(self) -> None:
            """Return when the server shall end; uvicorn.Server calls this."""
            while not self.should_exit:
                await asyncio.sleep(_END_S)

    certificate, key = os.path.join(fleet, "tls.crt"), os.path.join(fleet, "tls.key")
    model = ModelServer(
        int(os.environ.get("FLEET_PORT_8000", "8000")), text(boot, "local.key"), certificate, time.monotonic
    )
    ring, digest, boot_id = Events(boot), text(fleet, "master.sha256"), text(boot, "boot_id")
    disk = Disk(fleet, os.environ.get("FLEET_MODEL_KEY", ""))
    log = os.path.join(fleet, "model.log")
    watch = Watch(log, ring, lambda: model.load(0.0).model_up, disk.note_complete)
    speaker = Speaker(watch, ring, digest, boot_id, first_certificate(text(certificate)))
    app = create_app(digest, boot_id, Issuer(boot, time.monotonic()), ring, model.load, listen=speaker.listen)
    bind = os.environ.get("FLEET_BIND", "0.0.0.0")  # noqa: S104 the port is mapped to the outside by the host
    port = int(os.environ.get("FLEET_PORT_3000", "3000"))
    print(f"auth_server on {bind}:{port}", flush=True)
    started = os.path.join(boot, "auth_started")
    speaker.begin(os.environ.get("FLEET_READY_URL", ""), again=os.path.exists(started))
    with open(started, "w"):
        pass
    config = uvicorn.Config(
        app,
        host=bind,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        http=_http(),
        timeout_keep_alive=120,
        log_level="error",
        ws="none",
    )
    Server(config).run()


if __name__ == "__main__":
    main()
