"""What a contract says beside its price: bytes are in the ledger, and a stopped machine has its own rate."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.profiles import get_profile
from fleet.budget import Habits, bound_usd
from fleet.journal import ESTIMATED
from fleet.limits import Limits
from fleet.market import EXPECTED_LIFE_H, ranked, usd_per_million_work
from fleet.outside.ledger import Ledger
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World, make_offer
from vast.rows import Row

VLLM_13 = get_profile("vllm-13")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def dear_bytes(w: World, usd_gb: float) -> World:
    """Every host asks so much for each GB that comes to a machine."""
    w.offers = [replace(o, inet_down_usd_gb=usd_gb) for o in w.offers]
    return w


def test_a_host_with_dear_bytes_comes_after_one_with_cheap_ones() -> None:
    """22.4 GB at $20 a TB are $0.448: over a day of running they are 1.9 cents an hour."""
    cheap = replace(make_offer(1, 0.410), inet_down_usd_gb=0.002)
    dear = replace(make_offer(2, 0.400), inet_down_usd_gb=0.020)
    assert ranked([dear, cheap], VLLM_13) == [cheap, dear]
    work_s = VLLM_13.throughput_on("RTX 4090")
    more = usd_per_million_work(dear, VLLM_13) - usd_per_million_work(make_offer(3, 0.400), VLLM_13)
    assert more == pytest.approx(0.448 / EXPECTED_LIFE_H / work_s / 3600.0 * 1e6)


def test_the_download_of_a_new_instance_is_in_the_ledger_once(ledger: Ledger) -> None:
    w = dear_bytes(World(policy=Fixed(1, 1)), 0.02).tick(600)
    ledger.write(w.fleet.journal.take())
    w.tick(600)
    ledger.write(w.fleet.journal.take())
    costs = ledger.costs(0.0, w.now)
    (download,) = costs.bytes_billed
    (i,) = w.fleet
    assert (download.label, download.instance, download.of) == (i.label, i.id, ESTIMATED)
    assert download.usd == pytest.approx(22.4 * 0.02)
    assert costs.traffic == pytest.approx(0.448)
    assert ledger.spent(0.0, w.now) == pytest.approx(costs.total), "a budget counts it"
    assert ledger.spent(download.at_s + 1.0, w.now) < costs.total - 0.4


def test_an_order_that_is_not_listed_yet_has_its_download_reserved() -> None:
    w = dear_bytes(World(policy=Fixed(1, 1)), 0.02)
    w.listing_hook = lambda rows: []
    w.tick(10)
    (i,) = w.fleet
    assert i.state is State.ORDERED
    bound = bound_usd(w.fleet, 3600.0, Habits(600.0, 300.0, 22.4), w.now)
    assert bound == pytest.approx(0.448 + 0.4 * (600.0 - (w.now - i.ordered_at)) / 3600.0)


def test_a_day_with_dear_downloads_rents_fewer_machines() -> None:
    w = dear_bytes(World(policy=Fixed(4, 4), limits=Limits(budget_usd_day=2.0)), 0.02)
    w.now = 1_796_083_200.0 + 20 * 3600.0  # four hours before midnight
    for _ in range(40):
        w.fleet.settle_money({"day": 0.448 * len(w.contracts)}, w.now)
        w.tick()
    assert len(w.contracts) == 3, "0.448 + ten minutes of 0.4 $/h and four hours of storage each"


def test_the_rate_of_a_stopped_machine_is_the_one_that_was_billed(ledger: Ledger) -> None:
    """A host asks three times as much for the disk of a stopped machine: policy and ledger go by that."""

    def dearer(rows: list[Row]) -> list[Row]:
        return [
            replace(r, price_now_usd_h=0.03, cur_state="stopped") if r.actual_status == "exited" else r
            for r in rows
        ]

    w = World(policy=Fixed(0, 1))
    w.listing_hook = dearer
    w.with_pool(hot=0, total=1)
    (i,) = w.fleet
    assert (i.stopped_usd_h, i.price_usd_h) == (0.03, 0.03)
    assert w.fleet.snapshot(w.demand, w.now).stopped_usd_h == 0.03
    ledger.write(w.fleet.journal.take())
    began = w.now
    w.tick(3600)
    ledger.write(w.fleet.journal.take())
    assert ledger.costs(began, w.now).stopped == pytest.approx(0.03, rel=0.01)
    w.policy = Fixed(1, 1)
    w.tick(300)
    assert i.state is State.HOT
    assert i.stopped_usd_h == 0.03, "what it costs while it is stopped is known by now"
