"""A client that hoards leases is refused until they expire, and starves no other. Time is a number."""

from dataclasses import replace

import pytest

from dispatch.allowance import KNOWN_S, OTHERS_S, REST_S, Allowance
from dispatch.lease import Lease
from dispatch.route_request import RouteRefused
from engine.step_time_constants import TIMINGS
from tests.dispatch_world import T0, DispatchWorld, instance, world
from tests.messages import request_end

LEASE_S = 60.0

PLACES = 96
"""Requests that an instance of known step times may run at once."""


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
    assert len(hoarded) == 500
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
    assert b.balancer.leases.allowance.unused("c") == (1, 0.01)
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
    assert allowance.fit("a", 0.1, 1, T0) == 0
    assert allowance.fit("b", 0.1, 1, T0) == 2
    assert allowance.asks("a", 1, T0) is not None
    assert allowance.asks("b", 1, T0) is None


# -- whatever their work ---------------------------------------------------------------------------------


def timed(places: int = PLACES, instances: int = 2) -> DispatchWorld:
    """Instances of known step times: room there is a place for a request, and memory."""
    told = replace(TIMINGS["13B", "awq4", "A100 SXM4", 1], max_seqs=places)
    return world(*(instance(i, 1000.0, timing=told) for i in range(1, instances + 1)), lease_s=LEASE_S)


def test_tiny_leases_that_are_never_used_starve_nobody() -> None:
    """Two batches of 64 a second, of almost no work, had all places: 8 of 179 requests were served."""
    b = timed()
    served = refusals = 0
    running: list[tuple[float, Lease]] = []
    for n in range(600):
        b.now += 0.1
        if n % 5 == 0:
            b.batch(0.001, 64, client="hoarder")
            leases(b, "hoarder", 64, work=0.001)
        if n >= 3 and n % 3 == 0:
            lease = b.ask(100.0, client="victim")
            served, refusals = served + (lease is not None), refusals + (lease is None)
            running += [(b.now + 2.0, lease)] if lease is not None else []
        for id in (1, 2):
            here = [(at, x) for at, x in running if x.instance_id == id]
            ended = tuple(request_end(x.request_id) for at, x in here if at <= b.now)
            started = tuple(x.request_id for _, x in here)
            b.report(id, started=started, ended=ended, running=len(here) - len(ended))
        running = [(at, x) for at, x in running if at > b.now]
        if n % 10 == 0:
            b.tick(0.0)
            b.balancer.tick(b.now)
        b.refill()
    assert (served, refusals) == (199, 0)
    assert b.balancer.leases.allowance.unused("hoarder")[0] <= 128, "of when it was alone"
    assert b.balancer.usage(b.now).busy < 0.2, "what is not used is no reason for another instance"


def test_a_client_may_have_tiny_leases_for_as_many_places_as_there_are() -> None:
    b = timed()
    assert len(leases(b, "alone", 1000, work=0.001)) == 2 * PLACES


@pytest.mark.parametrize("hoarders", [1, 2, 5])
def test_however_many_hoard_each_leaves_as_much_as_it_has(hoarders: int) -> None:
    b = timed(instances=6)
    b.lease(1.0, client="victim")
    for _ in range(20):
        for n in range(hoarders):
            b.batch(0.001, 64, client=f"hoarder {n}")
    left = 6 * PLACES - len(b.unfinished)
    assert left >= 6 * PLACES // (hoarders + 2) - 64


def test_a_lease_that_does_not_start_gives_its_room_back_and_may_still_be_used() -> None:
    b = timed(instances=1)
    mine = leases(b, "ahead", 1000, work=0.001)
    assert b.ask(100.0, client="other") is None
    b.now += REST_S + 0.1
    assert b.ask(100.0, client="other") is None, "no report has said yet that they have not started"
    b.report(1)
    assert b.balancer.leases.allowance.unused("ahead")[0] == PLACES
    other = b.lease(100.0, client="other")
    assert (b.row(1)["unfinished"], b.row(1)["work"]) == (PLACES + 1, pytest.approx(100.0, abs=1.0))
    b.report(1, started=tuple(x.request_id for x in mine[:40]), running=40)
    assert b.balancer.leases.allowance.unused("ahead")[0] == PLACES - 40
    assert b.row(1)["work"] == pytest.approx(100.0 + 40 * 0.001, abs=1.0)
    b.report(1, ended=tuple(request_end(x.request_id) for x in mine[:40]))
    assert b.row(1)["unfinished"] == PLACES - 40 + 1
    b.end(other)
    b.tick(LEASE_S)
    assert (b.row(1)["unfinished"], b.work(1)) == (0, 0.0)
    assert b.describe()["ends"] == {"finished": 41, "expired": PLACES - 40}


def test_an_instance_whose_leases_all_rest_is_idle_and_may_be_given_a_request_of_any_size() -> None:
    b = world(instance(1))
    leases(b, "ahead", 5)
    b.now += REST_S + 0.1
    b.report(1)
    assert b.lease(5000.0, client="other")


def test_a_token_that_was_given_back_goes_to_nobody_else() -> None:
    """Who had it could use it, and the instance would refuse whoever came second."""
    b = world(instance(1))
    mine = b.batch(1.0, 8, client="mine")
    for lease in mine:
        assert b.end(lease, "unused")
    others = [*b.batch(1.0, 64, client="other"), b.lease(1.0, client="other")]
    tokens = {lease.token for lease in mine}
    assert not tokens & {lease.token for lease in others}
    again = [b.lease(1.0, client="mine"), *b.batch(1.0, 20, client="mine")]
    assert tokens < {lease.token for lease in again}, "for him it is as new"
    assert len({lease.token for lease in (*others, *again)}) == len(others) + len(again)


def test_a_token_that_was_given_back_is_forgotten_when_it_is_old_or_its_boot_is_over() -> None:
    for reboots in (True, False):
        b = world(instance(1))
        mine = b.lease(1.0, client="mine")
        b.end(mine, "unused")
        if reboots:
            b.boots[1] = "boot2"
            b.report(1, boot_id="boot2")
        else:
            b.tick(590.0)
        b.refill()
        assert b.lease(1.0, client="mine").token != mine.token


def test_requests_that_wait_are_given_no_more_than_their_client_may_have() -> None:
    """The hoarder has 100 requests waiting; it is given what is its share, and the others pass them."""
    b = world(instance(1), instance(2), lease_s=LEASE_S)
    full = [b.lease(1000.0, client="before") for _ in range(2)]
    b.report(1, started=tuple(x.request_id for x in full if x.instance_id == 1), running=1)
    b.report(2, started=tuple(x.request_id for x in full if x.instance_id == 2), running=1)
    mine = [b.hold(100.0, client="hoarder") for _ in range(30)]
    b.hold(100.0, client="other")
    for lease in full:
        b.end(lease)
    served = [queued.ask.client for queued, _ in b.grant()]
    assert served.count("hoarder") == 10, "half of the room of two"
    assert served.count("other") == 1
    assert b.ask(100.0, client="other"), "what comes passes them, too"
    refused = b.balancer.time_out(mine[-1], b.now)
    assert refused.why == "too_many_unused"
    assert b.balancer.describe(b.now)["refused"] == 0, "that is no demand"


def test_the_requests_of_one_client_that_wait_do_not_keep_another_waiting() -> None:
    b = world(instance(1), lease_s=LEASE_S)
    full = b.lease(1000.0, client="before")
    b.report(1, started=(full.request_id,), running=1)
    many = [b.hold(100.0, client="many") for _ in range(80)]
    few = b.hold(100.0, client="few")
    assert many[-1].late, "8 s of work are ahead of it"
    assert not few.late
    b.end(full)
    assert few in b.served()[:2]
