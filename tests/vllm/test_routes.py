"""What client programs ask of real vLLM: tools, JSON, logprobs, /v1/responses, /v1/messages.

The model's weights are random, so what it says is noise; its shape is the engine's own.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from remote.events import Events
from tests.vllm.fleet import BOOT_S, MODEL, Fleet
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(500)

MESSAGES: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": PLACE}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    wait_for("it serves", lambda: any(row["in_queue"] for row in fleet.status()["instances"]), BOOT_S)
    with fleet.openai() as one:
        yield one


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=1, **more)


def streamed(client: openai.OpenAI, **more: Any) -> tuple[str, str, str | None, int]:
    """(name of the tool, its arguments, finish reason, output tokens) of a stream."""
    name = arguments = ""
    reason, tokens = None, 0
    for event in ask(client, stream=True, stream_options={"include_usage": True}, **more):
        tokens = event.usage.completion_tokens if event.usage else tokens
        for choice in event.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    return name, arguments, reason, tokens


def test_tools_may_be_used(client: openai.OpenAI) -> None:
    """Whether it does is the model's own choice."""
    answer = ask(client, tools=[TOOL], max_tokens=20)
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tools_must_be_used(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, tools=[TOOL], tool_choice=choice, max_tokens=200)
    message = answer.choices[0].message
    assert [call.function.name for call in message.tool_calls or ()][:1] == ["weather"], message


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls_of_tools_are_streamed(client: openai.OpenAI, choice: Any) -> None:
    name, arguments, reason, tokens = streamed(client, tools=[TOOL], tool_choice=choice, max_tokens=200)
    assert name.startswith("weather")
    assert arguments
    assert reason in ("tool_calls", "stop")
    assert tokens > 0


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {"name": "place", "schema": PLACE}
    answer = ask(client, response_format={"type": "json_schema", "json_schema": schema}, max_tokens=200)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def test_logprobs_come_with_each_token(client: openai.OpenAI) -> None:
    patient = client.with_options(timeout=300.0)  # what ranks them is compiled once, with one core at times
    answer = ask(patient, logprobs=True, top_logprobs=2, max_tokens=3)
    assert len(answer.choices[0].logprobs.content) == 3
    plain = patient.completions.create(model=MODEL, prompt="Once", max_tokens=3, logprobs=2)
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.tokens or ()) == 3


def test_responses_are_made_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="Hello", max_output_tokens=5)
    assert whole.usage is not None
    assert whole.usage.output_tokens == 5
    stream = client.responses.create(model=MODEL, input="Hello", max_output_tokens=5, stream=True)
    kinds = [event.type for event in stream]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert "response.output_text.delta" in kinds


def test_messages_of_anthropic_are_answered(fleet: Fleet) -> None:
    asked = {"model": MODEL, "max_tokens": 5, "messages": MESSAGES}
    answer = fleet.post(fleet.lease(), "/v1/messages", asked)
    assert answer.status == 200
    assert answer.said["usage"]["output_tokens"] == 5
    tool = {"name": "weather", "input_schema": PLACE}
    answer = fleet.post(fleet.lease(), "/v1/messages", asked | {"tools": [tool]})
    assert answer.status == 200
    assert {part["type"] for part in answer.said["content"]} <= {"tool_use", "text"}


REFUSED: dict[str, tuple[str, dict[str, Any], int]] = {
    "embeddings": ("/v1/embeddings", {"input": "a"}, 404),
    "rerank": ("/v1/rerank", {"query": "a", "documents": ["b"]}, 404),
    "score": ("/v1/score", {"text_1": "a", "text_2": "b"}, 404),
    "a tool choice without tools": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "tool_choice": "required"},
        400,
    ),
    "a picture": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        400,
    ),
    "a suffix": ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_text_model_cannot_do_is_refused(fleet: Fleet, what: str) -> None:
    """The paced engine refuses the same with the same status (tests/unit/localcloud/paced)."""
    path, asked, status = REFUSED[what]
    assert fleet.post(fleet.lease(), path, {"model": MODEL, **asked}).status == status


COUNTED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 9},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 9},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}


@pytest.mark.parametrize("path", COUNTED)
def test_an_instance_counts_what_vllm_says_on_every_route(fleet: Fleet, path: str) -> None:
    """Its events, from which the loadbalancer learns how long answers are."""
    lease = fleet.lease()
    assert fleet.post(lease, path, {"model": MODEL, "ignore_eos": True, **COUNTED[path]}).status == 200
    ring = Events(str(fleet.home(lease.instance_id) / "fleet" / "boot"))

    def both() -> list[tuple[str, int]] | None:
        told = [(e.kind, e.size) for e in ring.after(0).events if e.request_id == lease.request_id]
        return told if len(told) > 1 else None

    told = wait_for("the end to be told, which may come after the answer", both)
    ring.close()
    assert [kind for kind, _ in told] == ["started", "finished"]
    assert told[1][1] == 9
