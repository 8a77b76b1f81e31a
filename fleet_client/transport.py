"""What the transports for asyncio and threads share: settings, what is known of the fleet, httpx2's
objects."""

import os
import random
import secrets
import ssl
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from fleet_client.call import NO_TIMEOUTS, PRIORITY_HEADER, Call, Timeouts, priority_in
from fleet_client.connection_pool import Header
from fleet_client.leases import PRIORITIES, Lease, LeasesAhead
from fleet_client.prefix_hashes import Hasher, Served
from fleet_client.retry import Reply, Rules, Setback, error_reply
from fleet_client.tls_pins import BadAddress, context_for
from fleet_client.token_estimate import read_body, size_in

MAX_BODY = 64 * 2**20
"""Bytes of a request body; it is kept until the first byte of an answer, to be sent again elsewhere."""

KEPT_ANSWER = 65_536
"""Bytes that are kept of an answer that sends a request elsewhere (429, 503): it may become the last word."""

DONE_S = 5.0
"""What POST /done may take."""

MODEL_KEEP_ALIVE_S, ROUTE_KEEP_ALIVE_S = 3.0, 60.0
"""An idle connection is used again for so long: vLLM's uvicorn closes its own after 5 s, the loadbalancer
after 120 s."""

ENDS_KEPT, ENDS_AT_ONCE, CLOSE_S = 10_000, 8, 2.0
"""Ends of leases that wait to be told, those told at once, and what the last may take on close."""

MOMENT_S = 0.02
"""How long the end of an answer is waited for after its [DONE]: it was sent in the same moment."""


class Fleet:
    """What a transport is given, and what it knows of the fleet."""

    def __init__(
        self,
        loadbalancer: str,
        *,
        api_key: str | None,
        max_tries: int,
        wait_s: float,
        ahead: int,
        connect_s: float,
        trust_network: bool,
        priority: str,
        affinity: bool,
        affinity_salt: bytes | str | None,
    ) -> None:
        """Raises ValueError for what cannot be; no key and no salt is in its text."""
        if not 0 <= ahead <= 256:
            raise ValueError(f"ahead: wanted 0 to 256, got {ahead}")
        self.url = loadbalancer_url(loadbalancer, trust_network=trust_network)
        self.rules = Rules(max_tries, wait_s, connect_s, priority).checked()
        self.rng = random.Random()
        self.ahead = LeasesAhead(ahead)
        self._served = Served()
        self._hasher = _hasher(affinity_salt) if affinity else None
        key = os.environ.get("FLEET_CLIENT_KEY") if api_key is None else api_key
        self.headers = {"Content-Type": "application/json"}
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("api_key: wanted printable ASCII")
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def connect_s(self, timeouts: Timeouts) -> float:
        """What a connection to an instance may take."""
        given = timeouts.connect
        return self.rules.connect_s if given is None else min(given, self.rules.connect_s)

    def call(
        self, method: str, target: str, headers: Sequence[Header], body: bytes, timeouts: Timeouts
    ) -> Call | Reply:
        """The request, with all that the loadbalancer is told of it; or what is wrong with it.

        Raises httpx2.LocalProtocolError for one that HTTP cannot carry.
        """
        try:
            priority = priority_in(headers)
        except ValueError as e:
            return error_reply(400, "bad_priority", str(e), field=PRIORITY_HEADER)
        said = read_body(method, body)
        size = size_in(method, target, body, said)
        affinity = () if self._hasher is None else self._hasher.hashes(target, said, size)
        return Call(method, target, headers, body, size, timeouts, affinity=affinity, priority=priority)

    # -- leases fetched ahead

    def may_take(self, call: Call) -> bool:
        """Whether leases fetched ahead are for it: one of lower priority would pass others by with them."""
        own = PRIORITIES.index(self.rules.priority)
        return self.ahead.most > 0 and PRIORITIES.index(call.priority or self.rules.priority) <= own

    def first(self, call: Call, now: float) -> tuple[Lease | None, bool]:
        """(a lease fetched ahead, whether none is taken because /route may know a nearer one).

        In the latter case none counts as used: those that only ever lie there go back.
        """
        near = self._served.blocks(call.affinity) if len(self.ahead) else {}
        if self.ahead.better_asked(len(call.affinity), near, call.avoid, now):
            return None, True
        return self.ahead.take(call.size, now, call.avoid, near), False

    def again(self, call: Call, avoid: Collection[int], now: float) -> Lease | None:
        """A lease fetched ahead for another try."""
        return self.ahead.take(call.size, now, avoid, self._served.blocks(call.affinity))

    def answered(self, call: Call, reply: Reply) -> None:
        """The instance has read the prompt, and is likely to have it at hand for a while."""
        if self.ahead.most and call.affinity and reply.status == 200 and reply.lease is not None:
            self._served.note(call.affinity, reply.lease.instance_id)


def _hasher(salt: bytes | str | None) -> Hasher:
    given = salt if salt is not None else os.environ.get("FLEET_AFFINITY_SALT") or None
    if given is None:
        return Hasher(secrets.token_bytes(32))
    return Hasher(given.encode(errors="surrogateescape") if isinstance(given, str) else given)


class Body:
    """A body that comes in parts, to be kept."""

    def __init__(self) -> None:
        """Empty."""
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> bool:
        """Whether there may be more."""
        self._size += len(part)
        self._parts.append(part)
        return self._size <= MAX_BODY

    def joined(self) -> bytes | None:
        """All of it; None when it is too large."""
        return b"".join(self._parts) if self._size <= MAX_BODY else None


def timeouts_of(request: httpx2.Request) -> Timeouts:
    """Those that httpx2 gives it."""
    given = request.extensions.get("timeout")
    if not isinstance(given, Mapping):
        return NO_TIMEOUTS
    return Timeouts(given.get("connect"), given.get("read"), given.get("write"), given.get("pool"))


def call_of(fleet: Fleet, request: httpx2.Request, body: bytes | None) -> Call | Reply:
    """The request, or what is wrong with it. body: None when it is too large."""
    if body is None:
        return error_reply(413, "request_too_large", f"a request body may have {MAX_BODY} bytes")
    target = request.url.raw_path.decode("ascii")
    return fleet.call(request.method, target, request.headers.raw, body, timeouts_of(request))


def wrong_request(reply: Reply) -> httpx2.Response:
    """What httpx2 is given for it."""
    return httpx2.Response(
        reply.status, headers=list(reply.headers), content=reply.body, extensions=extensions(None, reply)
    )


def extensions(call: Call | None, reply: Reply) -> dict[str, Any]:
    """What httpx2 is told beside an answer."""
    said: dict[str, Any] = {"http_version": b"HTTP/1.1", "reason_phrase": reply.reason}
    if call is not None:
        lease = reply.lease
        said["fleet"] = {
            "instance_id": None if lease is None else lease.instance_id,
            "request_id": None if lease is None else lease.request_id,
            "setbacks": tuple(call.setbacks),
        }
    return said


def named(error: BaseException) -> str:
    """A timeout's own text is empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def not_connected(lease: Lease, error: BaseException) -> Setback:
    """The setback of a connection that did not come about: no byte of the request was sent."""
    causes = list(_causes(error))
    if any(isinstance(e, ssl.SSLCertVerificationError) for e in causes):
        said = f"{lease} does not have the certificate that is known of it"
        return Setback("wrong_certificate", httpx2.ConnectError(said), elsewhere=True)
    if any(isinstance(e, TimeoutError | httpx2.TimeoutException) for e in causes):
        return Setback(
            "no_connection", httpx2.ConnectTimeout(f"{lease}: no connection in time"), elsewhere=True
        )
    why = "no_tls" if any(isinstance(e, ssl.SSLError) for e in causes) else "no_connection"
    return Setback(why, httpx2.ConnectError(f"{lease}: no connection: {named(error)}"), elsewhere=True)


def loadbalancer_url(text: str, *, trust_network: bool) -> str:
    """The URL without a slash at its end; raises ValueError where leases may not travel.

    A lease holds the certificate that a prompt is sent to: who can change it on its way reads the prompt.
    """
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"loadbalancer {text!r}: wanted http://HOST:PORT")
    if parts.scheme == "http" and not trust_network:
        try:
            context_for(text, None)
        except BadAddress:
            raise ValueError(
                f"loadbalancer {text!r}: leases in the clear are for loopback only; use https or an ssh "
                "tunnel, or trust_network=True where nobody else can listen"
            ) from None
    return text.rstrip("/")
