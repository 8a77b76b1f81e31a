"""How long a request to a model server is: an estimate for a loadbalancer that never sees the request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4
"""Bytes of English text in a token of today's vocabularies; other languages need up to twice the tokens."""

MEDIA_TOKENS = 1000
"""Tokens that a picture, a sound or a body that is no JSON counts: their bytes say nothing."""

MAX_TOKENS = 10_000_000
"""Most that the loadbalancer takes for prompt_tokens and max_tokens."""

MAX_PROMPTS = 100_000
"""Most that the loadbalancer takes for prompts."""

PROMPT_WEIGHT = 0.1
"""Work of a prompt token in output tokens, to compare requests; the loadbalancer knows the model's own."""

OUTPUT_GUESS = 200
"""Output tokens assumed for a request that sets no limit, for that comparison."""

DEEPEST = 20
"""Deepest level of a body that is looked into."""

_NO_OUTPUT = (
    "/embeddings",
    "/tokenize",
    "/detokenize",
    "/rerank",
    "/score",
    "/pooling",
    "/classify",
    "/count_tokens",
)


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """How long a request is, about; max_tokens is None when it sets no limit.

    prompts: how many prompts it holds, each of which may be as long as the model takes.
    """

    prompt_tokens: int
    max_tokens: int | None
    prompts: int = 1

    @property
    def work(self) -> float:
        """Work in output tokens, for comparing requests with each other."""
        output = OUTPUT_GUESS if self.max_tokens is None else self.max_tokens
        return self.prompt_tokens * PROMPT_WEIGHT + output


def read_body(method: str, body: bytes) -> Mapping[str, Any] | None:
    """Return a request's body as JSON; None where it has none."""
    if method not in ("POST", "PUT") or not body:
        return None
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def makes_text(target: str) -> bool:
    """Return whether a model server answers with tokens at that path, one by one."""
    return not target.partition("?")[0].rstrip("/").endswith(_NO_OUTPUT)


def estimate_request(method: str, target: str, body: bytes) -> TokenEstimate:
    """Estimate a request to a model server: token ids are counted, text is taken by its length.

    Whatever cannot be understood counts something, and nothing is refused here.
    """
    return estimate_body(method, target, body, read_body(method, body))


def estimate_body(method: str, target: str, body: bytes, said: Mapping[str, Any] | None) -> TokenEstimate:
    """Estimate a request whose body `read_body` has read."""
    if method not in ("POST", "PUT") or not body:
        return TokenEstimate(0, 1)
    if said is None:
        return TokenEstimate(MEDIA_TOKENS, None)
    prompt, sequences = _prompt_of(said)
    prompts = max(1, sequences if makes_text(target) else _texts_in(said))
    answers = sequences * max(_whole(said.get("n")) or 1, _whole(said.get("best_of")) or 1)
    limits = [_whole(said.get(name)) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
    limit = next((n for n in limits if n is not None), None)
    if not makes_text(target):
        limit, answers = 1, 1
    return TokenEstimate(
        min(MAX_TOKENS, prompt),
        None if limit is None else min(MAX_TOKENS, max(1, limit) * max(1, answers)),
        min(MAX_PROMPTS, prompts),
    )


def _texts_in(said: Mapping[str, Any]) -> int:
    """Return how many texts a request that makes no text has: each is read by itself."""
    lists = (said.get(name) for name in ("input", "prompt"))
    return max(
        (len(one) for one in lists if isinstance(one, list) and one and not isinstance(one[0], int)),
        default=1,
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _prompt_of(said: Mapping[str, Any]) -> tuple[int, int]:
    """Return (tokens of all that goes in, number of prompts)."""
    sequences = 1
    size = 0
    prompt = said.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        sequences = len(prompt)
    for name in ("prompt", "messages", "input", "instructions", "system", "tools", "suffix"):
        value = said.get(name)
        if value is not None:
            ids, text = _weigh(value, 0)
            size += ids + -(-text // BYTES_PER_TOKEN)
    return size, sequences


def _weigh(value: object, depth: int) -> tuple[int, int]:
    """Return (token ids and media, bytes of text) anywhere in the value."""
    if isinstance(value, str):
        return 0, len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if depth > DEEPEST:
        return 0, 0
    ids = text = 0
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value), 0
        for one in value:
            more = _weigh(one, depth + 1)
            ids, text = ids + more[0], text + more[1]
    elif isinstance(value, dict):
        if is_media(value):
            return MEDIA_TOKENS, 0
        for key, one in value.items():
            more = _weigh(one, depth + 1)
            ids, text = ids + more[0], text + more[1] + len(key)
    return ids, text


def is_media(value: Mapping[str, Any]) -> bool:
    """Return whether that part of a message is a picture, a sound or the like."""
    kind = value.get("type")
    return isinstance(kind, str) and ("image" in kind or "audio" in kind or "video" in kind or kind == "file")
