"""Deadlines on a cloud with a speedup."""

from fleet.deadlines import Deadlines
from tests.fleet_world import World


def test_deadlines_of_a_sped_up_cloud_leave_room_for_the_command_line() -> None:
    d = Deadlines.for_profile(World().fleet.profile, 1000.0)
    assert min(d.ordered_s, d.loading_s, d.starting_s, d.stopping_s) >= 20


def test_requests_are_given_their_time_to_end_on_a_sped_up_cloud_too() -> None:
    profile = World().fleet.profile
    fast, real = Deadlines.for_profile(profile, 1000.0), Deadlines.for_profile(profile)
    assert (fast.draining_s, fast.lease_s, fast.disbelief_s) == (
        real.draining_s,
        real.lease_s,
        real.disbelief_s,
    )
