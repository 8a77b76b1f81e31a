"""A stand-in for an engine that streams at a fixed pace, with and without the real token check in front.

    python -m bench.routers.backend HOME

One process serves one and the same small ASGI app on three ports, which it prints as a line of JSON:

    plain     what the routers are given, and what "direct" talks to
    checked   the same behind `remote.token_check.TokenCheck` with the boot directory HOME/fleet/boot
    tls       the same as checked, under TLS with the certificate of HOME/fleet

The server below is as small as a server for `TokenCheck` can be, so that the check is a visible part of what
an answer costs. How packets fall costs no way anything: TCP_NODELAY is set, and the head of an answer leaves
together with its first event, in one segment.

A prompt begins "N pace P", N any number: a token every 1/P s, the first at once; "pace 0": all at once.
"""

import asyncio
import contextlib
import json
import re
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop

from fleet_client.listening import allow_many_files
from remote.token_check import App, Message, Receive, Scope, Send, TokenCheck

MODEL = "bench"
TOKEN = "^"  # noqa: S105 a letter of an answer, not a secret
"""The text of every token. The answer has it nowhere else, so tokens can be counted however it is cut."""

PACE = re.compile(r"\d+ pace ([0-9.]+)")


def _event(finish_reason: str | None) -> bytes:
    choice = {"index": 0, "text": f" {TOKEN}", "logprobs": None, "finish_reason": finish_reason}
    said = {
        "id": "cmpl-bench",
        "object": "text_completion",
        "created": 1,
        "model": MODEL,
        "choices": [choice],
    }
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


EVENT, LAST_EVENT = _event(None), _event("length") + b"data: [DONE]\n\n"

_HEAD = b"HTTP/1.1 %d -\r\n%s\r\n"


# -- a server for one ASGI app -------------------------------------------------------------------------


class EngineConnection(asyncio.Protocol):
    """One client's connection: HTTP/1.1 with keep-alive, one request at a time."""

    def __init__(self, app: App) -> None:
        """app: answers every request."""
        self._app = app
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = b""
        self._head = b""
        self._chunked = False
        self._gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol; uvloop and asyncio set TCP_NODELAY."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by descent

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Part of asyncio.Protocol: an answer that is not read ends."""
        self._gone.set()
        if self._task is not None:
            self._task.cancel()

    # -- what httptools calls

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._url, self._headers, self._body = b"", [], b""

    def on_url(self, url: bytes) -> None:
        """Add to the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header."""
        self._headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        """Add a piece of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer: all of it is here."""
        scope: Scope = {
            "type": "http",
            "method": self._parser.get_method().decode(),
            "path": self._url.partition(b"?")[0].decode("latin-1"),
            "headers": self._headers,
        }
        close = not self._parser.should_keep_alive()
        self._task = asyncio.get_running_loop().create_task(self._serve(scope, close=close))

    async def _serve(self, scope: Scope, *, close: bool) -> None:
        await self._app(scope, self._receive, self._send)
        if close:
            self._transport.close()

    async def _receive(self) -> Message:
        body, self._body = self._body, b""
        if not body:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[tuple[bytes, bytes]] = list(message["headers"])
            self._chunked = all(name != b"content-length" for name, _ in headers)
            if self._chunked:
                headers.append((b"transfer-encoding", b"chunked"))
            lines = b"".join(b"%s: %s\r\n" % header for header in headers)
            self._head = _HEAD % (message["status"], lines)
            return  # it leaves with the first piece of the body
        head, self._head = self._head, b""
        body: bytes = message.get("body", b"")
        if self._chunked:
            end = b"" if message.get("more_body", False) else b"0\r\n\r\n"
            body = b"%x\r\n%s\r\n%s" % (len(body), body, end) if body else end
        self._transport.write(head + body)


# -- the engine ----------------------------------------------------------------------------------------


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what the routers ask of an engine, and completions."""
    if scope["method"] == "GET":
        await _answer(send, *_told(scope["path"]))
        return
    said = json.loads((await receive())["body"])
    prompt = said.get("prompt", "")
    prompt = prompt if isinstance(prompt, str) else prompt[0]
    if scope["path"] == "/v1/completions/render":
        # vllm-router's default policy asks every engine for the ids of each prompt, and waits for them.
        rendered = {"model": MODEL, "token_ids": list(prompt.encode()[::4])}
        await _answer(send, json.dumps([rendered]).encode())
        return
    if scope["path"] != "/v1/completions":
        await _answer(send, json.dumps({"error": {"message": "no such route"}}).encode(), status=404)
        return
    found = PACE.match(prompt)
    count = int(said["max_tokens"])
    if not said.get("stream"):
        choice = {"index": 0, "text": TOKEN * count, "logprobs": None, "finish_reason": "length"}
        usage = {"prompt_tokens": 300, "completion_tokens": count, "total_tokens": 300 + count}
        whole = {"id": "cmpl-bench", "object": "text_completion", "created": 1, "model": MODEL}
        await _answer(send, json.dumps({**whole, "choices": [choice], "usage": usage}).encode())
        return
    await _stream(send, count, float(found[1]) if found else 0.0)


async def _stream(send: Send, count: int, pace: float) -> None:
    """Send so many tokens: the first at once, each of the others when it is due."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for n in range(1, count):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        if pace:
            await asyncio.sleep(max(0.0, begun + n / pace - loop.time()))
    await send({"type": "http.response.body", "body": LAST_EVENT, "more_body": False})


def _told(path: str) -> tuple[bytes, bytes]:
    """Return (body, content type) of what is asked before and beside completions."""
    if path == "/metrics":
        lines = ("vllm:num_requests_running 0", "vllm:num_requests_waiting 0", "vllm:kv_cache_usage_perc 0")
        return "\n".join((*lines, "")).encode(), b"text/plain"
    known: dict[str, Any] = {"status": "ok", "model_path": MODEL, "served_model_name": MODEL}
    if path == "/v1/models":
        known = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "b"}]}
    return json.dumps(known).encode(), b"application/json"


async def _answer(send: Send, body: bytes, kind: bytes = b"application/json", status: int = 200) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def serve(home: Path) -> None:
    """Serve until SIGTERM; the ports go to stdout."""
    loop = asyncio.get_running_loop()
    fleet = home / "fleet"
    checked = TokenCheck(engine, str(fleet / "boot"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(fleet / "tls.crt", fleet / "tls.key")
    ports = {}
    apps: dict[str, tuple[App, ssl.SSLContext | None]] = {
        "plain": (engine, None),
        "checked": (checked, None),
        "tls": (checked, tls),
    }
    for name, (app, context) in apps.items():
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        ports[name] = sock.getsockname()[1]
        await loop.create_server(lambda app=app: EngineConnection(app), sock=sock, ssl=context)
    print(json.dumps(ports), flush=True)
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    await over.wait()


if __name__ == "__main__":
    allow_many_files()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(Path(sys.argv[1])))
