"""The paced engine: vLLM's routes, answers and pace without a model. It says so in every answer.

    request ─► read and checked ─► ModelServer (engine/reference.py) ─► tokens when they are due ─► answer

What a client can tell from vLLM 0.32 is meant to be the same: shapes of answers, of stream events and of
errors, names of metrics, lines of the log. What differs, beside the text:

- tokens of a prompt are counted, not made: one for each four characters, rounded up; a chat message has four
  more, and the answer's opening three. A prompt of token ids has as many tokens as ids;
- an answer ends where `max_tokens` says or, without `ignore_eos`, at a length drawn from the hash of its
  prompt, so that the same prompt always has the same length;
- `echo` of a completion repeats the prompt; of token ids, which are no text here, placeholder text;
- a tool is called with the least arguments its schema takes, JSON is the least of its schema (shapes.py), and
  logprobs are made up; temperature and stop change nothing; a chat's `echo` and regular expressions are
  refused;
- with --runner pooling embeddings, rerank and score are answered by hashes; without it they are 404.

One process, one event loop. All streams share one timer, which is set for the end of the step under way;
when nothing is under way there is no timer, and nothing wakes up.
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from engine.reference import SteppedModelServer
from localcloud.paced.answers import AnswerPlan, CompletionAnswer, compact
from localcloud.paced.completion_request import (
    CompletionRequest,
    answer_lengths,
    chat_prompt,
    count_tokens,
    read_json,
    read_model,
    read_request,
    typed,
)
from localcloud.paced.messages_route import MessageAnswer, as_chat, read_message
from localcloud.paced.metrics import metrics
from localcloud.paced.pacer import Clock, Pacer, TokenInbox
from localcloud.paced.pooling_routes import PooledAnswer, read_embeddings, read_pairs
from localcloud.paced.request_error import RequestError
from localcloud.paced.responses_route import ResponseAnswer, read_response
from localcloud.paced.served_model import ServedModel

VERSION = "0.32.0+paced"
"""The version of vLLM that is imitated, and the mark that it is not vLLM."""

MAX_BODY = 32 * 2**20
"""Bytes of a request body; the longest context of our profiles is some 64 kB of text."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Answer(Protocol):
    """Makes the bytes of one answer."""

    id: str

    @property
    def done(self) -> bool:
        """Whether `events` has returned the whole answer."""

    def events(self, came: Iterable[tuple[int, int]]) -> bytes:
        """Return the events of these tokens, (choice, tokens) in the order they came."""

    def whole(self) -> bytes:
        """Return the whole answer, not streamed."""


class _Made(NamedTuple):
    """A route whose answer the model makes: how its body is read, and what its answer looks like."""

    read: Callable[[dict[str, Any], ServedModel], CompletionRequest]
    answer: Callable[[AnswerPlan], Answer]


_View = Callable[[bytes], tuple[bytes, bytes]]

_EMBED, _PAIRS = _Made(read_embeddings, PooledAnswer), _Made(read_pairs, PooledAnswer)

MADE: Mapping[str | None, Mapping[str, _Made]] = {
    None: {
        "/v1/completions": _Made(partial(read_request, chat=False), CompletionAnswer),
        "/v1/chat/completions": _Made(partial(read_request, chat=True), CompletionAnswer),
        "/v1/responses": _Made(read_response, ResponseAnswer),
        "/v1/messages": _Made(read_message, MessageAnswer),
    },
    "embed": {"/v1/embeddings": _EMBED},
    "classify": dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"), _PAIRS),
}
"""The routes of a model that makes text, of one that embeds, and of one that compares."""


class PacedEngine:
    """The engine that imitates vLLM, an ASGI application; it belongs to its first request's event loop."""

    def __init__(self, model: ServedModel, server: SteppedModelServer, clock: Clock | None = None) -> None:
        """Make an engine that answers for that model at the pace of that simulated model server.

        Raises ValueError if a request of full length can never fit into memory. clock: None for the running
        loop.
        """
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
        self._routes: dict[str, tuple[str, _View | _Made]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/v1/models": ("GET", self._models),
            "/version": ("GET", self._version),
            "/tokenize": ("POST", self._tokenize),
        }
        self._routes |= {path: ("POST", made) for path, made in MADE.get(model.pooling, {}).items()}
        if model.pooling is None:
            self._routes["/v1/messages/count_tokens"] = ("POST", self._count)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI wants it, or take part in the server's start and end."""
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            try:
                await self._http(scope, receive, send)
            except RequestError as e:
                said = e.said
                if scope["path"].startswith("/v1/messages") and e.kind != "Bad Request":
                    said = {"type": "error", "error": {"type": e.kind, "message": str(e)}}
                await _respond(send, e.status, b"application/json", compact(said))

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in self._routes:
            await _respond(send, 404, b"application/json", compact({"detail": "Not Found"}))
            return
        method, view = self._routes[path]
        if scope["method"] != method:
            allow = [(b"allow", method.encode())]
            await _respond(send, 405, b"application/json", compact({"detail": "Method Not Allowed"}), allow)
            return
        raw = b""
        if method == "POST":
            body = await _read_body(receive)
            if body is None:
                return
            raw = body
            media = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media != b"application/json":
                raise RequestError("Unsupported media type: only application/json is taken")
        if isinstance(view, _Made):
            said = read_json(raw)
            await self._answer(view, view.read(said, self.model), said, receive, send)
            return
        kind, answer = view(raw)
        await _respond(send, 200, kind, answer)

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
            count = chat_prompt(said).tokens
        else:
            count = count_tokens(typed(said, "prompt", str, ""))
        answer = {"count": count, "max_model_len": self.model.max_model_len, "tokens": list(range(count))}
        return b"application/json", compact(answer | {"token_strs": None})

    def _count(self, raw: bytes) -> tuple[bytes, bytes]:
        """Count the tokens of a message of Anthropic's."""
        count = chat_prompt(as_chat(read_json(raw), self.model)).tokens
        return b"application/json", compact({"input_tokens": count})

    # -- answers --

    async def _answer(
        self, made: "_Made", request: CompletionRequest, said: dict[str, Any], receive: Receive, send: Send
    ) -> None:
        """Submit a completion request and send its answer as it comes; drop it when the client leaves."""
        if self._pacer is None:
            self._pacer = Pacer(self.server, asyncio.get_running_loop())
        lengths = answer_lengths(request, self.model)
        answer = made.answer(
            AnswerPlan(request, self.model, lengths, int(time.time()), said, secrets.token_hex(16))
        )
        inbox = TokenInbox(sum(tokens for tokens, _ in lengths), patient=not request.stream)
        ids = [f"{answer.id}-{index}" for index in range(len(lengths))]
        watcher = asyncio.ensure_future(_watch(receive, inbox))
        try:
            for index, id in enumerate(ids):
                prompt = request.prompts[index // request.n]
                callback = partial(inbox.put, index)
                self._pacer.submit(id, prompt.tokens, lengths[index][0], callback)
            if request.stream:
                await self._stream(answer, inbox, send)
            elif await inbox.take():
                await _respond(send, 200, b"application/json", answer.whole())
        finally:
            watcher.cancel()
            for id, (_, reason) in zip(ids, lengths, strict=True):
                self.ended["abort" if self._pacer.cancel(id) else reason] += 1

    async def _stream(self, answer: Answer, inbox: TokenInbox, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        begun = False
        while not answer.done and (came := await inbox.take()):
            events = answer.events(came)
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            await send({"type": "http.response.body", "body": events, "more_body": not answer.done})


async def _watch(receive: Receive, inbox: TokenInbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.leave()


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body of a request; None when the client left before its end.

    Raises RequestError if it is longer than MAX_BODY.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise RequestError(f"the body: at most {MAX_BODY} bytes are taken", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


async def _respond(
    send: Send, status: int, kind: bytes, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    most = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": most})
    await send({"type": "http.response.body", "body": body})
