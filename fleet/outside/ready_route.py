"""`POST /ready`: what an instance says of itself, signed with a key that it shares with the autoscaler."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from flask import Flask, Response, jsonify, request

from fleet.instance_messages import Hearing
from fleet.outside.config import AutoscalerConfig
from fleet.outside.process import AutoscalerProcess
from fleet.outside.turns import Autoscaler
from fleet_client.asgi_server import AsgiServer
from fleet_client.listening import bind_socket
from fleet_client.loopback import is_loopback_host
from fleet_client.own_tls import server_tls
from fleet_client.tls_pins import pinned_context
from process.errors import ConfigError
from process.safe_text import safe_text
from web.answers import JsonAnswer, error, error_answer, response
from web.app import admits, make_app
from web.bridge import FlaskBridge
from web.messages.decoding import BadField, decode
from web.messages.reports import ReadyBody
from web.signatures import claimed_name, name_and_key, signer

log = logging.getLogger("autoscaler")

NOT_SIGNED = error_answer(401, "unauthorized", "wanted the signature of an instance of the fleet")


def add_ready(
    app: Flask, scaler: Autoscaler, master_token: Callable[[str], str], nudge: Callable[[], None]
) -> None:
    """Register POST /ready. nudge: called when a health check has become due."""

    def signers() -> dict[str, tuple[str, str]]:
        with scaler.lock:
            labels = [i.label for i in scaler.instances]
        found = [(label, *name_and_key(master_token(label))) for label in labels]
        return {name: (label, key) for label, name, key in found}

    def check_certificate(pem: str) -> None:
        try:
            if pem:
                pinned_context(pem)
        except ValueError as e:
            raise BadField("certificate", str(e)) from None

    def not_signed(authorization: str | None) -> JsonAnswer | None:
        name = claimed_name(authorization)
        return None if name is not None and name in signers() else NOT_SIGNED

    @app.post("/ready")
    @admits(not_signed)
    def ready() -> Response:
        known = signers()
        raw = request.get_data(cache=False)
        keys = {name: key for name, (_, key) in known.items()}
        name = signer(request.headers.get("Authorization"), "/ready", raw, keys)
        if name is None:
            return response(NOT_SIGNED)
        label = known[name][0]
        said = decode(raw, ReadyBody)
        check_certificate(said.certificate)
        hearing = scaler.record_message(label, said)
        if hearing is Hearing.TOO_MANY:
            return error(429, "too_many", "an instance may say something every two seconds")
        if hearing is Hearing.HEARD:
            return error(409, "heard_before", "this message, or one after it, was heard before")
        if hearing is Hearing.NEWS:
            log.info("%s says: %s", label, safe_text(f"{said.state}: {said.why or ''}"))
        nudge()
        return jsonify(label=label)


# --- outside world ---------------------------------------------------------------------------------


@contextlib.contextmanager
def hear_ready(process: AutoscalerProcess, config: AutoscalerConfig) -> Iterator[None]:
    """Take what instances say of themselves at POST /ready, on a thread of its own, for `prepare`.

    Without it a machine that lets nobody in by ssh could not be prepared. Only what an instance has signed is
    taken, so no key is wanted. Where the port is another program's, ssh has to do.
    """
    try:
        tls = server_tls(config.tls_cert, config.tls_key)
        sock = bind_socket(config.host, config.port)
    except ConfigError as e:
        log.warning("instances cannot say that they are ready: %s", e)
        yield
        return
    app = make_app("prepare")
    add_ready(app, process.scaler, process.keys.master_token, lambda: None)  # checks are due in a second
    with FlaskBridge(app, loopback=is_loopback_host(config.host)) as bridge:
        server = AsgiServer(bridge, sock, tls=tls)
        thread = threading.Thread(target=server.run, name="hear-ready", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.stop()
            thread.join()
