"""Calls to an instance: what answers mean, what is retried elsewhere, and that no token is shown."""

import asyncio
import itertools
import json
import pickle
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from instance_client import (
    TAIL,
    BrokenOff,
    Completion,
    InstanceClient,
    NotStarted,
    PromptRefused,
    Stream,
    TokenUsage,
    error_message,
    read_stream,
    request_id,
)
from process.errors import InstanceError
from tests.unit.fleet_client.test_endless_heads import CONTINUE, answering
from web.messages.decoding import BadField, decode
from web.messages.reports import LoadReport, RequestEnd, TokenBatch

STARTED, ENDED = "0123456789abcdef", "fedcba9876543210"
LOAD: dict[str, Any] = {
    "boot_id": "b1",
    "seq": 7,
    "missed": False,
    "started": [STARTED],
    "ended": [{"id": ENDED, "status": "finished", "output_tokens": 12}],
    "running": 1,
    "waiting": 0,
    "kv_use": 0.25,
    "model_up": True,
    "prompt_tokens_total": 30,
    "generation_tokens_total": 12,
    "tokens_s": 3.5,
}
TOKENS: dict[str, Any] = {
    "tokens": ["secret-1", "secret-2"],
    "boot_id": "b1",
    "expires_at": 1e9,
    "expires_in_s": 600,
    "load": {**LOAD, "started": [], "ended": []},
}
BODY: dict[str, Any] = {"model": "m", "prompt": "x", "max_tokens": 2}
STREAMED = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
PATIENT = aiohttp.ClientTimeout(total=5.0)


def event(said: object) -> bytes:
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def token_event(text: str = "word ") -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
DONE = b"data: [DONE]\n\n"


# -- what answers say ----------------------------------------------------------------------------------


def load_in(said: object) -> LoadReport:
    return decode(json.dumps(said).encode(), LoadReport)


def tokens_in(said: object) -> TokenBatch:
    return decode(json.dumps(said).encode(), TokenBatch)


def test_a_load_report_is_read_whole() -> None:
    assert load_in(LOAD) == LoadReport(
        "b1", 7, [STARTED], [RequestEnd(ENDED, "finished", 12)], 1, 0, True, 30, 12, kv_use=0.25
    )


def test_a_load_report_may_say_how_long_the_requests_were() -> None:
    assert load_in({**LOAD, "started_bytes": [4102]}).started_bytes == [4102]
    assert load_in(LOAD).started_bytes == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boot_id", 5),
        ("seq", -1),
        ("seq", True),
        ("missed", 0),
        ("started", [STARTED, 2]),
        ("started_bytes", [1, 2]),
        ("started_bytes", ["9"]),
        ("started_bytes", [-1]),
        ("started_bytes", 7),
        ("ended", [{"id": ENDED, "status": "finished"}]),
        ("running", "1"),
        ("kv_use", "full"),
        ("model_up", None),
        ("generation_tokens_total", 1.5),
    ],
)
def test_a_load_report_with_a_wrong_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(BadField, match=rf"^{field}.*(wanted|is missing)"):
        load_in({**LOAD, field: value})


def test_a_refused_token_batch_does_not_show_its_tokens() -> None:
    with pytest.raises(BadField, match=r"^expires_in_s: wanted") as refused:
        tokens_in({**TOKENS, "expires_in_s": None})
    assert "secret" not in str(refused.value)


def test_an_empty_token_batch_is_no_answer() -> None:
    with pytest.raises(BadField, match=r"^tokens: wanted `array` of length >= 1"):
        tokens_in({**TOKENS, "tokens": []})


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "unauthorized", "message": "no"}', "no"),
        (b'{"message": "plain"}', "plain"),
        (b"<html>", "b'<html>'"),
        (b"[1]", "b'[1]'"),
    ],
)
def test_an_error_is_told_in_the_words_of_the_server(raw: bytes, said: str) -> None:
    assert error_message(raw) == said


def test_the_name_of_a_request_is_not_its_token() -> None:
    assert request_id("token") == "3c469e9d6c5875d3"
    assert request_id("token") != request_id("token2")


# -- streams -------------------------------------------------------------------------------------------


def test_a_stream_begins_with_its_first_token_wherever_the_bytes_are_cut() -> None:
    whole = token_event() + token_event() + USAGE + DONE
    for cut in range(len(whole)):
        stream = Stream()
        stream.feed(whole[:cut])
        stream.feed(whole[cut:])
        assert stream.begun
        assert stream.error is None
        assert stream.end() == TokenUsage(3, 2)


def test_the_role_of_a_chat_is_not_its_first_token() -> None:
    stream = Stream()
    stream.feed(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
    assert not stream.begun
    stream.feed(event({"choices": [{"delta": {"content": "Hi"}}]}))
    assert stream.begun


def test_a_long_stream_keeps_only_its_tail() -> None:
    stream = Stream()
    for _ in range(2000):
        stream.feed(token_event())
    assert len(pickle.dumps(stream)) <= 4 * TAIL + len(token_event()) + 1000
    stream.feed(USAGE + DONE)
    assert stream.end() == TokenUsage(3, 2)


def test_an_error_within_a_stream_is_found_also_when_it_is_cut() -> None:
    whole = token_event() + event({"error": {"message": "engine died", "code": 500}}) + DONE
    for cut in range(len(token_event()), len(whole) - len(DONE)):
        stream = Stream()
        stream.feed(whole[:cut])
        stream.feed(whole[cut:])
        assert stream.error == "engine died"


def test_a_stream_without_its_end_has_broken_off() -> None:
    for whole in (b"", token_event(), token_event() + USAGE, token_event() + DONE):
        stream = Stream()
        stream.feed(whole)
        with pytest.raises(BadField, match="has no"):
            stream.end()


def test_the_gaps_between_events_are_told_one_for_each_after_the_first() -> None:
    """Two that come together are 0 s apart; what says the usage and the end is no event of a completion."""

    async def chunks() -> AsyncIterator[bytes]:
        yield token_event()
        yield token_event() + token_event()
        await asyncio.sleep(0.02)
        yield token_event() + USAGE
        yield DONE

    gaps_s: list[float] = []
    done = asyncio.run(read_stream("http://i", chunks(), gaps_s))
    assert len(gaps_s) == 3
    assert gaps_s[1] == 0.0
    assert gaps_s[0] < 0.02 <= gaps_s[2]
    assert sum(gaps_s) <= done.end_s - done.first_token_s


# -- over a socket -------------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(handler: Handler, call: Callable[[InstanceClient, str], Awaitable[Any]]) -> Any:
    """What the call gives against a server with that one handler."""

    async def both() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with InstanceClient() as client:
                return await call(client, f"http://127.0.0.1:{port}")
        finally:
            await runner.cleanup()

    return asyncio.run(both())


def answers(status: int, body: object) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return handler


def streams(*parts: bytes, then: str = "end") -> Handler:
    """A server that streams the parts; then it ends, or drops the connection."""

    async def handler(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for part in parts:
            await reply.write(part)
        if then == "drop" and request.transport is not None:
            request.transport.abort()
        return reply

    return handler


def complete(handler: Handler, body: dict[str, Any] = STREAMED) -> Completion:
    found: Completion = ask(handler, lambda c, url: c.stream(url, "tok-secret", body, PATIENT))
    return found


def test_tokens_are_fetched_with_the_master_token_in_a_header() -> None:
    seen: list[tuple[str, str, str, object]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.method, request.path_qs, request.headers["Authorization"], await request.json()))
        return web.json_response(TOKENS)

    batch = ask(handler, lambda c, url: c.fetch_tokens(url, "master", 2, timeout_s=5.0))
    assert seen == [("POST", "/tokens", "Bearer master", {"count": 2})]
    assert (batch.tokens, batch.expires_in_s, batch.load.seq) == (["secret-1", "secret-2"], 600.0, 7)


def test_a_load_report_is_asked_for_after_a_number() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.path_qs)
        return web.json_response(LOAD)

    load = ask(handler, lambda c, url: c.fetch_load(url, "master", 6, timeout_s=5.0))
    assert seen == ["/load?after=6"]
    assert load == load_in(LOAD)


@pytest.mark.parametrize(("status", "body"), [(401, {"error": "unauthorized"}), (200, {"odd": 1}), (200, [])])
def test_an_answer_that_is_no_token_batch_is_the_instances_fault(status: int, body: object) -> None:
    with pytest.raises(InstanceError) as failed:
        ask(answers(status, body), lambda c, url: c.fetch_tokens(url, "m-secret", 2, timeout_s=5.0))
    assert "m-secret" not in str(failed.value)


def test_a_redirect_is_not_followed_so_no_token_goes_astray() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    with pytest.raises(InstanceError, match="302"):
        ask(handler, lambda c, url: c.fetch_tokens(url, "master", 2, timeout_s=5.0))


def test_an_instance_that_never_answers_costs_its_timeout() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    with pytest.raises(InstanceError, match="TimeoutError"):
        ask(handler, lambda c, url: c.fetch_load(url, "master", 0, timeout_s=0.2))


def test_the_address_for_clients_is_well_where_its_health_is() -> None:
    seen: list[tuple[str, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.path_qs, request.headers.get("Authorization")))
        return web.Response()

    ask(handler, lambda c, url: c.check_address(url, timeout_s=5.0))
    assert seen == [("/health", None)], "no token of anybody"
    with pytest.raises(InstanceError, match="503"):
        ask(answers(503, {}), lambda c, url: c.check_address(url, timeout_s=5.0))
    with pytest.raises(InstanceError, match="Connect"):
        ask(answers(200, {}), lambda c, _: c.check_address("http://127.0.0.1:1", timeout_s=5.0))


def test_an_instance_that_answers_with_interim_answers_only_is_refused() -> None:
    async def fetch(url: str) -> None:
        async with InstanceClient() as client:
            await client.fetch_load(url, "master", 0, timeout_s=20.0)

    with answering(itertools.repeat(CONTINUE)) as url, pytest.raises(InstanceError, match="interim answers"):
        asyncio.run(fetch(url))


def test_a_streamed_answer_is_measured() -> None:
    answer = complete(streams(token_event(), token_event(), USAGE, DONE))
    assert (answer.status, answer.error, answer.prompt_tokens, answer.completion_tokens) == (200, None, 3, 2)
    assert 0.0 < answer.first_token_s <= answer.end_s


def test_an_answer_in_one_piece_has_no_first_token() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    answer = complete(answers(200, {"choices": [{"text": "a b"}], "usage": usage}), BODY)
    assert (answer.completion_tokens, answer.first_token_s) == (2, 0.0)


def test_a_chat_goes_to_its_own_route() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.json_response({"usage": {"prompt_tokens": 3, "completion_tokens": 2}})

    complete(handler, {"model": "m", "messages": []})
    assert seen == ["/v1/chat/completions"]


@pytest.mark.parametrize("status", [401, 429, 503])
def test_a_request_that_was_not_taken_may_go_elsewhere(status: int) -> None:
    with pytest.raises(NotStarted) as failed:
        complete(answers(status, {"error": {"message": "no"}}))
    assert "tok-secret" not in str(failed.value)


@pytest.mark.parametrize("status", [400, 404, 500])
def test_the_model_servers_own_errors_come_back_as_they_are(status: int) -> None:
    answer = complete(answers(status, {"error": {"message": "as said"}}))
    assert (answer.status, answer.error) == (status, "as said")


def test_a_dead_port_means_not_started() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"

    async def call() -> None:
        async with InstanceClient() as client:
            await client.stream(url, "tok-secret", BODY, PATIENT)

    with pytest.raises(NotStarted, match="no connection"):
        asyncio.run(call())


@pytest.mark.parametrize(
    "handler",
    [streams(token_event(), then="drop"), streams(token_event()), streams(token_event(), USAGE)],
    ids=["dropped", "ended early", "no DONE"],
)
def test_an_answer_without_its_end_has_broken_off(handler: Handler) -> None:
    with pytest.raises(BrokenOff):
        complete(handler)


def test_an_error_within_the_stream_is_told() -> None:
    answer = complete(streams(token_event(), event({"error": {"message": "engine died"}}), DONE))
    assert (answer.status, answer.error) == (200, "engine died")


def test_a_test_prompt_is_told_from_one_of_a_kind_that_the_engine_does_not_take() -> None:
    for status, kind in ((400, PromptRefused), (404, PromptRefused), (500, InstanceError)):
        with pytest.raises(InstanceError, match=str(status)) as failed:
            ask(answers(status, {}), lambda c, url: c.test_prompt(url, "t", BODY, timeout_s=5.0))
        assert type(failed.value) is kind


def test_a_text_to_be_embedded_goes_to_its_own_route_and_counts_what_was_read() -> None:
    paths: list[str] = []

    async def embeds(request: web.Request) -> web.Response:
        paths.append(request.path)
        usage = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
        return web.json_response({"data": [{"embedding": [0.1]}], "usage": usage})

    body = {"model": "m", "input": "a text"}
    assert ask(embeds, lambda c, url: c.test_prompt(url, "t", body, timeout_s=5.0)) == 7
    assert paths == ["/v1/embeddings"]


def test_a_test_prompt_needs_at_least_one_token() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 0}
    with pytest.raises(InstanceError, match="got none"):
        ask(answers(200, {"usage": usage}), lambda c, url: c.test_prompt(url, "t", BODY, timeout_s=5.0))
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    assert (
        ask(answers(200, {"usage": usage}), lambda c, url: c.test_prompt(url, "t", BODY, timeout_s=5.0)) == 4
    )
