"""Offers, machines that failed, and the pause after creates that failed."""

from fleet.commands import Create, LookForOffers, Performed, Reply, with_label
from policies import Fixed
from tests.fleet_world import World, make_offer


def test_a_machine_that_failed_is_not_rented_again() -> None:
    w = World(policy=Fixed(1, 1), load_s=1e9)
    w.offers = [make_offer(n, machine=7) for n in range(1, 5)]
    w.tick(w.boot_s + w.deadlines.first_load_s + 600)
    assert [c.offer.machine_id for c in w.ordered if isinstance(c, Create)] == [7]


def test_creates_that_fail_one_after_another_come_ever_slower() -> None:
    w = World(policy=Fixed(1, 1))
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Create) else None
    w.tick(600)
    creates = w.kinds().count("Create")
    assert 3 <= creates <= 6  # 30 + 60 + 120 + 240 s of rest between them


def test_the_market_is_searched_once_at_a_time() -> None:
    w = World(policy=Fixed(1, 1))
    w.fleet.observe([], (), w.now)
    (look,) = w.fleet.decide(w.demand, w.policy, w.now).commands
    assert isinstance(look, LookForOffers)
    w.fleet.begin(look, w.now)
    assert w.fleet.decide(w.demand, w.policy, w.now + 5).commands == ()
    w.fleet.finish(look, Performed(Reply.UNKNOWN), w.now + 20)
    assert w.fleet.decide(w.demand, w.policy, w.now + 25).commands == (look,)


def test_creates_that_fail_together_count_as_one_failure() -> None:
    w = World(policy=Fixed(4, 4))
    w.reply_hook = lambda c: Reply.REFUSED if isinstance(c, Create) else None
    w.tick(10)
    assert w.kinds() == ["Create"] * 4
    w.reply_hook = lambda c: None
    w.tick(w.deadlines.create_rest_s + 10)
    assert w.kinds() == ["Create"] * 8


def test_an_offer_that_somebody_else_took_costs_no_rest() -> None:
    w = World(policy=Fixed(1, 1))
    w.fleet.observe([], (), w.now)
    w.fleet.finish(LookForOffers(""), Performed(Reply.DONE, offers=tuple(w.offers)), w.now)
    (create,) = w.fleet.decide(w.demand, w.policy, w.now).commands
    assert isinstance(create, Create)
    create = with_label(create, "fleet/a")
    w.fleet.begin(create, w.now)
    w.fleet.finish(create, Performed(Reply.REFUSED, "no_such_ask", offer_gone=True), w.now)
    assert [type(c) for c in w.fleet.decide(w.demand, w.policy, w.now).commands] == [LookForOffers]


def test_a_market_with_no_offers_leaves_what_there_is_managed() -> None:
    w = World().with_pool(hot=1, total=3)
    w.offers = []
    w.fleet.finish(LookForOffers(""), Performed(Reply.DONE, offers=()), w.now)
    w.policy = Fixed(3, 8)
    w.tick(300.0)
    assert w.states() == {"hot": 3}
    decision = w.fleet.decide(w.demand, w.policy, w.now)
    assert "no suitable offer on the market" in decision.notes or "looking at the market" in decision.notes
    w.policy = Fixed(1, 8)
    w.tick(120.0)
    assert w.states() == {"hot": 1, "cold": 2}
    w.offers = [make_offer(n) for n in range(50, 60)]
    w.tick(130.0)
    assert w.kinds().count("Create") == 5, "and it goes on when there are offers again"
