"""One request up to the first byte of an answer: which instance it is sent to next, and when to stop.

    request ─► lease at hand, or AcquireLease ─► Send ─► answer, passed on as it comes
                ▲                                  │ no connection, wrong certificate, 401, 429, 503
                └──────────────────────────────────┘ before the first byte of an answer, and never after

`attempt` decides, and neither reads a clock nor opens anything: it is a generator that yields what to do next
and is sent what came of it, and the time. Times are seconds of the caller's monotonic clock, so a clock that
is wrong changes nothing.

A request never goes back to an instance that has failed it while there are others: each question, and each
look at the leases at hand, names all that it has tried, also when the lease had been fetched ahead.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from fleet_client.back_off import back_off_s
from fleet_client.call import Call
from fleet_client.lease_keeper import LeaseKeeper
from fleet_client.leases import PAUSE_S, ClientLease, Refusal, route_body
from fleet_client.reply import HttpReply, error_reply
from fleet_client.tls_pins import BadAddress, context_for

ELSEWHERE = frozenset((401, 429, 503))
"""Statuses that say "not taken": the token was refused, or the engine has no room or is not there."""

AVOID_WAIT_S = 3.0
"""Longest hold, in seconds, of a request that avoids an instance; then it takes any, rather than none."""

UNREACHABLE_S = 15.0
"""Seconds for which a silent loadbalancer is asked again: one that restarts is back in about 1 s, on a busy
machine in 5. The time for which it held the request, as it was asked to, is no silence."""

ROUTE_SLACK_S, NEARER_SLACK_S = 5.0, 1.0
"""Seconds POST /route may take beyond the wait that was asked for: usually, and with a lease at hand."""

FIRST_BYTE_S, FIRST_BYTE_FACTOR, SLOW_TOKEN_S = 30.0, 10.0, 0.5
"""Seconds for the first byte of an answer beside ten times the expected ones, and half a second for each
token of an answer that comes in one piece: more than a busy machine takes, far below a program's 600 s."""

LATE = "first_byte"
"""The word for an instance whose answer did not begin in that time."""

TOO_MANY_UNUSED = "too_many_unused"
"""The loadbalancer's word for a client that has taken many leases that it has not used."""


PROMPT_TOO_LONG = "prompt_too_long"
"""The loadbalancer's word for a prompt that the model can never take."""


NOT_THERE = "its operator must start it, or the right address be given"
"""What can be done about a loadbalancer that does not answer."""


@dataclass(frozen=True, slots=True)
class Setback:
    """A request that was sent to an instance got no answer.

    why: one word for the loadbalancer. elsewhere: the engine never saw the prompt. again: the connection was
    kept alive and may have been closed before the request got there.
    """

    why: str
    error: httpx2.RequestError
    elsewhere: bool
    again: bool = False


class NoLoadbalancer(httpx2.ConnectError):
    """The loadbalancer did not answer; no instance is to blame."""


@dataclass(frozen=True, slots=True)
class AcquireLease:
    """A step: ask POST /route for a lease, and send back the ClientLease or Refusal.

    hold_s: how long the body lets it hold the request. slack_s: seconds that it may take beyond that.
    """

    body: dict[str, Any]
    hold_s: float
    slack_s: float = ROUTE_SLACK_S


@dataclass(frozen=True, slots=True)
class Send:
    """A step: send the request with a lease, if `again` on a new connection; send back what came of it.

    That is an HttpReply or a Setback. first_byte_s: give it up when the answer has not begun by then, a
    streamed one with its first part; None: wait for as long as its program does.
    """

    lease: ClientLease
    again: bool
    first_byte_s: float | None = None

    def sooner_than(self, read_s: float | None) -> float | None:
        """Return first_byte_s where that is less than the time a program would wait (read_s), else None."""
        limit_s = self.first_byte_s
        return limit_s if limit_s is not None and (read_s is None or limit_s < read_s) else None


@dataclass(frozen=True, slots=True)
class Rest:
    """A step: wait for so many seconds."""

    seconds: float


Step = AcquireLease | Send | Rest
Came = ClientLease | Refusal | HttpReply | Setback | None
"""What came of a step."""

Attempt = Generator[Step, tuple[Came, float], HttpReply]
"""Is sent what came of a step, and the time then."""


def attempt(call: Call, leases: LeaseKeeper, now: float, rng: random.Random) -> Attempt:
    """Serve one request up to the first byte of its answer: yield steps, be sent what came of them.

    Returns the answer; raises httpx2's errors.
    """
    options = leases.options
    acquirer = LeaseAcquirer(call, leases, rng)
    last: HttpReply | httpx2.RequestError | None = None
    patient = False  # limited once: a fleet that is slow as a whole would be made slower
    for left in reversed(range(options.max_tries)):
        lease, now = yield from acquirer.acquire(now)
        if isinstance(lease, Refusal):
            return _last_word(last) if last is not None else _no_lease(lease, options.url)
        call.note_lease()
        limit_s = None if patient or not left else first_byte_s(call, lease)
        came, now = yield from _try(lease, now, limit_s)
        if isinstance(came, HttpReply):
            if came.status not in ELSEWHERE:
                leases.note_answer(call, came)
                return came
            why = f"status_{came.status}"
            last = came
        else:
            why = came.why
            last = came.error
            patient = patient or why == LATE
        call.note_setback(lease, why)
        leases.tell(lease, "failed", why)
        if isinstance(came, Setback) and not came.elsewhere:
            raise came.error
        acquirer.avoid(lease, impostor=why == "wrong_certificate")
    assert last is not None  # noqa: S101 there was a try
    return _last_word(last)


class LeaseAcquirer:
    """Gets the leases of one request, one for each try, and keeps which instances to avoid."""

    def __init__(self, call: Call, leases: LeaseKeeper, rng: random.Random) -> None:
        """Begin before the first try of a request. rng: jitter of the pauses."""
        self._call = call
        self._leases = leases
        self._rng = rng
        self._stocked = leases.may_take(call)
        self._first = True
        self._priority = call.priority or leases.options.priority
        self._avoid = list(call.avoid)  # failed this request, the last one last
        self._impostors: set[int] = set()  # those that had another certificate
        given_s, wait_s = call.timeouts.pool, leases.options.wait_s
        self._left_s = wait_s if given_s is None else min(wait_s, given_s)

    def avoid(self, lease: ClientLease, *, impostor: bool) -> None:
        """Give this request no further lease on the instance of that lease, while there are others.

        impostor: not even when there are no others.
        """
        self._avoid.append(lease.instance_id)
        if impostor:
            self._impostors.add(lease.instance_id)

    def acquire(self, now: float) -> Generator[Step, tuple[Came, float], tuple[ClientLease | Refusal, float]]:
        """Yield steps until there is a lease or there can be none; return (lease or Refusal, the time)."""
        look = self._stocked
        if self._first:
            self._first = False
            here, look = self._leases.first(self._call, now) if self._stocked else (None, False)
            if here is not None:
                return here, now
            if look:
                said, now = yield from self._ask(0.0, NEARER_SLACK_S, now)
                if isinstance(said, ClientLease):
                    return said, now
        if look and (here := self._leases.another(self._call, self._avoid, now)) is not None:
            return here, now
        said, now = yield from self._wait(now)
        if isinstance(said, Refusal) and self._stocked:
            # Some may have come in the meantime.
            here = self._leases.another(self._call, self._avoid, now)
            return (said if here is None else here), now
        return said, now

    def _wait(self, now: float) -> Generator[Step, tuple[Came, float], tuple[ClientLease | Refusal, float]]:
        """Ask the loadbalancer until there is a lease or the time for it is up.

        When all instances that are left are to be avoided they are tried again, but for the impostors.
        """
        impostors = self._impostors
        silent_s = min(self._left_s, UNREACHABLE_S)
        refusals = 0
        while True:
            forgettable = not impostors.issuperset(self._avoid)
            hold_s = min(self._left_s, AVOID_WAIT_S) if forgettable else self._left_s
            begun = now
            said, now = yield from self._ask(hold_s, ROUTE_SLACK_S, now)
            if isinstance(said, ClientLease) or said.final:
                return said, now
            refusals += 1
            pause_s = back_off_s(refusals, *PAUSE_S)
            rest_s = max(said.retry_after_s, pause_s) * self._rng.uniform(1.0, 1.25)
            if said.status == 0:
                silent_s -= max(0.0, now - begun - hold_s)
                if silent_s <= pause_s:
                    return said, now
                silent_s -= pause_s
            elif said.status == 503 and forgettable:
                self._avoid = [one for one in self._avoid if one in impostors]
                rest_s = 0.0
            elif rest_s >= self._left_s:
                return said, now
            if rest_s > 0.0:
                begun = now
                _, now = yield Rest(rest_s)
                self._spend(now - begun, None)

    def _ask(
        self, hold_s: float, slack_s: float, now: float
    ) -> Generator[Step, tuple[Came, float], tuple[ClientLease | Refusal, float]]:
        call, begun = self._call, now
        body = route_body(call.size, hold_s, self._avoid, affinity=call.affinity, priority=self._priority)
        said, now = yield AcquireLease(body, hold_s, slack_s)
        assert isinstance(said, ClientLease | Refusal)  # noqa: S101 what AcquireLease gives
        self._spend(now - begun, said)
        if hold_s == 0.0:
            self._leases.note_route_time(now - begun)
        if self._stocked and isinstance(said, ClientLease):
            self._leases.refill()
        return said, now

    def _spend(self, seconds: float, said: ClientLease | Refusal | None) -> None:
        self._left_s = max(0.0, self._left_s - seconds)
        self._call.note_wait(seconds, said)


def first_byte_s(call: Call, lease: ClientLease) -> float | None:
    """Return the seconds after which an answer that has not begun will hardly come; None: not known.

    An answer in one piece begins when its last token is made, so it must be known how many those may be.
    """
    if lease.first_token_s is None:
        return None
    limit_s = FIRST_BYTE_S + FIRST_BYTE_FACTOR * lease.first_token_s
    if call.streamed:
        return limit_s
    most = call.size.max_tokens
    return None if most is None else limit_s + SLOW_TOKEN_S * most


def _try(
    lease: ClientLease, now: float, limit_s: float | None
) -> Generator[Step, tuple[Came, float], tuple[HttpReply | Setback, float]]:
    """Send the request to one instance; return (its answer or the setback, the time)."""
    try:
        context_for(lease.address, lease.certificate)
        _check_origin(lease.address)
    except ValueError as e:
        return Setback("bad_address", httpx2.ConnectError(f"{lease}: {e}"), elsewhere=True), now
    came, now = yield Send(lease, again=False, first_byte_s=limit_s)
    assert isinstance(came, HttpReply | Setback)  # noqa: S101 what Send gives
    if not isinstance(came, Setback) or not came.again:
        return came, now
    second, now = yield Send(lease, again=True)
    if isinstance(second, HttpReply) and second.status != 401:
        return second, now
    # The first one may have been taken, so this request is over, whatever became of the second.
    return Setback(came.why, came.error, elsewhere=False), now


def _check_origin(address: str) -> None:
    parts = urlsplit(address)
    if parts.path or parts.query or parts.fragment or parts.username is not None or not parts.hostname:
        raise BadAddress("no address of the form https://HOST:PORT")


def _no_lease(refusal: Refusal, url: str) -> HttpReply:
    """Return the answer for a request without a lease; raise NoLoadbalancer if that did not answer."""
    if refusal.status == 0:
        raise NoLoadbalancer(f"loadbalancer {url} does not answer ({refusal.message}): {NOT_THERE}")
    if refusal.code == PROMPT_TOO_LONG:
        return error_reply(refusal.status, "context_length_exceeded", refusal.message)
    if refusal.status == 401:
        keys = "api_key= of the transport, --client-key-file of the gateway, or FLEET_CLIENT_KEY"
        message = f"loadbalancer {url} wants another key than it was given, {keys}: {refusal.message}"
        return error_reply(401, "loadbalancer_key", message)
    if refusal.final:
        return error_reply(refusal.status, "loadbalancer_refused", f"loadbalancer {url}: {refusal.message}")
    wait_s = max(1.0, refusal.retry_after_s)
    if refusal.code == TOO_MANY_UNUSED:
        return error_reply(429, TOO_MANY_UNUSED, refusal.message, retry_after_s=wait_s)
    return error_reply(503, "no_capacity", refusal.message, retry_after_s=wait_s)


def _last_word(last: HttpReply | httpx2.RequestError) -> HttpReply:
    """Return the last instance's answer when there is nothing left to try; raise the last error."""
    if not isinstance(last, HttpReply):
        raise last
    if last.status != 401:
        return last
    # Passed on it would say that the user's key is wrong.
    return error_reply(503, "token_refused", f"{last.lease} refused its token: ask again", retry_after_s=1.0)


def is_last(chunk: bytes) -> bool:
    """Return whether a piece of a stream ends with its last event: openai stops reading there."""
    return chunk.endswith((b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n"))
