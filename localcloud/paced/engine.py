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

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from engine.reference import SteppedModelServer
from localcloud.paced.answers import CompletionAnswer, compact
from localcloud.paced.completion_request import (
    CompletionRequest,
    RequestError,
    ServedModel,
    answer_lengths,
    chat_prompt,
    count_tokens,
    read_json,
    read_model,
    read_request,
    typed,
)
from localcloud.paced.metrics import metrics
from localcloud.paced.pacer import Clock, Pacer, TokenInbox

VERSION = "0.11.0+paced"
"""The version of vLLM that is imitated, and the mark that it is not vLLM."""

MAX_BODY = 32 * 2**20
"""Bytes of a request body; the longest context of our profiles is some 64 kB of text."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


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
                allow = [(b"allow", self._routes[scope["path"]][0].encode())] if e.status == 405 else []
                await _respond(send, e.status, b"application/json", compact(e.said), allow)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in self._routes:
            raise RequestError("Not Found", status=404, kind="NotFoundError")
        method, view = self._routes[path]
        if scope["method"] != method:
            raise RequestError("Method Not Allowed", status=405, kind="MethodNotAllowedError")
        raw = b""
        if method == "POST":
            body = await _read_body(receive)
            if body is None:
                return
            raw = body
            media = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media != b"application/json":
                raise RequestError("Unsupported media type: only application/json is taken")
        if view is not None:
            kind, answer = view(raw)
            await _respond(send, 200, kind, answer)
            return
        request = read_request(read_json(raw), self.model, chat=path == "/v1/chat/completions")
        await self._complete(request, receive, send)

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

    # -- completions --

    async def _complete(self, request: CompletionRequest, receive: Receive, send: Send) -> None:
        """Submit a completion request and send its answer as it comes; drop it when the client leaves."""
        if self._pacer is None:
            self._pacer = Pacer(self.server, asyncio.get_running_loop())
        lengths = answer_lengths(request, self.model)
        answer = CompletionAnswer(request, self.model, lengths, int(time.time()))
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

    async def _stream(self, answer: CompletionAnswer, inbox: TokenInbox, send: Send) -> None:
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
