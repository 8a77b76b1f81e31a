"""Money: what is charged, under which state, and what happens without credit."""

import pytest

from localcloud.orders import CloudRefusal
from localcloud.phases import Phase
from tests.unit.localcloud.cloud_world import UP_S, CloudWorld


def test_the_gpu_is_paid_while_it_runs_and_the_disk_always() -> None:
    world = CloudWorld()
    rental = world.rent()
    world.after(UP_S)
    assert world.usd(rental) == {
        "loading": pytest.approx(0.04 * 185 / 3600),
        "running": 0.0,
        "stopped": 0.0,
        "traffic": 0.0,
    }
    world.after(3600.0)
    assert world.usd(rental)["running"] == pytest.approx(0.54)
    world.stop(rental)
    world.after(10.0)
    assert world.usd(rental)["running"] == pytest.approx(0.54 * 3610 / 3600), "until its processes are gone"
    world.after(36_000.0)
    assert world.usd(rental)["stopped"] == pytest.approx(0.4)
    spent = world.cloud.account.spent_usd()
    assert spent["total"] == pytest.approx(sum(world.usd(rental).values()))
    assert spent["gpu"] == pytest.approx(0.5 * 3610 / 3600)
    assert world.cloud.account.credit_usd(world.now) == pytest.approx(100.0 - spent["total"])


def test_the_row_shows_the_price_when_it_runs_and_the_price_now() -> None:
    world = CloudWorld()
    rental = world.rent()
    before, running = world.row(rental), world.after(UP_S).row(rental)
    assert before["dph_total"] == running["dph_total"] == pytest.approx(0.54)
    assert (before["instance"]["totalHour"], running["instance"]["totalHour"]) == pytest.approx((0.04, 0.54))


def test_without_credit_everything_is_stopped_and_nothing_can_be_rented() -> None:
    world = CloudWorld(credit=0.54)
    rental = world.running()
    world.after(3600.0)
    assert world.phase(rental) is Phase.STOPPED
    assert world.row(rental)["status_msg"] is None or world.row(rental)["intended_status"] == "stopped"
    with pytest.raises(CloudRefusal, match="credit"):
        world.rent(701)
    with pytest.raises(CloudRefusal, match="credit"):
        world.start(rental)
