"""A loadbalancer that takes the hot set and never reports: its demand is not known, and /health says so."""

import asyncio
import time
from collections.abc import Callable

import pytest

from fleet.outside import hot_set_push
from fleet.outside.hot_set_push import HotSetPush
from fleet.outside.own_health import DEAF_S, OwnHealth
from web.messages.hot_set import HotSet


class Taker:
    """An HTTP server that takes hot sets, and says what it is told to."""

    def __init__(self, answer: bytes) -> None:
        self.taken = 0
        self.url = ""
        self._answer = answer

    async def serve(self) -> asyncio.Server:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            size = next(int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:"))
            await reader.readexactly(size)
            self.taken += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self._answer) + self._answer)


def pushed(taker: Taker, own: OwnHealth, until: Callable[[], bool]) -> None:
    """Push a hot set until that is so."""

    async def run() -> None:
        server = await taker.serve()
        hot = HotSet("e1", 0, "vllm-13", 0.1, 180.0, None, ())
        push = HotSetPush(
            lambda: 0,
            lambda: hot,
            [taker.url],
            "c" * 32,
            taken=lambda name, url: own.note_contact(name, 1000.0 + DEAF_S * (taker.taken - 1) / 5, url),
            reports=lambda name: own.reports(name, 1000.0),
        )
        task = asyncio.create_task(push.run())
        end = time.monotonic() + 20.0
        while not until() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert until()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()

    asyncio.run(run())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_set_push, "REPEAT_S", 0.01)
    monkeypatch.setattr(hot_set_push, "HOT_PUSH_S", 0.01)


NAMED = b'{"taken": true, "epoch": "e1", "version": 0, "loadbalancer": "lb1"}'


def test_who_takes_pushes_and_reports_nothing_is_a_reason_that_names_it() -> None:
    taker, own = Taker(NAMED), OwnHealth()
    pushed(taker, own, lambda: taker.taken >= 6)
    (reason,) = own.reasons(0, "", 1000.0 + DEAF_S)
    assert reason.code == "no_reports"
    assert reason.message.endswith(
        f"from 1 of 1 loadbalancers that are there: lb1 (takes the hot set at {taker.url})"
    )
    assert own.reasons(0, "", 1000.0 + 5 * DEAF_S) == [], "once it is gone it is no fault of ours"


def test_who_reports_is_pushed_to_once() -> None:
    taker, own = Taker(NAMED), OwnHealth()
    own.note_report("lb1", 1000.0)
    end = time.monotonic() + 0.3
    pushed(taker, own, lambda: taker.taken > 0 and time.monotonic() > end)
    assert taker.taken == 1
    assert not own.reports("lb1", 1000.0 + 60.0), "and looked at again when its reports end"


@pytest.mark.parametrize("said", [b'{"taken": true, "epoch": "e1", "version": 0}', b"{}", b"no JSON"])
def test_an_older_one_that_gives_no_name_is_pushed_to_once_and_is_no_reason(said: bytes) -> None:
    taker, own = Taker(said), OwnHealth()
    end = time.monotonic() + 0.3
    pushed(taker, own, lambda: taker.taken > 0 and time.monotonic() > end)
    assert taker.taken == 1
    assert own.reasons(0, "", 1000.0 + 2 * DEAF_S) == []
