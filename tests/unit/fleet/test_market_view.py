"""The market as an operator looks at it: ranked, with what is not rented, and the cloud is asked seldom."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.commands import Command, Performed, Reply
from fleet.outside.ledger import Ledger
from fleet.outside.market_view import KEPT_S, MarketView
from tests.fleet_world import make_offer
from tests.unit.fleet.test_turns import Loop


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield Loop(ledger)
    ledger.close()


def test_the_cheapest_for_its_work_comes_first_and_the_cloud_is_asked_once_in_a_while(loop: Loop) -> None:
    asked: list[Command] = []

    def search(command: Command) -> Performed:
        asked.append(command)
        return Performed(Reply.DONE, offers=(make_offer(1, 0.4), make_offer(2, 0.2)))

    view = MarketView(loop.scaler, search)
    loop.scaler.instances.ban(101, "it failed", loop.scaler.clock(), 3600.0)
    found = view.offers()
    assert [(row["offer"], row["avoided"]) for row in found["offers"]] == [(2, False), (1, True)]
    assert found["offers"][0]["usd_per_million_work"] * 2 == pytest.approx(
        found["offers"][1]["usd_per_million_work"], rel=1e-3
    )
    view.offers()
    assert len(asked) == 1
    loop.world.now += KEPT_S + 1.0
    view.offers()
    assert len(asked) == 2


def test_a_search_that_fails_says_what_the_cloud_said(loop: Loop) -> None:
    view = MarketView(loop.scaler, lambda _: Performed(Reply.UNKNOWN, "429 from the cloud"))
    with pytest.raises(LookupError, match="429 from the cloud"):
        view.offers()
