"""What client programs ask of the paced engine: answered in vLLM's shapes, or refused as vLLM does.

The expected texts are what vLLM 0.32.0 answered on a processor (2026-11-30); tests/vllm asks it the same.
"""

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from localcloud.paced.shapes import least
from remote.lengths import AnswerLength
from tests.unit.localcloud.paced.hand_clock import CHAT, COMPLETION, MODEL, Call, asked

WITH_TOOLS = replace(MODEL, auto_tools=True, tool_parser="hermes")
THINKING = replace(MODEL, reasoning_parser="deepseek_r1")

MESSAGES: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 2},
    },
    "required": ["city", "days"],
}
FUNCTION = {"name": "weather", "description": "Now", "parameters": PLACE}
TOOL = {"type": "function", "function": FUNCTION}
NAMED = {"type": "function", "function": {"name": "weather"}}
ARGUMENTS = {"city": "Paris", "days": 2}


def chat(model: Any = WITH_TOOLS, **more: Any) -> Call:
    return asked(CHAT, {"messages": MESSAGES, **more}, model=model)


def counted(call: Call) -> int:
    """The tokens that the check in front of the engine counts."""
    length = AnswerLength()
    length.look(call.body, call.headers[b"content-type"].startswith(b"text/event-stream"), True)
    assert not length.failed
    return length.tokens(True)


# -- tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "finish"),
    [(None, "tool_calls"), ("auto", "tool_calls"), ("required", "tool_calls"), (NAMED, "stop")],
)
def test_a_tool_is_called_with_arguments_of_its_schema(choice: Any, finish: str) -> None:
    call = chat(tools=[TOOL], **({} if choice is None else {"tool_choice": choice}))
    (one,) = ChatCompletion.model_validate(call.said).choices
    assert one.finish_reason == finish
    assert one.message.content is None
    assert one.message.tool_calls is not None
    (made,) = one.message.tool_calls
    assert made.type == "function"
    assert made.function.name == "weather"
    assert json.loads(made.function.arguments) == ARGUMENTS
    assert counted(call) == call.said["usage"]["completion_tokens"] > 1


def test_a_call_of_a_tool_is_streamed() -> None:
    call = chat(tools=[TOOL], tool_choice="required", stream=True, stream_options={"include_usage": True})
    *events, done = call.events
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(event) for event in events]
    calls = [c for chunk in chunks for one in chunk.choices for c in one.delta.tool_calls or ()]
    assert (calls[0].type, calls[0].index) == ("function", 0)
    assert calls[0].id
    assert "".join(c.function.name or "" for c in calls if c.function) == "weather"
    assert json.loads("".join(c.function.arguments or "" for c in calls if c.function)) == ARGUMENTS
    assert [one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason] == [
        "tool_calls"
    ]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == counted(call) == len(calls)


def test_after_a_tools_result_comes_text() -> None:
    """So a program that answers calls comes to an end."""
    result = {"role": "tool", "tool_call_id": "x", "content": "sunny"}
    said = chat(
        messages=[*MESSAGES, {"role": "assistant", "tool_calls": [{}]}, result], tools=[TOOL], max_tokens=3
    )
    assert said.said["choices"][0]["message"]["content"] == " This is placeholder"


def test_a_call_that_is_cut_off_says_so() -> None:
    said = chat(tools=[TOOL], tool_choice="required", max_tokens=3).said["choices"][0]
    assert said["finish_reason"] == "length"
    assert said["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":'


REFUSED: dict[str, tuple[Any, dict[str, Any], str, str | None]] = {
    "auto": (
        MODEL,
        {"tools": [TOOL]},
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        None,
    ),
    "required": (
        MODEL,
        {"tools": [TOOL], "tool_choice": "required"},
        'tool_choice="required" requires --tool-call-parser to be set',
        None,
    ),
    "named": (
        MODEL,
        {"tools": [TOOL], "tool_choice": NAMED},
        'tool_choice=function "weather" requires --tool-call-parser to be set',
        None,
    ),
    "without tools": (
        WITH_TOOLS,
        {"tool_choice": "auto"},
        "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)",
        "tool_choice",
    ),
    "no tools": (
        WITH_TOOLS,
        {"tools": []},
        "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely. "
        "(parameter=tools)",
        "tools",
    ),
    "another tool": (
        WITH_TOOLS,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "The tool specified in `tool_choice` does not match any of the specified `tools` "
        "(parameter=tool_choice)",
        "tool_choice",
    ),
    "a schema that is missing": (
        MODEL,
        {"response_format": {"type": "json_schema"}},
        "When response_format type is 'json_schema', the 'json_schema' field must be provided. "
        "(parameter=response_format)",
        "response_format",
    ),
    "many logprobs": (
        MODEL,
        {"logprobs": True, "top_logprobs": 50},
        "Requested sample logprobs of 50, which is greater than max allowed: 20 "
        "(parameter=logprobs, value=50)",
        "logprobs",
    ),
    "top_logprobs alone": (
        MODEL,
        {"top_logprobs": 2},
        "when using `top_logprobs`, `logprobs` must be set to true. (parameter=top_logprobs)",
        "top_logprobs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_refused_in_its_words(name: str) -> None:
    model, asks, text, param = REFUSED[name]
    call = chat(model, **asks)
    assert call.status == 400
    assert call.said == {"error": {"message": text, "type": "BadRequestError", "param": param, "code": 400}}


def test_a_tool_without_a_function_is_an_invalid_body() -> None:
    said = chat(tools=[{"type": "function"}]).said["error"]
    assert (said["type"], said["param"]) == ("Bad Request", "body.tools.0.function")


def test_a_picture_is_nothing_for_a_text_model() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    said = chat(messages=[{"role": "user", "content": [picture]}])
    assert (said.status, said.said["error"]["message"]) == (400, "this is not a multimodal model")
    file = chat(messages=[{"role": "user", "content": [{"type": "file", "file": {}}]}])
    assert file.said["error"]["message"].startswith("Unsupported chat content part type: 'file'")


def test_tools_count_as_part_of_the_prompt() -> None:
    plain, tools = chat(max_tokens=1), chat(max_tokens=1, tools=[TOOL] * 5, tool_choice="required")
    assert tools.said["usage"]["prompt_tokens"] > plain.said["usage"]["prompt_tokens"] + 200


# -- JSON ----------------------------------------------------------------------------------------------


def test_json_is_of_its_schema() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    call = chat(MODEL, response_format=schema)
    assert json.loads(call.said["choices"][0]["message"]["content"]) == ARGUMENTS
    assert call.said["choices"][0]["finish_reason"] == "stop"
    assert counted(call) == call.said["usage"]["completion_tokens"]
    assert isinstance(
        json.loads(
            chat(MODEL, response_format={"type": "json_object"}).said["choices"][0]["message"]["content"]
        ),
        dict,
    )
    chosen = chat(MODEL, structured_outputs={"choice": ["yes", "no"]})
    assert chosen.said["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "placeholder"),
        ({"type": "string", "maxLength": 3}, "pla"),
        ({"type": "string", "minLength": 14}, "placeholder..."),
        ({"type": "string", "format": "date"}, "2026-11-30"),
        ({"type": "integer", "exclusiveMinimum": 4}, 5),
        ({"type": "integer", "minimum": 5, "multipleOf": 4}, 8),
        ({"type": "number", "maximum": -1.5}, -1.5),
        ({"type": "boolean"}, True),
        ({"type": "null"}, None),
        ({"type": ["string", "null"]}, "placeholder"),
        ({"enum": [3, 4]}, 3),
        ({"const": "x"}, "x"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 0),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [0, 0]),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 0}),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"const": 7}}}, 7),
        ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": {"type": "integer"}}}, 0),
        (True, None),
    ],
)
def test_the_least_of_a_schema(schema: Any, value: Any) -> None:
    assert least(schema) == value


def test_a_schema_that_refers_to_itself_has_an_end() -> None:
    node: Any = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    assert isinstance(least(node), dict)


# -- reasoning and logprobs ----------------------------------------------------------------------------


def test_a_model_with_a_reasoning_parser_thinks_aloud_first() -> None:
    said = chat(THINKING, max_tokens=9, ignore_eos=True).said["choices"][0]["message"]
    assert said["reasoning"] == said["reasoning_content"] == " This is placeholder"
    assert said["content"].startswith(" text of")
    call = chat(THINKING, max_tokens=9, ignore_eos=True, stream=True)
    deltas = [event["choices"][0]["delta"] for event in call.events[:-1]]
    assert "".join(d.get("reasoning", "") for d in deltas) == said["reasoning"]
    assert "".join(d.get("content") or "" for d in deltas) == said["content"]
    assert counted(call) == 9


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_each_token(stream: bool) -> None:
    call = chat(MODEL, logprobs=True, top_logprobs=2, max_tokens=3, ignore_eos=True, stream=stream)
    if stream:
        parts = [event["choices"][0] for event in call.events[:-1]]
        content = [entry for part in parts for entry in (part["logprobs"] or {"content": []})["content"]]
    else:
        content = ChatCompletion.model_validate(call.said).model_dump()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [" This", " is", " placeholder"]
    assert content[0]["bytes"] == list(b" This")
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    plain = asked(COMPLETION, {"prompt": "x", "max_tokens": 2, "logprobs": 1, "ignore_eos": True}).said
    assert plain["choices"][0]["logprobs"] == {
        "text_offset": [0, 5],
        "token_logprobs": [-0.25, -0.25],
        "tokens": [" This", " is"],
        "top_logprobs": [{" This": -0.25}, {" is": -0.25}],
    }


# -- /v1/responses -------------------------------------------------------------------------------------


def response(model: Any = WITH_TOOLS, **more: Any) -> Call:
    return asked("/v1/responses", {"input": "Hello", **more}, model=model)


def named_events(call: Call) -> list[tuple[str, Any]]:
    """(name, data) of each event."""
    parts = [part.split("\ndata: ") for part in call.body.decode().split("\n\n")[:-1]]
    return [(name.removeprefix("event: "), json.loads(data)) for name, data in parts]


def test_a_response_is_made_whole() -> None:
    call = response(max_output_tokens=3, ignore_eos=True, instructions="Be brief")
    said = Response.model_validate(call.said)
    assert said.output_text == " This is placeholder"
    assert (said.status, said.instructions) == ("incomplete", "Be brief")
    assert said.incomplete_details is not None
    assert said.incomplete_details.reason == "max_output_tokens"
    assert said.usage is not None
    assert said.usage.output_tokens == counted(call) == 3
    assert said.usage.total_tokens == said.usage.input_tokens + 3


def test_a_response_is_streamed() -> None:
    call = response(max_output_tokens=3, ignore_eos=True, stream=True)
    events = named_events(call)
    assert [name for name, _ in events] == [
        *(
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ),
        *["response.output_text.delta"] * 3,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(data["type"] == name for name, data in events)
    deltas = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    assert Response.model_validate(events[-1][1]["response"]).output_text == deltas == " This is placeholder"
    assert counted(call) == 3


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "name": "weather"}])
def test_a_response_may_be_a_call_of_a_tool(choice: Any) -> None:
    asks = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": choice}
    call = response(**asks)
    (item,) = Response.model_validate(call.said).output
    assert item.type == "function_call"
    assert (item.name, json.loads(item.arguments)) == ("weather", ARGUMENTS)
    streamed = named_events(response(**asks, stream=True))
    kind = "response.function_call_arguments.delta"
    assert json.loads("".join(data["delta"] for name, data in streamed if name == kind)) == ARGUMENTS
    assert response(MODEL, **asks, max_output_tokens=2).said["output"][0]["type"] == "message", "as vLLM does"


def test_a_response_takes_a_conversation_with_calls_and_a_schema() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "function_call", "name": "weather", "arguments": "{}", "call_id": "a"},
        {"type": "function_call_output", "call_id": "a", "output": "sunny"},
    ]
    asks = {"input": items, "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 3}
    assert response(**asks).said["output"][0]["type"] == "message"
    text = {"format": {"type": "json_schema", "name": "place", "schema": PLACE}}
    assert json.loads(Response.model_validate(response(text=text).said).output_text) == ARGUMENTS


def test_a_response_that_goes_on_from_another_is_not_found() -> None:
    call = response(previous_response_id="resp_none")
    assert call.status == 404
    assert call.said["error"] == {
        "message": "Response with id 'resp_none' not found.",
        "type": "invalid_request_error",
        "param": "response_id",
        "code": 404,
    }
    assert asked("/v1/responses", {}).said["error"]["param"] == "body.input"


# -- /v1/messages --------------------------------------------------------------------------------------

ANTHROPIC_TOOL = {"name": "weather", "input_schema": PLACE}


def message(model: Any = WITH_TOOLS, **more: Any) -> Call:
    return asked("/v1/messages", {"messages": MESSAGES, "max_tokens": 100, **more}, model=model)


def test_a_message_is_answered_whole() -> None:
    call = message(max_tokens=3, ignore_eos=True, system="Be brief")
    said = call.said
    assert (said["type"], said["role"], said["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert said["content"] == [{"type": "text", "text": " This is placeholder"}]
    assert said["usage"]["output_tokens"] == counted(call) == 3
    count = asked("/v1/messages/count_tokens", {"messages": MESSAGES, "system": "Be brief"}).said
    assert count == {"input_tokens": said["usage"]["input_tokens"]}


def test_a_message_is_streamed() -> None:
    call = message(max_tokens=3, ignore_eos=True, stream=True)
    events = named_events(call)
    assert [name for name, _ in events] == [
        *("message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta") == (
        " This is placeholder"
    )
    assert events[-2][1]["usage"]["output_tokens"] == counted(call) == 3


@pytest.mark.parametrize(
    "choice", [None, {"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}]
)
def test_a_message_may_use_a_tool(choice: Any) -> None:
    asks = {"tools": [ANTHROPIC_TOOL], **({"tool_choice": choice} if choice else {})}
    (block,) = message(**asks).said["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "weather", ARGUMENTS)
    events = named_events(message(**asks, stream=True))
    parts = [data["delta"]["partial_json"] for name, data in events if name == "content_block_delta"]
    assert json.loads("".join(parts)) == ARGUMENTS
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "sunny"}]}
    asks |= {"messages": [*MESSAGES, result], "tool_choice": {"type": "auto"}, "max_tokens": 3}
    assert message(**asks).said["content"][0]["type"] == "text"


def test_refusals_of_a_message_have_anthropics_shape() -> None:
    refused = message(MODEL, tools=[ANTHROPIC_TOOL])
    assert (refused.status, refused.said["type"]) == (400, "error")
    assert refused.said["error"]["message"].startswith('"auto" tool choice requires')
    source = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
    document = message(messages=[{"role": "user", "content": [{"type": "document", "source": source}]}])
    assert document.status == 400
    assert document.said["error"]["param"] == "body.messages.0.content"
    assert asked("/v1/messages", {"messages": MESSAGES}).said["error"]["param"] == "body.max_tokens"


# -- pooling -------------------------------------------------------------------------------------------


def test_a_model_that_embeds_answers_nothing_else() -> None:
    model = replace(MODEL, pooling="embed")
    said = asked("/v1/embeddings", {"input": ["abcd", "efgh" * 3]}, model=model).said
    found = CreateEmbeddingResponse.model_validate(said)
    assert [len(one.embedding) for one in found.data] == [384, 384]
    assert sum(x * x for x in found.data[0].embedding) == pytest.approx(1.0)
    assert (found.usage.prompt_tokens, said["usage"]["completion_tokens"]) == (4, 0)
    packed = asked("/v1/embeddings", {"input": "abcd", "encoding_format": "base64"}, model=model).said
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<384f", raw) == pytest.approx(found.data[0].embedding)
    assert asked(CHAT, {"messages": MESSAGES}, model=model).said == {"detail": "Not Found"}


def test_a_model_that_compares_ranks_documents() -> None:
    model = replace(MODEL, pooling="classify")
    call = asked("/v1/rerank", {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}, model=model)
    results = call.said["results"]
    assert len(results) == 2
    assert results[0]["relevance_score"] >= results[1]["relevance_score"]
    assert all(one["document"]["text"] == "abc"[one["index"]] for one in results)
    assert set(call.said["usage"]) == {"prompt_tokens", "total_tokens"}
    assert counted(call) == 0
    scores = asked("/v1/score", {"text_1": "q", "text_2": ["a", "b"]}, model=model).said["data"]
    assert [(one["index"], one["object"], 0.0 < one["score"] < 1.0) for one in scores] == [
        (0, "score", True),
        (1, "score", True),
    ]
    wrong = asked("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"] * 3}, model=model)
    assert wrong.status == 400


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/score", "/pooling", "/classify"])
def test_a_model_of_text_does_not_have_those_routes(path: str) -> None:
    call = asked(path, {"input": "a"})
    assert (call.status, call.said) == (404, {"detail": "Not Found"})
