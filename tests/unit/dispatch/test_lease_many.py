"""Several leases in one go: where they go, how many there are, and before whom. Time is a number."""

from collections import Counter

import pytest

from dispatch.types import Ask
from tests.unit.dispatch.test_loadbalancer import bench, full, hold, instance


def test_as_many_as_idle_instances_take_one_each() -> None:
    b = bench(*(instance(i) for i in range(1, 33)))
    leases = b.balancer.lease_many(Ask(100.0), 32, b.now)
    assert Counter(x.instance_id for x in leases) == Counter(range(1, 33))


def test_they_go_to_unequal_machines_by_their_speed() -> None:
    b = bench(instance(1, hold_s=100.0), instance(2, throughput=300.0, hold_s=100.0))
    leases = b.balancer.lease_many(Ask(10.0), 64, b.now)
    assert Counter(x.instance_id for x in leases) == {1: 16, 2: 48}
    assert [b.work(1), b.work(2)] == pytest.approx([160.0, 480.0])


def test_what_instances_have_already_counts() -> None:
    b = bench(instance(1), instance(2))
    b.lease(300.0, avoid=(2,))
    leases = b.balancer.lease_many(Ask(100.0), 5, b.now)
    assert Counter(x.instance_id for x in leases) == {1: 1, 2: 4}


def test_no_instance_is_given_more_than_it_may_hold_or_read() -> None:
    b = bench(instance(1), instance(2))
    assert len(b.balancer.lease_many(Ask(100.0), 64, b.now)) == 20
    assert b.balancer.lease_many(Ask(100.0), 64, b.now) == []
    b = bench(instance(1, hold_s=100.0))
    leases = b.balancer.lease_many(Ask(110.0, prompt_tokens=1000), 64, b.now)
    assert len(leases) == 2, "a second of prompts and one more"


def test_one_request_of_any_size_fits_an_idle_instance() -> None:
    b = bench(instance(1), instance(2))
    assert len(b.balancer.lease_many(Ask(50_000.0), 64, b.now)) == 2


def test_a_batch_does_not_overtake_who_waits() -> None:
    b, _ = full()
    hold(b, 600.0)
    b.now += 1.0
    assert b.balancer.grant(b.now) == []
    assert b.balancer.lease_many(Ask(10.0), 5, b.now) == []
    assert len(b.balancer.lease_many(Ask(10.0, priority=0), 5, b.now)) == 5, "but a higher class may"


def test_each_token_is_leased_once_and_an_unused_batch_goes_back() -> None:
    b = bench(instance(1, throughput=1e6), instance(2, throughput=1e6))
    leases = [x for _ in range(10) for x in b.balancer.lease_many(Ask(1.0), 64, b.now)]
    assert len({x.token for x in leases}) == 640
    for lease in leases:
        assert b.balancer.done(lease.request_id, "unused", b.now)
    assert [b.row(i)["unfinished"] for i in (1, 2)] == [0, 0]
    assert sum(int(str(b.row(i)["tokens_in_stock"])) for i in (1, 2)) == 800


def test_a_batch_of_many_with_nothing_hot_is_none() -> None:
    assert bench().balancer.lease_many(Ask(1.0), 64, 0.0) == []
