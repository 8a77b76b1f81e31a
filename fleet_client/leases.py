"""Leases: what is said in POST /route and POST /done, and those that are fetched before they are needed.

A lease is leave to send one request to one instance, for a while. Those fetched ahead come in batches, one
call for as many as are missing, and are all alike: for a request of typical size, of the client's own
priority, and wherever there is room, because nobody knows yet what will be asked. Requests far above the
typical size take leases of their own, and so do those of lower priority. All others take, of the leases
that are here,

    the one of the instance that has answered most of their prefix, of equal ones that which is here longest;
    none at first, when another instance has answered so much more of it that reading that again takes longer
    (READ_S a token) than POST /route does (route_s, as measured all the time): they ask without waiting for
    a lease where their prefix lies, and take one of these when there is no room there or anywhere;
    the same when nobody has read it yet, but requests often come back and find no lease here where they
    were read: only who asks tells the loadbalancer his hashes, and so where the next turn is to go.

Times are seconds of the caller's monotonic clock.
"""

import json
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleet_client.prefix_hashes import BLOCK_TOKENS
from fleet_client.token_estimate import Size

PAUSE_S = (0.1, 2.0)
"""Before /route is asked again: the first, doubling up to the second; or a longer Retry-After."""

STALE_SHARE = 0.3
"""A lease fetched ahead is not used in this last part of its life: the way there takes time, too."""

IDLE_S = 5.0
"""Leases fetched ahead go back when none was used for so long: they keep capacity from others."""

FAR = 2.0
"""A request of so many times the typical work takes a lease of its own, and not one fetched ahead."""

FAR_WORK = 200.0
"""And so much more than that: 200 output tokens are a few seconds of one place in a batch."""

SIZE_WEIGHT = 0.1
"""Weight of one request in the running means: they follow in about twenty."""

BATCH = 64
"""Leases asked for in one call: the most POST /route gives."""

BATCHES = 4
"""Leases are asked for when a quarter of those that are wanted ahead is missing: fewer calls, and the stock
is never much below what the user said."""

READ_S = 1e-4
"""Seconds in which a model server reads a prompt token, to compare with POST /route: 13B models take 0.04
(H100) to 0.4 ms (RTX 3090), 70B ones 0.2 to 1.3 (engine/timing.py, column e)."""

WORTH_BLOCKS = 2
"""Fewer blocks of a prefix are not worth a question, however near the loadbalancer is: 512 tokens are part
of one step of a busy engine, which reads other prompts in it, too."""

MISS_WEIGHT = 0.05
"""Weight of one request in the running share of those that found no lease here where they had been read."""

ROUTE_WEIGHT = 0.2
"""Weight of one answer of /route in the running mean of how long it takes."""

MOST_AVOIDED = 64
"""Instances that POST /route can be asked to avoid."""

PRIORITIES = ("high", "normal", "low")
NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class Lease:
    """Where one request may go. granted and expires are of this process's own clock."""

    address: str
    request_id: str
    instance_id: int
    granted: float
    expires: float
    token: str = field(repr=False)
    certificate: str | None = field(repr=False)

    def fresh(self, now: float) -> bool:
        """Whether it is not yet in the last part of its life."""
        return now < self.stale_at

    @property
    def stale_at(self) -> float:
        """When the last part of its life begins."""
        return self.expires - STALE_SHARE * (self.expires - self.granted)

    def __str__(self) -> str:
        """For messages: the instance, and where it is."""
        return f"instance {self.instance_id} ({self.address})"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no lease. status: the answer's, 0 without one. final: asking again cannot help.

    code: one word for it.
    """

    status: int
    message: str
    retry_after_s: float = 0.0
    final: bool = False
    code: str = field(default="unreachable", compare=False)


# -- what is said in POST /route and POST /done ---------------------------------------------------------


def route_body(
    size: Size,
    wait_s: float,
    avoid: Sequence[int] = (),
    *,
    affinity: Sequence[str] = (),
    priority: str = NORMAL,
    count: int | None = None,
) -> dict[str, Any]:
    """The body of POST /route: sizes and salted hashes, and nothing of what is asked.

    count: for a batch, which `read_batch` reads.
    """
    body: dict[str, Any] = {"prompt_tokens": size.prompt_tokens}
    if size.max_tokens is not None:
        body["max_tokens"] = size.max_tokens
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


def read_route(status: int, raw: bytes, retry_after: str | None, now: float) -> Lease | Refusal:
    """What an answer of POST /route says. No part of a lease is ever in a message."""
    said = _read(raw)
    if status != 200:
        return _refusal(status, said, retry_after)
    lease = _lease_in(said, said, now)
    return _unreadable() if lease is None else lease


def read_batch(status: int, raw: bytes, retry_after: str | None, now: float) -> list[Lease] | Refusal:
    """The same where several were asked for with `count`: at least one lease, in the order they came."""
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
    message = str(said.get("message") or said.get("error") or f"status {status}")[:300]
    final = 400 <= status < 500 and status not in (408, 429)
    code = str(said.get("error") or f"http_{status}")[:40]
    return Refusal(status, message, _seconds(retry_after), final, code)


def _unreadable() -> Refusal:
    return Refusal(0, "its lease cannot be read", code="bad_answer")


def _lease_in(said: Mapping[str, Any], known: Mapping[str, Any], now: float) -> Lease | None:
    """known: where the certificate is."""
    texts = [said.get(name) for name in ("address", "request_id", "token")]
    number, life_s, certificate = said.get("instance_id"), said.get("expires_in_s"), known.get("certificate")
    if not isinstance(number, int) or not isinstance(life_s, int | float):
        return None
    if not all(isinstance(t, str) and t.isascii() and t.isprintable() and t for t in texts):
        return None
    if certificate is not None and not isinstance(certificate, str):
        return None
    address, request_id, token = (str(t) for t in texts)
    return Lease(address.rstrip("/"), request_id, number, now, now + float(life_s), token, certificate)


def _seconds(retry_after: str | None) -> float:
    """A Retry-After in seconds; one that is a date, or is no number, is as none."""
    try:
        return min(600.0, max(0.0, float(retry_after or 0.0)))
    except ValueError:
        return 0.0


def done_body(lease: Lease, outcome: str, why: str) -> dict[str, str]:
    """The body of POST /done."""
    return {"request_id": lease.request_id, "outcome": outcome} | ({"why": why} if why else {})


# -- ahead of need --------------------------------------------------------------------------------------


class LeasesAhead:
    """Leases fetched before they are needed: up to `most`, for requests of typical size, none when idle."""

    def __init__(self, most: int) -> None:
        """Nothing is wanted before the first request."""
        self.most = most
        self.route_s = 0.0  # what POST /route takes when it does not wait, a running mean
        self._missed = 0.0  # share of requests that had been read, but not where there was a lease
        self._ready: deque[Lease] = deque()
        self._coming = 0
        self._used_at: float | None = None
        self._retry_at = 0.0
        self._pause_s = PAUSE_S[0]
        self._prompt = 0.0
        self._output = 0.0
        self._limited = True
        self._closed = False

    def __len__(self) -> int:
        """Leases that are here."""
        return len(self._ready)

    @property
    def typical(self) -> Size:
        """What the next lease is asked for."""
        return Size(round(self._prompt), max(1, round(self._output)) if self._limited else None)

    def better_asked(self, blocks: int, near: Mapping[int, int], avoid: Collection[int], now: float) -> bool:
        """Whether it is worth a question where the request's prefix lies, though there are leases here.

        blocks: of the whole prompt. near: of its prefix, by the instance that has answered them.
        """
        if blocks < WORTH_BLOCKS:
            return False
        here = [near.get(lease.instance_id, 0) for lease in self._usable(avoid, now)]
        if not here:
            return False  # it is asked in any case, and may wait
        longest = max((some for one, some in near.items() if one not in avoid), default=0)
        more = longest - max(here)
        self._missed += MISS_WEIGHT * ((more >= WORTH_BLOCKS) - self._missed)
        if longest > 0:
            return more >= WORTH_BLOCKS and more * BLOCK_TOKENS * READ_S > self.route_s
        # The next turn saves it, as likely as such a one has been of late.
        return self._missed * blocks * BLOCK_TOKENS * READ_S > self.route_s

    def take(
        self, size: Size, now: float, avoid: Collection[int] = (), near: Mapping[int, int] | None = None
    ) -> Lease | None:
        """The fresh lease nearest to the prefix, of these the one that is here longest, or None: ask for one.

        avoid: instances that it must not be for. near: as in `better_asked`.
        """
        if self.most == 0 or self._closed:
            return None
        far = self._used_at is not None and size.work > FAR * self.typical.work + FAR_WORK
        self._learn(size)
        self._used_at = now
        if far:
            return None
        usable = self._usable(avoid, now)
        if near:
            best = max(usable, key=lambda lease: near.get(lease.instance_id, 0), default=None)
        else:
            best = next(iter(usable), None)
        if best is not None:
            self._ready.remove(best)
        return best

    def _usable(self, avoid: Collection[int], now: float) -> Iterable[Lease]:
        return (lease for lease in self._ready if lease.fresh(now) and lease.instance_id not in avoid)

    def _learn(self, size: Size) -> None:
        first = self._used_at is None
        weight = 1.0 if first else SIZE_WEIGHT
        # One giant must not make all leases giants.
        prompt = size.prompt_tokens if first else min(size.prompt_tokens, 4.0 * self._prompt + 1000.0)
        self._prompt += weight * (prompt - self._prompt)
        self._limited = size.max_tokens is not None
        if size.max_tokens is not None:
            weight = 1.0 if self._output == 0.0 else SIZE_WEIGHT
            output = size.max_tokens if weight == 1.0 else min(size.max_tokens, 4.0 * self._output + 1000.0)
            self._output += weight * (output - self._output)

    def want(self, now: float) -> int:
        """How many to ask for in one call now; they count as coming until `arrived` or `refused`."""
        if self._closed or self._used_at is None or now >= self._used_at + IDLE_S or now < self._retry_at:
            return 0
        missing = self.most - sum(lease.fresh(now) for lease in self._ready) - self._coming
        if missing <= 0 or missing * BATCHES < self.most:
            return 0
        wanted = min(missing, BATCH)
        self._coming += wanted
        return wanted

    def answered(self, took_s: float) -> None:
        """POST /route has answered, or not, in that time, without having been told to wait."""
        self.route_s += (ROUTE_WEIGHT if self.route_s else 1.0) * (took_s - self.route_s)

    def arrived(self, leases: Sequence[Lease], wanted: int, now: float) -> Sequence[Lease]:
        """Some of those asked for are here; gives those that go back: all, when nobody wants them any
        more."""
        if len(leases) < wanted:
            self.refused(wanted, 0.0, now)  # there is no room for the others
        else:
            self._coming -= wanted
            self._pause_s = PAUSE_S[0]
        if self._closed or (self._used_at is not None and now >= self._used_at + IDLE_S):
            return leases
        self._ready.extend(leases)
        return ()

    def refused(self, wanted: int, retry_after_s: float, now: float) -> None:
        """So many that were asked for do not come; ask again after a while."""
        self._coming -= wanted
        self._retry_at = max(self._retry_at, now + max(retry_after_s, self._pause_s))
        self._pause_s = min(PAUSE_S[1], 2.0 * self._pause_s)

    def sweep(self, now: float) -> list[Lease]:
        """Those that go back: too old, or nobody used any for a while."""
        if self._used_at is not None and now >= self._used_at + IDLE_S:
            return self._all()
        if all(lease.fresh(now) for lease in self._ready):
            return []
        stale = [lease for lease in self._ready if not lease.fresh(now)]
        self._ready = deque(lease for lease in self._ready if lease.fresh(now))
        return stale

    def leave(self, instance_id: int) -> list[Lease]:
        """Those of an instance that failed: they go back."""
        bad = [lease for lease in self._ready if lease.instance_id == instance_id]
        if bad:
            self._ready = deque(lease for lease in self._ready if lease.instance_id != instance_id)
        return bad

    def look_in_s(self, now: float) -> float | None:
        """When to `sweep` and `want` again; None: when one has been taken."""
        if self._closed or self._used_at is None or now >= self._used_at + IDLE_S:
            return 0.0 if self._ready else None
        due = self._used_at + IDLE_S
        if self._ready:
            due = min(due, min(lease.stale_at for lease in self._ready))
        if self._retry_at > now:
            due = min(due, self._retry_at)
        return max(0.01, due - now)

    def close(self) -> list[Lease]:
        """All of them go back, and no more are wanted."""
        self._closed = True
        return self._all()

    def _all(self) -> list[Lease]:
        gone, self._ready = list(self._ready), deque()
        return gone
