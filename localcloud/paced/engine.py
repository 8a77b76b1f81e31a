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
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from engine.reference import ModelServer
from localcloud.paced.answers import Answer, compact
from localcloud.paced.asgi import Message, Receive, Send, _read_body, _respond, _watch
from localcloud.paced.completion_request import (
    Ask,
    Model,
    Refused,
    _chat_prompt,
    _typed,
    answer_length,
    count_tokens,
    read_ask,
    read_json,
    read_model,
)
from localcloud.paced.metrics import metrics
from localcloud.paced.pacer import Clock, Pacer, _News

log = logging.getLogger("paced")

VERSION = "0.11.0+paced"
"""The vLLM whose manners are imitated, and that it is not it."""


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


def _teller(news: _News, index: int) -> Callable[[int], None]:
    return lambda tokens: news.tell(index, tokens)
