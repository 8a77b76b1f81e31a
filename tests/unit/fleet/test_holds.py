"""Why nothing is rented although the policy wants more: fleet/holds.py, and who says so."""

from pathlib import Path

from fleet.alarms import AlarmFacts, wrong_now
from fleet.commands import Create, LookForOffers
from fleet.holds import HeldOrders, Hold, HoldKind, Holds
from fleet.outside.decisions import decisions_answer
from fleet.outside.ledger import Ledger
from fleet.outside.metrics import AutoscalerMetrics
from fleet.outside.overview import FleetPlace, Overview
from fleet.outside.reasons import OwnReasons
from policies import Fixed
from tests.fleet_world import World
from tests.unit.fleet.test_turns import Loop

SENTENCE = "the model is gated: run secrets set HF_TOKEN"


def test_a_hold_keeps_its_beginning_and_is_logged_when_it_begins_and_ends() -> None:
    lines: list[str] = []
    holds = Holds(lines.append)
    holds.set(HoldKind.BUDGET_DAY, "spent 8 $ of 10 $", 5.0)
    holds.set(HoldKind.BUDGET_DAY, "spent 9 $ of 10 $", 6.0)
    holds.set(HoldKind.DEPLOYMENT, SENTENCE, 7.0, ends="by PUT /manage")
    assert list(holds) == [
        Hold(HoldKind.BUDGET_DAY, "spent 9 $ of 10 $", 5.0),
        Hold(HoldKind.DEPLOYMENT, SENTENCE, 7.0, ends="by PUT /manage"),
    ]
    assert holds.clear(HoldKind.BUDGET_DAY)
    assert not holds.clear(HoldKind.BUDGET_DAY)
    assert len(holds) == 1
    assert lines == [
        "creates are held (budget-day): spent 8 $ of 10 $",
        f"creates are held (deployment): {SENTENCE}",
        "no longer held: creates (budget-day)",
    ]


def test_while_creates_are_held_nothing_is_rented_or_searched_and_the_decision_says_why() -> None:
    w = World(policy=Fixed(1, 2))
    w.fleet.holds.set(HoldKind.DEPLOYMENT, SENTENCE, w.now)
    w.tick(60)
    assert w.ordered == []
    decision = w.fleet.decide(w.demand, w.policy, w.now)
    assert decision.notes == (f"creates are held (deployment): {SENTENCE}",)
    w.fleet.holds.clear(HoldKind.DEPLOYMENT)
    w.tick(10)
    assert [type(c) for c in w.ordered] == [LookForOffers, Create, Create]


def test_a_hold_on_creates_lets_stopped_instances_start_and_one_on_starts_does_not() -> None:
    w = World().with_pool(hot=0, total=1)
    w.policy = Fixed(1, 2)
    w.fleet.holds.set(HoldKind.NO_CREDIT, "pay in", w.now, HeldOrders.CREATES_AND_STARTS)
    w.tick(30)
    assert w.ordered == []
    decision = w.fleet.decide(w.demand, w.policy, w.now)
    assert decision.notes == ("creates and starts are held (no-credit): pay in",)
    w.fleet.holds.set(HoldKind.NO_CREDIT, "pay in", w.now, HeldOrders.CREATES)
    w.tick(5)
    assert w.kinds() == ["Start"]


def test_a_hold_stops_nothing_that_costs_less() -> None:
    w = World().with_pool(hot=2, total=3)
    w.fleet.holds.set(HoldKind.BUDGET_DAY, "spent", w.now, HeldOrders.CREATES_AND_STARTS)
    w.policy = Fixed(1, 1)
    w.tick(60)
    assert sorted(w.kinds()) == ["Destroy", "Destroy", "Drain", "Stop"]


def test_a_hold_is_told_by_health_decisions_overview_metrics_and_alarms(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    loop = Loop(ledger)
    loop.scaler.turn()
    holds = loop.scaler.instances.holds
    own = OwnReasons(loop.scaler, 5.0)
    overview = Overview(loop.scaler, FleetPlace("fleet", "", local=True, speedup=1.0))
    assert own.now() == []
    assert held_figures(loop) == {}
    holds.set(HoldKind.SPEND_LIMIT, SENTENCE, 1000.0)
    (reason,) = own.now()
    assert (reason.code, reason.message) == ("held", f"creates are held (spend-limit): {SENTENCE}")
    shown = [
        {"kind": "spend-limit", "sentence": SENTENCE, "since": 1000.0, "held": "creates", "ends": ""},
    ]
    assert decisions_answer(loop.scaler)["holds"] == shown
    assert overview.now({})["holds"] == shown
    assert held_figures(loop) == {"spend-limit": 1.0}
    assert wrong_now(AlarmFacts(holds={"spend-limit": SENTENCE}, limit_usd_h=1.0)) == {
        "held: spend-limit": SENTENCE
    }
    ledger.close()


def held_figures(loop: Loop) -> dict[str, float]:
    """The holds in force, as the metrics page has them; each kind has a row."""
    (family,) = [f for f in AutoscalerMetrics(loop.scaler).collect() if f.name == "autoscaler_held"]
    assert {s.labels["kind"] for s in family.samples} == set(HoldKind)
    return {s.labels["kind"]: s.value for s in family.samples if s.value}
