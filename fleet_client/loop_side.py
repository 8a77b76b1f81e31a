"""What an `AsyncFleetTransport` has open in one event loop: sessions, and jobs for the loadbalancer."""

import asyncio
import contextlib
import json
import socket
import time
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import aiohttp

from fleet_client.async_connections import await_end, disown, new_session, read_whole
from fleet_client.connection_pool import LOOK_S, SILENT_S
from fleet_client.lease_keeper import DONE_S, LoadbalancerJob
from fleet_client.leases import Posted, Refusal, read_well
from fleet_client.retry import NOT_THERE
from fleet_client.trace_context import TRACEPARENT
from fleet_client.transport import (
    CLOSE_S,
    MAX_LEASES,
    MODEL_KEEP_ALIVE_S,
    ROUTE_KEEP_ALIVE_S,
    TransportCore,
    named,
)

HEALTH_S = 2.0
"""Seconds that the loadbalancer has to say how it is, and what model it serves."""

MOST_ASKED = 256
"""Instances that the loadbalancer can be asked about at once."""

ENDS_AT_ONCE = 8
"""Ends of leases that are told at the same time."""

_INHERITED: list[tuple["LoopSide", socket.socket]] = []
"""Those of the process that this one is a fork of, kept: garbage that is collected says goodbye under TLS."""


class Waiting(Protocol):
    """The protocol of a request that waits for something from an instance."""

    instance_id: int

    def silent_s(self, now: float) -> float:
        """Return how many seconds nothing has come, while it was waited for."""

    def break_off(self, why: str) -> None:
        """Stop waiting, because the instance is out. why: the loadbalancer's word for that."""


class LoopSide:
    """The sessions and jobs of an AsyncFleetTransport in one event loop.

    It ends when it was told to and no request runs, or when its event loop cancels all tasks.
    """

    def __init__(self, core: TransportCore) -> None:
        """Open HTTP sessions in the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.over = False  # no more requests
        self.model = new_session(MODEL_KEEP_ALIVE_S)
        self.again = new_session(None)
        self._route = new_session(ROUTE_KEEP_ALIVE_S)
        self._core = core
        self._running = 0  # requests whose answers have not ended
        self._ends: set[asyncio.Task[Posted | Refusal]] = set()
        self._batches: set[asyncio.Task[Posted | Refusal]] = set()
        self._lingering: set[asyncio.Task[None]] = set()
        self._waiting: weakref.WeakSet[Waiting] = weakref.WeakSet()  # an answer may be forgotten
        self._watcher: asyncio.Task[None] | None = None
        self._look: asyncio.TimerHandle | None = None
        self._closer = self.loop.create_task(self._close_when_cancelled())

    # -- requests

    def begin(self) -> None:
        """Count a request that begins."""
        self._running += 1

    def end(self, waiting: Waiting | None = None) -> None:
        """Count the end of a request's answer; after `close`, the last one closes the sessions."""
        if waiting is not None:
            self._waiting.discard(waiting)
        self._running -= 1
        if self.over and not self._running:
            self._closer.cancel()

    def linger(self, source: aiohttp.ClientResponse) -> None:
        """Wait a moment for the end of an answer whose last event was read, in a task."""
        task = self.loop.create_task(await_end(source))
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    # -- instances that fall silent

    def watch(self, waiting: Waiting) -> None:
        """Ask the loadbalancer about a request's instance while nothing comes; break off when that is out."""
        self._waiting.add(waiting)
        if self._watcher is None or self._watcher.done():
            self._watcher = self.loop.create_task(self._watch())

    def unwatch(self, waiting: Waiting) -> None:
        """Stop asking the loadbalancer about a request's instance, because nothing more is waited for."""
        self._waiting.discard(waiting)

    async def _watch(self) -> None:
        while self._waiting:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            silent = [one for one in list(self._waiting) if one.silent_s(now) >= SILENT_S]
            asked = sorted({one.instance_id for one in silent})
            out: dict[int, str] = {}
            for begin in range(0, len(asked), MOST_ASKED):
                body = {"instances": asked[begin : begin + MOST_ASKED]}
                out |= read_well(await self.post("/well", body, DONE_S))
            for one in silent:
                if one.instance_id in out and one in self._waiting:
                    one.break_off(out[one.instance_id])

    # -- the loadbalancer

    async def post(
        self, path: str, body: Mapping[str, Any], limit_s: float, traceparent: str | None = None
    ) -> Posted | Refusal:
        """Ask the loadbalancer; return its answer, or a Refusal with status 0 when there is none."""
        options = self._core.options
        try:
            async with self._route.post(
                options.url + path,
                data=json.dumps(body),
                headers=self._core.headers | ({TRACEPARENT: traceparent} if traceparent else {}),
                timeout=aiohttp.ClientTimeout(total=limit_s, sock_connect=options.connect_s),
                ssl=self._core.trusted.context() or True,
                allow_redirects=False,
            ) as reply:
                return reply.status, await read_whole(reply, MAX_LEASES), reply.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return Refusal(0, named(e))

    async def why_unwell(self) -> str | None:
        """Return why the loadbalancer cannot serve, by its GET /health; None when it can."""
        status, said = await self.look("/health")
        return None if status == 200 else said

    async def look(self, path: str) -> tuple[int, str]:
        """GET a path of the loadbalancer; return (status, text), the text being why where it is not 200."""
        options, timeout = self._core.options, aiohttp.ClientTimeout(total=HEALTH_S)
        where = f"loadbalancer {options.url}"
        try:
            async with self._route.get(
                options.url + path,
                headers=self._core.headers,
                timeout=timeout,
                ssl=self._core.trusted.context() or True,
                allow_redirects=False,
            ) as reply:
                said = (await reply.content.read(1000)).decode(errors="replace")
                if reply.status == 200:
                    return 200, said
                return reply.status, f"{where}: status {reply.status}: {said[:300]}"
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            return 0, f"{where} does not answer ({named(e)}): {NOT_THERE}"

    def start_jobs(self) -> None:
        """Begin the leases' jobs that are due, and call this again when others may be."""
        leases, now = self._core.leases, time.monotonic()
        while (job := leases.next_job(now, ends=len(self._ends) < ENDS_AT_ONCE)) is not None:
            tasks = self._batches if job.wanted else self._ends
            task = self.loop.create_task(self.post(job.path, job.body, job.limit_s))
            tasks.add(task)
            task.add_done_callback(partial(self._job_done, job, tasks))
        if self._look is not None:
            self._look.cancel()
            self._look = None
        look_in_s = leases.look_in_s(now)
        if look_in_s is not None:
            self._look = self.loop.call_later(look_in_s, self.start_jobs)

    def _job_done(
        self,
        job: LoadbalancerJob,
        tasks: set[asyncio.Task[Posted | Refusal]],
        task: asyncio.Task[Posted | Refusal],
    ) -> None:
        tasks.discard(task)
        came = Refusal(0, "cancelled") if task.cancelled() else task.result()
        self._core.leases.finish_job(job, came, time.monotonic())

    # -- the end

    async def close(self) -> None:
        """Give leases back and tell how others ended; close the sessions, after the answers that run."""
        self.over = True
        if self._running:
            await self._settle()
        else:
            self._closer.cancel()
            await asyncio.gather(self._closer, return_exceptions=True)

    async def _close_when_cancelled(self) -> None:
        """Wait to be cancelled (by `close`, `end`, or asyncio.run at a program's end), then close all."""
        try:
            await self.loop.create_future()
        except asyncio.CancelledError:  # not GeneratorExit: a loop that was thrown away runs nothing more
            self.over = True
            await self._settle()
            self._core.leases.abandon()
            await _cancel(self._lingering | self._ends | ({self._watcher} if self._watcher else set()))
            for session in (self.model, self.again, self._route):
                await session.close()
            raise

    async def _settle(self) -> None:
        self._core.leases.give_all_back()
        await _cancel(self._batches)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._ends:
                    await asyncio.wait(self._ends)
        if self._look is not None:
            self._look.cancel()

    def disown(self) -> None:
        """Leave all sessions to the parent of this process, which is a fork."""
        nowhere, other_end = socket.socketpair()  # what is written there stays there
        for session in (self.model, self.again, self._route):
            disown(session, nowhere)
        nowhere.close()
        _INHERITED.append((self, other_end))


async def _cancel(tasks: set[Any]) -> None:
    gone = list(tasks)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
