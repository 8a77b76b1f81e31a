"""How long a request is, without a tokenizer."""

import json

import pytest

from fleet_client.token_estimate import TokenEstimate, estimate_request


@pytest.mark.parametrize(
    ("target", "body", "size"),
    [
        ("/v1/completions", {"prompt": "x" * 400, "max_tokens": 50}, TokenEstimate(100, 50)),
        ("/v1/completions", {"prompt": "ü" * 400}, TokenEstimate(200, None)),
        ("/v1/completions", {"prompt": [5] * 300, "max_tokens": 50}, TokenEstimate(300, 50)),
        ("/v1/completions", {"prompt": [[5] * 300, [6] * 200], "max_tokens": 50}, TokenEstimate(500, 100, 2)),
        ("/v1/completions", {"prompt": ["abcd", "efgh"], "max_tokens": 10, "n": 3}, TokenEstimate(2, 60, 2)),
        ("/v1/completions", {"prompt": "abcd", "max_tokens": 10, "best_of": 4}, TokenEstimate(1, 40)),
        ("/v1/completions", {"prompt": "abcd", "max_tokens": 0}, TokenEstimate(1, 1)),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 400}]},
            TokenEstimate(104, None),
        ),
        ("/v1/chat/completions", {"messages": [], "max_completion_tokens": 7, "n": 2}, TokenEstimate(0, 14)),
        ("/v1/responses", {"input": "x" * 40, "max_output_tokens": 9}, TokenEstimate(10, 9)),
        ("/v1/embeddings", {"input": ["x" * 40] * 10}, TokenEstimate(100, 1, 10)),
        ("/v1/completions", {"prompt": None, "max_tokens": True}, TokenEstimate(0, None)),
        ("/v1/completions", {"prompt": [1] * 10, "max_tokens": 10**15}, TokenEstimate(10, 10_000_000)),
        ("/v1/completions", ["a list"], TokenEstimate(1000, None)),
        ("/v1/completions", "a text", TokenEstimate(1000, None)),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_request_is_sized_by_its_ids_or_the_length_of_its_text(
    target: str, body: object, size: TokenEstimate
) -> None:
    assert estimate_request("POST", target, json.dumps(body).encode()) == size


def test_a_picture_counts_as_one_and_not_by_its_bytes() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    text = {"type": "text", "text": "x" * 400}
    body = {"messages": [{"role": "user", "content": [text, picture]}]}
    assert (
        1100
        <= estimate_request("POST", "/v1/chat/completions", json.dumps(body).encode()).prompt_tokens
        <= 1120
    )


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[" * 100_000, b"--boundary\r\n"], ids=lambda b: b[:4])
def test_what_is_not_json_has_a_size_too(body: bytes) -> None:
    assert estimate_request("POST", "/v1/audio/transcriptions", body) in (
        TokenEstimate(0, 1),
        TokenEstimate(1000, None),
    )
    assert estimate_request("GET", "/v1/models", body) == TokenEstimate(0, 1)


def test_text_with_lone_surrogates_has_a_size() -> None:
    assert estimate_request("POST", "/v1/completions", b'{"prompt": "\\ud800\\ud800"}') == TokenEstimate(
        2, None
    )
