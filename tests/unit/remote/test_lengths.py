"""How long requests and answers are: as the engine's usage says, else by their text; on every route."""

import json
from pathlib import Path
from typing import Any

import pytest

from remote.lengths import AnswerLength, request_size
from tests import sizes_page

# -- requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sizes_page.CASES, ids=lambda c: f"{c.what} {c.path}")
def test_an_instance_counts_what_its_client_tells(case: sizes_page.Case) -> None:
    found = sizes_page.sizes(case)
    assert found.told > 0
    assert abs(found.difference) <= 0.05


def test_the_table_in_the_docs_is_what_both_sides_say() -> None:
    assert sizes_page.BEGIN + sizes_page.table() + sizes_page.END in sizes_page.PAGE.read_text(), "make sizes"


def test_a_megabyte_of_a_file_is_no_more_than_a_picture() -> None:
    media = [c for c in sizes_page.CASES if "1 MB" in c.what]
    assert len(media) == 7
    assert all(1000 <= sizes_page.sizes(c).told < 1100 for c in media)


def test_a_query_is_read_once_for_each_document() -> None:
    said = {"query": "q" * 400, "documents": ["d" * 40] * 10}
    assert request_size(json.dumps(said).encode()) == 10 * (400 + 40)
    pairs = {"text_1": ["q" * 400] * 10, "text_2": ["d" * 40] * 10}
    assert request_size(json.dumps(pairs).encode()) == 10 * (400 + 40)


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (b"", 0),
        (b"--boundary\r\n", 4000),
        (b"[1, 2]", 4000),
        (b"[" * 100_000, 4000),
        (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", 0),
        (b'{"prompt": "\\ud800"}', 3),
        (b'{"messages": 7, "query": 3, "documents": {}}', 0),
        (b"\xff\xfe", 4000),
    ],
    ids=lambda v: str(v)[:20],
)
def test_whatever_is_sent_has_a_size(body: bytes, size: int) -> None:
    assert request_size(body) == size


# -- answers -------------------------------------------------------------------------------------------


def counted(answer: bytes, *, stream: bool = True, complete: bool = True, piece: int = 0) -> tuple[int, bool]:
    """(tokens, whether it failed) of the answer, which comes in pieces of so many bytes."""
    length = AnswerLength()
    for at in range(0, len(answer), piece or len(answer)):
        length.look(answer[at : at + piece] if piece else answer, stream, False)
    length.look(b"", stream, True)
    return length.tokens(complete), length.failed


def events(*said: dict[str, Any], named: bool = False) -> bytes:
    """Server-sent events, as vLLM writes them."""
    names = (f"event: {one['type']}\n" if named else "" for one in said)
    data = (json.dumps(one, separators=(",", ":"), ensure_ascii=False) for one in said)
    return "".join(f"{name}data: {one}\n\n" for name, one in zip(names, data, strict=True)).encode()


WORDS = "The quick brown fox jumps over the lazy dog while it rains in the old town by the sea. "
"""20 words; 3 of them have 13 bytes and are 3 tokens."""


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "choices": [{"index": 0, "delta": {"content": text, **more}, "logprobs": None}],
    }


def completion(text: str) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "logprobs": None}]}


def arguments(text: str) -> dict[str, Any]:
    call = {"index": 0, "function": {"arguments": text}}
    return {"choices": [{"index": 0, "delta": {"content": None, "tool_calls": [call]}}]}


def reasoning(text: str) -> dict[str, Any]:
    """As vLLM of some versions, under both names."""
    return {"choices": [{"index": 0, "delta": {"reasoning": text, "reasoning_content": text}}]}


def response(text: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "delta": text, "item_id": "msg_1"}


def block(text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


STREAMS = [chat, completion, arguments, reasoning, response, block]


@pytest.mark.parametrize("event", STREAMS)
@pytest.mark.parametrize("tokens", [2, 3, 8])
def test_several_tokens_an_event_are_counted_by_their_text(event: Any, tokens: int) -> None:
    """As of speculative decoding; 120 tokens, of 4.3 bytes each."""
    words = [w + " " for w in WORDS.split()] * 6
    parts = ["".join(words[n : n + tokens]) for n in range(0, 120, tokens)]
    found, failed = counted(events(*map(event, parts)))
    assert not failed
    assert found == pytest.approx(120, rel=0.15)


@pytest.mark.parametrize("event", STREAMS)
@pytest.mark.parametrize("text", [" word", "码", '"', "\\", "", "\n"])
def test_one_token_an_event_is_counted_by_its_events(event: Any, text: str) -> None:
    assert counted(events(*[event(text)] * 120)) == (120, False)


@pytest.mark.parametrize("piece", [1, 7, 100, 1000])
def test_the_pieces_change_nothing(piece: int) -> None:
    stream = events(*[chat('three "words" here ')] * 40)
    assert counted(stream, piece=piece) == counted(stream)


USAGES: dict[str, bytes] = {
    "/v1/chat/completions": events(
        chat("a b c d e f g"), {"choices": [], "usage": {"completion_tokens": 77}}
    ),
    "/v1/responses": events(
        {"type": "response.created", "response": {"tools": [{"output_tokens": 5}], "usage": None}},
        *map(response, ["a", "b"]),
        {"type": "response.output_text.done", "text": WORDS},
        {
            "type": "response.completed",
            "response": {
                "output": [{"content": [{"text": WORDS}]}],
                "usage": {
                    "input_tokens": 9,
                    "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens": 77,
                    "output_tokens_details": {"reasoning_tokens": 3},
                    "total_tokens": 86,
                },
                "user": None,
            },
        },
        named=True,
    ),
    "/v1/messages": events(
        {"type": "message_start", "message": {"role": "assistant", "usage": {"output_tokens": 0}}},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        *map(block, ["a", "b"]),
        {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 9, "output_tokens": 77}},
        {"type": "message_stop"},
        named=True,
    ),
}


@pytest.mark.parametrize("route", USAGES)
def test_the_engines_own_usage_is_believed_on_every_route(route: str) -> None:
    assert counted(USAGES[route]) == (77, False)


@pytest.mark.parametrize("route", USAGES)
def test_a_stream_that_is_cut_counts_what_had_come(route: str) -> None:
    """Also where its first event has a usage of 0."""
    begun = USAGES[route].split(b"\n\n")
    cut = b"\n\n".join(begun[: {"/v1/responses": 3, "/v1/messages": 4}.get(route, 1)]) + b"\n\n"
    found, _ = counted(cut, complete=False)
    assert found == {"/v1/responses": 2, "/v1/messages": 2}.get(route, 3)


WHOLE: dict[str, tuple[dict[str, Any], int]] = {
    "chat": ({"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": 7}}, 7),
    "responses": ({"output": [{"content": [{"text": "a"}]}], "usage": {"output_tokens": 7}}, 7),
    "messages": ({"content": [{"text": "a"}], "usage": {"input_tokens": 1, "output_tokens": 7}}, 7),
    "embeddings": (
        {"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 9, "completion_tokens": 0}},
        0,
    ),
    "rerank": ({"results": [{"document": {"text": WORDS}}], "usage": {"total_tokens": 9}}, 0),
    "score": ({"data": [{"score": 0.5}], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, 0),
    "a transcription": ({"text": "four byte word text "}, 5),
    "a refusal": ({"error": {"message": WORDS, "type": "BadRequestError"}}, 0),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_answer_is_counted_by_its_usage_else_by_its_text(kind: str) -> None:
    said, tokens = WHOLE[kind]
    for separators in ((",", ":"), (", ", ": ")):
        assert counted(json.dumps(said, separators=separators).encode(), stream=False) == (tokens, False)


FAILURES: dict[str, bytes] = {
    "an error": events(chat("a"), {"error": {"message": "dead"}}) + b"data: [DONE]\n\n",
    "of /v1/responses": events(response("a"), {"type": "response.failed", "response": {}}, named=True),
    "an error of /v1/responses": events(response("a"), {"type": "error", "code": "x"}, named=True),
    "of /v1/messages": events(block("a"), {"type": "error", "error": {"message": "dead"}}, named=True),
    "at once": events({"type": "error", "error": {"message": "dead"}}, named=True),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("piece", [0, 1, 10])
def test_a_stream_that_ends_in_an_error_has_failed(kind: str, piece: int) -> None:
    assert counted(FAILURES[kind], piece=piece)[1]


@pytest.mark.parametrize("event", STREAMS)
def test_a_text_that_looks_like_an_error_is_none(event: Any) -> None:
    for text in ('\nevent: error\ndata: {"error": 1}', '{"error"', "\n\nevent: response.failed\n"):
        assert not counted(events(event(text)))[1]


REAL = Path(__file__).parent / "vllm_0.32_answers.json"


@pytest.mark.parametrize("name", json.loads(REAL.read_text()))
def test_answers_of_real_vllm_are_counted(name: str) -> None:
    """As vLLM 0.32.0 gave them on a processor; a stream without usage by its events, 3 of 4 tokens."""
    said = json.loads(REAL.read_text())[name]
    found, failed = counted(said["answer"].encode(), stream=said["stream"])
    assert (found, failed) == (said["tokens"], False)
