"""/v1/responses: read as a chat, answered as a response."""

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

KEPT = (
    *("instructions", "metadata", "parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p"),
    *("max_output_tokens", "text", "truncation", "user"),
)
"""Fields of the request that the response repeats."""

USUAL: Mapping[str, Any] = {
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


def read_response(said: Mapping[str, Any], model: ServedModel) -> CompletionRequest:
    """Return what the body asks for; raise RequestError."""
    read_model(said, model)
    if said.get("previous_response_id") is not None:
        text = f"Response with id '{said['previous_response_id']!s:.60}' not found."
        raise RequestError(text, "response_id", 404, "invalid_request_error")
    asked = {
        "model": said.get("model"),
        "messages": _messages(said),
        "max_tokens": said.get("max_output_tokens"),
        "temperature": said.get("temperature"),
        "top_p": said.get("top_p"),
        "stream": said.get("stream"),
        "ignore_eos": said.get("ignore_eos"),
        **_tools(said, model),
        **_format(said),
    }
    return read_request({k: v for k, v in asked.items() if v is not None}, model, chat=True)


def _messages(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = said.get("input")
    if given is None:
        text = "1 validation error:\n  {'type': 'missing', 'loc': 'body.input', 'msg': 'Field required'}"
        raise RequestError(text, "body.input", kind="Bad Request")
    begin = said.get("instructions")
    messages = [{"role": "system", "content": begin}] if begin else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError("input: wanted a text or a list of items", "input")
    for item in given:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "function_call":
            messages.append({"role": "assistant", "content": None, "tool_calls": [dict(item)]})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": str(item.get("output"))})
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind != "reasoning":
            raise RequestError(f"input: items of type {kind!s:.40} are not read", "input")
    return messages


def _tools(said: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """Return the tools as a chat has them; without a parser vLLM answers with text here."""
    tools = [t for t in said.get("tools") or () if isinstance(t, dict) and t.get("type") == "function"]
    if not tools or not (model.tool_parser and model.auto_tools):
        return {}
    choice = said.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return {"tools": [{"type": "function", "function": tool} for tool in tools], "tool_choice": choice}


def _format(said: Mapping[str, Any]) -> dict[str, Any]:
    text = said.get("text")
    wanted = text.get("format") if isinstance(text, dict) else None
    if not isinstance(wanted, dict):
        return {}
    if wanted.get("type") == "json_schema":
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}
    return {"response_format": wanted}


class ResponseAnswer:
    """Makes the bytes of one response, whole or as stream events. It has one item: a message or a call."""

    def __init__(self, plan: AnswerPlan) -> None:
        """Make the answer that is planned."""
        request, said, token = plan.request, plan.said, plan.token
        self._request = request
        (self._wanted, reason), *_ = plan.lengths
        self._made = 0
        self._number = 0
        self.id = f"resp_{token}"
        self._call = request.shape.tool is not None
        self._item_id = f"{'fc' if self._call else 'msg'}_{token}"
        cut = reason == "length"
        kept = {**dict.fromkeys(KEPT), **USUAL, **{k: said[k] for k in KEPT if said.get(k) is not None}}
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": plan.created,
            "model": plan.model.names[0],
            **kept,
        }
        self._head |= {"background": False, "previous_response_id": None, "service_tier": "auto"}
        self._ends = {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }

    @property
    def done(self) -> bool:
        """Whether `events` has returned the whole answer."""
        return self._made == self._wanted

    def events(self, came: Iterable[tuple[int, int]]) -> bytes:
        """Return the events of these tokens, (choice, tokens) in the order they came."""
        made = [] if self._made else self._begin()
        for _, tokens in came:
            for at in range(self._made, self._made + tokens):
                made.append(self._delta(*token_at(self._request, self._wanted, at)))
            self._made += tokens
        if self.done:
            made += self._end()
        return b"".join(made)

    def _begin(self) -> list[bytes]:
        begun = self._response([], {"status": "in_progress", "incomplete_details": None}, None)
        item = self._item({}, "in_progress")
        made = [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=item),
        ]
        if not self._call:
            made.append(self._part("response.content_part.added", part=_part("")))
        return made

    def _delta(self, of: str, text: str) -> bytes:
        if of == "name":
            return b""  # the item has it
        if of == "arguments":
            return self._part("response.function_call_arguments.delta", delta=text, content=False)
        return self._part("response.output_text.delta", delta=text, logprobs=[])

    def _end(self) -> list[bytes]:
        texts = tokens_of(self._request, self._wanted)
        item = self._item(texts, "completed")
        if self._call:
            arguments = texts.get("arguments", "")
            name = self._request.shape.tool
            made = [
                self._part(
                    "response.function_call_arguments.done", arguments=arguments, name=name, content=False
                )
            ]
        else:
            text = _all_of(texts)
            made = [
                self._part("response.output_text.done", text=text, logprobs=[]),
                self._part("response.content_part.done", part=_part(text)),
            ]
        made.append(self._event("response.output_item.done", output_index=0, item=item))
        whole = self._response([item], self._ends, self._wanted)
        return [*made, self._event("response.completed", response=whole)]

    def _part(self, kind: str, *, content: bool = True, **fields: Any) -> bytes:
        place = {"content_index": 0} if content else {}
        return self._event(kind, item_id=self._item_id, output_index=0, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = compact({**fields, "sequence_number": self._number, "type": kind})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    def _item(self, texts: Mapping[str, str], status: str) -> dict[str, Any]:
        if self._call:
            return {
                "id": self._item_id,
                "type": "function_call",
                "call_id": f"chatcmpl-tool-{self.id[-16:]}",
                "name": self._request.shape.tool,
                "arguments": texts.get("arguments", ""),
                "status": status,
            }
        content = [_part(_all_of(texts))] if texts else []
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(
        self, output: list[dict[str, Any]], ends: Mapping[str, Any], tokens: int | None
    ) -> dict[str, Any]:
        prompt = self._request.prompt_tokens
        usage = (
            None
            if tokens is None
            else {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + tokens,
            }
        )
        return {**self._head, "output": output, **ends, "usage": usage}

    def whole(self) -> bytes:
        """Return the whole answer as one JSON object, not streamed."""
        item = self._item(tokens_of(self._request, self._wanted), "completed")
        return compact(self._response([item], self._ends, self._wanted))


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _all_of(texts: Mapping[str, str]) -> str:
    return texts.get("reasoning", "") + texts.get("content", "")
