"""The paced engine on a clock that a test moves."""

import asyncio
import heapq
import json
from collections.abc import Callable
from typing import Any

from engine.reference import SteppedModelServer
from engine.step_time_constants import Timing
from localcloud.paced.engine import Message, PacedEngine
from localcloud.paced.served_model import ServedModel

# 10 ms a token for anybody, 10 ms for any prompt.
EVEN = Timing("even", a=10.0, b=0.0, c=0.0, d=10.0, e=0.0, f=0.0, kv_tokens=2_000)


MODEL = ServedModel(("vllm-13", "org/name"), "org/name", max_model_len=1_000)


class HandClock:
    """Time that stands still until a test moves it to the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, int, HandTimer]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> "HandTimer":
        timer = HandTimer(callback)
        heapq.heappush(self.timers, (when, id(timer), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self.timers)

    def next(self) -> None:
        when, _, timer = heapq.heappop(self.timers)
        if not timer.cancelled:
            self.now = max(self.now, when)
            timer.callback()


class HandTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Call:
    """One request to the app and what came back so far."""

    def __init__(self, app: PacedEngine, method: str, path: str, raw: bytes, media: str | None) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.pieces: list[bytes] = []
        self.whole = False
        headers = [] if media is None else [(b"content-type", media.encode())]
        scope: Message = {"type": "http", "method": method, "path": path, "headers": headers}
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        half = len(raw) // 2
        self._inbox.put_nowait({"type": "http.request", "body": raw[:half], "more_body": True})
        self._inbox.put_nowait({"type": "http.request", "body": raw[half:], "more_body": False})
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not self.status
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            assert self.status
            assert not self.whole
            self.body += message["body"]
            self.pieces.append(message["body"])
            self.whole = not message.get("more_body")

    def hang_up(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def said(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of all events; [DONE] as that text."""
        parts = self.body.split(b"\n\n")
        assert parts[-1] == b""
        assert all(p.startswith(b"data: ") for p in parts[:-1])
        return [p[6:].decode() if p == b"data: [DONE]" else json.loads(p[6:]) for p in parts[:-1]]


class PacedWorld:
    """An engine on a clock moved by hand."""

    def __init__(self, timing: Timing = EVEN, model: ServedModel = MODEL) -> None:
        self.clock = HandClock()
        self.server = SteppedModelServer(timing)
        self.app = PacedEngine(model, self.server, self.clock)

    def call(self, path: str, body: object = None, method: str = "POST") -> Call:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call(self.app, method, path, raw, "application/json")

    async def settle(self) -> None:
        """Let everybody do what can be done at this time."""
        for _ in range(12):
            await asyncio.sleep(0)

    async def finish(self, *calls: Call) -> None:
        await self.settle()
        while not all(c.task.done() for c in calls):
            self.clock.next()
            await self.settle()
        for c in calls:
            c.task.result()
            assert c.whole


def asked(
    path: str,
    body: object = None,
    method: str = "POST",
    timing: Timing = EVEN,
    model: ServedModel = MODEL,
) -> Call:
    """One request to a fresh engine, to its end."""

    async def run() -> Call:
        world = PacedWorld(timing, model)
        call = world.call(path, body, method)
        await world.finish(call)
        assert world.server.running == world.server.waiting == world.clock.pending == 0
        return call

    return asyncio.run(run())


COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"


HELLO = {"model": "vllm-13", "prompt": "Hello there!", "max_tokens": 3, "ignore_eos": True}


HELLO_CHAT = {
    "model": "vllm-13",
    "messages": [{"role": "user", "content": "Hello there!"}],
    "max_tokens": 3,
    "ignore_eos": True,
}
