"""A client's side of the fleet: leases, tokens, certificates and retries under openai's own client."""

import ast
import asyncio
import gc
import gzip
import json
import logging
import random
import socket
import ssl
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import fleet_client
import http_face
import loadbalancer_server
from fleet_client import (
    Ask,
    AsyncFleetTransport,
    Call,
    FleetTransport,
    Lease,
    LeasesAhead,
    Refusal,
    Reply,
    Rest,
    Rules,
    Send,
    Setback,
    Size,
    Step,
    Timeouts,
    course,
    forwarded,
    read_route,
    size_of,
)
from tests.fake_fleet import (
    Act,
    FakeFleet,
    FakeInstance,
    FakeLoadbalancer,
    FakeServer,
    Out,
    Seen,
    fake_fleet,
    make_certificate,
)
from tests.waiting import wait_for
from tls_pin import pinned_context

ROOT = Path(__file__).parent.parent
SECRET = "the quick brown fox and his secret"
USER_KEY = "sk-the-users-own-key"
ALL = "one two three four five"


# -- how long a request is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "body", "size"),
    [
        ("/v1/completions", {"prompt": "x" * 400, "max_tokens": 50}, Size(100, 50)),
        ("/v1/completions", {"prompt": "ü" * 400}, Size(200, None)),
        ("/v1/completions", {"prompt": [5] * 300, "max_tokens": 50}, Size(300, 50)),
        ("/v1/completions", {"prompt": [[5] * 300, [6] * 200], "max_tokens": 50}, Size(500, 100)),
        ("/v1/completions", {"prompt": ["abcd", "efgh"], "max_tokens": 10, "n": 3}, Size(2, 60)),
        ("/v1/completions", {"prompt": "abcd", "max_tokens": 10, "best_of": 4}, Size(1, 40)),
        ("/v1/completions", {"prompt": "abcd", "max_tokens": 0}, Size(1, 1)),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 400}]}, Size(104, None)),
        ("/v1/chat/completions", {"messages": [], "max_completion_tokens": 7, "n": 2}, Size(0, 14)),
        ("/v1/responses", {"input": "x" * 40, "max_output_tokens": 9}, Size(10, 9)),
        ("/v1/embeddings", {"input": ["x" * 40] * 10}, Size(100, 1)),
        ("/v1/completions", {"prompt": None, "max_tokens": True}, Size(0, None)),
        ("/v1/completions", {"prompt": [1] * 10, "max_tokens": 10**15}, Size(10, 10_000_000)),
        ("/v1/completions", ["a list"], Size(1000, None)),
        ("/v1/completions", "a text", Size(1000, None)),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_request_is_sized_by_its_ids_or_the_length_of_its_text(
    target: str, body: object, size: Size
) -> None:
    assert size_of("POST", target, json.dumps(body).encode()) == size


def test_a_picture_counts_as_one_and_not_by_its_bytes() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    text = {"type": "text", "text": "x" * 400}
    body = {"messages": [{"role": "user", "content": [text, picture]}]}
    assert 1100 <= size_of("POST", "/v1/chat/completions", json.dumps(body).encode()).prompt_tokens <= 1120


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 100_000, b"--boundary\r\n"], ids=lambda b: b[:4])
def test_what_is_not_json_has_a_size_too(body: bytes) -> None:
    assert size_of("POST", "/v1/audio/transcriptions", body) in (Size(0, 1), Size(1000, None))
    assert size_of("GET", "/v1/models", body) == Size(0, 1)


def test_text_with_lone_surrogates_has_a_size() -> None:
    assert size_of("POST", "/v1/completions", b'{"prompt": "\\ud800\\ud800"}') == Size(2, None)


# -- what is passed on ---------------------------------------------------------------------------------


def test_headers_pass_but_for_keys_and_those_of_the_connection() -> None:
    headers = [
        (b"Host", b"fleet"),
        (b"Authorization", b"Bearer sk-user"),
        (b"API-Key", b"sk-user"),
        (b"X-Api-Key", b"sk-user"),
        (b"Proxy-Authorization", b"Basic x"),
        (b"Connection", b"keep-alive, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"TE", b"trailers"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"Expect", b"100-continue"),
        (b"Content-Length", b"5"),
        (b"Content-Type", b"application/json"),
        (b"X-Mine", b"a"),
        (b"X-Mine", b"b"),
    ]
    assert forwarded(headers, "TOKEN") == [
        (b"Content-Type", b"application/json"),
        (b"X-Mine", b"a"),
        (b"X-Mine", b"b"),
        (b"Authorization", b"Bearer TOKEN"),
    ]


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/", [(b"X", b"a\r\nEvil: 1")]),
        ("GET", "/", [(b"X: 1\r\nEvil", b"a")]),
        ("GET", "/", [(b"", b"a")]),
        ("GET", "/ HTTP/1.1\r\nEvil: 1", []),
        ("GET", "@evil.example/", []),
        ("GET", "http://evil.example/", []),
        ("GET /x HTTP/1.1\r\n", "/", []),
        ("", "/", []),
    ],
    ids=str,
)
def test_what_http_cannot_carry_is_refused(method: str, target: str, headers: list[Any]) -> None:
    with pytest.raises(httpx2.LocalProtocolError):
        Call(method, target, headers, b"", Size(0, 1))


# -- leases --------------------------------------------------------------------------------------------


def lease(number: int = 1, granted: float = 0.0, life_s: float = 60.0, **more: Any) -> Lease:
    said: dict[str, Any] = {
        "address": "http://127.0.0.1:1",
        "request_id": f"r{number}",
        "instance_id": number,
        "granted": granted,
        "expires": granted + life_s,
        "token": "TOKEN",
        "certificate": None,
    }
    return Lease(**(said | more))


def test_a_lease_counts_from_its_arrival_and_no_clock_of_the_loadbalancer_matters() -> None:
    said = {
        "address": "https://1.2.3.4:5/",
        "token": "T",
        "request_id": "r",
        "instance_id": 7,
        "model": "m",
        "expires_at": -1e9,
        "expires_in_s": 60,
        "certificate": "PEM",
    }
    got = read_route(200, json.dumps(said).encode(), None, 1000.0)
    assert got == Lease("https://1.2.3.4:5", "r", 7, 1000.0, 1060.0, "T", "PEM")
    assert isinstance(got, Lease)
    assert [got.fresh(now) for now in (1000.0, 1041.9, 1042.1, 1061.0)] == [True, True, False, False]
    assert "PEM" not in repr(got)
    assert "'T'" not in repr(got)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"address": "http://127.0.0.1:1", "token": "T\\r\\nX: 1", "request_id": "r", "instance_id": 1, '
        b'"expires_in_s": 1}',
        b'{"address": "http://127.0.0.1:1", "token": "T", "request_id": "r", "instance_id": 1, '
        b'"expires_in_s": 1, "certificate": 5}',
        b'{"address": "http://127.0.0.1:1", "token": "T", "request_id": "r", "instance_id": "1"}',
    ],
    ids=range(6),
)
def test_a_lease_that_cannot_be_read_is_none_and_is_not_shown(raw: bytes) -> None:
    assert read_route(200, raw, None, 0.0) == Refusal(0, "its lease cannot be read")


def test_a_refusal_says_what_the_loadbalancer_said() -> None:
    raw = b'{"error": "all_busy", "message": "all are busy", "retry_after_s": 3}'
    assert read_route(503, raw, "3", 0.0) == Refusal(503, "all are busy", 3.0)
    assert read_route(503, b"<html>", "Fri, 31 Dec", 0.0) == Refusal(503, "status 503", 0.0)
    assert read_route(401, b'{"error": "unauthorized"}', None, 0.0) == Refusal(401, "unauthorized", 0.0, True)
    assert read_route(429, b"{}", "1e9", 0.0) == Refusal(429, "status 429", 600.0)


# -- leases ahead --------------------------------------------------------------------------------------

SMALL = Size(100, 50)


def test_leases_are_fetched_ahead_from_the_first_request_on_and_used_oldest_first() -> None:
    ahead = LeasesAhead(3)
    assert (ahead.want(0.0), ahead.look_in_s(0.0)) == (0, None)
    assert ahead.take(SMALL, 0.0) is None
    assert (ahead.typical, ahead.want(0.0), ahead.want(0.0)) == (SMALL, 3, 0)
    for n in (1, 2, 3):
        assert ahead.arrived(lease(n), 0.1) is None
    got = ahead.take(SMALL, 0.2)
    assert got is not None
    assert got.instance_id == 1
    assert (ahead.want(0.2), len(ahead)) == (1, 2)


def test_a_lease_in_the_last_part_of_its_life_goes_back_and_is_replaced() -> None:
    ahead = LeasesAhead(2)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived(lease(1, 0.0, 10.0), 0.0)
    ahead.arrived(lease(2, 0.0, 100.0), 0.0)
    ahead.take(Size(10**6, None), 4.0)  # far above: it shows use, and takes none of these
    assert ahead.look_in_s(4.0) == pytest.approx(3.0)
    taken = ahead.take(SMALL, 7.1)
    assert taken is not None
    assert taken.instance_id == 2
    assert [one.instance_id for one in ahead.sweep(7.1)] == [1]
    assert ahead.want(7.1) == 2


def test_a_request_far_above_the_others_takes_its_own_lease_and_sways_the_mean_little() -> None:
    ahead = LeasesAhead(2)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived(lease(1), 0.0)
    assert ahead.take(Size(100_000, 4000), 0.1) is None
    assert ahead.typical.prompt_tokens <= 300
    assert ahead.take(Size(150, 60), 0.2) is not None


def test_a_client_that_sets_no_limit_asks_for_none() -> None:
    ahead = LeasesAhead(2)
    ahead.take(Size(100, None), 0.0)
    assert ahead.typical == Size(100, None)
    for _ in range(50):
        ahead.take(Size(200, 80), 0.0)
    assert ahead.typical == Size(199, 80)


def test_all_go_back_when_none_is_used_for_a_while() -> None:
    ahead = LeasesAhead(2)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived(lease(1), 0.0)
    assert ahead.look_in_s(1.0) == pytest.approx(4.0)
    assert ahead.sweep(4.9) == []
    assert ahead.want(5.0) == 0
    assert [one.instance_id for one in ahead.sweep(5.0)] == [1]
    late = lease(2)
    assert ahead.arrived(late, 5.1) is late
    assert ahead.look_in_s(5.2) is None


def test_after_a_refusal_it_asks_later_and_later_and_not_before_it_is_told() -> None:
    ahead = LeasesAhead(1)
    ahead.take(SMALL, 0.0)
    assert ahead.want(0.0) == 1
    ahead.refused(0.0, 0.0)
    assert ahead.look_in_s(0.0) == pytest.approx(0.1)
    assert (ahead.want(0.09), ahead.want(0.11)) == (0, 1)
    ahead.refused(2.0, 0.2)
    assert (ahead.want(2.1), ahead.want(2.21)) == (0, 1)
    ahead.arrived(lease(1), 2.3)
    ahead.take(SMALL, 2.3)
    assert ahead.want(2.3) == 1


def test_an_instance_that_failed_keeps_no_lease_ahead_and_a_close_gives_all_back() -> None:
    ahead = LeasesAhead(3)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    for n in (1, 2, 1):
        ahead.arrived(lease(n), 0.0)
    assert [one.instance_id for one in ahead.leave(1)] == [1, 1]
    assert ahead.want(0.0) == 2
    assert [one.instance_id for one in ahead.close()] == [2]
    late = lease(3)
    assert ahead.arrived(late, 0.1) is late
    assert (ahead.take(SMALL, 0.1), ahead.want(0.1)) == (None, 0)


def test_no_leases_ahead_are_the_default() -> None:
    ahead = LeasesAhead(0)
    assert ahead.take(SMALL, 0.0) is None
    assert (ahead.want(0.0), ahead.look_in_s(0.0)) == (0, None)


# -- one request, without a network --------------------------------------------------------------------


class World:
    """Answers the steps of a course from a list, and keeps what was done."""

    def __init__(self, *came: Any, step_s: float = 0.0, rules: Rules | None = None, **more: Any) -> None:
        self.steps: list[Step] = []
        self.told: list[tuple[int, str, str]] = []
        self.call = Call("POST", "/v1/x", [], b"", SMALL, **more)
        self.now = 0.0
        self._came = list(came)
        self._step_s = step_s
        self._rules = rules or Rules()

    def run(self, ahead: Lease | None = None) -> Reply:
        steps = course(self.call, self._rules, "http://lb", ahead, self.tell, self.now, random.Random(1))
        try:
            step = next(steps)
            while True:
                self.steps.append(step)
                if isinstance(step, Rest):
                    self.now += step.seconds
                    step = steps.send((None, self.now))
                else:
                    self.now += self._step_s
                    came = self._came.pop(0)
                    if callable(came):
                        came = came(step, self)
                    step = steps.send((came, self.now))
        except StopIteration as end:
            assert not self._came
            reply: Reply = end.value
            return reply

    def tell(self, one: Lease, outcome: str, why: str) -> None:
        self.told.append((one.instance_id, outcome, why))

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [step.body for step in self.steps if isinstance(step, Ask)]


OK = Reply(200, b"OK", [])
REFUSED = Setback("no_connection", httpx2.ConnectError("instance 1"), elsewhere=True)
STRANGER = Setback("wrong_certificate", httpx2.ConnectError("instance 1"), elsewhere=True)
BROKE = Setback("broke_off", httpx2.ReadError("instance 1"), elsewhere=False)
STALE = Setback("broke_off", httpx2.ReadError("instance 1"), elsewhere=False, again=True)
BUSY = Refusal(503, "busy", 1.0)


def held(step: Step, world: World) -> Refusal:
    """A loadbalancer that holds a request as long as it may and then says no."""
    assert isinstance(step, Ask)
    world.now += step.hold_s
    return BUSY


def test_a_request_takes_a_lease_and_is_sent() -> None:
    world = World(lease(1), OK)
    assert world.run() is OK
    assert world.steps == [
        Ask({"prompt_tokens": 100, "max_tokens": 50, "wait_s": 30.0}, 30.0),
        Send(lease(1), again=False),
    ]
    assert world.told == []


def test_a_lease_fetched_ahead_costs_no_step() -> None:
    world = World(OK)
    assert world.run(lease(5)) is OK
    assert world.steps == [Send(lease(5), again=False)]


@pytest.mark.parametrize("came", [REFUSED, STRANGER, *(Reply(n, b"", []) for n in (401, 429, 503))], ids=str)
def test_what_was_not_taken_goes_elsewhere_and_is_told(came: Reply | Setback) -> None:
    why = came.why if isinstance(came, Setback) else f"status_{came.status}"
    world = World(lease(1), came, lease(2), OK)
    assert world.run() is OK
    assert [body.get("avoid") for body in world.asked] == [None, [1]]
    assert world.told == [(1, "failed", why)]
    assert world.call.setbacks == [(1, why)]


@pytest.mark.parametrize("status", [200, 204, 400, 404, 413, 422, 500, 502])
def test_every_other_answer_is_the_answer(status: int) -> None:
    reply = Reply(status, b"", [])
    assert World(lease(1), reply).run() is reply


def test_what_may_have_been_taken_is_not_sent_again() -> None:
    world = World(lease(1), BROKE)
    with pytest.raises(httpx2.ReadError):
        world.run()
    assert world.told == [(1, "failed", "broke_off")]


@pytest.mark.parametrize("second", [Reply(401, b"", []), REFUSED, BROKE, STALE, STRANGER], ids=str)
def test_after_a_broken_kept_alive_connection_a_second_failure_is_the_first_one(
    second: Reply | Setback,
) -> None:
    world = World(lease(1), STALE, second)
    with pytest.raises(httpx2.ReadError):
        world.run()
    assert world.steps[1:] == [Send(lease(1), again=False), Send(lease(1), again=True)]
    assert world.told == [(1, "failed", "broke_off")]


def test_after_a_broken_kept_alive_connection_the_same_token_may_still_be_served() -> None:
    world = World(lease(1), STALE, OK)
    assert world.run() is OK
    assert world.told == []


def test_tries_are_bounded_and_the_last_answer_is_passed_on() -> None:
    full = Reply(429, b"", [])
    world = World(*[one for n in range(3) for one in (lease(n), full)], rules=Rules(max_tries=3))
    assert world.run() is full
    assert world.asked[2]["avoid"] == [0, 1]


def test_refused_tokens_are_not_passed_on_as_the_users_fault() -> None:
    reply = World(lease(1), Reply(401, b"", []), rules=Rules(max_tries=1)).run()
    assert reply.status == 503
    assert reply.body is not None
    assert b"refused its token" in reply.body


def test_waiting_for_leases_is_bounded_and_keeps_to_retry_after() -> None:
    world = World(BUSY, Refusal(503, "busy", 4.0), held)
    reply = world.run()
    assert reply.status == 503
    assert (b"Retry-After", b"1") in reply.headers
    rests = [step.seconds for step in world.steps if isinstance(step, Rest)]
    assert len(rests) == 2
    assert 1.0 <= rests[0] <= 1.25
    assert 4.0 <= rests[1] <= 5.0
    assert world.now == pytest.approx(30.0, abs=0.01)
    assert world.call.asked_s == pytest.approx(30.0, abs=0.01)
    assert len(world.call.refusals) == 3
    assert world.asked[-1]["wait_s"] == pytest.approx(30.0 - sum(rests), abs=0.01)


def test_a_retry_after_beyond_the_wait_is_the_users_to_wait_for() -> None:
    world = World(Refusal(503, "nothing hot", 90.0))
    reply = world.run()
    assert (reply.status, world.now) == (503, 0.0)
    assert (b"Retry-After", b"90") in reply.headers


def test_the_timeout_for_a_connection_of_the_pool_also_bounds_the_wait_for_a_lease() -> None:
    world = World(held, timeouts=Timeouts(pool=2.0))
    assert world.run().status == 503
    assert world.asked[0]["wait_s"] == 2.0


def test_instances_to_avoid_are_forgotten_when_there_are_no_others() -> None:
    world = World(lease(1), REFUSED, held, lease(1), OK)
    assert world.run() is OK
    assert [(body["wait_s"], body.get("avoid")) for body in world.asked] == [
        (30.0, None),
        (3.0, [1]),
        (27.0, None),
    ]


def test_an_instance_that_is_somebody_else_is_not_forgotten() -> None:
    world = World(lease(1), STRANGER, held)
    with pytest.raises(httpx2.ConnectError, match="instance 1"):
        world.run()
    assert world.asked[1] == {"prompt_tokens": 100, "max_tokens": 50, "wait_s": 30.0, "avoid": [1]}


def test_without_a_lease_for_another_try_the_last_answer_counts() -> None:
    full = Reply(503, b"", [])
    world = World(lease(1), full, Refusal(401, "no key", final=True))
    assert world.run() is full


def test_a_loadbalancer_that_is_silent_is_asked_again_for_a_while() -> None:
    silent = Refusal(0, "ConnectionRefusedError")
    world = World(silent, silent, lease(1), OK)
    assert world.run() is OK
    assert 0.3 <= world.now <= 0.4
    world = World(*[silent] * 6)
    with pytest.raises(httpx2.ConnectError, match="loadbalancer http://lb: ConnectionRefused"):
        world.run()
    assert 3.0 <= world.now <= 7.0


def test_a_key_that_the_loadbalancer_refuses_is_the_users_to_set_right() -> None:
    reply = World(Refusal(401, "this route needs a key", final=True)).run()
    assert reply.status == 401
    assert reply.body is not None
    said = json.loads(reply.body)["error"]
    assert said["message"] == "loadbalancer http://lb: this route needs a key"
    assert said["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("address", "certificate"),
    [
        ("http://8.8.8.8:80", None),
        ("http://8.8.8.8:80", "PEM"),
        ("https://8.8.8.8:443", None),
        ("https://8.8.8.8:443", "no certificate"),
        ("http://127.0.0.1:80/path", None),
        ("http://user@127.0.0.1:80", None),
        ("http://127.0.0.1:80?x", None),
        ("ftp://127.0.0.1:80", None),
        ("127.0.0.1:80", None),
        ("http://127.0.0.1.evil.example:80", None),
    ],
)
def test_an_address_that_prompts_must_not_go_to_is_never_sent_to(
    address: str, certificate: str | None
) -> None:
    world = World(lease(1, address=address, certificate=certificate), lease(2), OK)
    assert world.run() is OK
    assert world.told == [(1, "failed", "bad_address")]
    world = World(
        lease(1, address=address, certificate=certificate), held, rules=Rules(wait_s=1.0, max_tries=1)
    )
    world._came.pop()
    with pytest.raises(httpx2.ConnectError, match="instance 1"):
        world.run()


@pytest.mark.parametrize(
    "wrong", [{"max_tries": 0}, {"wait_s": -1}, {"wait_s": float("nan")}, {"connect_s": 0}, {"ahead": 257}]
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    for kind in (FleetTransport, AsyncFleetTransport):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: wanted"):
            kind(**wrong)


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8200", "ftp://x", "http://127.0.0.1:8200/route", "http://u:p@127.0.0.1", "http://[::1"],
)
def test_a_wrong_loadbalancer_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="wanted http://HOST:PORT"):
        FleetTransport(url)


def test_leases_do_not_travel_in_the_clear_unless_the_network_is_trusted() -> None:
    with pytest.raises(ValueError, match="leases in the clear"):
        AsyncFleetTransport("http://10.0.0.1:8200")
    AsyncFleetTransport("http://10.0.0.1:8200", trust_network=True)
    AsyncFleetTransport("https://lb.example")
    FleetTransport("http://[::1]:8200/").close()


def test_the_part_above_the_line_reads_no_clock_and_opens_nothing() -> None:
    source = (ROOT / "fleet_client.py").read_text().split("# --- outside world ---")[0]
    used = {
        node.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not used & {"os", "socket", "select", "threading", "asyncio", "time", "aiohttp", "httptools"}


# -- with a network ------------------------------------------------------------------------------------


class Threads:
    """A user of the synchronous transport."""

    def __init__(self, url: str, key: str = USER_KEY, **more: Any) -> None:
        self.transport = FleetTransport(url, **more)
        self.http = httpx2.Client(transport=self.transport, timeout=httpx2.Timeout(20.0, pool=None))
        self.openai = openai.OpenAI(
            http_client=self.http, api_key=key, base_url="http://fleet/v1", max_retries=0
        )

    def chat(self, **more: Any) -> Any:
        return self.openai.chat.completions.create(**(_chat() | more))

    def completion(self, **more: Any) -> Any:
        return self.openai.completions.create(**({"model": "m", "prompt": SECRET} | more))

    def stream(self, **more: Any) -> str:
        return "".join(part.choices[0].delta.content for part in self.chat(stream=True, **more))

    def models(self) -> list[str]:
        return [one.id for one in self.openai.models.list()]

    def request(self, method: str, target: str, **more: Any) -> httpx2.Response:
        return self.http.request(method, f"http://fleet{target}", **more)

    def begin(self) -> Callable[[], None]:
        """Read a stream's first token; what it returns closes it."""
        stream = self.chat(stream=True)
        next(stream)
        return lambda: stream.close()

    def close(self) -> None:
        self.http.close()


class Loop:
    """A user of the asynchronous transport; its loop runs in a thread."""

    def __init__(self, url: str, key: str = USER_KEY, **more: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.transport = AsyncFleetTransport(url, **more)
        self.http = httpx2.AsyncClient(transport=self.transport, timeout=httpx2.Timeout(20.0, pool=None))
        self.openai = openai.AsyncOpenAI(
            http_client=self.http, api_key=key, base_url="http://fleet/v1", max_retries=0
        )

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    def chat(self, **more: Any) -> Any:
        return self.do(self.openai.chat.completions.create(**(_chat() | more)))

    def completion(self, **more: Any) -> Any:
        return self.do(self.openai.completions.create(**({"model": "m", "prompt": SECRET} | more)))

    def stream(self, **more: Any) -> str:
        async def read() -> str:
            stream = await self.openai.chat.completions.create(stream=True, **(_chat() | more))
            return "".join([part.choices[0].delta.content async for part in stream])

        text: str = self.do(read())
        return text

    def models(self) -> list[str]:
        async def read() -> list[str]:
            return [one.id async for one in self.openai.models.list()]

        names: list[str] = self.do(read())
        return names

    def request(self, method: str, target: str, **more: Any) -> httpx2.Response:
        response: httpx2.Response = self.do(self.http.request(method, f"http://fleet{target}", **more))
        return response

    def begin(self) -> Callable[[], None]:
        stream = self.chat(stream=True)
        self.do(stream.__anext__())
        return lambda: self.do(stream.close())

    def close(self) -> None:
        if self._thread.is_alive():
            self.do(self.http.aclose())
            self.do(self._finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _finish(self) -> None:
        """Nothing of the transport's is left to run."""
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        assert not left, left


User = Threads | Loop
Make = Callable[..., User]


def _chat() -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": SECRET}]}


@pytest.fixture(params=[Threads, Loop], ids=["threads", "asyncio"])
def user(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes users, and closes them."""
    users: list[User] = []

    def make(url: str, **more: Any) -> User:
        made: User = request.param(url, **more)
        users.append(made)
        return made

    yield make
    for one in users:
        one.close()


@pytest.fixture
def fleet() -> Iterator[FakeFleet]:
    """Two instances with TLS."""
    made = fake_fleet()
    yield made
    made.stop()


def told(fleet: FakeFleet, count: int = 1) -> list[tuple[str, str]]:
    """How leases ended, once so many were told."""
    dones = fleet.loadbalancer.dones
    wait_for(f"{count} ends of leases", lambda: len(dones) >= count)
    return sorted((one["outcome"], one.get("why", "")) for one in dones)


def plan(fleet: FakeFleet, *acts: Act) -> None:
    """Whichever instances the next requests come to, they do this, in this order."""
    left = list(acts)
    for instance in fleet.instances:

        async def act(seen: Seen, out: Out, model: Act = instance.model) -> None:
            await (left.pop(0) if left else model)(seen, out)

        instance.plan.clear()
        instance.plan.extend([act] * len(acts))


def says(status: int, body: object = None, **headers: str) -> Act:
    async def act(seen: Seen, out: Out) -> None:
        await out.answer(
            status, {"error": {"message": f"status {status}"}} if body is None else body, headers
        )

    return act


async def hang_up(seen: Seen, out: Out) -> None:
    """End the connection without a word."""
    out.abort()


async def silent(seen: Seen, out: Out) -> None:
    """Say nothing."""
    await out.gone.wait()


async def break_off(seen: Seen, out: Out) -> None:
    """Begin an answer and end the connection."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    await out.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n')
    out.abort()


async def stall(seen: Seen, out: Out) -> None:
    """Begin an answer and say no more."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    await out.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n')
    await out.gone.wait()


def test_openai_works_unchanged(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    assert one.chat().choices[0].message.content == ALL
    assert one.completion().choices[0].text == ALL
    assert one.stream() == ALL
    assert one.models() == ["m"]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    called = one.chat(tools=[tool]).choices[0].message.tool_calls[0].function
    assert (called.name, called.arguments) == ("weather", '{"city": "Ulm"}')
    assert len(fleet.loadbalancer.routes) == len(fleet.requests) == 5
    assert {seen.target for seen in fleet.requests} == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
    }


def test_no_byte_of_a_prompt_reaches_the_loadbalancer_and_no_key_an_instance(
    user: Make, fleet: FakeFleet
) -> None:
    fleet.loadbalancer.key = "key-of-the-client"
    one = user(fleet.url, api_key="key-of-the-client")
    one.chat(max_tokens=77, extra_headers={"X-Mine": "1", "Api-Key": USER_KEY})
    seen = fleet.requests[0]
    assert SECRET.encode() in seen.body
    assert seen.header("x-mine") == "1"
    assert seen.header("authorization") == f"Bearer {fleet.loadbalancer.given[0].token}"
    assert seen.header("host") in [one.address.removeprefix("https://") for one in fleet.instances]
    assert fleet.loadbalancer.routes == [{"prompt_tokens": 13, "max_tokens": 77, "wait_s": 30.0}]
    for secret in (SECRET, USER_KEY):
        assert secret.encode() not in fleet.loadbalancer.received
    for secret in (USER_KEY, "key-of-the-client"):
        assert not any(secret.encode() in instance.received for instance in fleet.instances)


def test_path_query_and_headers_go_as_they_are(user: Make, fleet: FakeFleet) -> None:
    async def echo(seen: Seen, out: Out) -> None:
        headers = {"X-Two": "ü", "Connection": "X-Hop", "X-Hop": "1", "Set-Cookie": "a=b"}
        await out.answer(418, seen.target.encode(), headers)

    plan(fleet, echo)
    response = user(fleet.url).request("PUT", "/v1/a%2Fb/c?x=%20&y=1;z", content=b"\x00\xff")
    assert (response.status_code, response.content) == (418, b"/v1/a%2Fb/c?x=%20&y=1;z")
    assert response.headers["set-cookie"] == "a=b"
    assert "x-hop" not in response.headers
    assert fleet.requests[0].body == b"\x00\xff"
    assert response.extensions["fleet"]["instance_id"] in (1, 2)
    assert response.extensions["fleet"]["setbacks"] == ()


def test_other_methods_and_answers_without_a_body_work_too(user: Make, fleet: FakeFleet) -> None:
    async def nothing(seen: Seen, out: Out) -> None:
        await out.raw(b"HTTP/1.1 204 No Content\r\n\r\n")

    async def head(seen: Seen, out: Out) -> None:
        await out.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")

    async def until_closed(seen: Seen, out: Out) -> None:
        await out.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        out.close()

    async def early_hints(seen: Seen, out: Out) -> None:
        await out.raw(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        await out.answer(200, b"hello")

    packed = says(200, gzip.compress(b"packed"), **{"Content-Encoding": "gzip"})
    one = user(fleet.url)
    plan(fleet, nothing, head, until_closed, packed)
    assert one.request("DELETE", "/v1/x").status_code == 204
    response = one.request("HEAD", "/v1/x")
    assert (response.headers["content-length"], response.content) == ("1000", b"")
    assert one.request("GET", "/v1/x").content == b"all of it"
    assert one.request("GET", "/v1/x").content == b"packed"
    plan(fleet, early_hints)
    assert one.request("GET", "/v1/x").content == b"hello"


def test_a_stream_arrives_token_by_token(user: Make, fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    close = user(fleet.url).begin()  # returns with the first token, the second is a minute away
    close()


def test_connections_are_kept_alive_also_after_streams(user: Make) -> None:
    fleet = fake_fleet(1)
    try:
        one = user(fleet.url)
        for _ in range(5):
            assert one.stream() == ALL
            wait_for("the end of the stream", lambda: fleet.instances[0].streams == 0)
            one.chat()
        assert fleet.instances[0].connections == 1
        assert fleet.loadbalancer.connections == 1
    finally:
        fleet.stop()


# -- retries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_an_instance_without_room_sends_it_elsewhere(user: Make, fleet: FakeFleet, status: int) -> None:
    plan(fleet, says(status, **{"Retry-After": "7"}))
    assert user(fleet.url).stream() == ALL
    assert [body.get("avoid") for body in fleet.loadbalancer.routes] == [
        None,
        [fleet.loadbalancer.given[0].instance_id],
    ]
    assert told(fleet) == [("failed", f"status_{status}")]
    assert len({seen.header("authorization") for seen in fleet.requests}) == 2


def test_a_refused_token_sends_it_elsewhere(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong[2] = {"token": "not-a-token"}
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "status_401")]


def test_the_last_answer_of_a_full_fleet_is_passed_on_as_it_is(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, *[says(429, {"error": {"message": "slow down", "code": 7}}, **{"Retry-After": "9"})] * 4)
    one = user(fleet.url, wait_s=0.2)
    with pytest.raises(openai.RateLimitError, match="slow down") as e:
        one.chat()
    assert e.value.response.headers["retry-after"] == "9"


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_an_instance_that_refuses_connections_is_left_for_another(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong[2] = {"address": f"https://127.0.0.1:{closed_port()}"}
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "no_connection")]


def test_an_instance_without_tls_is_left_for_another(user: Make, fleet: FakeFleet) -> None:
    received: list[bytes] = []

    def plain() -> None:
        connection, _ = server.accept()
        with connection:
            received.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=plain)
        thread.start()
        fleet.loadbalancer.wrong[2] = {"address": f"https://127.0.0.1:{server.getsockname()[1]}"}
        assert user(fleet.url).stream() == ALL
        thread.join(10)
    assert told(fleet) == [("failed", "no_tls")]
    assert SECRET.encode() not in received[0]


def test_an_instance_that_does_not_answer_a_connection_is_left_for_another(
    user: Make, fleet: FakeFleet
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, and never says a word of TLS
        fleet.loadbalancer.wrong[2] = {"address": f"https://127.0.0.1:{mute.getsockname()[1]}"}
        assert user(fleet.url, connect_s=0.2).stream() == ALL
    assert told(fleet) == [("failed", "no_connection")]


def test_a_wrong_certificate_is_reported_and_the_prompt_goes_elsewhere(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong[2] = {"certificate": make_certificate()[0]}
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "wrong_certificate")]
    assert fleet.instances[1].received == b""


def test_with_nothing_but_wrong_certificates_the_error_names_the_instance(
    user: Make, fleet: FakeFleet
) -> None:
    fleet.loadbalancer.wrong = {n: {"certificate": make_certificate()[0]} for n in (1, 2)}
    with pytest.raises(openai.APIConnectionError) as e:
        user(fleet.url, wait_s=0.2).chat()
    cause = e.value.__cause__
    assert isinstance(cause, httpx2.ConnectError)
    assert "does not have the certificate" in str(cause)
    assert "instance " in str(cause)
    assert [instance.received for instance in fleet.instances] == [b"", b""]


def test_no_prompt_leaves_in_the_clear_or_without_a_certificate(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {1: {"address": "http://192.0.2.1:80"}, 2: {"certificate": None}}
    with pytest.raises(openai.APIConnectionError) as e:
        user(fleet.url, wait_s=0.2, max_tries=2).chat()
    assert "instance" in str(e.value.__cause__)
    assert told(fleet, 2) == [("failed", "bad_address")] * 2
    assert fleet.instances[1].received == b""


def test_on_loopback_plain_http_will_do(user: Make) -> None:
    fleet = fake_fleet(1, tls=False)
    try:
        assert user(fleet.url).stream() == ALL
    finally:
        fleet.stop()


@pytest.mark.parametrize("days", [(-30, -20), (20, 30)], ids=["expired", "not-yet"])
def test_clocks_and_dates_do_not_matter(user: Make, days: tuple[int, int]) -> None:
    instance = FakeInstance(1, make_certificate(days))
    fleet = FakeFleet(FakeLoadbalancer([instance]), [instance])
    fleet.loadbalancer.clock_wrong_s = -300.0
    try:
        assert user(fleet.url, ahead=2).stream() == ALL
    finally:
        fleet.stop()


def test_after_the_first_byte_nothing_is_tried_again(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, break_off)
    one = user(fleet.url)
    with pytest.raises(openai.APIConnectionError) as e:
        one.stream()
    assert isinstance(e.value.__cause__, httpx2.RemoteProtocolError)
    assert told(fleet) == [("failed", "broke_off")]
    assert len(fleet.requests) == 1


def test_a_connection_that_breaks_before_the_first_byte_is_an_error_too(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, hang_up)
    with pytest.raises(openai.APIConnectionError) as e:
        user(fleet.url).chat()
    assert isinstance(e.value.__cause__, httpx2.ReadError)
    assert told(fleet) == [("failed", "broke_off")]
    assert len(fleet.requests) == 1


def test_what_is_no_http_is_an_error(user: Make, fleet: FakeFleet) -> None:
    async def nonsense(seen: Seen, out: Out) -> None:
        await out.raw(b"220 smtp.example ESMTP\r\n\r\n")

    plan(fleet, nonsense)
    with pytest.raises(openai.APIConnectionError):
        user(fleet.url).chat()
    assert told(fleet) == [("failed", "bad_answer")]


def test_a_kept_alive_connection_that_breaks_is_replaced_with_the_same_token(user: Make) -> None:
    fleet = fake_fleet(1)
    try:
        one = user(fleet.url)
        one.chat()
        fleet.instances[0].before.append(hang_up)  # its token is not taken
        assert one.chat().choices[0].message.content == ALL
        assert len(fleet.loadbalancer.routes) == 2
        first, second = (seen.header("authorization") for seen in fleet.requests[1:])
        assert first == second
        assert fleet.instances[0].connections == 2
        assert fleet.loadbalancer.dones == []
    finally:
        fleet.stop()


def test_when_the_first_copy_was_taken_the_request_is_over(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    for _ in range(2):
        one.chat()
    plan(fleet, hang_up)  # its token is taken
    with pytest.raises(openai.APIConnectionError) as e:
        one.chat()
    assert isinstance(e.value.__cause__, httpx2.ReadError)
    assert sum(instance.refused for instance in fleet.instances) == 1
    assert len(fleet.requests) == 4
    assert len(fleet.loadbalancer.routes) == 3


def test_a_connection_closed_while_it_was_idle_costs_nothing(user: Make) -> None:
    fleet = fake_fleet(1)
    instance = fleet.instances[0]

    async def answer_and_close(seen: Seen, out: Out) -> None:
        await out.answer(200, {"object": "list", "data": []})
        out.close()

    try:
        instance.plan.append(answer_and_close)
        one = user(fleet.url)
        one.models()
        wait_for("the end of the connection", lambda: all(c.transport.is_closing() for c in instance.open))
        assert one.stream() == ALL
        assert len(fleet.requests) == 2
    finally:
        fleet.stop()


def test_an_idle_connection_is_not_used_again_after_its_time(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_client, "MODEL_KEEP_ALIVE_S", 0.0)
    one = user(fleet.url)
    for _ in range(4):
        one.chat()
    assert sum(instance.connections for instance in fleet.instances) == 4


def test_a_body_that_is_streamed_is_kept_to_be_sent_again(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, says(503))
    one = user(fleet.url)
    parts = [b'{"model": "m", ', b'"prompt": "abc"}']

    async def asynchronous() -> Any:
        for part in parts:
            yield part

    content = iter(parts) if isinstance(one, Threads) else asynchronous()
    response = one.request("POST", "/v1/completions", content=content)
    assert response.json()["choices"][0]["text"] == ALL
    assert [seen.body for seen in fleet.requests] == [b"".join(parts)] * 2


def test_a_streamed_body_that_is_too_large_to_be_kept_is_refused(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_client, "MAX_BODY", 1000)
    one = user(fleet.url)

    async def asynchronous() -> Any:
        for _ in range(20):
            yield b"x" * 100

    content = iter([b"x" * 100] * 20) if isinstance(one, Threads) else asynchronous()
    response = one.request("POST", "/v1/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert fleet.loadbalancer.routes == []


def test_a_large_body_arrives_whole(user: Make, fleet: FakeFleet) -> None:
    body = json.dumps({"model": "m", "prompt": "x" * 3_000_000}).encode()
    response = user(fleet.url).request("POST", "/v1/completions", content=body)
    assert response.status_code == 200
    assert fleet.requests[0].body == body


# -- waiting and timeouts ------------------------------------------------------------------------------


def test_no_capacity_is_openais_own_503(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.refusals.append((503, 40))
    with pytest.raises(openai.InternalServerError, match="every instance is busy") as e:
        user(fleet.url, wait_s=1.0).chat()
    assert e.value.status_code == 503
    assert e.value.code == "no_capacity"
    assert e.value.response.headers["retry-after"] == "40"


def test_a_lease_is_asked_for_again_until_the_wait_is_over(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.refusals.extend([(503, 0), (503, 0)])
    assert user(fleet.url).stream() == ALL
    assert len(fleet.loadbalancer.routes) == 3


def test_a_silent_answer_ends_by_the_users_timeout_and_is_not_tried_again(
    user: Make, fleet: FakeFleet
) -> None:
    plan(fleet, silent)
    with pytest.raises(openai.APITimeoutError):
        user(fleet.url).chat(timeout=0.3)
    assert told(fleet) == [("failed", "read_timeout")]
    assert len(fleet.requests) == 1


def test_a_stalled_stream_ends_by_the_users_timeout(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, stall)
    with pytest.raises(openai.APITimeoutError):
        user(fleet.url).stream(timeout=0.3)
    assert told(fleet) == [("failed", "read_timeout")]


def test_a_loadbalancer_that_is_not_there_is_named(user: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_client, "UNREACHABLE_S", 0.2)
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(openai.APIConnectionError) as e:
        user(url).chat()
    assert f"loadbalancer {url}" in str(e.value.__cause__)


def test_a_loadbalancer_that_restarts_is_waited_for(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    one.chat()
    fleet.loadbalancer.stop()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.stream)
        second = FakeLoadbalancer(fleet.instances, port=fleet.loadbalancer.port)
        fleet.extra.append(second)
        assert answer.result(30) == ALL


def test_the_client_key_goes_to_the_loadbalancer(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.loadbalancer.key = "a-client-key"
    with pytest.raises(openai.AuthenticationError, match=r"loadbalancer http://127\.0\.0\.1.*needs a key"):
        user(fleet.url).chat()
    monkeypatch.setenv("FLEET_CLIENT_KEY", "a-client-key")
    assert user(fleet.url).stream() == ALL
    with pytest.raises(openai.AuthenticationError):
        user(fleet.url, api_key="another-key").chat()


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match=r"^api_key: wanted printable ASCII$"):
        FleetTransport(api_key="secret\r\nX: 1")


# -- privacy -------------------------------------------------------------------------------------------


def test_no_proxy_of_the_environment_sees_anything(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FakeServer()
    fleet.extra.append(proxy)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.address)
        monkeypatch.setenv(name.lower(), proxy.address)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    plan(fleet, says(503))
    assert user(fleet.url, ahead=2).stream() == ALL
    assert proxy.connections == 0


@pytest.mark.parametrize(
    "acts",
    [[hang_up], [break_off], [stall], [says(401)], [says(429)] * 4, [says(500)], [silent]],
    ids=["hang-up", "break-off", "stall", "401", "429", "500", "silent"],
)
def test_a_token_is_never_in_a_message_or_a_log(
    user: Make, fleet: FakeFleet, acts: list[Act], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("openai").setLevel(logging.INFO)  # its debug log has the prompt, which is its user's
    plan(fleet, *acts)
    one = user(fleet.url, ahead=2, wait_s=0.3, api_key="a-client-key")
    texts = [repr(one.transport), str(one.transport)]
    with suppress(openai.OpenAIError):
        one.stream(timeout=0.3)
    fleet.loadbalancer.wrong = {n: {"certificate": make_certificate()[0]} for n in (1, 2)}
    try:
        one.stream(timeout=0.3)
    except openai.OpenAIError as e:
        texts += traceback.format_exception(e)
        seen: BaseException | None = e
        while seen is not None:
            texts += [str(seen), repr(seen), repr(seen.__dict__)]
            seen = seen.__cause__ or seen.__context__
    one.close()
    texts += [record.getMessage() for record in caplog.records]
    secrets = [given.token for given in fleet.loadbalancer.given]
    assert len(secrets) >= 2
    for secret in (*secrets, "a-client-key", SECRET):
        assert not any(secret in text for text in texts)


# -- leases ahead --------------------------------------------------------------------------------------


def test_with_leases_ahead_a_request_needs_no_round_trip(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=4)
    one.stream()
    wait_for("four leases", lambda: len(fleet.loadbalancer.given) == 5)
    wait_for("all of them here", lambda: len(one.transport._fleet.ahead) == 4)
    fleet.loadbalancer.refusals.extend([(503, 60)] * 100)  # from now on there are none
    for _ in range(4):
        assert one.stream() == ALL
    used = {token for instance in fleet.instances for token in instance.used}
    assert used == {given.token for given in fleet.loadbalancer.given}


def test_leases_ahead_that_were_not_used_go_back_on_close(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=3)
    one.stream()
    wait_for("three leases", lambda: len(one.transport._fleet.ahead) == 3)
    one.close()
    used = [token for instance in fleet.instances for token in instance.used]
    ids = {given.request_id for given in fleet.loadbalancer.given if given.token not in used}
    assert {done["request_id"] for done in fleet.loadbalancer.dones} == ids
    assert len(ids) == 3
    assert {done["outcome"] for done in fleet.loadbalancer.dones} == {"unused"}
    assert {"prompt_tokens": 13} in fleet.loadbalancer.routes  # what is ahead of its time does not wait there


def test_leases_ahead_go_back_when_nothing_happens_for_a_while(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_client, "IDLE_S", 0.3)
    user(fleet.url, ahead=3).stream()
    assert told(fleet, 3) == [("unused", "")] * 3


def test_leases_ahead_are_replaced_before_they_expire(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.lease_s = 0.5
    one = user(fleet.url, ahead=2)
    one.stream()
    assert told(fleet, 2)[:2] == [("unused", "")] * 2
    wait_for("new ones", lambda: len(fleet.loadbalancer.given) >= 5)


def test_leases_ahead_of_an_instance_that_failed_are_not_used(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_client, "IDLE_S", 60.0)
    one = user(fleet.url, ahead=6)
    one.stream()
    wait_for("six leases", lambda: len(one.transport._fleet.ahead) == 6)
    first = fleet.instances[0]
    ready = [given for given in fleet.loadbalancer.given if given.instance_id == first.number]
    first.plan.append(says(503))
    while first.plan:
        assert one.stream() == ALL
    unused = {given.request_id for given in ready if given.token not in first.used}
    dones = fleet.loadbalancer.dones
    wait_for("they go back", lambda: unused <= {d["request_id"] for d in dones if d["outcome"] == "unused"})
    assert told(fleet)[0] == ("failed", "status_503")


def test_the_end_of_a_program_gives_leases_back(fleet: FakeFleet) -> None:
    transport = FleetTransport(fleet.url, ahead=2)
    http = httpx2.Client(transport=transport)
    http.post("http://fleet/v1/completions", json={"prompt": "x"})
    ahead = transport._fleet.ahead
    wait_for("two leases", lambda: len(ahead) == 2)
    del http, transport
    assert told(fleet, 2) == [("unused", "")] * 2


# -- cancellation, closing, many at once ---------------------------------------------------------------


def test_closing_a_stream_ends_it_at_the_instance_at_once(user: Make, fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    close = user(fleet.url).begin()
    assert sum(instance.streams for instance in fleet.instances) == 1
    close()
    wait_for("the instance sees it", lambda: sum(instance.disconnects for instance in fleet.instances) == 1)
    assert fleet.loadbalancer.dones == []


def test_a_cancelled_task_ends_its_request_at_the_instance(fleet: FakeFleet) -> None:
    one = Loop(fleet.url)
    plan(fleet, silent)

    async def cancelled() -> None:
        task = asyncio.create_task(one.openai.chat.completions.create(**_chat()))
        while not fleet.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    one.do(cancelled())
    wait_for("the connection is gone", lambda: not any(instance.open for instance in fleet.instances))
    one.close()
    assert fleet.loadbalancer.dones == []


def test_a_task_cancelled_while_it_connects_gives_its_lease_back(fleet: FakeFleet) -> None:
    one = Loop(fleet.url)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"https://127.0.0.1:{mute.getsockname()[1]}"
        fleet.loadbalancer.wrong = {n: {"address": address} for n in (1, 2)}

        async def cancelled() -> None:
            task = asyncio.create_task(one.openai.chat.completions.create(**_chat()))
            while not fleet.loadbalancer.given:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        one.do(cancelled())
        assert told(fleet) == [("unused", "")]
    one.close()


def test_a_close_does_not_wait_for_a_loadbalancer_that_hangs(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_client, "CLOSE_S", 0.2)
    one = user(fleet.url)
    plan(fleet, says(503), says(503))

    async def hang(seen: Seen, out: Out) -> None:
        if seen.target == "/done":
            await out.gone.wait()
        await FakeLoadbalancer.act(fleet.loadbalancer, seen, out)

    monkeypatch.setattr(fleet.loadbalancer, "act", hang)
    assert one.stream() == ALL  # an end that cannot be told delays nothing
    begun = time.monotonic()
    one.close()
    assert time.monotonic() - begun < 3.0


def test_a_closed_transport_says_so(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    one.chat()
    one.close()
    if isinstance(one, Threads):
        with pytest.raises(RuntimeError, match="closed"):
            one.transport.handle_request(httpx2.Request("GET", "http://fleet/v1/models"))
    else:
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(one.transport.handle_async_request(httpx2.Request("GET", "http://fleet/v1/models")))
    assert "closed" in repr(one.transport)


def test_many_threads_share_one_transport(fleet: FakeFleet) -> None:
    one = Threads(fleet.url, ahead=8)

    def work(_: int) -> list[str]:
        return [one.stream() for _ in range(8)]

    with ThreadPoolExecutor(16) as pool:
        texts = [text for texts in pool.map(work, range(16)) for text in texts]
    assert texts == [ALL] * 128
    one.close()
    tokens = [seen.header("authorization") for seen in fleet.requests]
    assert len(tokens) == len(set(tokens)) == 128
    assert sum(instance.refused for instance in fleet.instances) == 0
    ends = {done["request_id"] for done in fleet.loadbalancer.dones}
    used = {token for instance in fleet.instances for token in instance.used}
    unused = {given.request_id for given in fleet.loadbalancer.given if given.token not in used}
    assert ends == unused  # each lease was used or given back


def test_many_tasks_share_one_transport(fleet: FakeFleet) -> None:
    async def main() -> list[str]:
        async with httpx2.AsyncClient(transport=AsyncFleetTransport(fleet.url, ahead=8)) as http:
            client = openai.AsyncOpenAI(http_client=http, api_key="x", base_url="http://fleet/v1")

            async def one() -> str:
                stream = await client.chat.completions.create(stream=True, **_chat())
                return "".join([part.choices[0].delta.content async for part in stream])

            return await asyncio.gather(*[one() for _ in range(100)])

    assert asyncio.run(main()) == [ALL] * 100
    used = [token for instance in fleet.instances for token in instance.used]
    assert len(used) == 100
    unused = {given.request_id for given in fleet.loadbalancer.given if given.token not in set(used)}
    assert {done["request_id"] for done in fleet.loadbalancer.dones} == unused


def test_an_async_transport_may_be_made_outside_a_loop_but_belongs_to_one(fleet: FakeFleet) -> None:
    http = httpx2.AsyncClient(transport=AsyncFleetTransport(fleet.url))

    async def ask() -> int:
        return (await http.get("http://fleet/v1/models")).status_code

    with asyncio.Runner() as first:
        assert first.run(ask()) == 200
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(RuntimeError, match="belongs to another event loop"),
        ):
            pool.submit(asyncio.run, ask()).result(10)
        first.run(http.aclose())


def test_a_program_that_forgets_to_close_gives_leases_back_all_the_same(fleet: FakeFleet) -> None:
    async def main() -> None:
        transport = AsyncFleetTransport(fleet.url, ahead=2)
        http = httpx2.AsyncClient(transport=transport)
        assert (await http.get("http://fleet/v1/models")).status_code == 200
        while len(transport._fleet.ahead) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert [done["outcome"] for done in fleet.loadbalancer.dones] == ["unused"] * 2


def test_an_answer_that_is_forgotten_closes_its_connection(fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    with httpx2.Client(transport=FleetTransport(fleet.url)) as http:
        request = http.build_request(
            "POST", "http://fleet/v1/completions", json={"prompt": "x", "stream": True}
        )
        response = http.send(request, stream=True)
        wait_for("a stream", lambda: sum(instance.streams for instance in fleet.instances) == 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # as it should be told
            del response
            gc.collect()
        wait_for("its end", lambda: sum(instance.disconnects for instance in fleet.instances) == 1)


def test_a_redirect_is_followed_with_a_lease_of_its_own(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, says(307, b"", Location="https://evil.example/v1/models"))
    response = user(fleet.url).request("GET", "/v1/models/", follow_redirects=True)
    assert response.status_code == 200
    assert {seen.target for seen in fleet.requests} == {"/v1/models/", "/v1/models"}
    assert len(fleet.loadbalancer.given) == 2


def test_the_lower_level_call_gives_bytes_as_they_come(fleet: FakeFleet) -> None:
    async def main() -> tuple[int, bytes, int]:
        transport = AsyncFleetTransport(fleet.url)
        body = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
        call = Call("POST", "/v1/completions", [], body, Size(1, 5))
        answer = await transport.exchange(call)
        raw = b"".join([chunk async for chunk in answer])
        await answer.aclose()
        await transport.aclose()
        assert answer.lease is not None
        return answer.status, raw, answer.lease.instance_id

    status, raw, number = asyncio.run(main())
    assert (status, raw.count(b"data: "), number in (1, 2)) == (200, 6, True)


def test_a_thread_that_reads_is_ended_by_another_that_closes(fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    with httpx2.Client(transport=FleetTransport(fleet.url), timeout=30.0) as http:
        body = {"model": "m", "prompt": "x", "stream": True}
        request = http.build_request("POST", "http://fleet/v1/completions", json=body)
        response = http.send(request, stream=True)
        chunks = response.iter_raw()
        next(chunks)
        timer = threading.Timer(0.1, response.close)
        timer.start()
        with pytest.raises(httpx2.HTTPError):
            next(chunks)
        timer.join()
    assert fleet.loadbalancer.dones == []


def test_what_is_asked_of_the_loadbalancer_is_what_the_real_one_takes() -> None:
    body = fleet_client.route_body(Size(5, 7), 3.0, [1, 1, 2])
    checked = http_face.check_fields(body, loadbalancer_server._ROUTE)
    assert checked == {"prompt_tokens": 5, "max_tokens": 7, "wait_s": 3.0, "avoid": [1, 2]}
    assert http_face.check_fields(fleet_client.route_body(Size(0, None), 0.0), loadbalancer_server._ROUTE)
    for outcome, why in (("unused", ""), ("failed", "wrong_certificate")):
        assert http_face.check_fields(
            fleet_client.done_body(lease(), outcome, why), loadbalancer_server._DONE
        )


def test_the_certificate_of_an_instance_is_the_only_one_that_counts() -> None:
    """Not even one that the system's authorities vouch for would do."""
    context = pinned_context(make_certificate()[0])
    assert len(context.get_ca_certs()) <= 1
    assert context.verify_mode is ssl.CERT_REQUIRED
