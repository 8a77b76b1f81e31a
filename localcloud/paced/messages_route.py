"""/v1/messages of Anthropic: read as a chat, answered as a message."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from localcloud.paced.answers import AnswerPlan, compact
from localcloud.paced.completion_request import (
    CompletionRequest,
    read_model,
    read_request,
    token_at,
    tokens_of,
)
from localcloud.paced.request_error import RequestError
from localcloud.paced.served_model import ServedModel

BLOCKS = ("text", "image", "tool_use", "tool_result", "tool_reference", "thinking", "redacted_thinking")
"""Kinds of content that vLLM reads; a document it refuses."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_message(said: Mapping[str, Any], model: ServedModel) -> CompletionRequest:
    """Return what the body asks for; raise RequestError."""
    if not isinstance(said.get("max_tokens"), int):
        raise _missing("max_tokens")
    return read_request(as_chat(said, model), model, chat=True)


def as_chat(said: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """Return the same as a chat's body; raise RequestError."""
    read_model(said, model)
    given = said.get("messages")
    if not isinstance(given, list):
        raise _missing("messages")
    messages: list[dict[str, Any]] = []
    if said.get("system"):
        messages.append({"role": "system", "content": _content(said["system"], "system")})
    for place, message in enumerate(given):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        results = isinstance(content, list) and any(_kind(b) == "tool_result" for b in content)
        where = f"messages.{place}.content"
        messages.append({"role": "tool" if results else role, "content": _content(content, where)})
    asked: dict[str, Any] = {"model": said.get("model"), "messages": messages}
    for name in ("max_tokens", "temperature", "top_p", "stream", "ignore_eos"):
        asked[name] = said.get(name)
    if said.get("stop_sequences"):
        asked["stop"] = said["stop_sequences"]
    if said.get("tools"):
        asked["tools"] = [_tool(tool) for tool in said["tools"]]
        choice = said.get("tool_choice") or {"type": "auto"}
        asked["tool_choice"] = CHOICES.get(str(choice.get("type"))) or {
            "type": "function",
            "function": {"name": choice.get("name")},
        }
    return {name: value for name, value in asked.items() if value is not None}


def _missing(name: str) -> RequestError:
    text = f"1 validation error:\n  {{'type': 'missing', 'loc': 'body.{name}', 'msg': 'Field required'}}"
    return RequestError(text, f"body.{name}", kind="Bad Request")


def _kind(block: object) -> object:
    return block.get("type") if isinstance(block, dict) else None


def _content(content: object, where: str) -> object:
    """Return a chat's content: texts of all blocks; pictures stay, for they are refused there."""
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for place, block in enumerate(content):
        kind = _kind(block)
        if kind not in BLOCKS:
            text = (
                "1 validation error:\n  {'type': 'literal_error', "
                f"'loc': 'body.{where}.{place}.type', 'msg': 'Input should be one of {', '.join(BLOCKS)}'}}"
            )
            raise RequestError(text, f"body.{where}", kind="Bad Request")
        if kind == "image":
            parts.append({"type": "image_url"})
        elif kind == "tool_result":
            inside = _content(block.get("content") or "", where)
            parts += inside if isinstance(inside, list) else [{"type": "text", "text": str(inside)}]
        else:
            text = block.get("text") or block.get("thinking") or compact(block.get("input") or "").decode()
            parts.append({"type": "text", "text": text})
    return parts


def _tool(tool: object) -> dict[str, Any]:
    if not isinstance(tool, dict):
        return {}
    return {
        "type": "function",
        "function": {"name": tool.get("name"), "parameters": tool.get("input_schema")},
    }


class MessageAnswer:
    """Makes the bytes of one message, whole or as stream events. Its one block is text or a use of a tool."""

    def __init__(self, plan: AnswerPlan) -> None:
        """Make the answer that is planned."""
        request, token = plan.request, plan.token
        self._request = request
        self._model = plan.model.names[0]
        (self._wanted, reason), *_ = plan.lengths
        self._made = 0
        self.id = f"chatcmpl-{token}"
        tool = request.shape.tool
        self._stop = "max_tokens" if reason == "length" else "end_turn" if tool is None else "tool_use"
        self._block: dict[str, Any] = (
            {"type": "text", "text": ""}
            if tool is None
            else {"type": "tool_use", "id": f"chatcmpl-tool-{token}", "name": tool, "input": {}}
        )

    @property
    def done(self) -> bool:
        """Whether `events` has returned the whole answer."""
        return self._made == self._wanted

    def events(self, came: Iterable[tuple[int, int]]) -> bytes:
        """Return the events of these tokens, (choice, tokens) in the order they came."""
        made = []
        if not self._made:
            begun = {**self._message([], None, 0), "stop_sequence": None}
            made.append(_event("message_start", message=begun))
            made.append(_event("content_block_start", index=0, content_block=self._block))
        for _, tokens in came:
            for at in range(self._made, self._made + tokens):
                of, text = token_at(self._request, self._wanted, at)
                if of == "arguments":
                    made.append(_delta({"type": "input_json_delta", "partial_json": text}))
                elif of != "name":
                    made.append(_delta({"type": "text_delta", "text": text}))
            self._made += tokens
        if self.done:
            made.append(_event("content_block_stop", index=0))
            ends = {"stop_reason": self._stop, "stop_sequence": None}
            made.append(_event("message_delta", delta=ends, usage=self._usage(self._wanted)))
            made.append(_event("message_stop"))
        return b"".join(made)

    def _usage(self, tokens: int) -> dict[str, int]:
        return {"input_tokens": self._request.prompt_tokens, "output_tokens": tokens}

    def _message(self, content: list[dict[str, Any]], stop: str | None, tokens: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._model,
            "stop_reason": stop,
            "usage": self._usage(tokens),
        }

    def whole(self) -> bytes:
        """Return the whole answer as one JSON object, not streamed."""
        texts = tokens_of(self._request, self._wanted)
        if self._block["type"] == "tool_use":
            block = self._block | {"input": _read(texts.get("arguments", ""))}
        else:
            block = self._block | {"text": texts.get("reasoning", "") + texts.get("content", "")}
        return compact(self._message([block], self._stop, self._wanted))


def _read(arguments: str) -> Any:
    """Return the arguments of a call; of those that were cut off, none."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), compact({"type": kind, **fields}))


def _delta(delta: Mapping[str, str]) -> bytes:
    return _event("content_block_delta", delta=delta, index=0)
