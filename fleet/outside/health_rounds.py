"""Makes the health checks of instances that are due, all at once."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

from fleet.evidence import Health
from fleet.health_check import HealthCheckOrder
from fleet.outside.health_checker import HealthChecker
from fleet.outside.reach import connects
from fleet.outside.turns import Autoscaler
from fleet.outside.wakeup import Wakeup
from instance_client import InstanceClient

log = logging.getLogger("autoscaler")

REACH_EVERY_S = 15.0
"""Seconds between two checks of our own network, while a machine does not answer."""

REACH_TIMEOUT_S = 5.0
"""Seconds for a connection: one round trip."""

REACH = ""
"""Stands among the checks under way for that of our own network; labels are never empty."""

CHECK_TICK_S = 0.25
"""Seconds between two looks for due checks; a message of an instance makes one due at once."""


class HealthRounds:
    """Asks the autoscaler which health checks are due, makes them, and gives back what they found."""

    def __init__(
        self,
        scaler: Autoscaler,
        make_checker: Callable[[InstanceClient], HealthChecker],
        judged: Callable[[], None],
        reach: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Start no check yet. judged: called in the event loop after each check.

        reach: (host, port) of places where a connection shows that our own network works.
        """
        self.wakeup = Wakeup()  # to look for due checks now
        self._scaler = scaler
        self._make_checker = make_checker
        self._judged = judged
        self._places = reach
        self._reach_at = float("-inf")
        self._under_way: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Make health checks whenever they are due; never return."""
        async with InstanceClient() as client:
            checker = self._make_checker(client)
            try:
                while True:
                    # One at a time of each: a machine that hangs would gather more and more of them.
                    for order in self._scaler.checks_due(self._under_way.keys()):
                        self._under_way[order.label] = asyncio.create_task(self._check(checker, order))
                    self._check_reach()
                    await self.wakeup.wait(CHECK_TICK_S)
            finally:
                tasks = list(self._under_way.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(self, checker: HealthChecker, order: HealthCheckOrder) -> None:
        try:
            check = await checker.check(order)
            await asyncio.get_running_loop().run_in_executor(None, self._scaler.judge, check)
        except Exception:
            log.exception("health check of %s: a fault of ours, nothing is known", order.label)
        finally:
            del self._under_way[order.label]
            self.wakeup.wake()
            self._judged()

    def _check_reach(self) -> None:
        """Begin a check of our own network where that is in question, REACH_EVERY_S after the last."""
        now = asyncio.get_running_loop().time()
        if REACH in self._under_way or now - self._reach_at < REACH_EVERY_S or not self._scaler.wants_reach():
            return
        self._reach_at = now
        self._under_way[REACH] = asyncio.create_task(self._look_around())

    async def _look_around(self) -> None:
        try:
            found = await asyncio.gather(
                *(connects(host, port, REACH_TIMEOUT_S) for host, port in self._places)
            )
            self._scaler.record_reach(Health.WELL if any(found) else Health.BROKEN)
        finally:
            del self._under_way[REACH]

    def run_until(self, stopped: threading.Event) -> None:
        """Make health checks in a new event loop until the event is set, for processes without a server.

        Raises what ends the checks.
        """

        async def until_stopped() -> None:
            task = asyncio.create_task(self.run())
            while not stopped.is_set() and not task.done():
                await asyncio.sleep(0.1)
            task.cancel()  # one that has ended by an error stays as it is
            with contextlib.suppress(asyncio.CancelledError):
                await task

        asyncio.run(until_stopped())
