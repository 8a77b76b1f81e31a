"""The auth_server of an instance: gives tokens and load reports to whoever has the master token.

    POST /tokens   {"count": n}   fresh single-use tokens, and the load at that moment
    GET  /load?after=SEQ          events since that number, and how busy the model server is
    GET  /health                  200, and nothing else

The master token itself is not on the machine: its SHA-256 is, and what is sent is hashed and compared.
"""

import hashlib
import hmac
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from remote.events import Events
from remote.model_load import ModelLoad
from remote.tokens import LIFE_S, Issuer, TooMany

MAX_BODY = 65_536
MOST_TOKENS = 2_000


def _error(status: int, code: str, message: str) -> tuple[Response, int]:
    return jsonify(error=code, message=message), status


def create_app(
    master_sha256: str,
    boot_id: str,
    issuer: Issuer,
    ring: Events,
    model_load: Callable[[], ModelLoad],
    clock: Callable[[], float] = time.monotonic,
) -> Flask:
    """The three routes. model_load: how busy the model server is; clock: monotonic seconds."""
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

    def report(seq: int, missed: bool, events: tuple[Any, ...]) -> dict[str, Any]:
        load = model_load()
        return {
            "boot_id": boot_id,
            "seq": seq,
            "missed": missed,
            "started": [e.request_id for e in events if e.kind == "started"],
            "ended": [
                {"id": e.request_id, "status": e.kind, "output_tokens": e.output_tokens}
                for e in events
                if e.kind != "started"
            ],
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
        count = said.get("count") if isinstance(said, dict) else None
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_TOKENS:
            return _error(400, "bad_request", f"count: wanted a whole number from 1 to {MOST_TOKENS}")
        try:
            with issuing:
                made = issuer.issue(count, clock())
        except TooMany as e:
            return _error(429, "too_many_tokens", str(e))
        return jsonify(
            tokens=made,
            boot_id=boot_id,
            expires_at=round(time.time() + LIFE_S, 3),
            expires_in_s=LIFE_S,
            load=report(ring.newest(), False, ()),
        ), 200

    @app.get("/load")
    def load() -> tuple[Response, int]:
        after = request.args.get("after", "0")
        if not re.fullmatch(r"\d{1,16}", after):
            return _error(400, "bad_request", "after: wanted the number of an event")
        news = ring.after(int(after))
        return jsonify(report(news.seq, news.missed, news.events)), 200

    return app


# --- outside world ---------------------------------------------------------------------------------


def main() -> None:
    """Serve until SIGTERM; what it needs is in the home directory and the environment (supervise.py)."""
    from waitress import serve  # type: ignore[import-untyped]

    from remote.model_load import ModelServer

    fleet = os.path.expanduser("~/fleet")
    boot = os.path.join(fleet, "boot")

    def text(*path: str) -> str:
        with open(os.path.join(*path)) as f:
            return f.read().strip()

    bind = os.environ.get("FLEET_BIND", "0.0.0.0")  # noqa: S104 the port is mapped to the outside by the host
    beside_us = "127.0.0.1"
    model = ModelServer(
        beside_us, int(os.environ.get("FLEET_PORT_8000", "8000")), text(boot, "local.key"), time.monotonic
    )
    app = create_app(
        text(fleet, "master.sha256"),
        text(boot, "boot_id"),
        Issuer(boot, time.monotonic()),
        Events(boot),
        model.load,
    )
    port = int(os.environ.get("FLEET_PORT_3000", "3000"))
    print(f"auth_server on {bind}:{port}", flush=True)
    # Else a line for each request that waits for a thread: whoever likes could fill the disk.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    serve(
        app,
        host=bind,
        port=port,
        threads=4,
        connection_limit=1000,  # 100 by default: then the next client would wait (servers.md)
        asyncore_use_poll=True,  # select() cannot have a descriptor above 1023
        max_request_body_size=2 * MAX_BODY,
        channel_timeout=120,
        ident=None,
        clear_untrusted_proxy_headers=True,
    )


if __name__ == "__main__":
    main()
