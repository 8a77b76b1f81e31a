"""The cloud as plain data: what becomes of a rental, what it costs, and who holds a machine's slots."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from localcloud.account import (
    SHOWN,
    TRANSITIONS,
    Boot,
    Cloud,
    Effect,
    End,
    Freeze,
    IllegalMove,
    Kill,
    MarkLoaded,
    Moved,
    Order,
    Phase,
    Refused,
    Ssh,
    Terminate,
    Times,
)
from localcloud.faults import FAULTS, BadFault, Faults, Scope, limits_of, parse_flag, table
from localcloud.machines import MACHINES, Machine
from localcloud.offers import min_bid

MACHINE = Machine(7, "RTX 4090", 0.50, slots=2, storage_usd_gb_month=0.72, disk_gb=200.0)
"""40 GB of its disk cost 0.04 $/h."""

TIMES = Times(spread=0.0)
"""Real times without chance: 3 + 2 + 180 s to a container, 420 s to a model."""

ORDER = Order(image="vllm", disk_gb=40.0, label="fleet/a", env={"-p 8000:8000": "1", "A": "x"}, onstart="run")
PORTS = {"22/tcp": 20_022, "8000/tcp": 20_080}
UP_S = 185.0


class World:
    """A cloud with its clock, and a world in which every boot works at once."""

    def __init__(
        self, machines: Sequence[Machine] = (MACHINE,), times: Times = TIMES, credit: float = 100.0
    ) -> None:
        self.faults = Faults()
        self.cloud = Cloud(machines, Random(1), times=times, faults=self.faults, credit_usd=credit)
        self.now = 0.0
        self.boots_work = True
        self.effects: list[Effect] = []

    def after(self, seconds: float) -> "World":
        """Let so much time pass, event by event."""
        end = self.now + seconds
        while True:
            self.settle()
            at = self.cloud.next_event(self.now)
            if at is None or at > end:
                break
            self.now = max(at, self.now + 1e-6)
        self.now = end
        self.settle()
        return self

    def settle(self) -> None:
        """Do what the cloud wants done now."""
        self.cloud.advance(self.now)
        while effects := self.cloud.take_effects():
            self.effects += effects
            for effect in effects:
                if isinstance(effect, Boot):
                    if self.boots_work:
                        self.cloud.booted(effect.id, effect.boot, PORTS, self.now)
                    else:
                        self.cloud.boot_failed(effect.id, effect.boot, "no bash", self.now)
                elif isinstance(effect, Kill) and effect.part == "all":
                    self.cloud.crashed(effect.id, self.cloud.rentals[effect.id].boot, self.now)

    def rent(self, offer: int = 700, **other: Any) -> int:
        given = {**{f: getattr(ORDER, f) for f in ("image", "disk_gb", "label", "env", "onstart")}, **other}
        return self.cloud.create(offer, Order(**given), self.now)

    def running(self) -> int:
        """A rental that runs with the model loaded."""
        rental = self.rent()
        self.after(UP_S + 420.0)
        return rental

    def phase(self, rental: int) -> Phase:
        return self.cloud.rentals[rental].phase

    def did(self, *kinds: type) -> list[Effect]:
        """Effects of those kinds since the last call; the others are forgotten."""
        found, self.effects = [e for e in self.effects if isinstance(e, kinds)], []
        return found

    def usd(self, rental: int) -> dict[str, float]:
        self.cloud.advance(self.now)
        return self.cloud.rentals[rental].usd

    def row(self, rental: int) -> dict[str, Any]:
        self.cloud.advance(self.now)
        return self.cloud.row(self.cloud.rentals[rental], self.now)


def moves(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(e.was, e.now) for e in effects if isinstance(e, Moved)]


# -- a life --------------------------------------------------------------------------------------------


def test_a_rental_boots_loads_and_tells_it() -> None:
    world = World()
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
    world = World()
    rental = world.running()
    world.did()
    world.cloud.stop(rental, world.now)
    assert world.row(rental)["actual_status"] == "running"
    world.after(10.0)
    assert world.did(Terminate, End) == [Terminate(rental), End(rental)]
    row = world.row(rental)
    assert (row["actual_status"], row["intended_status"], row["ports"]) == ("exited", "stopped", {})
    world.cloud.start(rental, world.now)
    world.after(15.0)
    (boot,) = world.did(Boot)
    assert isinstance(boot, Boot)
    assert (boot.boot, boot.load_s, boot.keep_ports) == (2, 75.0, PORTS)
    assert world.phase(rental) is Phase.RUNNING


def test_a_destroyed_rental_is_gone_with_its_disk_and_its_bill_is_kept() -> None:
    world = World()
    rental = world.running()
    spent = world.cloud.spent_usd()["total"]
    world.did()
    world.cloud.destroy(rental, world.now)
    world.settle()
    assert world.did(End) == [End(rental, wipe=True)]
    assert world.cloud.rentals == {}
    assert world.cloud.spent_usd()["total"] == pytest.approx(spent)
    with pytest.raises(Refused, match="not found"):
        world.cloud.destroy(rental, world.now)


def test_a_crash_is_shown_and_a_start_boots_it_again() -> None:
    world = World()
    rental = world.running()
    world.cloud.kill(rental, world.now)
    world.settle()
    row = world.row(rental)
    assert (world.phase(rental), row["actual_status"], row["intended_status"]) == (
        Phase.CRASHED,
        "exited",
        "running",
    )
    world.cloud.start(rental, world.now)
    world.after(15.0)
    assert world.phase(rental) is Phase.RUNNING


def test_a_boot_that_fails_is_the_hosts_error_and_it_stays_created() -> None:
    world = World()
    world.boots_work = False
    rental = world.rent()
    world.after(UP_S)
    assert world.row(rental)["status_msg"] == "Error response from daemon: no bash"
    assert world.after(1000.0).row(rental)["actual_status"] == "created"


def test_a_boot_that_nobody_waits_for_any_more_changes_nothing() -> None:
    world = World()
    rental = world.running()
    world.cloud.stop(rental, world.now)
    world.cloud.booted(rental, 1, PORTS, world.now)
    world.cloud.booted(99, 1, PORTS, world.now)
    world.cloud.crashed(rental, 1, world.now)
    assert world.phase(rental) is Phase.STOPPING


def test_a_reboot_keeps_the_gpu_and_a_recycle_loses_the_disk() -> None:
    world = World()
    rental = world.running()
    world.cloud.reboot(rental, world.now)
    world.after(10.0)
    assert (world.phase(rental), world.cloud.rentals[rental].loaded) == (Phase.RUNNING, True)
    world.cloud.reboot(rental, world.now, recycle=True)
    world.after(10.0 + 15.0)
    assert (world.phase(rental), world.cloud.rentals[rental].loaded) == (Phase.RUNNING, False)


def test_the_speedup_divides_the_times() -> None:
    cloud = Cloud([MACHINE], Random(1), speedup=10.0, times=TIMES)
    cloud.create(700, ORDER, 0.0)
    assert cloud.next_event(0.0) == pytest.approx(0.3)


def test_the_same_seed_gives_the_same_times() -> None:
    def life(seed: int) -> list[tuple[float, str]]:
        world = World(times=Times())
        world.cloud = Cloud([MACHINE], Random(seed))
        world.rent()
        world.after(1000.0)
        return [(round(e.after_s, 9), e.now) for e in world.effects if isinstance(e, Moved)]

    assert life(1) == life(1)
    assert life(1) != life(2)


def test_no_phase_can_be_left_by_an_edge_that_is_not_in_the_table() -> None:
    world = World()
    rental = world.rent()
    with pytest.raises(IllegalMove):
        world.cloud._move(world.cloud.rentals[rental], Phase.RUNNING, 0.0)
    assert world.phase(rental) is Phase.CREATING
    assert set(SHOWN) == set(TRANSITIONS) == set(Phase)


def test_what_is_not_there_is_refused() -> None:
    world = World()
    for ask in (world.cloud.start, world.cloud.stop, world.cloud.reboot, world.cloud.kill):
        with pytest.raises(Refused) as refused:
            ask(5, 0.0)
        assert (refused.value.status, refused.value.error) == (404, "no_such_instance")


# -- money ---------------------------------------------------------------------------------------------


def test_the_gpu_is_paid_while_it_runs_and_the_disk_always() -> None:
    world = World()
    rental = world.rent()
    world.after(UP_S)
    assert world.usd(rental) == {"loading": pytest.approx(0.04 * 185 / 3600), "running": 0.0, "stopped": 0.0}
    world.after(3600.0)
    assert world.usd(rental)["running"] == pytest.approx(0.54)
    world.cloud.stop(rental, world.now)
    world.after(10.0)
    assert world.usd(rental)["running"] == pytest.approx(0.54 * 3610 / 3600), "until its processes are gone"
    world.after(36_000.0)
    assert world.usd(rental)["stopped"] == pytest.approx(0.4)
    spent = world.cloud.spent_usd()
    assert spent["total"] == pytest.approx(sum(world.usd(rental).values()))
    assert spent["gpu"] == pytest.approx(0.5 * 3610 / 3600)
    assert world.cloud.credit(world.now) == pytest.approx(100.0 - spent["total"])


def test_the_row_shows_the_price_when_it_runs_and_the_price_now() -> None:
    world = World()
    rental = world.rent()
    before, running = world.row(rental), world.after(UP_S).row(rental)
    assert before["dph_total"] == running["dph_total"] == pytest.approx(0.54)
    assert (before["instance"]["totalHour"], running["instance"]["totalHour"]) == pytest.approx((0.04, 0.54))


def test_without_credit_everything_is_stopped_and_nothing_can_be_rented() -> None:
    world = World(credit=0.54)
    rental = world.running()
    world.after(3600.0)
    assert world.phase(rental) is Phase.STOPPED
    assert world.row(rental)["status_msg"] is None or world.row(rental)["intended_status"] == "stopped"
    with pytest.raises(Refused, match="credit"):
        world.rent(701)
    with pytest.raises(Refused, match="credit"):
        world.cloud.start(rental, world.now)


# -- slots ---------------------------------------------------------------------------------------------


def test_an_offer_is_rented_once() -> None:
    world = World()
    world.rent(cancel_unavail=True)
    with pytest.raises(Refused) as gone:
        world.rent(cancel_unavail=True)
    assert (gone.value.status, gone.value.error) == (410, "no_such_ask")


def test_a_lost_race_without_cancel_leaves_a_stopped_rental_that_bills() -> None:
    world = World()
    world.rent()
    late = world.rent()
    world.after(3600.0)
    assert world.phase(late) is Phase.STOPPED
    assert world.usd(late)["stopped"] == pytest.approx(0.04)


def test_a_start_waits_until_its_machine_has_a_slot() -> None:
    world = World([Machine(7, "RTX 4090", 0.5, slots=1)])
    first = world.running()
    world.cloud.stop(first, world.now)
    world.after(10.0)
    second = world.rent()
    world.cloud.start(first, world.now)
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
    world = World([Machine(7, "RTX 4090", 0.5, slots=1)])
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
    world = World([Machine(7, "RTX 4090", 0.5, slots=1)])
    rental = world.rent(price=0.30)
    world.after(UP_S)
    world.cloud.change_bid(rental, 0.10, world.now)
    assert world.phase(rental) is Phase.OUTBID
    world.cloud.change_bid(rental, None, world.now)
    world.after(15.0)
    assert world.phase(rental) is Phase.RUNNING
    on_demand = World()
    rental = on_demand.rent()
    with pytest.raises(Refused, match="not interruptible"):
        on_demand.cloud.change_bid(rental, 0.5, 0.0)


def test_who_is_outbid_while_it_stops_to_start_again_waits_for_the_slot() -> None:
    world = World([Machine(7, "RTX 4090", 0.5, slots=1)])
    rental = world.rent(price=0.30)
    world.after(UP_S)
    world.cloud.stop(rental, world.now)
    world.cloud.start(rental, world.now)
    assert world.phase(rental) is Phase.STOPPING
    other = world.rent()
    assert world.phase(rental) is Phase.OUTBID
    world.cloud.destroy(other, world.now)
    world.after(15.0)
    assert world.phase(rental) is Phase.RUNNING


def test_a_disk_that_the_machine_has_not_is_refused() -> None:
    world = World()
    with pytest.raises(Refused, match="disk 300 GB, 200 available"):
        world.rent(disk_gb=300.0)


def test_in_any_order_of_events_no_slot_has_two_holders_and_each_dollar_has_a_bill() -> None:
    """A seeded walk: renting, stopping, starting, bidding, killing, faults, on three small machines."""
    for seed in range(5):
        rng = Random(seed)
        world = World([Machine(n, "RTX 3090", 0.2 + n / 100, slots=2) for n in (1, 2, 3)], times=Times())
        world.cloud = Cloud(
            world.cloud.machines.values(), Random(seed), faults=world.faults, credit_usd=1000.0
        )
        for _ in range(200):
            world.after(rng.expovariate(1 / 60.0))
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
                    world.faults.add(name, {"count": 1, "seconds": rng.uniform(1.0, 60.0)}, world.now)
                else:
                    getattr(world.cloud, ask)(rng.choice(ids), world.now)
            except Refused:
                pass
            world.settle()
            holders = [
                (r.machine.machine_id, r.slot) for r in world.cloud.rentals.values() if r.slot is not None
            ]
            assert len(holders) == len(set(holders)), f"seed {seed}"
            for r in world.cloud.rentals.values():
                assert (r.slot is not None) == SHOWN[r.phase].holds_gpu, f"seed {seed}: {r.id} {r.phase}"
        spent = world.cloud.spent_usd()
        assert spent["total"] == pytest.approx(1000.0 - world.cloud.credit(world.now)), f"seed {seed}"
        booted = {(e.id, e.boot) for e in world.effects if isinstance(e, Boot)}
        assert len(booted) == sum(isinstance(e, Boot) for e in world.effects), "a boot is asked for once"


# -- faults --------------------------------------------------------------------------------------------

AT_THE_FACE = {
    *(
        "list-hangs",
        "list-429",
        "list-500",
        "list-empty",
        "list-missing",
        "rate-limits",
        "api-error",
        "api-hangs",
    ),
    *("create-lost", "log-never"),
}
"""They strike in localcloud/api.py; tests/unit/localcloud/test_api.py has them."""


def struck(name: str, world: World, rental: int) -> bool:
    """Whether the rental is as the fault wants it."""
    row = world.row(rental)
    boot = next((e for e in reversed(world.effects) if isinstance(e, Boot) and e.id == rental), None)
    phase = world.phase(rental)
    looks: dict[str, bool] = {
        "docker-error": phase is Phase.CREATED and "OCI runtime" in str(row["status_msg"]),
        "stuck-loading": phase is Phase.LOADING,
        "slow-pull": phase is Phase.LOADING,
        "no-ports": phase is Phase.RUNNING and row["ports"] == {},
        "port-drops": boot is not None and boot.drop_ports,
        "ports-change": boot is not None and boot.boot > 1 and boot.keep_ports == {},
        "start-waits": phase is Phase.SCHEDULING,
        "outbid": phase is Phase.OUTBID,
        "offline": row["actual_status"] == "offline",
        "ssh-hangs": world.cloud.rentals[rental].ssh == "hang",
        "ssh-refuses": world.cloud.rentals[rental].ssh == "refuse",
        "new-host-key": boot is not None and boot.new_host_key,
        "never-ready": boot is not None and boot.load_s > 1e6,
        "fatal-line": boot is not None and boot.fatal_line is not None,
        "dies-hot": phase is Phase.CRASHED,
        "credit-zero": row["intended_status"] == "stopped",
        "create-410": False,
    }
    return looks[name]


def restarted(world: World, rental: int) -> None:
    """Stopped and started again, with time for all of it."""
    world.cloud.stop(rental, world.now)
    world.after(10.0)
    world.cloud.start(rental, world.now)
    world.after(UP_S + 500.0)


@pytest.mark.parametrize("name", sorted(set(FAULTS) - AT_THE_FACE - {"create-410"}))
def test_a_fault_strikes_while_it_is_on_and_lets_go(name: str) -> None:
    """On before the rental boots twice; then off, and a boot later all is well."""
    world = World()
    world.faults.add(name, {}, 0.0)
    rental = world.rent() if name != "credit-zero" else None
    if rental is None:
        with pytest.raises(Refused):
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
        world.cloud.start(rental, world.now)
        world.after(500.0)
    restarted(world, rental)
    assert not struck(name, world, rental)
    assert world.phase(rental) is Phase.RUNNING


def test_every_fault_there_is_is_tested_somewhere() -> None:
    assert set(FAULTS) > AT_THE_FACE
    world = World()
    rental = world.running()
    for name in set(FAULTS) - AT_THE_FACE:
        struck(name, world, rental)


def test_a_fault_that_is_counted_strikes_so_many_boots() -> None:
    world = World()
    world.faults.add("never-ready", {"count": 1}, 0.0)
    first, second = world.rent(700), world.rent(701)
    world.after(UP_S)
    assert [struck("never-ready", world, r) for r in (first, second)].count(True) == 1


def test_a_fault_may_name_its_victim_and_end_by_itself() -> None:
    world = World()
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
    world = World()
    rental = world.running()
    world.faults.add("offline", {}, world.now)
    before = sum(world.usd(rental).values())
    world.after(3600.0)
    assert sum(world.usd(rental).values()) == pytest.approx(before)


def test_a_running_instance_follows_a_fault_of_its_ssh() -> None:
    world = World()
    rental = world.running()
    world.did()
    world.faults.add("ssh-hangs", {"seconds": 5.0}, world.now)
    world.after(6.0)
    assert world.did(Ssh) == [Ssh(rental, "hang"), Ssh(rental, "ok")]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("no-such", {}),
        ("offline", {"odd": 1}),
        ("offline", {"count": 0}),
        ("offline", {"count": 1.5}),
        ("offline", {"count": True}),
        ("offline", {"seconds": "soon"}),
        ("api-error", {"status": 200}),
        ("api-error", {"when": "later"}),
        ("slow-pull", {"factor": 0.5}),
        ("credit-zero", {"instance_id": 1}),
        ("docker-error", {"msg": ""}),
    ],
)
def test_a_fault_that_cannot_be_is_refused(name: str, args: dict[str, Any]) -> None:
    faults = Faults()
    with pytest.raises(BadFault, match=name):
        faults.add(name, args, 0.0)
    assert faults.shown(0.0) == []


def test_a_flag_names_a_fault_and_its_parameters() -> None:
    assert parse_flag("list-500") == ("list-500", {})
    assert parse_flag("api-error:status=502,when=after") == ("api-error", {"status": "502", "when": "after"})
    assert parse_flag("docker-error:msg=a, b") == ("docker-error", {"msg": "a, b"})
    for wrong in ("x:y", "x:a=1,a=2", "x:"):
        with pytest.raises(BadFault):
            parse_flag(wrong)


def test_every_fault_has_a_line_for_people() -> None:
    lines = list(table())
    assert [line.split(" ")[0] for line in lines] == list(FAULTS)
    assert all("seconds" in limits_of(kind) for kind in FAULTS.values())
    assert "instance_id" not in limits_of(FAULTS["list-500"])
    assert FAULTS["offline"].scope is Scope.INSTANCE


# -- the market ----------------------------------------------------------------------------------------


def test_every_machine_of_the_market_is_offered_slot_by_slot() -> None:
    from localcloud.query import Query

    cloud = Cloud(MACHINES, Random(1))
    offers = cloud.search(Query.read({"limit": 1000}), 0.0)
    assert {o["id"] for o in offers} == {m.offer_id(s) for m in MACHINES for s in range(m.slots)}
    cloud.create(offers[0]["id"], ORDER, 0.0)
    rentable = cloud.search(Query.read({"limit": 1000, "rentable": {"eq": True}}), 0.0)
    assert {o["id"] for o in offers} - {o["id"] for o in rentable} == {offers[0]["id"]}
    slot = cloud._slots(cloud.machines[offers[0]["machine_id"]])[1]
    assert min_bid(slot) == pytest.approx(slot.machine.usd_h / 2)
