"""What the transports for threads and asyncio share: options, leases, httpx2's objects, names of failures."""

import os
import random
import secrets
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from fleet_client.call import NO_TIMEOUTS, PRIORITY_HEADER, Call, Timeouts, priority_in
from fleet_client.connection_pool import Header
from fleet_client.errors import ConfigError
from fleet_client.instance_names import error_without_address
from fleet_client.lease_keeper import LeaseKeeper
from fleet_client.leases import ClientLease
from fleet_client.options import FleetOptions
from fleet_client.own_tls import TrustedServer
from fleet_client.prefix_hashes import Hasher
from fleet_client.reply import HttpReply, error_reply
from fleet_client.retry import LATE, Attempt, Setback, attempt
from fleet_client.token_estimate import estimate_body, read_body
from fleet_client.trace_context import traceparent_in

MAX_BODY = 64 * 2**20
"""Most bytes of a request body; it is kept until the first byte of an answer, to be sent again elsewhere."""

KEPT_ANSWER = 65_536
"""Most bytes kept of an answer that sends a request elsewhere (429, 503): it may become the last word."""

MAX_LEASES = 2**20
"""Most bytes of an answer of the loadbalancer: 256 leases are some 100 kB."""

MODEL_KEEP_ALIVE_S, ROUTE_KEEP_ALIVE_S = 3.0, 60.0
"""Seconds for which an idle connection is used again: vLLM's uvicorn closes its own after 5 s, the
loadbalancer after 120 s."""

CLOSE_S = 2.0
"""Seconds that the last ends of leases, and the rest of an answer that is not wanted, may take."""

MOMENT_S = 0.02
"""Seconds to wait for the end of an answer after its [DONE]: it was sent in the same moment."""


class TransportCore:
    """The part of a transport that opens nothing: it turns requests into calls, and calls into attempts."""

    def __init__(
        self, options: FleetOptions, lock: AbstractContextManager[Any], wake: Callable[[], None]
    ) -> None:
        """Take options that are not given from the environment. lock, wake: for the `LeaseKeeper`."""
        if options.api_key is None:
            options = replace(options, api_key=os.environ.get("FLEET_CLIENT_KEY"))
        self.options = options
        self.trusted = _trusted(options.loadbalancer_cert)
        self.leases = LeaseKeeper(options, lock, wake)
        self.headers = {"Content-Type": "application/json"}  # of what the loadbalancer is asked
        if options.api_key:
            self.headers["Authorization"] = f"Bearer {options.api_key}"
        self._hasher = _hasher(options.affinity_salt) if options.affinity else None
        self._rng = random.Random()

    def start_anew(self, lock: AbstractContextManager[Any]) -> None:
        """Forget all leases, in a fork or a new event loop, and draw other pauses than the parent."""
        self.leases.start_anew(lock)
        self._rng = random.Random()

    def described(self, kind: str, *, closed: bool) -> str:
        """Return a description of the transport, without any key."""
        parts = (kind, self.options.url, str(self.leases), "closed" if closed else "")
        return f"<{' '.join(filter(None, parts))}>"

    def connect_s(self, timeouts: Timeouts) -> float:
        """Return the seconds that a connection to an instance may take."""
        given = timeouts.connect
        return self.options.connect_s if given is None else min(given, self.options.connect_s)

    def head_s(self, timeouts: Timeouts) -> float | None:
        """Return the seconds that connecting, sending and the answer's head may take in all; None: no limit.

        A limit on each read would start again with each byte, so a head that never ends would have no limit.
        """
        if timeouts.read is None:
            return None
        return self.connect_s(timeouts) + (timeouts.write or timeouts.read) + timeouts.read

    def call(
        self, method: str, target: str, headers: Sequence[Header], body: bytes, timeouts: Timeouts
    ) -> Call | HttpReply:
        """Return the request with all that the loadbalancer is told of it, or the answer that refuses it.

        Raises httpx2.LocalProtocolError for one that HTTP cannot carry.
        """
        try:
            priority = priority_in(headers)
        except ValueError as e:
            return error_reply(400, "bad_priority", str(e), field=PRIORITY_HEADER)
        said = read_body(method, body)
        size = estimate_body(method, target, body, said)
        affinity = () if self._hasher is None else self._hasher.hashes(target, said, size)
        streamed = said is not None and said.get("stream") is True
        return Call(
            method,
            target,
            headers,
            body,
            size,
            timeouts,
            (),
            affinity,
            priority=priority,
            streamed=streamed,
            traceparent=traceparent_in(headers),
        )

    def call_of(self, request: httpx2.Request, body: bytes | None) -> Call | HttpReply:
        """Return httpx2's request as a call, or the answer that refuses it. body: None: it is too large."""
        if body is None or len(body) > MAX_BODY:
            return too_large()
        target = request.url.raw_path.decode("ascii")
        return self.call(request.method, target, request.headers.raw, body, _timeouts_of(request))

    def attempt(self, call: Call, now: float) -> Attempt:
        """Begin to serve a call; the caller performs the steps that the attempt yields."""
        return attempt(call, self.leases, now, self._rng)


def _trusted(certificates: str | Path | None) -> TrustedServer:
    try:
        return TrustedServer("loadbalancer_cert", None if certificates is None else Path(certificates))
    except ConfigError as e:
        raise ValueError(str(e)) from None


def _hasher(salt: bytes | str | None) -> Hasher:
    given = salt if salt is not None else os.environ.get("FLEET_AFFINITY_SALT") or None
    if given is None:
        return Hasher(secrets.token_bytes(32))
    return Hasher(given.encode(errors="surrogateescape") if isinstance(given, str) else given)


# -- httpx2's objects -----------------------------------------------------------------------------------


def require_httpx2(request: object, client: str) -> None:
    """Raise TypeError for a request that is not httpx2's, such as the older httpx package's.

    client: the class that sends requests through this transport.
    """
    if not isinstance(request, httpx2.Request):
        theirs = type(request)
        raise TypeError(
            f"this transport works under {client} only: "
            f"wanted an httpx2.Request, got {theirs.__module__}.{theirs.__qualname__}"
        )


class BodyBuffer:
    """Collects a request body that comes in parts, up to MAX_BODY bytes."""

    def __init__(self) -> None:
        """Start without parts."""
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> bool:
        """Add a part of the body; return whether more may be added."""
        self._size += len(part)
        self._parts.append(part)
        return self._size <= MAX_BODY

    def joined(self) -> bytes | None:
        """Return the whole body; None when it is too large."""
        return b"".join(self._parts) if self._size <= MAX_BODY else None


def _timeouts_of(request: httpx2.Request) -> Timeouts:
    given = request.extensions.get("timeout")
    if not isinstance(given, Mapping):
        return NO_TIMEOUTS
    return Timeouts(given.get("connect"), given.get("read"), given.get("write"), given.get("pool"))


def response_of(call: Call | HttpReply, reply: HttpReply, stream: Any = None) -> httpx2.Response:
    """Return an answer as an httpx2.Response. stream: yields its bytes, where they are not here yet.

    call: the request, or the reply that says what was wrong with it.
    """
    said: dict[str, Any] = {"http_version": b"HTTP/1.1"}
    if isinstance(call, Call):
        lease = reply.lease
        said["fleet"] = {
            "instance_id": None if lease is None else lease.instance_id,
            "request_id": None if lease is None else lease.request_id,
            "setbacks": tuple(call.setbacks),
        }
    content = {"content": reply.body} if stream is None else {"stream": stream}
    return httpx2.Response(reply.status, headers=list(reply.headers), extensions=said, **content)


def too_large() -> HttpReply:
    """Return the answer to a request whose body is over MAX_BODY bytes."""
    said = f"a request body may have {MAX_BODY} bytes: send less, or large files by their address"
    return error_reply(413, "request_too_large", said)


# -- failures by name -----------------------------------------------------------------------------------


ASK_AGAIN = "send the request again"
"""What a program can do whose instance has failed it."""

TOO_LATE = (
    "nothing came within the timeout that the program gave: give a longer one, or send the request again"
)
"""What a program is told that has waited for as long as it wanted to."""


def named(error: BaseException) -> str:
    """Return an error's type and text, or only its type, because the text of a timeout is empty.

    aiohttp's are said by their cause: "Cannot connect to host … ssl:default" seems to be about TLS.
    """
    error = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def not_connected(lease: ClientLease, error: BaseException) -> Setback:
    """Return the setback of a failed connection to an instance: no byte of the request was sent."""
    causes = list(_causes(error))
    if any(isinstance(e, ssl.SSLCertVerificationError) for e in causes):
        said = f"{lease} does not have the certificate that is known of it"
        return Setback("wrong_certificate", httpx2.ConnectError(said), elsewhere=True)
    if any(isinstance(e, TimeoutError | httpx2.TimeoutException) for e in causes):
        said = f"{lease}: no connection in time"
        return Setback("no_connection", httpx2.ConnectTimeout(said), elsewhere=True)
    why = "no_tls" if any(isinstance(e, ssl.SSLError) for e in causes) else "no_connection"
    said = error_without_address(named(error), error, lease.address)
    return Setback(why, httpx2.ConnectError(f"{lease}: no connection: {said}"), elsewhere=True)


def not_answered(lease: ClientLease, error: BaseException, *, bad_http: bool, again: bool) -> Setback:
    """Return the setback of a request that was sent and not answered. bad_http: what came is no HTTP."""
    if isinstance(error, InstanceOut):
        said = f"{lease} went out before it answered ({error}): {ASK_AGAIN}"
        return Setback("instance_out", httpx2.ReadError(said), elsewhere=True)
    if isinstance(error, TimeoutError):
        return Setback("read_timeout", httpx2.ReadTimeout(f"{lease}: {TOO_LATE}"), elsewhere=False)
    said = f"{lease}: the connection broke before an answer came ({type(error).__name__}): {ASK_AGAIN}"
    if bad_http:
        return Setback("bad_answer", httpx2.RemoteProtocolError(said), elsewhere=False)
    return Setback("broke_off", httpx2.ReadError(said), elsewhere=False, again=again)


class InstanceOut(OSError):
    """The loadbalancer says that an instance answers nothing any more; the text is its word for why."""


def late(lease: ClientLease, limit_s: float) -> Setback:
    """Return the setback of a request whose answer's first byte did not come when it should have."""
    said = f"{lease}: no first byte within {limit_s:.0f} s; {lease.first_token_s:.1f} were expected"
    return Setback(LATE, httpx2.ReadTimeout(said), elsewhere=True)


def cut_off(lease: ClientLease | None, error: BaseException) -> tuple[str, httpx2.RequestError]:
    """Return (a word for the loadbalancer, the error) for an answer that stopped before its end."""
    if isinstance(error, InstanceOut):
        said = f"{lease} went out while it answered ({error}): {ASK_AGAIN}"
        return "instance_out", httpx2.RemoteProtocolError(said)
    if isinstance(error, TimeoutError):
        return "read_timeout", httpx2.ReadTimeout(f"{lease}: {TOO_LATE}")
    said = f"{lease}: the answer broke off ({type(error).__name__}): {ASK_AGAIN}"
    return "broke_off", httpx2.RemoteProtocolError(said)
