"""One rental: the life of its container, the times it takes, and its bill.

A rental moves only along `phases.TRANSITIONS`, and all its moves are in this file. What must happen in the
world is emitted as effects; a boot counts as running only when `booted` says that its processes are there.

Invariants
- Each dollar charged is in exactly one rental's bill, under the state it was in, and left the credit.
- A rental that holds no slot has no processes: the End is emitted when it gives the slot up.
- All times are drawn when a rental is created or booted, from its own generator, so the order of calls
  decides them and the clock does not.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from localcloud.contract import ContractEvent
from localcloud.effects import (
    Boot,
    End,
    Freeze,
    Kill,
    MarkLoaded,
    Moved,
    Ssh,
    Terminate,
)
from localcloud.faults import Faults
from localcloud.hub import HubAccess, image_error
from localcloud.images import driver_error, pull_error
from localcloud.offers import MIN_BID_SHARE
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import SHOWN, Phase, cause
from localcloud.rental_state import RentalState

RECHECK_S = 0.5
"""Seconds of the wall clock between two checks whether a fault that delays a rental is over."""

FOREVER_S = 1e8
"""Load time in seconds, three years, of a model server that never becomes ready."""

P = Phase


_STAYS = ("stuck-loading", "host-gives-up")
"""Faults that keep a rental in loading."""


class Rental(RentalState):
    """One rented machine, which its owner and time move from phase to phase."""

    # -- what its owner may ask of it; each raises CloudRefusal -----------------------------------------

    def start(self, now: float) -> None:
        """Start the rental's container, as soon as the machine has a free slot."""
        if self._account.credit_usd(now) <= 0:
            raise CloudRefusal(
                400, "missing_billing", "Your account has no credit: add some to start instances."
            )
        if self.contract.ended_at is not None:
            raise CloudRefusal(400, "contract_ended", f"Instance {self.id}: its contract has ended.")
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
            self.due = now + self._takes.draw(self._times.stop_s)
        elif self.phase not in (P.STOPPING, P.STOPPED):
            self._give_up(P.STOPPED, now)
        self.status_msg = msg or self.status_msg

    def reboot(self, now: float, *, recycle: bool = False) -> None:
        """Restart the rental's container on the same GPUs; with recycle make it anew from the image."""
        self._must_be_in(P.RUNNING, P.CRASHED)
        self._emit(Terminate(self.id))
        self._move(P.RECYCLING if recycle else P.REBOOTING, now)
        self.due = now + self._takes.draw(self._times.reboot_s)

    def make_anew(self, order: Order, now: float) -> None:
        """Change what is ordered: the container is made anew from its image, at once if the rental runs."""
        self.pulled &= order.image == self.order.image
        self.order, self.loaded = order, False
        if self.phase in (P.RUNNING, P.CRASHED):
            self.reboot(now, recycle=True)

    def change_bid(self, price: float | None, winning: float, now: float) -> None:
        """Change the bid, $/h; None bids at least `winning`, the least that gets a slot now."""
        if self.bill.bid is None:
            raise CloudRefusal(400, "invalid_args", f"Instance {self.id} is not interruptible.")
        self.settle(now)
        bid = self.bill.change_bid(max(winning, self.bill.bid) if price is None else price)
        if SHOWN[self.phase].holds_gpu and bid < MIN_BID_SHARE * self.machine.usd_h:
            self.lose_slot(now)

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
        if (of_contract := self.contract.next_event()) is not None:
            events.append(of_contract)
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
        if event in tuple(ContractEvent):
            self._follow_contract(event, at)
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
                self.due = at + self._takes.draw(self._times.create_s)
            case P.CREATED:
                broken = self._struck("docker-error", now)
                self.status_msg = broken["msg"] if broken else self._pull_error(now)
                if self.status_msg:
                    self.due = now + RECHECK_S
                else:
                    self._load(at)
            case P.LOADING:
                stuck = any(self._struck(name, now) is not None for name in _STAYS)
                if stuck or self._never_starts:
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

    def _follow_contract(self, event: str, at: float) -> None:
        """Have the host ask for more, or come to the end of the contract."""
        if event == ContractEvent.ASKS:
            self.contract.ask(None, self.bill.gpu_usd_h, at)
            self._note(at, "its host asks for a higher price")
            return
        self.settle(at)
        going_on = self.contract.end(at)
        if going_on is not None:
            self.bill.reprice(going_on.gpu_usd_h)
            self._note(at, "its contract goes on at the higher price")
        elif self.wanted or self.phase is not P.STOPPED:
            self.stop(at, "stopped: its contract has ended")

    def _pull_error(self, now: float) -> str | None:
        """Return what docker says if no container can be made of the image here; None if one can."""
        image, login = self.order.image, self.order.image_login
        by_fault = image_error(self._faults, image, login, self.on_boot, now)
        return by_fault or pull_error(image, self.machine, self._realism)

    def _begin_boot(self, at: float) -> None:
        """Begin a new boot of the rental on the slot that it holds."""
        self.boot += 1
        self._load(at)

    def _load(self, at: float) -> None:
        """Pull the rental's image, or start the container when the image is on the machine."""
        self._move(P.LOADING, at)
        if self.pulled:
            seconds = self._takes.draw(self._times.restart_s)
        else:
            seconds = self._takes.pull_s(self.order, self.machine, at)
        slow = self._struck("slow-pull", at)
        self.due = at + seconds * (slow["factor"] if slow else 1.0)

    def _boot(self, now: float) -> None:
        """Order the start of the rental's processes; `booted` is called when they run."""
        start_s = self._takes.draw(self._times.start_s)
        load_s = start_s if self.loaded else self._takes.load_s(self.order, self.machine, start_s, now)
        boot = _boot_of(self, load_s, start_s, self._faults, now)
        if boot.fatal_line is None and self._realism.old_drivers:
            boot = replace(boot, fatal_line=driver_error(self.order.image, self.machine))
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
        if (ends := self._struck("contract-ends", now)) is not None and not self._ends_early:
            self._ends_early = True
            self.contract.end_in(ends["in_s"], now)
        if (asks := self._struck("price-increase", now)) is not None and not self._asked_early:
            self._asked_early = True
            self.contract.ask(asks["share"], self.bill.gpu_usd_h, now)
        if self.phase is not P.RUNNING:
            return
        if self._struck("outbid", now) is not None:
            self.lose_slot(now)
            return
        if (mode := _ssh_mode(self, self._faults, now)) != self.ssh:
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
        ssh=_ssh_mode(r, faults, now),
        login=r.login,
        hub=HubAccess.by_faults(faults, r.on_boot, now),
        secrets=r.secrets,
    )


def _ssh_mode(r: Rental, faults: Faults, now: float) -> str:
    if faults.strikes("ssh-hangs", now, r.on_boot) is not None:
        return "hang"
    return "refuse" if r.login.refused or faults.strikes("ssh-refuses", now, r.on_boot) is not None else "ok"
