"""The plain policy, sentence by sentence."""

import pytest

from policies import POLICIES, Busy, Fixed, FleetSnapshot, Targets, make_policy
from process.errors import ConfigError


def seen(
    demand: list[float], *, hot: int = 1, coming: int = 0, cold: int = 0, step_s: float = 5.0
) -> FleetSnapshot:
    """A fleet whose demand was that, oldest first, one value every step_s, the last one now."""
    now = 10_000.0
    series = [(now - (len(demand) - 1 - n) * step_s, d) for n, d in enumerate(demand)]
    return FleetSnapshot(now, series, hot, coming, 0, cold, 0, 90.0, 600.0)


BUSY = Busy(add_above=0.8, aim=0.7, remove_below=0.6, remove_after_s=60.0, min_hot=1, spare=1)


@pytest.mark.parametrize(
    ("demand", "hot", "coming", "wanted"),
    [
        (0.0, 1, 0, 1),  # idle, at the minimum
        (0.79, 1, 0, 1),  # under the threshold
        (0.81, 1, 0, 2),  # over it: 0.81/0.7 -> 2
        (3.5, 1, 0, 5),  # a jump is met at once
        (0.81, 1, 1, 2),  # what is coming counts
        (1.7, 1, 1, 3),
        (0.0, 0, 0, 1),  # the minimum is kept
    ],
)
def test_it_adds_when_the_busy_share_is_above_the_threshold(
    demand: float, hot: int, coming: int, wanted: int
) -> None:
    assert BUSY.targets(seen([demand], hot=hot, coming=coming)).hot == wanted


def test_it_removes_one_when_demand_was_low_for_long_enough() -> None:
    assert BUSY.targets(seen([0.5] * 14, hot=3)).hot == 2
    assert BUSY.targets(seen([0.5] * 5, hot=3)).hot == 3, "not watched for long enough"
    assert BUSY.targets(seen([0.5] * 6 + [1.3] + [0.5] * 7, hot=3)).hot == 3, "a peak inside the window"
    assert BUSY.targets(seen([1.3] + [0.5] * 13, hot=3)).hot == 2, "a peak before the window"


def test_between_the_thresholds_nothing_moves() -> None:
    for demand in (1.25, 1.4, 1.59):
        assert BUSY.targets(seen([demand] * 20, hot=2)).hot == 2


def test_after_growing_it_does_not_shrink_at_the_same_demand() -> None:
    """For every demand, the size it grows to is one it would keep: no flapping."""
    for tenths in range(200):
        demand = tenths / 10
        hot = BUSY.targets(seen([demand] * 20, hot=1)).hot
        assert BUSY.targets(seen([demand] * 20, hot=hot)).hot == hot


def test_with_a_minimum_of_none_it_scales_to_zero_and_back() -> None:
    none = Busy(min_hot=0, remove_after_s=60.0)
    assert none.targets(seen([0.0] * 20, hot=1)).hot == 0
    assert none.targets(seen([0.0] * 20, hot=0)).hot == 0
    assert none.targets(seen([0.01], hot=0)).hot == 1


def test_it_never_destroys_the_loaded_pool_and_keeps_a_spare() -> None:
    assert BUSY.targets(seen([0.0] * 20, hot=1, cold=4)).total == 5
    assert BUSY.targets(seen([0.0], hot=1)).total == 2


def test_scaled_divides_the_waiting_time_but_not_under_ten_seconds() -> None:
    assert Busy(remove_after_s=300).scaled(10).remove_after_s == 30
    assert Busy(remove_after_s=300).scaled(1000).remove_after_s == 10


def test_a_fixed_fleet_is_fixed() -> None:
    assert Fixed(2, 5).targets(seen([9.0])) == Targets(2, 5, "fixed at 2 hot, 5 in all")
    assert Fixed(3, 1).targets(seen([9.0])).total == 3


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_that_is_not_told_a_total_destroys_nothing_that_is_loaded(name: str) -> None:
    """`PUT /policy {"name": "fixed", "params": {"hot": 1}}` destroyed all but one."""
    for params in ({}, {"hot": 1} if name == "fixed" else {"min_hot": 1}):
        made = make_policy(POLICIES, name, params)
        assert made.targets(seen([0.0] * 99, hot=2, coming=1, cold=4)).total == 7


def test_a_fixed_total_is_a_whole_number() -> None:
    assert make_policy(POLICIES, "fixed", {"hot": 1.0, "total": 2.0}) == Fixed(1, 2)
    with pytest.raises(ConfigError, match=r"total 2\.5: wanted a whole number"):
        make_policy(POLICIES, "fixed", {"total": 2.5})


@pytest.mark.parametrize("wrong", [{"aim": 0.0}, {"aim": 0.9}, {"remove_below": 0.9}, {"add_above": 0.0}])
def test_parameters_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    """An aim of 0 would divide by it at every turn; removing above the adding threshold never rests."""
    with pytest.raises(ValueError, match="wanted"):
        Busy(**wrong)  # type: ignore[arg-type]
