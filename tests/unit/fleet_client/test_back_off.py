"""Pauses after failures."""

import pytest

from fleet_client.back_off import back_off_s


@pytest.mark.parametrize(
    ("failures", "pause_s"),
    [(0, 0.0), (1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (100, 5.0), (10**9, 5.0)],
)
def test_each_pause_is_twice_the_one_before_up_to_the_longest(failures: int, pause_s: float) -> None:
    assert back_off_s(failures, 0.5, 5.0) == pause_s


def test_a_first_pause_above_the_longest_is_cut() -> None:
    assert back_off_s(1, 30.0, 10.0) == 10.0
