"""The fleet as a transport for httpx2.AsyncClient; what can wait is done in tasks of its own."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import aiohttp
import httpx2
from yarl import URL

from fleet_client.async_connections import (
    abort,
    await_end,
    header_texts,
    new_session,
    read_some,
    read_whole,
    staged,
)
from fleet_client.call import NO_TIMEOUTS, Call, Timeouts, forwarded, returned
from fleet_client.connection_pool import Header
from fleet_client.lease_keeper import LoadbalancerJob
from fleet_client.leases import ClientLease, Posted, Refusal, read_route
from fleet_client.options import LOADBALANCER, FleetOptions, OptionFields
from fleet_client.reply import HttpReply, kept_reply
from fleet_client.retry import ELSEWHERE, AcquireLease, Came, Send, Setback, Step, is_last
from fleet_client.tls_pins import context_for
from fleet_client.transport import (
    CLOSE_S,
    MAX_LEASES,
    MODEL_KEEP_ALIVE_S,
    ROUTE_KEEP_ALIVE_S,
    BodyBuffer,
    TransportCore,
    cut_off,
    named,
    not_answered,
    not_connected,
    require_httpx2,
    response_of,
)

HEALTH_S = 2.0
"""Seconds that the loadbalancer has to say how it is."""

ENDS_AT_ONCE = 8
"""Ends of leases that are told at the same time."""


class AsyncAnswer(httpx2.AsyncByteStream):
    """An answer of an instance: status and headers are here, its bytes come as they come.

    It must be read to its end or closed; closing it early ends the connection to the instance at once.
    """

    def __init__(
        self,
        call: Call,
        reply: HttpReply,
        tell: Callable[[ClientLease, str, str], None],
        linger: Callable[[aiohttp.ClientResponse], None],
    ) -> None:
        """Made by `AsyncFleetTransport.exchange`. tell: takes note of how a lease ended.

        linger: waits a moment for the end of the answer.
        """
        self.call = call
        self.status = reply.status
        self.headers = reply.headers
        self.lease = reply.lease
        self._body = reply.body
        self._source: aiohttp.ClientResponse | None = reply.source
        self._tell = tell
        self._linger = linger
        self._chunk = b""
        self._over = reply.source is None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield its bytes, not decoded, in the pieces they come in; raises httpx2's errors."""
        if self._source is None:
            body, self._body = self._body, None
            if body:
                yield body
            return
        read = self._source.content.readany
        while True:
            try:
                chunk = await read()
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                why, error = cut_off(self.lease, e)
                break
            if not chunk:
                self._over = True
                self._source.release()
                return
            self._chunk = chunk
            yield chunk
        if not self._over:  # it was not closed here
            self.fail(why)
        raise error

    def fail(self, why: str) -> None:
        """Read no more, because what came is wrong; the loadbalancer is told that word."""
        self._over = True
        if self._source is not None:
            abort(self._source)
        if self.lease is not None:
            self.call.note_setback(self.lease, why)
            self._tell(self.lease, "failed", why)

    async def aclose(self) -> None:
        """Be done with it; the instance learns at once when it was not read to its end."""
        if self._over or self._source is None:
            return
        self._over = True
        if self._source.content.is_eof():
            self._source.release()
        elif is_last(self._chunk):
            self._linger(self._source)
        else:
            abort(self._source)


class AsyncFleetTransport(httpx2.AsyncBaseTransport):
    """For `httpx2.AsyncClient(transport=...)`, and so for `openai.AsyncOpenAI(http_client=...)`.

    It belongs to the event loop of its first request. Close it (`aclose`, or the client's) when done: leases
    that were fetched ahead go back then. asyncio.run does it for a program that forgets.
    """

    def __init__(self, loadbalancer: str = LOADBALANCER, **options: Unpack[OptionFields]) -> None:
        """Open nothing before the first request; `FleetOptions` explains the options.

        Raises ValueError for what cannot be.
        """
        self._core = TransportCore(
            FleetOptions(loadbalancer, **options), contextlib.nullcontext(), self._start_jobs
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._ends: set[asyncio.Task[Posted | Refusal]] = set()
        self._batches: set[asyncio.Task[Posted | Refusal]] = set()
        self._lingering: set[asyncio.Task[None]] = set()
        self._look: asyncio.TimerHandle | None = None
        self._closer: asyncio.Task[None] | None = None
        self._route: aiohttp.ClientSession
        self._model: aiohttp.ClientSession
        self._again: aiohttp.ClientSession

    def __repr__(self) -> str:
        """Describe it without keys."""
        return self._core.described("AsyncFleetTransport", closed=self._closed)

    @property
    def leases_ahead(self) -> int:
        """Leases at hand that were fetched before they are needed."""
        return self._core.leases.at_hand

    @property
    def untold(self) -> int:
        """Ends of leases that the loadbalancer did not take in."""
        return self._core.leases.untold

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Serve one request: what httpx2 calls; TypeError under the client of another package."""
        require_httpx2(request, "httpx2.AsyncClient")
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = await _buffered(request)
        call = self._core.call_of(request, body)
        if isinstance(call, HttpReply):
            return response_of(call, call)
        reply = await self._serve(call)
        return response_of(call, reply, self._answer(call, reply))

    def call(
        self,
        method: str,
        target: str,
        headers: Sequence[Header],
        body: bytes,
        timeouts: Timeouts = NO_TIMEOUTS,
    ) -> Call | HttpReply:
        """Return a request for `exchange`, with size, hashes and priority; or what is wrong with it.

        Raises httpx2.LocalProtocolError for one that HTTP cannot carry.
        """
        return self._core.call(method, target, headers, body, timeouts)

    async def exchange(self, call: Call) -> AsyncAnswer:
        """Return the answer from its first byte on, without httpx2's objects; raises httpx2's errors."""
        return self._answer(call, await self._serve(call))

    async def aclose(self) -> None:
        """Give back what is left, tell what is to be told (2 s at most), close every connection."""
        if self._closed:
            return
        self._closed = True
        if self._closer is not None:
            self._closer.cancel()
            await asyncio.gather(self._closer, return_exceptions=True)

    # -- life cycle

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("this AsyncFleetTransport is closed")
        if self._loop is None:
            self._loop = loop
            self._route = new_session(ROUTE_KEEP_ALIVE_S)
            self._model = new_session(MODEL_KEEP_ALIVE_S)
            self._again = new_session(None)
            self._closer = loop.create_task(self._close_when_cancelled())
        elif self._loop is not loop:
            raise RuntimeError(
                "this AsyncFleetTransport belongs to another event loop: make one (and its client) in each "
                "loop, or in each call of asyncio.run"
            )

    async def _close_when_cancelled(self) -> None:
        """Close everything when cancelled: by `aclose`, or by asyncio.run at the end of a program."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._closed = True
            await self._finish()

    async def _finish(self) -> None:
        leases = self._core.leases
        leases.give_all_back()
        await _cancel(self._batches | self._lingering)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._ends:
                    await asyncio.wait(self._ends)
        leases.abandon()
        if self._look is not None:
            self._look.cancel()
        await _cancel(self._ends)
        for session in (self._model, self._again, self._route):
            await session.close()

    # -- one request

    async def _serve(self, call: Call) -> HttpReply:
        self._open()
        steps = self._core.attempt(call, time.monotonic())
        try:
            step = next(steps)
            while True:
                step = steps.send((await self._perform(call, step), time.monotonic()))
        except StopIteration as end:
            reply: HttpReply = end.value
            return reply

    async def _perform(self, call: Call, step: Step) -> Came:
        if isinstance(step, Send):
            return await self._send(call, step)
        if isinstance(step, AcquireLease):
            got = await self._post("/route", step.body, step.hold_s + step.slack_s)
            return got if isinstance(got, Refusal) else read_route(*got, time.monotonic())
        await asyncio.sleep(step.seconds)
        return None

    async def _send(self, call: Call, step: Send) -> HttpReply | Setback:
        lease, timeouts = step.lease, call.timeouts
        session = self._again if step.again else self._model
        body: Any = call.body or None
        if body is not None and len(body) > 2**20:
            body = io.BytesIO(body)  # goes in pieces
        with staged() as stage:
            try:
                async with asyncio.timeout(self._core.head_s(timeouts)):
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
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                if not stage.connected:
                    return not_connected(lease, e)
                bad = isinstance(e, aiohttp.ClientResponseError | aiohttp.ClientPayloadError)
                return not_answered(lease, e, bad_http=bad, again=not stage.fresh)
            except BaseException:
                if not stage.connected:
                    self._core.leases.tell(lease, "unused")
                raise
        if source.status not in ELSEWHERE:
            headers = returned(source.raw_headers, lease.address)
            return HttpReply(source.status, headers, source, lease=lease)
        return kept_reply(source.status, source.raw_headers, await read_some(source), lease)

    def _answer(self, call: Call, reply: HttpReply) -> AsyncAnswer:
        return AsyncAnswer(call, reply, self._core.leases.tell, self._linger)

    def _linger(self, source: aiohttp.ClientResponse) -> None:
        assert self._loop is not None  # noqa: S101 there was a request
        task = self._loop.create_task(await_end(source))
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    # -- the loadbalancer

    async def _post(self, path: str, body: Mapping[str, Any], limit_s: float) -> Posted | Refusal:
        """Ask the loadbalancer; a Refusal with status 0 says why there is no answer."""
        options = self._core.options
        try:
            async with self._route.post(
                options.url + path,
                data=json.dumps(body),
                headers=self._core.headers,
                timeout=aiohttp.ClientTimeout(total=limit_s, sock_connect=options.connect_s),
                ssl=self._core.trusted.context() or True,
                allow_redirects=False,
            ) as reply:
                return reply.status, await read_whole(reply, MAX_LEASES), reply.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return Refusal(0, named(e))

    async def why_unwell(self) -> str | None:
        """Return why the loadbalancer cannot serve, by its GET /health; None when it can."""
        self._open()
        options, timeout = self._core.options, aiohttp.ClientTimeout(total=HEALTH_S)
        where = f"loadbalancer {options.url}"
        try:
            async with self._route.get(
                options.url + "/health",
                timeout=timeout,
                ssl=self._core.trusted.context() or True,
                allow_redirects=False,
            ) as reply:
                said = (await reply.content.read(1000)).decode(errors="replace")
                return None if reply.status == 200 else f"{where}: status {reply.status}: {said[:300]}"
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return f"{where} does not answer: {named(e)}"

    def _start_jobs(self) -> None:
        """Do the jobs that are due; look again when it is time to."""
        loop = self._loop
        if loop is None:
            return
        leases, now = self._core.leases, time.monotonic()
        while (job := leases.next_job(now, ends=len(self._ends) < ENDS_AT_ONCE)) is not None:
            tasks = self._batches if job.wanted else self._ends
            task = loop.create_task(self._post(job.path, job.body, job.limit_s))
            tasks.add(task)
            task.add_done_callback(partial(self._job_done, job, tasks))
        if self._look is not None:
            self._look.cancel()
            self._look = None
        look_in_s = leases.look_in_s(now)
        if look_in_s is not None:
            self._look = loop.call_later(look_in_s, self._start_jobs)

    def _job_done(
        self,
        job: LoadbalancerJob,
        tasks: set[asyncio.Task[Posted | Refusal]],
        task: asyncio.Task[Posted | Refusal],
    ) -> None:
        tasks.discard(task)
        came = Refusal(0, "cancelled") if task.cancelled() else task.result()
        self._core.leases.finish_job(job, came, time.monotonic())


async def _cancel(tasks: set[Any]) -> None:
    gone = list(tasks)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)


async def _buffered(request: httpx2.Request) -> bytes | None:
    body = BodyBuffer()
    stream = request.stream
    assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 httpx2 sees to it
    async for part in stream:
        if not body.add(part):
            break
    return body.joined()
