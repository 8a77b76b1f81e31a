"""The policy with one knob: its rule by hand, its pool, and what it makes of bad luck."""

import math
from typing import Any

import pytest

from policies import BIN_S, Capacity, FleetSnapshot, Objective, Traffic
from policies.objective import default_k

CAPACITY = Capacity(100.0, 1.0, 10.0, 1e6)


def seen(arriving: list[float], held_work: float = 0.0, **more: Any) -> FleetSnapshot:
    fields: dict[str, Any] = {"hot": 1, "coming": 0, "loading": 0, "cold": 9, "draining": 0}
    fields |= {"start_time_s": 90.0, "load_time_s": 600.0, "capacity": CAPACITY, **more}
    return FleetSnapshot(
        now=1000.0, demand=(), arriving=arriving, traffic=Traffic(held_work=held_work), **fields
    )


STEADY = [200.0] * 2000


def test_a_steady_load_needs_k_times_what_it_fills() -> None:
    assert Objective(k=1.2).targets(seen(STEADY)).hot == 3  # 2.4
    assert Objective(k=1.5).targets(seen(STEADY)).hot == 3  # 3.0, and not 4 for an error of addition
    assert Objective(k=2.0).targets(seen(STEADY)).hot == 4


def test_a_backlog_adds_what_clears_it_and_orders_nothing_that_must_load() -> None:
    policy = Objective(k=1.0, drain_s=40.0)
    assert policy.targets(seen(STEADY, held_work=8000.0)).hot == 4  # 2 + 8000 / (100 * 40)
    few = policy.targets(seen(STEADY, held_work=80_000.0, cold=2))
    assert few.hot == 3, "all that are loaded"
    assert few.total == 3


def test_a_rise_is_followed_fast_and_a_lull_slowly() -> None:
    policy = Objective(k=1.0, fast_s=60.0, slow_s=1800.0, slow_share=0.8, hold_s=0.0)
    rise = [100.0] * 400 + [500.0] * 60  # five minutes
    lull = [500.0] * 400 + [0.0] * 60
    assert policy.targets(seen(rise)).hot == 5
    fall = policy.targets(seen(lull)).hot
    assert fall == math.ceil(0.8 * 5.0 * math.exp(-300.0 / 1800.0)), "the slow mean keeps the most of it"


def test_a_need_is_kept_for_as_long_as_it_says() -> None:
    spike = [0.0] * 400 + [1000.0] * 6 + [0.0] * 10  # half a minute, 50 s ago
    held = Objective(k=1.0, fast_s=15.0, slow_s=15.0, hold_s=60.0).targets(seen(spike)).hot
    forgotten = Objective(k=1.0, fast_s=15.0, slow_s=15.0, hold_s=0.0).targets(seen(spike)).hot
    assert held == 9
    assert forgotten == 1


def test_without_load_or_capacity_the_least_is_kept() -> None:
    assert Objective(min_hot=2).targets(seen([])).hot == 2
    assert Objective(min_hot=0).targets(seen([], capacity=None)).hot == 0


def test_the_pool_grows_at_any_time_and_shrinks_only_when_a_replay_has_just_said_so() -> None:
    assert Objective(k=1.0, pool=12).targets(seen(STEADY)).total == 12
    assert Objective(k=1.0, pool=4).targets(seen(STEADY)).total == 10, "ten are loaded"
    assert Objective(k=1.0, pool=4, settled_at=990.0).targets(seen(STEADY)).total == 4
    assert Objective(k=1.0, pool=4, settled_at=100.0).targets(seen(STEADY)).total == 10


def test_the_same_seen_gives_the_same_answer_and_says_why() -> None:
    policy, what = Objective(k=1.5), seen(STEADY, held_work=4000.0)
    assert policy.targets(what) == policy.targets(what)
    assert "200 work/s × 1.50 / 100 = 3.00 instances" in policy.targets(what).why


@pytest.mark.parametrize(
    "wrong", [{"goal": 1.0}, {"goal": 0.2}, {"k": -1.0}, {"fast_s": 0.0}, {"pool": 1.5}, {"min_hot": -1}]
)
def test_what_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Objective(**wrong)  # type: ignore[arg-type]


def test_the_first_level_follows_from_the_goal() -> None:
    assert default_k(0.99) == pytest.approx(2.0)
    assert default_k(0.999) == pytest.approx(3.2)
    assert 2.0 < default_k(0.995) < 3.2
    assert Objective(goal=0.999).factor == pytest.approx(3.2)


def test_times_are_divided_on_a_fast_cloud_but_means_keep_some_bins() -> None:
    fast = Objective().scaled(60.0)
    assert (fast.fast_s, fast.slow_s, fast.hold_s) == (3 * BIN_S, 30.0, 1.0)
