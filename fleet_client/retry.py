"""One request from its beginning to the first byte of an answer: where next, and when to stop.

    request ─► Ask ─► lease ─► Send ─► answer, passed on as it comes
                ▲                │ no connection, wrong certificate, 401, 429, 503
                └────────────────┘ before the first byte of an answer, and never after

`course` decides, and neither reads a clock nor opens anything: it is a generator that yields what to do
next and is sent what came of it, and the time. Times are seconds of the caller's monotonic clock, so a
clock that is wrong changes nothing.

A request never goes back to an instance that has failed it while there are others: each Ask and each Take
names all that it has tried, also when the lease had been fetched ahead.
"""

import json
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from fleet_client.call import Call, returned
from fleet_client.connection_pool import Header
from fleet_client.leases import NORMAL, PAUSE_S, PRIORITIES, Lease, Refusal, route_body
from fleet_client.tls_pins import BadAddress, context_for

ELSEWHERE = frozenset((401, 429, 503))
"""Answers that say "not taken": the token was refused, or the engine has no room or is not there."""

AVOID_WAIT_S = 3.0
"""How long /route may hold a request that avoids an instance; then it takes any, rather than none."""

UNREACHABLE_S = 5.0
"""A loadbalancer that does not answer is asked again for so long: one that restarts is back in about 1 s."""

ROUTE_SLACK_S, NEARER_SLACK_S = 5.0, 1.0
"""What POST /route may take beyond the wait that was asked for, and what when there is a lease at hand."""

TOO_MANY_UNUSED = "too_many_unused"
"""The loadbalancer's word for it: this client has taken many leases that it has not used."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How far to go for a request. Times in seconds."""

    max_tries: int = 4  # instances
    wait_s: float = 30.0  # for leases, all in all
    connect_s: float = (
        5.0  # for a connection: packets cross an ocean in 0.2 s, a lost SYN repeats after 1 and 3
    )
    priority: str = NORMAL  # of requests that say nothing of their own

    def checked(self) -> "Rules":
        """Itself; ValueError names what cannot be."""
        for name, least, most in (("max_tries", 1, 32), ("wait_s", 0, 600), ("connect_s", 0.1, 120)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: wanted {least} to {most}, got {getattr(self, name)}")
        if self.priority not in PRIORITIES:
            raise ValueError(f"priority: wanted high, normal or low, got {self.priority!r}")
        return self


@dataclass(slots=True)
class Reply:
    """An answer from its first byte on. body: all of it, when it was read; source: where it comes from."""

    status: int
    reason: bytes
    headers: Sequence[Header]
    source: Any = None
    body: bytes | None = None
    lease: Lease | None = None


@dataclass(frozen=True, slots=True)
class Setback:
    """No answer. why: one word for the loadbalancer. elsewhere: the engine never saw the prompt.

    again: the connection was kept alive and may have been closed before the request got there.
    """

    why: str
    error: httpx2.RequestError
    elsewhere: bool
    again: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """Do: POST /route, where the body says how long it may hold it. What came: Lease or Refusal.

    slack_s: what it may take beyond that.
    """

    body: dict[str, Any]
    hold_s: float
    slack_s: float = ROUTE_SLACK_S


@dataclass(frozen=True, slots=True)
class Take:
    """Do: take a lease fetched ahead that is for none of these. What came: Lease or None."""

    avoid: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Do: send the request there, on a connection that is new if again. What came: Reply or Setback."""

    lease: Lease
    again: bool


@dataclass(frozen=True, slots=True)
class Rest:
    """Do: nothing, for so long."""

    seconds: float


Step = Ask | Take | Send | Rest
Came = tuple[Lease | Refusal | Reply | Setback | None, float]
"""What came of a step, and the time then."""

Course = Generator[Step, Came, Reply]
Tell = Callable[[Lease, str, str], None]
"""Takes note of how a lease ended: outcome and why."""


def course(
    call: Call,
    rules: Rules,
    url: str,
    lease: Lease | None,
    tell: Tell,
    now: float,
    rng: random.Random,
    *,
    stock: bool = False,
    nearer: bool = False,
) -> Course:
    """One request from beginning to the first byte of an answer; raises httpx2's errors.

    lease: one that was fetched ahead. url: the loadbalancer's, for messages. stock: there may be leases
    fetched ahead for other tries. nearer: there is one, but first /route is asked for one where the prefix
    lies.
    """
    asking = _Asking(call, rules, rng, stock=stock, nearer=nearer)
    last: Reply | httpx2.RequestError | None = None
    for n in range(rules.max_tries):
        if lease is None:
            got, now = yield from asking.lease(now, first=n == 0)
            if isinstance(got, Refusal):
                return _last_word(last) if last is not None else _no_lease(got, url)
            lease = got
        call.leases += 1
        came, now = yield from _try(lease, now)
        if isinstance(came, Reply):
            if came.status not in ELSEWHERE:
                return came
            why = f"status_{came.status}"
            last = came
        else:
            why = came.why
            last = came.error
        call.setbacks.append((lease.instance_id, why))
        tell(lease, "failed", why)
        if isinstance(came, Setback) and not came.elsewhere:
            raise came.error
        asking.leave(lease, stranger=why == "wrong_certificate")
        lease = None
    assert last is not None  # noqa: S101 there was a try
    return _last_word(last)


class _Asking:
    """How a request gets its leases, and which instances it leaves alone."""

    def __init__(self, call: Call, rules: Rules, rng: random.Random, *, stock: bool, nearer: bool) -> None:
        self._call = call
        self._rng = rng
        self._stock = stock
        self._nearer = nearer
        self._priority = call.priority or rules.priority
        self._avoid = list(call.avoid)  # failed this request, the last one last
        self._strangers: set[int] = set()  # those that had another certificate
        given_s = call.timeouts.pool
        self._left_s = rules.wait_s if given_s is None else min(rules.wait_s, given_s)

    def leave(self, lease: Lease, *, stranger: bool) -> None:
        """It is not to be tried again. stranger: not even when there are no others."""
        self._avoid.append(lease.instance_id)
        if stranger:
            self._strangers.add(lease.instance_id)

    def lease(self, now: float, *, first: bool) -> Generator[Step, Came, tuple[Lease | Refusal, float]]:
        """(a lease or why there is none, the time). first: for the first try, which has found none here."""
        if first and self._nearer:
            said, now = yield from self._ask(0.0, NEARER_SLACK_S, now)
            if isinstance(said, Lease):
                return said, now
        here: Lease | None = None
        if self._stock and (self._nearer or not first):
            here, now = yield from self._take()
        if here is not None:
            return here, now
        said, now = yield from self._wait(now)
        if isinstance(said, Refusal) and self._stock:
            here, now = yield from self._take()  # some may have come in the meantime
        return (said if here is None else here), now

    def _take(self) -> Generator[Step, Came, tuple[Lease | None, float]]:
        said, now = yield Take(tuple(self._avoid))
        assert said is None or isinstance(said, Lease)  # noqa: S101 what Take gives
        return said, now

    def _wait(self, now: float) -> Generator[Step, Came, tuple[Lease | Refusal, float]]:
        """Ask until there is one or the time is up.

        When all that are left are to be avoided those are forgotten, but for the ones that are somebody else.
        """
        call, strangers = self._call, self._strangers
        pause_s = PAUSE_S[0]
        silent_s = min(self._left_s, UNREACHABLE_S)
        while True:
            forgettable = not strangers.issuperset(self._avoid)
            hold_s = min(self._left_s, AVOID_WAIT_S) if forgettable else self._left_s
            begun = now
            said, now = yield from self._ask(hold_s, ROUTE_SLACK_S, now)
            if isinstance(said, Lease) or said.final:
                return said, now
            rest_s = max(said.retry_after_s, pause_s) * self._rng.uniform(1.0, 1.25)
            if said.status == 0:
                silent_s -= now - begun
                if silent_s <= pause_s:
                    return said, now
                silent_s -= pause_s
            elif said.status == 503 and forgettable:
                self._avoid = [one for one in self._avoid if one in strangers]
                rest_s = 0.0
            elif rest_s >= self._left_s:
                return said, now
            if rest_s > 0.0:
                begun = now
                _, now = yield Rest(rest_s)
                self._left_s = max(0.0, self._left_s - (now - begun))
                call.asked_s += now - begun
            pause_s = min(PAUSE_S[1], 2.0 * pause_s)

    def _ask(
        self, hold_s: float, slack_s: float, now: float
    ) -> Generator[Step, Came, tuple[Lease | Refusal, float]]:
        call, begun = self._call, now
        body = route_body(call.size, hold_s, self._avoid, affinity=call.affinity, priority=self._priority)
        said, now = yield Ask(body, hold_s, slack_s)
        assert isinstance(said, Lease | Refusal)  # noqa: S101 what Ask gives
        self._left_s = max(0.0, self._left_s - (now - begun))
        call.asked_s += now - begun
        if isinstance(said, Refusal):
            call.refusals.append(said.code)
        return said, now


def _try(lease: Lease, now: float) -> Generator[Step, Came, tuple[Reply | Setback, float]]:
    """One instance: what it said, or how it failed."""
    try:
        context_for(lease.address, lease.certificate)
        _check_origin(lease.address)
    except ValueError as e:
        error: httpx2.RequestError = httpx2.ConnectError(f"{lease}: {e}")
    else:
        came, now = yield Send(lease, again=False)
        assert isinstance(came, Reply | Setback)  # noqa: S101 what Send gives
        if not isinstance(came, Setback) or not came.again:
            return came, now
        second, now = yield Send(lease, again=True)
        if isinstance(second, Reply) and second.status != 401:
            return second, now
        # The first one may have been taken, so this request is over, whatever became of the second.
        return Setback(came.why, came.error, elsewhere=False), now
    return Setback("bad_address", error, elsewhere=True), now


def _check_origin(address: str) -> None:
    parts = urlsplit(address)
    if parts.path or parts.query or parts.fragment or parts.username is not None or not parts.hostname:
        raise BadAddress("no address of the form https://HOST:PORT")


def _no_lease(refusal: Refusal, url: str) -> Reply:
    """The answer when there is no lease; raises when the loadbalancer did not answer."""
    if refusal.status == 0:
        raise httpx2.ConnectError(f"loadbalancer {url}: {refusal.message}")
    if refusal.final:
        return error_reply(refusal.status, "loadbalancer_refused", f"loadbalancer {url}: {refusal.message}")
    if refusal.code == TOO_MANY_UNUSED:
        return error_reply(429, TOO_MANY_UNUSED, refusal.message, max(1.0, refusal.retry_after_s))
    return error_reply(503, "no_capacity", refusal.message, max(1.0, refusal.retry_after_s))


def _last_word(last: Reply | httpx2.RequestError) -> Reply:
    """What is said when there is nothing left to try."""
    if not isinstance(last, Reply):
        raise last
    if last.status != 401:
        return last
    # Passed on it would say that the user's key is wrong.
    return error_reply(503, "token_refused", f"{last.lease} refused its token", 1.0)


def is_last(chunk: bytes) -> bool:
    """Whether the piece of a stream ends with its last event: openai stops reading there."""
    return chunk.endswith((b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n"))


def error_reply(
    status: int, code: str, message: str, retry_after_s: float | None = None, field: str | None = None
) -> Reply:
    """An answer of our own in the shape of OpenAI's errors. field: what of the request is wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    said = {"error": {"message": message, "type": kind, "param": field, "code": code}}
    body = json.dumps(said).encode()
    headers = [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
    if retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % -(-retry_after_s // 1)))
    return Reply(status, b"", headers, body=body)


def kept_reply(status: int, reason: bytes, headers: Iterable[Header], body: bytes) -> Reply:
    """An answer that has been read to its end."""
    kept = [(name, value) for name, value in returned(headers) if name.lower() != b"content-length"]
    kept.append((b"Content-Length", b"%d" % len(body)))
    return Reply(status, reason, kept, body=body)
