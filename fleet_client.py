"""A client's side of the fleet: an httpx2 transport that takes a lease for each request and sends it there.

    client = OpenAI(
        http_client=httpx2.Client(transport=FleetTransport("http://127.0.0.1:8200")),
        base_url="http://fleet/v1",
        api_key="x",
    )

Path, query, headers and body go as they are; where to and with which token is what the lease says:

    request ─► POST /route ─► lease ─► instance ─► its answer, passed on as it comes
                 ▲                        │ no connection, wrong certificate, 401, 429, 503
                 └────────────────────────┘ before the first byte of an answer, and never after

Always true:
- the loadbalancer is told how long a prompt is, and no byte of it;
- a prompt goes under TLS to the very certificate that the lease names, or stays on this machine;
- no proxy of the environment sees anything, and neither the user's API key nor the loadbalancer's goes to an
  instance;
- a token admits one request once, so a request whose kept-alive connection broke may be sent again with the
  same token: a 401 then says that the first one had been taken.

The upper part decides, and neither reads a clock nor opens anything: `course` is one request as a generator
that yields what to do next and is sent what came of it. Times are seconds of the caller's monotonic clock, so
a clock that is wrong changes nothing.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import re
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx2
from multidict import CIMultiDict
from yarl import URL

from fleet_wire import BadHttp, Header, Wire, Wires
from tls_pin import BadAddress, context_for

log = logging.getLogger("fleet")

BYTES_PER_TOKEN = 4
"""Of English text in the vocabularies of today's models; other languages have more tokens, up to twice."""

MEDIA_TOKENS = 1000
"""What a picture, a sound or a body that is no JSON counts: their bytes say nothing."""

MAX_TOKENS = 10_000_000
"""The most the loadbalancer takes for prompt_tokens and max_tokens."""

MAX_BODY = 64 * 2**20
"""Bytes of a request body; it is kept until the first byte of an answer, to be sent again elsewhere."""

KEPT_ANSWER = 65_536
"""Bytes that are kept of an answer that sends a request elsewhere (429, 503): it may become the last word."""

ELSEWHERE = frozenset((401, 429, 503))
"""Answers that say "not taken": the token was refused, or the engine has no room or is not there."""

AVOID_WAIT_S = 3.0
"""How long /route may hold a request that avoids an instance; then it takes any, rather than none."""

PAUSE_S = (0.1, 2.0)
"""Before /route is asked again: the first, doubling up to the second; or a longer Retry-After."""

UNREACHABLE_S = 5.0
"""A loadbalancer that does not answer is asked again for so long: one that restarts is back in about 1 s."""

ROUTE_SLACK_S, DONE_S = 5.0, 5.0
"""What POST /route may take beyond the wait that was asked for, and what POST /done may take."""

MODEL_KEEP_ALIVE_S, ROUTE_KEEP_ALIVE_S = 3.0, 60.0
"""An idle connection is used again for so long: vLLM's uvicorn closes its own after 5 s, the loadbalancer
after 120 s."""

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

PROMPT_WEIGHT = 0.1
"""Work of a prompt token for that comparison; the loadbalancer knows the model's own."""

OUTPUT_GUESS = 200
"""Output tokens of a request that sets no limit, for that comparison."""

AHEAD_AT_ONCE = 8
"""Leases asked for ahead at the same time."""

ENDS_KEPT, ENDS_AT_ONCE, CLOSE_S = 10_000, 8, 2.0
"""Ends of leases that wait to be told, those told at once, and what the last may take on close."""

MOMENT_S = 0.02
"""How long the end of an answer is waited for after its [DONE]: it was sent in the same moment."""

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
"""Headers of a connection, not of the message: RFC 9110, 7.6.1."""

_CREDENTIALS = frozenset((b"authorization", b"proxy-authorization", b"api-key", b"x-api-key"))
_NOT_FORWARDED = HOP_BY_HOP | _CREDENTIALS | {b"host", b"content-length", b"expect"}

_METHOD, _TARGET = re.compile(r"[A-Z]{1,20}"), re.compile(r"/[!-~]*")
_HEADER_NAME, _NO_HEADER_VALUE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"), re.compile(rb"[\r\n\0]")


# -- how long a request is -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """An estimate of a request; max_tokens is None when it sets no limit."""

    prompt_tokens: int
    max_tokens: int | None

    @property
    def work(self) -> float:
        """In output tokens, for comparing requests with each other."""
        output = OUTPUT_GUESS if self.max_tokens is None else self.max_tokens
        return self.prompt_tokens * PROMPT_WEIGHT + output


_NO_OUTPUT = (
    "/embeddings",
    "/tokenize",
    "/detokenize",
    "/rerank",
    "/score",
    "/pooling",
    "/classify",
    "/count_tokens",
)


def size_of(method: str, target: str, body: bytes) -> Size:
    """The size of a request to a model server. Token ids are counted, text is taken by its length.

    It is an estimate: whatever cannot be understood counts something, and nothing is refused here.
    """
    if method not in ("POST", "PUT") or not body:
        return Size(0, 1)
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        return Size(MEDIA_TOKENS, None)
    prompt, sequences = _prompt_of(said)
    answers = sequences * max(_whole(said.get("n")) or 1, _whole(said.get("best_of")) or 1)
    limits = [_whole(said.get(name)) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
    limit = next((n for n in limits if n is not None), None)
    if target.partition("?")[0].rstrip("/").endswith(_NO_OUTPUT):
        limit, answers = 1, 1
    return Size(
        min(MAX_TOKENS, prompt), None if limit is None else min(MAX_TOKENS, max(1, limit) * max(1, answers))
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _prompt_of(said: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens of all that goes in, number of prompts)."""
    sequences = 1
    size = 0
    prompt = said.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        sequences = len(prompt)
    for name in ("prompt", "messages", "input", "instructions", "system", "tools", "suffix"):
        value = said.get(name)
        if value is not None:
            ids, text = _weigh(value, 0)
            size += ids + -(-text // BYTES_PER_TOKEN)
    return size, sequences


def _weigh(value: object, depth: int) -> tuple[int, int]:
    """(token ids and media, bytes of text) anywhere in the value."""
    if isinstance(value, str):
        return 0, len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if depth > 20:
        return 0, 0
    ids = text = 0
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value), 0
        for one in value:
            more = _weigh(one, depth + 1)
            ids, text = ids + more[0], text + more[1]
    elif isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and (
            "image" in kind or "audio" in kind or "video" in kind or kind == "file"
        ):
            return MEDIA_TOKENS, 0
        for key, one in value.items():
            more = _weigh(one, depth + 1)
            ids, text = ids + more[0], text + more[1] + len(key)
    return ids, text


# -- what is passed on ---------------------------------------------------------------------------------


def forwarded(headers: Iterable[Header], token: str) -> list[Header]:
    """A request's headers as they go to an instance.

    Those of the connection stay behind, and so do keys: they are for others, and the token is the key here.
    """
    kept = [(name, value, name.lower()) for name, value in headers]
    named = {
        one.strip().lower() for _, value, name in kept if name == b"connection" for one in value.split(b",")
    }
    out = [(name, value) for name, value, low in kept if low not in _NOT_FORWARDED and low not in named]
    out.append((b"Authorization", b"Bearer " + token.encode()))
    return out


def returned(headers: Iterable[Header]) -> list[Header]:
    """An answer's headers without those of the connection it came by."""
    kept = [(name, value, name.lower()) for name, value in headers]
    named = {
        one.strip().lower() for _, value, name in kept if name == b"connection" for one in value.split(b",")
    }
    return [(name, value) for name, value, low in kept if low not in HOP_BY_HOP and low not in named]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Of one request, in seconds; None is no limit. pool also bounds the wait for a lease."""

    connect: float | None = None
    read: float | None = None
    write: float | None = None
    pool: float | None = None


NO_TIMEOUTS = Timeouts()


@dataclass(slots=True)
class Call:
    """One request as it is to reach an instance. target: path and query, encoded.

    Raises httpx2.LocalProtocolError for one that HTTP cannot carry.
    """

    method: str
    target: str
    headers: Sequence[Header]
    body: bytes = field(repr=False)
    size: Size
    timeouts: Timeouts = NO_TIMEOUTS
    avoid: Sequence[int] = ()  # instances that it must not go to, unless there are no others
    # What became of it:
    setbacks: list[tuple[int, str]] = field(default_factory=list)  # instances that failed it, and how
    refusals: list[str] = field(default_factory=list)  # what the loadbalancer said instead of giving a lease
    leases: int = 0
    asked_s: float = 0.0  # seconds spent on getting leases, pauses included

    def __post_init__(self) -> None:
        """Check it: a line end in a header would be a second header, or a second request."""
        if not _METHOD.fullmatch(self.method) or not _TARGET.fullmatch(self.target):
            raise httpx2.LocalProtocolError(f"no request: {self.method[:20]!r} {self.target[:100]!r}")
        for name, value in self.headers:
            if not _HEADER_NAME.fullmatch(name) or _NO_HEADER_VALUE.search(value):
                raise httpx2.LocalProtocolError(f"no header: {name[:40]!r}")


# -- leases --------------------------------------------------------------------------------------------


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
        return now < self.expires - STALE_SHARE * (self.expires - self.granted)

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


def read_route(status: int, raw: bytes, retry_after: str | None, now: float) -> Lease | Refusal:
    """What an answer of POST /route says. No part of a lease is ever in a message."""
    try:
        said = json.loads(raw)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        said = {}
    if status == 200:
        lease = _lease_in(said, now)
        return Refusal(0, "its lease cannot be read", code="bad_answer") if lease is None else lease
    message = str(said.get("message") or said.get("error") or f"status {status}")[:300]
    final = 400 <= status < 500 and status not in (408, 429)
    code = str(said.get("error") or f"http_{status}")[:40]
    return Refusal(status, message, _seconds(retry_after), final, code)


def _lease_in(said: Mapping[str, Any], now: float) -> Lease | None:
    texts = [said.get(name) for name in ("address", "request_id", "token")]
    number, life_s, certificate = (said.get(n) for n in ("instance_id", "expires_in_s", "certificate"))
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


class LeasesAhead:
    """Leases fetched before they are needed: up to `most`, for requests of typical size, none when idle."""

    def __init__(self, most: int) -> None:
        """Nothing is wanted before the first request."""
        self.most = most
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

    def take(self, size: Size, now: float) -> Lease | None:
        """A fresh lease, the one that is here longest, or None: take one of your own."""
        if self.most == 0 or self._closed:
            return None
        far = self._used_at is not None and size.work > FAR * self.typical.work + FAR_WORK
        self._learn(size)
        self._used_at = now
        if far:
            return None
        while self._ready and not self._ready[0].fresh(now):
            self._ready.rotate(-1)  # swept soon
            if not any(lease.fresh(now) for lease in self._ready):
                return None
        return self._ready.popleft() if self._ready else None

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
        """How many to ask for now; each counts as coming until `arrived` or `refused`."""
        if self._closed or self._used_at is None or now >= self._used_at + IDLE_S or now < self._retry_at:
            return 0
        fresh = sum(lease.fresh(now) for lease in self._ready)
        wanted = max(0, min(self.most - fresh, AHEAD_AT_ONCE) - self._coming)
        self._coming += wanted
        return wanted

    def arrived(self, lease: Lease, now: float) -> Lease | None:
        """One that was asked for is here; given back when nobody wants it any more."""
        self._coming -= 1
        self._pause_s = PAUSE_S[0]
        if self._closed or (self._used_at is not None and now >= self._used_at + IDLE_S):
            return lease
        self._ready.append(lease)
        return None

    def refused(self, retry_after_s: float, now: float) -> None:
        """One that was asked for does not come; ask again after a while."""
        self._coming -= 1
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
            due = min(due, min(le.expires - STALE_SHARE * (le.expires - le.granted) for le in self._ready))
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


# -- one request ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """How far to go for a request. Times in seconds."""

    max_tries: int = 4  # instances
    wait_s: float = 30.0  # for leases, all in all
    connect_s: float = (
        5.0  # for a connection: packets cross an ocean in 0.2 s, a lost SYN repeats after 1 and 3
    )

    def checked(self) -> "Rules":
        """Itself; ValueError names what cannot be."""
        for name, least, most in (("max_tries", 1, 32), ("wait_s", 0, 600), ("connect_s", 0.1, 120)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: wanted {least} to {most}, got {getattr(self, name)}")
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
    """Do: POST /route, where the body says how long it may hold it. What came: Lease or Refusal."""

    body: dict[str, Any]
    hold_s: float


@dataclass(frozen=True, slots=True)
class Send:
    """Do: send the request there, on a connection that is new if again. What came: Reply or Setback."""

    lease: Lease
    again: bool


@dataclass(frozen=True, slots=True)
class Rest:
    """Do: nothing, for so long."""

    seconds: float


Step = Ask | Send | Rest
Came = tuple[Lease | Refusal | Reply | Setback | None, float]
"""What came of a step, and the time then."""

Course = Generator[Step, Came, Reply]
Tell = Callable[[Lease, str, str], None]
"""Takes note of how a lease ended: outcome and why."""


def course(
    call: Call, rules: Rules, url: str, lease: Lease | None, tell: Tell, now: float, rng: random.Random
) -> Course:
    """One request from beginning to the first byte of an answer; raises httpx2's errors.

    lease: one that was fetched ahead. url: the loadbalancer's, for messages.
    """
    avoid = list(call.avoid)  # failed this request, the last one last
    strangers: set[int] = set()  # those that had another certificate
    last: Reply | httpx2.RequestError | None = None
    left_s = rules.wait_s if call.timeouts.pool is None else min(rules.wait_s, call.timeouts.pool)
    for _ in range(rules.max_tries):
        if lease is None:
            got, left_s, now = yield from _lease(call, avoid, strangers, left_s, now, rng)
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
        avoid.append(lease.instance_id)
        if why == "wrong_certificate":
            strangers.add(lease.instance_id)
        lease = None
    assert last is not None  # noqa: S101 there was a try
    return _last_word(last)


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


def _lease(
    call: Call,
    avoid: list[int],
    strangers: set[int],
    left_s: float,
    now: float,
    rng: random.Random,
) -> Generator[Step, Came, tuple[Lease | Refusal, float, float]]:
    """(a lease or why there is none, what is left of the wait, the time).

    When all that are left are to be avoided those are forgotten, but for the ones that are somebody else.
    """
    pause_s = PAUSE_S[0]
    silent_s = min(left_s, UNREACHABLE_S)
    while True:
        forgettable = not strangers.issuperset(avoid)
        hold_s = min(left_s, AVOID_WAIT_S) if forgettable else left_s
        begun = now
        said, now = yield Ask(route_body(call.size, hold_s, avoid), hold_s)
        assert isinstance(said, Lease | Refusal)  # noqa: S101 what Ask gives
        left_s = max(0.0, left_s - (now - begun))
        call.asked_s += now - begun
        if isinstance(said, Refusal):
            call.refusals.append(said.code)
        if isinstance(said, Lease) or said.final:
            return said, left_s, now
        rest_s = max(said.retry_after_s, pause_s) * rng.uniform(1.0, 1.25)
        if said.status == 0:
            silent_s -= now - begun
            if silent_s <= pause_s:
                return said, left_s, now
            silent_s -= pause_s
        elif said.status == 503 and forgettable:
            avoid[:] = [one for one in avoid if one in strangers]
            rest_s = 0.0
        elif rest_s >= left_s:
            return said, left_s, now
        if rest_s > 0.0:
            begun = now
            _, now = yield Rest(rest_s)
            left_s = max(0.0, left_s - (now - begun))
            call.asked_s += now - begun
        pause_s = min(PAUSE_S[1], 2.0 * pause_s)


def route_body(size: Size, wait_s: float, avoid: Sequence[int] = ()) -> dict[str, Any]:
    """The body of POST /route: sizes, and nothing of what is asked."""
    body: dict[str, Any] = {"prompt_tokens": size.prompt_tokens}
    if size.max_tokens is not None:
        body["max_tokens"] = size.max_tokens
    if wait_s > 0.0:
        body["wait_s"] = round(wait_s, 3)
    if avoid:
        body["avoid"] = list(dict.fromkeys(avoid))
    return body


def done_body(lease: Lease, outcome: str, why: str) -> dict[str, str]:
    """The body of POST /done."""
    return {"request_id": lease.request_id, "outcome": outcome} | ({"why": why} if why else {})


def _no_lease(refusal: Refusal, url: str) -> Reply:
    """The answer when there is no lease; raises when the loadbalancer did not answer."""
    if refusal.status == 0:
        raise httpx2.ConnectError(f"loadbalancer {url}: {refusal.message}")
    if refusal.final:
        return error_reply(refusal.status, "loadbalancer_refused", f"loadbalancer {url}: {refusal.message}")
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


def error_reply(status: int, code: str, message: str, retry_after_s: float | None = None) -> Reply:
    """An answer of our own in the shape of OpenAI's errors."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    said = {"error": {"message": message, "type": kind, "param": None, "code": code}}
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


# --- outside world ---------------------------------------------------------------------------------


class _Fleet:
    """What both transports are given."""

    def __init__(
        self,
        loadbalancer: str,
        api_key: str | None,
        max_tries: int,
        wait_s: float,
        ahead: int,
        connect_s: float,
        trust_network: bool,
    ) -> None:
        if not 0 <= ahead <= 256:
            raise ValueError(f"ahead: wanted 0 to 256, got {ahead}")
        self.url = loadbalancer_url(loadbalancer, trust_network=trust_network)
        self.rules = Rules(max_tries, wait_s, connect_s).checked()
        self.rng = random.Random()
        self.ahead = LeasesAhead(ahead)
        key = os.environ.get("FLEET_CLIENT_KEY") if api_key is None else api_key
        self.headers = {"Content-Type": "application/json"}
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("api_key: wanted printable ASCII")
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def connect_s(self, timeouts: Timeouts) -> float:
        given = timeouts.connect
        return self.rules.connect_s if given is None else min(given, self.rules.connect_s)


def _timeouts(request: httpx2.Request) -> Timeouts:
    given = request.extensions.get("timeout")
    if not isinstance(given, Mapping):
        return NO_TIMEOUTS
    return Timeouts(given.get("connect"), given.get("read"), given.get("write"), given.get("pool"))


def _call(request: httpx2.Request, body: bytes) -> Call:
    target = request.url.raw_path.decode("ascii")
    size = size_of(request.method, target, body)
    return Call(request.method, target, request.headers.raw, body, size, _timeouts(request))


def _too_large() -> Reply:
    return error_reply(413, "request_too_large", f"a request body may have {MAX_BODY} bytes")


def _extensions(call: Call | None, reply: Reply) -> dict[str, Any]:
    said: dict[str, Any] = {"http_version": b"HTTP/1.1", "reason_phrase": reply.reason}
    if call is not None:
        lease = reply.lease
        said["fleet"] = {
            "instance_id": None if lease is None else lease.instance_id,
            "request_id": None if lease is None else lease.request_id,
            "setbacks": tuple(call.setbacks),
        }
    return said


def _named(error: BaseException) -> str:
    """A timeout's own text is empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _not_connected(lease: Lease, error: BaseException) -> Setback:
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
    return Setback(why, httpx2.ConnectError(f"{lease}: no connection: {_named(error)}"), elsewhere=True)


# -- asyncio -------------------------------------------------------------------------------------------


class _Stage:
    """How far the request of this task has come."""

    __slots__ = ("connected", "fresh")

    def __init__(self) -> None:
        self.connected = False
        self.fresh = False


_STAGE: ContextVar[_Stage | None] = ContextVar("fleet_client_stage", default=None)


class _Connector(aiohttp.TCPConnector):
    """Notes at which stage a request is, which aiohttp's errors do not say."""

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        connection = await super().connect(req, traces, timeout)
        stage = _STAGE.get()
        if stage is not None:
            stage.connected = True
        return connection

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        made = await super()._create_connection(req, traces, timeout)
        stage = _STAGE.get()
        if stage is not None:
            stage.fresh = True
        return made


def _session(keep_alive_s: float | None) -> aiohttp.ClientSession:
    """keep_alive_s: None for a new connection each time."""
    if keep_alive_s is None:
        connector = _Connector(limit=0, force_close=True)
    else:
        connector = _Connector(limit=0, keepalive_timeout=keep_alive_s)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy from the environment must not see tokens or prompts
        auto_decompress=False,
        max_line_size=65_536,
        max_field_size=65_536,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


class Answer(httpx2.AsyncByteStream):
    """An answer of an instance: status and headers are here, its bytes come as they come.

    It must be read to its end or closed; closing it early ends the connection to the instance at once.
    """

    def __init__(
        self, call: Call, reply: Reply, tell: Tell, linger: Callable[[aiohttp.ClientResponse], None]
    ) -> None:
        """Made by `AsyncFleetTransport.exchange`."""
        self.call = call
        self.status = reply.status
        self.reason = reply.reason
        self.headers = reply.headers
        self.lease = reply.lease
        self._body = reply.body
        self._source: aiohttp.ClientResponse | None = reply.source
        self._tell = tell
        self._linger = linger
        self._chunk = b""
        self._over = reply.source is None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Its bytes, not decoded, in the pieces they come in; raises httpx2's errors."""
        if self._source is None:
            body, self._body = self._body, None
            if body:
                yield body
            return
        read = self._source.content.readany
        error: httpx2.RequestError
        while True:
            try:
                chunk = await read()
            except (aiohttp.ServerTimeoutError, TimeoutError):
                error = httpx2.ReadTimeout(f"{self.lease}: nothing came in time")
                break
            except (aiohttp.ClientError, OSError) as e:
                error = httpx2.RemoteProtocolError(f"{self.lease}: the answer broke off: {type(e).__name__}")
                break
            if not chunk:
                self._over = True
                self._source.release()
                return
            self._chunk = chunk
            yield chunk
        if not self._over:  # nobody closed it
            self.fail("read_timeout" if isinstance(error, httpx2.ReadTimeout) else "broke_off")
        raise error

    def fail(self, why: str) -> None:
        """What came is not what it must be: the loadbalancer is told that word, and no more is read."""
        self._over = True
        if self._source is not None:
            _abort(self._source)
        if self.lease is not None:
            self.call.setbacks.append((self.lease.instance_id, why))
            self._tell(self.lease, "failed", why)

    async def aclose(self) -> None:
        """Done with it; the instance learns at once when it was not read to its end."""
        if self._over or self._source is None:
            return
        self._over = True
        if self._source.content.is_eof():
            self._source.release()
        elif is_last(self._chunk):
            self._linger(self._source)
        else:
            _abort(self._source)


async def _await_end(source: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(MOMENT_S):
            if await source.content.readany() == b"":
                return
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    finally:
        if not source.content.is_eof():
            _abort(source)


def _abort(source: aiohttp.ClientResponse) -> None:
    """Close the connection without waiting for TLS to say goodbye."""
    connection = source.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    source.close()


class AsyncFleetTransport(httpx2.AsyncBaseTransport):
    """For `httpx2.AsyncClient(transport=...)`, and so for `openai.AsyncOpenAI(http_client=...)`.

    It belongs to the event loop of its first request. Close it (`aclose`, or the client's) when done: leases
    that were fetched ahead go back then. asyncio.run does it for a program that forgets.
    """

    def __init__(
        self,
        loadbalancer: str = "http://127.0.0.1:8200",
        *,
        api_key: str | None = None,
        max_tries: int = 4,
        wait_s: float = 30.0,
        ahead: int = 0,
        connect_s: float = 5.0,
        trust_network: bool = False,
    ) -> None:
        """Nothing is opened before the first request; raises ValueError for what cannot be.

        api_key: a client key, where the loadbalancer wants one; default FLEET_CLIENT_KEY of the environment.
        max_tries: instances a request is tried on. wait_s: how long it may wait for leases, all in all.
        ahead: leases that are fetched before they are needed. connect_s: for a connection to an instance.
        trust_network: allow a loadbalancer over plain http elsewhere than on loopback.
        """
        self._fleet = _Fleet(loadbalancer, api_key, max_tries, wait_s, ahead, connect_s, trust_network)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.untold = 0  # ends of leases that the loadbalancer did not take in
        self._ends: deque[tuple[Lease, str, str]] = deque()
        self._tellers: set[asyncio.Task[None]] = set()
        self._fetchers: set[asyncio.Task[None]] = set()
        self._lingering: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._route: aiohttp.ClientSession
        self._model: aiohttp.ClientSession
        self._again: aiohttp.ClientSession

    def __repr__(self) -> str:
        """Without keys."""
        return f"<AsyncFleetTransport {self._fleet.url}{' closed' if self._closed else ''}>"

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """httpx2's own call."""
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = await self._buffer(request)
        if body is None:
            reply = _too_large()
            return httpx2.Response(
                reply.status,
                headers=list(reply.headers),
                content=reply.body,
                extensions=_extensions(None, reply),
            )
        call = _call(request, body)
        reply = await self._serve(call)
        return httpx2.Response(
            reply.status,
            headers=list(reply.headers),
            stream=Answer(call, reply, self._tell, self._linger),
            extensions=_extensions(call, reply),
        )

    async def exchange(self, call: Call) -> Answer:
        """The same without httpx2's objects: the answer from its first byte on; raises httpx2's errors."""
        return Answer(call, await self._serve(call), self._tell, self._linger)

    async def aclose(self) -> None:
        """Give back what is left, tell what is to be told (2 s at most), close every connection."""
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def _keep(self) -> None:
        """Close everything when cancelled: by `aclose`, or by asyncio.run at the end of a program."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._closed = True
            await self._finish()

    async def _finish(self) -> None:
        if self._look is not None:
            self._look.cancel()
        for task in (*self._fetchers, *self._lingering):
            task.cancel()
        await asyncio.gather(*self._fetchers, *self._lingering, return_exceptions=True)
        self._ends.extend((lease, "unused", "") for lease in self._fleet.ahead.close())
        own = [self._tell_all() for _ in range(min(len(self._ends), ENDS_AT_ONCE))]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await asyncio.gather(*self._tellers, *own, return_exceptions=True)
        self.untold += len(self._ends)
        self._ends.clear()
        for session in (self._model, self._again, self._route):
            await session.close()

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this AsyncFleetTransport is closed")
        if self._loop is None:
            self._loop = loop
            self._route = _session(ROUTE_KEEP_ALIVE_S)
            self._model = _session(MODEL_KEEP_ALIVE_S)
            self._again = _session(None)
            self._keeper = loop.create_task(self._keep())
        elif self._loop is not loop:
            raise RuntimeError(
                "this AsyncFleetTransport belongs to another event loop: make one (and its client) in each "
                "loop, or in each call of asyncio.run"
            )

    async def _buffer(self, request: httpx2.Request) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        stream = request.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 httpx2 sees to it
        async for part in stream:
            size += len(part)
            if size > MAX_BODY:
                return None
            parts.append(part)
        return b"".join(parts)

    async def _serve(self, call: Call) -> Reply:
        self._open()
        fleet = self._fleet
        now = time.monotonic()
        lease = fleet.ahead.take(call.size, now)
        self._refill()
        steps = course(call, fleet.rules, fleet.url, lease, self._tell, now, fleet.rng)
        came: Lease | Refusal | Reply | Setback | None
        try:
            step = next(steps)
            while True:
                if isinstance(step, Send):
                    came = await self._send(call, step)
                elif isinstance(step, Ask):
                    came = await self._ask(step.body, step.hold_s)
                else:
                    await asyncio.sleep(step.seconds)
                    came = None
                step = steps.send((came, time.monotonic()))
        except StopIteration as end:
            reply: Reply = end.value
            return reply

    def _linger(self, source: aiohttp.ClientResponse) -> None:
        """Wait a moment for the end of an answer whose last event was read; its connection is kept then."""
        assert self._loop is not None  # noqa: S101 there was a request
        task = self._loop.create_task(_await_end(source))
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    async def _ask(self, body: dict[str, Any], hold_s: float) -> Lease | Refusal:
        try:
            async with self._route.post(
                f"{self._fleet.url}/route",
                data=json.dumps(body),
                headers=self._fleet.headers,
                timeout=aiohttp.ClientTimeout(
                    total=hold_s + ROUTE_SLACK_S, sock_connect=self._fleet.rules.connect_s
                ),
                allow_redirects=False,
            ) as reply:
                raw = await reply.read()
                return read_route(reply.status, raw, reply.headers.get("Retry-After"), time.monotonic())
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return Refusal(0, _named(e))

    async def _send(self, call: Call, step: Send) -> Reply | Setback:
        lease, timeouts = step.lease, call.timeouts
        stage = _Stage()
        token = _STAGE.set(stage)
        session = self._again if step.again else self._model
        body: Any = call.body or None
        if body is not None and len(body) > 2**20:
            body = io.BytesIO(body)  # goes in pieces
        try:
            source = await session.request(
                call.method,
                URL(lease.address + call.target, encoded=True),
                data=body,
                headers=_texts(forwarded(call.headers, lease.token)),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._fleet.connect_s(timeouts), sock_read=timeouts.read
                ),
                ssl=context_for(lease.address, lease.certificate) or True,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return _setback(lease, stage, e)
        except BaseException:
            if not stage.connected:
                self._tell(lease, "unused", "")
            raise
        finally:
            _STAGE.reset(token)
        reason = (source.reason or "").encode("latin-1", "replace")
        if source.status not in ELSEWHERE:
            return Reply(source.status, reason, returned(source.raw_headers), source, lease=lease)
        kept = kept_reply(source.status, reason, source.raw_headers, await _read_some(source))
        kept.lease = lease
        return kept

    # -- leases ahead, and their ends

    def _refill(self) -> None:
        """Give back what is old and ask for what is missing; again when it is time to."""
        ahead, now = self._fleet.ahead, time.monotonic()
        loop = self._loop
        if loop is None or self._closed or not ahead.most:
            return
        for lease in ahead.sweep(now):
            self._tell(lease, "unused", "")
        for _ in range(ahead.want(now)):
            task = loop.create_task(self._fetch())
            self._fetchers.add(task)
            task.add_done_callback(self._fetchers.discard)
        if self._look is not None:
            self._look.cancel()
            self._look = None
        look_in_s = ahead.look_in_s(now)
        if look_in_s is not None:
            self._look = loop.call_later(look_in_s, self._refill)

    async def _fetch(self) -> None:
        ahead = self._fleet.ahead
        said: Lease | Refusal = Refusal(0, "cancelled")
        try:
            said = await self._ask(route_body(ahead.typical, 0.0), 0.0)
        finally:
            now = time.monotonic()
            if isinstance(said, Refusal):
                ahead.refused(said.retry_after_s, now)
            else:
                back = ahead.arrived(said, now)
                if back is not None:
                    self._tell(back, "unused", "")
        self._refill()

    def _tell(self, lease: Lease, outcome: str, why: str) -> None:
        if len(self._ends) >= ENDS_KEPT or self._loop is None or self._route.closed:
            self.untold += 1
            return
        self._ends.append((lease, outcome, why))
        if len(self._tellers) < ENDS_AT_ONCE:
            task = self._loop.create_task(self._tell_all())
            self._tellers.add(task)
            task.add_done_callback(self._tellers.discard)
        if outcome == "failed":
            for other in self._fleet.ahead.leave(lease.instance_id):
                self._tell(other, "unused", "")

    async def _tell_all(self) -> None:
        while self._ends:
            lease, outcome, why = self._ends.popleft()
            status = 0
            try:
                async with self._route.post(
                    f"{self._fleet.url}/done",
                    data=json.dumps(done_body(lease, outcome, why)),
                    headers=self._fleet.headers,
                    timeout=aiohttp.ClientTimeout(total=DONE_S),
                    allow_redirects=False,
                ) as reply:
                    await reply.read()
                    status = reply.status
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            finally:
                self.untold += status != 200


def _texts(headers: Iterable[Header]) -> CIMultiDict[str]:
    """As aiohttp wants them, which sends texts as UTF-8."""
    out: CIMultiDict[str] = CIMultiDict()
    for name, value in headers:
        try:
            out.add(name.decode("ascii"), value.decode())
        except UnicodeDecodeError:
            out.add(name.decode("latin-1"), value.decode("latin-1"))
    return out


def _setback(lease: Lease, stage: _Stage, error: BaseException) -> Setback:
    if not stage.connected:
        return _not_connected(lease, error)
    if isinstance(error, TimeoutError):
        return Setback("read_timeout", httpx2.ReadTimeout(f"{lease}: no answer in time"), elsewhere=False)
    said = f"{lease}: the connection broke before an answer came: {type(error).__name__}"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ClientPayloadError):
        return Setback("bad_answer", httpx2.RemoteProtocolError(said), elsewhere=False)
    return Setback("broke_off", httpx2.ReadError(said), elsewhere=False, again=not stage.fresh)


async def _read_some(source: aiohttp.ClientResponse) -> bytes:
    """The body of an answer that is not wanted, as far as it comes soon and is not long."""
    raw = b""
    try:
        async with asyncio.timeout(CLOSE_S):
            async for part in source.content.iter_any():
                raw += part
                if len(raw) > KEPT_ANSWER:
                    _abort(source)
                    return raw[:KEPT_ANSWER]
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    except BaseException:
        _abort(source)
        raise
    source.close()
    return raw


# -- threads -------------------------------------------------------------------------------------------


class _Errands:
    """The loadbalancer, as threads ask it; what can wait is done in a thread of its own."""

    def __init__(self, fleet: _Fleet) -> None:
        self._fleet = fleet
        self._key = (fleet.url, None)
        secure = fleet.url.startswith("https:")
        self._context = httpx2.create_ssl_context(trust_env=False) if secure else None
        self._headers = [(name.encode(), value.encode()) for name, value in fleet.headers.items()]
        self._wires = Wires(ROUTE_KEEP_ALIVE_S)
        self._wake = threading.Condition()
        self._ends: deque[tuple[Lease, str, str]] = deque()
        self._thread: threading.Thread | None = None
        self.closed = False

    def ask(self, body: dict[str, Any], hold_s: float) -> Lease | Refusal:
        """POST /route."""
        try:
            status, headers, raw = self._post("/route", body, hold_s + ROUTE_SLACK_S)
        except OSError as e:
            return Refusal(0, _named(e))
        after = next((v.decode("latin-1") for n, v in headers if n.lower() == b"retry-after"), None)
        return read_route(status, raw, after, time.monotonic())

    def take(self, size: Size) -> Lease | None:
        """A lease that was fetched ahead."""
        if not self._fleet.ahead.most:
            return None
        with self._wake:
            lease = self._fleet.ahead.take(size, time.monotonic())
            self._start()
        return lease

    def tell(self, lease: Lease, outcome: str, why: str) -> None:
        """Have it told."""
        with self._wake:
            if len(self._ends) < ENDS_KEPT:
                self._ends.append((lease, outcome, why))
            if outcome == "failed":
                self._ends.extend((o, "unused", "") for o in self._fleet.ahead.leave(lease.instance_id))
            self._start()

    def close(self) -> None:
        """Give back what is left and tell what is to be told, 2 s at most."""
        with self._wake:
            if self.closed:
                return
            self.closed = True
            self._ends.extend((lease, "unused", "") for lease in self._fleet.ahead.close())
            if self._ends:
                self._start()
            thread = self._thread
            self._wake.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
        with self._wake:
            self._ends.clear()
        self._wires.close()

    def _post(self, path: str, body: Mapping[str, Any], limit_s: float) -> tuple[int, list[Header], bytes]:
        wire = self._wires.take(self._key)
        if wire is None:
            wire = Wire(self._fleet.url, self._context, min(limit_s, self._fleet.rules.connect_s))
            self._wires.add(wire)
        try:
            wire.wait(limit_s)
            wire.send("POST", path, self._headers, json.dumps(body).encode())
            wire.head()
            raw = b"".join(wire.body())
        except BaseException:
            self._wires.drop(wire)
            raise
        status, headers = wire.status, wire.headers
        if wire.finish(0.0):
            self._wires.put(self._key, wire)
        else:
            self._wires.drop(wire)
        return status, headers, raw

    def _start(self) -> None:
        """Under the lock."""
        if self._thread is None or not self._thread.is_alive():  # not alive: this process is a fork
            self._thread = threading.Thread(target=self._work, name="fleet-errands", daemon=True)
            self._thread.start()
        else:
            self._wake.notify_all()

    def _work(self) -> None:
        """Until there is nothing to do."""
        ahead = self._fleet.ahead
        while True:
            with self._wake:
                now = time.monotonic()
                self._ends.extend((lease, "unused", "") for lease in ahead.sweep(now))
                wanted = 0 if self.closed else ahead.want(now)
                end = self._ends.popleft() if self._ends and not wanted else None
                if not wanted and end is None:
                    look_in_s = None if self.closed else ahead.look_in_s(now)
                    if look_in_s is None:
                        self._thread = None
                        return
                    self._wake.wait(look_in_s)
                    continue
            for _ in range(wanted):
                self._fetch()
            if end is not None:
                with contextlib.suppress(OSError):
                    self._post("/done", done_body(*end), DONE_S)

    def _fetch(self) -> None:
        ahead = self._fleet.ahead
        with self._wake:
            body = route_body(ahead.typical, 0.0)
        said = self.ask(body, 0.0)
        with self._wake:
            now = time.monotonic()
            if isinstance(said, Refusal):
                ahead.refused(said.retry_after_s, now)
            elif (back := ahead.arrived(said, now)) is not None:
                self._ends.append((back, "unused", ""))


class _SyncAnswer(httpx2.SyncByteStream):
    """The bytes of an answer as they come."""

    def __init__(self, call: Call, reply: Reply, tell: Tell, wires: Wires, owner: object) -> None:
        """owner: is not to be forgotten, and so closed, while this is read."""
        assert reply.lease is not None  # noqa: S101 it came from an instance
        self._call = call
        self._lease = reply.lease
        self._wire: Wire = reply.source
        self._tell = tell
        self._wires = wires
        self._owner = owner
        self._last = b""
        self._open = True

    def __iter__(self) -> Iterator[bytes]:
        error: httpx2.RequestError
        chunks = self._wire.body()
        while True:
            try:
                chunk = next(chunks, None)
            except TimeoutError:
                error, why = httpx2.ReadTimeout(f"{self._lease}: nothing came in time"), "read_timeout"
                break
            except (OSError, ValueError) as e:  # ValueError: it was closed in another thread
                said = f"{self._lease}: the answer broke off: {type(e).__name__}"
                error, why = httpx2.RemoteProtocolError(said), "broke_off"
                break
            if chunk is None:
                self.close()
                return
            self._last = chunk
            yield chunk
        if self._open:  # nobody closed it
            self._open = False
            self._wires.drop(self._wire)
            self._call.setbacks.append((self._lease.instance_id, why))
            self._tell(self._lease, "failed", why)
        raise error

    def close(self) -> None:
        """Done with it; a connection that was not read to its end is closed at once."""
        if not self._open:
            return
        self._open = False
        done = self._wire.complete or is_last(self._last)
        if done and self._wire.finish(MOMENT_S):
            self._wires.put((self._lease.address, self._lease.certificate), self._wire)
        else:
            self._wires.drop(self._wire)


class FleetTransport(httpx2.BaseTransport):
    """For `httpx2.Client(transport=...)`, and so for `openai.OpenAI(http_client=...)`.

    Any number of threads may use it. Close it (or the client) when done: leases that were fetched ahead go
    back then.
    """

    def __init__(
        self,
        loadbalancer: str = "http://127.0.0.1:8200",
        *,
        api_key: str | None = None,
        max_tries: int = 4,
        wait_s: float = 30.0,
        ahead: int = 0,
        connect_s: float = 5.0,
        trust_network: bool = False,
    ) -> None:
        """Nothing is opened before the first request; the arguments are those of AsyncFleetTransport."""
        self._fleet = _Fleet(loadbalancer, api_key, max_tries, wait_s, ahead, connect_s, trust_network)
        self._wires = Wires(MODEL_KEEP_ALIVE_S)
        self._errands = _Errands(self._fleet)
        # Also when it is forgotten, and at the end of the program.
        self._finalizer = weakref.finalize(self, _close_both, self._errands, self._wires)

    def __repr__(self) -> str:
        """Without keys."""
        return f"<FleetTransport {self._fleet.url}{' closed' if self._errands.closed else ''}>"

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """httpx2's own call."""
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = _buffered(request)
        call = None
        if body is None:
            reply = _too_large()
        else:
            call = _call(request, body)
            reply = self._serve(call)
        extensions = _extensions(call, reply)
        headers = list(reply.headers)
        if call is None or reply.source is None:
            return httpx2.Response(reply.status, headers=headers, content=reply.body, extensions=extensions)
        stream = _SyncAnswer(call, reply, self._errands.tell, self._wires, self)
        return httpx2.Response(reply.status, headers=headers, stream=stream, extensions=extensions)

    def close(self) -> None:
        """Give back what is left, tell what is to be told (2 s at most), close every connection."""
        self._finalizer()

    def _serve(self, call: Call) -> Reply:
        if self._errands.closed:
            raise RuntimeError("this FleetTransport is closed")
        fleet, errands = self._fleet, self._errands
        now = time.monotonic()
        steps = course(call, fleet.rules, fleet.url, errands.take(call.size), errands.tell, now, fleet.rng)
        came: Lease | Refusal | Reply | Setback | None
        try:
            step = next(steps)
            while True:
                if isinstance(step, Send):
                    came = self._send(call, step)
                elif isinstance(step, Ask):
                    came = errands.ask(step.body, step.hold_s)
                else:
                    time.sleep(step.seconds)
                    came = None
                step = steps.send((came, time.monotonic()))
        except StopIteration as end:
            reply: Reply = end.value
            return reply

    def _send(self, call: Call, step: Send) -> Reply | Setback:
        lease, timeouts = step.lease, call.timeouts
        wire = None if step.again else self._wires.take((lease.address, lease.certificate))
        if wire is None:
            try:
                context = context_for(lease.address, lease.certificate)
                wire = Wire(lease.address, context, self._fleet.connect_s(timeouts))
                self._wires.add(wire)
            except OSError as e:
                return _not_connected(lease, e)
            except BaseException:
                self._errands.tell(lease, "unused", "")
                raise
        try:
            wire.wait(timeouts.write)
            # A server may answer and close before it has read everything.
            with contextlib.suppress(ConnectionError):
                wire.send(call.method, call.target, forwarded(call.headers, lease.token), call.body)
            wire.wait(timeouts.read)
            wire.head()
        except OSError as e:
            self._wires.drop(wire)
            return _sync_setback(lease, wire, e)
        except BaseException:
            self._wires.drop(wire)
            raise
        if wire.status not in ELSEWHERE:
            return Reply(wire.status, wire.reason, returned(wire.headers), wire, lease=lease)
        body = _read_some_sync(wire)
        self._wires.drop(wire)
        kept = kept_reply(wire.status, wire.reason, wire.headers, body)
        kept.lease = lease
        return kept


def _close_both(errands: _Errands, wires: Wires) -> None:
    errands.close()
    wires.close()


def _sync_setback(lease: Lease, wire: Wire, error: OSError) -> Setback:
    if isinstance(error, TimeoutError):
        return Setback("read_timeout", httpx2.ReadTimeout(f"{lease}: no answer in time"), elsewhere=False)
    said = f"{lease}: the connection broke before an answer came: {type(error).__name__}"
    if isinstance(error, BadHttp):
        return Setback("bad_answer", httpx2.RemoteProtocolError(said), elsewhere=False)
    return Setback("broke_off", httpx2.ReadError(said), elsewhere=False, again=not wire.fresh)


def _read_some_sync(wire: Wire) -> bytes:
    """The body of an answer that is not wanted, as far as it comes soon and is not long."""
    raw = b""
    wire.wait(CLOSE_S)
    with contextlib.suppress(OSError):
        for part in wire.body():
            raw += part
            if len(raw) > KEPT_ANSWER:
                break
    return raw[:KEPT_ANSWER]


def _buffered(request: httpx2.Request) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    stream = request.stream
    assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 httpx2 sees to it
    for part in stream:
        size += len(part)
        if size > MAX_BODY:
            return None
        parts.append(part)
    return b"".join(parts)
