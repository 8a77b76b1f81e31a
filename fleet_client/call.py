"""One request on its way to an instance: which of its headers are passed on, and which are for us."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import httpx2

from fleet_client.connection_pool import Header
from fleet_client.instance_names import without_address
from fleet_client.leases import PRIORITIES, ClientLease, Refusal
from fleet_client.token_estimate import TokenEstimate

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
"""Headers of a connection, not of the message: RFC 9110, 7.6.1."""

PRIORITY_HEADER = "X-Fleet-Priority"
"""high, normal or low: which request is served first when there is no room for all. For the loadbalancer."""

_PRIORITY = PRIORITY_HEADER.lower().encode()
_CREDENTIALS = frozenset((b"authorization", b"proxy-authorization", b"api-key", b"x-api-key"))
_NOT_FORWARDED = HOP_BY_HOP | _CREDENTIALS | {b"host", b"content-length", b"expect", _PRIORITY}

_NOT_RETURNED = HOP_BY_HOP | {b"alt-svc", b"refresh"}
"""Refresh is Location by another name; Alt-Svc says where else the same server is."""

_METHOD, _TARGET = re.compile(r"[A-Z]{1,20}"), re.compile(r"/[!-~]*")
_HEADER_NAME, _NO_HEADER_VALUE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"), re.compile(rb"[\r\n\0]")


def forwarded(headers: Iterable[Header], token: str) -> list[Header]:
    """Return a request's headers as they are sent to an instance, with the token as the key.

    Those of the connection stay behind, and so do the program's keys, which are for others.
    """
    out = _without(headers, _NOT_FORWARDED)
    out.append((b"Authorization", b"Bearer " + token.encode()))
    return out


def returned(headers: Iterable[Header], address: str) -> list[Header]:
    """Return the headers of an instance's answer without those of its connection or that lead to it.

    address: of the instance.
    """
    return without_address(_without(headers, _NOT_RETURNED), address)


def _without(headers: Iterable[Header], names: frozenset[bytes]) -> list[Header]:
    """Return headers without those of these names, and without those that a Connection header names."""
    kept = [(name, value, name.lower()) for name, value in headers]
    hop = {one.strip().lower() for _, value, low in kept if low == b"connection" for one in value.split(b",")}
    return [(name, value) for name, value, low in kept if low not in names and low not in hop]


def priority_in(headers: Iterable[Header]) -> str | None:
    """Return the priority that a request's headers ask for, or None; raise ValueError if it is wrong."""
    values = [value.strip().decode("latin-1") for name, value in headers if name.lower() == _PRIORITY]
    if not values:
        return None
    said = ", ".join(values)
    if said not in PRIORITIES:
        raise ValueError(f"{PRIORITY_HEADER}: wanted high, normal or low, got {said[:40]!r}")
    return said


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits of one request in seconds; None is no limit. pool also bounds the wait for a lease."""

    connect: float | None = None
    read: float | None = None
    write: float | None = None
    pool: float | None = None


NO_TIMEOUTS = Timeouts()


@dataclass(slots=True)
class Call:
    """One request that is to be sent to an instance, and what became of it.

    target: path and query, encoded. Raises httpx2.LocalProtocolError for a request that HTTP cannot carry,
    ValueError for an unknown priority.
    """

    method: str
    target: str
    headers: Sequence[Header]
    body: bytes = field(repr=False)
    size: TokenEstimate
    timeouts: Timeouts = NO_TIMEOUTS
    avoid: Sequence[int] = ()  # instances that it must not go to, unless there are no others
    affinity: Sequence[str] = ()  # salted hashes of the prompt's prefixes, the shortest first
    priority: str | None = None  # None: the transport's
    streamed: bool = False  # whether its answer comes token by token
    traceparent: str | None = None  # its program's, for the loadbalancer
    setbacks: list[tuple[int, str]] = field(default_factory=list)  # instances that failed it, and how
    refusals: list[str] = field(default_factory=list)  # what the loadbalancer said instead of giving a lease
    leases: int = 0
    asked_s: float = 0.0  # seconds spent on getting leases, pauses included

    def __post_init__(self) -> None:
        """Check the request: a line end in a header would be a second header, or a second request."""
        if self.priority is not None and self.priority not in PRIORITIES:
            raise ValueError(f"priority: wanted high, normal or low, got {self.priority!r}")
        if not _METHOD.fullmatch(self.method) or not _TARGET.fullmatch(self.target):
            raise httpx2.LocalProtocolError(f"no request: {self.method[:20]!r} {self.target[:100]!r}")
        for name, value in self.headers:
            if not _HEADER_NAME.fullmatch(name) or _NO_HEADER_VALUE.search(value):
                raise httpx2.LocalProtocolError(f"no header: {name[:40]!r}")

    def note_wait(self, seconds: float, said: ClientLease | Refusal | None = None) -> None:
        """Count seconds spent on getting a lease. said: what the loadbalancer answered."""
        self.asked_s += seconds
        if isinstance(said, Refusal):
            self.refusals.append(said.code)

    def note_lease(self) -> None:
        """Count a lease that the request is sent with."""
        self.leases += 1

    def note_setback(self, lease: ClientLease, why: str) -> None:
        """Record that the instance of that lease failed the request. why: one word."""
        self.setbacks.append((lease.instance_id, why))
