"""Other customers: they take GPUs, keep them for a while, are faster now and then, and move prices."""

from random import Random
from statistics import mean

import pytest

from localcloud.cloud import Cloud
from localcloud.machines import Machine
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import Phase
from localcloud.query import Query
from localcloud.realism import HARSH, Realism
from localcloud.renters import PRICE_S, STAY_S

MACHINES = [Machine(100 + n, "RTX 4090", 0.5, slots=8, sliced=True) for n in range(20)]
ORDER = Order(image="vllm", disk_gb=40.0, cancel_unavail=True)
RENTERS, MOVES, VANISH = (HARSH.only([name]) for name in ("renters", "price_moves", "offers_vanish"))


def cloud_with(realism: Realism, machines: list[Machine] = MACHINES, seed: int = 1) -> Cloud:
    cloud = Cloud(machines, Random(seed), realism=realism)
    cloud.advance(0.0)
    return cloud


def taken(cloud: Cloud, now: float) -> list[bool]:
    cloud.advance(now)
    return [slot.rented for m in cloud.machines.values() for slot in cloud.slots(m)[: m.slots]]


def test_others_hold_more_than_half_and_come_and_go() -> None:
    cloud = cloud_with(RENTERS)
    shares = [mean(taken(cloud, at * STAY_S)) for at in range(40)]
    assert RENTERS.renters == 1.0
    assert 0.45 < mean(shares) < 0.75, "some find nothing free, and go"
    early, late = taken(cloud_with(RENTERS), 0.0), taken(cloud, 41 * STAY_S)
    assert early != late


def test_what_happened_does_not_depend_on_how_often_it_is_asked() -> None:
    often, seldom = cloud_with(RENTERS), cloud_with(RENTERS)
    for minute in range(0, 3_000, 7):
        often.advance(minute * 60.0)
    assert taken(often, 180_000.0) == taken(seldom, 180_000.0)


def test_a_slot_may_be_lost_while_its_rental_is_stopped() -> None:
    """A start then waits, as by the fault start-waits, and goes on when the other customer leaves."""
    cloud = cloud_with(RENTERS, [Machine(7, "RTX 4090", 0.5, slots=1)], seed=3)
    waits = 0
    for n in range(200):
        now = n * 3.0 * STAY_S
        cloud.advance(now)
        if cloud.slots(cloud.machines[7])[0].rented:
            continue
        mine = cloud.create(700, ORDER, now)
        with cloud.changing(mine, now + 1.0) as rental:
            rental.stop(now + 1.0)
        with cloud.changing(mine, now + 0.5 * STAY_S) as rental:
            rental.start(now + 0.5 * STAY_S)
        if rental.phase is Phase.SCHEDULING:
            waits += 1
            for hour in range(1, 24 * 30):
                cloud.advance(now + 0.5 * STAY_S + hour * 3_600.0)
                if rental.phase is not Phase.SCHEDULING:
                    break
            assert rental.slot == 0
            cloud.destroy(mine, now + 0.5 * STAY_S + hour * 3_600.0)
            break
        cloud.destroy(mine, now + 0.5 * STAY_S)
    assert waits


def test_a_running_rental_on_demand_is_never_taken_away() -> None:
    cloud = cloud_with(RENTERS)
    free = next(row["id"] for row in cloud.search(Query.read({"rentable": {"eq": True}}), 0.0))
    mine = cloud.create(free, ORDER, 0.0)
    for at in range(1, 100):
        cloud.advance(at * STAY_S / 4)
        assert cloud.rentals[mine].slot is not None


def test_an_interruptible_rental_gives_way_to_another_customer() -> None:
    cloud = cloud_with(RENTERS, [Machine(7, "RTX 4090", 0.5, slots=1)], seed=2)
    now = 0.0
    while cloud.slots(cloud.machines[7])[0].rented:
        now += 600.0
        cloud.advance(now)
    mine = cloud.create(700, Order(image="vllm", price=0.4), now)
    assert cloud.rentals[mine].slot == 0
    for at in range(1, 1_000):
        cloud.advance(now + at * 600.0)
        if cloud.rentals[mine].phase is Phase.OUTBID:
            return
    raise AssertionError("nobody came")


def test_an_offer_may_be_gone_when_it_is_wanted() -> None:
    cloud = cloud_with(VANISH)
    gone = 0
    for n in range(140):
        machine, slot = divmod(n, 8)
        try:
            cloud.create((100 + machine) * 100 + slot, ORDER, 0.0)
        except CloudRefusal as e:
            gone += (e.status, e.error) == (410, "no_such_ask")
    assert 4 <= gone <= 30, "a tenth"
    assert sum(taken(cloud, 0.0)) == 140, "another customer has it"


def test_prices_move_for_new_rentals_and_stay_for_those_that_there_are() -> None:
    cloud = cloud_with(MOVES, MACHINES[:1])
    mine = cloud.create(10_000, ORDER, 0.0)
    price = cloud.rentals[mine].bill.gpu_usd_h
    seen = set()
    for period in range(30):
        now = period * PRICE_S + 1.0
        row = cloud.search(Query.read({"num_gpus": {"eq": "1"}}), now)[0]
        assert row["dph_base"] == pytest.approx(0.5, rel=MOVES.price_moves)
        seen.add(row["dph_base"])
        assert cloud.rentals[mine].bill.gpu_usd_h == price
        new = cloud.create(row["id"], ORDER, now)
        assert cloud.rentals[new].bill.gpu_usd_h == row["dph_base"]
        cloud.destroy(new, now)
    assert len(seen) > 20
