"""The cloud: who gets a slot of a machine, and what is refused."""

from random import Random

import pytest

from localcloud.cloud import Cloud
from localcloud.durations import Times
from localcloud.effects import Boot, End
from localcloud.machines import MACHINES, Machine
from localcloud.offers import min_bid
from localcloud.orders import CloudRefusal
from localcloud.phases import BILLS, SHOWN, Phase
from localcloud.rental import Rental
from tests.unit.localcloud.cloud_world import ORDER, UP_S, CloudWorld


def test_a_destroyed_rental_is_gone_with_its_disk_and_its_bill_is_kept() -> None:
    world = CloudWorld()
    rental = world.running()
    spent = world.cloud.account.spent_usd()["total"]
    world.did()
    world.cloud.destroy(rental, world.now)
    world.settle()
    assert world.did(End) == [End(rental, wipe=True)]
    assert world.cloud.rentals == {}
    assert world.cloud.account.spent_usd()["total"] == pytest.approx(spent)
    with pytest.raises(CloudRefusal, match="not found"):
        world.cloud.destroy(rental, world.now)


def test_what_is_not_there_is_refused() -> None:
    world = CloudWorld()
    for ask in (world.start, world.stop, world.reboot, world.kill):
        with pytest.raises(CloudRefusal) as refused:
            ask(5)
        assert (refused.value.status, refused.value.error) == (404, "no_such_instance")


def test_an_offer_is_rented_once() -> None:
    world = CloudWorld()
    world.rent(cancel_unavail=True)
    with pytest.raises(CloudRefusal) as gone:
        world.rent(cancel_unavail=True)
    assert (gone.value.status, gone.value.error) == (410, "no_such_ask")


def test_a_lost_race_without_cancel_leaves_a_stopped_rental_that_bills() -> None:
    world = CloudWorld()
    world.rent()
    late = world.rent()
    world.after(3600.0)
    assert world.phase(late) is Phase.STOPPED
    assert world.usd(late)["stopped"] == pytest.approx(0.04)


def test_a_start_waits_until_its_machine_has_a_slot() -> None:
    world = CloudWorld([Machine(7, "RTX 4090", 0.5, slots=1)])
    first = world.running()
    world.stop(first)
    world.after(10.0)
    second = world.rent()
    world.start(first)
    world.after(1000.0)
    row = world.row(first)
    assert (row["actual_status"], row["intended_status"], row["cur_state"]) == (
        "exited",
        "running",
        "stopped",
    )
    world.cloud.destroy(second, world.now)
    world.after(15.0)
    assert world.phase(first) is Phase.RUNNING


def test_who_bids_more_gets_the_slot_and_the_other_comes_back_when_it_is_free() -> None:
    world = CloudWorld([Machine(7, "RTX 4090", 0.5, slots=1)])
    cheap = world.rent(price=0.30)
    world.after(UP_S)
    dear = world.rent(price=0.40)
    world.after(UP_S)
    assert (world.phase(cheap), world.phase(dear)) == (Phase.OUTBID, Phase.RUNNING)
    row = world.row(cheap)
    assert (row["intended_status"], row["actual_status"], row["is_bid"]) == ("stopped", "exited", True)
    world.cloud.destroy(dear, world.now)
    world.after(15.0)
    assert world.phase(cheap) is Phase.RUNNING


def test_a_changed_bid_loses_or_wins_the_slot() -> None:
    world = CloudWorld([Machine(7, "RTX 4090", 0.5, slots=1)])
    rental = world.rent(price=0.30)
    world.after(UP_S)
    world.cloud.change_bid(rental, 0.10, world.now)
    assert world.phase(rental) is Phase.OUTBID
    world.cloud.change_bid(rental, None, world.now)
    world.after(15.0)
    assert world.phase(rental) is Phase.RUNNING
    on_demand = CloudWorld()
    rental = on_demand.rent()
    with pytest.raises(CloudRefusal, match="not interruptible"):
        on_demand.cloud.change_bid(rental, 0.5, 0.0)


def test_who_is_outbid_while_it_stops_to_start_again_waits_for_the_slot() -> None:
    world = CloudWorld([Machine(7, "RTX 4090", 0.5, slots=1)])
    rental = world.rent(price=0.30)
    world.after(UP_S)
    world.stop(rental)
    world.start(rental)
    assert world.phase(rental) is Phase.STOPPING
    other = world.rent()
    assert world.phase(rental) is Phase.OUTBID
    world.cloud.destroy(other, world.now)
    world.after(15.0)
    assert world.phase(rental) is Phase.RUNNING


def test_a_disk_that_the_machine_has_not_is_refused() -> None:
    world = CloudWorld()
    with pytest.raises(CloudRefusal, match="disk 300 GB, 200 available"):
        world.rent(disk_gb=300.0)


def test_in_any_order_of_events_no_slot_has_two_holders_and_each_dollar_has_a_bill() -> None:
    """A seeded walk: renting, stopping, starting, bidding, killing, faults, on three small machines."""
    for seed in range(5):
        rng = Random(seed)
        machines = [Machine(n, "RTX 3090", 0.2 + n / 100, slots=2) for n in (1, 2, 3)]
        world = CloudWorld(machines, Times(), 1000.0, seed, speedup=10.0)
        rentals: dict[int, Rental] = {}
        for _ in range(200):
            world.after(rng.expovariate(1 / 6.0))
            ids = list(world.cloud.rentals) or [0]
            ask = rng.choice(("rent", "bid", "start", "stop", "reboot", "destroy", "kill", "rebid", "fault"))
            try:
                if ask == "rent":
                    world.rent(rng.choice((100, 101, 200, 201, 300, 301)), disk_gb=10.0)
                elif ask == "bid":
                    world.rent(rng.choice((100, 201, 300)), disk_gb=10.0, price=rng.uniform(0.1, 0.4))
                elif ask == "rebid":
                    world.cloud.change_bid(
                        rng.choice(ids), rng.choice((None, rng.uniform(0.05, 0.4))), world.now
                    )
                elif ask == "fault":
                    name = rng.choice(("offline", "outbid", "start-waits", "stuck-loading", "docker-error"))
                    world.faults.add(name, {"count": 1, "seconds": rng.uniform(0.1, 6.0)}, world.now)
                elif ask == "destroy":
                    world.cloud.destroy(rng.choice(ids), world.now)
                else:
                    getattr(world, ask)(rng.choice(ids))
            except CloudRefusal:
                pass
            world.settle()
            rentals.update(world.cloud.rentals)
            holders = [
                (r.machine.machine_id, r.slot) for r in world.cloud.rentals.values() if r.slot is not None
            ]
            assert len(holders) == len(set(holders)), f"seed {seed}"
            for r in world.cloud.rentals.values():
                assert (r.slot is not None) == SHOWN[r.phase].holds_gpu, f"seed {seed}: {r.id} {r.phase}"
        spent = world.cloud.account.spent_usd()
        bills = [r.bill for r in rentals.values()]
        for state in BILLS:
            assert spent[state] == pytest.approx(sum(bill.usd[state] for bill in bills)), f"seed {seed}"
        assert spent["gpu"] == pytest.approx(sum(bill.gpu_usd for bill in bills)), f"seed {seed}"
        assert spent["total"] == pytest.approx(1000.0 - world.cloud.account.credit_usd(world.now)), (
            f"seed {seed}"
        )
        booted = {(e.id, e.boot) for e in world.effects if isinstance(e, Boot)}
        assert len(booted) == sum(isinstance(e, Boot) for e in world.effects), "a boot is asked for once"


def test_every_machine_of_the_market_is_offered_slot_by_slot() -> None:
    from localcloud.query import Query

    cloud = Cloud(MACHINES, Random(1))
    offers = cloud.search(Query.read({"limit": 1000}), 0.0)
    assert {o["id"] for o in offers} == {m.offer_id(s) for m in MACHINES for s in range(m.slots)}
    cloud.create(offers[0]["id"], ORDER, 0.0)
    rentable = cloud.search(Query.read({"limit": 1000, "rentable": {"eq": True}}), 0.0)
    assert {o["id"] for o in offers} - {o["id"] for o in rentable} == {offers[0]["id"]}
    slot = cloud.slots(cloud.machines[offers[0]["machine_id"]])[1]
    assert min_bid(slot) == pytest.approx(slot.machine.usd_h / 2)
