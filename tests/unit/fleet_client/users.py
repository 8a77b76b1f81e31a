"""Users of both transports, and what an instance may do to them."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai

from fleet_client import AsyncFleetTransport, FleetTransport
from tests.fake_fleet import Act, FakeFleet, Out, Seen
from tests.waiting import wait_for

SECRET = "the quick brown fox and his secret"


USER_KEY = "sk-the-users-own-key"


ALL = "one two three four five"


class Threads:
    """A user of the synchronous transport."""

    def __init__(self, url: str, key: str = USER_KEY, **more: Any) -> None:
        self.transport = FleetTransport(url, **more)
        self.http = httpx2.Client(transport=self.transport, timeout=httpx2.Timeout(20.0, pool=None))
        self.openai = openai.OpenAI(
            http_client=self.http, api_key=key, base_url="http://fleet/v1", max_retries=0
        )

    def chat(self, **more: Any) -> Any:
        return self.openai.chat.completions.create(**(chat_request() | more))

    def completion(self, **more: Any) -> Any:
        return self.openai.completions.create(**({"model": "m", "prompt": SECRET} | more))

    def stream(self, **more: Any) -> str:
        return "".join(part.choices[0].delta.content for part in self.chat(stream=True, **more))

    def streams(self, count: int) -> list[str]:
        """Read so many streams, 16 at a time."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda _: self.stream(), range(count)))

    def models(self) -> list[str]:
        return [one.id for one in self.openai.models.list()]

    def request(self, method: str, target: str, **more: Any) -> httpx2.Response:
        return self.http.request(method, f"http://fleet{target}", **more)

    def begin(self) -> Callable[[], None]:
        """Read a stream's first token; what it returns closes it."""
        stream = self.chat(stream=True)
        next(stream)
        return lambda: stream.close()

    def close(self) -> None:
        self.http.close()


class Loop:
    """A user of the asynchronous transport; its loop runs in a thread."""

    def __init__(self, url: str, key: str = USER_KEY, **more: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.transport = AsyncFleetTransport(url, **more)
        self.http = httpx2.AsyncClient(transport=self.transport, timeout=httpx2.Timeout(20.0, pool=None))
        self.openai = openai.AsyncOpenAI(
            http_client=self.http, api_key=key, base_url="http://fleet/v1", max_retries=0
        )

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    def chat(self, **more: Any) -> Any:
        return self.do(self.openai.chat.completions.create(**(chat_request() | more)))

    def completion(self, **more: Any) -> Any:
        return self.do(self.openai.completions.create(**({"model": "m", "prompt": SECRET} | more)))

    async def _stream(self, **more: Any) -> str:
        stream = await self.openai.chat.completions.create(stream=True, **(chat_request() | more))
        return "".join([part.choices[0].delta.content async for part in stream])

    def stream(self, **more: Any) -> str:
        text: str = self.do(self._stream(**more))
        return text

    def streams(self, count: int) -> list[str]:
        """Read so many streams, all at once."""

        async def read() -> list[str]:
            return await asyncio.gather(*[self._stream() for _ in range(count)])

        texts: list[str] = self.do(read())
        return texts

    def models(self) -> list[str]:
        async def read() -> list[str]:
            return [one.id async for one in self.openai.models.list()]

        names: list[str] = self.do(read())
        return names

    def request(self, method: str, target: str, **more: Any) -> httpx2.Response:
        response: httpx2.Response = self.do(self.http.request(method, f"http://fleet{target}", **more))
        return response

    def begin(self) -> Callable[[], None]:
        stream = self.chat(stream=True)
        self.do(stream.__anext__())
        return lambda: self.do(stream.close())

    def close(self) -> None:
        if self._thread.is_alive():
            self.do(self.http.aclose())
            self.do(self._finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _finish(self) -> None:
        """Nothing of the transport's is left to run, once what it has cancelled has ended."""
        left: set[asyncio.Task[Any]] = set()
        for _ in range(500):
            left = {t for t in asyncio.all_tasks() if t is not asyncio.current_task()}
            if not left:
                return
            await asyncio.sleep(0.01)
        assert not left, left


User = Threads | Loop


Make = Callable[..., User]


def chat_request() -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": SECRET}]}


def told(fleet: FakeFleet, count: int = 1) -> list[tuple[str, str]]:
    """How leases ended, once so many were told."""
    dones = fleet.loadbalancer.dones
    wait_for(f"{count} ends of leases", lambda: len(dones) >= count)
    return sorted((one["outcome"], one.get("why", "")) for one in dones)


def plan(fleet: FakeFleet, *acts: Act) -> None:
    """Whichever instances the next requests come to, they do this, in this order."""
    left = list(acts)
    for instance in fleet.instances:

        async def act(seen: Seen, out: Out, model: Act = instance.model) -> None:
            await (left.pop(0) if left else model)(seen, out)

        instance.plan.clear()
        instance.plan.extend([act] * len(acts))


def says(status: int, body: object = None, **headers: str) -> Act:
    async def act(seen: Seen, out: Out) -> None:
        await out.answer(
            status, {"error": {"message": f"status {status}"}} if body is None else body, headers
        )

    return act


async def hang_up(seen: Seen, out: Out) -> None:
    """End the connection without a word."""
    out.abort()


async def silent(seen: Seen, out: Out) -> None:
    """Say nothing."""
    await out.gone.wait()


async def break_off(seen: Seen, out: Out) -> None:
    """Begin an answer and end the connection."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    await out.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n')
    out.abort()


async def stall(seen: Seen, out: Out) -> None:
    """Begin an answer and say no more."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    await out.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n')
    await out.gone.wait()
