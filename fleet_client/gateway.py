"""The fleet as a small server on a client's own machine, for programs that only take a base URL and a key.

python gateway.py [flags]        then http://127.0.0.1:8300/v1 is the base URL, and any text the key

    program ─► gateway ─► lease ─► instance ─► answer, passed on as it comes
                  └── all of fleet_client.py: leases, certificates, retries before the first byte

It runs where the prompts are, so they leave the machine under TLS only, to the instance itself. What passes
is not changed, but for the headers of a connection, the key and X-Fleet-Priority, which is for the
loadbalancer. When its client goes away the request ends at the instance at once.

On loopback it asks for no key, so it must tell the user's programs from pages in his browser, which can reach
loopback, too. A page cannot keep its browser from saying where it comes from:

    under a name of its own (DNS rebinding)      Host is not this machine          403
    from its own site, in a script or a form     Origin is not this machine        403
    from its own site, a picture or a link       Sec-Fetch-Site: cross-site        403

With keys (--key-file) the key is the proof, and none of this is looked at. Off loopback it wants keys.
"""

import argparse
import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from fleet_client import AsyncAnswer, AsyncFleetTransport, HttpReply, Timeouts, flags, private_files
from fleet_client.asgi_server import AsgiServer
from fleet_client.bearer import bearer_is
from fleet_client.connection_pool import Header
from fleet_client.errors import ConfigError
from fleet_client.flags import Parser, server_url, within
from fleet_client.leases import NORMAL, PRIORITIES
from fleet_client.listening import bind_socket, check_bind
from fleet_client.loopback import is_loopback_host, names_loopback
from fleet_client.reply import error_reply, json_reply
from fleet_client.transport import MAX_BODY

log = logging.getLogger("gateway")

READ_TIMEOUT_S = 600.0
"""An instance that is silent for so long has died; openai's own limit."""

CORS_AGE_S = 600
"""How long a browser may remember that a page of this machine may ask."""


@dataclass(frozen=True)
class Config:
    """Everything that may be set. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8300
    loadbalancer: str = "http://127.0.0.1:8200"
    trust_network: bool = False  # a loadbalancer in the clear, elsewhere than on loopback
    client_key_file: Path | None = None  # our key for the loadbalancer
    key_file: Path | None = None  # who may use the gateway
    ahead: int = 0  # leases fetched before they are needed
    wait_s: float = 30.0  # a request waits so long for a lease before it gets 503
    max_tries: int = 4  # instances
    priority: str = NORMAL  # of requests without X-Fleet-Priority
    no_affinity: bool = False  # tell no hashes of prompts' beginnings
    affinity_salt_file: Path | None = None  # the salt of the hashes, for several clients to share

    def checked(self) -> "Config":
        """Itself, or ConfigError naming the flag, the value and the range."""
        within("--port", self.port, 1, 65535)
        within("--ahead", self.ahead, 0, 256)
        within("--wait-s", self.wait_s, 0.0, 600.0)
        within("--max-tries", self.max_tries, 1, 32)
        if self.priority not in PRIORITIES:
            raise ConfigError(f"--priority {self.priority}: wanted high, normal or low")
        server_url("--loadbalancer", self.loadbalancer)
        return self


# -- who may ask ---------------------------------------------------------------------------------------


def refusal(headers: Sequence[Header], keys: Collection[str], *, loopback: bool) -> HttpReply | None:
    """Why a request is not served, or None. loopback: whether that is where the server listens."""
    if keys:
        # Given twice they are joined, so two Authorization headers match no key.
        given = b",".join(_values(headers, b"authorization"))
        if bearer_is(given.decode("latin-1"), keys):
            return None
        return error_reply(
            401,
            "invalid_api_key",
            "this gateway wants its own key: Authorization: Bearer <key>",
            headers=[(b"WWW-Authenticate", b"Bearer")],
        )
    if loopback:
        for host in _values(headers, b"host"):
            if not names_loopback(host):
                return error_reply(403, "wrong_host", f"Host: {_shown(host)} is not this machine")
    origins = _values(headers, b"origin")
    for origin in origins:
        if not from_loopback(origin):
            return error_reply(403, "wrong_origin", f"pages of {_shown(origin)} may not use this gateway")
    if not origins and b"cross-site" in [value.lower() for value in _values(headers, b"sec-fetch-site")]:
        return error_reply(403, "wrong_origin", "pages of other sites may not use this gateway")
    return None


def from_loopback(origin: bytes) -> bool:
    """Whether an Origin header names a server of this machine."""
    scheme, found, host = origin.partition(b"://")
    return bool(found) and scheme in (b"http", b"https") and names_loopback(host)


def _values(headers: Sequence[Header], name: bytes) -> list[bytes]:
    return [value for one, value in headers if one == name]


def _shown(value: bytes) -> str:
    return value[:100].decode("latin-1")


def preflight(headers: Sequence[Header]) -> HttpReply | None:
    """The answer to a browser that asks whether a page of this machine may ask; None for anything else."""
    origin = _values(headers, b"origin")
    method = _values(headers, b"access-control-request-method")
    if len(origin) != 1 or not method or not from_loopback(origin[0]):
        return None
    asked = b", ".join(_values(headers, b"access-control-request-headers"))
    allow = [
        (b"Access-Control-Allow-Origin", origin[0]),
        (b"Access-Control-Allow-Methods", method[0]),
        (b"Access-Control-Max-Age", b"%d" % CORS_AGE_S),
        (b"Vary", b"Origin"),
    ]
    return HttpReply(
        204, b"", allow + ([(b"Access-Control-Allow-Headers", asked)] if asked else []), body=b""
    )


def readable_by(origin: Sequence[bytes], headers: Sequence[Header]) -> Sequence[Header]:
    """The headers of an answer, with leave for a page of this machine to read it where none is given."""
    if len(origin) != 1 or any(name.lower() == b"access-control-allow-origin" for name, _ in headers):
        return headers
    return [*headers, (b"Access-Control-Allow-Origin", origin[0]), (b"Vary", b"Origin")]


def failure_reply(error: httpx2.RequestError) -> HttpReply:
    """What a program is told when no instance answered."""
    if isinstance(error, httpx2.LocalProtocolError):
        return error_reply(400, "bad_request", str(error))
    if isinstance(error, httpx2.TimeoutException):
        return error_reply(504, "instance_timeout", str(error))
    return error_reply(502, "instance_failed", str(error))


# --- outside world ---------------------------------------------------------------------------------


class Gateway:
    """The ASGI application. Its transport is opened by the first request and closed by `leases`."""

    def __init__(self, transport: AsyncFleetTransport, keys: Collection[str], *, loopback: bool) -> None:
        """loopback: whether it listens there and nowhere else."""
        self._transport = transport
        self._keys = keys
        self._loopback = loopback
        self._waiting: set[asyncio.Task[Any]] = set()
        self._closing = False

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        headers: Sequence[Header] = scope["headers"]
        method: str = scope["method"]
        reply = preflight(headers) if method == "OPTIONS" else None
        health = method == "GET" and scope["path"] == "/health"
        if reply is None:
            reply = refusal(headers, () if health else self._keys, loopback=self._loopback)
        if reply is None and health:
            reply = json_reply(200, {"status": "ok"})
        origin = _values(headers, b"origin")
        if reply is not None:
            await _send(send, reply, origin)
            return
        body = await _read(receive)
        if body is None:
            return
        if len(body) > MAX_BODY:
            too_large = error_reply(413, "request_too_large", f"a request body may have {MAX_BODY} bytes")
            await _send(send, too_large, origin)
            return
        target = scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        await self._pass_on(method, target, headers, body, origin, receive, send)

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
        gone = _Gone(receive)
        answer: AsyncAnswer | None = None
        try:
            try:
                call = self._transport.call(method, target, headers, body, _TIMEOUTS)
                if isinstance(call, HttpReply):
                    reply = call
                else:
                    self._waiting.add(gone.task)
                    answer = await self._transport.exchange(call)
            except httpx2.RequestError as e:
                log.warning("%s %s failed: %s", method, target.partition("?")[0][:100], e)
                reply = failure_reply(e)
            finally:
                self._waiting.discard(gone.task)
            if answer is None:
                await _send(send, reply, origin)
                return
            await send(_start(answer.status, readable_by(origin, answer.headers)))
            async for chunk in answer:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            gone.forget()
            await send({"type": "http.response.body", "body": b""})
        except httpx2.RequestError as e:
            # The connection ends without the end of the answer: the program sees that it broke off.
            log.warning("%s %s: %s", method, target.partition("?")[0][:100], e)
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
            if answer is not None:
                await answer.aclose()

    def close(self) -> None:
        """Answer those who have no answer yet: 503."""
        self._closing = True
        for task in list(self._waiting):
            task.cancel()

    async def leases(self) -> None:
        """Run as long as the server does; leases that are left go back at the end."""
        try:
            await asyncio.Event().wait()
        finally:
            await self._transport.aclose()


_TIMEOUTS = Timeouts(read=READ_TIMEOUT_S)


class _Gone:
    """Cancels the task that made it when the client goes away."""

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
        """The answer is complete."""
        self._watch.remove_done_callback(self._cancel)
        self._watch.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Any) -> bytes | None:
    """The body; one byte more than allowed when it is longer; None when the client has gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size <= MAX_BODY:
            parts.append(message.get("body", b""))
        # What is too long is read on for a while: who is still sending would not see the answer.
        if not message.get("more_body") or size > 2 * MAX_BODY:
            return b"".join(parts) if size <= MAX_BODY else b"x" * (MAX_BODY + 1)


async def _send(send: Any, reply: HttpReply, origin: Sequence[bytes]) -> None:
    await send(_start(reply.status, readable_by(origin, reply.headers)))
    await send({"type": "http.response.body", "body": reply.body or b""})


def _start(status: int, headers: Sequence[Header]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def one_secret(path: Path | None) -> str | None:
    """The one key or salt in the file, None without a file; raises ConfigError."""
    keys = private_files.load_keys(path)
    if len(keys) > 1:
        raise ConfigError(f"key file {path}: wanted one key, got {len(keys)}")
    return next(iter(keys), None)


def serve(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C; leases that were fetched ahead go back then."""
    config = config.checked()
    keys = private_files.load_keys(config.key_file)
    check_bind(config.host, config.port, keys_present=bool(keys))
    try:
        transport = AsyncFleetTransport(
            config.loadbalancer,
            api_key=one_secret(config.client_key_file),
            max_tries=config.max_tries,
            wait_s=config.wait_s,
            ahead=config.ahead,
            trust_network=config.trust_network,
            priority=config.priority,
            affinity=not config.no_affinity,
            affinity_salt=one_secret(config.affinity_salt_file),
        )
    except ValueError as e:
        raise ConfigError(str(e).replace("trust_network=True", "--trust-network")) from None
    sock = bind_socket(config.host, config.port)
    loopback = is_loopback_host(sock.getsockname()[0])
    # It says there that an answer was left incomplete, which is how a broken one is passed on.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    gateway = Gateway(transport, keys, loopback=loopback)
    log.info("gateway to %s on http://%s:%d/v1", config.loadbalancer, config.host, config.port)
    if not loopback:
        log.warning(
            "prompts and keys come here in the clear: only for a network where nobody else can listen"
        )
    AsgiServer(gateway, sock, background=[gateway.leases]).run()


def _parser() -> argparse.ArgumentParser:
    d = Config()
    parser = Parser(
        prog="gateway.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="Listening off loopback needs --key-file.",
    )
    add = parser.add_argument
    add("--host", default=d.host, help="address to listen on (default %(default)s)")
    add("--port", type=int, default=d.port, help="port to listen on (default %(default)s)")
    add(
        "--loadbalancer", default=d.loadbalancer, metavar="URL", help="the loadbalancer (default %(default)s)"
    )
    add(
        "--trust-network",
        action="store_true",
        help="allow a loadbalancer over plain http elsewhere than on loopback: who can change what it says "
        "can read the prompts",
    )
    add(
        "--client-key-file",
        type=Path,
        metavar="FILE",
        help="our key for a loadbalancer that wants one, mode 0600 (default: FLEET_CLIENT_KEY)",
    )
    add(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="keys that requests then want, one a line, mode 0600 (default: open on loopback)",
    )
    add(
        "--ahead",
        type=int,
        default=d.ahead,
        metavar="N",
        help="leases fetched before they are needed, while requests come (default %(default)d)",
    )
    add(
        "--wait-s",
        type=float,
        default=d.wait_s,
        metavar="S",
        help="seconds a request waits for a lease before it gets 503 (default %(default)g)",
    )
    add(
        "--max-tries",
        type=int,
        default=d.max_tries,
        metavar="N",
        help="instances a request is tried on (default %(default)d)",
    )
    add(
        "--priority",
        choices=PRIORITIES,
        default=d.priority,
        help="of requests without a header X-Fleet-Priority of their own (default %(default)s)",
    )
    add(
        "--affinity-salt-file",
        type=Path,
        metavar="FILE",
        help="salt of the hashes by which the loadbalancer sends a conversation where it was read before: "
        "one line of 16 or more characters, mode 0600, the same for all clients that are to profit from "
        "each other's prompts (default: FLEET_AFFINITY_SALT, or a random one)",
    )
    add("--no-affinity", action="store_true", help="tell the loadbalancer no hashes of prompts' beginnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and serve."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    serve(Config(**vars(args)))


def run() -> None:
    """Run the command `fleet-gateway`; wrong flags are one line and exit 2."""
    flags.run_main(main)


if __name__ == "__main__":
    run()
