"""Leases as messages: the bodies of POST /route, /done and /well, and what the loadbalancer answers.

A lease allows one request to one instance, for a while. Its times are seconds of the caller's own monotonic
clock, counted from when it arrived, so a clock that is wrong changes nothing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleet_client.token_estimate import TokenEstimate

PAUSE_S = (0.1, 2.0)
"""First and longest pause, in seconds, before /route is asked again; each is twice the one before. A longer
Retry-After is kept to."""

STALE_SHARE = 0.3
"""Last share of a lease's life in which it is not used any more: the way to the instance takes time, too."""

MOST_AVOIDED = 64
"""Most instances that POST /route can be asked to avoid."""

MAX_ID, MAX_LIFE_S = 2**53, 1e6
"""Highest id of an instance, and longest life of a lease in seconds: a lease beyond them is not believed."""

PRIORITIES = ("high", "normal", "low")
NORMAL = "normal"

Posted = tuple[int, bytes, str | None]
"""Status, body and Retry-After of what the loadbalancer answered."""


@dataclass(frozen=True, slots=True)
class ClientLease:
    """A lease as its client has it: where one request may go, with which token, until when.

    granted and expires are seconds of this process's own clock.
    """

    address: str
    request_id: str
    instance_id: int
    granted: float
    expires: float
    token: str = field(repr=False)
    certificate: str | None = field(repr=False)
    first_token_s: float | None = None  # in which the loadbalancer expects the first token

    def fresh(self, now: float) -> bool:
        """Return whether the lease may still be used: it is not yet in the last part of its life."""
        return now < self.stale_at

    @property
    def stale_at(self) -> float:
        """The time from which on the lease is not used any more, though it has not expired."""
        return self.expires - STALE_SHARE * (self.expires - self.granted)

    def __str__(self) -> str:
        """Return the instance's number in words, because its address is not for the client's program."""
        return f"instance {self.instance_id}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the loadbalancer gave no lease.

    status: the answer's, 0 without one. final: asking again cannot help. code: the loadbalancer's one word
    for the reason.
    """

    status: int
    message: str
    retry_after_s: float = 0.0
    final: bool = False
    code: str = field(default="unreachable", compare=False)


def route_body(
    size: TokenEstimate,
    wait_s: float,
    avoid: Sequence[int] = (),
    *,
    affinity: Sequence[str] = (),
    priority: str = NORMAL,
    count: int | None = None,
) -> dict[str, Any]:
    """Return the body of POST /route: sizes and salted hashes, and nothing of what is asked.

    count: ask for a batch of so many leases, whose answer `read_batch` reads.
    """
    body: dict[str, Any] = {"prompt_tokens": size.prompt_tokens}
    if size.max_tokens is not None:
        body["max_tokens"] = size.max_tokens
    if size.prompts > 1:
        body["prompts"] = size.prompts
    if wait_s > 0.0:
        body["wait_s"] = round(wait_s, 3)
    if avoid:
        body["avoid"] = list(dict.fromkeys(avoid))[-MOST_AVOIDED:]
    if affinity:
        body["affinity"] = list(affinity)
    if priority != NORMAL:
        body["priority"] = priority
    if count is not None:
        body["count"] = count
    return body


def read_route(status: int, raw: bytes, retry_after: str | None, now: float) -> ClientLease | Refusal:
    """Return the lease or the refusal in an answer of POST /route.

    No part of a lease is ever in a refusal's message.
    """
    said = _read(raw)
    if status != 200:
        return _refusal(status, said, retry_after)
    lease = _lease_in(said, said, now)
    return _unreadable() if lease is None else lease


def read_batch(status: int, raw: bytes, retry_after: str | None, now: float) -> list[ClientLease] | Refusal:
    """Return the leases, at least one, or the refusal in an answer of POST /route with `count`."""
    said = _read(raw)
    if status != 200:
        return _refusal(status, said, retry_after)
    given, known = said.get("leases"), said.get("certificates")
    certificates: Mapping[str, Any] = known if isinstance(known, dict) else {}
    leases = []
    for one in given if isinstance(given, list) else ():
        if isinstance(one, dict):
            entry = certificates.get(str(one.get("instance_id")))
            lease = _lease_in(one, entry if isinstance(entry, dict) else {}, now)
            if lease is not None:
                leases.append(lease)
    return leases or _unreadable()


def _read(raw: bytes) -> dict[str, Any]:
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        said = None
    return said if isinstance(said, dict) else {}


def _refusal(status: int, said: Mapping[str, Any], retry_after: str | None) -> Refusal:
    told = str(said.get("message") or said.get("error") or f"status {status}")[:300]
    message = "".join(letter if letter.isprintable() else "?" for letter in told)  # half letters, too
    final = 400 <= status < 500 and status not in (408, 429)
    code = str(said.get("error") or f"http_{status}")[:40]
    return Refusal(status, message, _seconds(retry_after), final, code)


def _unreadable() -> Refusal:
    return Refusal(0, "its lease cannot be read", code="bad_answer")


def _lease_in(said: Mapping[str, Any], known: Mapping[str, Any], now: float) -> ClientLease | None:
    """Return the lease in a JSON object; None when a field is missing or wrong.

    known: the object that has the certificate.
    """
    texts = [said.get(name) for name in ("address", "request_id", "token")]
    number, life_s, certificate = said.get("instance_id"), said.get("expires_in_s"), known.get("certificate")
    if not isinstance(number, int) or not 0 <= number <= MAX_ID:
        return None
    if not isinstance(life_s, int | float) or not 0.0 <= life_s <= MAX_LIFE_S:  # nor is NaN
        return None
    if not all(isinstance(t, str) and t.isascii() and t.isprintable() and t for t in texts):
        return None
    if certificate is not None and not isinstance(certificate, str):
        return None
    address, request_id, token = (str(t) for t in texts)
    first_s = said.get("first_token_s")
    expected_s = float(first_s) if isinstance(first_s, int | float) and 0.0 <= first_s <= 1e5 else None
    expires = now + float(life_s)
    return ClientLease(address.rstrip("/"), request_id, number, now, expires, token, certificate, expected_s)


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 where it is a date or no number."""
    try:
        return min(600.0, max(0.0, float(retry_after or 0.0)))
    except ValueError:
        return 0.0


def done_body(lease: ClientLease, outcome: str, why: str) -> dict[str, str]:
    """Return the body of POST /done, which tells how a lease ended."""
    return {"request_id": lease.request_id, "outcome": outcome} | ({"why": why} if why else {})


def read_well(said: Posted | Refusal) -> dict[int, str]:
    """Return why instances answer nothing any more, by id, from an answer of POST /well; empty otherwise."""
    out = {} if isinstance(said, Refusal) or said[0] != 200 else _read(said[1]).get("out")
    found = out.items() if isinstance(out, dict) else ()
    return {int(one): str(why)[:40] for one, why in found if re.fullmatch("[0-9]{1,16}", one)}
