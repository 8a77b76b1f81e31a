"""A budget of a day or a month is kept, by what the ledger says, also over a restart."""

from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from fleet.budget import DAY, MONTH, Budgets, Habits, Period, Standing, bound_usd, day_of, month_of
from fleet.commands import Drain
from fleet.holds import HoldKind
from fleet.journal import BillingInterval, Entries
from fleet.limits import Limits
from fleet.outside.ledger import Ledger
from fleet.purse import Purse
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World, make_offer
from tests.unit.fleet.test_turns import Loop

MIDNIGHT = 1_796_083_200.0  # 2026-12-01 00:00 UTC


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def test_days_and_months_begin_at_midnight_by_utc() -> None:
    assert day_of(MIDNIGHT + 5.0) == (MIDNIGHT, MIDNIGHT + 86_400.0)
    assert month_of(MIDNIGHT + 5.0) == (MIDNIGHT, MIDNIGHT + 31 * 86_400.0)
    assert month_of(MIDNIGHT - 1.0) == (MIDNIGHT - 30 * 86_400.0, MIDNIGHT)


def hot_world(budget_usd: float, hours_left: float = 12.0, hot: int = 2) -> World:
    """Two hot instances of 0.4 $/h, and 0.01 stopped, so many hours before midnight."""
    at = MIDNIGHT - 3600.0 * hours_left
    w = World(limits=Limits(budget_usd_day=budget_usd), now=at - 2000.0).with_pool(hot=hot, total=hot)
    return w.tick(at - w.now).forget()


def spend(w: World, usd: float) -> World:
    """The ledger says that the day has cost so much."""
    w.fleet.settle_money({DAY: usd}, w.now)
    return w


def test_at_100_percent_hot_instances_drain_and_stop_and_nothing_more_is_ordered() -> None:
    """Requests under way are let finish: the busy one stops when its request has ended."""
    w = hot_world(10.0)
    busy = next(iter(w.contracts))
    w.busy = {busy}
    spend(w, 9.9).tick(5)
    assert [type(c) for c in w.ordered] == [Drain, Drain]
    hold = w.fleet.holds.of(HoldKind.BUDGET_DAY)
    assert hold is not None
    assert hold.stops_starts
    assert "raise --budget-usd-day" in hold.sentence
    w.tick(60)
    assert w.fleet[busy].state is State.DRAINING, "it is drained, not cut"
    w.busy = set()
    w.policy = Fixed(4, 4)
    w.tick(120)
    assert w.states() == {"cold": 2}
    assert "Create" not in w.kinds()
    assert "Start" not in w.kinds()


def test_a_used_up_budget_stays_so_until_the_day_ends_or_it_is_raised() -> None:
    """What stopping gives back is not spent again: it would start and stop the fleet in turns."""
    w = hot_world(10.0, hours_left=0.5)
    spend(w, 9.95).tick(60)
    assert w.states() == {"cold": 2}
    spend(w, 9.5).tick(60)
    assert w.states() == {"cold": 2}, "less bound than before"
    w.now = MIDNIGHT + 5.0
    spend(w, 0.01).tick(120)
    assert w.states() == {"hot": 2}
    budgets = Budgets(usd_day=10.0)
    budgets.restore([Period(DAY, *day_of(w.now), 10.0).key])
    budgets.settle({DAY: 1.0}, (), Habits(600.0, 300.0), w.now)
    assert budgets.standings[0].used_up
    raised = Budgets(usd_day=11.0)
    raised.restore(budgets.used_up)
    raised.settle({DAY: 1.0}, (), Habits(600.0, 300.0), w.now)
    assert not raised.standings[0].used_up


def test_what_cannot_be_saved_any_more_counts_before_it_is_spent() -> None:
    """Two hot ones: 12 h of storage, and the longest drain of 300 s at what running costs more."""
    w = hot_world(10.0)
    bound = bound_usd(w.fleet, 12 * 3600.0, Habits(600.0, 300.0), w.now)
    assert bound == pytest.approx(2 * (0.01 * 12 + 0.39 * 300 / 3600))
    spend(w, 10.0 - bound - 0.01)
    assert not w.fleet.money.budgets.standings[0].used_up
    spend(w, 10.0 - bound + 0.01)
    assert w.fleet.money.budgets.standings[0].used_up


def test_at_80_percent_people_are_told_and_a_create_must_fit_until_the_end() -> None:
    w = hot_world(100.0)
    assert spend(w, 79.0).fleet.money.warnings() == {}
    (said,) = spend(w, 81.0).fleet.money.warnings().values()
    assert "81% of the day's budget is used" in said
    w.policy = Fixed(3, 3)
    w.tick(30)
    assert "Create" in w.kinds(), "81 + 12 h of 0.8 and 0.4 $/h is under 100"
    other = hot_world(100.0)
    spend(other, 90.0)
    other.policy = Fixed(3, 3)
    other.tick(30)
    assert "Create" not in other.kinds(), "90 + 9.6 are spent anyway; the third would be 4.8 more"
    notes = other.fleet.decide(other.demand, other.policy, other.now).notes
    assert any("the day would cost $104" in n for n in notes), notes
    assert other.states() == {"hot": 2}, "what runs goes on"


def standing(limit_usd: float, spent_usd: float, left_h: float = 10.0) -> Standing:
    """A budget of a day, nothing bound and nothing running."""
    return Standing(Period(DAY, 0.0, 86_400.0, limit_usd), spent_usd, 0.0, 0.0, left_h * 3600.0, False)


def test_a_create_reserves_its_download_and_its_load_in_the_budget() -> None:
    """22.4 GB at $0.02 are $0.448: more than an hour of the machine."""
    offer = replace(make_offer(1), inet_down_usd_gb=0.02)
    purse = Purse((standing(10.0, 0.0),), download_gb=22.4, load_s=600.0)
    cost = purse.cost_of(offer)
    assert astuple(cost) == pytest.approx((0.448, 0.4, 0.01, 600.0))
    needs = 0.448 + 600 * 0.4 / 3600 + (36_000 - 600) * 0.01 / 3600
    assert cost.until_loaded_usd(36_000.0) == pytest.approx(needs)
    tight = Purse((standing(1.0, 1.0 - needs + 0.01),), download_gb=22.4, load_s=600.0)
    refusal = tight.refusal(cost, 0.4)
    assert refusal is not None
    assert f"${needs:.2f} are needed" in refusal
    roomy = replace(tight, standings=(standing(10.0, 0.0),))
    assert roomy.refusal(cost, 0.4) is None
    assert roomy.refusal(cost, 0.4, [cost] * 25) is not None, "those of the same decision count, too"


def test_the_budget_of_a_month_is_kept_beside_that_of_a_day() -> None:
    w = World(limits=Limits(budget_usd_month=50.0)).with_pool(hot=1, total=1)
    w.fleet.settle_money({MONTH: 60.0}, w.now)
    w.tick(60)
    assert w.states() == {"cold": 1}
    assert w.fleet.holds.of(HoldKind.BUDGET_MONTH) is not None
    assert w.fleet.holds.of(HoldKind.BUDGET_DAY) is None


def test_the_ledger_sums_up_what_a_window_cost(ledger: Ledger) -> None:
    def interval(label: str, from_s: float, usd_h: float) -> BillingInterval:
        return BillingInterval(label, 1, 1, "hot", from_s, None, usd_h, usd_h, "")

    ledger.write(Entries([interval("a", 0.0, 3.6), interval("a", 1000.0, 7.2), interval("b", 500.0, 36.0)]))
    assert ledger.spent(900.0, 1100.0) == pytest.approx(0.1 + 0.2 + 2.0)
    assert ledger.spent(900.0, 1100.0) == pytest.approx(ledger.costs(900.0, 1100.0).total)
    assert ledger.spent(5000.0, 5000.0) == 0.0


def test_a_used_up_budget_survives_a_restart(ledger: Ledger) -> None:
    """The ledger keeps it: the next process starts nothing before the next day."""
    w = World(limits=Limits(budget_usd_day=0.5)).with_pool(hot=1, total=1)
    first = Loop(ledger, w, Fixed(1, 1))
    first.scaler.turn()
    ledger.write(Entries([BillingInterval("fleet/old", 7, 7, "hot", w.now - 900.0, None, 4.0, 4.0, "dear")]))
    ledger.write(Entries([BillingInterval("fleet/old", 7, 7, "gone", w.now, None, 0.0, 0.0, "")]))
    w.now += 5.0
    first.scaler.turn()
    assert first.scaler.instances.money.budgets.standings[0].used_up
    w.now += 5.0
    again = Loop(ledger, w, Fixed(1, 1))
    decision = again.scaler.turn()
    assert not decision.commands or {type(c).__name__ for c in decision.commands} <= {"Drain", "Stop"}
    assert again.scaler.instances.holds.of(HoldKind.BUDGET_DAY) is not None
