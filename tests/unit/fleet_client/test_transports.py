"""What both transports pass on, under openai's own client."""

import asyncio
import gzip
import json
from typing import Any

import openai
import pytest

from fleet_client import AsyncFleetTransport, Call, TokenEstimate, transport
from tests.fake_fleet import FakeFleet, Out, Seen, fake_fleet
from tests.unit.fleet_client.users import ALL, SECRET, USER_KEY, Make, Threads, plan, says
from tests.waiting import wait_for


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


def test_a_body_that_is_too_large_to_be_kept_is_refused_streamed_or_whole(
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
    whole = one.request("POST", "/v1/completions", content=b"x" * 2000)
    assert (whole.status_code, whole.json()) == (413, response.json())
    assert fleet.loadbalancer.routes == []


def test_a_large_body_arrives_whole(user: Make, fleet: FakeFleet) -> None:
    body = json.dumps({"model": "m", "prompt": "x" * 3_000_000}).encode()
    response = user(fleet.url).request("POST", "/v1/completions", content=body)
    assert response.status_code == 200
    assert fleet.requests[0].body == body


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
        call = Call("POST", "/v1/completions", [], body, TokenEstimate(1, 5))
        answer = await transport.exchange(call)
        raw = b"".join([chunk async for chunk in answer])
        await answer.aclose()
        await transport.aclose()
        assert answer.lease is not None
        return answer.status, raw, answer.lease.instance_id

    status, raw, number = asyncio.run(main())
    assert (status, raw.count(b"data: "), number in (1, 2)) == (200, 6, True)


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


class OtherRequest:
    """A request as the older httpx package's clients pass it to a transport."""

    method = "POST"
    url = "http://fleet/v1/chat/completions"
    content = b"{}"
    stream = (b"{}",)

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.extensions: dict[str, Any] = {}


OtherRequest.__module__, OtherRequest.__qualname__ = "httpx", "Request"


def test_the_client_of_another_package_is_told_which_one_it_takes(user: Make, fleet: FakeFleet) -> None:
    """Before a lease is taken."""
    one, request = user(fleet.url), OtherRequest()

    def send() -> None:
        if isinstance(one, Threads):
            one.transport.handle_request(request)  # type: ignore[arg-type]
        else:
            one.do(one.transport.handle_async_request(request))  # type: ignore[arg-type]

    wanted = "httpx2.Client" if isinstance(one, Threads) else "httpx2.AsyncClient"
    with pytest.raises(TypeError, match=rf"{wanted} only: wanted an httpx2\.Request, got httpx\.Request"):
        send()
    assert fleet.loadbalancer.routes == []
