"""The paced engine: vLLM's routes, answers and pace without a model. It says so in every answer.

    request ─► read and checked ─► ModelServer (engine/reference.py) ─► tokens when they are due ─► answer

What a client can tell from vLLM 0.11 is meant to be the same: shapes of answers, of stream events and of
errors, names of metrics, lines of the log. What differs, beside the text:

- tokens of a prompt are counted, not made: one for each four characters, rounded up; a chat message has four
  more, and the answer's opening three. A prompt of token ids has as many tokens as ids;
- an answer ends where `max_tokens` says or, without `ignore_eos`, at a length drawn from the hash of its
  prompt, so that the same prompt always has the same length;
- `echo` of a completion repeats the prompt; of token ids, which are no text here, placeholder text;
- `logprobs`, `suffix` and a chat's `echo` are refused; what shapes text (temperature, stop, tools) changes
  nothing.

One process, one event loop. All streams share one timer, which is set for the end of the step under way;
when nothing is under way there is no timer, and nothing wakes up.
"""

import argparse
import asyncio
import contextlib
import hashlib
import importlib
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.profiles import PROFILES
from engine.reference import Event, Kind, ModelServer
from engine.timing import PROFILE_MODELS, timing_for
from process.errors import ConfigError

log = logging.getLogger("paced")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

VERSION = "0.11.0+paced"
"""The vLLM whose manners are imitated, and that it is not it."""

PIECES = tuple(
    b" " + word
    for word in (
        b"This is placeholder text of the paced engine of localcloud, made to keep time: no model has "
        b"read your prompt, and nothing here is an answer."
    ).split()
)
"""An answer's tokens, over and over. Plain enough to stand in JSON as they are."""

MAX_BODY = 32 * 2**20
"""Bytes of a request body; the longest context of our profiles is some 64 kB of text."""

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


# -- answers ---------------------------------------------------------------------------------------------


def compact(said: object) -> bytes:
    """JSON as vLLM writes it, without spaces, in UTF-8."""
    return json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


class Answer:
    """The bytes of one answer, whole or as stream events. What all its events share is made once."""

    def __init__(self, ask: Ask, model: Model, created: int) -> None:
        """Nothing has been said yet."""
        self._ask = ask
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(16)
        kind = "chat.completion" if ask.chat else "text_completion"
        self._head = {"id": self.id, "object": kind, "created": created, "model": model.names[0]}
        chunk = self._head | ({"object": "chat.completion.chunk"} if ask.chat else {})
        self._start = b"data: " + compact(chunk)[:-1] + b',"choices":['
        # vLLM leaves out of a chat's events what was not set, and writes a completion's in full.
        self._rest = b'"}' if ask.chat else b'"'
        self._stop = b"" if ask.chat else b',"stop_reason":null'
        self._usage = b"" if ask.chat else b',"usage":null'

    def role(self, index: int) -> bytes:
        """The first event of a choice of a chat."""
        return self._event(
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            % index,
            0,
        )

    def token(self, index: int, at: int, finish: str | None, made: int) -> bytes:
        """The event of the at-th token (from 0) of a choice. made: tokens of the whole answer up to it."""
        field = b'"delta":{"content":"' if self._ask.chat else b'"text":"'
        piece = PIECES[at % len(PIECES)]
        if self._ask.echo and at == 0:
            piece = compact(self._begin(index))[1:-1] + (piece if self._ask.max_tokens else b"")
        ends = b"null%s}" % self._stop if finish is None else b'"%s","stop_reason":null}' % finish.encode()
        return self._event(
            b'{"index":%d,%s%s%s,"logprobs":null,"finish_reason":%s'
            % (index, field, piece, self._rest, ends),
            made,
        )

    def _begin(self, index: int) -> str:
        """What stands before the first token of a choice: with echo its prompt."""
        return self._ask.prompts[index // self._ask.n].text if self._ask.echo else ""

    def _event(self, choice: bytes, made: int) -> bytes:
        used = self._usage
        if self._ask.continuous_usage:
            used = b',"usage":' + compact(usage(self._ask.prompt_tokens, made))
        return b"%s%s]%s}\n\n" % (self._start, choice, used)

    def last(self, made: int) -> bytes:
        """What ends the stream."""
        if not self._ask.include_usage:
            return b"data: [DONE]\n\n"
        used = compact(usage(self._ask.prompt_tokens, made))
        return b'%s],"usage":%s}\n\ndata: [DONE]\n\n' % (self._start, used)

    def whole(self, lengths: Sequence[tuple[int, str]]) -> bytes:
        """An answer that is not streamed. lengths: (tokens, finish reason) of each choice."""
        choices = []
        for index, (tokens, finish) in enumerate(lengths):
            shown = 0 if self._ask.max_tokens == 0 else tokens
            text = b"".join(PIECES[at % len(PIECES)] for at in range(shown)).decode()
            text = self._begin(index) + text
            content = (
                {"message": {"role": "assistant", "content": text}} if self._ask.chat else {"text": text}
            )
            ends = {"logprobs": None, "finish_reason": finish, "stop_reason": None}
            choices.append({"index": index} | content | ends)
        made = sum(tokens for tokens, _ in lengths)
        return compact(self._head | {"choices": choices, "usage": usage(self._ask.prompt_tokens, made)})


def metrics(name: str, server: ModelServer, ended: Mapping[str, int]) -> bytes:
    """The figures of /metrics under vLLM's names. ended: requests by finish reason."""
    label = f'engine="0",model_name="{_label(name)}"'
    lines = []

    def add(metric: str, kind: str, says: str, values: Mapping[str, float]) -> None:
        lines.append(f"# HELP vllm:{metric} {says}\n# TYPE vllm:{metric} {kind}\n")
        lines.extend(f"vllm:{metric}{{{labels}}} {float(value)!r}\n" for labels, value in values.items())

    add("num_requests_running", "gauge", "Requests being worked on.", {label: server.running})
    add("num_requests_waiting", "gauge", "Requests in the queue.", {label: server.waiting})
    add("kv_cache_usage_perc", "gauge", "KV memory in use, 1 is all.", {label: server.kv_use})
    add("num_preemptions_total", "counter", "Requests that were put back.", {label: server.preemptions})
    add("prompt_tokens_total", "counter", "Prompt tokens read.", {label: server.prompt_tokens_total})
    add("generation_tokens_total", "counter", "Tokens made.", {label: server.generation_tokens_total})
    add(
        "request_success_total",
        "counter",
        "Requests that ended, by reason.",
        {f'{label},finished_reason="{why}"': ended.get(why, 0) for why in ("stop", "length", "abort")},
    )
    return "".join(lines).encode(errors="replace")


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# -- in time ---------------------------------------------------------------------------------------------


class Timer(Protocol):
    """What call_at gives."""

    def cancel(self) -> None:
        """It will not be called."""


class Clock(Protocol):
    """What is needed of an event loop to keep time."""

    def time(self) -> float:
        """Seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call it then."""


class Pacer:
    """A ModelServer in real time: whoever submits is told of its tokens when they are due.

    One timer, at the end of the step under way; none when idle. Belongs to the loop's thread.
    """

    def __init__(self, server: ModelServer, clock: Clock) -> None:
        """Idle."""
        self.server = server
        self._clock = clock
        self._told: dict[str, Callable[[int], None]] = {}
        self._timer: Timer | None = None
        self._due: float | None = None

    def submit(self, id: str, prompt_tokens: int, output_tokens: int, told: Callable[[int], None]) -> None:
        """told(tokens) is called for all its tokens, in steps. Raises ValueError as ModelServer does."""
        events = self.server.submit(id, prompt_tokens, output_tokens, self._clock.time())
        self._told[id] = told
        self._deliver(events)

    def cancel(self, id: str) -> bool:
        """It is told nothing more, and its work is freed now. Whether there was any left."""
        there = self._told.pop(id, None) is not None
        if there:
            self._deliver(self.server.cancel(id, self._clock.time()))
        return there

    def _wake(self) -> None:
        due, self._timer, self._due = self._due, None, None
        # uvloop rounds to milliseconds, so a timer can come a little before its time.
        self._deliver(self.server.advance(max(self._clock.time(), due or 0.0)))

    def _deliver(self, events: list[Event]) -> None:
        due = self.server.next_event()
        if due != self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if due is None else self._clock.call_at(due, self._wake)
            self._due = due
        for event in events:
            if event.kind is Kind.FINISHED:
                told = self._told.pop(event.id, None)
            elif event.kind is Kind.TOKENS:
                told = self._told.get(event.id)
            else:
                continue
            if told is not None:
                told(event.tokens)


class _News:
    """Tokens of one request's answers that have come and were not sent yet; one reader.

    patient: the reader wants to be woken by the last token only.
    """

    def __init__(self, lengths: Sequence[tuple[int, str]], *, patient: bool) -> None:
        self.lengths = lengths
        self.left = sum(tokens for tokens, _ in lengths)
        self.gone = False
        self._patient = patient
        self._came: list[tuple[int, int]] = []
        self._waiter: asyncio.Future[None] | None = None

    def tell(self, index: int, tokens: int) -> None:
        self._came.append((index, tokens))
        self.left -= tokens
        if not self._patient or not self.left:
            self._wake()

    def leave(self) -> None:
        """The client has gone."""
        self.gone = True
        self._wake()

    async def take(self) -> list[tuple[int, int]]:
        """(choice, tokens) that came since the last time; empty when the client has gone."""
        while not self.gone and ((self._patient and self.left) or not self._came):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        came, self._came = self._came, []
        return [] if self.gone else came

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


# -- the app ---------------------------------------------------------------------------------------------


class PacedEngine:
    """The ASGI app. Serves on one event loop, from its first request on."""

    def __init__(self, model: Model, server: ModelServer, clock: Clock | None = None) -> None:
        """clock: the running loop if None. ValueError if a request of full length can never be held."""
        if model.max_model_len > server.timing.kv_tokens:
            raise ValueError(
                f"a context of {model.max_model_len} tokens does not fit into KV memory for "
                f"{server.timing.kv_tokens}"
            )
        self.model = model
        self.server = server
        self.ended: Counter[str] = Counter()
        self._clock = clock
        self._pacer: Pacer | None = None if clock is None else Pacer(server, clock)
        self._routes: Mapping[str, tuple[str, Callable[[bytes], tuple[bytes, bytes]] | None]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/v1/models": ("GET", self._models),
            "/version": ("GET", self._version),
            "/tokenize": ("POST", self._tokenize),
            "/v1/completions": ("POST", None),
            "/v1/chat/completions": ("POST", None),
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or take part in the server's start and end."""
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            try:
                await self._http(scope, receive, send)
            except Refused as e:
                allow = [(b"allow", self._routes[scope["path"]][0].encode())] if e.status == 405 else []
                await _respond(send, e.status, b"application/json", compact(e.said), allow)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in self._routes:
            raise Refused("Not Found", status=404, kind="NotFoundError")
        method, view = self._routes[path]
        if scope["method"] != method:
            raise Refused("Method Not Allowed", status=405, kind="MethodNotAllowedError")
        raw = b""
        if method == "POST":
            body = await _read_body(receive)
            if body is None:
                return
            raw = body
            media = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media != b"application/json":
                raise Refused("Unsupported media type: only application/json is taken")
        if view is not None:
            kind, answer = view(raw)
            await _respond(send, 200, kind, answer)
            return
        ask = read_ask(read_json(raw), self.model, chat=path == "/v1/chat/completions")
        await self._complete(ask, receive, send)

    # -- small routes --

    def _health(self, _raw: bytes) -> tuple[bytes, bytes]:
        return b"text/plain", b""

    def _metrics(self, _raw: bytes) -> tuple[bytes, bytes]:
        said = metrics(self.model.names[0], self.server, self.ended)
        return b"text/plain; version=0.0.4; charset=utf-8", said

    def _version(self, _raw: bytes) -> tuple[bytes, bytes]:
        return b"application/json", compact({"version": VERSION})

    def _models(self, _raw: bytes) -> tuple[bytes, bytes]:
        now = int(time.time())
        cards = [
            {
                "id": name,
                "object": "model",
                "created": now,
                "owned_by": "localcloud",
                "root": self.model.root,
                "parent": None,
                "max_model_len": self.model.max_model_len,
            }
            for name in self.model.names
        ]
        return b"application/json", compact({"object": "list", "data": cards})

    def _tokenize(self, raw: bytes) -> tuple[bytes, bytes]:
        said = read_json(raw)
        read_model(said, self.model)
        if "messages" in said:
            count = _chat_prompt(said).tokens
        else:
            count = count_tokens(_typed(said, "prompt", str, ""))
        answer = {"count": count, "max_model_len": self.model.max_model_len, "tokens": list(range(count))}
        return b"application/json", compact(answer | {"token_strs": None})

    # -- completions --

    async def _complete(self, ask: Ask, receive: Receive, send: Send) -> None:
        """Submit all that is asked for and answer as it comes; when the client goes, so does the work."""
        if self._pacer is None:
            self._pacer = Pacer(self.server, asyncio.get_running_loop())
        answer = Answer(ask, self.model, int(time.time()))
        lengths = [answer_length(p, ask, self.model, which) for p in ask.prompts for which in range(ask.n)]
        news = _News(lengths, patient=not ask.stream)
        ids = [f"{answer.id}-{index}" for index in range(len(lengths))]
        watcher = asyncio.ensure_future(_watch(receive, news))
        try:
            for index, id in enumerate(ids):
                prompt = ask.prompts[index // ask.n]
                tell = _teller(news, index)
                self._pacer.submit(id, prompt.tokens, lengths[index][0], tell)
            if ask.stream:
                await self._stream(ask, answer, news, send)
            elif await news.take():
                await _respond(send, 200, b"application/json", answer.whole(lengths))
        finally:
            watcher.cancel()
            for id, (_, reason) in zip(ids, lengths, strict=True):
                self.ended["abort" if self._pacer.cancel(id) else reason] += 1

    async def _stream(self, ask: Ask, answer: Answer, news: _News, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        begun = False
        sent = [0] * len(news.lengths)
        made = 0
        while True:
            came = await news.take()
            if not came:
                return
            events = []
            for index, tokens in came:
                if ask.chat and not sent[index]:
                    events.append(answer.role(index))
                whole, reason = news.lengths[index]
                for _ in range(tokens):
                    made += 1
                    last = sent[index] + 1 == whole
                    events.append(answer.token(index, sent[index], reason if last else None, made))
                    sent[index] += 1
            done = made == sum(whole for whole, _ in news.lengths)
            if done:
                events.append(answer.last(made))
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": not done})
            if done:
                return


async def _watch(receive: Receive, news: _News) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    news.leave()


def _teller(news: _News, index: int) -> Callable[[int], None]:
    return lambda tokens: news.tell(index, tokens)


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, None when the client went away before; raises Refused when it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise Refused(f"the body: at most {MAX_BODY} bytes are taken", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


async def _respond(
    send: Send, status: int, kind: bytes, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    most = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": most})
    await send({"type": "http.response.body", "body": body})


# --- outside world ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What localcloud says of the machine we run on, in the file that LOCALCLOUD_MACHINE names.

    load_s: from start to ready; start_s instead if the file `loaded` exists. fatal_line: said instead of
    getting ready.
    """

    gpu_name: str = "RTX 4090"
    num_gpus: int = 1
    load_s: float = 0.0
    start_s: float = 0.0
    fatal_line: str | None = None
    loaded: str | None = None

    @classmethod
    def read(cls, path: str | None) -> "Machine":
        """From the file, or one RTX 4090 that is ready at once without a file; raises ConfigError."""
        if not path:
            return cls()
        try:
            said = json.loads(Path(path).read_text())
            return cls(
                gpu_name=str(said["gpu_name"]),
                num_gpus=int(said["num_gpus"]),
                load_s=float(said["load_s"]),
                start_s=float(said["start_s"]),
                fatal_line=said.get("fatal_line"),
                loaded=said.get("loaded"),
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"LOCALCLOUD_MACHINE={path} cannot be used: {type(e).__name__}: {e}") from e

    @property
    def ready_s(self) -> float:
        """Seconds until it is ready, this time."""
        return self.start_s if self.loaded and Path(self.loaded).exists() else self.load_s


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of vLLM's that mean something here, the others). Exits with 2 for a wrong value."""
    parser = argparse.ArgumentParser(
        prog="vllm.entrypoints.openai.api_server",
        description="localcloud's paced engine under the name of vLLM: no model is loaded",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+", default=None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=8000)
    parser.add_argument("--tensor-parallel-size", "-tp", type=_count, default=1)
    parser.add_argument("--max-model-len", type=_count, default=None)
    parser.add_argument("--max-num-seqs", type=_count, default=None)
    parser.add_argument("--max-num-batched-tokens", type=_count, default=None)
    parser.add_argument("--quantization", "-q", default=None)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--ssl-keyfile", default=None)
    parser.add_argument("--ssl-certfile", default=None)
    return parser.parse_known_args(argv)


def _count(text: str) -> int:
    """A whole number of 1 or more; 4k is 4,000 and 4K is 4,096, as vLLM reads it."""
    factor = {"k": 1000, "K": 1024}.get(text[-1:], 1)
    value = int(text[:-1] if factor > 1 else text) * factor
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"wanted 0 to 65535, got {text}")
    return value


def load_middleware(path: str) -> Callable[[App], App]:
    """The ASGI middleware class of that import path; raises ConfigError.

    vLLM also takes coroutine functions, which only make sense with Starlette; those are refused.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"--middleware {path} cannot be loaded: {type(e).__name__}: {e}") from e
    if not isinstance(found, type):
        raise ConfigError(f"--middleware {path}: wanted an ASGI middleware class")
    return cast(Callable[[App], App], found)


def profile_of(names: Sequence[str], model: str) -> str:
    """The profile that is served: one among the names, else one with that model, else vllm-13."""
    for name in names:
        if name in PROFILE_MODELS:
            return name
    same = [p.name for p in PROFILES.values() if p.model == model]
    return same[0] if same else "vllm-13"


class _Server(uvicorn.Server):
    """uvicorn that sleeps until it is told to end, and then waits for nobody."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            # uvicorn says it only of sockets that it opened itself.
            logging.getLogger("uvicorn.error").info(
                "Uvicorn running on http://%s:%d (Press CTRL+C to quit)", *sock.getsockname()[:2]
            )

    async def main_loop(self) -> None:
        """uvicorn's own wakes up ten times a second, to keep a date header that we do not send."""
        await self.on_tick(0)
        await self._told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Break the answers off, as a container's end does; their work ends by itself then."""
        for connection in self.server_state.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM and Ctrl-C, as a callback of the loop."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._end)
        yield

    def _end(self) -> None:
        self.should_exit = True
        self._told.set()


def serve(app: App, sock: socket.socket, certfile: str | None = None, keyfile: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. Logs as uvicorn does, so the ready line is the real one.

    certfile, keyfile: with TLS.
    """
    config = uvicorn.Config(
        app,
        http=HttpToolsProtocol,
        loop="uvloop",
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        date_header=False,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
        timeout_graceful_shutdown=2,
        backlog=2048,
    )

    async def run() -> None:
        await _Server(config).serve(sockets=[sock])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"(APIServer pid={os.getpid()}) %(levelname)s:     %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _die(line: str) -> NoReturn:
    """The line, where vLLM's last words are found, and exit code 1."""
    sys.stdout.write(f"(APIServer pid={os.getpid()}) {line}\n")
    sys.stdout.flush()
    sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Be vLLM's api_server: load for as long as the machine says, then serve."""
    flags, others = parse_flags(sys.argv[1:] if argv is None else argv)
    _log_to_stdout()
    try:
        _run(flags, others, Machine.read(os.environ.get("LOCALCLOUD_MACHINE")))
    except ConfigError as e:
        _die(f"ValueError: {e}")


def _run(flags: argparse.Namespace, others: Sequence[str], machine: Machine) -> None:
    names = tuple(flags.served_model_name or [flags.model])
    log.info("vLLM API server version %s: the paced engine of localcloud, no model is loaded", VERSION)
    log.info("model %s, served as %s", flags.model, ", ".join(names))
    if others:
        log.info("flags without a meaning here: %s", " ".join(others))
    if flags.tensor_parallel_size > machine.num_gpus:
        raise ConfigError(f"tensor parallel size {flags.tensor_parallel_size}, but {machine.num_gpus} GPUs")
    # As vLLM does: the port is taken before the model is loaded, and nobody is let in until it is.
    sock = _bind(flags.host, flags.port)
    app = _make_app(flags, names, machine)
    log.info("Starting to load model %s...", flags.model)
    if machine.fatal_line is not None:
        time.sleep(machine.ready_s / 2.0)
        _die(f"ERROR {machine.fatal_line}")
    started = time.monotonic()
    time.sleep(machine.ready_s)
    log.info("Model loading took %.2f seconds", time.monotonic() - started)
    log.info("Starting vLLM API server 0 on http://%s:%d", *sock.getsockname()[:2])
    serve(app, sock, flags.ssl_certfile, flags.ssl_keyfile)


def _make_app(flags: argparse.Namespace, names: tuple[str, ...], machine: Machine) -> App:
    """The engine behind its middleware, the last one given outermost as with vLLM; raises ConfigError."""
    name = profile_of(names, flags.model)
    profile = PROFILES[name]
    timing = timing_for(name, machine.gpu_name, flags.tensor_parallel_size)
    max_model_len = flags.max_model_len or profile.max_model_len
    model = Model(names, flags.model, max_model_len, profile.expected_output_tokens)
    try:
        server = ModelServer(timing, flags.max_num_seqs, flags.max_num_batched_tokens)
        engine = PacedEngine(model, server)
    except ValueError as e:
        raise ConfigError(f"{e}: Engine core initialization failed") from e
    log.info("Using the pace of %s: GPU KV cache size: %d tokens", timing.name, timing.kv_tokens)
    app: App = engine
    for path in flags.middleware:
        app = load_middleware(path)(app)
    return app


def _bind(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    return sock
