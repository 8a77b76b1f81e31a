"""Answers in vLLM's shapes, whole and streamed."""

import json

import pytest

from instance_client import Stream, TokenUsage, read_answer
from localcloud.paced.completion_request import PIECES
from tests.unit.localcloud.paced.hand_clock import (
    CHAT,
    COMPLETION,
    HELLO,
    HELLO_CHAT,
    Call,
    asked,
)


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
    assert (stream.begun, stream.error, stream.end()) == (True, None, TokenUsage(10, 3))
    answer = read_answer("instance", asked(COMPLETION, HELLO).body)
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 3)


def test_several_answers_to_several_prompts_stream_side_by_side() -> None:
    body = HELLO | {"prompt": ["a", "b"], "n": 2, "stream": True}
    events = asked(COMPLETION, body).events[:-1]
    by_index: dict[int, list[str | None]] = {}
    for event in events:
        (choice,) = event["choices"]
        by_index.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert by_index == {index: [None, None, "length"] for index in range(4)}


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


def test_the_text_can_stand_in_json_as_it_is() -> None:
    assert all(json.loads(b'"%s"' % piece) == piece.decode() for piece in PIECES)
