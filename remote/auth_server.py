"""The auth_server of an instance: gives tokens and load reports to whoever has the master token.

    POST /tokens   {"count": n}   fresh single-use tokens, and the load at that moment;
                   "report_to": URL   where to send reports from now on (speaker.py)
    GET  /load?after=SEQ          events since that number, and how busy the model server is
    GET  /health                  200, and nothing else

The master token itself is not on the machine: its SHA-256 is, and what is sent is hashed and compared.
Everything travels under TLS, with the machine's certificate; uvicorn, which vLLM brings, serves it.
"""

import hashlib
import hmac
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from remote.events import Events, News, events_told
from remote.model_load import ModelLoad
from remote.tokens import LIFE_S, Issuer, TooMany

MAX_BODY = 65_536
MOST_TOKENS = 2_000

_END_S = 0.5
"""It may take so long to see that it shall end; the supervisor waits for 8 s."""

_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,255}(/[A-Za-z0-9._~/-]{0,255})?")


def _error(status: int, code: str, message: str) -> tuple[Response, int]:
    return jsonify(error=code, message=message), status


def create_app(
    master_sha256: str,
    boot_id: str,
    issuer: Issuer,
    ring: Events,
    model_load: Callable[[], ModelLoad],
    clock: Callable[[], float] = time.monotonic,
    listen: Callable[[str], None] = lambda _: None,
) -> Flask:
    """The three routes. model_load: how busy the model server is; clock: monotonic seconds.

    listen: reports are to be sent to that URL.
    """
    app = Flask("auth_server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    issuing = threading.Lock()

    def is_master() -> bool:
        header = request.headers.get("Authorization", "")
        if header[:7].lower() != "bearer ":
            return False
        given = hashlib.sha256(header[7:].encode("utf-8", "replace")).hexdigest()
        return hmac.compare_digest(given, master_sha256)

    @app.before_request
    def check_caller() -> tuple[Response, int] | None:
        """Everything but /health, unknown paths too, is for the master token only."""
        if request.path == "/health" or is_master():
            return None
        return _error(401, "unauthorized", "the master token is needed")

    @app.errorhandler(HTTPException)
    def http_error(e: HTTPException) -> tuple[Response, int]:
        return _error(e.code or 500, e.name.lower().replace(" ", "_"), e.description or e.name)

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok")

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

    @app.post("/tokens")
    def tokens() -> tuple[Response, int]:
        said = request.get_json(force=True, silent=True)
        if not isinstance(said, dict):
            return _error(400, "bad_request", "count: wanted a JSON object with it")
        count = said.get("count")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_TOKENS:
            return _error(400, "bad_request", f"count: wanted a whole number from 1 to {MOST_TOKENS}")
        report_to = said.get("report_to")
        if report_to is not None and not (isinstance(report_to, str) and _URL.fullmatch(report_to)):
            return _error(400, "bad_request", "report_to: wanted http://… or https://…")
        try:
            with issuing:
                made = issuer.issue(count, clock())
        except TooMany as e:
            return _error(429, "too_many_tokens", str(e))
        if report_to is not None:
            listen(report_to)
        return jsonify(
            tokens=made,
            boot_id=boot_id,
            expires_at=round(time.time() + LIFE_S, 3),
            expires_in_s=LIFE_S,
            load=report(News(ring.newest(), False, ())),
        ), 200

    @app.get("/load")
    def load() -> tuple[Response, int]:
        after = request.args.get("after", "0")
        if not re.fullmatch(r"\d{1,16}", after):
            return _error(400, "bad_request", "after: wanted the number of an event")
        return jsonify(report(ring.after(int(after)))), 200

    return app


# --- outside world ---------------------------------------------------------------------------------


def main() -> None:
    """Serve until SIGTERM; what it needs is in the home directory and the environment (supervise.py)."""
    import asyncio

    import uvicorn
    from a2wsgi import WSGIMiddleware

    from remote.model_load import ModelServer
    from remote.speaker import Speaker, Watch

    fleet = os.path.expanduser("~/fleet")
    boot = os.path.join(fleet, "boot")

    def text(*path: str) -> str:
        with open(os.path.join(*path)) as f:
            return f.read().strip()

    class Server(uvicorn.Server):
        """uvicorn looks ten times a second whether it shall end, and at the time for a header Date."""

        async def main_loop(self) -> None:
            """Part of uvicorn.Server: return when it shall end."""
            while not self.should_exit:
                await asyncio.sleep(_END_S)

    certificate, key = os.path.join(fleet, "tls.crt"), os.path.join(fleet, "tls.key")
    model = ModelServer(
        int(os.environ.get("FLEET_PORT_8000", "8000")), text(boot, "local.key"), certificate, time.monotonic
    )
    ring, digest, boot_id = Events(boot), text(fleet, "master.sha256"), text(boot, "boot_id")
    watch = Watch(os.path.join(fleet, "model.log"), ring, lambda: model.load(0.0).model_up)
    speaker = Speaker(watch, ring, digest, boot_id)
    app = create_app(digest, boot_id, Issuer(boot, time.monotonic()), ring, model.load, listen=speaker.listen)
    bind = os.environ.get("FLEET_BIND", "0.0.0.0")  # noqa: S104 the port is mapped to the outside by the host
    port = int(os.environ.get("FLEET_PORT_3000", "3000"))
    print(f"auth_server on {bind}:{port}", flush=True)
    started = os.path.join(boot, "auth_started")
    speaker.begin(os.environ.get("FLEET_READY_URL", ""), again=os.path.exists(started))
    with open(started, "w"):
        pass
    config = uvicorn.Config(
        WSGIMiddleware(app, workers=4),  # type: ignore[arg-type]
        host=bind,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        limit_concurrency=1000,
        timeout_keep_alive=120,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
    )
    Server(config).run()


if __name__ == "__main__":
    main()
