"""The loadbalancer's background tasks ask often while there is something to do, and seldom else."""

import asyncio
import time
from collections.abc import Callable

import pytest

from dispatch.outside.background import CLOCKWORK_S, QUIET_S, BackgroundTasks
from dispatch.outside.service import LoadBalancerService
from dispatch.route_request import RouteRequest
from dispatch.token_refills import Refill
from tests.loadbalancer_app import (
    HOT,
    LoadBalancerApp,
)
from tests.messages import hot_set


def looks_in(
    seconds: float, stir: Callable[[LoadBalancerService], None], monkeypatch: pytest.MonkeyPatch
) -> int:
    """How often the clockwork asks for refills in so long; stir is called every 10 ms."""
    app = LoadBalancerApp()
    looks: list[float] = []

    def refills(now: float) -> list[Refill]:
        looks.append(now)
        return []

    monkeypatch.setattr(app.balancer, "refills", refills)

    async def run() -> None:
        work = asyncio.create_task(BackgroundTasks(app.service, "http://127.0.0.1:1", "k" * 32).clockwork())
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            await asyncio.sleep(0.01)
            stir(app.service)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    asyncio.run(run())
    return len(looks)


@pytest.mark.alone
def test_the_clockwork_looks_seldom_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 <= looks_in(1.0, lambda _: None, monkeypatch) <= 1.0 / QUIET_S + 2


@pytest.mark.alone
def test_the_clockwork_looks_often_while_somebody_asks_and_not_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = looks_in(1.0, lambda service: service.activity.set(), monkeypatch)
    assert 2.0 / QUIET_S < looks <= 1.0 / CLOCKWORK_S + 2


@pytest.mark.alone
def test_the_clockwork_looks_often_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(service: LoadBalancerService) -> None:
        if not service.balancer.queue.held:
            service.balancer.request(RouteRequest(10.0), 60.0, None, service.clock())

    assert looks_in(1.0, hold, monkeypatch) > 2.0 / QUIET_S


@pytest.mark.parametrize(
    "happens",
    [
        lambda app: app.client.post("/route", json={"work": 10}),
        lambda app: app.client.post("/done", json={"request_id": "x", "outcome": "failed"}),
        lambda app: app.service.hot_set(hot_set(HOT)),
    ],
    ids=["route", "done", "hot"],
)
def test_what_may_be_followed_by_errands_wakes_the_clockwork(
    happens: Callable[["LoadBalancerApp"], object],
) -> None:
    app = LoadBalancerApp()
    assert not app.service.activity.is_set()
    happens(app)
    assert app.service.activity.is_set()
