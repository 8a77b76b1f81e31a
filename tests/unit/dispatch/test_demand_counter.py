"""What one client is refused counts as demand up to a bound. Time is a number."""

import pytest

from dispatch.demand_counter import CLIENT_INSTANCES, HOLD_S, REFUSED_S
from tests.dispatch_world import DispatchWorld, instance, world

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


def told(b: DispatchWorld) -> tuple[float, float, float]:
    """What the autoscaler is told: demand beside what is under way, held and arrived work, in instances."""
    usage = b.balancer.usage(b.now)
    under_way = sum(use.work for use in usage.instances.values())
    return usage.demand - under_way / CAPACITY, usage.held_work / CAPACITY, usage.arrived_work / CAPACITY


def test_one_giant_that_waits_is_demand_for_one_instance() -> None:
    """B3 while it waits: with wait_s one request of work 1e7 was demand for a thousand instances."""
    b = world(instance(1))
    b.lease(500.0, client="honest")
    b.hold(1e7, client="giant")
    assert told(b) == pytest.approx((1.0, 1.0, 1.5))
    b.tick(10.0)
    assert told(b) == pytest.approx((1.0, 1.0, 1.5))


def test_a_giant_prompt_is_no_more() -> None:
    b = world(instance(1))
    b.lease(500.0, client="honest")
    b.hold(1e7, client="giant", prompt_tokens=10_000_000)
    traffic = b.balancer.usage(b.now).traffic
    assert (told(b)[0], traffic.held_prompt_tokens, traffic.output_tokens) == (1.0, 10_000, 500.0)


@pytest.mark.parametrize("hot", [1, 5])
def test_giants_of_one_client_that_wait_are_demand_for_as_many_as_there_are(hot: int) -> None:
    b = world(*(instance(i) for i in range(1, hot + 1)), max_held=1000)
    for _ in range(hot):
        b.lease(CAPACITY, client="honest")
    for _ in range(300):
        b.tick(0.1)
        b.request(1e7, wait_s=600.0, client="giant")
        b.refused(1e7, client="giant")
    most = max(CLIENT_INSTANCES, hot)
    assert told(b)[:2] == pytest.approx((most, most))


def test_what_one_client_asks_for_in_vain_arrives_no_faster_than_the_fleet_works() -> None:
    """It is the past of arrivals that a policy rents for."""
    b = world(instance(1))
    busy = b.lease(CAPACITY, client="honest")
    b.report(1, started=(busy.request_id,), running=1)
    before = told(b)[2]
    for _ in range(600):
        b.tick(1.0)
        b.refill()
        b.refused(1e7, client="giant")
    arrived_s = (told(b)[2] - before) * CAPACITY / 600.0
    work_s = CAPACITY / HOLD_S
    assert CLIENT_INSTANCES * work_s <= arrived_s <= 1.2 * CLIENT_INSTANCES * work_s


def test_what_was_too_much_when_it_was_asked_for_arrives_when_it_is_served() -> None:
    b = world(instance(1), max_held=10_000)
    requests = [b.request(100.0, wait_s=600.0, client="a") for _ in range(500)]
    assert told(b)[2] < 25.0
    for _ in range(600):
        b.tick(1.0)
        b.refill()
        for lease in list(b.unfinished):
            b.end(lease)
        b.grant()
    assert len(requests) == 500
    assert b.balancer.usage(b.now).arrivals == 500
    assert told(b)[2] == pytest.approx(50.0)


def test_one_key_with_500_usual_requests_makes_the_fleet_grow_as_ever() -> None:
    """The demand of the only client there is: the fleet doubles, again and again, until it is enough."""
    b = world(instance(1), max_held=10_000)
    for _ in range(500):
        b.request(100.0, wait_s=600.0, client="only")
    for hot in (1, 3, 6, 12, 24):
        b.hot(*(instance(i) for i in range(1, hot + 1)))
        while b.grant():
            b.refill()
        usage = b.balancer.usage(b.now)
        assert usage.busy == hot
        assert usage.demand == pytest.approx(hot + max(CLIENT_INSTANCES, hot))
    b.hot(*(instance(i) for i in range(1, 61)))
    while b.grant():
        b.refill()
    assert b.balancer.usage(b.now).demand == pytest.approx(50.0), "all of it, and no more"


def test_this_process_itself_has_no_bound() -> None:
    """A request without a client's name is virtual time's own."""
    b = world(instance(1))
    b.lease(CAPACITY)
    for _ in range(50):
        b.hold(CAPACITY)
    assert told(b) == pytest.approx((50.0, 50.0, 51.0))


def test_refused_work_is_forgotten() -> None:
    assert demand(1, {"liar": 1e7}, 3, quiet_s=REFUSED_S + 2.0) == pytest.approx(0.0)
