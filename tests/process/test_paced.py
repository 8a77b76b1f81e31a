"""The paced engine: what clients see of it, on a clock that a test moves, and twice as a real process."""

import asyncio
import contextlib
import heapq
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from engine.reference import ModelServer
from engine.timing import Timing
from instance_client import Stream, parse_usage
from localcloud.paced.asgi import MAX_BODY, Message
from localcloud.paced.command import Machine, load_middleware, parse_flags, profile_of
from localcloud.paced.completion_request import PIECES, Model, count_tokens, natural_length
from localcloud.paced.engine import PacedEngine
from process.errors import ConfigError
from tests.paths import ROOT

# 10 ms a token for anybody, 10 ms for any prompt.
EVEN = Timing("even", a=10.0, b=0.0, c=0.0, d=10.0, e=0.0, f=0.0, kv_tokens=2_000)
MODEL = Model(("vllm-13", "org/name"), "org/name", max_model_len=1_000)


class HandClock:
    """Time that stands still until a test moves it to the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, int, HandTimer]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> "HandTimer":
        timer = HandTimer(callback)
        heapq.heappush(self.timers, (when, id(timer), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self.timers)

    def next(self) -> None:
        when, _, timer = heapq.heappop(self.timers)
        if not timer.cancelled:
            self.now = max(self.now, when)
            timer.callback()


class HandTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Call:
    """One request to the app and what came back so far."""

    def __init__(self, app: PacedEngine, method: str, path: str, raw: bytes, media: str | None) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.pieces: list[bytes] = []
        self.whole = False
        headers = [] if media is None else [(b"content-type", media.encode())]
        scope: Message = {"type": "http", "method": method, "path": path, "headers": headers}
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        half = len(raw) // 2
        self._inbox.put_nowait({"type": "http.request", "body": raw[:half], "more_body": True})
        self._inbox.put_nowait({"type": "http.request", "body": raw[half:], "more_body": False})
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not self.status
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            assert self.status
            assert not self.whole
            self.body += message["body"]
            self.pieces.append(message["body"])
            self.whole = not message.get("more_body")

    def hang_up(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def said(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of all events; [DONE] as that text."""
        parts = self.body.split(b"\n\n")
        assert parts[-1] == b""
        assert all(p.startswith(b"data: ") for p in parts[:-1])
        return [p[6:].decode() if p == b"data: [DONE]" else json.loads(p[6:]) for p in parts[:-1]]


class World:
    """An engine on a clock moved by hand."""

    def __init__(self, timing: Timing = EVEN, model: Model = MODEL) -> None:
        self.clock = HandClock()
        self.server = ModelServer(timing)
        self.app = PacedEngine(model, self.server, self.clock)

    def call(self, path: str, body: object = None, method: str = "POST") -> Call:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call(self.app, method, path, raw, "application/json")

    async def settle(self) -> None:
        """Let everybody do what can be done at this time."""
        for _ in range(12):
            await asyncio.sleep(0)

    async def finish(self, *calls: Call) -> None:
        await self.settle()
        while not all(c.task.done() for c in calls):
            self.clock.next()
            await self.settle()
        for c in calls:
            c.task.result()
            assert c.whole


def asked(path: str, body: object = None, method: str = "POST", timing: Timing = EVEN) -> Call:
    """One request to a fresh engine, to its end."""

    async def run() -> Call:
        world = World(timing)
        call = world.call(path, body, method)
        await world.finish(call)
        assert world.server.running == world.server.waiting == world.clock.pending == 0
        return call

    return asyncio.run(run())


COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"model": "vllm-13", "prompt": "Hello there!", "max_tokens": 3, "ignore_eos": True}
HELLO_CHAT = {
    "model": "vllm-13",
    "messages": [{"role": "user", "content": "Hello there!"}],
    "max_tokens": 3,
    "ignore_eos": True,
}


# -- shapes ----------------------------------------------------------------------------------------------


def test_a_completion_has_vllms_shape_and_says_that_it_is_placeholder_text() -> None:
    call = asked(COMPLETION, HELLO)
    assert (call.status, call.headers[b"content-type"]) == (200, b"application/json")
    said = call.said
    assert said.pop("id").startswith("cmpl-")
    assert isinstance(said.pop("created"), int)
    assert said == {
        "object": "text_completion",
        "model": "vllm-13",
        "choices": [
            {
                "index": 0,
                "text": " This is placeholder",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3},
    }


def test_a_chat_has_vllms_shape() -> None:
    said = asked(CHAT, HELLO_CHAT).said
    assert said["id"].startswith("chatcmpl-")
    assert said["object"] == "chat.completion"
    assert said["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " This is placeholder"},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert said["usage"] == {"prompt_tokens": 10, "total_tokens": 13, "completion_tokens": 3}


def test_a_streamed_completion_is_one_event_a_token_then_usage_then_done() -> None:
    call = asked(COMPLETION, HELLO | {"stream": True, "stream_options": {"include_usage": True}})
    assert call.headers == {b"content-type": b"text/event-stream; charset=utf-8"}
    *tokens, last, done = call.events
    assert done == "[DONE]"
    assert [t["choices"][0]["text"] for t in tokens] == [" This", " is", " placeholder"]
    assert [t["choices"][0]["finish_reason"] for t in tokens] == [None, None, "length"]
    assert all(t["usage"] is None for t in tokens)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
    heads = {(e["id"], e["object"], e["model"], e["created"]) for e in (*tokens, last)}
    assert len(heads) == 1
    assert next(iter(heads))[1:3] == ("text_completion", "vllm-13")


def test_a_streamed_chat_begins_with_the_role() -> None:
    role, *tokens, done = asked(CHAT, HELLO_CHAT | {"stream": True}).events
    assert role["object"] == "chat.completion.chunk"
    assert role["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert [t["choices"][0]["delta"] for t in tokens] == [
        {"content": " This"},
        {"content": " is"},
        {"content": " placeholder"},
    ]
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"
    assert "usage" not in role


def test_usage_comes_with_every_event_if_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = asked(CHAT, HELLO_CHAT | {"stream": True, "stream_options": options})
    assert [e["usage"]["completion_tokens"] for e in call.events[:-1]] == [0, 1, 2, 3, 3]


def test_our_own_client_understands_a_stream_however_it_is_cut() -> None:
    call = asked(CHAT, HELLO_CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    stream = Stream()
    for at in range(0, len(call.body), 7):
        stream.feed(call.body[at : at + 7])
    assert (stream.begun, stream.error, stream.end()) == (True, None, (10, 3))
    assert parse_usage(asked(COMPLETION, HELLO).said) == (3, 3)


@pytest.mark.parametrize(
    ("prompt", "tokens", "choices"),
    [
        ("four", 1, 1),
        ("fives", 2, 1),
        (["four", "fives"], 3, 2),
        ([1, 2, 3], 3, 1),
        ([[1, 2], [3]], 3, 2),
    ],
)
def test_a_prompt_is_text_or_texts_or_token_ids(prompt: object, tokens: int, choices: int) -> None:
    said = asked(COMPLETION, {"prompt": prompt, "max_tokens": 2, "ignore_eos": True}).said
    assert said["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens + 2 * choices,
        "completion_tokens": 2 * choices,
    }
    assert [c["index"] for c in said["choices"]] == list(range(choices))


def test_several_answers_to_several_prompts_stream_side_by_side() -> None:
    body = HELLO | {"prompt": ["a", "b"], "n": 2, "stream": True}
    events = asked(COMPLETION, body).events[:-1]
    by_index: dict[int, list[str | None]] = {}
    for event in events:
        (choice,) = event["choices"]
        by_index.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert by_index == {index: [None, None, "length"] for index in range(4)}


def test_a_chat_message_may_be_in_parts_or_empty() -> None:
    messages = [
        {"role": "system", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there!"}]},
    ]
    said = asked(CHAT, {"messages": messages, "max_completion_tokens": 2, "ignore_eos": True}).said
    assert said["usage"]["prompt_tokens"] == 14
    assert said["usage"]["completion_tokens"] == 2


# -- echo, as in serving_completion.py of vLLM 0.11 ------------------------------------------------------

ODD = 'Say "hi"\n\\ to Жанна and 🦎 data: {"error"'


def texts(call: Call) -> dict[int, list[str]]:
    """The text of each event of each choice."""
    found: dict[int, list[str]] = {}
    for event in call.events[:-1]:
        for choice in event["choices"]:
            found.setdefault(choice["index"], []).append(choice["text"])
    return found


def test_echo_puts_the_prompt_before_the_answer_and_counts_as_without() -> None:
    plain, echoed = (asked(COMPLETION, HELLO | {"prompt": ODD} | more) for more in ({}, {"echo": True}))
    assert echoed.said["choices"][0].pop("text") == ODD + plain.said["choices"][0].pop("text")
    assert echoed.said["usage"] == plain.said["usage"]
    assert "🦎".encode() in echoed.body, "vLLM writes UTF-8, not escapes"


def test_a_streamed_echo_has_the_prompt_in_the_event_of_the_first_token() -> None:
    call = asked(COMPLETION, HELLO | {"prompt": ODD, "echo": True, "stream": True})
    assert texts(call) == {0: [ODD + " This", " is", " placeholder"]}
    assert "🦎".encode() in call.body


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_tokens_is_the_prompt_alone_though_one_token_is_made(stream: bool) -> None:
    body = {"prompt": ODD, "echo": True, "max_tokens": 0, "stream": stream}
    call = asked(COMPLETION, body | ({"stream_options": {"include_usage": True}} if stream else {}))
    if stream:
        assert texts(call) == {0: [ODD]}
        said = call.events[-2]
    else:
        said = call.said
        assert [(c["text"], c["finish_reason"]) for c in said["choices"]] == [(ODD, "length")]
    assert said["usage"]["completion_tokens"] == 1


def test_each_answer_echoes_its_own_prompt() -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "echo": True}
    said = asked(COMPLETION, body).said
    assert [c["text"] for c in said["choices"]] == ["a This", "a This", "b This", "b This"]
    streamed = texts(asked(COMPLETION, body | {"stream": True}))
    assert streamed == {0: ["a This"], 1: ["a This"], 2: ["b This"], 3: ["b This"]}


def test_an_echo_of_token_ids_has_as_many_pieces_of_placeholder_text() -> None:
    said = asked(COMPLETION, {"prompt": [0, 1, 2], "max_tokens": 1, "echo": True}).said
    assert said["choices"][0]["text"] == " This is placeholder" + " This"


def test_half_characters_do_not_break_an_echo() -> None:
    call = asked(COMPLETION, b'{"prompt": "\\ud800x", "max_tokens": 1, "echo": true}')
    assert call.said["choices"][0]["text"] == "?x This"


# -- length ----------------------------------------------------------------------------------------------


def test_without_ignore_eos_an_answer_has_a_length_of_its_own_that_is_always_the_same() -> None:
    lengths = [natural_length(b"prompt %d" % i, 100.0) for i in range(400)]
    assert lengths == [natural_length(b"prompt %d" % i, 100.0) for i in range(400)]
    assert 85 < sum(lengths) / 400 < 115
    assert min(lengths) >= 1
    body = {"prompt": "What is it?", "max_tokens": 900}
    first, again = asked(COMPLETION, body).said, asked(COMPLETION, body).said
    assert first["choices"] == again["choices"]
    assert first["choices"][0]["finish_reason"] == "stop"
    assert first["usage"]["completion_tokens"] < 900


def test_max_tokens_cuts_an_answer_off_and_min_tokens_keeps_it_going() -> None:
    body = {"prompt": "What is it?", "max_tokens": 2}
    assert asked(COMPLETION, body).said["choices"][0]["finish_reason"] == "length"
    body = {"prompt": "What is it?", "max_tokens": 900, "min_tokens": 899}
    assert asked(COMPLETION, body).said["usage"]["completion_tokens"] == 899


def test_a_chat_without_a_limit_may_fill_the_context_and_a_completion_gets_16_tokens() -> None:
    chat = {"messages": [{"role": "user", "content": "x" * 400}], "ignore_eos": True}
    assert asked(CHAT, chat).said["usage"]["total_tokens"] == 1_000
    assert asked(COMPLETION, {"prompt": "x", "ignore_eos": True}).said["usage"]["completion_tokens"] == 16


def test_a_token_is_four_characters() -> None:
    assert [count_tokens(t) for t in ("", "a", "abcd", "abcde", "äöüß")] == [0, 1, 1, 2, 1]


def test_the_text_can_stand_in_json_as_it_is() -> None:
    assert all(json.loads(b'"%s"' % piece) == piece.decode() for piece in PIECES)


# -- pace ------------------------------------------------------------------------------------------------


def test_tokens_come_when_they_are_due_and_one_timer_serves_all() -> None:
    async def run() -> None:
        world = World()
        body = HELLO | {"stream": True}
        calls = [world.call(COMPLETION, body) for _ in range(30)]
        await world.settle()
        assert world.clock.pending == 1
        assert all(c.status == 0 for c in calls)  # the first byte waits for the first token
        world.clock.next()
        await world.settle()
        # The first came alone; all others are read in the next step, in which it gets its second token.
        assert [len(c.pieces) for c in calls] == [1] + [0] * 29
        wakes = 1
        while world.clock.pending:
            assert world.clock.pending == 1
            world.clock.next()
            await world.settle()
            wakes += 1
        assert wakes == 4
        assert world.clock.now == pytest.approx(0.04)
        assert all(c.whole and c.events[-1] == "[DONE]" for c in calls)

    asyncio.run(run())


def test_a_late_wake_up_delivers_what_was_due_as_single_events() -> None:
    async def run() -> None:
        world = World()
        call = world.call(COMPLETION, HELLO | {"stream": True, "max_tokens": 50})
        await world.settle()
        world.clock.now = 0.305
        world.clock.next()
        await world.settle()
        assert len(call.pieces) == 1
        assert len(call.events) == 30
        await world.finish(call)
        assert len(call.events) == 51
        assert world.clock.now == pytest.approx(0.5)

    asyncio.run(run())


def test_when_the_client_goes_its_work_is_gone_at_once() -> None:
    async def run() -> None:
        world = World()
        calls = [
            world.call(COMPLETION, HELLO | {"max_tokens": 500, "stream": True, "n": 2}),
            world.call(CHAT, HELLO_CHAT | {"max_tokens": 500}),
        ]
        await world.settle()
        world.clock.next()
        await world.settle()
        assert world.server.running == 3
        for call in calls:
            call.hang_up()
        await world.settle()
        assert all(c.task.done() for c in calls)
        assert (world.server.running, world.server.waiting, world.server.kv_use) == (0, 0, 0.0)
        assert world.clock.pending == 0
        assert world.app.ended == {"abort": 3}

    asyncio.run(run())


def test_a_client_that_goes_before_its_body_is_there_leaves_nothing() -> None:
    async def run() -> None:
        world = World()
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": b'{"prompt', "more_body": True})
        inbox.put_nowait({"type": "http.disconnect"})
        scope: Message = {"type": "http", "method": "POST", "path": COMPLETION, "headers": []}

        async def never(message: Message) -> None:
            raise AssertionError(message)

        await world.app(scope, inbox.get, never)
        assert world.server.running == 0

    asyncio.run(run())


def test_what_does_not_fit_waits_and_the_metrics_say_so() -> None:
    async def run() -> None:
        world = World()
        calls = [
            world.call(COMPLETION, HELLO | {"prompt": "x" * 3_000, "max_tokens": 100, "stream": True})
            for _ in range(4)
        ]
        await world.settle()
        for _ in range(3):
            world.clock.next()
            await world.settle()
        figures = await figures_of(world)
        assert figures["num_requests_running"] == 2.0
        assert figures["num_requests_waiting"] == 2.0
        assert 0.75 < figures["kv_cache_usage_perc"] < 0.8
        assert figures["prompt_tokens_total"] == 1_500.0
        assert figures["generation_tokens_total"] == 5.0
        assert figures["num_preemptions_total"] == 0.0
        await world.finish(*calls)
        figures = await figures_of(world)
        assert figures["generation_tokens_total"] == 400.0
        assert figures["kv_cache_usage_perc"] == 0.0

    asyncio.run(run())


async def figures_of(world: World) -> dict[str, float]:
    call = world.call("/metrics", b"", "GET")
    await world.finish(call)
    assert call.headers[b"content-type"].startswith(b"text/plain")
    lines = [line for line in call.body.decode().splitlines() if not line.startswith("#")]
    assert all('model_name="vllm-13"' in line for line in lines)
    return {line.partition("{")[0].removeprefix("vllm:"): float(line.rpartition(" ")[2]) for line in lines}


# -- other routes ----------------------------------------------------------------------------------------


def test_the_small_routes() -> None:
    health = asked("/health", b"", "GET")
    assert (health.status, health.body) == (200, b"")
    cards = asked("/v1/models", b"", "GET").said["data"]
    assert [(c["id"], c["root"], c["max_model_len"]) for c in cards] == [
        ("vllm-13", "org/name", 1_000),
        ("org/name", "org/name", 1_000),
    ]
    assert "paced" in asked("/version", b"", "GET").said["version"]
    assert asked("/tokenize", {"prompt": "x" * 9}).said["count"] == 3
    assert asked("/tokenize", {"messages": HELLO_CHAT["messages"]}).said["count"] == 10


def test_every_name_is_served_and_answers_carry_the_first() -> None:
    assert asked(COMPLETION, HELLO | {"model": "org/name"}).said["model"] == "vllm-13"


def test_the_server_may_start_and_end() -> None:
    async def run() -> None:
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        sent = []

        async def send(message: Message) -> None:
            sent.append(message["type"])

        inbox.put_nowait({"type": "lifespan.startup"})
        inbox.put_nowait({"type": "lifespan.shutdown"})
        await World().app({"type": "lifespan"}, inbox.get, send)
        await World().app({"type": "websocket"}, inbox.get, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]

    asyncio.run(run())


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"max_tokens": %s}' % (b"9" * 5_000), None),
        ([], None),
        ("text", None),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "x" * 4_000}, "prompt"),
        ({"prompt": "x" * 3_000, "max_tokens": 251}, "max_tokens"),
        ({"prompt": "x", "model": 7}, "model"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": -5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1e400}, "max_tokens"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 5_000}, "n"),
        ({"prompt": ["x"] * 33, "n": 32}, "n"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "stream": True, "stream_options": 1}, "stream_options"),
        ({"prompt": "x", "ignore_eos": 1}, "ignore_eos"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "stop": 1}, "stop"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "echo": 1}, "echo"),
        ({"prompt": "x", "echo": True, "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x" * 4_000, "echo": True, "max_tokens": 0}, "prompt"),
        ({"prompt": "x", "logprobs": 3}, "logprobs"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
    ],
)
def test_a_bad_completion_is_a_400_in_vllms_shape_that_names_the_field(
    body: object, param: str | None
) -> None:
    call = asked(COMPLETION, body)
    error = call.said["error"]
    assert (call.status, error["type"], error["code"], error["param"]) == (400, "BadRequestError", 400, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 6_000


def test_a_chat_has_no_echo() -> None:
    """vLLM's echoes the last message, and only where the template does not open the answer."""
    call = asked(CHAT, HELLO_CHAT | {"echo": True})
    assert (call.status, call.said["error"]["param"]) == (400, "echo")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"content": "hi"}],
        [{"role": 1, "content": "hi"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x" * 4_000}],
    ],
)
def test_bad_messages_are_a_400(messages: object) -> None:
    call = asked(CHAT, {"messages": messages})
    assert (call.status, call.said["error"]["param"]) == (400, "messages")


def test_a_context_that_is_too_long_says_how_long_it_may_be() -> None:
    message = asked(COMPLETION, {"prompt": "x" * 3_000, "max_tokens": 300}).said["error"]["message"]
    assert "maximum context length is 1000 tokens" in message


def test_odd_characters_are_no_error() -> None:
    assert asked(COMPLETION, b'{"prompt": "\\ud800 \\u0000", "max_tokens": 1}').status == 200
    assert (
        asked(CHAT, b'{"messages": [{"role": "\\udfff", "content": "\\ud800"}], "max_tokens": 1}').status
        == 200
    )
    assert asked(COMPLETION, b'{"prompt": "x", "model": "\\ud800"}').status == 404


def test_an_unknown_model_is_a_404() -> None:
    call = asked(COMPLETION, HELLO | {"model": "gpt-4"})
    assert call.status == 404
    assert call.said["error"] == {
        "message": "The model `gpt-4` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


def test_an_unknown_path_is_a_404_and_a_wrong_method_a_405() -> None:
    assert asked("/v1/embeddings", {}).status == 404
    assert asked("/", b"", "GET").said["error"]["code"] == 404
    wrong = asked(COMPLETION, b"", "GET")
    assert (wrong.status, wrong.headers[b"allow"]) == (405, b"POST")
    assert asked("/health", {}).status == 405


def test_a_body_must_be_json_by_name_and_not_over_long() -> None:
    async def run() -> tuple[Call, Call]:
        world = World()
        form = Call(world.app, "POST", COMPLETION, json.dumps(HELLO).encode(), None)
        long = Call(world.app, "POST", COMPLETION, b" " * (MAX_BODY + 2), "application/json")
        await world.finish(form, long)
        return form, long

    form, long = asyncio.run(run())
    assert (form.status, long.status) == (400, 413)


def test_a_context_that_the_memory_cannot_hold_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        PacedEngine(Model(("m",), "m", 3_000), ModelServer(EVEN))


# -- flags and machine -----------------------------------------------------------------------------------


def test_vllms_flags_are_read_and_those_without_a_meaning_are_kept_apart() -> None:
    given = "--model M --served-model-name vllm-13 M --port 81 --max-model-len 4k"
    more = "--middleware a.B --middleware c.D --enforce-eager --swap-space 4"
    flags, others = parse_flags([*given.split(), *more.split()])
    assert (flags.model, flags.served_model_name, flags.port) == ("M", ["vllm-13", "M"], 81)
    assert (flags.max_model_len, flags.middleware) == (4_000, ["a.B", "c.D"])
    assert others == ["--enforce-eager", "--swap-space", "4"]


@pytest.mark.parametrize(
    "wrong", ["--port 70000", "--port x", "--max-model-len 0", "-tp 0", "--max-num-seqs -1"]
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_flags(["--model", "M", *wrong.split()])
    assert exit.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_the_profile_is_found_by_name_or_by_model() -> None:
    assert profile_of(["x", "vllm-70"], "M") == "vllm-70"
    assert profile_of(["x"], "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4") == "vllm-70"
    assert profile_of(["x"], "M") == "vllm-13"


@pytest.mark.parametrize(
    "path", ["nonsense", "no.such.Module", "localcloud.paced.main", "localcloud.paced.Gone"]
)
def test_middleware_that_is_no_class_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="--middleware"):
        load_middleware(path)


def test_a_machine_takes_its_start_time_once_the_model_was_loaded(tmp_path: Path) -> None:
    path = write_machine(tmp_path, load_s=60.0, start_s=9.0)
    assert Machine.read(str(path)).ready_s == 60.0
    (tmp_path / "loaded").touch()
    assert Machine.read(str(path)).ready_s == 9.0
    path.write_text('{"gpu_name": "L40S"}')
    with pytest.raises(ConfigError, match="LOCALCLOUD_MACHINE"):
        Machine.read(str(path))


def write_machine(folder: Path, **more: object) -> Path:
    path = folder / "machine.json"
    machine = {
        "gpu_name": "A100 SXM4",
        "num_gpus": 1,
        "load_s": 0.05,
        "start_s": 0.01,
        "fatal_line": None,
        "loaded": str(folder / "loaded"),
    }
    path.write_text(json.dumps(machine | more))
    return path


# -- as a process ----------------------------------------------------------------------------------------

GATE = """
class Gate:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope["headers"].append((b"x-name", b"NAME"))
            if scope["path"] == "/seen":
                names = b",".join(v for k, v in scope["headers"] if k == b"x-name")
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": names})
                return
        await self.app(scope, receive, send)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextlib.contextmanager
def stand_in(folder: Path, port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """The process that an instance of localcloud starts as vLLM; its log is its stdout."""
    (folder / "gates").mkdir(exist_ok=True)
    for name in ("inner", "outer"):
        (folder / "gates" / f"{name}.py").write_text(GATE.replace("NAME", name))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "localcloud" / "image"), str(ROOT)]),
        "LOCALCLOUD_MACHINE": str(folder / "machine.json"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/name"]
    command += ["--served-model-name", "vllm-13", "--host", "127.0.0.1", "--port", str(port), *flags]
    process = subprocess.Popen(
        command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            yield process
    finally:
        process.kill()
        process.wait()


def read_until(process: subprocess.Popen[str], line: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or line not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    return lines


def refuses(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def test_the_stand_in_loads_serves_through_its_middleware_and_ends_when_told(tmp_path: Path) -> None:
    write_machine(tmp_path)
    port = free_port()
    gates = ["--middleware", "gates.inner.Gate", "--middleware", "gates.outer.Gate"]
    with stand_in(tmp_path, port, "--enforce-eager", *gates) as process:
        text = "".join(read_until(process, "Uvicorn running on"))
        order = [
            "--enforce-eager",
            "Started server process",
            "Waiting for application startup.",
            "Application startup complete.",
            "Uvicorn running on",
        ]
        assert [text.find(o) for o in order] == sorted(text.find(o) for o in order)
        assert -1 not in [text.find(o) for o in order]
        url = f"http://127.0.0.1:{port}"
        assert requests.get(f"{url}/health", timeout=10).status_code == 200
        assert requests.get(f"{url}/seen", timeout=10).text == "outer"
        # 13B on an A100 alone: 8 ms a token, so 60 tokens take about half a second and never less.
        began = time.monotonic()
        body = HELLO | {"max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=10) as reply:
            stream = Stream()
            for chunk in reply.iter_content(None):
                stream.feed(chunk)
        assert stream.end() == (3, 60)
        assert time.monotonic() - began > 0.45
        resident_kb = int(Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")[1].split()[0])
        assert resident_kb < 34_000
        # A long answer is under way when the end comes.
        with requests.post(
            f"{url}/v1/completions", json=body | {"max_tokens": 900}, stream=True, timeout=10
        ) as r:
            chunks = r.iter_content(None)
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                list(chunks)
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()


def test_nobody_is_let_in_while_it_loads_and_it_ends_when_told(tmp_path: Path) -> None:
    write_machine(tmp_path, load_s=1000.0)
    port = free_port()
    with stand_in(tmp_path, port) as process:
        read_until(process, "Starting to load model")
        assert refuses(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_the_stand_in_prints_the_fatal_line_and_exits_with_1(tmp_path: Path) -> None:
    write_machine(tmp_path, fatal_line="torch.OutOfMemoryError: CUDA out of memory.")
    port = free_port()
    with stand_in(tmp_path, port) as process:
        read_until(process, "CUDA out of memory")
        assert process.wait(timeout=10) == 1
        assert refuses(port)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--max-model-len", "100k"], "Engine core initialization failed"),
        (["--tensor-parallel-size", "2"], "tensor parallel size 2, but 1 GPUs"),
        (["--middleware", "gates.missing.Gate"], "--middleware gates.missing.Gate cannot be loaded"),
    ],
)
def test_the_stand_in_says_in_one_line_why_it_cannot_start(
    tmp_path: Path, flags: list[str], line: str
) -> None:
    write_machine(tmp_path)
    with stand_in(tmp_path, free_port(), *flags) as process:
        read_until(process, line)
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()
        assert process.wait(timeout=10) == 1


def test_a_port_in_use_is_said_before_loading(tmp_path: Path) -> None:
    write_machine(tmp_path, load_s=1000.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with stand_in(tmp_path, port) as process:
            read_until(process, f"cannot listen on 127.0.0.1:{port}")
            assert process.wait(timeout=10) == 1
