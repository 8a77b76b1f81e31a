"""What the page is told: how things stand, in numbers and in sentences."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fleet.commands import Create, Destroy, LookForOffers
from fleet.journal import Decision
from fleet.outside.ledger import Ledger
from fleet.outside.overview import MONEY_EVERY_S, FleetPlace, Overview, told
from policies import Fixed, Targets
from tests.fleet_world import World, make_offer
from tests.messages import busy_report
from tests.unit.fleet.test_turns import Loop
from web.messages.busy import InstanceUse

PLACE = FleetPlace("fleet", "https://console.vast.ai", local=False, speedup=1.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


@pytest.fixture
def loop(ledger: Ledger) -> Loop:
    made = Loop(ledger, World().with_pool(hot=2, total=3), Fixed(2, 3))
    made.scaler.turn()
    return made


def test_it_is_json_and_says_what_each_instance_works_on(loop: Loop) -> None:
    first = next(iter(loop.scaler.instances))
    assert first.id is not None
    report = msgspec.structs.replace(busy_report(), instances={first.id: InstanceUse(3, 450.0, 10.0, 0.0, 2)})
    loop.scaler.record_report(report)
    said = Overview(loop.scaler, PLACE).now({"status": "ok", "last_good_turn_age_s": 0.1})
    assert msgspec.json.decode(msgspec.json.encode(said))["fleet"]["model"] == "vllm-13"
    (row,) = [i for i in said["instances"] if i["id"] == first.id]
    assert (row["requests"], row["work"], row["failures"]) == (3, 450.0, 2)
    assert row["taken_out"] is None
    assert said["latest"]["wanted_hot"] == 2
    assert said["curve"] == {"message": "no replays are made"}
    loop.scaler.instances.take_out(first.label, for_good=True)
    (row,) = [i for i in Overview(loop.scaler, PLACE).now({})["instances"] if i["id"] == first.id]
    assert row["taken_out"] == "replace"


def test_the_history_goes_on_where_the_process_before_ended(ledger: Ledger) -> None:
    world = World().with_pool(hot=2, total=3)
    loop, began = Loop(ledger, world, Fixed(2, 3)), world.now
    for _ in range(4):
        loop.scaler.turn()
        world.now += 15.0
    loop.scaler.write_counts()
    again = Loop(ledger, world, Fixed(2, 3))
    again.scaler.turn()
    drawn = Overview(again.scaler, PLACE).history(0.0, world.now + 1.0, 100)
    assert drawn["at_s"] == [began + 15.0 * n for n in range(5)]
    assert drawn["wanted_hot"] == [2.0] * 5
    assert drawn["cold"][-1] == 1.0
    only = Overview(again.scaler, PLACE).history(began + 10.0, began + 40.0, 100)
    assert only["at_s"] == [began + 15.0, began + 30.0]


def test_money_is_added_up_now_and_then_and_a_month_is_told_from_an_hour_on(loop: Loop) -> None:
    overview = Overview(loop.scaler, PLACE)
    assert overview.now({})["money"]["month_usd"] is None
    loop.world.now += 0.9 * MONEY_EVERY_S
    assert overview.now({})["money"]["today"]["total"] == 0.0
    loop.world.now += 7200.0
    money = overview.now({})["money"]
    spent = ledger_total(loop, loop.world.now)
    assert money["month_usd"] == pytest.approx(spent / (7200.0 + 0.9 * MONEY_EVERY_S) * 86_400.0 * 30.0)


def ledger_total(loop: Loop, now: float) -> float:
    return loop.scaler.ledger.costs(0.0, now).total


def test_a_decision_is_a_sentence_and_its_orders_with_evidence(loop: Loop) -> None:
    seen = loop.scaler.decisions[-1].seen
    commands = (
        Create(make_offer(1), "1 more wanted in all", "fleet/a", "demand 2.00"),
        Destroy("fleet/b", 7, "it failed", "two checks"),
        LookForOffers("2 more wanted in all"),
    )
    said = told(Decision(5.0, seen, Targets(3, 4, "fixed"), commands, ("no suitable offer on the market",)))
    assert said["sentence"] == (
        "The load is 0.00 instances' worth; 0 hot of 3. Wanted: 3 hot, 4 in all (fixed). "
        "No suitable offer on the market."
    )
    assert said["orders"] == [
        {"do": "create", "why": "1 more wanted in all", "label": "fleet/a", "evidence": "demand 2.00"},
        {"do": "destroy", "why": "it failed", "label": "fleet/b", "evidence": "two checks"},
        {"do": "lookforoffers", "why": "2 more wanted in all"},
    ]
    assert told(Decision(6.0, None, None, (), ("the listing failed",)))["sentence"] == "The listing failed."
