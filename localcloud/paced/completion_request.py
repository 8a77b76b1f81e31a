"""The body of a completion request, read and checked: prompts, number of answers, their lengths.

Tokens are counted, not made: one for each four characters, rounded up. Nothing here reads a clock.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localcloud.paced.request_error import RequestError
from localcloud.paced.served_model import ServedModel
from localcloud.paced.shapes import CHARACTERS_A_TOKEN, PLACEHOLDER, Shape
from localcloud.paced.tool_use import read_logprobs, read_shape

PIECES = tuple(
    b" " + word
    for word in (
        b"This is placeholder text of the paced engine of localcloud, made to keep time: no model has "
        b"read your prompt, and nothing here is an answer."
    ).split()
)
"""The tokens of every answer, in turns; none needs an escape in JSON."""

MAX_AT_ONCE = 1024
"""Most answers that one request may ask for: prompts times n."""

MESSAGE_TOKENS, OPENING_TOKENS = 4, 3
"""Tokens that a chat template adds to each message, and to begin the answer; about as many as Llama's."""

COMPLETION_MAX_TOKENS = 16
"""Default of max_tokens for /v1/completions in vLLM; a chat may fill the context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its number of tokens, the key from which lengths of its answers are drawn, and its text."""

    tokens: int
    key: bytes
    text: str = ""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A completion request that was checked. max_tokens is None where the context is the only limit.

    n: answers to each prompt. echo: each answer begins with its prompt, and with max_tokens 0 it is nothing
    else.
    """

    chat: bool
    echo: bool
    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    shape: Shape = PLACEHOLDER
    logprobs: int | None = None
    reasoning: bool = False

    @property
    def prompt_tokens(self) -> int:
        """The request's prompt tokens as `usage` counts them: each prompt once, whatever n is."""
        return sum(p.tokens for p in self.prompts)


def count_tokens(text: str) -> int:
    """Return how many tokens a text counts as: one for each CHARACTERS_A_TOKEN characters, rounded up."""
    return -(-len(text) // CHARACTERS_A_TOKEN)


def token_at(request: CompletionRequest, whole: int, at: int) -> tuple[str, str]:
    """Return the at-th token (from 0) of an answer of so many: (what it is of, its text).

    It is of the name or the arguments of a tool's call, of reasoning, or of the content.
    """
    shape = request.shape
    if shape.pieces is not None:
        if shape.tool is None:
            return "content", shape.pieces[at]
        return ("arguments", shape.pieces[at - 1]) if at else ("name", shape.tool)
    return ("reasoning" if request.reasoning and at < whole // 3 else "content"), PIECES[
        at % len(PIECES)
    ].decode()


def tokens_of(request: CompletionRequest, whole: int) -> dict[str, str]:
    """Return the texts of an answer of so many tokens, by what they are of."""
    texts: dict[str, str] = {}
    for at in range(whole):
        of, text = token_at(request, whole, at)
        texts[of] = texts.get(of, "") + text
    return texts


def natural_length(key: bytes, mean: float) -> int:
    """Return how long an answer is in tokens if nothing cuts it off: 1 or more, exponential around `mean`.

    It depends only on the key, so that the same prompt always has the same length.
    """
    drawn = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
    share = (drawn + 0.5) / 2.0**64
    return 1 + int(-math.log(share) * max(0.0, mean - 1.0))


def read_json(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body; raise RequestError when it is none."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the body is not JSON: {str(e)[:120]}") from None
    if not isinstance(said, dict):
        raise RequestError(f"the body: wanted a JSON object, got {type(said).__name__}")
    return said


NO_CHAT_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
    "template if the tokenizer does not define one."
)
"""What vLLM answers to a chat with a model that has none."""


def read_request(said: Mapping[str, Any], model: ServedModel, *, chat: bool) -> CompletionRequest:
    """Return what the body of a completion request asks for; raise RequestError with the wrong field."""
    read_model(said, model)
    if chat and not model.chat_template:
        raise RequestError(NO_CHAT_TEMPLATE)
    prompts = (chat_prompt(said),) if chat else prompts_of(said.get("prompt"), "prompt")
    echo = not chat and typed(said, "echo", bool, default=False)
    options = typed(said, "stream_options", dict, {})
    stream = typed(said, "stream", bool, default=False)
    if options and not stream:
        raise RequestError("stream_options: only a request with stream=true may have them", "stream_options")
    request = CompletionRequest(
        chat=chat,
        echo=echo,
        prompts=prompts,
        n=_whole(said, "n", 1, 1, MAX_AT_ONCE),
        max_tokens=_max_tokens(said, chat=chat, least=0 if echo else 1),
        min_tokens=_whole(said, "min_tokens", 0, 0, None),
        ignore_eos=typed(said, "ignore_eos", bool, default=False),
        stream=stream,
        include_usage=typed(options, "include_usage", bool, default=False),
        continuous_usage=typed(options, "continuous_usage_stats", bool, default=False),
        shape=read_shape(said, model) if chat else PLACEHOLDER,
        logprobs=read_logprobs(said, chat=chat),
        reasoning=chat and model.reasoning_parser is not None,
    )
    if len(request.prompts) * request.n > MAX_AT_ONCE:
        raise RequestError(
            f"n: at most {MAX_AT_ONCE} answers to a request, {len(request.prompts)} x {request.n} wanted", "n"
        )
    _check_ignored(said, chat=chat)
    for prompt in request.prompts:
        _check_length(prompt, request, model)
    return request


def read_model(said: Mapping[str, Any], model: ServedModel) -> None:
    """Raise RequestError 404 if a request's body names a model that is not served; naming none is fine."""
    name = typed(said, "model", str, model.names[0])
    if name not in model.names:
        raise RequestError(f"The model `{name[:200]}` does not exist.", "model", 404, "NotFoundError")


def typed(said: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field of a request's body, or the default where it is missing or null.

    Raises RequestError when its type is not `kind`.
    """
    value = said.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name}: wanted {kind.__name__}, got {type(value).__name__}", name)
    return value


def _whole(said: Mapping[str, Any], name: str, default: int, least: int, most: int | None) -> int:
    value: int = typed(said, name, int, default)
    if value < least:
        raise RequestError(f"{name}: must be at least {least}", name)
    if most is not None and value > most:
        raise RequestError(f"{name}: must be at most {most}", name)
    return value


def _max_tokens(said: Mapping[str, Any], *, chat: bool, least: int) -> int | None:
    if chat and said.get("max_completion_tokens") is not None:
        return _whole(said, "max_completion_tokens", 1, 1, None)
    if said.get("max_tokens") is not None:
        return _whole(said, "max_tokens", 1, least, None)
    return None if chat else COMPLETION_MAX_TOKENS


def prompts_of(prompt: object, name: str) -> tuple[Prompt, ...]:
    """Return the prompts that a field has: a text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return (_text_prompt(prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"{name}: wanted a text, a list of texts, or token ids; it cannot be empty", name)
    if all(isinstance(p, str) for p in prompt):
        return tuple(_text_prompt(p) for p in prompt)
    if all(isinstance(p, list) for p in prompt):
        return tuple(_ids_prompt(p) for p in prompt)
    return (_ids_prompt(prompt),)


def _text_prompt(text: str) -> Prompt:
    if not text:
        raise RequestError("prompt: cannot be empty", "prompt")
    # JSON can name halves of surrogate pairs, which are no characters.
    return Prompt(count_tokens(text), text.encode(errors="surrogatepass"), text)


def _ids_prompt(ids: list[Any]) -> Prompt:
    if not ids:
        raise RequestError("prompt: cannot be empty", "prompt")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise RequestError("prompt: token ids are whole numbers from 0 on", "prompt")
    text = b"".join(PIECES[i % len(PIECES)] for i in ids).decode()
    return Prompt(len(ids), repr(ids).encode(), text)


_TEXT_KINDS = ("text", "input_text", "output_text", "refusal", "thinking")


def chat_prompt(said: Mapping[str, Any]) -> Prompt:
    messages = said.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: wanted a list of at least one message", "messages")
    tokens, parts = OPENING_TOKENS, []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError("messages: each is an object with a role", "messages")
        text = "".join(_message_texts(message.get("content")))
        if message.get("tool_calls"):
            text += json.dumps(message["tool_calls"])
        tokens += count_tokens(text) + MESSAGE_TOKENS
        parts.append(f"{message['role']}\0{text}\0")
    if said.get("tools") and said.get("tool_choice") != "none":
        tokens += count_tokens(json.dumps(said["tools"], separators=(",", ":")))
    return Prompt(tokens, "".join(parts).encode(errors="surrogatepass"))


def _message_texts(content: object) -> Iterator[str]:
    """Yield the texts in the content of a chat message: no content, a text, or parts of type text."""
    if content is None or isinstance(content, str):
        yield content or ""
        return
    for part in content if isinstance(content, list) else (content,):
        kind = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video")):
            raise RequestError("this is not a multimodal model")
        if kind not in _TEXT_KINDS:
            raise RequestError(
                f"Unsupported chat content part type: {kind!r:.40}. (parameter=type, value={kind!s:.40})",
                "type",
            )
        text = part.get("text", part.get("refusal", part.get("thinking"))) if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise RequestError("messages: content is a text, or a list of parts of type text", "messages")
        yield text


def _check_ignored(said: Mapping[str, Any], *, chat: bool) -> None:
    """Raise RequestError for options that the engine lacks, and for wrong types of those it ignores."""
    if said.get("suffix"):
        raise RequestError("suffix is only supported for models with FIM completion rendering", "suffix")
    if said.get("echo") and chat:
        raise RequestError("echo: the paced engine of localcloud does not have it", "echo")
    for name, least, most in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0)):
        value = said.get(name, 0.0)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise RequestError(f"{name}: wanted a number from {least:g} to {most:g}", name)
    stop = said.get("stop")
    if not (stop is None or isinstance(stop, str) or _all_texts(stop)):
        raise RequestError("stop: wanted a text or a list of texts", "stop")


def _all_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _check_length(prompt: Prompt, request: CompletionRequest, model: ServedModel) -> None:
    wanted = max(1, request.max_tokens or 1)  # vLLM makes a token also for an echo of the prompt alone
    if prompt.tokens + wanted > model.max_model_len:
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens: {prompt.tokens} of the "
            f"prompt and {wanted} of the answer are too many.",
            "max_tokens" if prompt.tokens < model.max_model_len else "messages" if request.chat else "prompt",
        )
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise RequestError("min_tokens: must not be over max_tokens", "min_tokens")


def answer_lengths(request: CompletionRequest, model: ServedModel) -> list[tuple[int, str]]:
    """Return (tokens, finish reason) of each answer: n of the first prompt, n of the second and so on."""
    return [_length(p, request, model, which) for p in request.prompts for which in range(request.n)]


def _length(prompt: Prompt, request: CompletionRequest, model: ServedModel, which: int) -> tuple[int, str]:
    most = model.max_model_len - prompt.tokens
    if request.max_tokens is not None:
        most = min(most, max(1, request.max_tokens))
    if (tokens := request.shape.tokens) is not None:
        return (tokens, request.shape.finish) if tokens <= most else (most, "length")
    if request.ignore_eos:
        return most, "length"
    natural = max(request.min_tokens, natural_length(prompt.key + b"\0%d" % which, model.natural_tokens))
    return (natural, "stop") if natural < most else (most, "length")
