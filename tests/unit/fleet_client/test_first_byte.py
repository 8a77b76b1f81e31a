"""An instance that takes a request and lets it wait: long after it was due another instance is tried."""

import asyncio
import json
import math
from typing import Any

import httpx2
import openai
import pytest

from fleet_client import FleetTransport, retry
from fleet_client.call import Call
from fleet_client.leases import read_route
from fleet_client.retry import first_byte_s
from fleet_client.token_estimate import TokenEstimate
from tests.fake_fleet import Act, FakeFleet, Out, Seen, lease
from tests.unit.fleet_client.users import ALL, Make, plan, says, silent, told


def call(*, streamed: bool = False, max_tokens: int | None = 100) -> Call:
    return Call("POST", "/v1/completions", [], b"{}", TokenEstimate(10, max_tokens), streamed=streamed)


def test_the_limit_is_far_beyond_what_is_expected() -> None:
    assert first_byte_s(call(streamed=True), lease(first_token_s=0.2)) == 32.0
    assert first_byte_s(call(streamed=True), lease(first_token_s=40.0)) == 430.0
    assert first_byte_s(call(), lease(first_token_s=0.2)) == 82.0, "it begins with its last token"
    assert first_byte_s(call(max_tokens=None), lease(first_token_s=0.2)) is None, "it may be any length"
    assert first_byte_s(call(streamed=True), lease()) is None, "an older loadbalancer says nothing"


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (0.25, 0.25),
        (0, 0.0),
        (None, None),
        ("x", None),
        (-1, None),
        (1e9, None),
        (math.nan, None),
        ([], None),
    ],
    ids=str,
)
def test_what_a_lease_says_of_it_has_a_range(said: Any, read: float | None) -> None:
    fields = {"address": "https://1.2.3.4:5", "request_id": "r", "token": "T", "instance_id": 7}
    raw = json.dumps(fields | {"expires_in_s": 60, "first_token_s": said}).encode()
    got = read_route(200, raw, None, 0.0)
    assert getattr(got, "first_token_s", "none") == read


async def head_only(seen: Seen, out: Out) -> None:
    """Answer at once with a head, as vLLM does, and with nothing else."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    await out.gone.wait()


async def breaks_after_its_head(seen: Seen, out: Out) -> None:
    """End the connection after the head."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    out.abort()


@pytest.fixture
def hurried(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    """A fleet whose first tokens are expected soon."""
    monkeypatch.setattr(retry, "FIRST_BYTE_S", 0.2)
    fleet.loadbalancer.wrong = {n: {"first_token_s": 0.02} for n in (1, 2)}
    return fleet


@pytest.mark.parametrize("act", [silent, head_only])
def test_a_stream_that_does_not_begin_goes_elsewhere(user: Make, hurried: FakeFleet, act: Act) -> None:
    plan(hurried, act)
    assert user(hurried.url).stream() == ALL
    assert told(hurried) == [("failed", "first_byte")]
    assert hurried.loadbalancer.routes[1]["avoid"] == [hurried.loadbalancer.given[0].instance_id]


def test_an_answer_in_one_piece_that_does_not_come_goes_elsewhere(user: Make, hurried: FakeFleet) -> None:
    plan(hurried, silent)
    assert user(hurried.url).chat(max_tokens=1).choices[0].message.content == ALL
    assert told(hurried) == [("failed", "first_byte")]


def test_only_once_so_that_a_slow_fleet_is_not_made_slower(user: Make, hurried: FakeFleet) -> None:
    async def slow(seen: Seen, out: Out) -> None:
        await asyncio.sleep(1.0)
        await out.answer(200, {"object": "list", "data": [{"id": "slow", "object": "model"}]})

    plan(hurried, silent, slow)
    response = user(hurried.url).request("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert response.json()["data"][0]["id"] == "slow"
    assert told(hurried) == [("failed", "first_byte")]


def test_the_last_try_has_as_long_as_its_program_waits(user: Make, hurried: FakeFleet) -> None:
    plan(hurried, silent)
    with pytest.raises(openai.APITimeoutError):
        user(hurried.url, max_tries=1).chat(max_tokens=1, timeout=1.0)
    assert told(hurried) == [("failed", "read_timeout")]


def test_a_stream_that_breaks_before_its_first_part_is_not_sent_again(user: Make, hurried: FakeFleet) -> None:
    """The engine has seen the prompt: its program decides, and openai's package asks again, if it may."""
    plan(hurried, breaks_after_its_head)
    with pytest.raises(openai.APIConnectionError):
        user(hurried.url).stream()
    assert told(hurried) == [("failed", "broke_off")]
    assert len(hurried.requests) == 1


def test_a_program_that_retries_sees_nothing_of_a_stream_that_breaks_before_its_first_part(
    hurried: FakeFleet,
) -> None:
    plan(hurried, breaks_after_its_head)
    with FleetTransport(hurried.url) as transport, httpx2.Client(transport=transport) as http:
        client = openai.OpenAI(http_client=http, base_url="http://fleet/v1", api_key="x", max_retries=1)
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert "".join(event.choices[0].delta.content or "" for event in stream if event.choices) == ALL
    assert told(hurried) == [("failed", "broke_off")]
    assert len(hurried.requests) == 2


def test_errors_of_a_stream_pass_at_once(user: Make, hurried: FakeFleet) -> None:
    plan(hurried, says(400, {"error": {"message": "wrong"}}))
    with pytest.raises(openai.BadRequestError, match="wrong"):
        user(hurried.url).stream()
    assert hurried.loadbalancer.dones == []
