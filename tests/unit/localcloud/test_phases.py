"""The table of phases, and that no rental leaves it."""

import pytest

from localcloud.phases import SHOWN, TRANSITIONS, IllegalPhase, Phase, cause
from tests.unit.localcloud.cloud_world import CloudWorld


def test_no_phase_can_be_left_by_an_edge_that_is_not_in_the_table() -> None:
    world = CloudWorld()
    rental = world.rent()
    world.cloud.rentals[rental].lose_slot(0.0)
    with pytest.raises(IllegalPhase, match="no way from outbid to outbid"):
        world.cloud.rentals[rental].lose_slot(0.0)
    assert world.phase(rental) is Phase.OUTBID
    for was in Phase:
        for to in set(Phase) - TRANSITIONS[was].keys():
            with pytest.raises(IllegalPhase):
                cause(was, to)
    assert set(SHOWN) == set(TRANSITIONS) == set(Phase)
