"""TODO: say what this is."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PIECES = tuple(
    b" " + word
    for word in (
        b"This is placeholder text of the paced engine of localcloud, made to keep time: no model has "
        b"read your prompt, and nothing here is an answer."
    ).split()
)
"""An answer's tokens, over and over. Plain enough to stand in JSON as they are."""

MAX_AT_ONCE = 1024
"""Answers that one request may ask for: prompts times n."""

CHARACTERS_A_TOKEN = 4
MESSAGE_TOKENS, OPENING_TOKENS = 4, 3
"""Tokens that a chat template adds to each message, and to open the answer; Llama's adds about so many."""

COMPLETION_MAX_TOKENS = 16
"""vLLM's default for /v1/completions; a chat may fill the context."""

NATURAL_TOKENS = 180.0
"""Mean natural length of an answer where the profile says no other."""


# -- requests --------------------------------------------------------------------------------------------


class Refused(Exception):
    """A request gets an error in vLLM's shape; param is the field that is at fault, if one is."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "BadRequestError"
    ) -> None:
        """Bad requests are the usual case."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    @property
    def said(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered: how many tokens, its bytes (of which the natural length is drawn), its text."""

    tokens: int
    key: bytes
    text: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that was read and found good. max_tokens is None where the context is the only limit.

    echo: each answer begins with its prompt, and with max_tokens 0 it is nothing else.
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

    @property
    def prompt_tokens(self) -> int:
        """As usage counts them: each prompt once, however many answers it gets."""
        return sum(p.tokens for p in self.prompts)


@dataclass(frozen=True)
class Model:
    """What is served: the names it has (the first is the one answers carry), and its limits.

    natural_tokens: mean length of an answer that nothing cuts off.
    """

    names: tuple[str, ...]
    root: str
    max_model_len: int
    natural_tokens: float = NATURAL_TOKENS


def count_tokens(text: str) -> int:
    """Tokens that a text is taken to have."""
    return -(-len(text) // CHARACTERS_A_TOKEN)


def natural_length(key: bytes, mean: float) -> int:
    """How long the answer to that prompt would be: at least 1, exponentially distributed, always the same."""
    drawn = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
    share = (drawn + 0.5) / 2.0**64
    return 1 + int(-math.log(share) * max(0.0, mean - 1.0))


def read_json(raw: bytes) -> dict[str, Any]:
    """The object in a request's body; raises Refused."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise Refused(f"the body is not JSON: {str(e)[:120]}") from None
    if not isinstance(said, dict):
        raise Refused(f"the body: wanted a JSON object, got {type(said).__name__}")
    return said


def read_ask(said: Mapping[str, Any], model: Model, *, chat: bool) -> Ask:
    """What a body asks for; raises Refused, naming the field."""
    read_model(said, model)
    prompts = (_chat_prompt(said),) if chat else _prompts(said)
    echo = not chat and _typed(said, "echo", bool, default=False)
    options = _typed(said, "stream_options", dict, {})
    stream = _typed(said, "stream", bool, default=False)
    if options and not stream:
        raise Refused("stream_options: only a request with stream=true may have them", "stream_options")
    ask = Ask(
        chat=chat,
        echo=echo,
        prompts=prompts,
        n=_whole(said, "n", 1, 1, MAX_AT_ONCE),
        max_tokens=_max_tokens(said, chat=chat, least=0 if echo else 1),
        min_tokens=_whole(said, "min_tokens", 0, 0, None),
        ignore_eos=_typed(said, "ignore_eos", bool, default=False),
        stream=stream,
        include_usage=_typed(options, "include_usage", bool, default=False),
        continuous_usage=_typed(options, "continuous_usage_stats", bool, default=False),
    )
    if len(ask.prompts) * ask.n > MAX_AT_ONCE:
        raise Refused(
            f"n: at most {MAX_AT_ONCE} answers to a request, {len(ask.prompts)} x {ask.n} wanted", "n"
        )
    _check_ignored(said, chat=chat)
    for prompt in ask.prompts:
        _check_length(prompt, ask, model)
    return ask


def read_model(said: Mapping[str, Any], model: Model) -> None:
    """Raises Refused, 404, if the body wants another model; wanting none is wanting ours."""
    name = _typed(said, "model", str, model.names[0])
    if name not in model.names:
        raise Refused(f"The model `{name[:200]}` does not exist.", "model", 404, "NotFoundError")


def _typed(said: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of that type, or the default where it is missing or null."""
    value = said.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{name}: wanted {kind.__name__}, got {type(value).__name__}", name)
    return value


def _whole(said: Mapping[str, Any], name: str, default: int, least: int, most: int | None) -> int:
    value: int = _typed(said, name, int, default)
    if value < least:
        raise Refused(f"{name}: must be at least {least}", name)
    if most is not None and value > most:
        raise Refused(f"{name}: must be at most {most}", name)
    return value


def _max_tokens(said: Mapping[str, Any], *, chat: bool, least: int) -> int | None:
    if chat and said.get("max_completion_tokens") is not None:
        return _whole(said, "max_completion_tokens", 1, 1, None)
    if said.get("max_tokens") is not None:
        return _whole(said, "max_tokens", 1, least, None)
    return None if chat else COMPLETION_MAX_TOKENS


def _prompts(said: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """The prompts of a completion: a text, texts, token ids, or lists of token ids."""
    prompt = said.get("prompt")
    if isinstance(prompt, str):
        return (_text_prompt(prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt: wanted a text, a list of texts, or token ids; it cannot be empty", "prompt")
    if all(isinstance(p, str) for p in prompt):
        return tuple(_text_prompt(p) for p in prompt)
    if all(isinstance(p, list) for p in prompt):
        return tuple(_ids_prompt(p) for p in prompt)
    return (_ids_prompt(prompt),)


def _text_prompt(text: str) -> Prompt:
    if not text:
        raise Refused("prompt: cannot be empty", "prompt")
    # JSON can name halves of surrogate pairs, which are no characters.
    return Prompt(count_tokens(text), text.encode(errors="surrogatepass"), text)


def _ids_prompt(ids: list[Any]) -> Prompt:
    if not ids:
        raise Refused("prompt: cannot be empty", "prompt")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise Refused("prompt: token ids are whole numbers from 0 on", "prompt")
    text = b"".join(PIECES[i % len(PIECES)] for i in ids).decode()
    return Prompt(len(ids), repr(ids).encode(), text)


def _chat_prompt(said: Mapping[str, Any]) -> Prompt:
    messages = said.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages: wanted a list of at least one message", "messages")
    tokens, parts = OPENING_TOKENS, []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused("messages: each is an object with a role", "messages")
        text = "".join(_message_texts(message.get("content")))
        tokens += count_tokens(text) + MESSAGE_TOKENS
        parts.append(f"{message['role']}\0{text}\0")
    return Prompt(tokens, "".join(parts).encode(errors="surrogatepass"))


def _message_texts(content: object) -> Iterator[str]:
    """The text of a message: nothing, a text, or parts of type text."""
    if content is None or isinstance(content, str):
        yield content or ""
        return
    for part in content if isinstance(content, list) else (content,):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise Refused("messages: content is a text, or a list of parts of type text", "messages")
        yield text


def _check_ignored(said: Mapping[str, Any], *, chat: bool) -> None:
    """Raises Refused for what the answer cannot have, and for nonsense in what changes nothing."""
    for name in ("logprobs", "suffix", "echo"):
        if said.get(name) and (chat or name != "echo"):
            raise Refused(f"{name}: the paced engine of localcloud does not have it", name)
    for name, least, most in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0)):
        value = said.get(name, 0.0)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise Refused(f"{name}: wanted a number from {least:g} to {most:g}", name)
    stop = said.get("stop")
    if not (stop is None or isinstance(stop, str) or _all_texts(stop)):
        raise Refused("stop: wanted a text or a list of texts", "stop")


def _all_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _check_length(prompt: Prompt, ask: Ask, model: Model) -> None:
    wanted = max(1, ask.max_tokens or 1)  # vLLM makes a token also for an echo of the prompt alone
    if prompt.tokens + wanted > model.max_model_len:
        raise Refused(
            f"This model's maximum context length is {model.max_model_len} tokens: {prompt.tokens} of the "
            f"prompt and {wanted} of the answer are too many.",
            "max_tokens" if prompt.tokens < model.max_model_len else "messages" if ask.chat else "prompt",
        )
    if ask.max_tokens is not None and ask.min_tokens > ask.max_tokens:
        raise Refused("min_tokens: must not be over max_tokens", "min_tokens")


def answer_length(prompt: Prompt, ask: Ask, model: Model, which: int) -> tuple[int, str]:
    """(tokens, finish reason) of the which-th answer to a prompt."""
    most = model.max_model_len - prompt.tokens
    if ask.max_tokens is not None:
        most = min(most, max(1, ask.max_tokens))
    if ask.ignore_eos:
        return most, "length"
    natural = max(ask.min_tokens, natural_length(prompt.key + b"\0%d" % which, model.natural_tokens))
    return (natural, "stop") if natural < most else (most, "length")
