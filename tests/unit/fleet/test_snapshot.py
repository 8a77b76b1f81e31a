"""What a policy sees."""

from fleet.demand import Demand
from fleet.states import State
from policies import Capacity, Fixed, FleetSnapshot, Targets
from tests.fleet_world import World
from tests.messages import busy_report


def said(world: World, at: float, requests: int) -> None:
    """A loadbalancer has counted so many requests of 500 tokens to read and 150 to answer."""
    world.demand.add_report(
        busy_report(
            arrivals=requests,
            arrived_work=200.0 * requests,
            prompt_tokens=500 * requests,
            output_tokens=150.0 * requests,
        ),
        at,
    )


def test_the_capacity_is_that_of_the_median_hot_instance_with_the_requests_there_are() -> None:
    w = World(loadbalancer=False).with_pool(hot=3, total=5)
    w.measure(900.0, 1000.0, 5000.0, state=State.HOT)
    said(w, w.now - 1.0, 0)
    said(w, w.now, 10)
    seen = w.fleet.snapshot(w.demand, w.now)
    # 200 work each, held for 6 s; an answer of 150 tokens is half there.
    assert seen.capacity == Capacity(1000.0, 5.0, 30.0, 30.0 * 575.0)
    assert seen.traffic.requests_total == 10
    assert list(seen.arriving) == []
    assert (seen.hot, seen.cold) == (3, 2)


def test_with_nothing_hot_the_capacity_is_that_of_what_is_loaded_and_then_the_profiles() -> None:
    w = World().with_pool(hot=0, total=2)
    w.measure(700.0, 700.0)
    capacity = w.fleet.snapshot(w.demand, w.now).capacity
    assert capacity is not None
    assert capacity.work_s == 700.0
    assert World().fleet.snapshot(Demand("e"), 0.0).capacity == Capacity(
        620.0, 620.0 / 210.0, 620.0 * 6.0 / 210.0, 620.0 * 6.0 / 210.0 * 390.0
    ), "300 tokens to read and 180 to answer, until something has arrived"


def test_prices_are_those_of_the_median_instance() -> None:
    w = World().with_pool(hot=1, total=3)
    w.reprice(0.3, 0.5, 9.0)
    seen = w.fleet.snapshot(w.demand, w.now)
    assert (seen.running_usd_h, seen.stopped_usd_h) == (0.5, 0.01)
    empty = World().fleet.snapshot(Demand("e"), 0.0)
    assert (empty.running_usd_h, empty.stopped_usd_h) == (0.0, 0.0)


class LooksBack(Fixed):
    """Remembers what it was shown; looks back for a minute."""

    seen: FleetSnapshot

    @property
    def memory_s(self) -> float:
        return 60.0

    def targets(self, seen: FleetSnapshot) -> Targets:
        object.__setattr__(self, "seen", seen)
        return super().targets(seen)


def test_a_policy_sees_as_far_back_as_it_looks() -> None:
    w = World()
    w.policy = policy = LooksBack(0, 0)
    w.demand.add_report(busy_report(), w.now)
    w.tick(300.0)
    seen = policy.seen
    assert [t for t, _ in seen.demand] == [w.now - 60.0 + 5.0 * n for n in range(13)]
    assert len(seen.arriving) == 12
