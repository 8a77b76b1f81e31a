"""The loadbalancer as a process: flags, Flask face, and what it asks of the autoscaler and the instances.

python loadbalancer_server.py [flags]

Everything runs on one event loop and one thread: the views, and three background coroutines.

    clockwork     every 20 ms, while nobody asks 200: fetch tokens, ask for load reports, serve who waits
    autoscaler    every second: say how busy it is, and fetch the hot set when it has changed
    ticks         every second: release what has expired

Nothing is locked because nothing is shared between threads; `Desk` refuses every other thread.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from flask import Flask, Response, jsonify

import command_line
import http_face
import private_files
import tls_pin
from command_line import Parser, server_url, within
from dispatch.allowance import MOST_UNUSED
from dispatch.line import LATE_BOUND_S
from dispatch.types import Ask, HotInstance, HotSet, Lease, Poll, Push, Refill, Usage, Waiter
from errors import InstanceError
from http_face import Answer, BadField, Held, ListOf, Number, Text, Whole
from instance_client import Ended, InstanceClient, request_id
from instance_messages import name_and_key, signer
from loadbalancer import FIRST_TOKEN_WEIGHT, LoadBalancer
from model_timing import Timing
from slo import Slo
from steady_clock import steady_clock

log = logging.getLogger("loadbalancer")

_quoted = json.encoder.encode_basestring_ascii

CLOCKWORK_S = 0.02
"""How long capacity that appears with time alone, or a thirsty stock, may go unnoticed."""

QUIET_S = 0.2
"""The same while nobody asks, waits or fails: then only reports become due, each second at most. Of an idle
core 50 looks a second took 1.2 %, because each finds cold caches (2026-11)."""

INSTANCE_TIMEOUT_S = 5.0
"""For a token batch or a load report: an instance that takes longer is as good as gone."""

AUTOSCALER_TIMEOUT_S = 3.0
"""For the hot set and the busy report."""

MAX_HOT_BODY = 32 * 2**20
"""Bytes of a hot set: 10,000 instances at about 2 kB, most of which is the certificate."""

MOST_EVENTS, MAX_REPORT_BODY = 2_000, 2**18
"""Of a report that is pushed, and its bytes; an instance that has more to say is polled."""

MAX_TOKENS, MAX_WORK, MAX_WAIT_S, MAX_AVOID = 10_000_000, 1e7, 600.0, 64
"""Bounds of a request: ten times the longest context there is; ten minutes; more than anybody retries."""

MAX_COUNT, MAX_AFFINITY = 64, 256
"""Leases in one answer, 20 kB of them; hashes of a prompt's beginnings, 65,536 tokens of it."""

PRIORITIES = {"high": 0, "normal": 1, "low": 2}

NO_FAULT = re.compile("status_4..")
"""How a request may fail through no fault of the instance: a token that is too old, a request that is wrong,
more than it can take. All else says that it refuses, times out or breaks."""

GRANT_AT_ONCE = 64
"""So many of those who wait are given leases in one turn of the loop, some 5 ms: then answers are sent and
other requests have their turn. Of a burst the first are answered before the last are given theirs."""


@dataclass(frozen=True)
class Config:
    """Everything an operator may set. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8200
    autoscaler: str = "http://127.0.0.1:8100"
    label: str = "fleet"  # names the state directory, as for the autoscaler
    state_dir: Path | None = None  # control key; default below ~/.local/state
    client_keys_file: Path | None = None  # who may call /route and /done
    operator_key_file: Path | None = None  # who may call /status and /metrics
    lease_s: float = 60.0  # a lease not started by then is void; clients start within a second or so
    max_held: int = 5000  # requests that wait at once; about 10 kB each
    poll_interval_s: float = 1.0  # age of a load report at most, with up to 200 working instances
    public_url: str | None = None  # of this server, as instances reach it: then they report by themselves
    late_lane: bool = True  # who cannot be in time any more waits behind those who can; else one line of all
    max_unused: int = MOST_UNUSED  # leases that one client may have and not have used
    late_bound_s: float = LATE_BOUND_S  # a late request waits no longer before it goes before all others
    first_token_weight: float = (
        FIRST_TOKEN_WEIGHT  # seconds of whole latency that one of first token is worth
    )
    first_token_s: float = Slo().first_token_s  # in time: the first token comes within this ...
    prompt_token_s: float = Slo().prompt_token_s  # ... and this for each token of the prompt

    def checked(self) -> "Config":
        """Itself, or ConfigError naming the flag, the value and the range."""
        within("--port", self.port, 1, 65535)
        within("--lease-s", self.lease_s, 1.0, 600.0)
        within("--max-held", self.max_held, 0, 100_000)
        within("--max-unused", self.max_unused, 1, 200_000)
        within("--poll-interval-s", self.poll_interval_s, 0.1, 60.0)
        within("--late-bound-s", self.late_bound_s, 0.0, 86_400.0)
        within("--first-token-weight", self.first_token_weight, 0.0, 1000.0)
        within("--first-token-s", self.first_token_s, 1e-3, 3600.0)
        within("--prompt-token-s", self.prompt_token_s, 0.0, 1.0)
        server_url("--autoscaler", self.autoscaler)
        if self.public_url is not None:
            server_url("--public-url", self.public_url)
        return self

    @property
    def slo(self) -> Slo:
        """What late means."""
        return Slo(self.first_token_s, self.prompt_token_s)

    def report_to(self, auth_url: str) -> str | None:
        """Where the instance with that auth_server is to send its reports, if it can reach us at all."""
        if self.public_url is not None:
            return f"{self.public_url.rstrip('/')}/report"
        # Beside us on one machine, as with a local cloud; a rented one would talk to itself.
        near = urlsplit(auth_url).hostname == "127.0.0.1" and self.host in ("127.0.0.1", "0.0.0.0")  # noqa: S104
        return f"http://127.0.0.1:{self.port}/report" if near else None


# -- the hot set, as it is told --------------------------------------------------------------------------

_HOT: dict[str, http_face.Field] = {
    "epoch": Text(1, 64),
    "version": Whole(0, 2**53),
    "model": Text(1, 200),
    "prefill_weight": Number(0.0, 100.0),
    "expected_output_tokens": Number(1.0, 1e6),
    "expected_hot_s": Number(0.0, 1e6, optional=True),
    "instances": ListOf(http_face.Mapping(), 0),  # those that there are have been read by then
}

MAX_INSTANCES = 20_000

_HOT_INSTANCE: dict[str, http_face.Field] = {
    "id": Whole(0, 2**53),
    "state": http_face.Choice(("hot", "draining")),
    "address": Text(8, 300),
    "auth_url": Text(8, 300),
    "master_token": Text(1, 200),
    "throughput_work_s": Number(1e-3, 1e9),
    "capacity_work": Number(1e-3, 1e12),
    "certificate": Text(1, tls_pin.LONGEST, optional=True),
    "timing": http_face.Mapping(optional=True),
}

_TIMING: dict[str, http_face.Field] = {
    **{name: Number(0.0, 1e6) for name in "abcdef"},
    "kv_tokens": Whole(1, 10**9),
    "max_seqs": Whole(1, 10**9),
    "step_tokens": Whole(1, 10**9),
}


SLICE_S = 0.004
"""So long is read of a hot set at a time; 10,000 new certificates take seconds in all."""


class HotReader:
    """Reads hot sets; an instance that is told as in the one before is the same object."""

    def __init__(self) -> None:
        """None has been read."""
        self._known: dict[int, tuple[dict[str, Any], HotInstance]] = {}

    def read(self, parts: Iterable[tuple[str, Any, bool]]) -> Iterator[HotSet | None]:
        """The hot set whose fields these are (http_face.json_parts); None at each step before.

        BadField names what is wrong with it.
        """
        known: dict[int, tuple[dict[str, Any], HotInstance]] = {}
        fields: dict[str, Any] = {}
        n = 0
        for name, value, entry in parts:
            if not entry:
                fields[name] = value
                continue
            told = self._told(value, n)
            if told.id in known:
                raise BadField(f"instances[{n}].id", f"{told.id} is there twice")
            if n == MAX_INSTANCES:
                raise BadField("instances", f"wanted at most {MAX_INSTANCES}")
            known[told.id] = value, told
            n += 1
            yield None
        hot = http_face.check_fields(fields, _HOT)
        self._known = known
        yield HotSet(
            epoch=hot["epoch"],
            version=hot["version"],
            model=hot["model"],
            prefill_weight=hot["prefill_weight"],
            expected_output_tokens=hot["expected_output_tokens"],
            expected_hot_s=hot.get("expected_hot_s"),
            instances=tuple(told for _, told in known.values()),
        )

    def _told(self, said: object, n: int) -> HotInstance:
        if isinstance(said, dict) and isinstance(said.get("id"), int):
            before = self._known.get(said["id"])
            if before is not None and before[0] == said:
                return before[1]
        return _parse_instance(said, f"instances[{n}].")


def _parse_instance(said: object, inside: str) -> HotInstance:
    told = http_face.check_fields(said, _HOT_INSTANCE, inside)
    certificate = told.get("certificate")
    for name in ("address", "auth_url"):
        try:
            tls_pin.check(told[name], certificate)
        except ValueError as e:
            raise BadField(f"{inside}{name}", f"{told[name][:60]!r}: {e}") from None
    try:
        key = None if certificate is None else tls_pin.public_key_sha256(certificate)
    except ValueError as e:
        raise BadField(f"{inside}certificate", str(e)) from None
    timing = told.pop("timing", None)
    if timing is not None:
        timing = Timing("told", **http_face.check_fields(timing, _TIMING, f"{inside}timing."))
    draining = told.pop("state") == "draining"
    return HotInstance(draining=draining, public_key_sha256=key, timing=timing, **told)


def parse_hot(said: object) -> HotSet:
    """The hot set in a decoded body; BadField names what is wrong with it."""
    (hot,) = (hot for hot in HotReader().read(_parts(said)) if hot is not None)
    return hot


def _parts(said: object) -> Iterator[tuple[str, Any, bool]]:
    for name, value in http_face.Mapping().check("body", said).items():
        entries = value if name == "instances" and isinstance(value, list) else None
        yield name, value if entries is None else [], False
        for one in entries or ():
            yield name, one, True


async def read_hot(reader: HotReader, raw: bytes) -> HotSet:
    """The hot set in a body, read a little at a time: meanwhile others are answered."""
    begun = time.perf_counter()
    for hot in reader.read(http_face.json_parts(raw, "instances")):
        if hot is not None:
            return hot
        if time.perf_counter() - begun > SLICE_S:
            await asyncio.sleep(0)
            begun = time.perf_counter()
    raise RuntimeError("a hot set has no end")


_PUSH: dict[str, http_face.Field] = {
    "boot_id": Text(1, 64),
    "number": Whole(0, 2**63),
    "after": Whole(0, 2**53),
    "seq": Whole(0, 2**53),
    "missed": http_face.Boolean(),
    "started": ListOf(Text(16, 16), MOST_EVENTS),
    "ended": ListOf(http_face.Mapping(), MOST_EVENTS),
    "model_up": http_face.Boolean(),
    "started_bytes": ListOf(Whole(0, 2**32), MOST_EVENTS, optional=True),
}

_ENDED: dict[str, http_face.Field] = {
    "id": Text(16, 16),
    "status": http_face.Choice(("finished", "aborted", "failed")),
    "output_tokens": Whole(0, 2**32),
}


def parse_push(said: object) -> Push:
    """What an instance says by itself; BadField names what is wrong with it."""
    told = http_face.check_fields(said, _PUSH)
    try:
        told["ended"] = [Ended(**http_face.check_fields(one, _ENDED)) for one in told["ended"]]
    except BadField:  # which one is looked for only now
        for n, one in enumerate(told["ended"]):
            http_face.check_fields(one, _ENDED, f"ended[{n}].")
        raise
    if len(told.get("started_bytes", told["started"])) != len(told["started"]):
        raise BadField("started_bytes", f"wanted {len(told['started'])} numbers, one for each that started")
    return Push(**told)


# -- the state of the process ----------------------------------------------------------------------------


class Desk:
    """The LoadBalancer, the clock, and those who are parked. Belongs to the thread that first uses it."""

    def __init__(self, balancer: LoadBalancer, clock: Callable[[], float]) -> None:
        """clock gives epoch seconds and never goes back."""
        self.clock = clock
        self.name = secrets.token_hex(8)  # of this process, for the autoscaler
        self.heard_at: float | None = (
            None  # when the autoscaler last said what is hot, or that it is still so
        )
        self._balancer = balancer
        self.stirred = asyncio.Event()  # something has happened after which there may be errands to do
        self._parked: dict[Waiter, tuple[Held, int | None]] = {}
        self._granting = False
        self.reader = HotReader()
        self._shown: dict[int, _Shown] = {}
        self._signers: dict[str, int] = {}  # what an instance calls itself -> its id
        self._signing_keys: dict[str, str] = {}
        self._thread: int | None = None

    @property
    def balancer(self) -> LoadBalancer:
        """The LoadBalancer; raises RuntimeError in a second thread."""
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        elif self._thread != here:
            raise RuntimeError("the loadbalancer's state belongs to the thread of the event loop")
        return self._balancer

    def route(self, ask: Ask, wait_s: float, count: int | None = None) -> Answer | Held:
        """A lease, a place in the line, or why not; with count up to so many leases, and at least one."""
        balancer, now = self.balancer, self.clock()
        self.stirred.set()
        after_s = balancer.over_allowance(ask, now)
        if after_s is not None:
            return self._too_many(ask, after_s)
        if balancer.line.held:
            self.serve_waiting()
        if count is None:
            lease = balancer.route(ask, now)
            given = [] if lease is None else [lease]
        else:
            given = balancer.lease_many(ask, count, now)
        # A batch is as many requests as it is given leases, and at least one.
        for _ in range(max(1, len(given))):
            balancer.arrived(ask)
        if given:
            return self._granted(given, count, now)
        waiter = balancer.hold(ask, now + wait_s, now) if wait_s > 0.0 else None
        return self._refused(ask) if waiter is None else self._park(waiter, wait_s, count)

    def serve_waiting(self) -> None:
        """Give leases to those who wait, as far as there is capacity.

        A few now, and on a loop the others in its next turns.
        """
        if self._granting or not self.balancer.line.held:
            return
        if not self._grant():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # under another server, or in a test
                while not self._grant():
                    pass
            else:
                self._granting = True
                loop.call_soon(self._grant_on)

    def _grant_on(self) -> None:
        self._granting = False
        self.serve_waiting()

    def _grant(self) -> bool:
        """Give leases to a few of those who wait; False when there may be more for others."""
        balancer, now = self.balancer, self.clock()
        batches: list[tuple[Waiter, Lease, Held, int]] = []
        for waiter, lease in balancer.grant(now, GRANT_AT_ONCE):
            held, count = self._parked.pop(waiter)
            if count is not None and count > 1:
                batches.append((waiter, lease, held, count))
            else:
                self._deliver(held, [lease], count, now)
        done = not balancer.line.cut
        for waiter, lease, held, count in batches:
            # Of a batch the first lease is as any; the others are for what those who wait leave.
            more = balancer.lease_many(waiter.ask, count - 1, now) if done else []
            for _ in more:
                balancer.arrived(waiter.ask)
            self._deliver(held, [lease, *more], count, now)
        return done

    def _deliver(self, held: Held, given: list[Lease], count: int | None, now: float) -> None:
        held.answer(self._granted(given, count, now), partial(self._take_back, given))

    def hot_set(self, hot: HotSet) -> bool:
        """Take over a hot set; False when it is older than what is known."""
        now = self.clock()
        before, model = (self.balancer.epoch, self.balancer.version), self.balancer.model
        if not self.balancer.replace_hot(hot, now):
            return False
        self.heard_at = now
        self.stirred.set()
        if hot.model != model:
            self._shown.clear()
        named = {i.id: name_and_key(i.master_token) for i in hot.instances}
        self._signers = {name: i for i, (name, _) in named.items()}
        self._signing_keys = dict(named.values())
        self._shown = {i: shown for i, shown in self._shown.items() if i in named}
        if before != (hot.epoch, hot.version):
            draining = sum(i.draining for i in hot.instances)
            log.info(
                "hot set %s/%d: %d hot, %d draining",
                hot.epoch[:8],
                hot.version,
                len(hot.instances) - draining,
                draining,
            )
        self.serve_waiting()
        return True

    def report(self, raw: bytes, authorization: str | None) -> Answer:
        """An instance says by itself what has happened there."""
        name = signer(authorization, "/report", raw, self._signing_keys)
        if name is None:
            return http_face.error_answer(
                401, "unauthorized", "wanted the signature of an instance that is hot"
            )
        push = parse_push(http_face.parse_json(raw))
        instance_id = self._signers[name]
        next_in_s = self.balancer.pushed(instance_id, push, self.clock())
        if next_in_s is None:
            return http_face.error_answer(409, "not_now", "of a boot that is not known here, or heard before")
        if any(end.status == "failed" for end in push.ended):
            self.stirred.set()  # the instance may be in doubt
        if not push.model_up:
            log.warning("instance %d says that its model server is down: it gets no requests", instance_id)
        self.serve_waiting()
        return Answer({"next_in_s": round(next_in_s, 3)})

    def _park(self, waiter: Waiter, wait_s: float, count: int | None) -> Held:
        def leave() -> None:
            self._parked.pop(waiter, None)
            self.balancer.cancel(waiter)

        def late() -> Answer:
            leave()
            return self._refused(waiter.ask)

        held = Held(wait_s, late, leave)
        self._parked[waiter] = held, count
        return held

    def _take_back(self, given: list[Lease]) -> None:
        for lease in given:
            self.balancer.done(lease.request_id, "unused", self.clock())

    def _granted(self, given: list[Lease], count: int | None, now: float) -> Answer:
        """One lease, or with count several."""
        if count is None:
            shown = self._shown_of(given[0].told)
            return Answer(f"{shown.lease(given[0], _expiry(given[0], now))}{shown.certified}}}".encode())
        texts: list[str] = []
        certificates: dict[int, str] = {}
        expiries: dict[float, str] = {}  # most leases of a batch expire together
        for lease in given:
            shown = self._shown_of(lease.told)
            expiry = expiries.get(lease.expires_at)
            if expiry is None:
                expiry = expiries[lease.expires_at] = _expiry(lease, now)
            texts.append(shown.lease(lease, expiry))
            if shown.certified:
                certificates[lease.instance_id] = f'"{lease.instance_id}": {{{shown.certified[2:]}}}'
        known = ", ".join(certificates.values())
        leases = "}, ".join(texts)
        return Answer(f'{{"leases": [{leases}}}], "certificates": {{{known}}}}}'.encode())

    def _shown_of(self, told: HotInstance) -> "_Shown":
        shown = self._shown.get(told.id)
        if shown is None or shown.told is not told:
            shown = self._shown[told.id] = _Shown(told, self._balancer.model)
        return shown

    def _too_many(self, ask: Ask, after_s: float) -> Answer:
        leases, work = self.balancer.allowance.unused(ask.client)
        message = (
            f"{leases} leases of {work:.0f} work are yours and unused, and others ask, too, or it is as many "
            "as may be: use them, or give them back with POST /done"
        )
        return _again_later("too_many_unused", message, after_s, 429)

    def _refused(self, ask: Ask) -> Answer:
        why, after_s = self.balancer.refuse(ask, self.clock())
        message = {
            "nothing_hot": "no instance is hot; the fleet has been told",
            "all_busy": "every hot instance is at its capacity or not to be used; wait_s holds a request",
        }[why]
        return _again_later(why, message, after_s, 503)


def _again_later(error: str, message: str, after_s: float, status: int) -> Answer:
    said = {"error": error, "message": message, "retry_after_s": round(after_s, 1)}
    return Answer(said, status, (("Retry-After", str(math.ceil(after_s))),))


class _Shown:
    """How the leases of one instance look in JSON: what is the same in all of them is put together once.

    An encoder takes 25 µs for a lease with its certificate, this takes 2 (2026-11).
    """

    def __init__(self, told: HotInstance, model: str) -> None:
        """For leases of that instance, by that model."""
        self.told = told
        self.certified = ""
        self._head = f'{{"address": {_quoted(told.address)}, "token": '
        self._middle = f', "instance_id": {told.id}, "model": {_quoted(model)}, "expires_at": '
        if told.certificate is not None:
            key = json.dumps(told.public_key_sha256)
            self.certified = f', "certificate": {_quoted(told.certificate)}, "public_key_sha256": {key}'

    def lease(self, lease: Lease, expiry: str) -> str:
        """Everything but the certificate and the closing brace. expiry: see `_expiry`."""
        # A request id is hex digits, so it needs no escapes.
        return f'{self._head}{_quoted(lease.token)}, "request_id": "{lease.request_id}"{self._middle}{expiry}'


def _expiry(lease: Lease, now: float) -> str:
    """When and in how long the lease expires, as it stands behind the rest in JSON."""
    return f'{round(lease.expires_at, 3)!r}, "expires_in_s": {round(lease.expires_at - now, 3)!r}'


# -- the face --------------------------------------------------------------------------------------------

_ROUTE: dict[str, http_face.Field] = {
    "prompt_tokens": Whole(0, MAX_TOKENS, optional=True),
    "max_tokens": Whole(1, MAX_TOKENS, optional=True),
    "work": Number(1e-3, MAX_WORK, optional=True),
    "wait_s": Number(0.0, MAX_WAIT_S, optional=True),
    "avoid": ListOf(Whole(0, 2**53), MAX_AVOID, optional=True),
    "affinity": ListOf(
        Text(8, 32, form=(re.compile("[0-9a-f]*"), "hex digits a-f")), MAX_AFFINITY, optional=True
    ),
    "priority": http_face.Choice(tuple(PRIORITIES), optional=True),
    "count": Whole(1, MAX_COUNT, optional=True),
}

_DONE: dict[str, http_face.Field] = {
    "request_id": Text(1, 64),
    "outcome": http_face.Choice(("finished", "failed", "unused")),
    "why": Text(0, 40, optional=True),
}


@dataclass(frozen=True)
class Keys:
    """Who may call what. With no client or operator key those routes are open, which is for loopback only."""

    control: str
    clients: frozenset[str] = frozenset()
    operator: frozenset[str] = frozenset()


def create_app(desk: Desk, keys: Keys) -> Flask:
    """The routes. Views check, act and answer; what is decided is decided in `loadbalancer.py`."""
    app = http_face.make_app("loadbalancer", large_bodies={"/hot": MAX_HOT_BODY, "/report": MAX_REPORT_BODY})
    operator = http_face.requires(lambda: keys.operator and keys.operator | {keys.control})

    @http_face.direct(app, "/route", _ROUTE, lambda: keys.clients)
    def route(said: dict[str, Any], client: str) -> Answer | Held:
        return desk.route(_ask(desk.balancer, said, client), said.get("wait_s", 0.0), said.get("count"))

    @http_face.direct(app, "/done", _DONE, lambda: keys.clients)
    def done(said: dict[str, Any], client: str) -> Answer:  # noqa: ARG001
        why = said.get("why", "")
        if not re.fullmatch(r"[a-z0-9_]*", why):
            raise BadField("why", "wanted one word of a-z, 0-9 and _: a sentence could quote a prompt")
        known = desk.balancer.done(
            said["request_id"],
            said["outcome"],
            desk.clock(),
            blame=not NO_FAULT.fullmatch(why),
            impostor=why == "wrong_certificate",
        )
        if known and said["outcome"] == "failed":
            log.warning("a client's request %s failed: %s", said["request_id"], why or "no reason given")
        desk.stirred.set()
        desk.serve_waiting()
        return Answer({})

    @http_face.signed(app, "/report")
    def report(raw: bytes, authorization: str | None) -> Answer:
        return desk.report(raw, authorization)

    @http_face.awaited(app, "PUT", "/hot", lambda: frozenset({keys.control}))
    async def hot(raw: bytes) -> Answer:
        news = desk.hot_set(await read_hot(desk.reader, raw))
        return Answer({"taken": news, "epoch": desk.balancer.epoch, "version": desk.balancer.version})

    @app.get("/status")
    @operator
    def status() -> Response:
        return jsonify(status_of(desk))

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok", hot=desk.balancer.hot)

    @app.get("/metrics")
    @operator
    def metrics() -> Response:
        return Response(metrics_text(desk), mimetype="text/plain; version=0.0.4")

    return app


def _ask(balancer: LoadBalancer, said: Mapping[str, Any], client: str) -> Ask:
    """What a checked `POST /route` body asks for."""
    work: float | None = said.get("work")
    prompt: int | None = said.get("prompt_tokens")
    max_tokens: int | None = said.get("max_tokens")
    if work is not None:
        if prompt is not None or max_tokens is not None:
            raise BadField("work", "goes alone, without prompt_tokens and max_tokens")
    elif prompt is None:
        raise BadField("prompt_tokens", "is missing (or give work)")
    return Ask(
        balancer.work_of(prompt or 0, max_tokens) if work is None else work,
        max_tokens,
        frozenset(said.get("avoid", ())),
        prompt or 0,
        tuple(said.get("affinity", ())),
        PRIORITIES[said.get("priority", "normal")],
        client,
    )


def status_of(desk: Desk) -> dict[str, Any]:
    """`GET /status`: everything but tokens and keys."""
    balancer, now = desk.balancer, desk.clock()
    usage = balancer.usage(now)
    return {
        "loadbalancer": desk.name,
        "hot_epoch": balancer.epoch,
        "hot_version": balancer.version,
        "heard_of_autoscaler_s_ago": None if desk.heard_at is None else round(now - desk.heard_at, 1),
        "model": balancer.model,
        "busy": round(usage.busy, 4),
        "demand": round(usage.demand, 4),
        "held": usage.held,
        "held_work": round(usage.held_work, 1),
        "held_late": usage.late,
        "turned_late": balancer.line.turned_late,
        "oldest_wait_s": round(usage.oldest_wait_s, 3),
        "arrivals": usage.arrivals,
        "arrived_work": round(usage.arrived_work, 1),
        "routed": balancer.routed,
        "refused": balancer.refused,
        "too_many_unused": balancer.allowance.refused,
        "ends": dict(balancer.ends),
        "instances": balancer.describe(now),
    }


def metrics_text(desk: Desk) -> str:
    """`GET /metrics` in Prometheus' text format."""
    status = status_of(desk)
    lines: list[str] = []
    for name, kind, key in (
        ("busy", "gauge", "busy"),
        ("demand", "gauge", "demand"),
        ("held", "gauge", "held"),
        ("held_work", "gauge", "held_work"),
        ("held_late", "gauge", "held_late"),
        ("turned_late_total", "counter", "turned_late"),
        ("oldest_wait_seconds", "gauge", "oldest_wait_s"),
        ("arrivals_total", "counter", "arrivals"),
        ("arrived_work_total", "counter", "arrived_work"),
        ("routed_total", "counter", "routed"),
        ("refused_total", "counter", "refused"),
        ("too_many_unused_total", "counter", "too_many_unused"),
    ):
        lines += [f"# TYPE loadbalancer_{name} {kind}", f"loadbalancer_{name} {status[key]:.9g}"]
    lines += ["# TYPE loadbalancer_hot gauge", f"loadbalancer_hot {desk.balancer.hot}"]
    lines.append("# TYPE loadbalancer_lease_ends_total counter")
    lines += [f'loadbalancer_lease_ends_total{{how="{how}"}} {n}' for how, n in status["ends"].items()]
    for name, kind, key in (
        ("unfinished", "gauge", "unfinished"),
        ("work", "gauge", "work"),
        ("capacity_work", "gauge", "capacity_work"),
        ("throughput_work_s", "gauge", "throughput_work_s"),
        ("tokens_in_stock", "gauge", "tokens_in_stock"),
        ("working_seconds_total", "counter", "working_s"),
        ("failures_total", "counter", "failures"),
    ):
        lines.append(f"# TYPE loadbalancer_instance_{name} {kind}")
        lines += [
            f'loadbalancer_instance_{name}{{instance="{i["id"]}"}} {i[key]:.9g}' for i in status["instances"]
        ]
    return "\n".join(lines) + "\n"


def busy_body(desk: Desk) -> str:
    """The body of `POST /busy`, as JSON.

    Put together by hand: for 1000 instances dicts and an encoder take 12 ms, in which nothing is answered.
    """
    balancer = desk.balancer
    usage: Usage = balancer.usage(desk.clock())
    head = json.dumps(
        {
            "loadbalancer": desk.name,
            "hot_epoch": balancer.epoch,
            "hot_version": balancer.version,
            "busy": round(usage.busy, 6),
            "demand": round(usage.demand, 6),
            "held": usage.held,
            "held_work": round(usage.held_work, 3),
            "arrivals": usage.arrivals,
            "arrived_work": round(usage.arrived_work, 3),
            "traffic": {
                "prompt_tokens": usage.arrived_prompt_tokens,
                "output_tokens": round(max(0.0, usage.arrived_output_tokens), 3),
                "in_flight": usage.in_flight,
                "late": usage.late,
                "held_prompt_tokens": usage.held_prompt_tokens,
                "oldest_wait_s": round(usage.oldest_wait_s, 3),
                "turned_late": usage.turned_late,
                "first_token_s": balancer.slo.first_token_s,
                "prompt_token_s": balancer.slo.prompt_token_s,
                "late_bound_s": balancer.line.late_bound_s,
            },
        }
    )
    instances = ",".join(
        f'"{i}":{{"unfinished":{unfinished},"work":{work:.1f},"working_s":{working_s:.3f},'
        f'"throughput_work_s":{throughput:.2f},"failures":{failures}}}'
        for i, (unfinished, work, working_s, throughput, failures) in usage.instances.items()
    )
    return f'{head[:-1]}, "instances": {{{instances}}}}}'


# --- outside world ---------------------------------------------------------------------------------


class Errands:
    """What the loadbalancer asks of instances and autoscaler; each method is a background coroutine."""

    def __init__(
        self,
        desk: Desk,
        autoscaler: str,
        control_key: str,
        report_to: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        """autoscaler: its URL. report_to: where the instance with that auth_server is to send reports."""
        self._desk = desk
        self._report_to = report_to
        self._autoscaler = autoscaler.rstrip("/")
        self._bearer = {"Authorization": f"Bearer {control_key}"}
        self._complaint: str | None = None
        self._not_answering: set[int] = set()

    async def clockwork(self) -> None:
        """Keep stocks full, reports fresh, and nobody waiting whom an instance could serve."""
        errands: set[asyncio.Task[None]] = set()

        def start(errand: Coroutine[Any, Any, None]) -> None:
            task = asyncio.create_task(errand)
            errands.add(task)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[None]) -> None:
            errands.discard(task)
            desk.stirred.set()

        desk, looks = self._desk, 1
        async with InstanceClient() as client:
            try:
                while True:
                    now = desk.clock()
                    quiet = not desk.stirred.is_set()
                    desk.stirred.clear()
                    for refill in desk.balancer.refills(now):
                        start(self._refill(client, refill))
                        quiet = False
                    for _ in range(looks):  # each looks at a part of the instances: as many as were left out
                        if polls := desk.balancer.polls(now):
                            quiet = False
                            for poll in polls:
                                start(self._poll(client, poll))
                            break  # the others in a moment, so that they do not come in bursts
                    desk.serve_waiting()
                    quiet = quiet and not desk.balancer.line.held
                    looks = round(QUIET_S / CLOCKWORK_S) if quiet else 1
                    if quiet:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(QUIET_S):
                                await desk.stirred.wait()
                    else:
                        await asyncio.sleep(CLOCKWORK_S)
            finally:
                for task in errands:
                    task.cancel()
                await asyncio.gather(*errands, return_exceptions=True)

    async def _refill(self, client: InstanceClient, refill: Refill) -> None:
        desk = self._desk
        batch = None
        try:
            told = refill.told
            batch = await client.fetch_tokens(
                told.auth_url,
                told.master_token,
                refill.count,
                INSTANCE_TIMEOUT_S,
                told.certificate,
                self._report_to(told.auth_url),
            )
        except InstanceError as e:
            self._silent(refill.instance_id, e)
        finally:  # also when we are cancelled: nobody else will say that it did not work
            if batch is None:
                desk.balancer.refill_failed(refill, desk.clock())
        if batch is not None:
            self._silent(refill.instance_id, None)
            desk.balancer.add_tokens(
                refill, batch.boot_id, batch.tokens, batch.expires_in_s, batch.load.seq, desk.clock()
            )
            desk.serve_waiting()

    async def _poll(self, client: InstanceClient, poll: Poll) -> None:
        desk = self._desk
        load = None
        try:
            told = poll.told
            load = await client.fetch_load(
                told.auth_url, told.master_token, poll.after, INSTANCE_TIMEOUT_S, told.certificate
            )
        except InstanceError as e:
            self._silent(poll.instance_id, e)
        finally:
            if load is None:
                desk.balancer.poll_failed(poll, desk.clock())
        if load is not None:
            self._silent(poll.instance_id, None)
            desk.balancer.report(poll, load, desk.clock())
            desk.serve_waiting()

    def _silent(self, instance_id: int, why: InstanceError | None) -> None:
        """Log when an instance stops answering and when it answers again, not every time between."""
        if why is not None and instance_id not in self._not_answering:
            self._not_answering.add(instance_id)
            log.warning("instance %d does not answer: %s", instance_id, why)
        elif why is None and instance_id in self._not_answering:
            self._not_answering.discard(instance_id)
            log.info("instance %d answers again", instance_id)

    async def ticks(self) -> None:
        """Release what has expired, every second."""
        while True:
            self._desk.balancer.tick(self._desk.clock())
            await asyncio.sleep(1.0)

    async def autoscaler(self) -> None:
        """Say every second how busy it is; ask what is hot at the start and when it has changed."""
        timeout = aiohttp.ClientTimeout(total=AUTOSCALER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=self._bearer) as session:
            current = False
            while True:
                begun = time.monotonic()
                try:
                    if not current:
                        await self._fetch_hot(session)
                    current = await self._report_busy(session)
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
                    current = False
                    self._complain(f"{type(e).__name__}: {e}")
                except BadField as e:
                    current = False
                    self._complain(f"its hot set cannot be used: {e}")
                else:
                    self._complain(None)
                await asyncio.sleep(max(0.05, 1.0 - (time.monotonic() - begun)))

    async def _fetch_hot(self, session: aiohttp.ClientSession) -> None:
        async with session.get(f"{self._autoscaler}/hot", allow_redirects=False) as reply:
            if reply.status == 503:
                return  # it does not know its fleet yet: what we know stays as it is
            raw = await _read(reply)
        self._desk.hot_set(await read_hot(self._desk.reader, raw))

    async def _report_busy(self, session: aiohttp.ClientSession) -> bool:
        """Report; whether the autoscaler's hot set is the one we have."""
        async with session.post(
            f"{self._autoscaler}/busy",
            data=busy_body(self._desk),
            headers={"Content-Type": "application/json"},
            allow_redirects=False,
        ) as reply:
            said = await _answer(reply)
        balancer, now = self._desk.balancer, self._desk.clock()
        told = http_face.check_fields(
            said,
            {
                "hot_epoch": Text(1, 64),
                "hot_version": Whole(0, 2**53),
                "expected_hot_s": Number(0.0, 1e6, optional=True),
            },
        )
        balancer.expect_hot(told.get("expected_hot_s"), now)
        if (balancer.epoch, balancer.version) != (told["hot_epoch"], told["hot_version"]):
            return False
        self._desk.heard_at = now
        return True

    def _complain(self, why: str | None) -> None:
        """Log when the autoscaler goes away and when it is back, not every second between."""
        if why is not None and self._complaint is None:
            log.warning("autoscaler %s: %s; the hot set stays as it is", self._autoscaler, why)
        elif why is None and self._complaint is not None:
            log.info("autoscaler %s answers again", self._autoscaler)
        self._complaint = why


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    raw = await reply.read()
    if reply.status != 200:
        raise ValueError(f"{reply.method} {reply.url.path} answered {reply.status}: {raw[:200]!r}")
    return raw


async def _answer(reply: aiohttp.ClientResponse) -> Any:
    return json.loads(await _read(reply))


def make_balancer(config: Config) -> LoadBalancer:
    """What decides, as the operator wants it."""
    return LoadBalancer(
        random.Random(),
        request_id,
        config.lease_s,
        config.max_held,
        config.poll_interval_s,
        config.slo,
        config.late_bound_s if config.late_lane else None,
        max_unused=config.max_unused,
        first_token_weight=config.first_token_weight,
    )


def serve(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C. Leases and tokens are forgotten then: clients hold what they need."""
    config = config.checked()
    clients = private_files.load_keys(config.client_keys_file)
    operator = private_files.load_keys(config.operator_key_file)
    http_face.check_bind(config.host, config.port, keys_present=bool(clients) and bool(operator))
    state_dir = private_files.make_private_dir(
        config.state_dir or private_files.default_state_dir(config.label)
    )
    keys = Keys(private_files.load_or_make_key(state_dir / "control.key"), clients, operator)
    sock = http_face.bind_socket(config.host, config.port)
    desk = Desk(make_balancer(config), steady_clock())
    errands = Errands(desk, config.autoscaler, keys.control, config.report_to)
    log.info("loadbalancer of fleet %s on http://%s:%d", config.label, config.host, config.port)
    http_face.serve(
        create_app(desk, keys),
        sock,
        background=[errands.clockwork, errands.ticks, errands.autoscaler],
        any_host=bool(clients and operator),
    )


def _parser() -> argparse.ArgumentParser:
    d = Config()
    parser = Parser(
        prog="loadbalancer_server.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="Listening off loopback needs both key files.",
    )
    add = parser.add_argument
    add("--host", default=d.host, help="address to listen on (default %(default)s)")
    add("--port", type=int, default=d.port, help="port to listen on (default %(default)s)")
    add("--autoscaler", default=d.autoscaler, metavar="URL", help="the autoscaler (default %(default)s)")
    add(
        "--label",
        default=d.label,
        help="label of the fleet, as given to the autoscaler (default %(default)s)",
    )
    add(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="holds the control key, shared with the autoscaler (default ~/.local/state/autoscaler-py/LABEL)",
    )
    add(
        "--client-keys",
        "--client-keys-file",
        dest="client_keys_file",
        type=Path,
        metavar="FILE",
        help="keys that /route and /done then want, one a line, mode 0600 (default: open on loopback)",
    )
    add(
        "--operator-key",
        "--operator-key-file",
        dest="operator_key_file",
        type=Path,
        metavar="FILE",
        help="keys that /status and /metrics then want, one a line, mode 0600 (default: open on loopback)",
    )
    add(
        "--public-url",
        metavar="URL",
        help="this server as instances reach it, so that they report by themselves "
        "(default: none but for instances on this machine)",
    )
    add(
        "--lease-s",
        type=float,
        default=d.lease_s,
        metavar="S",
        help="seconds after which a lease that was not started is void (default %(default)g)",
    )
    add(
        "--max-held",
        type=int,
        default=d.max_held,
        metavar="N",
        help="requests with wait_s that wait at once; beyond it 503 (default %(default)d)",
    )
    add(
        "--max-unused",
        type=int,
        default=d.max_unused,
        metavar="N",
        help="leases that one client may have and not have used; beyond it 429 (default %(default)d)",
    )
    add(
        "--late-lane",
        action=argparse.BooleanOptionalAction,
        default=d.late_lane,
        help="who cannot be in time any more waits behind those who can; without it all wait in one line "
        "(default --late-lane)",
    )
    for flag, default, text in (
        ("--late-bound-s", d.late_bound_s, "seconds after which a late request goes before all others"),
        (
            "--first-token-weight",
            d.first_token_weight,
            "seconds of whole latency that a second of first token is worth in a choice",
        ),
        ("--first-token-s", d.first_token_s, "in time is a first token within so many seconds"),
        ("--prompt-token-s", d.prompt_token_s, "and so many more for each token of the prompt"),
    ):
        add(flag, type=float, default=default, metavar="S", help=f"{text} (default %(default)g)")
    add(
        "--poll-interval-s",
        type=float,
        default=d.poll_interval_s,
        metavar="S",
        help="seconds between load reports of a working instance (default %(default)g)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and serve."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    serve(Config(**vars(args)))


if __name__ == "__main__":
    command_line.run_main(main)
