"""Contracts end, and hosts ask for more: neither is a surprise, and the fleet goes on serving."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.profiles import get_profile
from fleet.commands import Destroy, Drain
from fleet.contract_ends import USEFUL_LOADS, Horizon, ending
from fleet.price_increases import PriceAnswer, judge_increase
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World, make_offer
from vast.rows import PriceIncrease, Row

VLLM_13 = get_profile("vllm-13")
HORIZON = Horizon(600.0, 90.0, 300.0)


def ends(w: World, at: Callable[[str], float | None]) -> None:
    """The listing shows when contracts end, by label."""
    w.listing_hook = lambda rows: [replace(r, end_date=at(r.label or "")) for r in rows]


def test_a_hot_instance_is_replaced_before_its_contract_ends_and_serves_until_then() -> None:
    w = World().with_pool(hot=1, total=1)
    old = w.only()
    margin_s = w.fleet.horizon.margin_s
    end = w.now + margin_s + 60.0
    ends(w, lambda label: end if label == old else None)
    w.tick(50)
    assert w.kinds() == []
    w.tick(20)
    assert w.kinds() == ["Create"], "the other is rented a margin before"
    hot_through = []
    while w.fleet[old].state is State.HOT:
        w.tick()
        hot_through.append(any(i.state is State.HOT for i in w.fleet))
    assert all(hot_through)
    assert w.now < end - 60.0, "long before the end"
    (new,) = [i.label for i in w.fleet if i.state is State.HOT]
    assert new != old
    w.tick(200)
    assert old not in w.contracts, "and it is not kept with its model"
    assert w.states() == {"hot": 1}
    assert next(type(c) for c in w.ordered if getattr(c, "label", "") == old) is Drain


def test_without_another_it_drains_at_the_last_moment_and_is_not_cut() -> None:
    w = World().with_pool(hot=1, total=1)
    old = w.only()
    w.offers = []
    end = w.now + w.fleet.horizon.margin_s
    ends(w, lambda label: end)
    w.busy = {old}
    while w.fleet[old].state is State.HOT:
        w.tick()
    left_s = end - w.now
    assert w.deadlines.draining_s <= left_s <= w.deadlines.draining_s + 200.0
    w.tick(100)
    assert w.fleet[old].state is State.DRAINING


def test_a_stopped_instance_is_replaced_before_its_disk_is_deleted() -> None:
    w = World().with_pool(hot=1, total=2)
    old = w.only(State.COLD)
    end = w.now + w.fleet.horizon.margin_s
    ends(w, lambda label: end if label == old else None)
    w.tick(10)
    assert "Create" in w.kinds()
    assert "Destroy" not in w.kinds(), "it is of use until another holds the model"
    w.tick(900)
    assert old not in w.contracts
    assert w.states() == {"hot": 1, "cold": 1}
    (destroyed,) = [c for c in w.ordered if isinstance(c, Destroy)]
    assert "UTC, and another takes its place" in destroyed.why


def test_what_the_cloud_stopped_at_its_end_is_not_kept() -> None:
    w = World().with_pool(hot=1, total=1)
    old = w.only()
    w.offers = []
    ends(w, lambda label: w.now - 10.0)
    w.contracts[old].status, w.contracts[old].intended = "exited", "stopped"
    w.tick(10)
    w.fleet.note_credit(9.0, w.now)
    w.tick(20)
    assert old not in w.contracts
    assert "Start" not in w.kinds()


def test_offers_whose_contract_is_too_short_are_not_rented_and_that_is_said() -> None:
    w = World(policy=Fixed(1, 1))
    least_s = w.fleet.horizon.margin_s + USEFUL_LOADS * w.fleet.horizon.load_s
    w.offers = [replace(make_offer(n, 0.1), duration_s=least_s - 60.0) for n in (1, 2)]
    w.tick(60)
    assert w.kinds() == []
    (note,) = w.fleet.decide(w.demand, w.policy, w.now).notes
    assert "the contracts of 2 end too soon" in note
    w.offers = [*w.offers, replace(make_offer(3, 0.5), duration_s=least_s + 60.0)]
    w.tick(120)
    assert w.kinds() == ["Create"]


def asked(usd_h: float) -> PriceIncrease:
    return PriceIncrease(1, 1001, 0.4, usd_h, 2000.0, 9000.0)


def judged(usd_h: float, *offers: float) -> PriceAnswer:
    w = World().with_pool(hot=1, total=1)
    (i,) = w.fleet
    market = [make_offer(n, price) for n, price in enumerate(offers)]
    return judge_increase(asked(usd_h), i, market, VLLM_13, HORIZON).verdict


def test_a_price_is_accepted_while_another_machine_with_its_set_up_is_no_cheaper() -> None:
    """0.400 $/h: ten minutes of load over a day are 0.7 %, so 0.402 is accepted and 0.404 is not."""
    assert judged(0.402, 0.4) is PriceAnswer.ACCEPTED
    assert judged(0.404, 0.4) is PriceAnswer.LAPSES
    assert judged(0.9) is PriceAnswer.ACCEPTED, "nothing else is for rent"
    w = World().with_pool(hot=1, total=1)
    (i,) = w.fleet
    assert judge_increase(asked(0.9), i, None, VLLM_13, HORIZON).verdict is PriceAnswer.WAITS


def test_an_accepted_price_makes_the_contract_longer_for_us_at_once() -> None:
    w = World().with_pool(hot=1, total=1)
    old = w.only()
    end = w.now + w.fleet.horizon.margin_s
    ends(w, lambda label: end)
    w.fleet[old].terms.extend(end + 86_400.0)
    w.tick(300)
    assert w.kinds() == []
    assert ending(w.fleet, w.fleet.horizon, w.now) == {}


def test_a_row_that_says_no_end_ends_nothing() -> None:
    w = World().with_pool(hot=1, total=1)
    ends(w, lambda label: None)
    w.fleet[w.only()].terms.extend(None)
    row: Row = w.listing()[0]
    assert row.end_date is None
    w.tick(3600)
    assert w.kinds() == []
    assert w.fleet[w.only()].terms.ends_at == pytest.approx(float("inf"))
