"""Serve a Flask app on the event loop.

Views run inline on the loop: uvicorn parses, the bridge calls the WSGI app, and only requests that must wait
are parked. That takes 130 µs of processor an answer and holds thousands of waiting clients in two threads; a
thread per client took twice to nine times that (measured 2026-11). So all views run on one thread, the
loop's, unless their path is named blocking, and state that only views and background coroutines touch needs
no lock.

    request ─► its head ─► refusal                  who may ask is known before the body is read
             ├─► Flask view ─────► answer
             └─► direct view ─┬──► answer           without Flask's part of the time
                              └──► Held ─► its answer    from whatever frees capacity,
                                      ├──► late()        when its time is over,
                                      ├──► 503           when the server ends,
                                      └──► gave_up()     when its client has gone
"""

import asyncio
import functools
import io
import logging
import socket
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self
from urllib.parse import unquote_to_bytes

from flask import Flask

from fleet_client.asgi_server import AsgiServer, Background
from fleet_client.browser_pages import by_name, page_refusal
from fleet_client.loopback import is_loopback_host, names_loopback
from fleet_client.own_tls import ServerTls
from web.answers import CLOSING, OUR_FAULT, Answer, JsonAnswer, bad_request, error_answer
from web.app import max_body, refused_by_head
from web.direct import Asker, DirectRoute, DirectRoutes, Held
from web.messages.decoding import BadField

log = logging.getLogger("http")

_Plain = tuple[int, list[tuple[bytes, bytes]], bytes]


@functools.lru_cache(maxsize=256)
def _environ_name(header: bytes) -> str:
    name = header.decode("latin-1").upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + name


class FlaskBridge:
    """The ASGI application around one Flask app.

    It is a context manager: its end waits for the views that run in its thread pool.
    """

    def __init__(self, app: Flask, blocking: Collection[str] = (), *, loopback: bool = False) -> None:
        """Make the ASGI application that serves this Flask app.

        blocking: paths whose views may take long; they run in a thread pool, and must lock what they touch.
        loopback: refuse requests whose Host header names another machine.
        """
        self._app = app
        self._blocking = frozenset(blocking)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="view")
        self._loopback = loopback
        self._direct = DirectRoutes.of(app).by_path
        self._views = app.url_map.bind("localhost")
        self._held: set[Held] = set()
        self._closing = False

    def __enter__(self) -> Self:
        """Return the bridge itself, as the value of the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the views in the thread pool have ended."""
        self._pool.shutdown()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one HTTP request, as ASGI wants it."""
        path, method = scope["path"], scope["method"]
        said = by_name(scope["headers"])
        direct = self._direct.get(path)
        route = None if direct is None else direct.get("GET" if method == "HEAD" else method)
        most = max_body(self._app, path)
        asker = Asker(said.get(b"authorization", b"").decode("latin-1"), _peer(scope), said)
        refusal = self._page_refusal(method, path, said)
        if refusal is None:
            if route is not None:
                refusal = route.check(asker.authorization)
            else:
                refusal = self._refusal(scope, direct, asker)
        if refusal is None and int(said.get(b"content-length", 0)) > most:  # httptools takes digits only
            refusal = _too_large(most)
        raw = b"" if refusal is not None else await _read(receive, most)
        if raw is None:
            return
        if refusal is not None:
            answer = _plain(refusal)
        elif route is not None:
            found = await self._answer_directly(route, raw, asker, most, receive)
            if found is None:
                return
            answer = _plain(found)
        elif path in self._blocking:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._pool, self._call_flask, self._environ(scope, raw))
        else:
            answer = self._call_flask(self._environ(scope, raw))
        status, headers, payload = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": payload})

    def _refusal(
        self, scope: Mapping[str, Any], direct: Mapping[str, DirectRoute] | None, asker: Asker
    ) -> JsonAnswer | None:
        """Return the refusal of a request that no view would serve, before its body is read; else None."""
        if direct is not None:
            allow = ("Allow", ", ".join(sorted(direct)))
            return error_answer(405, "method_not_allowed", "the method is not allowed here", allow)
        return refused_by_head(self._app, self._views, scope["method"], scope["path"], asker.authorization)

    def _page_refusal(self, method: str, path: str, said: Mapping[bytes, bytes]) -> JsonAnswer | None:
        """Return the refusal of a request that a foreign web page may have caused, else None.

        It is found before the body is read.
        """
        if self._loopback:
            # A page can reach loopback under a name of its own (DNS rebinding).
            host = said.get(b"host")
            if host is not None and not names_loopback(host):
                shown = host[:100].decode("latin-1")
                return error_answer(403, "wrong_host", f"Host: {shown} is not this machine")
        why = page_refusal(method, path, said)
        return None if why is None else error_answer(*why)

    async def _answer_directly(
        self,
        route: DirectRoute,
        raw: bytes,
        asker: Asker,
        most: int,
        receive: Any,
    ) -> Answer | None:
        """Return the answer of a direct route, one that is served without Flask.

        None when its client went away while it waited.
        """
        if len(raw) > most:
            return _too_large(most)
        try:
            found = route.handle(raw, asker)
            if isinstance(found, JsonAnswer):
                return found
            return await (self._wait(found, receive) if isinstance(found, Held) else found)
        except BadField as e:
            return bad_request(e)
        except Exception:
            log.exception("a direct view failed")
            return OUR_FAULT

    def _environ(self, scope: Mapping[str, Any], raw: bytes) -> dict[str, Any]:
        server = scope.get("server") or ("localhost", 80)
        environ: dict[str, Any] = {
            "REQUEST_METHOD": scope["method"],
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(scope["raw_path"]).decode("latin-1"),
            "QUERY_STRING": scope["query_string"].decode("latin-1"),
            "SERVER_NAME": str(server[0]),
            "SERVER_PORT": str(server[1]),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": _peer(scope),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scope.get("scheme", "http"),
            "wsgi.input": io.BytesIO(raw),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in scope["headers"]:
            key = _environ_name(name)
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ["CONTENT_LENGTH"] = str(len(raw))  # what has come, also of a chunked body
        return environ

    def _call_flask(self, environ: dict[str, Any]) -> _Plain:
        status = 500
        headers: list[tuple[bytes, bytes]] = []

        def start_response(line: str, given: list[tuple[str, str]], exc_info: Any = None) -> Any:  # noqa: ARG001
            nonlocal status, headers
            status, headers = int(line[:3]), _encoded(given)

        chunks = self._app.wsgi_app(environ, start_response)
        try:
            payload = b"".join(chunks)
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()
        return status, headers, payload

    async def _wait(self, held: Held, receive: Any) -> JsonAnswer | None:
        """Wait for the answer to a held request and return it; None when its client went away first."""
        if self._closing:
            held.gave_up()
            return CLOSING
        future = held.future(asyncio.get_running_loop())
        gone = asyncio.ensure_future(_disconnected(receive))
        self._held.add(held)
        try:
            both: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(both, timeout=held.wait_s, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                if gone.done():
                    held.undelivered()
                    return None
                return future.result()
            future.cancel()
            if gone.done():
                held.gave_up()
                return None
            return held.late()
        finally:
            self._held.discard(held)
            gone.cancel()

    def close(self) -> None:
        """Answer 503 to every request that waits, and to those that would wait from now on."""
        self._closing = True
        for held in list(self._held):
            if held.answer(CLOSING):
                held.gave_up()


async def _read(receive: Any, most: int) -> bytes | None:
    """Return the body of a request, or its beginning when it is longer than `most` bytes.

    None when the client has gone.
    """
    message = await receive()
    raw: bytes = message.get("body", b"")
    if message["type"] == "http.request" and message.get("more_body"):
        parts, size = [raw], len(raw)
        while message["type"] == "http.request" and message.get("more_body") and size <= most:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        raw = b"".join(parts)
    return None if message["type"] == "http.disconnect" else raw


def _peer(scope: Mapping[str, Any]) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _too_large(most: int) -> JsonAnswer:
    return error_answer(413, "request_entity_too_large", f"a body may have {most} bytes here")


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _plain(answer: Answer) -> _Plain:
    payload = answer.payload
    headers = [(b"content-type", answer.content_type), (b"content-length", b"%d" % len(payload))]
    return answer.status, headers + _encoded(answer.headers) if answer.headers else headers, payload


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def serve_flask(
    app: Flask,
    sock: socket.socket,
    background: Sequence[Background] = (),
    blocking: Collection[str] = (),
    *,
    any_host: bool = False,
    tls: ServerTls | None = None,
) -> None:
    """Serve a Flask app on that socket until SIGTERM or Ctrl-C, then return.

    background: see AsgiServer. blocking: see FlaskBridge. any_host: answer on loopback also under names of
    other machines (a proxy in front, with keys). tls: the server's certificate and key, None for plain HTTP.
    """
    loopback = is_loopback_host(sock.getsockname()[0]) and not any_host
    with FlaskBridge(app, blocking, loopback=loopback) as bridge:
        AsgiServer(bridge, sock, background, tls).run()
