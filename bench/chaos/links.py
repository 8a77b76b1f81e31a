"""Links between processes: TCP proxies of ours that delay, lose or cut what passes.

All run on one event loop in a thread of its own. A link passes bytes as they come until it is told to behave
otherwise; connections that are open then behave so, too.
"""

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from enum import StrEnum
from typing import Any

CHUNK = 65_536


class Behaviour(StrEnum):
    """What a link does with what comes."""

    PASS = "pass"  # noqa: S105 no password
    DELAY = "delay"  # each piece waits
    LOSE = "lose"  # nothing passes, nobody is told; afterwards the connections are cut, as after a long loss
    REFUSE = "refuse"  # connections are cut, and new ones at once


class Link:
    """One proxy. Its methods are for any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, to_port: int) -> None:
        """Listen on a port that is free."""
        self._loop = loop
        self._to_port = to_port
        self._behaviour = Behaviour.PASS
        self._delay_s = 0.0
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0), loop
        ).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Listen no more; on the loop's thread."""
        self._server.close()

    def behave(self, behaviour: Behaviour, delay_s: float = 0.0) -> None:
        """Behave so from now on."""
        self._loop.call_soon_threadsafe(self._behave, behaviour, delay_s)

    def _behave(self, behaviour: Behaviour, delay_s: float) -> None:
        was, self._behaviour, self._delay_s = self._behaviour, behaviour, delay_s
        if Behaviour.REFUSE in (was, behaviour) or was is Behaviour.LOSE:
            for writer in tuple(self._writers):
                writer.transport.abort()
        if behaviour is Behaviour.LOSE:
            self._passing.clear()
        else:
            self._passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._behaviour is Behaviour.REFUSE:
                writer.transport.abort()
                return
            await self._passing.wait()
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            self._writers.add(to_writer)
            try:
                await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
            finally:
                self._writers.discard(to_writer)
                to_writer.transport.abort()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._passing.wait()
            if self._behaviour is Behaviour.DELAY:
                await asyncio.sleep(random.uniform(0.0, 2.0) * self._delay_s)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


class Links:
    """All links, by name."""

    def __init__(self) -> None:
        """Start the loop."""
        self.by_name: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()

    def make(self, name: str, to_port: int) -> Link:
        """Return the link of that name, which leads there."""
        if name not in self.by_name:
            self.by_name[name] = Link(self._loop, to_port)
        return self.by_name[name]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something on their loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End all."""

        async def end() -> None:
            for link in self.by_name.values():
                link.close()
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # for the transports that were aborted

        if self._thread.is_alive():
            self.run(end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
