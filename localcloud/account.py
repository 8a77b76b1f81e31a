"""A Vast.ai account as plain data: what it rents, in which state that is, and what it costs.

       create                                             ┌──── reboot ────┐
    ───────────► creating ─► created ─► loading ─► RUNNING ─► rebooting ───┤
                                           ▲  ▲       │ └───► recycling ─► loading
              its GPU is free              │  │       ├─ its processes died ─► CRASHED ─► loading (start)
    scheduling ────────────────────────────┘  │       ├─ stop ─► STOPPING ─► stopped
        ▲ ▲        bid high enough, GPU free  │       └─ somebody bids more ─► outbid
        │ └── start ── stopped       outbid ──┘
        └── (a start while it is still stopping)

In capitals: the GPU is paid for. Storage is paid in every state; a host that is offline charges nothing.
A rental holds its slot of the machine from creation until it is stopped or outbid, and must wait for a
slot to start again. Nothing here does I/O: what must happen in the world comes out of `take_effects`, and
a boot counts as running only when `booted` says that its processes are there.

Invariants
- Each dollar charged is in exactly one rental's bill, under the state it was in, and left the credit.
- No slot has two holders. Who does not hold one has no processes: an End comes before the slot is free.
- All times are drawn when a rental is created or booted, from a generator of its own that was seeded from
  the one passed in, so the order of calls decides them and the clock does not.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from localcloud.faults import Faults
from localcloud.market import (
    DAY_S,
    MIN_BID_SHARE,
    Machine,
    Query,
    Slot,
    cost_now,
    hardware,
    min_bid,
    prices,
)

HISTORY_LINES = 100
"""What happened to a rental is kept for so many lines; `logs --daemon-logs` shows it."""

RECHECK_S = 0.5
"""A rental that a fault holds looks so often whether the fault is over. Wall clock."""

FOREVER_S = 1e8
"""Three years: how long a model server loads that never becomes ready."""


@dataclass(frozen=True)
class Times:
    """How long things take at the real service, in seconds; each is drawn within ±spread of it.

    provision, create: order to container; pull: image to a machine that has it not; restart: container up
    again with the image there; load, start: the model server from its start to ready, the first time and
    with the model on the disk; stop: SIGTERM to SIGKILL, docker's default; reboot: container down and up.
    """

    provision_s: float = 3.0
    create_s: float = 2.0
    pull_s: float = 180.0
    restart_s: float = 15.0
    load_s: float = 420.0
    start_s: float = 75.0
    stop_s: float = 10.0
    reboot_s: float = 10.0
    spread: float = 0.2


class Phase(StrEnum):
    """Where a rental is; the words of the status page. The service's own words are in SHOWN."""

    CREATING = "creating"
    CREATED = "created"
    LOADING = "loading"
    RUNNING = "running"
    REBOOTING = "rebooting"
    RECYCLING = "recycling"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SCHEDULING = "scheduling"
    OUTBID = "outbid"
    CRASHED = "crashed"


P = Phase
TRANSITIONS: Mapping[Phase, Mapping[Phase, str]] = MappingProxyType(
    {
        # from: {to: the event in the world that causes it}
        P.CREATING: {
            P.CREATED: "the host made the container",
            P.STOPPED: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.CREATED: {
            P.LOADING: "the host pulls the image",
            P.STOPPED: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.LOADING: {
            P.RUNNING: "its processes are up",
            P.CREATED: "the container could not be started",
            P.STOPPED: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.RUNNING: {
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
            P.CRASHED: "its processes died",
            P.REBOOTING: "rebooted by its owner",
            P.RECYCLING: "recycled by its owner",
        },
        P.REBOOTING: {
            P.RUNNING: "its processes are up",
            P.CREATED: "the container could not be started",
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.RECYCLING: {
            P.LOADING: "the host made the container anew",
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.STOPPING: {
            P.STOPPED: "its processes are gone",
            P.OUTBID: "somebody bids more, and it was started again meanwhile",
        },
        P.STOPPED: {
            P.SCHEDULING: "started by its owner",
        },
        P.SCHEDULING: {
            P.LOADING: "a slot of its machine is free",
            P.STOPPED: "stopped by its owner, or no credit",
        },
        P.OUTBID: {
            P.LOADING: "a slot of its machine is free, or cheap enough",
            P.SCHEDULING: "started by its owner",
            P.STOPPED: "stopped by its owner, or no credit",
        },
        P.CRASHED: {
            P.LOADING: "started by its owner",
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
            P.REBOOTING: "rebooted by its owner",
            P.RECYCLING: "recycled by its owner",
        },
    }
)


@dataclass(frozen=True)
class Shown:
    """How the service's fields show a phase (vast-contract 2.12), and what it is billed as."""

    actual_status: str | None
    intended_status: str
    cur_state: str
    holds_gpu: bool
    bills_gpu: bool
    bill: str


SHOWN: Mapping[Phase, Shown] = MappingProxyType(
    {
        P.CREATING: Shown(None, "running", "running", True, False, "loading"),
        P.CREATED: Shown("created", "running", "running", True, False, "loading"),
        P.LOADING: Shown("loading", "running", "running", True, False, "loading"),
        P.RUNNING: Shown("running", "running", "running", True, True, "running"),
        P.REBOOTING: Shown("rebooting", "running", "running", True, True, "running"),
        P.RECYCLING: Shown("recycling", "running", "running", True, True, "running"),
        P.STOPPING: Shown("running", "stopped", "running", True, True, "running"),
        P.STOPPED: Shown("exited", "stopped", "stopped", False, False, "stopped"),
        P.SCHEDULING: Shown("exited", "running", "stopped", False, False, "stopped"),
        P.OUTBID: Shown("exited", "stopped", "stopped", False, False, "stopped"),
        P.CRASHED: Shown("exited", "running", "running", True, True, "running"),
    }
)
BILLS = ("loading", "running", "stopped")


class IllegalMove(Exception):
    """The table of transitions has no such edge; nothing was changed. A mistake of this file."""


class Refused(Exception):
    """The cloud says no, in the service's own status and words; nothing was changed."""

    def __init__(self, status: int, error: str, msg: str, **also: Any) -> None:
        """also: further fields of the answer."""
        super().__init__(msg)
        self.status = status
        self.error = error
        self.msg = msg
        self.also = also


@dataclass(frozen=True)
class Order:
    """What is to be rented. price: a bid per machine in $/h, None on demand.

    env: what -e, -p and so on said, ports as {"-p 8000:8000": "1"} (vast-contract 2.2).
    """

    image: str
    disk_gb: float = 10.0
    label: str | None = None
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    onstart: str | None = None
    price: float | None = None
    cancel_unavail: bool = False
    runtype: str = "ssh"
    args: tuple[str, ...] = ()
    instance_key: str = ""

    @property
    def ports(self) -> tuple[str, ...]:
        """The ports inside that must be reachable, as "8000/tcp"; ssh's is always there."""
        inside = ["22/tcp"]
        for name in self.env:
            if name.startswith("-p "):
                port, _, protocol = name.rpartition(":")[2].partition("/")
                inside.append(f"{port}/{protocol or 'tcp'}")
        return tuple(dict.fromkeys(inside))

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its start script as -e said."""
        return {name: value for name, value in self.env.items() if not name.startswith("-")}


# --- what must happen in the world -----------------------------------------------------------------


@dataclass(frozen=True)
class Boot:
    """Start its processes. `Cloud.booted` or `Cloud.boot_failed` is told how it went.

    keep_ports: the ports outside that it had, to be given again if they are free; drop_ports: those shown
    must be bound and dead. load_s, start_s: what its model server takes, the first time and when it is
    started once more. ssh: "ok", "hang" or "refuse".
    """

    id: int
    boot: int
    order: Order
    machine: Machine
    authorized_keys: tuple[str, ...]
    keep_ports: Mapping[str, int]
    drop_ports: bool
    load_s: float
    start_s: float
    fatal_line: str | None
    new_host_key: bool
    ssh: str


@dataclass(frozen=True)
class Terminate:
    """Ask its start script to end."""

    id: int


@dataclass(frozen=True)
class End:
    """Its processes are gone, and with wipe its disk too."""

    id: int
    wipe: bool = False


@dataclass(frozen=True)
class Kill:
    """SIGKILL: "all" of its processes, or those of its "model" server."""

    id: int
    part: str = "all"


@dataclass(frozen=True)
class Freeze:
    """Its processes stand still, or go on."""

    id: int
    frozen: bool


@dataclass(frozen=True)
class Ssh:
    """Its ssh server behaves like this from now on: "ok", "hang" or "refuse"."""

    id: int
    mode: str


@dataclass(frozen=True)
class Authorize:
    """These ssh keys open it, running or not."""

    id: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class MarkLoaded:
    """Its disk holds the model: a model server started again in this boot takes start_s."""

    id: int


@dataclass(frozen=True)
class Moved:
    """For the log: a rental changed its phase."""

    id: int
    was: str
    now: str
    why: str
    after_s: float


Effect = Boot | Terminate | End | Kill | Freeze | Ssh | Authorize | MarkLoaded | Moved


@dataclass
class Rental:
    """One contract. Times are epoch seconds; those of a boot are of the last one."""

    id: int
    order: Order
    machine: Machine
    created_at: float
    chance: random.Random
    authorized_keys: tuple[str, ...]
    phase: Phase = Phase.CREATING
    since: float = 0.0
    due: float | None = None  # when the phase ends by itself
    slot: int | None = None
    label: str | None = None
    price: float | None = None  # its bid, $/h; None on demand
    wanted: bool = True  # its owner wants it to run
    boot: int = 0
    booted_at: float = 0.0
    load_s: float = 0.0  # what its model server takes in this boot
    pulled: bool = False
    loaded: bool = False
    offline: bool = False
    ssh: str = "ok"
    ports: Mapping[str, int] = field(default_factory=dict)
    dies_at: float | None = None
    doomed_boot: int = 0  # the boot that dies-hot has struck
    status_msg: str | None = None
    billed_to: float = 0.0
    usd: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BILLS, 0.0))
    gpu_usd: float = 0.0
    history: list[str] = field(default_factory=list)

    @property
    def who(self) -> tuple[int, int]:
        """This boot of it, as faults know it."""
        return self.id, self.boot

    @property
    def gpu_usd_h(self) -> float:
        """Its GPUs' price when it runs."""
        return self.machine.usd_h if self.price is None else self.price

    @property
    def storage_usd_h(self) -> float:
        """Its disk's price."""
        return self.machine.storage_usd_h(self.order.disk_gb)

    def usd_h_now(self) -> tuple[float, float]:
        """What its GPU and its storage cost now, $/h; an offline host charges nothing."""
        if self.offline:
            return 0.0, 0.0
        return (self.gpu_usd_h if SHOWN[self.phase].bills_gpu else 0.0), self.storage_usd_h


class Cloud:
    """The account and the market. Methods that take `now` (epoch seconds) first do what was due by then."""

    def __init__(
        self,
        machines: Iterable[Machine],
        rng: random.Random,
        *,
        speedup: float = 1.0,
        times: Times | None = None,
        faults: Faults | None = None,
        credit_usd: float = 100.0,
        first_id: int = 1001,
    ) -> None:
        """Nothing is rented. speedup divides the times, not prices; first_id: the first rental's number."""
        self.machines = {m.machine_id: m for m in machines}
        self.speedup = speedup
        self.times = times or Times()
        self.faults = faults or Faults()
        self.rentals: dict[int, Rental] = {}
        self.ssh_keys: dict[int, tuple[str, float]] = {}
        self.ended_usd = dict.fromkeys(BILLS, 0.0)
        self.ended_gpu_usd = 0.0
        self.ended = 0
        self._credit_usd = credit_usd
        self._rng = rng
        self._next_id = first_id
        self._effects: list[Effect] = []

    # -- time, and what the outside world reports -----------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """What must be done in the world since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_event(self, now: float) -> float | None:
        """When `advance` has something to do again, at the latest; None when nothing is under way."""
        times = [event[0] for r in self.rentals.values() if (event := _next(r))]
        if (fault_ends := self.faults.next_end()) is not None:
            times.append(fault_ends)
        if any(_held(r) for r in self.rentals.values()):
            times.append(now + RECHECK_S)
        if (burn := self.burn_usd_h()) > 0 and self._credit_usd > 0:
            times.append(now + self._credit_usd / burn * 3600.0)
        return min(times, default=None)

    def advance(self, now: float) -> None:
        """Everything that was due until now has happened, in the order of its times."""
        while True:
            due = [(event, r.id) for r in self.rentals.values() if (event := _next(r)) and event[0] <= now]
            if not due:
                break
            (at, what), rental_id = min(due)
            self._happen(self.rentals[rental_id], what, at, now)
        self.faults.expire(now)
        for r in self.rentals.values():
            self._settle(r, now)
        if self._rented_without_credit(now):
            self._stop_all(now)
        self._follow_faults(now)
        self._give_slots(now)

    def booted(self, rental_id: int, boot: int, ports: Mapping[str, int], now: float) -> None:
        """The processes of that boot run and these ports lead to them. A boot nobody waits for is ignored."""
        self.advance(now)
        r = self._awaited(rental_id, boot)
        if r is not None:
            r.ports = dict(ports)
            r.booted_at = now
            r.pulled = True
            r.status_msg = f"success, running {r.order.image}/ssh"
            self._move(r, P.RUNNING, now)
            self._follow_faults(now)

    def boot_failed(self, rental_id: int, boot: int, why: str, now: float) -> None:
        """The processes of that boot could not be started: the host's fault, as status_msg shows."""
        self.advance(now)
        r = self._awaited(rental_id, boot)
        if r is not None:
            r.status_msg = f"Error response from daemon: {why}"
            self._move(r, P.CREATED, now)

    def crashed(self, rental_id: int, boot: int, now: float) -> None:
        """All processes of that boot are gone, and nobody here ended them."""
        self.advance(now)
        r = self.rentals.get(rental_id)
        if r is not None and r.boot == boot and r.phase is P.RUNNING:
            r.status_msg = "container exited with status 137"
            self._move(r, P.CRASHED, now)

    def _awaited(self, rental_id: int, boot: int) -> Rental | None:
        """The rental, if it waits for that boot of its processes."""
        r = self.rentals.get(rental_id)
        if r is None or r.boot != boot or r.phase not in (P.LOADING, P.REBOOTING) or r.due is not None:
            return None
        return r

    # -- the market -----------------------------------------------------------------------------------

    def search(self, query: Query, now: float) -> list[dict[str, Any]]:
        """The offers that match."""
        self.advance(now)
        return query.answer((slot for m in self.machines.values() for slot in self._slots(m)), now)

    def create(self, offer_id: int, order: Order, now: float) -> int:
        """Rent the offer; the new rental's id. Raises Refused."""
        self.advance(now)
        machine = self.machines.get(offer_id // 100)
        index = offer_id % 100
        if machine is None or index >= machine.slots:
            raise Refused(
                404,
                "invalid_args",
                f"error 404/3603: no_such_ask Instance type by id {offer_id} is not available.",
                ask_id=offer_id,
            )
        if self.credit(now) <= 0:
            raise Refused(400, "insufficient_credit", "error 400/3470: insufficient credit", ask_id=offer_id)
        slot = self._slots(machine)[index]
        if order.disk_gb > slot.free_disk_gb:
            raise Refused(
                400,
                "invalid_args",
                f"error 400/3467: Invalid args: disk {order.disk_gb:g} GB, {slot.free_disk_gb:g} available",
                ask_id=offer_id,
            )
        gets_it = not slot.rented and (order.price is None or order.price >= min_bid(slot))
        if self.faults.strikes("create-410", now) is not None or (order.cancel_unavail and not gets_it):
            raise Refused(
                410,
                "no_such_ask",
                f"error 410/3907: no_such_ask Instance type {offer_id} is no longer available.",
                ask_id=offer_id,
            )
        if gets_it:
            self._clear(machine, index, now)
        return self._rent(machine, index if gets_it else None, order, now)

    def _rent(self, machine: Machine, index: int | None, order: Order, now: float) -> int:
        """index None: somebody else has the slot, so the rental begins without one."""
        r = Rental(
            self._next_id,
            order,
            machine,
            created_at=now,
            chance=random.Random(self._rng.getrandbits(64)),
            authorized_keys=tuple(key for key, _ in self.ssh_keys.values()),
            since=now,
            slot=index,
            label=order.label,
            price=order.price,
            billed_to=now,
        )
        self._next_id += 1
        if index is not None:
            r.boot = 1
            r.due = now + self._draw(r, self.times.provision_s)
        elif order.price is None:
            # Without cancel_unavail a lost race leaves a stopped rental that bills (vast-contract 2.2).
            r.phase, r.wanted = P.STOPPED, False
        else:
            r.phase = P.OUTBID
        self.rentals[r.id] = r
        self._note(r, now, f"rented, {r.phase}")
        self._effects.append(Moved(r.id, "offer", r.phase, f"rented on machine {machine.machine_id}", 0.0))
        return r.id

    # -- what its owner may ask of a rental -----------------------------------------------------------

    def start(self, rental_id: int, now: float) -> None:
        """It shall run: at once, or when its machine has a slot for it. Raises Refused."""
        self.advance(now)
        r = self._get(rental_id)
        if self.credit(now) <= 0:
            raise Refused(400, "missing_billing", "Your account has no credit: add some to start instances.")
        r.wanted = True
        if r.phase in (P.STOPPED, P.OUTBID):
            self._move(r, P.SCHEDULING, now)
            self._give_slots(now)
        elif r.phase is P.CRASHED:
            self._effects.append(End(r.id))
            self._begin_boot(r, now)

    def stop(self, rental_id: int, now: float) -> None:
        """It shall be stopped: its GPU is given up, its disk stays. Raises Refused."""
        self.advance(now)
        self._stop(self._get(rental_id), now)
        self._give_slots(now)

    def reboot(self, rental_id: int, now: float, *, recycle: bool = False) -> None:
        """Its container goes down and comes up on the same GPU, recycled from the image. Raises Refused."""
        self.advance(now)
        r = self._get(rental_id)
        if r.phase not in (P.RUNNING, P.CRASHED):
            raise Refused(400, "not_running", f"Instance {rental_id} is not running.")
        self._effects.append(Terminate(r.id))
        self._move(r, P.RECYCLING if recycle else P.REBOOTING, now)
        r.due = now + self._draw(r, self.times.reboot_s)

    def change_bid(self, rental_id: int, price: float | None, now: float) -> None:
        """Its bid is that, $/h; None is one that wins. Raises Refused for a rental on demand."""
        self.advance(now)
        r = self._get(rental_id)
        if r.price is None:
            raise Refused(400, "invalid_args", f"Instance {rental_id} is not interruptible.")
        slots = self._slots(r.machine)
        # With all slots rented on demand no bid wins now; its own stands until one is free.
        open_slots = (slot for slot in slots if not slot.rented or slot.index == r.slot)
        floor = min((min_bid(slot) for slot in open_slots), default=r.price)
        self._settle(r, now)
        r.price = max(floor, r.price) if price is None else price
        if SHOWN[r.phase].holds_gpu and r.price < MIN_BID_SHARE * r.machine.usd_h:
            self._lose_slot(r, now)
        self._give_slots(now)

    def relabel(self, rental_id: int, label: str, now: float) -> None:
        """Its label is that. Raises Refused."""
        self.advance(now)
        r = self._get(rental_id)
        if len(label) > 1024:
            raise Refused(400, "label_too_long", f"label: at most 1024 characters, got {len(label)}")
        r.label = label or None

    def destroy(self, rental_id: int, now: float) -> None:
        """It is gone, with its disk; its bill is kept. Raises Refused."""
        self.advance(now)
        r = self.rentals.get(rental_id)
        if r is None:
            raise Refused(404, "not_found", f"Instance {rental_id} not found.")
        del self.rentals[rental_id]
        for bill, usd in r.usd.items():
            self.ended_usd[bill] += usd
        self.ended_gpu_usd += r.gpu_usd
        self.ended += 1
        self._effects += [End(r.id, wipe=True), Moved(r.id, r.phase, "gone", "destroyed", now - r.since)]
        self._give_slots(now)

    def attach_key(self, rental_id: int, key: str, now: float) -> None:
        """That ssh key opens it too. Raises Refused."""
        self.advance(now)
        r = self._get(rental_id)
        if key not in r.authorized_keys:
            r.authorized_keys += (key,)
            self._effects.append(Authorize(r.id, r.authorized_keys))

    def add_key(self, key: str, now: float) -> int:
        """The account has that ssh key, and gives it to what is rented from now on; the key's number."""
        for number, (known, _) in self.ssh_keys.items():
            if known == key:
                return number
        number = len(self.ssh_keys) + 1
        self.ssh_keys[number] = (key, now)
        return number

    def kill(self, rental_id: int, now: float, part: str = "all") -> None:
        """Its processes get SIGKILL, as if they had crashed. Raises Refused."""
        self.advance(now)
        r = self._get(rental_id)
        if r.phase is not P.RUNNING:
            raise Refused(400, "not_running", f"Instance {rental_id} is not running.")
        self._effects.append(Kill(r.id, part))

    def _get(self, rental_id: int) -> Rental:
        r = self.rentals.get(rental_id)
        if r is None:
            raise Refused(404, "no_such_instance", f"Instance {rental_id} not found.")
        return r

    # -- money ----------------------------------------------------------------------------------------

    def credit(self, now: float) -> float:
        """Dollars left to spend."""
        return 0.0 if self.faults.strikes("credit-zero", now) is not None else self._credit_usd

    def burn_usd_h(self) -> float:
        """What everything costs now, $/h."""
        return sum(sum(r.usd_h_now()) for r in self.rentals.values())

    def spent_usd(self) -> dict[str, float]:
        """All dollars so far, by the state they were charged in and in total, those for GPUs apart too."""
        rentals = self.rentals.values()
        spent = {bill: self.ended_usd[bill] + sum(r.usd[bill] for r in rentals) for bill in BILLS}
        total = sum(spent.values())
        return spent | {"total": total, "gpu": self.ended_gpu_usd + sum(r.gpu_usd for r in rentals)}

    def _settle(self, r: Rental, now: float) -> None:
        """What it cost until now is charged."""
        hours = (now - r.billed_to) / 3600.0
        if hours <= 0:
            return
        gpu, storage = r.usd_h_now()
        r.usd[SHOWN[r.phase].bill] += (gpu + storage) * hours
        r.gpu_usd += gpu * hours
        self._credit_usd -= (gpu + storage) * hours
        r.billed_to = now

    def _rented_without_credit(self, now: float) -> bool:
        return bool(self.rentals) and self.credit(now) <= 0

    def _stop_all(self, now: float) -> None:
        for r in self.rentals.values():
            if r.phase not in (P.STOPPED, P.STOPPING) or r.wanted:
                self._stop(r, now)
                r.status_msg = "stopped: the account has no credit"

    # -- inside ---------------------------------------------------------------------------------------

    def _happen(self, r: Rental, what: str, at: float, now: float) -> None:
        """That event of the rental, due at `at`, happens; now is later by what nobody looked."""
        if what == "loaded":
            r.loaded = True
            self._effects.append(MarkLoaded(r.id))
        elif what == "dies":
            r.dies_at = None
            struck = self.faults.strikes("dies-hot", now, r.who)
            if struck is not None and r.phase is P.RUNNING:
                self._effects.append(Kill(r.id, struck["part"]))
        else:
            self._phase_ends(r, at, now)

    def _phase_ends(self, r: Rental, at: float, now: float) -> None:
        match r.phase:
            case P.CREATING:
                self._move(r, P.CREATED, at)
                r.due = at + self._draw(r, self.times.create_s)
            case P.CREATED:
                broken = self.faults.strikes("docker-error", now, r.who)
                r.status_msg = broken["msg"] if broken else None
                if broken:
                    r.due = now + RECHECK_S
                else:
                    self._load(r, at)
            case P.LOADING:
                if self.faults.strikes("stuck-loading", now, r.who) is not None:
                    r.due = now + RECHECK_S
                else:
                    self._boot(r, now)
            case P.REBOOTING:
                self._effects.append(End(r.id))
                r.boot += 1
                self._boot(r, now)
            case P.RECYCLING:
                self._effects.append(End(r.id, wipe=True))
                r.loaded = False
                self._begin_boot(r, at)
            case P.STOPPING:
                self._effects.append(End(r.id))
                r.slot = None
                self._move(r, P.STOPPED, at)
                if r.wanted:  # started again meanwhile
                    self._move(r, P.SCHEDULING, at)

    def _begin_boot(self, r: Rental, at: float) -> None:
        """A new boot begins, on the slot that it holds."""
        r.boot += 1
        self._load(r, at)

    def _load(self, r: Rental, at: float) -> None:
        """Its image is pulled, or its container is started when the image is there."""
        self._move(r, P.LOADING, at)
        seconds = self._draw(r, self.times.restart_s if r.pulled else self.times.pull_s)
        slow = self.faults.strikes("slow-pull", at, r.who)
        r.due = at + seconds * (slow["factor"] if slow else 1.0)

    def _boot(self, r: Rental, now: float) -> None:
        """Its processes are asked for; `booted` says when they are there."""
        strikes = self.faults.strikes
        r.due = None
        start_s = self._draw(r, self.times.start_s)
        r.load_s = start_s if r.loaded else self._draw(r, self.times.load_s)
        if strikes("never-ready", now, r.who) is not None:
            start_s = r.load_s = FOREVER_S
        fatal = strikes("fatal-line", now, r.who)
        r.ssh = self._ssh_mode(r, now)
        self._effects.append(
            Boot(
                r.id,
                r.boot,
                r.order,
                r.machine,
                r.authorized_keys,
                keep_ports={} if strikes("ports-change", now, r.who) is not None else r.ports,
                drop_ports=strikes("port-drops", now, r.who) is not None,
                load_s=r.load_s,
                start_s=start_s,
                fatal_line=fatal["line"] if fatal else None,
                new_host_key=strikes("new-host-key", now, r.who) is not None,
                ssh=r.ssh,
            )
        )

    def _stop(self, r: Rental, now: float) -> None:
        r.wanted = False
        if r.phase in (P.RUNNING, P.REBOOTING, P.RECYCLING, P.CRASHED):
            self._effects.append(Terminate(r.id))
            self._move(r, P.STOPPING, now)
            r.due = now + self._draw(r, self.times.stop_s)
        elif r.phase not in (P.STOPPING, P.STOPPED):
            self._give_up(r, P.STOPPED, now)

    def _lose_slot(self, r: Rental, now: float) -> None:
        """Somebody else gets its slot: it ends abruptly, and comes back by itself if its owner wants it."""
        self._give_up(r, P.OUTBID if r.wanted else P.STOPPED, now)

    def _give_up(self, r: Rental, to: Phase, now: float) -> None:
        self._effects.append(End(r.id))
        r.slot = None
        r.status_msg = None
        self._move(r, to, now)

    def _move(self, r: Rental, to: Phase, at: float) -> None:
        """The one place where a phase changes. What was charged so far is charged as the old one."""
        if to not in TRANSITIONS[r.phase]:
            raise IllegalMove(f"instance {r.id}: no way from {r.phase} to {to}")
        why = TRANSITIONS[r.phase][to]
        self._settle(r, at)
        self._effects.append(Moved(r.id, r.phase, to, why, max(0.0, at - r.since)))
        r.phase, r.since, r.due, r.dies_at = to, at, None, None
        self._note(r, at, f"{to}: {why}")

    def _note(self, r: Rental, at: float, text: str) -> None:
        r.history.append(f"{at:.3f} {text}")
        del r.history[:-HISTORY_LINES]

    def _draw(self, r: Rental, real_s: float) -> float:
        """So long it takes here: within ±spread of the real time, divided by the speedup."""
        spread = self.times.spread
        return real_s * r.chance.uniform(1.0 - spread, 1.0 + spread) / self.speedup

    # -- faults of instances, and slots ---------------------------------------------------------------

    def _ssh_mode(self, r: Rental, now: float) -> str:
        if self.faults.strikes("ssh-hangs", now, r.who) is not None:
            return "hang"
        return "refuse" if self.faults.strikes("ssh-refuses", now, r.who) is not None else "ok"

    def _follow_faults(self, now: float) -> None:
        """Rentals that run are as the faults want them, and those let go are as they were."""
        for r in self.rentals.values():
            self._follow_offline(r, now)
            if r.phase is not P.RUNNING:
                continue
            if self.faults.strikes("outbid", now, r.who) is not None:
                self._lose_slot(r, now)
                continue
            if (mode := self._ssh_mode(r, now)) != r.ssh:
                r.ssh = mode
                self._effects.append(Ssh(r.id, mode))
            if r.doomed_boot != r.boot and (doom := self.faults.strikes("dies-hot", now, r.who)) is not None:
                r.doomed_boot = r.boot
                r.dies_at = max(now, r.booted_at + r.load_s) + doom["after_s"]

    def _follow_offline(self, r: Rental, now: float) -> None:
        # Without a number the fault strikes what runs; a stopped one's host is lost only if it is named.
        who = r.who if r.offline or r.phase is P.RUNNING else None
        lost = self.faults.strikes_host(r.id, who, now)
        if lost != r.offline:
            self._settle(r, now)
            r.offline = lost
            self._effects.append(Freeze(r.id, lost))
            self._note(r, now, "host offline" if lost else "host back")

    def _give_slots(self, now: float) -> None:
        """Who waits for a slot gets one if there is one: on demand first, then by bid, then by time."""
        waiting = [r for r in self.rentals.values() if r.phase in (P.SCHEDULING, P.OUTBID)]
        for r in sorted(waiting, key=lambda r: (r.price is not None, -(r.price or 0.0), r.since, r.id)):
            strikes = self.faults.strikes
            if strikes("outbid", now, r.who) is not None:
                continue
            if strikes("start-waits", now, (r.id, r.boot + 1)) is not None:
                continue
            fitting = [
                slot
                for slot in self._slots(r.machine)
                if not slot.rented and (r.price is None or r.price >= min_bid(slot))
            ]
            if fitting:
                slot = min(fitting, key=lambda slot: (slot.holder_bid or 0.0, slot.index))
                self._clear(r.machine, slot.index, now)
                r.slot = slot.index
                self._begin_boot(r, now)

    def _clear(self, machine: Machine, index: int, now: float) -> None:
        """Nobody holds that slot."""
        for r in self.rentals.values():
            if r.slot == index and r.machine is machine:
                self._lose_slot(r, now)

    def _slots(self, machine: Machine) -> list[Slot]:
        """Its slots as they are now, by index."""
        here = [r for r in self.rentals.values() if r.machine is machine]
        free_disk_gb = machine.disk_gb - sum(r.order.disk_gb for r in here)
        holders = {r.slot: r for r in here if r.slot is not None}
        return [
            Slot(
                machine,
                index,
                free_disk_gb,
                rented=index in holders and holders[index].price is None,
                holder_bid=holders[index].price if index in holders else None,
            )
            for index in range(machine.slots)
        ]

    # -- how it is shown ------------------------------------------------------------------------------

    def row(self, r: Rental, now: float) -> dict[str, Any]:
        """The rental as the service's listing has it (vast-contract 2.11)."""
        shown = SHOWN[r.phase]
        machine, order = r.machine, r.order
        gpu_usd_h, storage_usd_h = r.usd_h_now()
        running = r.phase is P.RUNNING and self.faults.strikes("no-ports", now, r.who) is None
        end = r.created_at + machine.rental_days * DAY_S
        return {
            **hardware(machine),
            **prices(machine, r.gpu_usd_h, order.disk_gb, is_bid=r.price is not None),
            "id": r.id,
            "actual_status": "offline" if r.offline else shown.actual_status,
            "intended_status": "running" if r.phase is P.STOPPING and r.wanted else shown.intended_status,
            "cur_state": shown.cur_state,
            "next_state": "running" if r.wanted else "stopped",
            "status_msg": self._status_msg(r, now),
            "label": r.label,
            "image_uuid": order.image,
            "image_args": list(order.args),
            "image_runtype": order.runtype,
            "extra_env": [[name, value] for name, value in order.env.items()],
            "onstart": order.onstart,
            "template_id": None,
            "template_hash_id": None,
            "template_name": None,
            "ssh_host": "127.0.0.1",
            "ssh_port": r.ports.get("22/tcp"),
            "ssh_idx": "1",
            "machine_dir_ssh_port": r.ports.get("22/tcp"),
            "local_ipaddrs": "127.0.0.1\n",
            "ports": {
                inside: [{"HostIp": "0.0.0.0", "HostPort": str(outside)}]  # noqa: S104 a name in the format
                for inside, outside in r.ports.items()
            }
            if running
            else {},
            "direct_port_start": -1,
            "direct_port_end": -1,
            "gpu_totalram": machine.gpu.ram_mb * machine.num_gpus,
            "gpu_util": None,
            "gpu_temp": None,
            "cpu_util": None,
            "mem_limit": None,
            "mem_usage": None,
            "vmem_usage": None,
            "disk_space": order.disk_gb,
            "disk_usage": -1,
            "disk_util": -1,
            "min_bid": MIN_BID_SHARE * machine.usd_h,
            "start_date": r.created_at,
            "end_date": end,
            "duration": end - now,
            "uptime_mins": (now - r.booted_at) / 60.0 if r.phase is P.RUNNING else None,
            "client_run_time": (now - r.created_at) / 3600.0,
            "host_run_time": (now - r.created_at) / 3600.0,
            "time_remaining": "",
            "time_remaining_isbid": "",
            "rentable": False,
            "instance": cost_now(gpu_usd_h, storage_usd_h),
            "volume_info": [],
            "webpage": None,
            "logo": None,
            "credit_balance": None,
            "credit_discount": None,
            "credit_discount_max": None,
            "jupyter_token": None,
        }

    def _status_msg(self, r: Rental, now: float) -> str | None:
        if r.phase is P.LOADING and not r.pulled:
            # Docker's words; a pull that is held stays short of its end.
            share = 1.0 if r.due is None else (now - r.since) / max(r.due - r.since, 1e-9)
            return f"{r.order.image}: Downloading {min(99, max(0, int(100 * share)))}%"
        return r.status_msg

    def status(self, now: float) -> dict[str, Any]:
        """Everything for a person: rentals with their dollars by state, money, faults. No script, no key."""
        self.advance(now)
        return {
            "credit_usd": self.credit(now),
            "burn_usd_h": self.burn_usd_h(),
            "spent_usd": self.spent_usd(),
            "destroyed": self.ended,
            "faults": self.faults.shown(now),
            "instances": [self._brief(r, now) for r in self.rentals.values()],
        }

    def _brief(self, r: Rental, now: float) -> dict[str, Any]:
        shown = SHOWN[r.phase]
        gpus = f"{r.machine.num_gpus}x " if r.machine.num_gpus > 1 else ""
        return {
            "id": r.id,
            "label": r.label,
            "machine_id": r.machine.machine_id,
            "gpu": f"{gpus}{r.machine.gpu_name}",
            "state": "offline" if r.offline else str(r.phase),
            "since": r.since,
            "actual_status": "offline" if r.offline else shown.actual_status,
            "intended_status": shown.intended_status,
            "status_msg": self._status_msg(r, now),
            "boot": r.boot,
            "model_on_disk": r.loaded,
            "ports": dict(r.ports) if r.phase is P.RUNNING else {},
            "usd_h_now": sum(r.usd_h_now()),
            "usd": {**r.usd, "total": sum(r.usd.values()), "gpu": r.gpu_usd},
        }


def _next(r: Rental) -> tuple[float, str] | None:
    """The next event of the rental and its time. On a lost host nothing goes on."""
    if r.offline:
        return None
    events = []
    if r.due is not None:
        events.append((r.due, "phase"))
    if r.phase is P.RUNNING:
        if not r.loaded:
            events.append((r.booted_at + r.load_s, "loaded"))
        if r.dies_at is not None:
            events.append((r.dies_at, "dies"))
    return min(events, default=None)


def _held(r: Rental) -> bool:
    """Whether it waits for something that no event of its own announces: a slot, or the end of a fault."""
    return r.phase in (P.SCHEDULING, P.OUTBID)
