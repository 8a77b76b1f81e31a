"""How long starts and loads take, as measured."""

import pytest

from fleet.journal import SavedFleet
from tests.fleet_world import World


def test_the_range_of_start_times_is_that_of_the_measured_ones() -> None:
    fleet = World().new_set()
    assert fleet.durations.start_range_s == pytest.approx((60.0, 120.0)), (
        "90 s by the profile, a third less and more"
    )
    fleet.restore(SavedFleet(start_times_s=[80.0, 130.0, 70.0], load_times_s=[500.0]), 0.0)
    assert fleet.durations.start_range_s == (70.0, 130.0)
    assert (fleet.durations.start_s, fleet.durations.load_s) == (80.0, 500.0)
