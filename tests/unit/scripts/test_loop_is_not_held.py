"""Whatever a loadbalancer is told or asked, others wait 0.1 s at most: with 10,000 instances, and liars."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from bench.route.stub_fleet import certificate
from dispatch.load_reports import Poll
from dispatch.outside.background import BackgroundTasks
from dispatch.route_request import RouteRequest
from fleet_client.asgi_server import FULL_COLLECTION_AFTER
from loadbalancer_server import create_app
from tests.held_loop import HeldLoop, held_loop
from tests.loadbalancer_app import CONTROL, HOT, INSTANCE, LoadBalancerApp
from tests.messages import load_report, request_end, token_batch
from web.bridge import FlaskBridge
from web.keys import AccessKeys
from web.messages.reports import LoadReport

MOST_S = 0.1
"""Seconds of processor that the loop may be held."""

MANY = 10_000


class LargeFleet:
    """A loadbalancer on a loop that is measured."""

    def __init__(self, loop: HeldLoop) -> None:
        self.loop = loop
        self.app = LoadBalancerApp()
        self.balancer, self.service = self.app.balancer, self.app.service
        self.bridge = FlaskBridge(create_app(self.service, AccessKeys(CONTROL)))
        self.version = 0

    def rows(self, count: int, net: int = 10) -> list[dict[str, Any]]:
        """Instances of the hot set."""
        shown = certificate()
        hosts = [f"https://{net}.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(count)]
        return [
            {
                **INSTANCE,
                "id": n,
                "address": f"{host}:8000",
                "auth_url": f"{host}:3000",
                "master_token": f"{net}-{n}",
                "certificate": shown,
            }
            for n, host in enumerate(hosts)
        ]

    def put(self, rows: list[dict[str, Any]]) -> float:
        """Tell a hot set; return how long the loop was held."""
        self.version += 1
        said = {**HOT, "version": self.version, "instances": rows}
        status, held_s = self.ask("PUT", "/hot", json.dumps(said).encode())
        assert status == 200
        assert len(self.balancer.instances) == len(rows)
        return held_s

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, float]:
        """Ask; return the status, and how long the loop was held."""
        return self.loop.longest_of(self._ask(method, path, body))

    async def _ask(self, method: str, path: str, body: bytes) -> int:
        answer: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            answer.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer " + CONTROL.encode())],
        }
        await self.bridge(scope, receive, send)
        return int(answer[0]["status"])

    def stock(self) -> None:
        """Give all instances tokens."""
        now = self.app.clock
        while refills := self.balancer.refills(now.now):
            for refill in refills:
                tokens = [f"{refill.instance_id:06d}{n:010d}" for n in range(refill.count)]
                self.balancer.complete_refill(refill, token_batch(tokens), now.now)
            now.now += 0.02

    def held_by(self, work: Callable[[], object]) -> float:
        """Return how long the work, in one piece, holds the loop."""

        async def do() -> None:
            work()

        return self.loop.longest_of(do())[1]


@pytest.fixture
def fleet() -> Iterator[LargeFleet]:
    assert FULL_COLLECTION_AFTER == 1000, "as in held_loop"
    with held_loop() as loop:
        yield LargeFleet(loop)


def test_ten_thousand_instances_come_are_looked_at_and_go(fleet: LargeFleet) -> None:
    balancer, now = fleet.balancer, fleet.app.clock
    rows = fleet.rows(MANY)
    held = {"come": fleet.put(rows), "stay": fleet.put(rows)}
    held["GET /status"] = fleet.ask("GET", "/status")[1]
    held["GET /metrics"] = fleet.ask("GET", "/metrics")[1]
    held["GET /health"] = fleet.ask("GET", "/health")[1]
    held["POST /route"] = fleet.ask("POST", "/route", b'{"prompt_tokens": 5, "count": 64}')[1]
    for name, work in (
        ("tick", balancer.tick),
        ("refills", balancer.refills),
        ("polls", balancer.polls),
        ("usage", balancer.usage),
    ):
        held[name] = fleet.held_by(lambda work=work: work(now.now))  # type: ignore[misc]
    held["change"] = fleet.put([{**row, "master_token": row["master_token"] + "x"} for row in rows])
    held["are replaced"] = fleet.put(fleet.rows(MANY, net=11))
    held["go"] = fleet.put([])
    assert {name: held_s for name, held_s in held.items() if held_s > MOST_S} == {}


def test_leases_that_expire_together_do_not_hold_the_loop(fleet: LargeFleet) -> None:
    fleet.put(fleet.rows(500))
    fleet.stock()
    for n in range(20_000):
        fleet.service.route(RouteRequest(10.0, client=f"{n % 500}"), 0.0)
    given = len(fleet.balancer.leases)
    assert given > 15_000
    fleet.app.clock.now += 70.0
    tasks = BackgroundTasks(fleet.service, "http://127.0.0.1:1", CONTROL)
    _, held_s = fleet.loop.longest_of(ended(tasks.ticks, lambda: not len(fleet.balancer.leases)))
    assert fleet.balancer.leases.ends == {"expired": given}
    assert held_s < MOST_S


async def ended(background: Callable[[], Awaitable[None]], when: Callable[[], bool]) -> None:
    """Let a background task run until something is the case."""
    task = asyncio.ensure_future(background())
    while not when():
        await asyncio.sleep(0)
    task.cancel()


@pytest.mark.parametrize(
    "report",
    [
        load_report(seq=70_000, started=tuple(f"s{n:015d}" for n in range(65_536))),
        load_report(seq=70_000, ended=tuple(request_end(f"e{n:015d}") for n in range(65_536))),
        load_report(seq=70_000, ended=(request_end("e" * 16, output_tokens=10**7),) * 65_536),
        load_report(seq=200_000, started=("s" * 16,) * 150_000),
    ],
    ids=["started", "ended", "one-ended", "too-many"],
)
def test_a_report_of_a_liar_does_not_hold_the_loop(fleet: LargeFleet, report: LoadReport) -> None:
    fleet.put(fleet.rows(10))
    fleet.stock()
    for number in range(3):
        inst = fleet.balancer.instances.by_id[number]
        poll, now = Poll(inst.spec, 0), fleet.app.clock.now
        held_s = fleet.held_by(lambda poll=poll, now=now: fleet.balancer.complete_poll(poll, report, now))  # type: ignore[misc]
        assert held_s < MOST_S
