"""A client's side of the fleet: leases, tokens, certificates and retries under openai's own client."""

import asyncio
import gc
import gzip
import json
import logging
import socket
import ssl
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import Any

import httpx2
import openai
import pytest

import loadbalancer_server
from fleet_client import (
    AsyncFleetTransport,
    Call,
    FleetTransport,
    Size,
    async_transport,
    leases,
    retry,
    thread_transport,
    transport,
)
from fleet_client.tls_pins import pinned_context
from tests.fake_fleet import (
    Act,
    FakeFleet,
    FakeInstance,
    FakeLoadbalancer,
    FakeServer,
    Out,
    Seen,
    fake_fleet,
    lease,
    make_certificate,
)
from tests.waiting import wait_for
from web.bodies import check_fields

SECRET = "the quick brown fox and his secret"
USER_KEY = "sk-the-users-own-key"
ALL = "one two three four five"


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tries": 0},
        {"wait_s": -1},
        {"wait_s": float("nan")},
        {"connect_s": 0},
        {"ahead": 257},
        {"priority": "urgent"},
        {"affinity_salt": b"short"},
        {"affinity_salt": ""},
    ],
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
    for module in (async_transport, thread_transport):
        monkeypatch.setattr(module, "MODEL_KEEP_ALIVE_S", 0.0)
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
    monkeypatch.setattr(transport, "MAX_BODY", 1000)
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
    monkeypatch.setattr(retry, "UNREACHABLE_S", 0.2)
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
    ahead = {"prompt_tokens": 13, "count": 3}  # all in one call, which does not wait there
    assert ahead in fleet.loadbalancer.routes


def test_leases_ahead_go_back_when_nothing_happens_for_a_while(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "IDLE_S", 0.3)
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
    monkeypatch.setattr(leases, "IDLE_S", 60.0)
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


def test_leases_ahead_come_in_one_call(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=100)
    one.stream()
    wait_for("all of them here", lambda: len(one.transport._fleet.ahead) == 100)
    assert sorted(said.get("count", 0) for said in fleet.loadbalancer.routes) == [0, 36, 64]
    for _ in range(30):
        assert one.stream() == ALL
    wait_for("a quarter more", lambda: len(one.transport._fleet.ahead) >= 90)
    assert len(fleet.loadbalancer.routes) <= 5
    tokens = [seen.header("authorization") for seen in fleet.requests]
    assert len(set(tokens)) == 31


def test_a_part_of_a_batch_is_better_than_none(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.room = 6
    one = user(fleet.url, ahead=8)
    one.stream()
    wait_for("five leases", lambda: len(one.transport._fleet.ahead) == 5)
    wait_for("another call", lambda: len(fleet.loadbalancer.routes) >= 3)
    fleet.loadbalancer.room = None
    wait_for("the others", lambda: len(one.transport._fleet.ahead) == 8)


def test_batches_work_without_tls_on_loopback(user: Make) -> None:
    fleet = fake_fleet(2, tls=False)
    try:
        one = user(fleet.url, ahead=4)
        one.stream()
        wait_for("four leases", lambda: len(one.transport._fleet.ahead) == 4)
        assert [one.stream() for _ in range(4)] == [ALL] * 4
    finally:
        fleet.stop()


@pytest.mark.parametrize("refusal", [(503, 60), (429, 60, "too_many_unused")], ids=["503", "429"])
def test_a_client_that_is_refused_leases_ahead_does_not_ask_again_before_its_time(
    user: Make, fleet: FakeFleet, refusal: Any
) -> None:
    one = user(fleet.url, ahead=2)
    one.stream()
    wait_for("two leases", lambda: len(one.transport._fleet.ahead) == 2)
    fleet.loadbalancer.refusals.append(refusal)
    one.stream()
    wait_for("a refusal", lambda: not fleet.loadbalancer.refusals)
    wait_for("it is heard", lambda: one.transport._fleet.ahead._coming == 0)
    asked = len(fleet.loadbalancer.routes)
    assert one.stream() == ALL
    time.sleep(0.3)
    assert len(fleet.loadbalancer.routes) == asked


def test_too_many_unused_leases_are_openais_own_429_with_the_time_to_wait(
    user: Make, fleet: FakeFleet
) -> None:
    fleet.loadbalancer.refusals.append((429, 40, "too_many_unused"))
    with pytest.raises(openai.RateLimitError) as e:
        user(fleet.url, wait_s=1.0).chat()
    assert e.value.code == "too_many_unused"
    assert e.value.response.headers["retry-after"] == "40"


# -- avoiding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 8], ids=["asked", "ahead"])
def test_another_try_never_goes_to_a_machine_that_was_tried(user: Make, ahead: int) -> None:
    fleet = fake_fleet(4, tls=False)
    try:
        one = user(fleet.url, ahead=ahead)
        one.stream()
        wait_for("leases ahead", lambda: len(one.transport._fleet.ahead) == ahead)
        seen = len(fleet.requests)
        plan(fleet, *[says(503)] * 3)
        assert one.stream() == ALL
        tried = [n for n, i in enumerate(fleet.instances) for _ in i.seen]
        assert len(fleet.requests) == seen + 4
        assert sorted(set(tried)) == [0, 1, 2, 3]
        failed = ("failed", "status_503")
        wait_for("three failures", lambda: told(fleet).count(failed) == 3)
    finally:
        fleet.stop()


def test_a_lease_ahead_is_not_taken_for_an_instance_that_the_call_avoids(fleet: FakeFleet) -> None:
    async def main() -> list[int]:
        transport = AsyncFleetTransport(fleet.url, ahead=6)
        body = b'{"model": "m", "prompt": "x"}'
        numbers = []
        for _ in range(5):
            call = Call("POST", "/v1/completions", [], body, Size(1, 5), avoid=(1,))
            answer = await transport.exchange(call)
            assert answer.lease is not None
            numbers.append(answer.lease.instance_id)
            async for _ in answer:
                pass
            while len(transport._fleet.ahead) < 4:
                await asyncio.sleep(0.01)
        await transport.aclose()
        return numbers

    assert asyncio.run(main()) == [2] * 5
    assert len(fleet.loadbalancer.given) > 6


def test_nor_is_one_for_another_try(fleet: FakeFleet) -> None:
    third = FakeInstance(3, make_certificate())
    fleet.extra.append(third)
    fleet.instances.append(third)

    async def main() -> tuple[int, ...]:
        transport = AsyncFleetTransport(fleet.url, ahead=6)
        body = b'{"model": "m", "prompt": "x"}'
        first = await transport.exchange(Call("POST", "/v1/completions", [], body, Size(1, 5)))
        await first.aclose()
        while len(transport._fleet.ahead) < 6:
            await asyncio.sleep(0.01)
        fleet.loadbalancer.room = 0
        plan(fleet, says(503))
        call = Call("POST", "/v1/completions", [], body, Size(1, 5), avoid=(1,))
        answer = await transport.exchange(call)
        assert (answer.status, answer.lease is not None) == (200, True)
        await answer.aclose()
        await transport.aclose()
        return (*[number for number, _ in call.setbacks], answer.lease.instance_id if answer.lease else 0)

    assert sorted(asyncio.run(main())) == [2, 3]


# -- affinity ------------------------------------------------------------------------------------------


def turns(count: int) -> list[dict[str, Any]]:
    """A conversation of so many messages, each with a few blocks of the secret."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"{n} " + SECRET * 100} for n in range(count)]


def test_a_conversation_goes_where_it_was_read_before(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    for n in (1, 3, 5, 7):
        one.chat(messages=turns(n))
    said = [body["affinity"] for body in fleet.loadbalancer.routes]
    assert [len(hashes) for hashes in said] == [3, 9, 16, 23]
    for shorter, longer in pairwise(said):
        assert longer[: len(shorter)] == shorter
    assert len({given.instance_id for given in fleet.loadbalancer.given}) == 1
    assert SECRET.encode() not in fleet.loadbalancer.received


def test_each_transport_has_a_salt_of_its_own_unless_one_is_given(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEET_AFFINITY_SALT", raising=False)
    salt = "a salt that is shared"
    options: list[dict[str, Any]] = [{}, {}, {"affinity_salt": salt}, {"affinity_salt": salt.encode()}]
    for more in options:
        user(fleet.url, **more).chat(messages=turns(1))
    monkeypatch.setenv("FLEET_AFFINITY_SALT", salt)
    user(fleet.url).chat(messages=turns(1))
    user(fleet.url, affinity_salt=salt + "!").chat(messages=turns(1))
    first, second, *shared, other = [tuple(body["affinity"]) for body in fleet.loadbalancer.routes]
    assert len(set(shared)) == 1
    assert len({first, second, shared[0], other}) == 4
    assert salt.encode() not in fleet.loadbalancer.received


def test_without_affinity_no_hash_is_told(user: Make, fleet: FakeFleet) -> None:
    user(fleet.url, affinity=False).chat(messages=turns(3))
    assert "affinity" not in fleet.loadbalancer.routes[0]


def test_a_salt_that_can_be_guessed_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_AFFINITY_SALT", "hello-world")
    with pytest.raises(ValueError, match=r"^affinity_salt: wanted at least 16 bytes, got 11$"):
        FleetTransport()
    FleetTransport(affinity=False).close()


def test_with_leases_ahead_a_conversation_stays_where_it_was_read(
    user: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "READ_S", 1.0)  # worth a question however slow this machine is
    fleet = fake_fleet(4)
    try:
        one = user(fleet.url, ahead=8)
        for n in (1, 3, 5, 7):
            one.chat(messages=turns(n))
            wait_for("leases ahead", lambda: len(one.transport._fleet.ahead) >= 7)
        served = [len(instance.seen) for instance in fleet.instances]
        assert sorted(served) == [0, 0, 0, 4]
        # Either with one that was here, or with one that was asked for with the hashes and without a wait.
        asked = [body for body in fleet.loadbalancer.routes if "count" not in body]
        assert all("affinity" in body for body in asked)
        assert all("wait_s" not in body for body in asked[1:])
    finally:
        fleet.stop()


def test_when_there_is_no_room_where_the_prefix_lies_a_lease_ahead_is_used(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "READ_S", 1.0)  # worth a question however slow this machine is
    one = user(fleet.url, ahead=4)
    one.chat(messages=turns(3))
    wait_for("leases ahead", lambda: len(one.transport._fleet.ahead) == 4)
    fleet.loadbalancer.room = 0
    for n in (5, 7, 9, 11):  # two leases where it was read, and then two that are elsewhere
        one.chat(messages=turns(n))
    assert sorted(len(instance.seen) for instance in fleet.instances) == [2, 3]
    asked = [body for body in fleet.loadbalancer.routes if "count" not in body]
    assert ["wait_s" in body for body in asked] == [True, False]  # the second time it has read it there, too
    assert all(body["affinity"] for body in asked)


# -- priority ------------------------------------------------------------------------------------------


def test_a_priority_goes_to_the_loadbalancer_and_its_header_not_to_the_instance(
    user: Make, fleet: FakeFleet
) -> None:
    one = user(fleet.url, priority="low")
    one.chat()
    one.chat(extra_headers={"X-Fleet-Priority": "high"})
    one.chat(extra_headers={"x-fleet-priority": "normal"})
    assert [body.get("priority") for body in fleet.loadbalancer.routes] == ["low", "high", None]
    assert all(seen.header("x-fleet-priority") is None for seen in fleet.requests)


def test_a_wrong_priority_is_a_400_that_names_the_header(user: Make, fleet: FakeFleet) -> None:
    with pytest.raises(openai.BadRequestError, match="X-Fleet-Priority: wanted high, normal or low") as e:
        user(fleet.url).chat(extra_headers={"X-Fleet-Priority": "urgent"})
    assert (e.value.param, e.value.code) == ("X-Fleet-Priority", "bad_priority")
    assert fleet.loadbalancer.routes == []


def test_leases_ahead_are_of_the_transports_priority_and_not_for_requests_below_it(
    user: Make, fleet: FakeFleet
) -> None:
    one = user(fleet.url, ahead=4)
    one.chat()
    wait_for("four leases", lambda: len(one.transport._fleet.ahead) == 4)
    asked = len(fleet.loadbalancer.routes)
    one.chat(extra_headers={"X-Fleet-Priority": "low"})
    assert fleet.loadbalancer.routes[asked]["priority"] == "low"
    assert len(one.transport._fleet.ahead) == 4
    one.chat(extra_headers={"X-Fleet-Priority": "high"})
    wait_for("another", lambda: len(fleet.loadbalancer.routes) == asked + 2)
    assert fleet.loadbalancer.routes[-1]["count"] == 1
    low = user(fleet.url, ahead=2, priority="low")
    low.chat()
    wait_for("two leases", lambda: len(low.transport._fleet.ahead) == 2)
    assert {"prompt_tokens": 13, "count": 2, "priority": "low"} in fleet.loadbalancer.routes


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
    for module in (async_transport, thread_transport):
        monkeypatch.setattr(module, "CLOSE_S", 0.2)
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
    body = leases.route_body(Size(5, 7), 3.0, [1, 1, 2])
    checked = check_fields(body, loadbalancer_server._ROUTE)
    assert checked == {"prompt_tokens": 5, "max_tokens": 7, "wait_s": 3.0, "avoid": [1, 2]}
    assert check_fields(leases.route_body(Size(0, None), 0.0), loadbalancer_server._ROUTE)
    hashes = ["0123456789abcdef"] * 256
    body = leases.route_body(Size(5, 7), 0.0, affinity=hashes, priority="low", count=64)
    checked = check_fields(body, loadbalancer_server._ROUTE)
    assert (checked["affinity"], checked["priority"], checked["count"]) == (hashes, "low", 64)
    for outcome, why in (("unused", ""), ("failed", "wrong_certificate")):
        assert check_fields(leases.done_body(lease(), outcome, why), loadbalancer_server._DONE)


def test_the_certificate_of_an_instance_is_the_only_one_that_counts() -> None:
    """Not even one that the system's authorities vouch for would do."""
    context = pinned_context(make_certificate()[0])
    assert len(context.get_ca_certs()) <= 1
    assert context.verify_mode is ssl.CERT_REQUIRED
