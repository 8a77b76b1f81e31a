"""How leases end: once, and in which ways. Time is a number."""

import pytest

from tests.dispatch_world import T0, instance, world


def test_an_instance_that_is_done_early_is_chosen_next() -> None:
    b = world(*(instance(i) for i in range(1, 31)))
    leases = [b.lease(500.0) for _ in range(30)]
    b.end(leases[17])
    assert b.lease(500.0).instance_id == leases[17].instance_id


@pytest.mark.parametrize("outcome", ["finished", "failed", "unused"])
def test_a_lease_its_client_ends_frees_its_work_once(outcome: str) -> None:
    b = world(instance(1))
    lease = b.lease(700.0)
    assert b.end(lease, outcome)
    assert not b.end(lease, outcome)
    assert b.work(1) == 0.0


def test_a_lease_belongs_to_the_client_that_was_given_it_until_it_ends() -> None:
    b = world(instance(1))
    lease = b.lease(700.0, client="mine")
    assert b.balancer.leases.belongs(lease.request_id, "mine")
    assert not b.balancer.leases.belongs(lease.request_id, "another")
    b.end(lease)
    assert not b.balancer.leases.belongs(lease.request_id, "mine")


def test_the_end_of_an_unknown_lease_changes_nothing() -> None:
    b = world(instance(1))
    assert not b.balancer.end_lease("id-unknown", "failed", b.now)
    assert b.row(1)["failures"] == 0


def test_a_lease_that_never_started_expires() -> None:
    b = world(instance(1), lease_s=60.0)
    b.lease(700.0)
    b.tick(59.0)
    assert b.row(1)["unfinished"] == 1
    b.tick(2.0)
    assert b.row(1)["unfinished"] == 0
    assert b.describe()["ends"] == {"expired": 1}


def test_a_lease_that_started_does_not_expire_until_an_hour_has_passed() -> None:
    b = world(instance(1), lease_s=60.0)
    lease = b.lease(700.0)
    b.report(1, started=(lease.request_id,), running=1)
    b.tick(3500.0)
    assert b.row(1)["unfinished"] == 1
    b.tick(110.0)
    assert b.describe()["ends"] == {"lost": 1}


def test_a_started_lease_does_not_keep_later_ones_from_expiring() -> None:
    b = world(instance(1), lease_s=60.0)
    started = b.lease(100.0)
    b.report(1, started=(started.request_id,), running=1)
    b.tick(1.0)
    b.lease(100.0)
    b.tick(61.0)
    assert b.row(1)["unfinished"] == 1


def test_a_lease_whose_end_was_lost_is_over_when_two_reports_say_that_nothing_runs() -> None:
    b = world(instance(1))
    lease = b.lease(100.0)
    b.report(1, started=(lease.request_id,), running=1)
    b.report(1, running=0)
    assert b.row(1)["unfinished"] == 1
    b.report(1, running=0)
    assert b.row(1)["unfinished"] == 0


def test_a_lease_that_started_just_now_is_not_over_because_the_figures_lag_behind_the_events() -> None:
    b = world(instance(1))
    b.report(1, running=0)
    lease = b.lease(100.0)
    b.report(1, started=(lease.request_id,), running=0)
    assert b.row(1)["unfinished"] == 1


def test_a_lease_on_its_way_is_not_over_because_nothing_runs_yet() -> None:
    b = world(instance(1))
    b.lease(100.0)
    for _ in range(5):
        b.report(1)
    assert b.row(1)["unfinished"] == 1


def test_the_expiry_told_to_the_client_is_never_after_the_token_dies() -> None:
    b = world(lease_s=60.0)
    b.hot_without_tokens(instance(1))
    b.refill(expires_in_s=30.0)
    assert b.lease().expires_at == T0 + 30.0
