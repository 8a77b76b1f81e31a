"""The account is looked at now and then, and at once when machines were stopped unasked."""

from pathlib import Path

import pytest

from fleet.alarms import AlarmFacts, wrong_now
from fleet.commands import Performed, Reply
from fleet.holds import HoldKind
from fleet.journal import ESTIMATED, BillingInterval, BytesBilled, Entries
from fleet.outside.account_watch import CHARGES_EVERY_S, CREDIT_EVERY_S, GONE_EVERY_S, AccountWatch
from fleet.outside.costs import contract_money
from fleet.outside.ledger import Ledger
from policies import Fixed
from process.errors import CloudError
from tests.fleet_world import World, make_offer
from tests.unit.fleet.test_budget import MIDNIGHT
from tests.unit.fleet.test_credit import stop_all
from tests.unit.fleet.test_turns import Loop
from vast.rows import Charges, PriceIncrease


class Account:
    """The cloud's account, which counts how often it was asked."""

    def __init__(self, usd: float) -> None:
        self.usd, self.asked = usd, 0
        self.error: CloudError | None = None

    def credit(self) -> float:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.usd


def test_the_credit_is_asked_for_each_minute_and_at_once_when_all_stops(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    loop = Loop(ledger, World().with_pool(hot=2, total=2), Fixed(2, 2))
    account = Account(9.0)
    watch = AccountWatch(loop.scaler, account)  # type: ignore[arg-type]

    def turns(seconds: float) -> None:
        for _ in range(int(seconds // 5)):
            loop.world.now += 5.0
            loop.scaler.turn()
            watch.look()

    turns(CREDIT_EVERY_S)
    assert account.asked == 1
    turns(CREDIT_EVERY_S)
    assert account.asked == 2
    stop_all(loop.world)
    account.usd = -0.01
    turns(10)
    assert account.asked == 3
    assert loop.scaler.instances.holds.of(HoldKind.NO_CREDIT) is not None
    asked = account.asked
    turns(4 * GONE_EVERY_S)
    assert account.asked == asked + 4, "somebody may pay in"
    account.usd = 5.0
    turns(2 * GONE_EVERY_S)
    assert loop.scaler.instances.holds.of(HoldKind.NO_CREDIT) is None
    ledger.close()


def test_a_credit_that_cannot_be_asked_for_is_tried_again_and_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    loop = Loop(ledger)
    account = Account(9.0)
    account.error = CloudError("vastai show user: 403")
    watch = AccountWatch(loop.scaler, account)  # type: ignore[arg-type]
    for _ in range(20):
        loop.world.now += 1.0
        watch.look()
    assert account.asked == 4
    assert loop.scaler.instances.money.credit.usd is None
    ledger.close()


class Bill:
    """The account's bill: what was charged by day, and what hosts ask for."""

    def __init__(self) -> None:
        self.asked: list[PriceIncrease] = []
        self.accepted: list[int] = []
        self.by_day: dict[float, list[Charges]] = {}

    def price_increases(self) -> list[PriceIncrease]:
        return [one for one in self.asked if one.instance not in self.accepted]

    def answer_price_increase(self, instance_id: int, *, accept: bool) -> None:
        assert accept
        self.accepted.append(instance_id)

    def charges(self, from_s: float, to_s: float) -> list[Charges]:
        assert from_s % 86_400.0 == 0.0
        assert from_s < to_s < from_s + 86_400.0
        return self.by_day.get(from_s, [])


def watched(ledger: Ledger, bill: Bill, *offers: float) -> tuple[Loop, AccountWatch]:
    """Two hot instances under a watch that finds these prices on the market."""
    loop = Loop(ledger, World(now=MIDNIGHT + 3600.0).with_pool(hot=2, total=2), Fixed(2, 2))
    market = tuple(make_offer(n, price) for n, price in enumerate(offers))
    found = Performed(Reply.DONE, offers=market)
    watch = AccountWatch(loop.scaler, Account(9.0), bill, lambda command: found)  # type: ignore[arg-type]
    loop.scaler.turn()
    return loop, watch


def test_a_higher_price_is_accepted_or_lapses_by_what_another_machine_costs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    bill = Bill()
    loop, watch = watched(ledger, bill, 0.42)
    cheap, dear = (i for i in loop.scaler.instances)
    assert cheap.id is not None
    assert dear.id is not None
    end = loop.world.now + 86_400.0
    bill.asked = [
        PriceIncrease(1, cheap.id, 0.40, 0.41, end, end + 86_400.0),
        PriceIncrease(2, dear.id, 0.40, 0.60, end, end + 86_400.0),
        PriceIncrease(3, 777, 0.40, 0.41, end, end),  # of another program in the account
    ]
    watch.look()
    assert bill.accepted == [cheap.id]
    assert (cheap.terms.agreed_end_at, dear.terms.agreed_end_at) == (end + 86_400.0, None)
    shown = contract_money(loop.scaler)["price_increases"]
    assert [(one["instance"], one["verdict"]) for one in shown] == [
        (cheap.id, "accepted"),
        (dear.id, "lapses"),
    ]
    again = Loop(ledger, loop.world, Fixed(2, 2))
    AccountWatch(again.scaler, Account(9.0), bill)  # type: ignore[arg-type]
    assert again.scaler.instances[cheap.label].terms.ends_at == end + 86_400.0, "it is known after a restart"
    ledger.close()


def test_the_ledger_takes_bytes_from_the_charges_and_tells_what_else_differs(tmp_path: Path) -> None:
    """Of the day before: 10 cents of bytes that were not known, and a dollar of GPU that was not seen."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    bill = Bill()
    loop, watch = watched(ledger, bill)
    yesterday = MIDNIGHT - 86_400.0
    interval = BillingInterval("fleet/a", 500, 7, "hot", yesterday + 100.0, yesterday + 3700.0, 0.5, 0.5, "")
    ledger.write(Entries([interval]))
    ledger.write(Entries(traffic=[BytesBilled("fleet/a", 500, yesterday + 100.0, 0.02, 10.0, ESTIMATED)]))
    assert ledger.spent(yesterday, MIDNIGHT) == pytest.approx(0.52)
    bill.by_day[yesterday] = [
        Charges(500, "fleet/a", 0.5, 0.0, 0.12, 0.62),
        Charges(9, "other", 9.0, 0, 0, 9.0),
    ]
    watch.look()
    (day,) = [d for d in loop.scaler.instances.money.reconciled if d.day_s == yesterday]
    assert [day.charged_usd, day.ledger_usd] == pytest.approx([0.62, 0.62])
    assert not day.is_off
    assert ledger.costs(yesterday, MIDNIGHT).traffic == pytest.approx(0.12)
    bill.by_day[yesterday] = [Charges(500, "fleet/a", 1.5, 0.0, 0.12, 1.62)]
    loop.world.now += CHARGES_EVERY_S
    watch.look()
    (day,) = [d for d in loop.scaler.instances.money.reconciled if d.day_s == yesterday]
    assert day.difference_usd == pytest.approx(1.0)
    assert day.is_off
    off = loop.scaler.instances.money.charges_off_usd
    assert off == pytest.approx(1.0)
    assert "charges_differ" in wrong_now(AlarmFacts(charges_off_usd=off))
    assert ledger.costs(yesterday, MIDNIGHT).traffic == pytest.approx(0.12), "once"
    ledger.close()


def test_a_day_that_is_not_over_alarms_nobody_and_takes_no_bytes_away(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    bill = Bill()
    loop, watch = watched(ledger, bill)
    now = loop.world.now
    ledger.write(Entries(traffic=[BytesBilled("fleet/a", 500, now - 60.0, 0.40, 20.0, ESTIMATED)]))
    bill.by_day[MIDNIGHT] = [Charges(500, "fleet/a", 0.0, 0.0, 0.10, 0.10)]
    watch.look()
    (day,) = loop.scaler.instances.money.reconciled
    assert not day.is_off
    assert ledger.costs(MIDNIGHT, now).traffic == pytest.approx(0.40)
    ledger.close()
