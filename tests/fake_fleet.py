"""A loadbalancer and instances with real sockets and real TLS, whose answers a test writes down.

Each server runs its own event loop in a thread. An instance takes each of its tokens once, like the real one,
and answers in OpenAI's shapes; `plan` and `before` hold what it does with its next requests instead.
"""

import asyncio
import datetime
import json
import re
import secrets
import ssl
import tempfile
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fleet_client.leases import ClientLease

WORDS = ("one", " two", " three", " four", " five")
"""What an instance answers, a word a token."""


def make_certificate(
    days: tuple[int, int] = (-30, 3650),
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
) -> tuple[str, str]:
    """(certificate, key), both PEM, good from and to so many days from now. key: default a new one."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "instance")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return made.public_bytes(serialization.Encoding.PEM).decode(), pem.decode()


@dataclass
class Seen:
    """One request as it came."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    def header(self, name: str) -> str | None:
        """The header's value; None without one, all of them joined when it came more than once."""
        found = [v for n, v in self.headers if n.lower() == name]
        return ", ".join(found) if found else None

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Out:
    """Where an answer goes."""

    def __init__(self, transport: asyncio.Transport, room: asyncio.Event) -> None:
        """room: set while more can be written."""
        self._transport = transport
        self._room = room
        self.gone = asyncio.Event()

    async def raw(self, data: bytes) -> None:
        """These bytes."""
        if self._transport.is_closing():
            self.gone.set()
        if self.gone.is_set():
            raise ConnectionResetError
        self._transport.write(data)
        await self._room.wait()

    async def start(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Status and headers; the body follows in chunks."""
        await self.raw(_head(status, {"Transfer-Encoding": "chunked"} | (headers or {})))

    async def chunk(self, data: bytes) -> None:
        """A piece of the body."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """The end of the body."""
        await self.raw(b"0\r\n\r\n")

    async def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        """A whole answer: JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        await self.raw(_head(status, own | (headers or {})) + raw)

    def close(self) -> None:
        """End the connection properly."""
        self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Reason", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


Act = Callable[[Seen, Out], Awaitable[None]]


class _Connection(asyncio.Protocol):
    def __init__(self, server: "FakeServer", number: int) -> None:
        self.server = server
        self.number = number
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None
        self.room = asyncio.Event()
        self.room.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.out = Out(transport, self.room)
        self.server.open.add(self)

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.out.gone.set()
        self.room.set()
        self.server.open.discard(self)

    def data_received(self, data: bytes) -> None:
        if self.server.record:
            self.server.received += data
        self.buffer += data
        if self.task is None:
            self._next()

    def _next(self) -> None:
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = [line.partition(":") for line in lines]
        headers = [(name, value.strip()) for name, _, value in pairs]
        size = int(next((v for n, v in headers if n.lower() == "content-length"), "0"))
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        seen = Seen(method, target, headers, rest[:size], self.number)
        if self.server.record:
            self.server.seen.append(seen)
        self.task = asyncio.get_running_loop().create_task(self._serve(seen))

    async def _serve(self, seen: Seen) -> None:
        with suppress(ConnectionResetError):
            await self.server.act(seen, self.out)
        self.task = None
        if not self.transport.is_closing():
            self._next()


class FakeServer:
    """An HTTP server in a thread; `act` answers."""

    def __init__(self, certificate: tuple[str, str] | None = None, port: int = 0) -> None:
        """Listens on loopback. certificate: of TLS, with its key; None for none."""
        self.seen: list[Seen] = []
        self.received = b""
        self.record = True
        self.connections = 0
        self.open: set[_Connection] = set()
        self.certificate = certificate
        self.port = port
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    @property
    def address(self) -> str:
        """Where it is."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    async def act(self, seen: Seen, out: Out) -> None:
        """Answer it."""
        raise NotImplementedError

    def stop(self) -> None:
        """Close everything and wait for the end."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _context(self) -> ssl.SSLContext | None:
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "both.pem"
            path.write_text("".join(self.certificate))
            context.load_cert_chain(path)
        return context

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda *_: None)

        def accept() -> _Connection:
            self.connections += 1
            return _Connection(self, self.connections)

        server = self._loop.run_until_complete(
            self._loop.create_server(accept, "127.0.0.1", self.port, ssl=self._context(), backlog=1024)
        )
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        transports: Any = getattr(self._loop, "_transports", {})  # also those still shaking hands
        for transport in list(transports.values()):
            transport.abort()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


class FakeInstance(FakeServer):
    """A model server behind the token check."""

    def __init__(self, number: int, certificate: tuple[str, str] | None = None, port: int = 0) -> None:
        """number: its instance_id."""
        self.number = number
        self.tokens: set[str] = set()
        self.used: list[str] = []
        self.refused = 0
        self.before: deque[Act] = deque()
        self.plan: deque[Act] = deque()
        self.pause_s = 0.0
        self.words = WORDS
        self.streams = 0  # under way
        self.disconnects = 0
        super().__init__(certificate, port)

    def token(self) -> str:
        """A fresh one."""
        token = secrets.token_urlsafe(24)
        self.tokens.add(token)
        return token

    async def act(self, seen: Seen, out: Out) -> None:
        """Take the token, then what is planned, or an answer. before: what is done without taking it."""
        if self.before:
            await self.before.popleft()(seen, out)
            return
        given = (seen.header("authorization") or "").removeprefix("Bearer ")
        if given not in self.tokens:
            self.refused += 1
            said = {"error": {"message": "A single-use token is needed", "code": "invalid_api_key"}}
            await out.answer(401, said, {"WWW-Authenticate": "Bearer"})
            return
        self.tokens.discard(given)
        self.used.append(given)
        if self.plan:
            await self.plan.popleft()(seen, out)
        else:
            await self.model(seen, out)

    async def model(self, seen: Seen, out: Out) -> None:
        """What a model server says."""
        path = seen.target.partition("?")[0]
        if path == "/v1/models":
            await out.answer(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})
            return
        if not path.startswith("/v1/") or not seen.body:
            await out.answer(404, {"detail": "Not Found"})
            return
        said = seen.json
        chat = "messages" in said
        if said.get("stream"):
            await self._stream(said, chat, out)
            return
        text = "".join(self.words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if said.get("tools"):
            call = {"name": said["tools"][0]["function"]["name"], "arguments": '{"city": "Ulm"}'}
            message = {"role": "assistant", "content": None}
            choice["message"] = message | {"tool_calls": [{"id": "c", "type": "function", "function": call}]}
        elif chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        usage = {"prompt_tokens": 3, "completion_tokens": len(self.words), "total_tokens": 8}
        await out.answer(200, _envelope(chat, [choice]) | {"usage": usage}, {"X-Instance": str(self.number)})

    async def _stream(self, said: Any, chat: bool, out: Out) -> None:
        await out.start(200, {"Content-Type": "text/event-stream", "X-Instance": str(self.number)})
        self.streams += 1
        try:
            for word in self.words:
                part = {"delta": {"content": word}} if chat else {"text": word}
                event = _envelope(chat, [{"index": 0, "finish_reason": None} | part], streamed=True)
                await out.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
                if self.pause_s:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(out.gone.wait(), self.pause_s)
            await out.chunk(b"data: [DONE]\n\n")
            await out.end()
        except ConnectionResetError:
            self.disconnects += 1
            raise
        finally:
            self.streams -= 1


def _envelope(chat: bool, choices: list[dict[str, Any]], streamed: bool = False) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion"
    return {"id": "r", "object": kind, "created": 1, "model": "m", "choices": choices}


def lease(number: int = 1, granted: float = 0.0, life_s: float = 60.0, **more: Any) -> ClientLease:
    """One that is as good as any other."""
    said: dict[str, Any] = {
        "address": "http://127.0.0.1:1",
        "request_id": f"r{number}",
        "instance_id": number,
        "granted": granted,
        "expires": granted + life_s,
        "token": "TOKEN",
        "certificate": None,
    }
    return ClientLease(**(said | more))


@dataclass
class Given:
    """A lease that was given."""

    request_id: str
    instance_id: int
    token: str


_FIELDS = frozenset(
    ("prompt_tokens", "max_tokens", "work", "wait_s", "avoid", "affinity", "count", "priority", "prompts")
)
_HASH = re.compile(r"[0-9a-f]{8,32}")


def _wrong(said: dict[str, Any]) -> str | None:
    """The field that the real one would refuse."""
    affinity, count = said.get("affinity", []), said.get("count", 1)
    if unknown := set(said) - _FIELDS:
        return min(unknown)
    if len(affinity) > 256 or not all(isinstance(one, str) and _HASH.fullmatch(one) for one in affinity):
        return "affinity"
    if not isinstance(count, int) or not 1 <= count <= 64:
        return "count"
    if said.get("priority", "normal") not in ("high", "normal", "low"):
        return "priority"
    return None if len(said.get("avoid", ())) <= 64 else "avoid"


class FakeLoadbalancer(FakeServer):
    """Gives leases in turn, or where a prefix went before; `refusals` holds what POST /route says instead.

    A refusal is its status, Retry-After, and the word for it (all_busy).
    """

    def __init__(self, instances: list[FakeInstance], port: int = 0) -> None:
        """instances may be changed at any time."""
        self.instances = instances
        self.routes: list[Any] = []
        self.given: list[Given] = []
        self.dones: list[Any] = []
        self.paces: list[Any] = []
        self.refusals: deque[tuple[int, float] | tuple[int, float, str]] = deque()
        self.holders: dict[str, int] = {}  # instance that was given the prefix last
        self.room: int | None = None  # leases that are left to give
        self.key: str | None = None
        self.model: tuple[int, Any] = (200, {"model": "vllm-13", "max_model_len": 4096})
        self.lease_s = 60.0
        self.clock_wrong_s = 0.0
        self.wrong: dict[int, dict[str, Any]] = {}  # instance_id -> fields of its leases that are not so
        self._turn = 0
        super().__init__(None, port)

    async def act(self, seen: Seen, out: Out) -> None:
        """POST /route and POST /done, and GET /health for everybody."""
        if seen.target == "/health":
            await out.answer(200, {"status": "ok"})
        elif self.key is not None and seen.header("authorization") != f"Bearer {self.key}":
            await out.answer(401, {"error": "unauthorized", "message": "this route needs a key"})
        elif seen.target == "/model":
            await out.answer(*self.model)
        elif seen.target == "/done":
            self.dones.append(seen.json)
            await out.answer(200, {})
        elif seen.target == "/pace":
            self.paces += seen.json["answers"]
            await out.answer(200, {})
        else:
            self.routes.append(seen.json)
            await self._route(seen.json, out)

    async def _route(self, said: Any, out: Out) -> None:
        left = [i for i in self.instances if i.number not in said.get("avoid", ())]
        if (wrong := _wrong(said)) is not None:
            await out.answer(400, {"error": "bad_request", "message": f"{wrong}: wrong", "field": wrong})
        elif self.refusals:
            status, after_s, *code = self.refusals.popleft()
            message = {"error": (code or ["all_busy"])[0], "message": "every instance is busy"}
            headers = {"Retry-After": str(round(after_s))}
            await out.answer(status, message | {"retry_after_s": after_s}, headers)
        elif not left or self.room == 0:
            busy = {"error": "all_busy", "message": "every instance is busy", "retry_after_s": 1.0}
            await out.answer(503, busy, {"Retry-After": "1"})
        else:
            count = said.get("count", 1) if self.room is None else min(self.room, said.get("count", 1))
            leases = [self._lease(left, said.get("affinity", [])) for _ in range(count)]
            if "count" not in said:
                await out.answer(200, leases[0])
                return
            certificates: dict[str, Any] = {}
            for lease in leases:
                known = {name: lease.pop(name, None) for name in ("certificate", "public_key_sha256")}
                if known["certificate"] is not None:
                    certificates[str(lease["instance_id"])] = known
            await out.answer(200, {"leases": leases, "certificates": certificates})

    def _lease(self, left: list[FakeInstance], affinity: list[str]) -> dict[str, Any]:
        self._turn += 1
        one = left[self._turn % len(left)]
        for prefix in affinity:
            one = next((i for i in left if i.number == self.holders.get(prefix)), one)
        self.holders |= dict.fromkeys(affinity, one.number)
        if self.room is not None:
            self.room -= 1
        given = Given(secrets.token_hex(8), one.number, one.token())
        self.given.append(given)
        lease: dict[str, Any] = {
            "address": one.address,
            "token": given.token,
            "request_id": given.request_id,
            "instance_id": one.number,
            "model": "m",
            "expires_at": 1e9 + self.clock_wrong_s,
            "expires_in_s": self.lease_s,
        }
        if one.certificate is not None:
            lease["certificate"] = one.certificate[0]
            lease["public_key_sha256"] = "x"
        return lease | self.wrong.get(one.number, {})


@dataclass
class FakeFleet:
    """All of it."""

    loadbalancer: FakeLoadbalancer
    instances: list[FakeInstance]
    extra: list[FakeServer] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The loadbalancer's."""
        return self.loadbalancer.address

    @property
    def requests(self) -> list[Seen]:
        """What reached instances."""
        return [seen for one in self.instances for seen in one.seen]

    def stop(self) -> None:
        """End it."""
        for server in (self.loadbalancer, *self.instances, *self.extra):
            server.stop()


def fake_fleet(count: int = 2, tls: bool = True) -> FakeFleet:
    """A loadbalancer and so many instances, numbered from 1."""
    instances = [FakeInstance(n + 1, make_certificate() if tls else None) for n in range(count)]
    return FakeFleet(FakeLoadbalancer(instances), instances)
