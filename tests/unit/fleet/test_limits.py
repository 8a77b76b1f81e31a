"""The hard limits hold, whatever is asked for and whatever the listing shows."""

from dataclasses import replace

import pytest

from fleet.commands import Start
from fleet.journal import SavedFleet
from fleet.limits import Commitment, Limits
from policies import Fixed
from tests.fleet_world import World


def test_the_dollar_limit_holds_and_its_refusal_can_be_read() -> None:
    w = World(policy=Fixed(5, 5), limits=Limits(max_instances=9, max_usd_h=1.0)).tick(900)
    assert len(w.contracts) == 2  # 0.4 $/h each
    notes = w.fleet.decide(w.demand, w.policy, w.now).notes
    assert any("create refused" in n and "is over 1" in n for n in notes)


def test_a_start_that_would_break_the_dollar_limit_is_refused() -> None:
    w = World(limits=Limits(max_instances=9, max_usd_h=10)).with_pool(hot=1, total=3)
    w.limits = Limits(max_instances=9, max_usd_h=0.9)
    w.restart()
    w.policy = Fixed(3, 3)
    w.tick(120)
    assert w.states() == {"hot": 2, "cold": 1}


def test_an_instance_that_vanished_still_counts_against_the_limits_for_a_while() -> None:
    """A listing that loses rows must not make us rent twice (invariant 6)."""
    w = World(limits=Limits(max_instances=3, max_usd_h=10)).with_pool(hot=3, total=3)
    hidden = next(iter(w.contracts.values()))
    hidden.hidden = True
    w.tick(w.deadlines.vanished_s - 10)
    assert "Create" not in w.kinds()
    hidden.hidden = False
    w.tick(60)
    assert w.states() == {"hot": 3}


def test_after_a_restart_an_order_not_yet_listed_still_costs_what_was_agreed() -> None:
    w = World(policy=Fixed(1, 1), limits=Limits(max_instances=9, max_usd_h=1.0)).tick(10)
    for c in w.contracts.values():
        c.hidden = True
    held = w.saved().instances
    assert [r.state for r in held] == ["ordered"] or [r.state for r in held] == ["loading"]
    w.restart(SavedFleet([replace(held[0], state="ordered")]))
    assert w.fleet.committed().usd_h == pytest.approx(0.4)


def test_what_vanished_counts_against_the_limits_after_a_restart_too() -> None:
    w = World()
    w.fleet.restore(SavedFleet(vanished={"fleet/x": (w.now + 100, 0.7)}), w.now)
    assert w.fleet.committed() == Commitment(1, 0.7)
    w.policy = Fixed(0, 0)
    w.tick(110)
    assert w.fleet.committed().instances == 0


def test_a_start_is_no_new_instance_for_the_limit() -> None:
    w = World().with_pool(hot=0, total=3)
    w.limits = Limits(max_instances=2, max_usd_h=10)
    w.restart().fleet.observe(w.listing(), (), w.now)
    commands = w.fleet.decide(w.demand, Fixed(1, 3), w.now).commands
    assert [type(c) for c in commands if isinstance(c, Start)] == [Start]


def test_a_failed_order_that_was_never_listed_counts_with_its_price() -> None:
    w = World(policy=Fixed(1, 1), pages_work=False).tick(10)
    (c,) = w.contracts.values()
    c.hidden = True
    w.fleet.set_manage(False)
    w.tick(w.deadlines.ordered_s + 10)
    assert w.states() == {"failed": 1}
    assert w.fleet.committed().usd_h == pytest.approx(c.usd_h)
