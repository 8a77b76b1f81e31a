"""Long work on the event loop, a little at a time: meanwhile requests are answered."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

SLICE_S = 0.004
"""Seconds of work at a time."""


async def in_slices(items: Iterable[T], clock: Callable[[], float] = time.perf_counter) -> AsyncIterator[T]:
    """Yield the items; after each SLICE_S of work on them others on the loop have their turn."""
    begun = clock()
    for item in items:
        yield item
        if clock() - begun > SLICE_S:
            await asyncio.sleep(0)
            begun = clock()
