"""A client that hoards leases is refused until they expire, and starves no other. Time is a number."""

from dataclasses import replace

import pytest

from dispatch.allowance import KNOWN_S, OTHERS_S, Allowance
from dispatch.lease import Lease
from dispatch.route_request import RouteRefused
from tests.dispatch_world import T0, DispatchWorld, instance, world
from tests.messages import request_end

LEASE_S = 60.0


def leases(b: DispatchWorld, client: str, most: int, work: float = 10.0) -> list[Lease]:
    """As many as that client is given, of so many that it asks for one after the other."""
    given: list[Lease] = []
    for _ in range(most):
        lease = b.ask(work, client=client)
        if lease is None:
            break
        given.append(lease)
    return given


def refused(b: DispatchWorld, client: str, work: float = 10.0) -> float | None:
    """In how many seconds a client is told to ask again that has too many unused leases; None: it has not.

    It is given a lease then, if there is room.
    """
    outcome = b.request(work, client=client)
    unused = isinstance(outcome, RouteRefused) and outcome.why == "too_many_unused"
    return outcome.retry_after_s if isinstance(outcome, RouteRefused) and unused else None


def test_who_asks_for_a_million_leases_and_uses_none_leaves_half_of_the_fleet_to_the_others() -> None:
    b = world(*(instance(i) for i in range(1, 11)), lease_s=LEASE_S)  # 10,000 work
    assert refused(b, "honest") is None
    hoarded = leases(b, "hoarder", 1_000_000)
    assert len(hoarded) == 501
    assert b.balancer.leases.allowance.refused == 1
    honest = leases(b, "honest", 300)
    assert len(honest) == 300


def test_he_is_told_to_come_again_when_his_oldest_lease_expires_and_then_may() -> None:
    b = world(instance(1), lease_s=LEASE_S)
    leases(b, "honest", 1)
    leases(b, "hoarder", 10, work=60.0)
    b.tick(20.0)
    leases(b, "honest", 1)
    after_s = refused(b, "hoarder")
    assert after_s is not None
    assert 40.0 <= after_s <= 41.0
    b.tick(after_s)
    leases(b, "honest", 1)
    assert refused(b, "hoarder") is None
    assert len(leases(b, "hoarder", 5)) == 5


def test_who_may_just_have_used_them_is_told_to_come_again_in_a_second() -> None:
    b = world(instance(1))
    leases(b, "honest", 1)
    mine = leases(b, "burst", 100)
    assert refused(b, "burst") == 1.0
    b.report(1, started=tuple(x.request_id for x in mine), running=len(mine))
    assert refused(b, "burst") is None


def test_a_client_that_is_alone_may_have_all_there_is() -> None:
    b = world(instance(1))
    assert len(leases(b, "alone", 1000)) == 100
    assert refused(b, "alone") is None
    assert refused(b, "other") is None
    assert refused(b, "alone") == 1.0, "it is not alone any more"
    b.now += OTHERS_S + 0.1
    assert refused(b, "alone") is None


@pytest.mark.parametrize("end", ["started", "ended", "unused", "failed", "expired", "rebooted", "gone"])
def test_a_lease_counts_until_it_is_used_or_over_in_any_way(end: str) -> None:
    b = world(instance(1), instance(2), lease_s=LEASE_S)
    lease = b.lease(10.0, client="c", avoid=(2,))
    assert b.balancer.leases.allowance.unused("c") == (1, 10.0)
    if end == "started":
        b.report(1, started=(lease.request_id,), running=1)
        assert b.row(1)["unfinished"] == 1
    elif end == "ended":
        b.report(1, ended=(request_end(lease.request_id),))
    elif end in ("unused", "failed"):
        b.end(lease, end)
    elif end == "expired":
        b.tick(LEASE_S + 1.0)
    elif end == "rebooted":
        b.report(1, boot_id="boot2")
    else:
        b.hot(instance(2))
    assert b.balancer.leases.allowance.unused("c") == (0, 0.0)
    assert len(b.balancer.leases.allowance) == 0, "nothing is kept of a client that has none"
    if end == "started":
        b.report(1, ended=(request_end(lease.request_id),))
        assert len(b.balancer.leases.allowance) == 0


def test_the_number_of_unused_leases_is_bounded_for_one_that_is_alone_too() -> None:
    b = world(*(instance(i, throughput=1e6) for i in range(1, 5)), max_unused=100, lease_s=LEASE_S)
    assert len(leases(b, "alone", 1000, work=1.0)) == 100
    assert refused(b, "alone") == 1.0
    b.now += KNOWN_S
    after_s = refused(b, "alone")
    assert after_s is not None
    assert after_s > 50.0


def test_a_batch_is_given_no_more_than_is_left() -> None:
    b = world(instance(1, throughput=1e6), max_unused=40)

    assert [len(b.batch(1.0, 32, client="c")) for _ in range(3)] == [32, 8, 0]


def test_clients_do_not_share_an_allowance() -> None:
    allowance = Allowance(2, LEASE_S)
    b = world(instance(1))
    one = replace(b.lease(1.0), client="a")
    allowance.given(one)
    allowance.given(one)
    assert allowance.left("a") == 0
    assert allowance.left("b") == 2
    assert allowance.asks("a", 1e9, T0) is not None
    assert allowance.asks("b", 1e9, T0) is None
