"""What the autoscaler is told of the traffic. Time is a number."""

import pytest

from tests.dispatch_world import full, instance, world


def test_busy_is_the_work_in_instances_worth_of_capacity() -> None:
    b = world(instance(1), instance(2, throughput=300.0))
    b.lease(500.0, avoid=(2,))
    b.lease(1500.0, avoid=(1,))
    usage = b.balancer.usage(b.now)
    assert [usage.busy, usage.demand] == pytest.approx([1.0, 1.0])


def test_demand_has_no_cap_and_counts_who_waits_and_who_was_refused() -> None:
    b, _ = full()
    b.hold(500.0)
    b.refused(700.0)
    usage = b.balancer.usage(b.now)
    assert [usage.busy, usage.demand] == pytest.approx([1.0, 2.2])
    assert (usage.held, usage.held_work) == (1, 500.0)


def test_what_was_refused_is_demand_for_ten_seconds() -> None:
    b = world()
    b.refused(700.0)
    b.now += 9.0
    assert b.balancer.usage(b.now).demand > 0.0
    b.now += 3.0
    assert b.balancer.usage(b.now).demand == 0.0


def test_one_refused_request_is_demand_on_a_fleet_that_was_never_hot() -> None:
    b = world()
    assert b.balancer.usage(b.now).demand == 0.0
    b.refused(b.balancer.work_of(100, None))
    assert 0.0 < b.balancer.usage(b.now).demand < 1.0


def test_one_request_is_demand_for_one_instance_whatever_it_says_that_it_is() -> None:
    b = world(instance(1))
    b.lease(1e7)
    usage = b.balancer.usage(b.now)
    assert (usage.busy, usage.demand, usage.arrived_work) == (1.0, 1.0, 1000.0)


def test_busy_never_exceeds_the_hot_instances_and_demand_does() -> None:
    b = world(instance(1))
    b.lease(1000.0)
    for client in ("a", "b"):
        b.hold(900.0, client=client)
    usage = b.balancer.usage(b.now)
    assert usage.busy == 1.0
    assert usage.demand == pytest.approx(2.8)


def test_working_seconds_are_those_with_a_request_under_way() -> None:
    b = world(instance(1))
    b.now += 10.0
    lease = b.lease()
    b.now += 3.0
    assert b.balancer.usage(b.now).instances[1].working_s == pytest.approx(3.0)
    second = b.lease()
    b.end(lease)
    b.now += 2.0
    b.end(second)
    b.now += 10.0
    assert b.balancer.usage(b.now).instances[1].working_s == pytest.approx(5.0)


def test_arrivals_are_counted_whatever_becomes_of_them() -> None:
    b = world(instance(1))
    b.ask(900.0)
    b.ask(900.0)
    usage = b.balancer.usage(b.now)
    assert (usage.arrivals, usage.arrived_work) == (2, 1800.0)


def test_the_autoscaler_is_told_who_waits_how_long_and_what_has_arrived() -> None:
    b, _ = full()
    first = b.hold(210.0, prompt_tokens=500)
    b.now += 1.0
    b.hold(10.0, prompt_tokens=20)
    usage = b.balancer.usage(b.now)
    assert (usage.held, usage.traffic.late, usage.traffic.in_flight) == (2, 1, 1)
    assert (usage.held_work, usage.traffic.held_prompt_tokens, usage.traffic.oldest_wait_s) == (
        220.0,
        520,
        1.0,
    )
    assert (usage.arrivals, usage.traffic.prompt_tokens) == (3, 520)
    assert usage.traffic.output_tokens == pytest.approx(1000.0 + 160.0 + 8.0)
    b.balancer.cancel(first)
    assert b.balancer.usage(b.now).traffic.oldest_wait_s == 0.0
