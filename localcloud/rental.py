"""One rental: the life of its container, the times it takes, and its bill.

A rental moves only along `phases.TRANSITIONS`, and all its moves are in this file. What must happen in the
world is emitted as effects; a boot counts as running only when `booted` says that its processes are there.

Invariants
- Each dollar charged is in exactly one rental's bill, under the state it was in, and left the credit.
- A rental that holds no slot has no processes: the End is emitted when it gives the slot up.
- All times are drawn when a rental is created or booted, from its own generator, so the order of calls
  decides them and the clock does not.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from localcloud.account import Account
from localcloud.effects import (
    Authorize,
    Boot,
    Effect,
    End,
    Freeze,
    Kill,
    MarkLoaded,
    Moved,
    Ssh,
    Terminate,
)
from localcloud.faults import Faults
from localcloud.machines import Machine
from localcloud.offers import MIN_BID_SHARE
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import SHOWN, Phase, cause
from localcloud.realism import NONE, Realism

HISTORY_LINES = 100
"""Lines of a rental's history that are kept; `logs --daemon-logs` prints them."""

RECHECK_S = 0.5
"""Seconds of the wall clock between two checks whether a fault that delays a rental is over."""

FOREVER_S = 1e8
"""Load time in seconds, three years, of a model server that never becomes ready."""

MAX_LABEL = 1024
"""Most characters of a label that is changed later; the service allows fewer in a create."""


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


@dataclass(frozen=True)
class Surroundings:
    """What all rentals of a cloud share. speedup divides times, not prices. emit: takes their effects."""

    times: Times
    speedup: float
    faults: Faults
    account: Account
    emit: Callable[[Effect], None]
    realism: Realism = NONE


P = Phase


class Rental:
    """One rented machine. Times are epoch seconds; those of a boot are of its last boot."""

    def __init__(
        self,
        rental_id: int,
        order: Order,
        machine: Machine,
        slot: int | None,
        surroundings: Surroundings,
        chance: random.Random,
        now: float,
    ) -> None:
        """Make a rental of that machine that begins now. slot: None when another rental holds it."""
        self._chance = chance
        self._account = surroundings.account
        self._emit = surroundings.emit
        self._faults = surroundings.faults
        self._speedup = surroundings.speedup
        self._never_starts = order.script_bytes > surroundings.realism.script_bytes
        self._times = surroundings.times
        self.id = rental_id
        self.order = order
        self.machine = machine
        self.slot = slot
        self.created_at = self.since = now
        self.label = order.label
        self.authorized_keys = self._account.public_keys
        self.phase = P.CREATING
        self.due: float | None = None  # when the phase ends by itself
        self.wanted = True  # its owner wants it to run
        self.boot = 0 if slot is None else 1
        self.booted_at = 0.0
        self.load_s = 0.0  # what its model server takes in this boot
        self.loaded = False
        self.pulled = False
        self.offline = False
        self.ssh = "ok"
        self.ports: Mapping[str, int] = {}
        self.status_msg: str | None = None
        self.history: deque[str] = deque(maxlen=HISTORY_LINES)
        self.bill = self._account.open_bill(machine, order, now)
        self._dies_at: float | None = None
        self._doomed_boot = 0  # the boot that the fault dies-hot has struck
        if slot is not None:
            self.due = now + self._draw(self._times.provision_s)
        elif order.price is None:
            # Without cancel_unavail a lost race leaves a stopped rental that bills (vast-contract 2.2).
            self.phase, self.wanted = P.STOPPED, False
        else:
            self.phase = P.OUTBID
        self._note(now, f"rented, {self.phase}")
        self._emit(Moved(self.id, "offer", self.phase, f"rented on machine {machine.machine_id}", 0.0))

    @property
    def on_boot(self) -> tuple[int, int]:
        """The rental's present boot, as faults name it: (instance id, boot number)."""
        return self.id, self.boot

    def usd_h_now(self) -> tuple[float, float]:
        """Return what the rental's GPUs and storage cost now, $/h; an offline host charges nothing."""
        if self.offline:
            return 0.0, 0.0
        return (self.bill.gpu_usd_h if SHOWN[self.phase].bills_gpu else 0.0), self.bill.storage_usd_h

    def settle(self, now: float) -> None:
        """Charge what the rental has cost since it was settled last."""
        self.bill.settle(SHOWN[self.phase].bill, *self.usd_h_now(), now)

    # -- what its owner may ask of it; each raises CloudRefusal -----------------------------------------

    def start(self, now: float) -> None:
        """Start the rental's container, as soon as the machine has a free slot."""
        if self._account.credit_usd(now) <= 0:
            raise CloudRefusal(
                400, "missing_billing", "Your account has no credit: add some to start instances."
            )
        self.wanted = True
        if self.phase in (P.STOPPED, P.OUTBID):
            self._move(P.SCHEDULING, now)
        elif self.phase is P.CRASHED:
            self._emit(End(self.id))
            self._begin_boot(now)

    def stop(self, now: float, msg: str | None = None) -> None:
        """Stop the rental: give up the GPUs, keep the disk. msg: the text of status_msg."""
        self.wanted = False
        if self.phase in (P.RUNNING, P.REBOOTING, P.RECYCLING, P.CRASHED):
            self._emit(Terminate(self.id))
            self._move(P.STOPPING, now)
            self.due = now + self._draw(self._times.stop_s)
        elif self.phase not in (P.STOPPING, P.STOPPED):
            self._give_up(P.STOPPED, now)
        self.status_msg = msg or self.status_msg

    def reboot(self, now: float, *, recycle: bool = False) -> None:
        """Restart the rental's container on the same GPUs; with recycle make it anew from the image."""
        self._must_be_in(P.RUNNING, P.CRASHED)
        self._emit(Terminate(self.id))
        self._move(P.RECYCLING if recycle else P.REBOOTING, now)
        self.due = now + self._draw(self._times.reboot_s)

    def change_bid(self, price: float | None, winning: float, now: float) -> None:
        """Change the bid, $/h; None bids at least `winning`, the least that gets a slot now."""
        if self.bill.bid is None:
            raise CloudRefusal(400, "invalid_args", f"Instance {self.id} is not interruptible.")
        self.settle(now)
        bid = self.bill.change_bid(max(winning, self.bill.bid) if price is None else price)
        if SHOWN[self.phase].holds_gpu and bid < MIN_BID_SHARE * self.machine.usd_h:
            self.lose_slot(now)

    def relabel(self, label: str) -> None:
        """Set the rental's label; an empty one removes it."""
        if len(label) > MAX_LABEL:
            raise CloudRefusal(
                400, "label_too_long", f"label: at most {MAX_LABEL} characters, got {len(label)}"
            )
        self.label = label or None

    def attach_key(self, key: str) -> None:
        """Accept a further ssh key at the rental's container."""
        if key not in self.authorized_keys:
            self.authorized_keys += (key,)
            self._emit(Authorize(self.id, self.authorized_keys))

    def kill(self, part: str = "all") -> None:
        """Order SIGKILL for the rental's processes, as if they had crashed."""
        self._must_be_in(P.RUNNING)
        self._emit(Kill(self.id, part))

    def _must_be_in(self, *phases: Phase) -> None:
        if self.phase not in phases:
            raise CloudRefusal(400, "not_running", f"Instance {self.id} is not running.")

    # -- what the outside world reports ---------------------------------------------------------------

    def booted(self, boot: int, ports: Mapping[str, int], now: float) -> None:
        """Let the rental run with these ports, if it waits for the processes of that boot."""
        if self._waits_for(boot):
            self.ports = dict(ports)
            self.booted_at = now
            self.pulled = True
            self.status_msg = f"success, running {self.order.image}/ssh"
            self._move(P.RUNNING, now)
            self.follow_faults(now)

    def boot_failed(self, boot: int, why: str, now: float) -> None:
        """Put the rental back to the phase created: its processes could not be started. why: the reason."""
        if self._waits_for(boot):
            self.status_msg = f"Error response from daemon: {why}"
            self._move(P.CREATED, now)

    def crashed(self, boot: int, now: float) -> None:
        """Note that all processes of a boot of the rental ended although the cloud did not order it."""
        if self.boot == boot and self.phase is P.RUNNING:
            self.status_msg = "container exited with status 137"
            self._move(P.CRASHED, now)

    def _waits_for(self, boot: int) -> bool:
        return self.boot == boot and self.phase in (P.LOADING, P.REBOOTING) and self.due is None

    # -- what happens as time passes ------------------------------------------------------------------

    def next_event(self) -> tuple[float, str] | None:
        """Return the rental's next event as (time, name); None on an offline host, where nothing goes on."""
        if self.offline:
            return None
        events = [] if self.due is None else [(self.due, "phase")]
        if self.phase is P.RUNNING:
            if not self.loaded:
                events.append((self.booted_at + self.load_s, "loaded"))
            if self._dies_at is not None:
                events.append((self._dies_at, "dies"))
        return min(events, default=None)

    def happen(self, event: str, at: float, now: float) -> None:
        """Carry out an event of the rental, named by next_event, that was due at `at`."""
        if event == "loaded":
            self.loaded = True
            self._emit(MarkLoaded(self.id))
            return
        if event == "dies":
            self._dies_at = None
            doom = self._struck("dies-hot", now)
            if doom is not None:
                self._emit(Kill(self.id, doom["part"]))
            return
        match self.phase:
            case P.CREATING:
                self._move(P.CREATED, at)
                self.due = at + self._draw(self._times.create_s)
            case P.CREATED:
                broken = self._struck("docker-error", now)
                self.status_msg = broken["msg"] if broken else None
                if broken:
                    self.due = now + RECHECK_S
                else:
                    self._load(at)
            case P.LOADING:
                if self._struck("stuck-loading", now) is not None or self._never_starts:
                    self.due = now + RECHECK_S
                else:
                    self._boot(now)
            case P.REBOOTING:
                self._emit(End(self.id))
                self.boot += 1
                self._boot(now)
            case P.RECYCLING:
                self._emit(End(self.id, wipe=True))
                self.loaded = False
                self._begin_boot(at)
            case P.STOPPING:
                self._emit(End(self.id))
                self.slot = None
                self._move(P.STOPPED, at)
                if self.wanted:  # started again meanwhile
                    self._move(P.SCHEDULING, at)

    def _begin_boot(self, at: float) -> None:
        """Begin a new boot of the rental on the slot that it holds."""
        self.boot += 1
        self._load(at)

    def _load(self, at: float) -> None:
        """Pull the rental's image, or start the container when the image is on the machine."""
        self._move(P.LOADING, at)
        seconds = self._draw(self._times.restart_s if self.pulled else self._times.pull_s)
        slow = self._struck("slow-pull", at)
        self.due = at + seconds * (slow["factor"] if slow else 1.0)

    def _boot(self, now: float) -> None:
        """Order the start of the rental's processes; `booted` is called when they run."""
        start_s = self._draw(self._times.start_s)
        load_s = start_s if self.loaded else self._draw(self._times.load_s)
        boot = _boot_of(self, load_s, start_s, self._faults, now)
        self.due, self.load_s, self.ssh = None, boot.load_s, boot.ssh
        self._emit(boot)

    def take_slot(self, index: int, now: float) -> None:
        """Give the rental that slot of its machine, and boot on it."""
        self.slot = index
        self._begin_boot(now)

    def lose_slot(self, now: float) -> None:
        """End at once, as another rental gets the slot; if wanted to run, wait for a slot again."""
        self._give_up(P.OUTBID if self.wanted else P.STOPPED, now)

    def _give_up(self, to: Phase, now: float) -> None:
        self._move(to, now)
        self._emit(End(self.id))
        self.slot = None
        self.status_msg = None

    def follow_faults(self, now: float) -> None:
        """Do what the faults that strike the rental demand, and undo it when they end."""
        self._follow_offline(now)
        if self.phase is not P.RUNNING:
            return
        if self._struck("outbid", now) is not None:
            self.lose_slot(now)
            return
        if (mode := _ssh_mode(self._faults, self.on_boot, now)) != self.ssh:
            self.ssh = mode
            self._emit(Ssh(self.id, mode))
        if self._doomed_boot != self.boot and (doom := self._struck("dies-hot", now)) is not None:
            self._doomed_boot = self.boot
            self._dies_at = max(now, self.booted_at + self.load_s) + doom["after_s"]

    def _follow_offline(self, now: float) -> None:
        # Without a number the fault strikes what runs; a stopped one's host is lost only if it is named.
        boot = self.on_boot if self.offline or self.phase is P.RUNNING else None
        lost = self._faults.strikes_host(self.id, boot, now)
        if lost != self.offline:
            self.settle(now)
            self.offline = lost
            self._emit(Freeze(self.id, lost))
            self._note(now, "host offline" if lost else "host back")

    def _struck(self, fault: str, now: float) -> Mapping[str, Any] | None:
        """Return the arguments of that fault if it strikes the rental's boot; None otherwise."""
        return self._faults.strikes(fault, now, self.on_boot)

    def _move(self, to: Phase, at: float) -> None:
        """Change the phase; only this method does. What the rental cost so far is charged under the old one.

        Raises IllegalPhase, and then changes nothing.
        """
        why = cause(self.phase, to)
        self.settle(at)
        self._emit(Moved(self.id, self.phase, to, why, max(0.0, at - self.since)))
        self.phase, self.since, self.due, self._dies_at = to, at, None, None
        self._note(at, f"{to}: {why}")

    def _note(self, at: float, text: str) -> None:
        self.history.append(f"{at:.3f} {text}")

    def _draw(self, real_s: float) -> float:
        """Return a random duration, within ±spread of the real one and divided by the speedup, seconds."""
        spread = self._times.spread
        return real_s * self._chance.uniform(1.0 - spread, 1.0 + spread) / self._speedup


def _boot_of(r: Rental, load_s: float, start_s: float, faults: Faults, now: float) -> Boot:
    """Return the next boot of a rental, with what the faults that strike it demand."""

    def struck(fault: str) -> bool:
        return faults.strikes(fault, now, r.on_boot) is not None

    never_ready = struck("never-ready")
    fatal = faults.strikes("fatal-line", now, r.on_boot)
    return Boot(
        r.id,
        r.boot,
        r.order,
        r.machine,
        r.authorized_keys,
        keep_ports={} if struck("ports-change") else r.ports,
        drop_ports=struck("port-drops"),
        load_s=FOREVER_S if never_ready else load_s,
        start_s=FOREVER_S if never_ready else start_s,
        fatal_line=fatal["line"] if fatal else None,
        new_host_key=struck("new-host-key"),
        ssh=_ssh_mode(faults, r.on_boot, now),
    )


def _ssh_mode(faults: Faults, boot: tuple[int, int], now: float) -> str:
    if faults.strikes("ssh-hangs", now, boot) is not None:
        return "hang"
    return "refuse" if faults.strikes("ssh-refuses", now, boot) is not None else "ok"
