"""What one client is refused counts as demand up to a bound. Time is a number."""

import pytest

from dispatch.demand_counter import CLIENT_INSTANCES, REFUSED_S
from tests.dispatch_world import instance, world

CAPACITY = 1000.0


def demand(hot: int, asks: dict[str, float], times: int, quiet_s: float = 0.0) -> float:
    """What is told in excess of what is under way after each client was refused its work so many times."""
    b = world(*(instance(i) for i in range(1, hot + 1)))
    for i in range(1, hot + 1):
        b.lease(CAPACITY, avoid=tuple(other for other in range(1, hot + 1) if other != i))
    for _ in range(times):
        for client, work in asks.items():
            b.refused(work, client=client)
    b.now += quiet_s
    usage = b.balancer.usage(b.now)
    return usage.demand - sum(use.work for use in usage.instances.values()) / CAPACITY


@pytest.mark.parametrize("hot", [1, 2, 5])
def test_one_client_that_asks_for_a_million_instances_is_demand_for_as_many_as_there_are(hot: int) -> None:
    assert demand(hot, {"liar": 1e7}, 10) == pytest.approx(max(CLIENT_INSTANCES, hot))


def test_what_it_asks_hides_no_demand_of_the_others() -> None:
    assert demand(2, {"a": 100.0, "b": 100.0}, 3) == pytest.approx(0.6)
    assert demand(2, {"a": 100.0, "b": 100.0, "liar": 1e7}, 3) == pytest.approx(0.6 + CLIENT_INSTANCES)


def test_refused_work_is_forgotten() -> None:
    assert demand(1, {"liar": 1e7}, 3, quiet_s=REFUSED_S + 2.0) == pytest.approx(0.0)
