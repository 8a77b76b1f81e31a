"""What a request's body says, how long its answers are, and what is refused."""

import pytest

from localcloud.paced.completion_request import count_tokens, natural_length
from tests.unit.localcloud.paced.hand_clock import CHAT, COMPLETION, HELLO, HELLO_CHAT, asked


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


def test_a_chat_message_may_be_in_parts_or_empty() -> None:
    messages = [
        {"role": "system", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there!"}]},
    ]
    said = asked(CHAT, {"messages": messages, "max_completion_tokens": 2, "ignore_eos": True}).said
    assert said["usage"]["prompt_tokens"] == 14
    assert said["usage"]["completion_tokens"] == 2


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
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": 2, "echo": True}, "logprobs"),
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
