"""What a person does to single instances: it is done whatever the policy wants, and survives a restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.health_check import HealthCheck, Verdict
from fleet.limits import Limits
from fleet.outside.by_hand import Act, ActRefused, ByHand
from fleet.outside.ledger import Ledger
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World
from tests.unit.fleet.test_turns import Loop


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def hot_ids(w: World) -> list[int]:
    return [i.id for i in w.fleet if i.state is State.HOT and i.id is not None]


def label_of(w: World, instance_id: int) -> str:
    return next(i.label for i in w.fleet if i.id == instance_id)


def test_a_drain_by_hand_is_not_taken_back_and_another_serves_in_its_place() -> None:
    w = World().with_pool(hot=2, total=3)
    w.policy = Fixed(2, 3)
    first = label_of(w, hot_ids(w)[0])
    w.fleet.take_out(first, for_good=False)
    w.tick(5)
    assert w.fleet[first].state is State.DRAINING
    w.tick(300)
    assert w.states() == {"hot": 2, "cold": 1}
    assert w.kinds() == ["Drain", "Stop", "Start"]
    assert w.fleet[first].state is State.COLD
    # Once it is cold it is as others: it may be started again.
    w.policy = Fixed(3, 3)
    w.tick(300)
    assert w.states() == {"hot": 3}
    assert not w.fleet[first].taken_out


def test_what_is_replaced_goes_for_good_and_another_is_rented_on_another_machine() -> None:
    w = World().with_pool(hot=2, total=2)
    w.policy = Fixed(2, 2)
    out = w.fleet[label_of(w, hot_ids(w)[0])]
    machine = out.machine_id
    w.fleet.take_out(out.label, for_good=True)
    w.tick(2400)
    assert out.label not in w.fleet
    assert w.states() == {"hot": 2}
    assert machine not in {i.machine_id for i in w.fleet}
    assert "Stop" not in w.kinds()


def test_a_cold_one_is_replaced_at_once() -> None:
    w = World().with_pool(hot=1, total=2)
    w.policy = Fixed(1, 2)
    cold = next(i for i in w.fleet if i.state is State.COLD)
    w.fleet.take_out(cold.label, for_good=True)
    w.tick(60)
    assert cold.label not in w.fleet
    assert len(w.fleet) == 2


def test_a_replacement_never_goes_over_the_limits() -> None:
    w = World(limits=Limits(max_instances=2)).with_pool(hot=2, total=2)
    w.policy = Fixed(2, 2)
    w.fleet.take_out(label_of(w, hot_ids(w)[0]), for_good=True)
    for _ in range(200):
        w.tick(10)
        assert w.fleet.committed().instances <= 2
    assert w.states() == {"hot": 2}


def test_a_destroyed_one_is_ended_at_once_and_says_who_asked(ledger: Ledger) -> None:
    loop = Loop(ledger, World().with_pool(hot=2, total=2), Fixed(2, 2))
    loop.scaler.turn()
    (first, _) = loop.scaler.instances
    assert first.id is not None
    label = ByHand(loop.scaler).act(Act.DESTROY, first.id, "key-12")
    assert label == first.label
    assert first.state is State.DESTROYING
    decision = loop.scaler.decisions[-1]
    assert [type(c).__name__ for c in decision.commands] == ["Destroy"]
    assert decision.commands[0].why == "key-12 asked: destroy"
    with pytest.raises(ActRefused, match="destroying already"):
        ByHand(loop.scaler).act(Act.DRAIN, first.id, "key-12")


def test_what_is_not_there_or_not_hot_is_refused(ledger: Ledger) -> None:
    loop = Loop(ledger, World().with_pool(hot=0, total=1), Fixed(0, 1))
    loop.scaler.turn()
    (cold,) = loop.scaler.instances
    assert cold.id is not None
    with pytest.raises(KeyError):
        ByHand(loop.scaler).act(Act.DRAIN, 999, "x")
    with pytest.raises(ActRefused, match="only what is hot can be drained"):
        ByHand(loop.scaler).act(Act.DRAIN, cold.id, "x")


def test_a_drain_goes_on_after_a_restart_until_it_is_over(ledger: Ledger) -> None:
    world = World().with_pool(hot=2, total=2)
    loop = Loop(ledger, world, Fixed(2, 2))
    loop.scaler.turn()
    (first, second) = loop.scaler.instances
    assert first.id is not None
    loop.scaler.judge(HealthCheck(first.label, world.now, Verdict.PASSED, "a token"))
    ByHand(loop.scaler).act(Act.DRAIN, first.id, "x")
    again = Loop(ledger, world, Fixed(2, 2))
    taken_over = ByHand(again.scaler)
    taken_over.take_over()
    assert again.scaler.instances[first.label].taken_out
    assert not again.scaler.instances[second.label].taken_out
    cold = again.scaler.instances[first.label]
    for state in (State.HOT, State.DRAINING, State.STOPPING, State.COLD):
        cold.enter(state, "on its way", world.now)
    taken_over.remember()
    third = Loop(ledger, world, Fixed(2, 2))
    ByHand(third.scaler).take_over()
    assert not third.scaler.instances[first.label].taken_out


def test_a_banned_machine_is_not_rented_until_it_is_forgiven_also_after_a_restart(ledger: Ledger) -> None:
    loop = Loop(ledger)
    by_hand = ByHand(loop.scaler)
    by_hand.ban(101, 3600.0, "key-12")
    market = Loop(ledger, loop.world).scaler.instances.market
    assert market.bad_machines == {101: loop.world.now + 3600.0}
    assert by_hand.forgive(101, "key-12")
    assert not by_hand.forgive(101, "key-12")
    assert Loop(ledger, loop.world).scaler.instances.market.bad_machines == {}
