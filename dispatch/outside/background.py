"""The loadbalancer's background tasks: what it asks of the instances and tells the autoscaler."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import msgspec

from dispatch.load_reports import Poll
from dispatch.outside.service import LoadBalancerService
from dispatch.token_refills import Refill
from fleet_client.own_tls import ANY_AUTHORITY, TrustedServer
from instance_client import InstanceClient
from process.errors import InstanceError
from web.messages.busy import LOADBALANCER, BusyAnswer
from web.messages.decoding import BadField, decode
from web.messages.hot_set import HotInstance
from web.slices import in_slices

log = logging.getLogger("loadbalancer")


CLOCKWORK_S = 0.02
"""Seconds that capacity which appears with time alone, or a low stock of tokens, may go unnoticed."""

QUIET_S = 0.2
"""The same while no request comes, waits or fails: then only reports become due, each once a second. 50 looks
a second took 1.2 % of an idle core, because each finds cold caches (2026-11)."""

INSTANCE_TIMEOUT_S = 5.0
"""Seconds for a token batch or a load report: an instance that takes longer is as good as gone."""

AUTOSCALER_TIMEOUT_S = 3.0
"""Seconds for the hot set and the busy report."""

REPORT_S = 1.0
"""Seconds from one busy report to the next."""


class BackgroundTasks:
    """The loadbalancer's exchange with instances and autoscaler; its public methods are coroutines to run."""

    def __init__(
        self,
        service: LoadBalancerService,
        autoscaler: str,
        control_key: str,
        report_to: Callable[[str], str | None] = lambda _: None,
        trusted: TrustedServer = ANY_AUTHORITY,
    ) -> None:
        """Prepare the background tasks of a loadbalancer, without starting one.

        autoscaler: its URL. control_key: what the autoscaler knows this loadbalancer by. report_to: the URL
        to which the instance with that auth_server is to send its reports, or None. trusted: the certificates
        that the autoscaler may show.
        """
        self._trusted = trusted
        self._service = service
        self._report_to = report_to
        self._autoscaler = autoscaler.rstrip("/")
        self._headers = {"Authorization": f"Bearer {control_key}", LOADBALANCER: service.name}
        self._complaint: str | None = None
        self._odd: str | None = None
        self._not_answering: set[int] = set()
        self._asking: set[asyncio.Task[None]] = set()

    async def clockwork(self) -> None:
        """Keep asking instances for tokens and load reports when due; give leases to waiting requests."""
        service, looks = self._service, 1
        async with InstanceClient() as client:
            try:
                while True:
                    quiet = not service.activity.is_set()
                    service.activity.clear()
                    asked = self._ask_instances(client, looks)
                    service.serve_waiting()
                    quiet = quiet and not asked and not service.balancer.queue.held
                    looks = round(QUIET_S / CLOCKWORK_S) if quiet else 1
                    if quiet:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(QUIET_S):
                                await service.activity.wait()
                    else:
                        await asyncio.sleep(CLOCKWORK_S)
            finally:
                for task in self._asking:
                    task.cancel()
                await asyncio.gather(*self._asking, return_exceptions=True)

    def _ask_instances(self, client: InstanceClient, looks: int) -> bool:
        """Begin the refills and polls of instances that are due; return whether there were any.

        looks: how often to look for due polls. Each look sees a part of the instances, so after a pause more
        are made.
        """
        balancer, now = self._service.balancer, self._service.clock()
        refills = balancer.refills(now)
        for refill in refills:
            self._begin(self._refill(client, refill))
        for _ in range(looks):
            if polls := balancer.polls(now):
                for poll in polls:
                    self._begin(self._poll(client, poll))
                return True  # the others in a moment, so that they do not come in bursts
        return bool(refills)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._asking.discard(task)
        self._service.activity.set()

    async def _refill(self, client: InstanceClient, refill: Refill) -> None:
        service = self._service
        batch = None
        try:
            spec = refill.spec
            batch = await client.fetch_tokens(
                spec.auth_url,
                spec.master_token,
                refill.count,
                INSTANCE_TIMEOUT_S,
                spec.certificate,
                self._report_to(spec.auth_url),
            )
        except InstanceError as e:
            self._silent(refill.instance_id, e)
        finally:  # also when the task is cancelled: nothing else completes it
            service.balancer.complete_refill(refill, batch, service.clock())
        if batch is not None:
            self._silent(refill.instance_id, None)
            service.serve_waiting()

    async def _poll(self, client: InstanceClient, poll: Poll) -> None:
        service, spec = self._service, poll.spec
        load = reached = None
        look = asyncio.create_task(self._reaches(client, spec)) if poll.address_too else None
        try:
            load = await client.fetch_load(
                spec.auth_url, spec.master_token, poll.after, INSTANCE_TIMEOUT_S, spec.certificate
            )
            if look is not None:
                reached = await look
        except InstanceError as e:
            self._silent(poll.instance_id, e)
        finally:
            if look is not None:
                look.cancel()
            service.balancer.complete_poll(poll, load, service.clock(), reached=reached)
            service.tell_out(poll.instance_id)
        if load is not None and reached is not False:
            self._silent(poll.instance_id, None)
            service.serve_waiting()

    async def _reaches(self, client: InstanceClient, spec: HotInstance) -> bool:
        """Return whether the model server of an instance answers at the address that clients use."""
        try:
            await client.check_address(spec.address, INSTANCE_TIMEOUT_S, spec.certificate)
        except InstanceError as e:
            self._silent(spec.id, e)
            return False
        return True

    def _silent(self, instance_id: int, why: InstanceError | None) -> None:
        """Log when an instance stops answering and when it answers again, not every time between.

        why: the error of this call; None: it answered.
        """
        if why is not None and instance_id not in self._not_answering:
            self._not_answering.add(instance_id)
            log.warning("instance %d does not answer: %s", instance_id, why)
        elif why is None and instance_id in self._not_answering:
            self._not_answering.discard(instance_id)
            log.info("instance %d answers again", instance_id)

    async def ticks(self) -> None:
        """Once a second, end the leases that have expired and let the loadbalancer's time pass."""
        while True:
            service = self._service
            async for _ in in_slices(service.balancer.expire(service.clock())):
                pass
            service.balancer.tick(service.clock())
            await asyncio.sleep(1.0)

    async def autoscaler(self) -> None:
        """Tell the autoscaler each second how busy this process is; fetch the hot set when it changed."""
        timeout = aiohttp.ClientTimeout(total=AUTOSCALER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=self._headers) as session:
            current = False
            while True:
                begun = time.monotonic()
                try:
                    if not current:
                        await self._fetch_hot(session)
                    current = await self._report_busy(session)
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
                    current = False
                    self._complain(f"{type(e).__name__}: {e}")
                except BadField as e:
                    current = False
                    self._complain(f"its answer cannot be used: {e}")
                else:
                    self._complain(None)
                await asyncio.sleep(max(0.05, REPORT_S - (time.monotonic() - begun)))

    async def _fetch_hot(self, session: aiohttp.ClientSession) -> None:
        async with session.get(
            f"{self._autoscaler}/hot", allow_redirects=False, ssl=self._trusted.context() or True
        ) as reply:
            if reply.status == 503:
                return  # it does not know its fleet yet: what is known here stays as it is
            raw = await _read(reply)
        await self._service.take_hot_set(await self._service.reader.read(raw))

    async def _report_busy(self, session: aiohttp.ClientSession) -> bool:
        """Tell the autoscaler how busy this process is; return whether its hot set is the one known here."""
        report = self._service.balancer.usage(self._service.clock(), self._service.name)
        async with session.post(
            f"{self._autoscaler}/busy",
            data=msgspec.json.encode(report),
            headers={"Content-Type": "application/json"},
            allow_redirects=False,
            ssl=self._trusted.context() or True,
        ) as reply:
            said = decode(await _read(reply), BusyAnswer)
        self._say_odd(said.odd)
        balancer = self._service.balancer
        balancer.expect_hot(said.expected_hot_s, self._service.clock())
        hot_set = balancer.instances.hot_set
        if hot_set is None or (hot_set.epoch, hot_set.version) != (said.hot_epoch, said.hot_version):
            return False
        self._service.confirm_hot_set()
        return True

    def _say_odd(self, odd: str | None) -> None:
        """Log when the autoscaler begins to leave out something of this process's reports. odd: what."""
        if odd is not None and self._odd is None:
            log.warning("autoscaler %s leaves out what cannot be: %s", self._autoscaler, odd)
        self._odd = odd

    def _complain(self, why: str | None) -> None:
        """Log when the autoscaler stops answering and when it answers again, not every second between.

        why: what is wrong now; None: nothing.
        """
        if why is not None and self._complaint is None:
            log.warning("autoscaler %s: %s; the hot set stays as it is", self._autoscaler, why)
        elif why is None and self._complaint is not None:
            log.info("autoscaler %s answers again", self._autoscaler)
        self._complaint = why
        self._service.note_autoscaler(self._odd if why is None else why[:300])


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    raw = await reply.read()
    if reply.status != 200:
        raise ValueError(f"{reply.method} {reply.url.path} answered {reply.status}: {raw[:200]!r}")
    return raw
