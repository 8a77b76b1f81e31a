"""The fleet as a transport for httpx2.AsyncClient, on aiohttp.

Its C parser is why: 500 streams of 50 events/s take 0.7 of a core and keep up, where httpx2's own pool takes
all of one and falls behind.
"""

import asyncio
import contextlib
import io
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import aiohttp
import httpx2
from multidict import CIMultiDict
from yarl import URL

from fleet_client.call import NO_TIMEOUTS, Call, Timeouts, forwarded, returned
from fleet_client.connection_pool import Header
from fleet_client.leases import NORMAL, Lease, Refusal, done_body, read_batch, read_route, route_body
from fleet_client.retry import (
    ELSEWHERE,
    ROUTE_SLACK_S,
    Ask,
    Reply,
    Send,
    Setback,
    Take,
    Tell,
    course,
    is_last,
    kept_reply,
)
from fleet_client.tls_pins import context_for
from fleet_client.transport import (
    CLOSE_S,
    DONE_S,
    ENDS_AT_ONCE,
    ENDS_KEPT,
    KEPT_ANSWER,
    MODEL_KEEP_ALIVE_S,
    MOMENT_S,
    ROUTE_KEEP_ALIVE_S,
    Body,
    Fleet,
    call_of,
    extensions,
    named,
    not_connected,
    wrong_request,
)


class _Stage:
    """How far the request of this task has come."""

    __slots__ = ("connected", "fresh")

    def __init__(self) -> None:
        self.connected = False
        self.fresh = False


_STAGE: ContextVar[_Stage | None] = ContextVar("fleet_client_stage", default=None)


class _Connector(aiohttp.TCPConnector):
    """Notes at which stage a request is, which aiohttp's errors do not say."""

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        connection = await super().connect(req, traces, timeout)
        stage = _STAGE.get()
        if stage is not None:
            stage.connected = True
        return connection

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        made = await super()._create_connection(req, traces, timeout)
        stage = _STAGE.get()
        if stage is not None:
            stage.fresh = True
        return made


def _session(keep_alive_s: float | None) -> aiohttp.ClientSession:
    """keep_alive_s: None for a new connection each time."""
    if keep_alive_s is None:
        connector = _Connector(limit=0, force_close=True)
    else:
        connector = _Connector(limit=0, keepalive_timeout=keep_alive_s)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy from the environment must not see tokens or prompts
        auto_decompress=False,
        max_line_size=65_536,
        max_field_size=65_536,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


class Answer(httpx2.AsyncByteStream):
    """An answer of an instance: status and headers are here, its bytes come as they come.

    It must be read to its end or closed; closing it early ends the connection to the instance at once.
    """

    def __init__(
        self, call: Call, reply: Reply, tell: Tell, linger: Callable[[aiohttp.ClientResponse], None]
    ) -> None:
        """Made by `AsyncFleetTransport.exchange`."""
        self.call = call
        self.status = reply.status
        self.reason = reply.reason
        self.headers = reply.headers
        self.lease = reply.lease
        self._body = reply.body
        self._source: aiohttp.ClientResponse | None = reply.source
        self._tell = tell
        self._linger = linger
        self._chunk = b""
        self._over = reply.source is None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Its bytes, not decoded, in the pieces they come in; raises httpx2's errors."""
        if self._source is None:
            body, self._body = self._body, None
            if body:
                yield body
            return
        read = self._source.content.readany
        error: httpx2.RequestError
        while True:
            try:
                chunk = await read()
            except (aiohttp.ServerTimeoutError, TimeoutError):
                error = httpx2.ReadTimeout(f"{self.lease}: nothing came in time")
                break
            except (aiohttp.ClientError, OSError) as e:
                error = httpx2.RemoteProtocolError(f"{self.lease}: the answer broke off: {type(e).__name__}")
                break
            if not chunk:
                self._over = True
                self._source.release()
                return
            self._chunk = chunk
            yield chunk
        if not self._over:  # nobody closed it
            self.fail("read_timeout" if isinstance(error, httpx2.ReadTimeout) else "broke_off")
        raise error

    def fail(self, why: str) -> None:
        """What came is not what it must be: the loadbalancer is told that word, and no more is read."""
        self._over = True
        if self._source is not None:
            _abort(self._source)
        if self.lease is not None:
            self.call.setbacks.append((self.lease.instance_id, why))
            self._tell(self.lease, "failed", why)

    async def aclose(self) -> None:
        """Done with it; the instance learns at once when it was not read to its end."""
        if self._over or self._source is None:
            return
        self._over = True
        if self._source.content.is_eof():
            self._source.release()
        elif is_last(self._chunk):
            self._linger(self._source)
        else:
            _abort(self._source)


async def _await_end(source: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(MOMENT_S):
            if await source.content.readany() == b"":
                return
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    finally:
        if not source.content.is_eof():
            _abort(source)


def _abort(source: aiohttp.ClientResponse) -> None:
    """Close the connection without waiting for TLS to say goodbye."""
    connection = source.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    source.close()


class AsyncFleetTransport(httpx2.AsyncBaseTransport):
    """For `httpx2.AsyncClient(transport=...)`, and so for `openai.AsyncOpenAI(http_client=...)`.

    It belongs to the event loop of its first request. Close it (`aclose`, or the client's) when done: leases
    that were fetched ahead go back then. asyncio.run does it for a program that forgets.
    """

    def __init__(
        self,
        loadbalancer: str = "http://127.0.0.1:8200",
        *,
        api_key: str | None = None,
        max_tries: int = 4,
        wait_s: float = 30.0,
        ahead: int = 0,
        connect_s: float = 5.0,
        trust_network: bool = False,
        priority: str = NORMAL,
        affinity: bool = True,
        affinity_salt: bytes | str | None = None,
    ) -> None:
        """Nothing is opened before the first request; raises ValueError for what cannot be.

        api_key: a client key, where the loadbalancer wants one; default FLEET_CLIENT_KEY of the environment.
        max_tries: instances a request is tried on. wait_s: how long it may wait for leases, all in all.
        ahead: leases that are fetched before they are needed. connect_s: for a connection to an instance.
        trust_network: allow a loadbalancer over plain http elsewhere than on loopback.
        priority: high, normal or low, of requests without a header X-Fleet-Priority of their own.
        affinity: tell the loadbalancer salted hashes of prompts' prefixes, so that a conversation goes where
        it was read before (fleet_client/prefix_hashes.py says what they reveal).
        affinity_salt: at least 16 bytes, the same for all clients that are to profit from each other's
        prompts; default FLEET_AFFINITY_SALT of the environment, else a random one.
        """
        self._fleet = Fleet(
            loadbalancer,
            api_key=api_key,
            max_tries=max_tries,
            wait_s=wait_s,
            ahead=ahead,
            connect_s=connect_s,
            trust_network=trust_network,
            priority=priority,
            affinity=affinity,
            affinity_salt=affinity_salt,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.untold = 0  # ends of leases that the loadbalancer did not take in
        self._ends: deque[tuple[Lease, str, str]] = deque()
        self._tellers: set[asyncio.Task[None]] = set()
        self._fetchers: set[asyncio.Task[None]] = set()
        self._lingering: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._route: aiohttp.ClientSession
        self._model: aiohttp.ClientSession
        self._again: aiohttp.ClientSession

    def __repr__(self) -> str:
        """Without keys."""
        return f"<AsyncFleetTransport {self._fleet.url}{' closed' if self._closed else ''}>"

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """httpx2's own call."""
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = await self._buffer(request)
        call = call_of(self._fleet, request, body)
        if isinstance(call, Reply):
            return wrong_request(call)
        reply = await self._serve(call)
        return httpx2.Response(
            reply.status,
            headers=list(reply.headers),
            stream=Answer(call, reply, self._tell, self._linger),
            extensions=extensions(call, reply),
        )

    def call(
        self,
        method: str,
        target: str,
        headers: Sequence[Header],
        body: bytes,
        timeouts: Timeouts = NO_TIMEOUTS,
    ) -> Call | Reply:
        """A request for `exchange`, with size, hashes and priority; or the answer that says what is wrong.

        Raises httpx2.LocalProtocolError for one that HTTP cannot carry.
        """
        return self._fleet.call(method, target, headers, body, timeouts)

    async def exchange(self, call: Call) -> Answer:
        """The same without httpx2's objects: the answer from its first byte on; raises httpx2's errors."""
        return Answer(call, await self._serve(call), self._tell, self._linger)

    async def aclose(self) -> None:
        """Give back what is left, tell what is to be told (2 s at most), close every connection."""
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def _keep(self) -> None:
        """Close everything when cancelled: by `aclose`, or by asyncio.run at the end of a program."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._closed = True
            await self._finish()

    async def _finish(self) -> None:
        if self._look is not None:
            self._look.cancel()
        for task in (*self._fetchers, *self._lingering):
            task.cancel()
        await asyncio.gather(*self._fetchers, *self._lingering, return_exceptions=True)
        self._ends.extend((lease, "unused", "") for lease in self._fleet.ahead.close())
        own = [self._tell_all() for _ in range(min(len(self._ends), ENDS_AT_ONCE))]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await asyncio.gather(*self._tellers, *own, return_exceptions=True)
        self.untold += len(self._ends)
        self._ends.clear()
        for session in (self._model, self._again, self._route):
            await session.close()

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this AsyncFleetTransport is closed")
        if self._loop is None:
            self._loop = loop
            self._route = _session(ROUTE_KEEP_ALIVE_S)
            self._model = _session(MODEL_KEEP_ALIVE_S)
            self._again = _session(None)
            self._keeper = loop.create_task(self._keep())
        elif self._loop is not loop:
            raise RuntimeError(
                "this AsyncFleetTransport belongs to another event loop: make one (and its client) in each "
                "loop, or in each call of asyncio.run"
            )

    async def _buffer(self, request: httpx2.Request) -> bytes | None:
        body = Body()
        stream = request.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 httpx2 sees to it
        async for part in stream:
            if not body.add(part):
                break
        return body.joined()

    async def _serve(self, call: Call) -> Reply:
        self._open()
        fleet = self._fleet
        now = time.monotonic()
        lease, nearer = None, False
        if stock := fleet.may_take(call):
            lease, nearer = fleet.first(call, now)
            if lease is not None:
                self._refill()  # else when it has one: a batch must not take what it is waiting for
        steps = course(
            call, fleet.rules, fleet.url, lease, self._tell, now, fleet.rng, stock=stock, nearer=nearer
        )
        came: Lease | Refusal | Reply | Setback | None
        try:
            step = next(steps)
            while True:
                if isinstance(step, Send):
                    came = await self._send(call, step)
                elif isinstance(step, Ask):
                    came = await self._ask(step)
                    if stock and isinstance(came, Lease):
                        self._refill()
                elif isinstance(step, Take):
                    came = fleet.again(call, step.avoid, time.monotonic())
                    self._refill()
                else:
                    await asyncio.sleep(step.seconds)
                    came = None
                step = steps.send((came, time.monotonic()))
        except StopIteration as end:
            reply: Reply = end.value
            fleet.answered(call, reply)
            return reply

    def _linger(self, source: aiohttp.ClientResponse) -> None:
        """Wait a moment for the end of an answer whose last event was read; its connection is kept then."""
        assert self._loop is not None  # noqa: S101 there was a request
        task = self._loop.create_task(_await_end(source))
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    async def _ask(self, ask: Ask) -> Lease | Refusal:
        got = await self._post_route(ask.body, ask.hold_s, ask.slack_s)
        return got if isinstance(got, Refusal) else read_route(*got, time.monotonic())

    async def _post_route(
        self, body: dict[str, Any], hold_s: float, slack_s: float
    ) -> tuple[int, bytes, str | None] | Refusal:
        """(status, body, Retry-After) of the answer."""
        begun = time.monotonic()
        try:
            async with self._route.post(
                f"{self._fleet.url}/route",
                data=json.dumps(body),
                headers=self._fleet.headers,
                timeout=aiohttp.ClientTimeout(
                    total=hold_s + slack_s, sock_connect=self._fleet.rules.connect_s
                ),
                allow_redirects=False,
            ) as reply:
                return reply.status, await reply.read(), reply.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return Refusal(0, named(e))
        finally:
            if hold_s == 0.0:
                self._fleet.ahead.answered(time.monotonic() - begun)

    async def _send(self, call: Call, step: Send) -> Reply | Setback:
        lease, timeouts = step.lease, call.timeouts
        stage = _Stage()
        token = _STAGE.set(stage)
        session = self._again if step.again else self._model
        body: Any = call.body or None
        if body is not None and len(body) > 2**20:
            body = io.BytesIO(body)  # goes in pieces
        try:
            source = await session.request(
                call.method,
                URL(lease.address + call.target, encoded=True),
                data=body,
                headers=_texts(forwarded(call.headers, lease.token)),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._fleet.connect_s(timeouts), sock_read=timeouts.read
                ),
                ssl=context_for(lease.address, lease.certificate) or True,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return _setback(lease, stage, e)
        except BaseException:
            if not stage.connected:
                self._tell(lease, "unused", "")
            raise
        finally:
            _STAGE.reset(token)
        reason = (source.reason or "").encode("latin-1", "replace")
        if source.status not in ELSEWHERE:
            return Reply(source.status, reason, returned(source.raw_headers), source, lease=lease)
        kept = kept_reply(source.status, reason, source.raw_headers, await _read_some(source))
        kept.lease = lease
        return kept

    # -- leases ahead, and their ends

    def _refill(self) -> None:
        """Give back what is old and ask for what is missing; again when it is time to."""
        ahead, now = self._fleet.ahead, time.monotonic()
        loop = self._loop
        if loop is None or self._closed or not ahead.most:
            return
        for lease in ahead.sweep(now):
            self._tell(lease, "unused", "")
        while wanted := ahead.want(now):
            task = loop.create_task(self._fetch(wanted))
            self._fetchers.add(task)
            task.add_done_callback(self._fetchers.discard)
        if self._look is not None:
            self._look.cancel()
            self._look = None
        look_in_s = ahead.look_in_s(now)
        if look_in_s is not None:
            self._look = loop.call_later(look_in_s, self._refill)

    async def _fetch(self, wanted: int) -> None:
        ahead = self._fleet.ahead
        said: list[Lease] | Refusal = Refusal(0, "cancelled")
        try:
            body = route_body(ahead.typical, 0.0, count=wanted, priority=self._fleet.rules.priority)
            got = await self._post_route(body, 0.0, ROUTE_SLACK_S)
            said = got if isinstance(got, Refusal) else read_batch(*got, time.monotonic())
        finally:
            now = time.monotonic()
            if isinstance(said, Refusal):
                ahead.refused(wanted, said.retry_after_s, now)
            else:
                for lease in ahead.arrived(said, wanted, now):
                    self._tell(lease, "unused", "")
        self._refill()

    def _tell(self, lease: Lease, outcome: str, why: str) -> None:
        if len(self._ends) >= ENDS_KEPT or self._loop is None or self._route.closed:
            self.untold += 1
        else:
            self._ends.append((lease, outcome, why))
            if len(self._tellers) < ENDS_AT_ONCE:
                task = self._loop.create_task(self._tell_all())
                self._tellers.add(task)
                task.add_done_callback(self._tellers.discard)
        if outcome == "failed":
            for other in self._fleet.ahead.leave(lease.instance_id):
                self._tell(other, "unused", "")

    async def _tell_all(self) -> None:
        while self._ends:
            lease, outcome, why = self._ends.popleft()
            status = 0
            try:
                async with self._route.post(
                    f"{self._fleet.url}/done",
                    data=json.dumps(done_body(lease, outcome, why)),
                    headers=self._fleet.headers,
                    timeout=aiohttp.ClientTimeout(total=DONE_S),
                    allow_redirects=False,
                ) as reply:
                    await reply.read()
                    status = reply.status
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            finally:
                self.untold += status != 200


def _texts(headers: Iterable[Header]) -> CIMultiDict[str]:
    """As aiohttp wants them, which sends texts as UTF-8."""
    out: CIMultiDict[str] = CIMultiDict()
    for name, value in headers:
        try:
            out.add(name.decode("ascii"), value.decode())
        except UnicodeDecodeError:
            out.add(name.decode("latin-1"), value.decode("latin-1"))
    return out


def _setback(lease: Lease, stage: _Stage, error: BaseException) -> Setback:
    if not stage.connected:
        return not_connected(lease, error)
    if isinstance(error, TimeoutError):
        return Setback("read_timeout", httpx2.ReadTimeout(f"{lease}: no answer in time"), elsewhere=False)
    said = f"{lease}: the connection broke before an answer came: {type(error).__name__}"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ClientPayloadError):
        return Setback("bad_answer", httpx2.RemoteProtocolError(said), elsewhere=False)
    return Setback("broke_off", httpx2.ReadError(said), elsewhere=False, again=not stage.fresh)


async def _read_some(source: aiohttp.ClientResponse) -> bytes:
    """The body of an answer that is not wanted, as far as it comes soon and is not long."""
    raw = b""
    try:
        async with asyncio.timeout(CLOSE_S):
            async for part in source.content.iter_any():
                raw += part
                if len(raw) > KEPT_ANSWER:
                    _abort(source)
                    return raw[:KEPT_ANSWER]
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    except BaseException:
        _abort(source)
        raise
    source.close()
    return raw
