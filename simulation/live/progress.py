"""A live run while it goes on: the fleet sampled once a second, and the figures shown on stderr."""

import asyncio
import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from process.progress import in_words
from simulation.live.operator import NoAnswer, Operator
from simulation.live.users import Driver
from simulation.report import COMPLETED, Sample

SAMPLE_S = 1.0
"""Seconds between two looks at the fleet."""

SHOW_S = (0.5, 5.0)
"""Seconds between two updates of the progress: on a terminal, and elsewhere (a line each)."""


def say(text: str) -> None:
    """Print a line for people on stderr."""
    print(text, file=sys.stderr, flush=True)


class FleetSampler:
    """Asks for the state of the fleet every SAMPLE_S seconds; a question that fails leaves a gap."""

    def __init__(self, operator: Operator, clock: Callable[[], float]) -> None:
        """Make a sampler that asks by this operator. clock: gives seconds since the start of the run."""
        self.samples: list[Sample] = []
        self._operator = operator
        self._clock = clock

    async def run(self) -> NoReturn:
        """Take samples of the fleet until cancelled."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        looks = 0
        while True:
            with contextlib.suppress(NoAnswer):
                await self._look()
            looks += 1
            await asyncio.sleep(max(0.05, begun + looks * SAMPLE_S - loop.time()))

    async def _look(self) -> None:
        (rows, _), demand = await asyncio.gather(self._operator.instances(), self._demand())
        prices = (row.get("price_usd_h") for row in rows)
        usd_h = sum(p for p in prices if isinstance(p, int | float))
        states = Counter(str(row["state"]) for row in rows)
        self.samples.append(Sample(max(0.0, self._clock()), dict(states), round(usd_h, 6), demand))

    async def _demand(self) -> float | None:
        """Return the demand in instances' worth of capacity; None when the loadbalancer does not say."""
        try:
            demand = (await self._operator.status()).get("demand")
        except NoAnswer:
            return None
        return float(demand) if isinstance(demand, int | float) else None


class ProgressView:
    """Shows how far a live run is: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(
        self, driver: Driver, sampler: FleetSampler, total: int, length_s: float, quiet: bool
    ) -> None:
        """Make a view of this driver and sampler, which shows nothing yet.

        total: requests to be sent, within length_s seconds. quiet: never show anything.
        """
        self._driver = driver
        self._sampler = sampler
        self._total = total
        self._length_s = length_s
        self._quiet = quiet
        self._console = Console(stderr=True)

    async def run(self) -> NoReturn:
        """Update the progress shown on stderr until cancelled."""
        if self._quiet:
            await asyncio.Event().wait()
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(SHOW_S[1])
                say(self.line())
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self._picture(), refresh=True)
                await asyncio.sleep(SHOW_S[0])

    def line(self) -> str:
        """Return the progress of the run as one line: time, requests and instances."""
        driver = self._driver
        completed = driver.outcomes[COMPLETED]
        parts = [
            f"{self._at_s():.0f} s",
            f"about {in_words(max(0.0, self._length_s - self._at_s()))} left",
            f"sent {len(driver.records)}/{self._total}",
            f"in flight {driver.in_flight}",
            f"done {completed}",
            f"failed {driver.outcomes.total() - completed}",
        ]
        if driver.first_tokens:
            parts.append(f"p50 first token {statistics.median(driver.first_tokens):.2f} s")
        if self._sampler.samples:
            sample = self._sampler.samples[-1]
            states = ", ".join(f"{n} {state}" for state, n in sorted(sample.states.items()))
            parts += [states or "no instances", f"${sample.usd_h:.2f}/h"]
        return "  ".join(parts)

    def _picture(self) -> Group:
        length_s = max(self._length_s, 1.0)
        bar = ProgressBar(total=length_s, completed=min(length_s, self._at_s()), width=60)
        return Group(bar, Text(self.line(), no_wrap=True, overflow="ellipsis"))

    def _at_s(self) -> float:
        return max(0.0, time.perf_counter() - self._driver.begun) if self._driver.begun else 0.0
