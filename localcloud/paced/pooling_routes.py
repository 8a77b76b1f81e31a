"""Embeddings, rerank and score, as vLLM serves them with --runner pooling; the numbers mean nothing."""

import base64
import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any

from localcloud.paced.answers import AnswerPlan, compact
from localcloud.paced.completion_request import (
    CompletionRequest,
    Prompt,
    count_tokens,
    prompts_of,
    read_model,
)
from localcloud.paced.request_error import RequestError
from localcloud.paced.served_model import ServedModel

DIMENSIONS = 384


def read_embeddings(said: Mapping[str, Any], model: ServedModel) -> CompletionRequest:
    """Return the texts to be embedded, as prompts with answers of one token; raise RequestError."""
    read_model(said, model)
    if said.get("dimensions") is not None:
        raise RequestError(
            f'Model "{model.names[0]}" does not support matryoshka representation', "dimensions"
        )
    if said.get("encoding_format", "float") not in ("float", "base64"):
        raise RequestError("encoding_format: wanted float or base64", "encoding_format")
    return _request(prompts_of(said.get("input"), "input"), model)


def read_pairs(said: Mapping[str, Any], model: ServedModel) -> CompletionRequest:
    """Return the pairs that rerank or score compares, as prompts with answers of one token."""
    read_model(said, model)
    names = (("query", "documents"), ("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
    found = next((pair for pair in names if all(said.get(name) is not None for name in pair)), None)
    if found is None:
        raise RequestError("query and documents, or text_1 and text_2: are missing", "query")
    ones, others = (said[name] if isinstance(said[name], list) else [said[name]] for name in found)
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others) or not others:
        raise RequestError("Input lengths must be either 1:1, 1:N or N:N", found[1])
    texts = [f"{_text(a)}\n{_text(b)}" for a, b in zip(ones, others, strict=True)]
    return _request(
        tuple(
            Prompt(count_tokens(t), t.encode(errors="replace"), _text(b))
            for t, b in zip(texts, others, strict=True)
        ),
        model,
    )


def _text(value: object) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise RequestError("wanted texts to compare", "documents")
    return text


def _request(prompts: tuple[Prompt, ...], model: ServedModel) -> CompletionRequest:
    for prompt in prompts:
        if prompt.tokens > model.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {model.max_model_len} tokens. However, your prompt "
                f"contains {prompt.tokens} input tokens. Please reduce the length of the input prompt.",
                "input_tokens",
            )
    return CompletionRequest(False, False, prompts, 1, 1, 0, True, False, False, False)


class PooledAnswer:
    """Makes the bytes of an answer of this kind, which is whole."""

    def __init__(self, plan: AnswerPlan) -> None:
        """Make the answer that is planned."""
        self._prompts, self._tokens = plan.request.prompts, plan.request.prompt_tokens
        self._model, self._created, self._said = plan.model.names[0], plan.created, plan.said
        self.id = f"embd-{plan.token}"
        self.done = True

    def events(self, came: object) -> bytes:  # noqa: ARG002 of a stream it would be all
        """Return nothing: there is no stream."""
        return b""

    def whole(self) -> bytes:
        """Return the whole answer as one JSON object."""
        if "query" in self._said:
            return compact(self._reranked())
        data: list[dict[str, Any]] = []
        for n, prompt in enumerate(self._prompts):
            embeds = "input" in self._said
            what = {"embedding": self._embedding(prompt)} if embeds else {"score": _share(prompt.key)}
            data.append({"index": n, "object": "embedding" if embeds else "score", **what})
        usage = {
            "prompt_tokens": self._tokens,
            "total_tokens": self._tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }
        head = {"id": self.id, "object": "list", "created": self._created, "model": self._model}
        return compact({**head, "data": data, "usage": usage})

    def _reranked(self) -> dict[str, Any]:
        results: list[dict[str, Any]] = [
            {
                "index": n,
                "document": {"text": prompt.text, "multi_modal": None},
                "relevance_score": _share(prompt.key),
            }
            for n, prompt in enumerate(self._prompts)
        ]
        results.sort(key=lambda one: -one["relevance_score"])
        usage = {"prompt_tokens": self._tokens, "total_tokens": self._tokens}
        head = {"id": self.id.replace("embd", "rerank"), "model": self._model, "usage": usage}
        return {**head, "results": results[: self._said.get("top_n") or None]}

    def _embedding(self, prompt: Prompt) -> list[float] | str:
        values = _vector(prompt.key)
        if self._said.get("encoding_format") != "base64":
            return values
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _vector(key: bytes) -> list[float]:
    """Return a vector of length 1 that is always the same for a text."""
    raw = hashlib.shake_256(key).digest(DIMENSIONS)
    values = [byte / 127.5 - 1.0 for byte in raw]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def _share(key: bytes) -> float:
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2.0**48
