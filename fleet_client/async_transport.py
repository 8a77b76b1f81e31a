"""The fleet as a transport for httpx2.AsyncClient; what can wait is done in tasks beside the requests."""

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Unpack

import aiohttp
import httpx2
from yarl import URL

from fleet_client.answer_pace import AnswerPace
from fleet_client.async_connections import (
    abort,
    header_texts,
    read_some,
    staged,
)
from fleet_client.call import NO_TIMEOUTS, Call, Timeouts, forwarded, returned
from fleet_client.connection_pool import Header
from fleet_client.forks import start_anew_in_forks
from fleet_client.leases import ClientLease, Refusal, read_route
from fleet_client.loop_side import LoopSide
from fleet_client.options import LOADBALANCER, FleetOptions, OptionFields
from fleet_client.reply import HttpReply, kept_reply
from fleet_client.retry import ELSEWHERE, AcquireLease, Came, Send, Setback, Step, is_last
from fleet_client.tls_pins import context_for
from fleet_client.transport import (
    BodyBuffer,
    InstanceOut,
    TransportCore,
    cut_off,
    late,
    not_answered,
    not_connected,
    require_httpx2,
    response_of,
)


class AsyncAnswer(httpx2.AsyncByteStream):
    """The answer of an instance: status and headers are here, its bytes come while they are read.

    It must be read to its end or closed; closing it early ends the connection to the instance at once.
    """

    def __init__(
        self,
        call: Call,
        reply: HttpReply,
        tell: Callable[[ClientLease, str, str], None],
        linger: Callable[[aiohttp.ClientResponse], None],
        end: Callable[["AsyncAnswer"], None] = lambda _: None,
        note_pace: Callable[[ClientLease, AnswerPace, float], None] = lambda *_: None,
    ) -> None:
        """Wrap what came for a call; `AsyncFleetTransport.exchange` does this.

        tell: takes note of how a lease ended. linger: waits a moment for the end of the answer. end: called
        when nothing more is read of the answer. note_pace: takes note of how fast it came.
        """
        self.call = call
        self.status = reply.status
        self.headers = reply.headers
        self.lease = reply.lease
        self._body = reply.body
        self._first = reply.first
        self._source: aiohttp.ClientResponse | None = reply.source
        self._tell = tell
        self._linger = linger
        self._end = end
        self._note_pace = note_pace
        self._pace = AnswerPace(reply.head_s)
        self._seen: bytes | None = None  # the last chunk when it was last asked for its silence
        self._since = 0.0
        self._out: InstanceOut | None = None
        self.instance_id = -1 if reply.lease is None else reply.lease.instance_id
        self._chunk = b""
        self._over = reply.source is None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the answer's bytes, not decoded, in the pieces they come in; raise httpx2's errors."""
        if self._source is None:
            body, self._body = self._body, None
            if body:
                yield body
            return
        if self._first:
            self._chunk, self._first = self._first, b""
            self._pace.came(self._chunk, 0.0)
            yield self._chunk
        read, pace, clock = self._source.content.readany, self._pace, time.monotonic
        while True:
            try:
                pace.ask(clock())
                chunk = await read()
                pace.came(chunk, clock())
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                why, error = cut_off(self.lease, self._out or e)
                break
            if not chunk:
                self._ended()
                self._source.release()
                return
            self._chunk = chunk
            yield chunk
        if not self._over:  # it was not closed here
            self.fail(why)
        raise error

    def fail(self, why: str) -> None:
        """Stop reading, because what came is wrong; `why` is the word that the loadbalancer is told."""
        self._ended()
        if self._source is not None:
            abort(self._source)
        if self.lease is not None:
            self.call.note_setback(self.lease, why)
            self._tell(self.lease, "failed", why)

    def silent_s(self, now: float) -> float:
        """Return how many seconds ago a call of this first saw the last piece of the answer that came."""
        if self._chunk is not self._seen:
            self._seen, self._since = self._chunk, now
        return now - self._since

    def break_off(self, why: str) -> None:
        """Let reading fail because the instance is out, unless the whole answer is here. why: one word."""
        if self._source is not None and not self._source.content.is_eof():
            self._out = InstanceOut(why)
            abort(self._source)

    async def aclose(self) -> None:
        """Close the answer; if it was not read to its end, the instance notices at once."""
        if self._over or self._source is None:
            return
        self._ended()
        if self._source.content.is_eof():
            self._source.release()
        elif is_last(self._chunk):
            self._linger(self._source)
        else:
            abort(self._source)

    def _ended(self) -> None:
        if not self._over:
            self._over = True
            if self.lease is not None and self.status == 200:
                now = time.monotonic()
                if self._pace.end(now):
                    self._note_pace(self.lease, self._pace, now)
            self._end(self)


class _Head:
    """An answer whose head is waited for, to be broken off when its instance is out."""

    def __init__(self, lease: ClientLease, limit: asyncio.Timeout) -> None:
        self.instance_id = lease.instance_id
        self.out: InstanceOut | None = None
        self._begun = time.monotonic()
        self._limit = limit

    def silent_s(self, now: float) -> float:
        """Return for how many seconds the head has been waited for."""
        return now - self._begun

    def break_off(self, why: str) -> None:
        """Let the waiting for the head time out."""
        self.out = InstanceOut(why)
        self._limit.reschedule(asyncio.get_running_loop().time())


class AsyncFleetTransport(httpx2.AsyncBaseTransport):
    """A transport for `httpx2.AsyncClient(transport=...)`, and so for `openai.AsyncOpenAI(http_client=...)`.

    It belongs to the event loop of its first request as long as that runs, then to the next, and begins anew
    in a fork of the process. Close it (`aclose`, or the client's) when done: leases that were fetched ahead
    go back then, and answers that are being read go on to their end. asyncio.run does it for a program that
    forgets.
    """

    def __init__(self, loadbalancer: str = LOADBALANCER, **options: Unpack[OptionFields]) -> None:
        """Open nothing before the first request; `FleetOptions` explains the options.

        Raises ValueError for options that are out of range.
        """
        self._core = TransportCore(
            FleetOptions(loadbalancer, **options), contextlib.nullcontext(), self._start_jobs
        )
        self._side: LoopSide | None = None
        self._closed = False
        start_anew_in_forks(self)

    def __repr__(self) -> str:
        """Describe the transport, without keys."""
        return self._core.described("AsyncFleetTransport", closed=self._closed)

    @property
    def leases_ahead(self) -> int:
        """How many leases are at hand that were fetched before they are needed."""
        return self._core.leases.at_hand

    @property
    def untold(self) -> int:
        """How many ends of leases the loadbalancer could not be told."""
        return self._core.leases.untold

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request of an httpx2 client; raise TypeError for the request of another package."""
        require_httpx2(request, "httpx2.AsyncClient")
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = await _buffered(request)
        call = self._core.call_of(request, body)
        if isinstance(call, HttpReply):
            return response_of(call, call)
        answer, reply = await self._answer(call)
        return response_of(call, reply, answer)

    def call(
        self,
        method: str,
        target: str,
        headers: Sequence[Header],
        body: bytes,
        timeouts: Timeouts = NO_TIMEOUTS,
    ) -> Call | HttpReply:
        """Return a request for `exchange`, with its size, hashes and priority; or the answer that refuses it.

        Raises httpx2.LocalProtocolError for one that HTTP cannot carry.
        """
        return self._core.call(method, target, headers, body, timeouts)

    async def exchange(self, call: Call) -> AsyncAnswer:
        """Return the answer to a call from its first byte on, without httpx2's objects; raise its errors."""
        return (await self._answer(call))[0]

    async def why_unwell(self) -> str | None:
        """Return why the loadbalancer cannot serve, by its GET /health; None when it can."""
        return await self._opened().why_unwell()

    async def look(self, path: str) -> tuple[int, str]:
        """GET a path of the loadbalancer; return (status, text); without an answer (0, why there is none)."""
        return await self._opened().look(path)

    async def aclose(self) -> None:
        """Close the transport: give leases back, tell of ended ones (2 s at most), close idle connections."""
        if self._closed:
            return
        self._closed = True
        if self._side is not None and not self._side.over and not self._side.loop.is_closed():
            await self._side.close()

    def start_anew(self) -> None:
        """Share nothing with the process that this one is a fork of."""
        side, self._side = self._side, None
        self._core.start_anew(contextlib.nullcontext())
        if side is not None:
            side.disown()

    # -- life cycle

    def _opened(self) -> LoopSide:
        """Return what is open in the running event loop; open it first, also when another loop has ended."""
        loop, side = asyncio.get_running_loop(), self._side
        if side is not None and side.loop is loop and not side.over:
            return side
        if self._closed or (side is not None and side.loop is loop):
            raise RuntimeError("this AsyncFleetTransport is closed")
        if side is not None:
            if not side.over and not side.loop.is_closed():
                raise RuntimeError(
                    "this AsyncFleetTransport belongs to another event loop that has not ended: "
                    "make one, and its client, in each loop"
                )
            self._core.start_anew(contextlib.nullcontext())
        self._side = side = LoopSide(self._core)
        return side

    def _start_jobs(self) -> None:
        if self._side is not None:
            self._side.start_jobs()

    # -- one request

    async def _answer(self, call: Call) -> tuple[AsyncAnswer, HttpReply]:
        side = self._opened()
        side.begin()
        try:
            reply = await self._serve(side, call)
        except BaseException:
            side.end()
            raise
        if reply.source is None:
            side.end()
        leases = self._core.leases
        answer = AsyncAnswer(call, reply, leases.tell, side.linger, side.end, leases.note_pace)
        if reply.source is not None:
            side.watch(answer)
        return answer, reply

    async def _serve(self, side: LoopSide, call: Call) -> HttpReply:
        steps = self._core.attempt(call, time.monotonic())
        try:
            step = next(steps)
            while True:
                step = steps.send((await self._perform(side, call, step), time.monotonic()))
        except StopIteration as end:
            reply: HttpReply = end.value
            return reply

    async def _perform(self, side: LoopSide, call: Call, step: Step) -> Came:
        if isinstance(step, Send):
            return await self._send(side, call, step)
        if isinstance(step, AcquireLease):
            got = await side.post("/route", step.body, step.hold_s + step.slack_s, call.traceparent)
            return got if isinstance(got, Refusal) else read_route(*got, time.monotonic())
        await asyncio.sleep(step.seconds)
        return None

    async def _send(self, side: LoopSide, call: Call, step: Send) -> HttpReply | Setback:
        lease, timeouts = step.lease, call.timeouts
        session = side.again if step.again else side.model
        body: Any = call.body or None
        if body is not None and len(body) > 2**20:
            body = io.BytesIO(body)  # goes in pieces
        limit_s = step.sooner_than(timeouts.read)
        limit = asyncio.timeout(self._core.head_s(timeouts) if limit_s is None else limit_s)
        head = _Head(lease, limit)
        source: aiohttp.ClientResponse | None = None
        first = b""
        with staged() as stage:
            try:
                side.watch(head)
                async with limit:
                    source = await session.request(
                        call.method,
                        URL(lease.address + call.target, encoded=True),
                        data=body,
                        headers=header_texts(forwarded(call.headers, lease.token)),
                        timeout=aiohttp.ClientTimeout(
                            total=None, sock_connect=self._core.connect_s(timeouts), sock_read=timeouts.read
                        ),
                        ssl=context_for(lease.address, lease.certificate) or True,
                        allow_redirects=False,
                    )
                    if limit_s is not None and call.streamed and source.status == 200:
                        first = await source.content.readany()
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                if source is not None:
                    abort(source)
                if head.out is not None:
                    return not_answered(lease, head.out, bad_http=False, again=False)
                if not stage.connected:
                    return not_connected(lease, e)
                if limit_s is not None and limit.expired():
                    return late(lease, limit_s)
                if source is not None:  # the program has seen nothing yet, not even the head
                    return not_answered(lease, e, bad_http=False, again=False)
                bad = isinstance(e, aiohttp.ClientResponseError | aiohttp.ClientPayloadError)
                return not_answered(lease, e, bad_http=bad, again=not stage.fresh)
            except BaseException:
                if source is not None:
                    abort(source)
                if not stage.connected:
                    self._core.leases.tell(lease, "unused")
                raise
            finally:
                side.unwatch(head)
        if source.status not in ELSEWHERE:
            headers = returned(source.raw_headers, lease.address)
            took_s = head.silent_s(time.monotonic())
            return HttpReply(source.status, headers, source, lease=lease, first=first, head_s=took_s)
        return kept_reply(source.status, source.raw_headers, await read_some(source), lease)


async def _buffered(request: httpx2.Request) -> bytes | None:
    body = BodyBuffer()
    stream = request.stream
    assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 httpx2 sees to it
    async for part in stream:
        if not body.add(part):
            break
    return body.joined()
