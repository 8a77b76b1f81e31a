"""Tokens are fetched before they run out, leased once, and lost with a reboot. Time is a number."""

import pytest

from dispatch.token_refills import REFILL_LOW
from dispatch.token_stock import STOCK_LEAST
from tests.dispatch_world import instance, world


def test_no_token_is_leased_twice() -> None:
    b = world(instance(1, throughput=1e6))
    tokens = []
    for _ in range(500):
        tokens.append(b.lease(1.0).token)
        b.refill()
    assert len(set(tokens)) == 500


def test_an_unused_token_goes_back_and_is_leased_again() -> None:
    b = world(instance(1))
    lease = b.lease()
    b.end(lease, "unused")
    assert b.lease().token == lease.token


def test_a_token_that_was_taken_does_not_go_back_whatever_its_client_says() -> None:
    b = world(instance(1))
    lease = b.lease()
    b.report(1, started=(lease.request_id,), running=1)
    b.end(lease, "unused")
    assert all(b.lease(1.0).token != lease.token for _ in range(60))


def test_an_instance_that_gives_a_token_twice_does_not_get_two_leases_for_it() -> None:
    b = world()
    b.hot_without_tokens(instance(1))
    (refill,) = b.balancer.refills(b.now)
    b.give_tokens(refill, ["same", "same", "other"])
    assert {b.lease(1.0).token, b.lease(1.0).token} == {"same", "other"}
    assert b.ask(1.0) is None
    assert b.work(1) == pytest.approx(2.0)


def test_an_instance_without_tokens_is_not_chosen_and_the_others_are() -> None:
    b = world()
    b.hot_without_tokens(instance(1), instance(2))
    refills = {r.instance_id: r for r in b.balancer.refills(b.now)}
    b.give_tokens(refills[2], [f"t{n}" for n in range(64)])
    b.fail_refill(refills[1])
    assert {b.lease(10.0).instance_id for _ in range(20)} == {2}


def test_a_failed_refill_is_repeated_after_a_pause_that_doubles() -> None:
    b = world()
    b.hot_without_tokens(instance(1))
    pauses: list[float] = []
    last = b.now
    while len(pauses) < 5:
        for refill in b.balancer.refills(b.now):
            pauses.append(round(b.now - last, 2))
            last = b.now
            b.fail_refill(refill)
        b.now += 0.01
    assert pauses == pytest.approx([0.0, 0.25, 0.5, 1.0, 2.0], abs=0.03)


def test_only_one_refill_of_an_instance_is_under_way() -> None:
    b = world()
    b.hot_without_tokens(instance(1))
    assert len(b.balancer.refills(b.now)) == 1
    b.tick(5.0)
    assert b.balancer.refills(b.now) == []


def test_the_stock_is_refilled_before_it_is_empty_and_grows_with_use() -> None:
    b = world(instance(1, throughput=1e6))
    least = STOCK_LEAST
    for _ in range(4000):
        b.now += 0.005
        b.lease(1.0)
        b.refill()
        least = min(least, b.row(1)["tokens_in_stock"])
    assert least >= 20
    assert b.row(1)["tokens_in_stock"] > 500


def test_an_instance_that_is_not_used_any_more_gets_the_least_stock_again() -> None:
    b = world(instance(1, throughput=1e6))
    for _ in range(4000):
        b.now += 0.005
        b.lease(1.0)
        b.refill()
    for _ in range(3):
        b.tick(430.0)
        b.refill()
    b.tick(500.0)
    assert sum(r.count for r in b.refill()) == STOCK_LEAST


def test_an_idle_instance_is_given_new_tokens_before_the_old_ones_are_too_old() -> None:
    b = world(instance(1))
    for _ in range(2000):
        b.tick(1.0)
        b.refill()
        assert b.row(1)["tokens_in_stock"] > 0
    assert b.lease()


def test_tokens_are_not_leased_near_the_end_of_their_life() -> None:
    b = world(instance(1))
    b.tick(0.79 * 600.0)
    assert b.lease()
    b.tick(0.02 * 600.0)
    assert b.ask() is None


@pytest.mark.parametrize(("tokens", "expires_in_s"), [([], 600.0), (["t1"], 0.0), (["t1"], -5.0)])
def test_a_batch_that_is_of_no_use_counts_as_a_failed_refill(tokens: list[str], expires_in_s: float) -> None:
    b = world()
    b.hot_without_tokens(instance(1))
    (refill,) = b.balancer.refills(b.now)
    b.give_tokens(refill, tokens, expires_in_s)
    assert b.balancer.refills(b.now) == []
    assert b.row(1)["failures"] == 1


def test_a_thousand_instances_that_run_low_together_are_not_refilled_together() -> None:
    b = world(*(instance(i) for i in range(1, 201)))
    for _ in range(200 * 40):
        b.lease(1.0)
    assert len(b.balancer.refills(b.now)) <= REFILL_LOW


def test_a_reboot_takes_tokens_and_requests_with_it() -> None:
    b = world(instance(1))
    b.lease(700.0)
    b.report(1, boot_id="boot2")
    assert b.row(1)["unfinished"] == 0
    assert b.ask() is None
    b.boots[1] = "boot2"
    b.refill()
    assert b.lease()


def test_a_reboot_seen_in_a_token_batch_is_one_too() -> None:
    b = world(instance(1))
    old = [b.lease(1.0) for _ in range(STOCK_LEAST // 2 + 8)]  # enough that tokens are fetched again
    b.boots[1] = "boot2"
    b.refill()
    assert b.row(1)["unfinished"] == 0
    assert b.lease().token not in {x.token for x in old}
    assert b.describe()["ends"] == {"lost": len(old)}


def test_tokens_for_an_instance_that_has_left_are_dropped() -> None:
    b = world()
    b.hot_without_tokens(instance(1))
    (refill,) = b.balancer.refills(b.now)
    b.hot_without_tokens()
    b.give_tokens(refill, ["t1"])
    b.fail_refill(refill)
    assert b.ask() is None
