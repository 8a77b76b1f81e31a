"""Which hot set is the present one, and what stays when it changes. Time is a number."""

import msgspec

from tests.dispatch_world import instance, world
from tests.messages import request_end


def test_an_older_version_of_the_hot_set_is_ignored() -> None:
    b = world(instance(1))
    b.hot(instance(1), instance(2))
    assert not b.hot_set("epoch1", 1)
    assert b.balancer.instances.hot == 2


def test_a_restarted_autoscaler_is_believed_and_its_predecessor_no_more() -> None:
    b = world(instance(1))
    assert b.hot_set("epoch2", 1, instance(2))
    assert not b.hot_set("epoch1", 99)
    assert b.balancer.instances.hot == 1


def test_what_stays_in_the_hot_set_keeps_tokens_and_leases() -> None:
    b = world(instance(1))
    b.lease(700.0)
    stock = b.row(1)["tokens_in_stock"]
    b.hot_without_tokens(instance(1), instance(2))
    assert (b.row(1)["tokens_in_stock"], b.row(1)["unfinished"]) == (stock, 1)


def test_a_draining_instance_keeps_its_leases_and_gets_none() -> None:
    b = world(instance(1))
    lease = b.lease()
    b.hot(instance(1, draining=True))
    assert b.ask(1.0) is None
    assert b.balancer.instances.hot == 0
    assert b.balancer.usage(b.now).instances[1].unfinished == 1
    b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id),))
    assert b.balancer.usage(b.now).instances[1].unfinished == 0


def test_an_instance_that_need_not_drain_after_all_serves_again() -> None:
    b = world(instance(1, draining=True))
    assert b.ask() is None
    b.hot(instance(1))
    assert b.lease()


def test_an_instance_that_left_takes_its_leases_and_its_work_with_it() -> None:
    b = world(instance(1), instance(2))
    leases = [b.lease(500.0), b.lease(500.0)]
    b.hot(instance(2))
    assert b.balancer.usage(b.now).instances.keys() == {2}
    assert [b.end(x) for x in leases].count(True) == 1
    assert b.lease().instance_id == 2


def test_an_instance_at_another_address_is_another_one() -> None:
    b = world(instance(1))
    b.lease()
    moved = msgspec.structs.replace(
        instance(1), address="http://10.0.0.9:8000", auth_url="http://10.0.0.9:3000"
    )
    b.hot_without_tokens(moved)
    assert (b.row(1)["tokens_in_stock"], b.row(1)["unfinished"]) == (0, 0)
    b.refill()
    assert b.lease().address == "http://10.0.0.9:8000"
