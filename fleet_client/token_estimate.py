"""How long a request to a model server is: an estimate for a loadbalancer that never sees the request.

    text        BYTES_PER_TOKEN of its UTF-8, with the names of its fields: messages, tools, instructions
    token ids   counted
    a picture, a sound, a video, a file or document, in base64 or by its address     MEDIA_TOKENS
    a document in plain text (Anthropic's source of type text or content)            as text
    rerank, score    the one text beside each of the many: it is read with each of them

What an instance counts of a request follows the same rule (remote/lengths.py); a test compares them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4
"""Bytes of English text in a token of today's vocabularies; other languages need up to twice the tokens."""

MEDIA_TOKENS = 1000
"""Tokens that a picture, a sound, a file or a body that is no JSON counts: their bytes say nothing."""

MAX_TOKENS = 10_000_000
"""Most that the loadbalancer takes for prompt_tokens and max_tokens."""

MAX_PROMPTS = 100_000
"""Most that the loadbalancer takes for prompts."""

PROMPT_WEIGHT = 0.1
"""Work of a prompt token in output tokens, to compare requests; the loadbalancer knows the model's own."""

OUTPUT_GUESS = 200
"""Output tokens assumed for a request that sets no limit, for that comparison."""

DEEPEST = 64
"""Deepest level of a body that is looked into."""

_ALONE = (
    *("prompt", "messages", "input", "inputs", "texts", "instructions", "system", "tools", "suffix"),
    "token_ids",
)
"""What a prompt is made of."""

_ONE, _MANY = ("query", "queries", "text_1", "data_1"), ("documents", "items", "text_2", "data_2")
"""What rerank and score compare: one of these with each of those."""

_MEDIA = re.compile("image|audio|video|file$|^document$")
"""Kinds of parts of a message that are no text: image_url, input_audio, input_file, document and the like."""

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
    """The estimated size of a request. max_tokens: the limit of its answer; None: it sets none.

    prompts: how many prompts it holds, each of which may be as long as the model takes.
    """

    prompt_tokens: int
    max_tokens: int | None
    prompts: int = 1

    @property
    def work(self) -> float:
        """The work of the request in output tokens, for comparing requests with each other."""
        output = OUTPUT_GUESS if self.max_tokens is None else self.max_tokens
        return self.prompt_tokens * PROMPT_WEIGHT + output


def read_body(method: str, body: bytes) -> Mapping[str, Any] | None:
    """Return a request's body as a JSON object; None where it has none."""
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
    """Return the estimated size of a request: token ids are counted, text is taken by its length.

    Whatever cannot be understood counts something, and nothing is refused here.
    """
    return estimate_body(method, target, body, read_body(method, body))


def estimate_body(method: str, target: str, body: bytes, said: Mapping[str, Any] | None) -> TokenEstimate:
    """Return the estimated size of a request whose body `read_body` has read as `said`."""
    if method not in ("POST", "PUT") or not body:
        return TokenEstimate(0, 1)
    if said is None:
        return TokenEstimate(MEDIA_TOKENS, None)
    sequences = _sequences(said.get("prompt"))
    prompts = max(1, sequences if makes_text(target) else _texts_in(said))
    answers = sequences * max(_whole(said.get("n")) or 1, _whole(said.get("best_of")) or 1)
    limits = [_whole(said.get(name)) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
    limit = next((n for n in limits if n is not None), None)
    if not makes_text(target):
        limit, answers = 1, 1
    return TokenEstimate(
        min(MAX_TOKENS, -(-_text_bytes(said) // BYTES_PER_TOKEN)),
        None if limit is None else min(MAX_TOKENS, max(1, limit) * max(1, answers)),
        min(MAX_PROMPTS, prompts),
    )


def _sequences(prompt: object) -> int:
    """Return how many prompts a completion has: a text, token ids, or a list of either."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _texts_in(said: Mapping[str, Any]) -> int:
    """Return how many texts are in a request that makes no text (embeddings, scores): each is read alone."""
    return max(_sequences(said.get(name)) for name in ("input", "prompt", "texts", "inputs", *_MANY))


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text_bytes(said: Mapping[str, Any]) -> int:
    """Return how many bytes of text a request's body counts as, repeated texts included."""
    one, many = (max((said.get(name) or () for name in names), key=_weigh) for names in (_ONE, _MANY))
    times = max(1, _count(many)) if _count(one) == 1 else 1
    return _weigh([said.get(name) for name in _ALONE]) + times * _weigh(one) + _weigh(many)


def _count(value: object) -> int:
    return len(value) if isinstance(value, list) else 1


def _weigh(value: object, depth: int = 0) -> int:
    """Return how many bytes of text a JSON value counts as."""
    if isinstance(value, str):
        if ";base64," in value[:99]:
            return MEDIA_TOKENS * BYTES_PER_TOKEN
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if depth > DEEPEST:
        return 0
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value) * BYTES_PER_TOKEN
        return sum(_weigh(one, depth + 1) for one in value)
    if isinstance(value, dict):
        if is_media(value):
            return MEDIA_TOKENS * BYTES_PER_TOKEN
        return sum(len(key) + _weigh(one, depth + 1) for key, one in value.items())
    return 0


def is_media(value: Mapping[str, Any]) -> bool:
    """Return whether a part of a message is a picture, a sound, a file or the like, and not plain text."""
    kind, source = value.get("type"), value.get("source")
    if isinstance(source, dict) and source.get("type") in ("text", "content"):
        return False
    return isinstance(kind, str) and _MEDIA.search(kind) is not None
