"""Make the health checks that are due, all at once."""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable

from fleet.health_check import HealthCheckOrder
from fleet.outside.health_checker import HealthChecker
from fleet.outside.turns import Autoscaler
from fleet.outside.wakeup import Wakeup
from instance_client import InstanceClient

log = logging.getLogger("autoscaler")

CHECK_TICK_S = 0.25
"""Seconds between two looks for due checks; a message of an instance makes one due at once."""


class HealthRounds:
    """Asks the autoscaler which checks are due, makes them, and gives it what they found."""

    def __init__(
        self,
        scaler: Autoscaler,
        make_checker: Callable[[InstanceClient], HealthChecker],
        judged: Callable[[], None],
    ) -> None:
        """judged: called in the event loop after each check."""
        self.wakeup = Wakeup()  # to look for due checks now
        self._scaler = scaler
        self._make_checker = make_checker
        self._judged = judged
        self._under_way: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Make checks; never return."""
        async with InstanceClient() as client:
            checker = self._make_checker(client)
            try:
                while True:
                    # One at a time of each: a machine that hangs would gather more and more of them.
                    for order in self._scaler.checks_due(self._under_way.keys()):
                        self._under_way[order.label] = asyncio.create_task(self._check(checker, order))
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
        except sqlite3.Error:
            log.exception("what a health check changed is not written down yet")
        finally:
            del self._under_way[order.label]
            self.wakeup.wake()
            self._judged()

    def run_until(self, stopped: threading.Event) -> None:
        """Make checks in an event loop of its own, where there is no server's; begin again after a fault."""

        async def until_stopped() -> None:
            while not stopped.is_set():
                task = asyncio.create_task(self.run())
                while not stopped.is_set() and not task.done():
                    await asyncio.sleep(0.1)
                task.cancel()
                (error,) = await asyncio.gather(task, return_exceptions=True)
                if not stopped.is_set():
                    log.error("health checks failed, they start again", exc_info=error)
                    await asyncio.sleep(1.0)

        asyncio.run(until_stopped())
