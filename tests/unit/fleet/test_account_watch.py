"""The account is looked at now and then, and at once when machines were stopped unasked."""

from pathlib import Path

from fleet.holds import HoldKind
from fleet.outside.account_watch import CREDIT_EVERY_S, GONE_EVERY_S, AccountWatch
from fleet.outside.ledger import Ledger
from policies import Fixed
from process.errors import CloudError
from tests.fleet_world import World
from tests.unit.fleet.test_credit import stop_all
from tests.unit.fleet.test_turns import Loop


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
