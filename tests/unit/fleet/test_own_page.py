"""What was seen counts until its own page says that it is gone; listings may lack rows."""

import random

from fleet.commands import Create, Destroy
from fleet.health_check import Verdict
from fleet.limits import Limits
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World
from vast.rows import Row


def dead_where_gone(w: World) -> None:
    w.check_hook = lambda label: Verdict.FAILED if label not in w.contracts else None


def test_listings_that_lack_rows_at_random_rent_nothing_over_the_limit() -> None:
    """Field fault C5: 25 to 50 % of the rows for 150 s; World holds the limits at every order."""
    for seed in range(20):
        chance = random.Random(seed)
        w = World(limits=Limits(max_instances=4, max_usd_h=10.0)).with_pool(hot=3, total=4)

        def lack(rows: list[Row], chance: random.Random = chance) -> list[Row]:
            return [r for r in rows if chance.random() > chance.uniform(0.25, 0.5)]

        w.listing_hook = lack
        w.policy = Fixed(4, 4)
        w.tick(150)
        assert len(w.contracts) == 4, f"seed {seed}"
        w.listing_hook = lambda rows: rows
        w.tick(120)
        assert w.states() == {"hot": 4}, f"seed {seed}"
        assert not any(isinstance(c, Create | Destroy) for c in w.ordered), f"seed {seed}"


def test_a_row_that_stays_away_for_an_hour_is_still_ours_and_counts() -> None:
    w = World(limits=Limits(max_instances=3, max_usd_h=10)).with_pool(hot=2, total=3)
    cold = w.contracts[w.only(State.COLD)]
    cold.hidden = True
    w.tick(3600)
    assert w.states() == {"hot": 2, "cold": 1}
    assert w.fleet.committed().instances == 3
    assert w.ordered == []


def test_a_fleet_of_one_that_was_destroyed_behind_our_back_is_replaced_within_turns() -> None:
    """Field fault C4: disbelief took two minutes, and began again at each restart."""
    w = World().with_pool(hot=1, total=1)
    w.contracts.clear()
    dead_where_gone(w)
    w.tick(20)
    assert w.kinds() == ["Create"]


def test_restarts_do_not_make_a_fleet_of_one_that_is_gone_last_longer() -> None:
    w = World().with_pool(hot=1, total=1)
    w.contracts.clear()
    dead_where_gone(w)
    for _ in range(4):
        w.tick(15)
        w.restart()
    assert w.kinds() == ["Create"]


def test_disbelief_goes_on_over_a_restart_where_own_pages_cannot_be_had() -> None:
    w = World(pages_work=False).with_pool(hot=0, total=2)
    w.contracts.clear()
    w.tick(60)
    assert w.fleet.listing_believed is False
    w.restart(w.saved())
    w.tick(w.deadlines.disbelief_s - 50)
    assert w.fleet.listing_believed is True


def test_disbelief_is_short_where_what_is_missing_does_not_answer_either() -> None:
    w = World(pages_work=False).with_pool(hot=1, total=1)
    w.contracts.clear()
    dead_where_gone(w)
    w.tick(15)
    assert w.fleet.listing_believed is False
    w.tick(w.deadlines.absent_s + 15)
    assert w.fleet.listing_believed is True


def test_without_its_own_page_what_is_missing_counts_for_long_and_is_then_given_up() -> None:
    w = World(pages_work=False, limits=Limits(max_instances=3, max_usd_h=10)).with_pool(hot=2, total=3)
    label = w.only(State.COLD)
    del w.contracts[label]
    w.tick(w.deadlines.vanished_s - 60)
    assert label in w.fleet
    w.tick(120)
    assert label not in w.fleet
    assert w.fleet.committed().instances == 3, "it may still exist"
