"""Wakes coroutines that wait in an event loop."""

import asyncio


class Wakeup:
    """Wakes the coroutines of one event loop that wait for it; `wake` is called in that loop."""

    def __init__(self) -> None:
        """Begin without a waiting coroutine."""
        self._waiting: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Let all waiting coroutines go on."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Wait until `wake` is called, or for timeout_s seconds."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait((future,), timeout=timeout_s)
        finally:
            self._waiting.discard(future)
