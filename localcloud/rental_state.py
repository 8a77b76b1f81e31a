"""What a rental is at a moment: its order, machine, phase, bill and history; how it moves is in rental.py."""

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from localcloud.account import Account
from localcloud.contract import Contract
from localcloud.durations import Downloads, Durations, Times
from localcloud.effects import Authorize, Effect, Kill, Moved
from localcloud.faults import Faults
from localcloud.images import image_gb, model_gb
from localcloud.machines import Machine
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import SHOWN, Phase
from localcloud.realism import NONE, Realism
from localcloud.ssh_logins import SshLogin

HISTORY_LINES = 100
"""Lines of a rental's history that are kept; `logs --daemon-logs` prints them."""

MAX_LABEL = 1024
"""Most characters of a label that is changed later; the service allows fewer in a create."""


@dataclass(frozen=True)
class Surroundings:
    """What all rentals of a cloud share. speedup divides times and billed bytes. emit: takes effects."""

    times: Times
    speedup: float
    faults: Faults
    account: Account
    emit: Callable[[Effect], None]
    downloads: Downloads
    realism: Realism = NONE


P = Phase

IMAGE, MODEL = "image", "model"


class RentalState:
    """What one rental is. Times are epoch seconds; those of a boot are of its last boot."""

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
        self._account = surroundings.account
        self._emit = surroundings.emit
        self._faults = surroundings.faults
        self._speedup = surroundings.speedup
        self._realism = surroundings.realism
        self._never_starts = order.script_bytes > self._realism.script_bytes
        self._times = times = surroundings.times
        downloads = surroundings.downloads if self._realism.sizes else None
        self._takes = Durations(times, surroundings.speedup, chance, downloads)
        self.id = rental_id
        self.order = order
        self.machine = machine
        self.slot = slot
        self.created_at = self.since = now
        self.label = order.label
        self.secrets = dict(self._account.secrets)  # as they were when it was made
        self.login = SshLogin.of(machine.machine_id, self._realism, surroundings.speedup)
        self.authorized_keys = self._account.public_keys if self.login.account_keys else ()
        self.phase = P.CREATING
        self.due: float | None = None  # when the phase ends by itself
        self.wanted = True  # its owner wants it to run
        self.boot = 0 if slot is None else 1
        self.booted_at = 0.0
        self.load_s = 0.0  # what its model server takes in this boot
        self.loaded = False
        self.pulled = False
        self.offline = False
        self.ssh = "refuse" if self.login.refused else "ok"
        self.ports: Mapping[str, int] = {}
        self.status_msg: str | None = None
        self.history: deque[str] = deque(maxlen=HISTORY_LINES)
        self.bill = self._account.open_bill(rental_id, machine, order, now)
        self.contract = Contract(rental_id, machine, self._realism, surroundings.speedup, now)
        self._got_gb = {IMAGE: 0.0, MODEL: 0.0}  # that came over the network, and was billed
        self._dies_at: float | None = None
        self._ends_early = self._asked_early = False  # by a fault
        self._doomed_boot = 0  # the boot that the fault dies-hot has struck
        if slot is not None:
            self.due = now + self._takes.draw(self._times.provision_s)
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
        shown = SHOWN[self.phase]
        factor = self._realism.stopped_storage if shown.bill == "stopped" else 1.0
        return (self.bill.gpu_usd_h if shown.bills_gpu else 0.0), self.bill.storage_usd_h * factor

    def settle(self, now: float) -> None:
        """Charge what the rental has cost since it was settled last, and the bytes that have come since."""
        self.bill.settle(SHOWN[self.phase].bill, *self.usd_h_now(), now)
        if self._realism.bandwidth and not self.offline:
            self._bill_bytes(now)

    def _bill_bytes(self, now: float) -> None:
        """Charge the part of image or model that has come; what came before an interruption is there."""
        if self.phase is P.LOADING and not self.pulled:
            what, gb, from_s, to_s = IMAGE, image_gb(self.order.image), self.since, self.due
        elif self.phase is P.RUNNING and self.booted_at:
            what, gb = MODEL, model_gb(self.order)
            from_s, to_s = self.booted_at, self.booted_at + self.load_s
        else:
            return
        share = (
            1.0 if to_s is None or to_s <= from_s else min(1.0, max(0.0, (now - from_s) / (to_s - from_s)))
        )
        new_gb = share * gb - self._got_gb[what]
        if new_gb > 0.0:
            self._got_gb[what] += new_gb
            # Hours are shorter by the speedup, and prices are not: bytes shrink with them.
            self.bill.add_bytes(self.machine.inet_usd_gb, new_gb / self._speedup, now)

    # -- what its owner may ask of it whatever it does; each raises CloudRefusal ------------------------

    def relabel(self, label: str) -> None:
        """Set the rental's label; an empty one removes it."""
        if len(label) > MAX_LABEL:
            raise CloudRefusal(
                400, "label_too_long", f"label: at most {MAX_LABEL} characters, got {len(label)}"
            )
        self.label = label or None
        self.bill.relabel(self.label)

    def detach_key(self, key: str) -> None:
        """Accept an ssh key at the rental's container no longer."""
        self.authorized_keys = tuple(known for known in self.authorized_keys if known != key)
        self._emit(Authorize(self.id, self.authorized_keys))

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

    def _note(self, at: float, text: str) -> None:
        self.history.append(f"{at:.3f} {text}")
