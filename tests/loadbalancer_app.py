"""The loadbalancer's routes with a clock that stands still, for tests without processes."""

import random
from collections.abc import Mapping
from typing import Any

from bench.route.stub_fleet import certificate
from dispatch.outside.service import LoadBalancerService
from loadbalancer import LoadBalancer
from loadbalancer_server import create_app
from tests.asgi_client import AsgiClient
from tests.messages import hot_set, token_batch
from web.keys import AccessKeys
from web.messages.hot_set import HotSet

CONTROL, CLIENT, OPERATOR = "control-" + "c" * 32, "client-" + "u" * 32, "operator-" + "o" * 32

INSTANCE: dict[str, Any] = {
    "id": 7,
    "state": "hot",
    "address": "http://127.0.0.7:8000",
    "auth_url": "http://127.0.0.7:3000",
    "master_token": "master-secret",
    "throughput_work_s": 100.0,
    "capacity_work": 1000.0,
}
HOT: dict[str, Any] = {
    "epoch": "e1",
    "version": 1,
    "model": "vllm-13",
    "prefill_weight": 0.1,
    "expected_output_tokens": 200.0,
    "expected_hot_s": None,
    "instances": [INSTANCE],
}


class StandingClock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class LoadBalancerApp:
    """A face with a clock that only the test moves, one hot instance and tokens for it."""

    def __init__(
        self,
        clients: frozenset[str] = frozenset(),
        operator: frozenset[str] = frozenset(),
        priorities: Mapping[str, str] | None = None,
    ) -> None:
        self.balancer = LoadBalancer(random.Random(1), lambda token: token[-16:])
        self.clock = StandingClock()
        self.service = LoadBalancerService(self.balancer, self.clock)
        self.app = create_app(self.service, AccessKeys(CONTROL, clients, operator, priorities or {}))
        self.client = AsgiClient(self.app)

    @staticmethod
    def client_of(service: LoadBalancerService) -> AsgiClient:
        """Return a client of that service's routes."""
        return AsgiClient(create_app(service, AccessKeys(CONTROL)))

    def stock(self) -> None:
        """Make the instance hot and give it tokens."""
        self.supply(hot_set(HOT))

    def supply(self, hot: HotSet) -> None:
        """Make these instances hot and give them tokens, of which the first instance has the smallest."""
        self.service.hot_set(hot)
        first = hot.instances[0].id
        for refill in self.balancer.refills(self.service.clock()):
            numbers = range(
                1000 * (refill.instance_id - first), 1000 * (refill.instance_id - first) + refill.count
            )
            tokens = [f"token-{n:016d}" for n in numbers]
            self.balancer.complete_refill(refill, token_batch(tokens), self.service.clock())


CERTIFIED = {**INSTANCE, "id": 8, "address": "https://127.0.0.8:8000"}


def both_hot(**more: Any) -> HotSet:
    """Return the hot set with both instances."""
    return hot_set({**HOT, "instances": [INSTANCE, {**CERTIFIED, "certificate": certificate()}], **more})


class TwoInstances(LoadBalancerApp):
    """The same with several instances, of which the second has a certificate."""

    def stock(self, **more: Any) -> None:
        """Make them hot and give them tokens."""
        self.supply(both_hot(**more))

    def route(self, **said: Any) -> tuple[int, Any]:
        """POST /route."""
        answer = self.client.post("/route", json={"work": 10.0, **said})
        return answer.status_code, answer.get_json()
