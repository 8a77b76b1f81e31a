"""An answer on its way to the program that asked: an instance's, or one of our own in OpenAI's shape."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_client.call import returned
from fleet_client.connection_pool import Header
from fleet_client.leases import ClientLease


@dataclass(frozen=True, slots=True)
class HttpReply:
    """An answer from its first byte on. body: all of it, if it was read; source: what it is read from.

    first: the first part of its body, if that was waited for. head_s: seconds from sending the request to its
    head, and to that part.
    """

    status: int
    headers: Sequence[Header]
    source: Any = None
    body: bytes | None = None
    lease: ClientLease | None = None
    first: bytes = b""
    head_s: float = 0.0


def error_reply(
    status: int,
    code: str,
    message: str,
    *,
    retry_after_s: float | None = None,
    field: str | None = None,
    headers: Sequence[Header] = (),
) -> HttpReply:
    """Return an answer in the shape of OpenAI's errors. field: the part of the request that is wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    more = list(headers)
    if retry_after_s is not None:
        more.append((b"Retry-After", b"%d" % -(-retry_after_s // 1)))
    said = {"error": {"message": message, "type": kind, "param": field, "code": code}}
    return json_reply(status, said, headers=more)


def json_reply(status: int, said: Mapping[str, Any], *, headers: Sequence[Header] = ()) -> HttpReply:
    """Return an answer of our own with a body of JSON."""
    body = json.dumps(said).encode()
    own = [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
    return HttpReply(status, [*own, *headers], body=body)


def kept_reply(status: int, headers: Iterable[Header], body: bytes, lease: ClientLease) -> HttpReply:
    """Return the answer of an instance whose body has been read to its end."""
    kept = [
        (name, value) for name, value in returned(headers, lease.address) if name.lower() != b"content-length"
    ]
    kept.append((b"Content-Length", b"%d" % len(body)))
    return HttpReply(status, kept, body=body, lease=lease)
