"""The fleet as a small server on a client's own machine, for programs that only take a base URL and a key.

python gateway.py [flags]        then http://127.0.0.1:8300/v1 is the base URL, and any text the key

    program ─► gateway ─► lease ─► instance ─► answer, passed on as it comes
                  └── all of fleet_client: leases, certificates, retries before the first byte

It runs where the prompts are, so they leave the machine under TLS only, to the instance itself. What passes
is not changed, but for the headers of a connection, the key and X-Fleet-Priority, which is for the
loadbalancer. When its client goes away the request ends at the instance at once. Which programs may use it is
decided in gateway_access.py.
"""

import asyncio
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from fleet_client.asgi_server import AsgiServer
from fleet_client.async_transport import AsyncAnswer, AsyncFleetTransport
from fleet_client.call import Call, Timeouts
from fleet_client.connection_pool import Header
from fleet_client.errors import ConfigError
from fleet_client.flags import Parser, add_flags, check_flags, flag, run_main, server_url
from fleet_client.gateway_access import preflight, readable_by, refusal, values_of
from fleet_client.gateway_metrics import GatewayMetrics
from fleet_client.leases import NORMAL, PRIORITIES
from fleet_client.listening import bind_socket, check_bind
from fleet_client.loopback import is_loopback_host
from fleet_client.network_trust import InTheClear, allow, clear_bind, clear_call
from fleet_client.options import LOADBALANCER
from fleet_client.own_tls import scheme, server_tls
from fleet_client.private_files import load_keys, load_one_key, load_salt
from fleet_client.reply import HttpReply, error_reply, json_reply
from fleet_client.retry import NoLoadbalancer
from fleet_client.service_manager import ServiceManager, set_up_logging
from fleet_client.trace_context import trace_id
from fleet_client.transport import MAX_BODY, too_large

log = logging.getLogger("gateway")

TIMEOUTS = Timeouts(read=600.0)
"""An instance that is silent for 600 s has died; openai's own limit."""


OK = json_reply(200, {"status": "ok"})

HEALTH_KEPT_S = 1.0
"""Seconds for which what GET /health says is good: it needs no key, and must not flood the loadbalancer."""

NO_KEY = error_reply(
    502,
    "loadbalancer_key",
    "the loadbalancer wants another key of this gateway than it has, or any: --client-key-file of the "
    "gateway, or FLEET_CLIENT_KEY. The key of this request has nothing to do with it",
)
"""What a program is told instead of a 401, which would be about its own key."""


@dataclass(frozen=True)
class GatewayConfig:
    """The settings of a gateway. Times in seconds."""

    host: str = flag("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = flag(8300, "port to listen on", least=1, most=65535)
    loadbalancer: str = flag(LOADBALANCER, "where the loadbalancer is", metavar="URL")
    loadbalancer_cert: Path | None = flag(
        None,
        "certificates that an https loadbalancer may show, PEM, and no others",
        shown="what this machine's authorities vouch for",
    )
    tls_cert: Path | None = flag(
        None, "certificate to show, PEM, with its chain if it has one; the server then speaks https only"
    )
    tls_key: Path | None = flag(None, "its key, PEM, mode 0600")
    trust_network: bool = flag(
        False,
        "speak plain HTTP beyond this machine, too: all who can listen there have prompts, answers and keys, "
        "and who can change what a loadbalancer says can read the prompts",
    )
    client_key_file: Path | None = flag(
        None,
        "file of our key for a loadbalancer that wants one, mode 0600",
        shown="FLEET_CLIENT_KEY, else none",
    )
    key_file: Path | None = flag(
        None, "file of keys that requests then want, one a line, mode 0600", shown="open on loopback"
    )
    ahead: int = flag(
        0, "leases fetched before they are needed, while requests come", least=0, most=256, unit="leases"
    )
    wait_s: float = flag(
        30.0, "seconds a request waits for a lease before it gets 503", least=0.0, most=600.0
    )
    max_tries: int = flag(4, "instances a request is tried on", least=1, most=32, unit="instances")
    priority: str = flag(NORMAL, "priority of requests without a header X-Fleet-Priority", choices=PRIORITIES)
    affinity_salt_file: Path | None = flag(
        None,
        "file of the salt of the hashes by which the loadbalancer sends a conversation where it was read "
        "before: one line of 16 or more characters, mode 0600, the same for all clients that are to profit "
        "from each other's prompts",
        shown="FLEET_AFFINITY_SALT, else a random one",
    )
    no_affinity: bool = flag(False, "tell the loadbalancer no hashes of prompts' beginnings")

    def checked(self) -> "GatewayConfig":
        """Return this configuration, or raise ConfigError naming the flag, the value and the range."""
        check_flags(self)
        server_url("--loadbalancer", self.loadbalancer)
        return self

    def in_the_clear(self) -> list[InTheClear]:
        """Return what goes over a network unencrypted with this configuration."""
        leases = "our key for it and the leases, by which prompts find their way,"
        return [
            *clear_bind(self.host, "prompts, answers and keys", encrypted=self.tls_cert is not None),
            *clear_call("--loadbalancer", self.loadbalancer, leases),
        ]


def failure_reply(error: httpx2.RequestError) -> HttpReply:
    """Return the answer that tells a program why no instance answered its request."""
    if isinstance(error, NoLoadbalancer):
        return error_reply(503, "loadbalancer_unreachable", str(error), retry_after_s=1.0)
    if isinstance(error, httpx2.LocalProtocolError):
        return error_reply(400, "bad_request", str(error))
    if isinstance(error, httpx2.TimeoutException):
        return error_reply(504, "instance_timeout", str(error))
    return error_reply(502, "instance_failed", str(error))


def model_card(said: str, created: int) -> dict[str, Any] | None:
    """Return a model as GET /v1/models lists it; None where the loadbalancer's answer names none.

    said: that answer. created: epoch seconds.
    """
    try:
        told = json.loads(said)
        name, most = str(told["model"]), told.get("max_model_len")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    card = {"id": name, "object": "model", "created": created, "owned_by": "fleet", "root": name}
    return card | {"parent": None, "max_model_len": most}


class Gateway:
    """The gateway as an ASGI application.

    Its transport is opened by the first request and closed by `leases`.
    """

    def __init__(self, transport: AsyncFleetTransport, keys: Collection[str], *, loopback: bool) -> None:
        """Pass requests to that transport. keys: each request must carry one of them, if there are any.

        loopback: whether the server listens on loopback and nowhere else.
        """
        self._transport = transport
        self._keys = keys
        self._loopback = loopback
        self._waiting: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._health_until = float("-inf")  # is known until then, on the monotonic clock
        self._health_said = OK
        self._started = int(time.time())
        self._metrics = GatewayMetrics()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one HTTP request, as ASGI wants it."""
        headers: Sequence[Header] = scope["headers"]
        method: str = scope["method"]
        reply = preflight(headers) if method == "OPTIONS" else None
        path = scope["path"]
        if reply is None:
            health = method == "GET" and path == "/health"
            reply = refusal(headers, () if health else self._keys, loopback=self._loopback)
        if reply is None and method == "GET":
            reply = await self._own(path, headers)
        origin = values_of(headers, b"origin")
        if reply is not None:
            await _send(send, reply, origin)
            return
        body = await _read(receive)
        if body is None:
            return
        if len(body) > MAX_BODY:
            await _send(send, too_large(), origin)
            return
        target = scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        await self._pass_on(method, target, headers, body, origin, receive, send)

    async def _own(self, path: str, headers: Sequence[Header]) -> HttpReply | None:
        """Return the answer to a request that needs no instance (health, models, metrics), or None."""
        if path == "/health":
            return await self._health()
        if path == "/metrics":
            return self._metrics.page(b",".join(values_of(headers, b"accept")).decode("latin-1"))
        return await self._models() if path == "/v1/models" else None

    async def _models(self) -> HttpReply | None:
        """Return the answer to GET /v1/models, also if nothing is hot; None: the loadbalancer is too old."""
        status, said = await self._transport.look("/model")
        if status == 200:
            card = model_card(said, self._started)
            if card is None:
                return error_reply(
                    502, "loadbalancer_unwell", "what answers there is no loadbalancer of ours"
                )
            return json_reply(200, {"object": "list", "data": [card]})
        if status == 401:
            return NO_KEY
        if status in (404, 405):
            return None
        return error_reply(503, "loadbalancer_unwell", said, retry_after_s=1.0)

    async def _health(self) -> HttpReply:
        """Return the answer to GET /health: whether requests can be served, as far as is known."""
        now = time.monotonic()
        if now >= self._health_until:
            why = await self._transport.why_unwell()
            self._health_until = now + HEALTH_KEPT_S
            self._health_said = OK if why is None else error_reply(503, "loadbalancer_unwell", why)
        return self._health_said

    async def _pass_on(
        self,
        method: str,
        target: str,
        headers: Sequence[Header],
        body: bytes,
        origin: Sequence[bytes],
        receive: Any,
        send: Any,
    ) -> None:
        gone = _DisconnectWatch(receive)
        answer: AsyncAnswer | None = None
        call: Call | HttpReply | None = None
        metrics, begun = self._metrics, time.monotonic()
        metrics.open.inc()
        try:
            try:
                call = self._transport.call(method, target, headers, body, TIMEOUTS)
                if isinstance(call, HttpReply):
                    reply = call
                else:
                    self._waiting.add(gone.task)
                    answer = await self._transport.exchange(call)
                    if answer.lease is None and answer.status == 401:
                        answer, reply = None, NO_KEY
            except httpx2.RequestError as e:
                log.warning("%s failed: %s", _named(method, target, call, answer), e)
                reply = failure_reply(e)
            finally:
                self._waiting.discard(gone.task)
            if answer is None:
                metrics.answered(reply.status)
                await _send(send, reply, origin)
                return
            metrics.first_byte.observe(time.monotonic() - begun)
            metrics.answered(answer.status)
            await send(_start(answer.status, readable_by(origin, answer.headers)))
            async for chunk in answer:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            gone.forget()
            await send({"type": "http.response.body", "body": b""})
        except httpx2.RequestError as e:
            # The connection ends without the end of the answer: the program sees that it broke off.
            metrics.broken.inc()
            log.warning("%s: %s", _named(method, target, call, answer), e)
        except asyncio.CancelledError:
            if self._closing and answer is None and not gone.happened:
                closing = error_reply(
                    503, "shutting_down", "the gateway is shutting down: ask again", retry_after_s=1.0
                )
                await _send(send, closing, origin)
            elif not gone.happened:
                raise
        finally:
            gone.forget()
            metrics.open.dec()
            for _, why in call.setbacks if isinstance(call, Call) else ():
                metrics.setback(why)
            if answer is not None:
                await answer.aclose()

    def close(self) -> None:
        """Answer 503 to all requests that have no answer yet, because the server ends."""
        self._closing = True
        for task in list(self._waiting):
            task.cancel()

    async def leases(self) -> None:
        """Run as long as the server does; then give back the leases that are left."""
        try:
            await asyncio.Event().wait()
        finally:
            await self._transport.aclose()


def _named(method: str, target: str, call: Call | HttpReply | None, answer: AsyncAnswer | None) -> str:
    """Return a request in words, for a log line: its ids, and nothing of what is asked."""
    trace = call.traceparent if isinstance(call, Call) else None
    lease = None if answer is None else answer.lease
    ids = (
        "" if lease is None else f" request {lease.request_id}",
        "" if trace is None else f" trace {trace_id(trace.encode())}",
    )
    return f"{method} {target.partition('?')[0][:100]}{''.join(ids)}"


class _DisconnectWatch:
    """Cancels the task that serves a request when the request's client goes away."""

    def __init__(self, receive: Any) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 a request is one
        self.task: asyncio.Task[Any] = task
        self.happened = False
        self._watch = asyncio.ensure_future(_disconnected(receive))
        self._watch.add_done_callback(self._cancel)

    def _cancel(self, watch: "asyncio.Future[None]") -> None:
        if not watch.cancelled():
            self.happened = True
            self.task.cancel()

    def forget(self) -> None:
        """Stop watching, because the answer is complete."""
        self._watch.remove_done_callback(self._cancel)
        self._watch.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Any) -> bytes | None:
    """Return a request's body, MAX_BODY + 1 bytes where it is longer; None when the client has gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size <= MAX_BODY:
            parts.append(message.get("body", b""))
        # What is too long is read on for a while: a client that is still sending would not see the answer.
        if not message.get("more_body") or size > 2 * MAX_BODY:
            return b"".join(parts) if size <= MAX_BODY else b"x" * (MAX_BODY + 1)


async def _send(send: Any, reply: HttpReply, origin: Sequence[bytes]) -> None:
    await send(_start(reply.status, readable_by(origin, reply.headers)))
    await send({"type": "http.response.body", "body": reply.body or b""})


def _start(status: int, headers: Sequence[Header]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def serve(config: GatewayConfig) -> None:
    """Run a gateway until SIGTERM or Ctrl-C; leases that were fetched ahead go back then."""
    config = config.checked()
    keys = load_keys(config.key_file)
    check_bind(config.host, config.port, keys_present=bool(keys))
    allow(config.in_the_clear(), trust_network=config.trust_network)
    tls = server_tls(config.tls_cert, config.tls_key)
    client_key = None if config.client_key_file is None else load_one_key(config.client_key_file)
    salt = None if config.affinity_salt_file is None else load_salt(config.affinity_salt_file)
    try:
        transport = AsyncFleetTransport(
            config.loadbalancer,
            api_key=client_key,
            max_tries=config.max_tries,
            wait_s=config.wait_s,
            ahead=config.ahead,
            trust_network=config.trust_network,
            loadbalancer_cert=config.loadbalancer_cert,
            priority=config.priority,
            affinity=not config.no_affinity,
            affinity_salt=salt,
        )
    except ValueError as e:
        raise ConfigError(str(e)) from None
    sock = bind_socket(config.host, config.port)
    loopback = is_loopback_host(sock.getsockname()[0])
    # It says there that an answer was left incomplete, which is how a broken one is passed on.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    gateway = Gateway(transport, keys, loopback=loopback)
    log.info("gateway to %s on %s://%s:%d/v1", config.loadbalancer, scheme(tls), config.host, config.port)
    AsgiServer(gateway, sock, [gateway.leases, ServiceManager().keep_informed], tls).run()


def parser() -> Parser:
    """Return the parser of the gateway's flags."""
    # Called by the name it was started with: gateway.py, or fleet-gateway where it is installed.
    made = Parser(
        environment="FLEET_GATEWAY_",
        description=(__doc__ or "").split("\n")[0],
        epilog="Listening off loopback needs --key-file.",
    )
    add_flags(made, GatewayConfig)
    return made


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run the gateway."""
    args = parser().parse_args(argv)
    set_up_logging()
    serve(GatewayConfig(**vars(args)))


def run() -> None:
    """Run the command `fleet-gateway`; a wrong flag is one line of error and exit 2."""
    run_main(main)


if __name__ == "__main__":
    run()
