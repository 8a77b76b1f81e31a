"""How fast answers came, counted by what clients tell, with what their requests waited before."""

import pytest

from tests.dispatch_world import DispatchWorld, instance, world
from web.messages.busy import FIRST_TOKEN_BOUNDS_S, TOKEN_BOUNDS_S, WHOLE_BOUNDS_S


def told(b: DispatchWorld, first_s: float, rest_s: float, pieces: int, **ask: int) -> None:
    """Let a request be answered at that pace and its client tell of it."""
    b.refill()
    lease = b.lease(client="a", prompt_tokens=100, **ask)
    b.balancer.end_lease(lease.request_id, "finished", b.now)
    for _ in range(2):  # told twice, counted once
        b.balancer.paces.hear(lease.request_id, "a", first_s, rest_s, pieces, b.now)


def filled(bounds: tuple[float, ...], counts: tuple[int, ...]) -> dict[float, int]:
    """Upper end of each bucket that is not empty -> how many are in it."""
    return {end: n for end, n in zip((*bounds, float("inf")), counts, strict=True) if n}


def test_answers_are_counted_by_how_fast_they_came() -> None:
    b = world(instance(1, 1000.0))
    told(b, 0.25, 4.0, 101)
    told(b, 400.0, 0.0, 0)
    told(b, 0.25, 0.0, 1)
    report = b.balancer.usage(b.now).answers
    assert report is not None
    assert filled(FIRST_TOKEN_BOUNDS_S, report.first_token) == {0.3: 2, float("inf"): 1}
    assert filled(TOKEN_BOUNDS_S, report.token) == {0.04: 1}  # of one part, or of none, nothing is known
    assert filled(WHOLE_BOUNDS_S, report.whole) == {0.5: 1, 5.0: 1, 600.0: 1}
    assert report.late == 1


@pytest.mark.parametrize(("priority", "waited_s", "late"), [(0, 0.0, 0), (1, 1.5, 0), (2, 60.0, 1)])
def test_what_a_request_waited_is_part_of_its_first_token_and_each_priority_has_its_own(
    priority: int, waited_s: float, late: int
) -> None:
    b = world(instance(1, 1000.0))
    b.refill()
    lease = b.lease(client="a", prompt_tokens=100, priority=priority)
    lease.note_wait(waited_s)
    b.balancer.end_lease(lease.request_id, "finished", b.now)
    b.balancer.paces.hear(lease.request_id, "a", 0.4, 1.0, 11, b.now)
    times = b.balancer.paces.times
    assert [sum(one.counts) for one in times.first_token] == [int(n == priority) for n in range(3)]
    assert times.first_token[priority].sum_s == pytest.approx(waited_s + 0.4)
    assert times.whole[priority].sum_s == pytest.approx(waited_s + 1.4)
    assert times.late == late
