"""Out of credit is one state: no machine is blamed, and all goes on when there is credit again."""

from fleet.commands import Create, Destroy, Start
from fleet.credit import DOUBT_S, Credit, Turned
from fleet.holds import HoldKind
from fleet.limits import Limits
from policies import Fixed
from tests.fleet_world import World


def stop_all(w: World) -> None:
    """As the service does it at credit 0: everything is stopped, and is meant to be."""
    for c in w.contracts.values():
        c.intended, c.status, c.up_at, c.ready_at, c.down_at = "stopped", "exited", None, None, None


def note(w: World, usd: float) -> None:
    """The account was asked for its credit."""
    w.fleet.note_credit(usd, w.now)
    w.fleet.settle_money({}, w.now)


def test_no_machine_is_blamed_for_missing_credit_and_the_same_ones_go_on_when_it_is_back() -> None:
    """One hot, one loading: both are stopped by the cloud, none is destroyed or banned, both serve again."""
    w = World(policy=Fixed(1, 1)).with_pool(hot=1, total=1)
    w.policy = Fixed(2, 2)
    w.tick(100)
    assert w.states() == {"hot": 1, "running": 1}
    before = set(w.contracts)
    w.forget()
    stop_all(w)
    w.tick(5)
    assert w.fleet.money.credit.in_doubt(w.now), "the account is to be asked"
    assert w.kinds() == ["Start"], "what was outbid is started again, as ever; nothing is rented or destroyed"
    stop_all(w.forget())
    note(w, 0.0)
    w.tick(7200)
    assert w.kinds() == []
    assert (set(w.contracts), w.fleet.market.bad_machines, w.fleet.market.failed_creates) == (before, {}, 0)
    hold = w.fleet.holds.of(HoldKind.NO_CREDIT)
    assert hold is not None
    assert hold.stops_starts
    assert "pay in" in hold.sentence
    note(w, 20.0)
    assert w.fleet.holds.of(HoldKind.NO_CREDIT) is None
    w.tick(900)
    assert w.states() == {"hot": 2}
    assert set(w.contracts) == before
    assert {type(c) for c in w.ordered} == {Start}


def test_what_was_stopped_while_it_loaded_is_judged_as_before_where_there_is_credit() -> None:
    """Outbid, or by hand: it is of no use, and the create counts as failed."""
    w = World(policy=Fixed(1, 1)).tick(100)
    assert w.states() == {"running": 1}
    w.forget()
    stop_all(w)
    w.tick(5)
    note(w, 20.0)
    w.tick(60)
    assert "Destroy" in w.kinds()
    assert w.fleet.market.failed_creates == 1


def test_where_the_credit_cannot_be_asked_for_machines_are_spared_for_a_minute() -> None:
    w = World(policy=Fixed(1, 1)).tick(100)
    w.forget()
    stop_all(w)
    w.tick(DOUBT_S - 10)
    assert w.kinds() == []
    w.tick(60)
    assert "Destroy" in w.kinds()


def test_out_of_credit_is_known_after_a_restart_although_there_is_credit_again() -> None:
    w = World(policy=Fixed(1, 1)).tick(100)
    stop_all(w)
    w.tick(5)
    note(w, -0.1)
    w.tick(5)
    saved = w.saved()
    w.restart(type(saved)(saved.instances, credit_gone=True)).forget()
    note(w, 30.0)
    w.tick(900)
    assert w.states() == {"hot": 1}
    assert {type(c) for c in w.ordered} == {Start}


def test_the_credit_must_last_with_one_more_instance() -> None:
    """0.4 $/h each: $1 lasts 2.5 h with one, and less than two with two."""
    w = World(policy=Fixed(1, 1), limits=Limits(min_credit_hours=2.0)).with_pool(hot=1, total=1)
    note(w, 1.0)
    w.policy = Fixed(2, 2)
    w.tick(30)
    assert not [c for c in w.ordered if isinstance(c, Create)]
    notes = w.fleet.decide(w.demand, w.policy, w.now).notes
    assert any("credit of $1.00 would last 1.2 h" in n for n in notes), notes
    note(w, 10.0)
    w.tick(30)
    assert [c for c in w.ordered if isinstance(c, Create)]


def test_creates_are_held_while_the_credit_is_low_and_starts_are_not() -> None:
    w = World(limits=Limits(min_credit_hours=2.0)).with_pool(hot=1, total=2)
    note(w, 0.7)  # 1.7 h at 0.41 $/h
    hold = w.fleet.holds.of(HoldKind.CREDIT_LOW)
    assert hold is not None
    assert not hold.stops_starts
    w.policy = Fixed(3, 3)
    w.tick(60)
    assert w.kinds() == ["Start"]
    assert not [c for c in w.ordered if isinstance(c, Destroy)]
    note(w, 10.0)
    assert w.fleet.holds.of(HoldKind.CREDIT_LOW) is None


def test_the_account_is_asked_at_once_when_machines_were_stopped_unasked() -> None:
    credit = Credit()
    assert credit.look_due(300.0, 15.0, 0.0)
    assert credit.note(5.0, 0.0) is Turned.NOTHING
    assert not credit.look_due(300.0, 15.0, 299.0)
    credit.note_stop(100.0)
    assert credit.look_due(300.0, 15.0, 101.0)
    assert credit.note(5.0, 101.0) is Turned.NOT_THE_REASON
    assert credit.note(0.0, 110.0) is Turned.GONE
    assert credit.look_due(300.0, 15.0, 125.0), "until somebody pays in it is looked at often"
    assert credit.note(3.0, 125.0) is Turned.BACK
