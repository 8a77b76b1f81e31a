"""A rental's life: boots, stops, crashes, reboots, and faults that strike them."""

from random import Random

import pytest

from localcloud.cloud import Cloud
from localcloud.durations import Times
from localcloud.effects import Boot, End, Freeze, MarkLoaded, Moved, Ssh, Terminate
from localcloud.faults import FAULTS
from localcloud.orders import CloudRefusal
from localcloud.phases import Phase
from localcloud.realism import LEVELS
from tests.unit.localcloud.cloud_world import (
    MACHINE,
    ORDER,
    PORTS,
    TIMES,
    UP_S,
    CloudWorld,
    moves,
    restarted,
    struck,
)


def test_a_rental_boots_loads_and_tells_it() -> None:
    world = CloudWorld()
    rental = world.rent()
    world.after(UP_S)
    assert moves(world.effects) == [
        ("offer", "creating"),
        ("creating", "created"),
        ("created", "loading"),
        ("loading", "running"),
    ]
    (boot,) = world.did(Boot)
    assert isinstance(boot, Boot)
    assert (boot.id, boot.boot, boot.order.ports) == (rental, 1, ("22/tcp", "8000/tcp"))
    assert (boot.order.variables, boot.load_s, boot.start_s, boot.fatal_line) == (
        {"A": "x"},
        420.0,
        75.0,
        None,
    )
    world.after(419.0)
    assert not world.cloud.rentals[rental].loaded
    world.after(2.0)
    assert world.did(MarkLoaded) == [MarkLoaded(rental)]
    assert world.row(rental)["actual_status"] == "running"


def test_a_stopped_rental_keeps_its_model_and_starts_quickly() -> None:
    world = CloudWorld()
    rental = world.running()
    world.did()
    world.stop(rental)
    assert world.row(rental)["actual_status"] == "running"
    world.after(10.0)
    assert world.did(Terminate, End) == [Terminate(rental), End(rental)]
    row = world.row(rental)
    assert (row["actual_status"], row["intended_status"], row["ports"]) == ("exited", "stopped", {})
    world.start(rental)
    world.after(15.0)
    (boot,) = world.did(Boot)
    assert isinstance(boot, Boot)
    assert (boot.boot, boot.load_s, boot.keep_ports) == (2, 75.0, PORTS)
    assert world.phase(rental) is Phase.RUNNING


def test_a_crash_is_shown_and_a_start_boots_it_again() -> None:
    world = CloudWorld()
    rental = world.running()
    world.kill(rental)
    world.settle()
    row = world.row(rental)
    assert (world.phase(rental), row["actual_status"], row["intended_status"]) == (
        Phase.CRASHED,
        "exited",
        "running",
    )
    world.start(rental)
    world.after(15.0)
    assert world.phase(rental) is Phase.RUNNING


def test_a_boot_that_fails_is_the_hosts_error_and_it_stays_created() -> None:
    world = CloudWorld()
    world.boots_work = False
    rental = world.rent()
    world.after(UP_S)
    assert world.row(rental)["status_msg"] == "Error response from daemon: no bash"
    assert world.after(1000.0).row(rental)["actual_status"] == "created"


def test_a_boot_that_nobody_waits_for_any_more_changes_nothing() -> None:
    world = CloudWorld()
    rental = world.running()
    world.stop(rental)
    world.cloud.booted(rental, 1, PORTS, world.now)
    world.cloud.booted(99, 1, PORTS, world.now)
    world.cloud.crashed(rental, 1, world.now)
    assert world.phase(rental) is Phase.STOPPING


@pytest.mark.parametrize(
    ("level", "size", "starts"),
    [("none", 16_384, True), ("mild", 4_048, True), ("mild", 4_049, False), ("harsh", 4_049, False)],
)
def test_a_script_over_the_strictest_limit_is_taken_and_never_starts(
    level: str, size: int, starts: bool
) -> None:
    world = CloudWorld(realism=LEVELS[level].only(["script_bytes"]))
    rental = world.rent(onstart="x" * (size - 5), args=("abcd",))
    world.after(100 * UP_S)
    assert world.row(rental)["actual_status"] == ("running" if starts else "loading")


def test_a_reboot_keeps_the_gpu_and_a_recycle_loses_the_disk() -> None:
    world = CloudWorld()
    rental = world.running()
    world.reboot(rental)
    world.after(10.0)
    assert (world.phase(rental), world.cloud.rentals[rental].loaded) == (Phase.RUNNING, True)
    world.reboot(rental, recycle=True)
    world.after(10.0 + 15.0)
    assert (world.phase(rental), world.cloud.rentals[rental].loaded) == (Phase.RUNNING, False)


def test_the_speedup_divides_the_times() -> None:
    cloud = Cloud([MACHINE], Random(1), speedup=10.0, times=TIMES)
    cloud.create(700, ORDER, 0.0)
    assert cloud.next_event(0.0) == pytest.approx(0.3)


def test_the_same_seed_gives_the_same_times() -> None:
    def life(seed: int) -> list[tuple[float, str]]:
        world = CloudWorld(times=Times(), seed=seed)
        world.rent()
        world.after(1000.0)
        return [(round(e.after_s, 9), e.now) for e in world.effects if isinstance(e, Moved)]

    assert life(1) == life(1)
    assert life(1) != life(2)


AT_THE_FACE = {
    *(
        "list-hangs",
        "list-429",
        "list-500",
        "list-empty",
        "list-missing",
        "list-odd",
        "rate-limits",
        "api-error",
        "api-hangs",
    ),
    *("create-lost", "log-never", "key-lacks"),
}
"""They strike in localcloud/api/; tests/unit/localcloud/api/ has them."""

OF_CONTRACTS = {"contract-ends", "price-increase"}
"""What they do is not undone; test_contract.py has them."""


@pytest.mark.parametrize("name", sorted(set(FAULTS) - AT_THE_FACE - OF_CONTRACTS - {"create-410"}))
def test_a_fault_strikes_while_it_is_on_and_lets_go(name: str) -> None:
    """On before the rental boots twice; then off, and a boot later all is well."""
    world = CloudWorld()
    world.faults.add(name, {}, 0.0)
    rental = world.rent() if name != "credit-zero" else None
    if rental is None:
        with pytest.raises(CloudRefusal):
            world.rent()
        world.faults.remove(name)
        rental = world.running()
        world.faults.add(name, {}, world.now)
        world.after(20.0)
    else:
        world.after(UP_S + 500.0)
        if name in ("ports-change", "start-waits"):
            restarted(world, rental)
    assert struck(name, world, rental)
    assert world.faults.remove(name) == 1
    world.after(UP_S * 5 + 500.0)
    if world.phase(rental) in (Phase.CRASHED, Phase.STOPPED):
        world.start(rental)
        world.after(500.0)
    restarted(world, rental)
    assert not struck(name, world, rental)
    assert world.phase(rental) is Phase.RUNNING


def test_every_fault_there_is_is_tested_somewhere() -> None:
    assert set(FAULTS) > AT_THE_FACE
    world = CloudWorld()
    rental = world.running()
    for name in set(FAULTS) - AT_THE_FACE - OF_CONTRACTS:
        struck(name, world, rental)


def test_a_fault_that_is_counted_strikes_so_many_boots() -> None:
    world = CloudWorld()
    world.faults.add("never-ready", {"count": 1}, 0.0)
    first, second = world.rent(700), world.rent(701)
    world.after(UP_S)
    assert [struck("never-ready", world, r) for r in (first, second)].count(True) == 1


def test_a_fault_may_name_its_victim_and_end_by_itself() -> None:
    world = CloudWorld()
    first, second = world.running(), world.rent(701)
    world.after(UP_S)
    world.faults.add("offline", {"instance_id": second, "seconds": 60.0}, world.now)
    world.after(1.0)
    assert [struck("offline", world, r) for r in (first, second)] == [False, True]
    world.did()
    world.after(60.0)
    assert not struck("offline", world, second)
    assert world.did(Freeze) == [Freeze(second, False)]


def test_a_lost_host_charges_nothing() -> None:
    world = CloudWorld()
    rental = world.running()
    world.faults.add("offline", {}, world.now)
    before = sum(world.usd(rental).values())
    world.after(3600.0)
    assert sum(world.usd(rental).values()) == pytest.approx(before)


def test_a_running_instance_follows_a_fault_of_its_ssh() -> None:
    world = CloudWorld()
    rental = world.running()
    world.did()
    world.faults.add("ssh-hangs", {"seconds": 5.0}, world.now)
    world.after(6.0)
    assert world.did(Ssh) == [Ssh(rental, "hang"), Ssh(rental, "ok")]
