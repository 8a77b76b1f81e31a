"""Listings that fail, lie and lack rows."""

from dataclasses import replace

from fleet.commands import Destroy, Reply, Stop
from fleet.health_check import Verdict
from fleet.limits import Limits
from policies import Fixed
from tests.fleet_world import Contract, World


def test_an_empty_listing_is_not_believed_when_a_fleet_was_there() -> None:
    w = World().with_pool(hot=2, total=3)
    w.listing_hook = lambda rows: []
    w.tick(25)
    assert w.ordered == []
    assert w.states() == {"hot": 2, "cold": 1}
    w.listing_hook = lambda rows: rows
    w.tick(10)
    assert w.states() == {"hot": 2, "cold": 1}


def test_an_instance_that_stays_away_from_believable_listings_is_gone_and_replaced() -> None:
    w = World().with_pool(hot=3, total=3)
    label = next(iter(w.contracts))
    del w.contracts[label]
    w.tick(60)
    assert label not in w.fleet
    assert "Create" in w.kinds()


def test_rows_of_other_fleets_and_unlabelled_ones_are_never_touched() -> None:
    w = World(policy=Fixed(0, 0))
    for n, label in enumerate(["fleet2/a", "", "someone", "fleet"]):
        w.contracts[f"x{n}"] = Contract(500 + n, label, 7, 0.1, status="running")
    w.limits = Limits(max_instances=8, max_usd_h=10)
    w.tick(600)
    assert w.ordered == []
    assert list(w.fleet) == []


def test_a_second_row_with_one_label_is_destroyed_and_the_first_kept() -> None:
    w = World().with_pool(hot=1, total=1)
    label = w.only()
    w.contracts["twin"] = replace(w.contracts[label], id=4711)
    apply = w.apply

    def destroy_twin(c: object) -> int | None:
        if isinstance(c, Destroy) and c.id == 4711:
            w.contracts.pop("twin", None)
            return None
        return apply(c)  # type: ignore[arg-type]

    w.apply = destroy_twin  # type: ignore[method-assign, assignment]
    w.tick(60)
    assert w.states() == {"hot": 1}
    assert [c.id for c in w.ordered if isinstance(c, Destroy)] == [4711]


def test_an_empty_listing_for_a_minute_takes_nothing_out_of_service() -> None:
    w = World().with_pool(hot=2, total=3)
    version = w.fleet.hot_version
    w.listing_hook = lambda rows: []
    w.tick(90)
    assert w.ordered == []
    assert (w.states(), w.fleet.hot_version) == ({"hot": 2, "cold": 1}, version)


def test_what_answers_a_test_prompt_exists_whatever_the_listing_says() -> None:
    w = World().with_pool(hot=3, total=3)
    hidden = next(iter(w.contracts.values()))
    hidden.hidden = True
    w.tick(3600)
    assert w.states() == {"hot": 3}
    assert w.ordered == []


def test_what_is_neither_listed_nor_answers_counts_until_its_own_page_says_that_it_is_gone() -> None:
    w = World(limits=Limits(max_instances=3, max_usd_h=10)).with_pool(hot=3, total=3)
    hidden = next(iter(w.contracts.values()))
    hidden.hidden = True
    w.check_hook = lambda label: Verdict.FAILED if label == hidden.label else None
    w.tick(120)
    assert w.states() == {"hot": 2, "running": 1}
    assert w.kinds() == [], "it exists, so the limit is reached"
    del w.contracts[hidden.label]
    w.tick(30)
    assert w.kinds() == ["Create"]


def test_a_whole_fleet_destroyed_by_hand_is_replaced_once_its_own_pages_say_so() -> None:
    w = World().with_pool(hot=1, total=2)
    w.contracts.clear()
    w.check_hook = lambda label: Verdict.FAILED if label not in w.contracts else None
    w.tick(5)
    assert w.ordered == []
    w.tick(25)
    assert "Create" in w.kinds()


def test_a_stop_that_met_an_outage_costs_no_loaded_disk() -> None:
    w = World().with_pool(hot=1, total=1)
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Stop) else None
    w.policy = Fixed(0, 1)
    w.tick(20)
    assert w.states() == {"stopping": 1}
    w.listing_works = False
    w.tick(4 * w.deadlines.stopping_s)
    w.listing_works, w.reply_hook = True, lambda c: None
    w.tick(60)
    assert w.states() == {"cold": 1}
    assert "Destroy" not in w.kinds()
