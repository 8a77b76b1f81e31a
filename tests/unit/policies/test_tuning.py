"""The pool that is kept between replays, and what a replay may ask of a fleet that misses its goal."""

import pytest

from policies.tuning import MARGIN, KeptPool, Margin, worth_keeping_s


def test_a_pool_is_kept_until_its_storage_has_cost_a_load() -> None:
    keep_s = worth_keeping_s(600.0, 0.78, 0.0083)
    assert keep_s == pytest.approx(56_385.0, rel=1e-3)
    pool = KeptPool()
    found = ((0, 5), (500, 3), (999, 2), (1001, 2), (1501, 2))
    assert [pool.note(t, n, 1000.0) for t, n in found] == [5, 5, 5, 3, 2]


def test_a_fleet_that_keeps_its_goal_is_replayed_with_the_same_margin() -> None:
    margin = Margin(0.99)
    assert [margin.note(10_000, 90) for _ in range(20)] == [MARGIN] * 20


def test_one_that_misses_more_is_replayed_more_strictly_the_more_it_misses_and_the_surer_that_is() -> None:
    bad, worse = Margin(0.99), Margin(0.99)
    first = bad.note(10_000, 200)
    later = [bad.note(10_000, 200) for _ in range(20)][-1]
    much = [worse.note(10_000, 400) for _ in range(21)][-1]
    assert MARGIN > first > later > much >= 0.02
    assert later == pytest.approx(MARGIN / 8.0, rel=0.01)
    for _ in range(400):
        bad.note(10_000, 50)
    assert bad.share == MARGIN, "and it is forgiven"


def test_few_requests_prove_nothing() -> None:
    margin = Margin(0.99)
    assert margin.note(100, 100) == MARGIN
