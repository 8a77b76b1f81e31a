"""An event loop that measures how long it is held: the processor time of its longest turn."""

import asyncio
import gc
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class HeldLoop(asyncio.SelectorEventLoop):
    """The loop. held_s: of the longest turn so far, in seconds of processor, which others do not change."""

    held_s = 0.0

    def _run_once(self) -> None:
        begun = time.thread_time()
        super()._run_once()  # type: ignore[misc]
        self.held_s = max(self.held_s, time.thread_time() - begun)

    def longest_of(self, work: Coroutine[Any, Any, T]) -> tuple[T, float]:
        """Do the work; return its result, and how long the loop was held at most."""
        self.held_s = 0.0
        result = self.run_until_complete(work)
        return result, self.held_s


@contextmanager
def held_loop() -> Iterator[HeldLoop]:
    """Make a loop whose turns are measured without full garbage collections, as the server's."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds[:2], 1000)
    loop = HeldLoop()
    try:
        yield loop
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gc.set_threshold(*thresholds)
        gc.unfreeze()
