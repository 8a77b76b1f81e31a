"""Contracts end, hosts ask for more, bytes and stopped disks are billed: each switched on alone."""

import pytest

from localcloud.charges import RentalCharges
from localcloud.contract import ASKS_BEFORE_S, DELETED_AFTER_S
from localcloud.images import image_gb, model_gb
from localcloud.machines import DAY_S, Machine
from localcloud.orders import CloudRefusal
from localcloud.phases import Phase
from localcloud.realism import HARSH, Realism
from tests.unit.localcloud.cloud_world import MACHINE, ORDER, UP_S, CloudWorld

SHORT = Machine(7, "RTX 4090", 0.50, slots=2, storage_usd_gb_month=0.72, disk_gb=200.0, rental_days=2.0)


def test_each_byte_of_image_and_model_is_billed_once() -> None:
    """Also where the model loads again after a stop: what has come is on the disk."""
    world = CloudWorld(realism=HARSH.only(["bandwidth"]))
    rental = world.rent()
    world.after(5.0 + 90.0)
    half = world.usd(rental)["traffic"]
    assert half == pytest.approx(0.5 * image_gb(ORDER.image) * 0.002, rel=0.05), "it is billed as it comes"
    world.after(UP_S + 600.0)
    gb = image_gb(ORDER.image) + model_gb(ORDER)
    assert world.usd(rental)["traffic"] == pytest.approx(gb * 0.002)
    world.stop(rental)
    world.after(60.0)
    world.start(rental)
    world.after(600.0)
    assert world.usd(rental)["traffic"] == pytest.approx(gb * 0.002)
    spent = world.cloud.account.spent_usd()
    assert spent["total"] == pytest.approx(100.0 - world.cloud.account.credit_usd(world.now))
    assert spent["traffic"] == pytest.approx(gb * 0.002)


def test_bytes_are_not_billed_and_not_priced_without_that_unkindness() -> None:
    world = CloudWorld()
    rental = world.running()
    assert world.usd(rental)["traffic"] == 0.0
    assert world.row(rental)["inet_down_cost"] == 0.0


def test_storage_is_dearer_while_a_machine_is_stopped() -> None:
    world = CloudWorld(realism=HARSH.only(["stopped_storage"]))
    rental = world.running()
    assert world.row(rental)["instance"]["totalHour"] == pytest.approx(0.54)
    world.stop(rental)
    world.after(10.0)
    shown = world.row(rental)
    assert shown["instance"]["totalHour"] == shown["instance"]["diskHour"] == pytest.approx(0.12)
    assert shown["storage_total_cost"] == pytest.approx(0.04), "the row says what it costs while it runs"
    before = world.usd(rental)["stopped"]
    world.after(3600.0)
    assert world.usd(rental)["stopped"] - before == pytest.approx(0.12)


def test_a_contract_ends_in_a_stop_without_a_start_and_the_disk_goes_two_days_later() -> None:
    world = CloudWorld([SHORT], realism=HARSH.only(["contract_ends"]))
    rental = world.running()
    end = world.row(rental)["end_date"]
    assert end == pytest.approx(2 * DAY_S)
    world.after(end - world.now + 20.0)
    assert world.phase(rental) is Phase.STOPPED
    with pytest.raises(CloudRefusal, match="contract has ended"):
        world.start(rental)
    world.after(DELETED_AFTER_S - 40.0)
    assert rental in world.cloud.rentals
    world.after(60.0)
    assert rental not in world.cloud.rentals
    assert world.cloud.account.spent_usd()["stopped"] == pytest.approx(0.04 * 48, rel=0.01)


def test_a_host_asks_for_more_before_the_end_and_an_accepted_price_holds_from_then_on() -> None:
    world = CloudWorld([SHORT], realism=HARSH.only(["contract_ends", "price_increase"]))
    accepted, unanswered = world.rent(700), world.rent(701)
    world.after(SHORT.rental_days * DAY_S / 2.0 + 5.0)
    assert min(ASKS_BEFORE_S, SHORT.rental_days * DAY_S / 2.0) == DAY_S
    contract = world.cloud.rentals[accepted].contract
    assert contract.pending is not None
    assert contract.pending.gpu_usd_h == pytest.approx(0.7)
    contract.answer(accept=True)
    assert world.row(accepted)["dph_base"] == 0.5, "the contract that runs stays as it is"
    world.after(DAY_S + 60.0)
    assert (world.phase(accepted), world.phase(unanswered)) == (Phase.RUNNING, Phase.STOPPED)
    shown = world.row(accepted)
    assert shown["dph_base"] == pytest.approx(0.7)
    assert shown["end_date"] == pytest.approx(4 * DAY_S)


@pytest.mark.parametrize("fault", ["contract-ends", "price-increase"])
def test_a_fault_brings_it_about_alone(fault: str) -> None:
    world = CloudWorld()
    rental = world.running()
    world.faults.add(fault, {}, world.now)
    world.after(1.0)
    contract = world.cloud.rentals[rental].contract
    assert (contract.pending is not None) == (fault == "price-increase")
    world.after(90.0)
    assert (contract.ended_at is not None) == (fault == "contract-ends")


def test_a_new_account_may_spend_so_much_an_hour() -> None:
    world = CloudWorld(realism=Realism(spend_limit_usd_h=0.6))
    world.running()
    with pytest.raises(CloudRefusal, match="spend_rate_limit"):
        world.rent(701)


def test_without_a_card_machines_are_deleted_two_days_after_the_credit_has_gone() -> None:
    world = CloudWorld(credit=0.2, realism=HARSH.only(["no_card"]))
    rental = world.rent()
    world.after(3600.0)
    assert world.phase(rental) is Phase.STOPPED
    world.after(DELETED_AFTER_S - 3600.0)
    assert rental in world.cloud.rentals
    world.after(3600.0)
    assert rental not in world.cloud.rentals


def test_charges_are_by_day_and_kind_and_add_up_to_the_bill() -> None:
    world = CloudWorld([MACHINE], realism=HARSH.only(["bandwidth"]))
    rental = world.running()
    world.after(2 * DAY_S)
    bill, charges = world.cloud.rentals[rental].bill, world.cloud.account.charges[rental]
    days, sums = charges.within(0.0, world.now)
    assert days == [0, 1, 2]
    assert sum(c.usd for c in sums.values()) == pytest.approx(sum(bill.usd.values()))
    assert sums["gpu"].usd == pytest.approx(bill.gpu_usd)
    (only,), day = charges.within(DAY_S + 5.0, DAY_S + 6.0)
    assert only == 1
    assert day["gpu"].amount == pytest.approx(24.0)
    assert day["bwd"].usd == 0.0
    assert day["disk"].usd == pytest.approx(24 * 0.04)


def test_hours_across_midnight_are_split() -> None:
    charges = RentalCharges(1, None)
    charges.add_hours("gpu", 1.0, DAY_S - 1800.0, DAY_S + 5400.0)
    assert {day: c.usd for (day, _), c in charges.by_day.items()} == {0: 0.5, 1: 1.5}
