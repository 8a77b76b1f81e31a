"""A cloud model with its clock, and a world in which every boot works at once."""

from collections.abc import Sequence
from random import Random
from typing import Any

from localcloud import rows
from localcloud.cloud import Cloud
from localcloud.durations import Times
from localcloud.effects import Boot, Effect, Kill, Moved
from localcloud.faults import Faults
from localcloud.machines import Machine
from localcloud.orders import Order
from localcloud.phases import Phase
from localcloud.realism import NONE, Realism

MACHINE = Machine(7, "RTX 4090", 0.50, slots=2, storage_usd_gb_month=0.72, disk_gb=200.0)
"""40 GB of its disk cost 0.04 $/h."""


TIMES = Times(spread=0.0)
"""Real times without chance: 3 + 2 + 180 s to a container, 420 s to a model."""


ORDER = Order(image="vllm", disk_gb=40.0, label="fleet/a", env={"-p 8000:8000": "1", "A": "x"}, onstart="run")


PORTS = {"22/tcp": 20_022, "8000/tcp": 20_080}


UP_S = 185.0


class CloudWorld:
    """A cloud with its clock, and a world in which every boot works at once."""

    def __init__(
        self,
        machines: Sequence[Machine] = (MACHINE,),
        times: Times = TIMES,
        credit: float = 100.0,
        seed: int = 1,
        speedup: float = 1.0,
        realism: Realism = NONE,
    ) -> None:
        self.faults = Faults()
        self.cloud = Cloud(
            machines,
            Random(seed),
            speedup=speedup,
            times=times,
            faults=self.faults,
            credit_usd=credit,
            realism=realism,
        )
        self.now = 0.0
        self.boots_work = True
        self.effects: list[Effect] = []

    def after(self, seconds: float) -> "CloudWorld":
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
        return self.cloud.rentals[rental].bill.usd

    def start(self, rental: int) -> None:
        with self.cloud.changing(rental, self.now) as r:
            r.start(self.now)

    def stop(self, rental: int) -> None:
        with self.cloud.changing(rental, self.now) as r:
            r.stop(self.now)

    def reboot(self, rental: int, *, recycle: bool = False) -> None:
        with self.cloud.changing(rental, self.now) as r:
            r.reboot(self.now, recycle=recycle)

    def kill(self, rental: int) -> None:
        with self.cloud.changing(rental, self.now) as r:
            r.kill()

    def row(self, rental: int) -> dict[str, Any]:
        self.cloud.advance(self.now)
        return rows.row(self.cloud.rentals[rental], self.faults, self.now)


def moves(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(e.was, e.now) for e in effects if isinstance(e, Moved)]


def struck(name: str, world: CloudWorld, rental: int) -> bool:
    """Whether the rental is as the fault wants it."""
    row = world.row(rental)
    boot = next((e for e in reversed(world.effects) if isinstance(e, Boot) and e.id == rental), None)
    phase = world.phase(rental)
    looks: dict[str, bool] = {
        "docker-error": phase is Phase.CREATED and "OCI runtime" in str(row["status_msg"]),
        "stuck-loading": phase is Phase.LOADING,
        "host-gives-up": (row["actual_status"], row["intended_status"]) == ("loading", "stopped"),
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
        "gated-model": boot is not None and bool(boot.hub.gated),
        "missing-model": boot is not None and bool(boot.hub.missing),
        "unknown-architecture": boot is not None and bool(boot.hub.unknown_architecture),
        "wrong-argument": boot is not None and bool(boot.hub.argument),
        "no-chat-template": boot is not None and bool(boot.hub.no_chat_template),
        "missing-image": "manifest unknown" in str(row["status_msg"]),
        "private-image": "pull access denied" in str(row["status_msg"]),
        "dies-hot": phase is Phase.CRASHED,
        "credit-zero": row["intended_status"] == "stopped",
        "create-410": False,
    }
    return looks[name]


def restarted(world: CloudWorld, rental: int) -> None:
    """Stopped and started again, with time for all of it."""
    world.stop(rental)
    world.after(10.0)
    world.start(rental)
    world.after(UP_S + 500.0)
