"""One rented machine as the autoscaler knows it.

`Instance` is the only one that writes its attributes; its methods say what happened. Its state is changed by
`enter` alone, which only fleet/reconcile.py calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.gpus import GpuNumbers
from engine.profile import Profile
from fleet.absence import STUCK_S, Absence
from fleet.deadlines import Deadlines
from fleet.evidence import Trouble
from fleet.gpu_numbers import numbers_of
from fleet.health_check import HealthCheck, HealthCheckOrder
from fleet.instance_messages import Ear, Hearing
from fleet.journal import BillingInterval, SavedInstance
from fleet.states import BILLS_GPU, CHECKED, SERVING, State, check_transition
from fleet.taken_out import TakenOut
from fleet.terms import Terms
from fleet_client.back_off import back_off_s
from vast.rows import Offer, Row
from web.messages.reports import ReadyBody

# Words of `actual_status` (vast-contract 2.12).
UP = frozenset({"running"})
DOWN = frozenset({"stopped", "exited"})
LOST = frozenset({"offline", "unknown", "frozen"})

BOOTING = frozenset({"created", "loading", "rebooting", "recycling", "restarting"})
"""Words of `actual_status` while a host that has the GPU makes or starts the container."""

RUNS = CHECKED | {State.LOADING}
"""States in which a container that is down has ended by itself."""

READ_LOG_EVERY = 4
"""Health checks of a hot instance to one that also reads its log: that costs an ssh handshake, and the test
prompt finds more."""

THROUGHPUT_NOISE = 0.02
"""Share by which a measured throughput must differ from the known one to count."""


@dataclass
class Orders:
    """The orders about one instance that were sent to the cloud, and their answers."""

    out: int = 0  # begun and not answered
    begun_at: float = float("-inf")
    asked_at: float = 0.0  # when its creation, its stop or its end was asked for
    answered_at: float = float("-inf")
    done_at: float = float("-inf")  # the answer said that it is done
    destroyed: bool = False  # the cloud has confirmed its end

    def ask(self, now: float) -> None:
        """Note when a stop or destroy was ordered, for whose effect is waited from then on."""
        self.asked_at = now

    def begin(self, now: float) -> None:
        """Count an order as begun; one that has been out for too long is taken to be lost."""
        self.out = (0 if self.is_stuck(now) else self.out) + 1
        self.begun_at = now

    def is_stuck(self, now: float) -> bool:
        """Return whether an order has been out for so long that it cannot be on its way any more."""
        return self.out > 0 and now - self.begun_at > STUCK_S

    def answer(self, now: float, *, done_at: float | None = None, destroyed: bool = False) -> None:
        """Count an order as answered. done_at: when it was done; destroyed: its end is confirmed."""
        self.out, self.answered_at = max(0, self.out - 1), now
        self.done_at = self.done_at if done_at is None else done_at
        self.destroyed = self.destroyed or destroyed

    def unheeded(self, repeat_s: float, now: float) -> bool:
        """Return whether the last order is to be sent again: answered repeat_s ago, or lost.

        An order that waits for its answer is not sent twice.
        """
        return self.is_stuck(now) or (not self.out and now - self.answered_at >= repeat_s)


@dataclass
class BootRecord:
    """What happened in the present boot of one instance, and the starts since it was last hot."""

    ordered_at: float | None = None  # None: it boots for the first time
    up_at: float = 0.0  # container up
    was_hot: bool = False
    maybe_busy: bool = False  # was given requests, or may have been before this process knew it
    failed_starts: int = 0  # found no GPU
    no_gpu_since: float | None = None  # when the first of them was ordered
    refused_starts: int = 0
    no_start_before: float = 0.0
    interrupted: bool = False  # out of credit while it loaded: it is started again

    @classmethod
    def restored(cls, state: State, since: float) -> "BootRecord":
        """Return what is known of the boot of an instance that the last process saved in that state."""
        ordered_at = since if state is State.STARTING else None
        return cls(ordered_at, was_hot=state in SERVING, maybe_busy=state in CHECKED)

    def order(self, now: float) -> None:
        """Note that a start was ordered: the time until the instance is hot is counted from now on."""
        self.ordered_at = now
        self.was_hot = self.maybe_busy = self.interrupted = False

    def come_up(self, now: float) -> None:
        """Note that the container is up; whether a model runs in it is not known yet."""
        self.up_at = now
        self.was_hot = self.maybe_busy = False

    def become_hot(self) -> None:
        """Note that the instance is hot; from now on it may have requests."""
        self.failed_starts = self.refused_starts = 0
        self.no_gpu_since = None
        self.was_hot = self.maybe_busy = True

    def miss_gpu(self, rest_s: float, now: float) -> None:
        """Count a start that found no GPU; the next may come after rest_s seconds."""
        self.failed_starts += 1
        self.no_gpu_since = self.no_gpu_since or self.ordered_at
        self.no_start_before = now + rest_s

    def interrupt(self) -> None:
        """Note that the credit was used up before the model was on the disk: a start goes on with it."""
        self.interrupted = True

    def forget_refusals(self) -> None:
        """Let the next start come at once: what kept the cloud from starting it is over."""
        self.refused_starts, self.no_start_before = 0, 0.0

    def be_refused(self, deadlines: Deadlines, now: float) -> None:
        """Count a start that the cloud refused; the pause before the next one doubles."""
        self.refused_starts += 1
        rest_s = back_off_s(self.refused_starts, 2.0 * deadlines.repeat_s, deadlines.no_gpu_rest_s)
        self.no_start_before = now + rest_s


@dataclass
class Instance:
    """One rented machine and all that is known of it. Times are seconds on the caller's clock, prices $/h."""

    label: str
    state: State
    since: float  # in this state
    why: str  # in this state
    ordered_at: float
    id: int | None = None  # None until the cloud has answered or listed the order
    # as it was offered and listed
    machine_id: int | None = None
    host_id: int | None = None  # of the machine's owner
    gpu_name: str = ""
    num_gpus: int = 1
    gpu_told: GpuNumbers | None = None
    price_usd_h: float = 0.0  # in its present state
    running_usd_h: float = 0.0
    stopped_usd_h: float = 0.0
    terms: Terms = field(default_factory=Terms)
    host: str | None = None
    ports: Mapping[int, int] = field(default_factory=dict)
    ssh: tuple[str, int] | None = None
    listed: bool = False  # to this process
    looked_at: float | None = None  # when a row of it was last read
    container_began: float | None = None  # by its row
    intended: str | None = None  # intended_status
    holds_gpu: bool = False  # by its row
    odd: str | None = None  # what its row does not say, or says wrongly
    lost_since: float | None = None  # host offline
    patience_until: float = float("-inf")  # no deadline passes before
    # what is known of it
    loaded: bool = False  # the model is on its disk
    condemned: bool = False  # given up for good: destroyed again if its label reappears
    adopted: bool = False  # found in the listing: when it was ordered is not known
    unverified: bool = False  # perhaps hot before a restart, and not checked since
    throughput_work_s: float = 1.0
    certificate: str | None = None  # as ssh showed it in this boot, or in the one before
    last_check_at: float = float("-inf")
    checks: int = 0
    in_flight: int | None = None  # requests, as it said itself in this boot
    in_flight_at: float = 0.0
    drain_version: int = 0  # of the first hot set in which it is draining
    evidence: str = ""  # on which it was given up
    suspected: bool = False  # silent for so long that another takes its place meanwhile
    absence: Absence = field(default_factory=Absence)
    trouble: Trouble = field(default_factory=Trouble)
    taken_out: TakenOut = field(default_factory=TakenOut)
    boot: BootRecord = field(default_factory=BootRecord)
    orders: Orders = field(default_factory=Orders)
    ear: Ear = field(default_factory=Ear)

    # -- how it comes to be known ----------------------------------------------------------------------

    @classmethod
    def ordered(cls, label: str, offer: Offer, why: str, profile: Profile, now: float) -> "Instance":
        """Return a new instance that is about to be created from that offer."""
        return cls(
            label=label,
            state=State.ORDERED,
            since=now,
            why=why,
            ordered_at=now,
            machine_id=offer.machine_id,
            host_id=offer.host_id,
            gpu_name=offer.gpu_name,
            num_gpus=offer.num_gpus,
            gpu_told=numbers_of(offer),
            running_usd_h=offer.dph_total,
            throughput_work_s=profile.throughput_on(offer.gpu_name, offer.num_gpus, numbers_of(offer)),
            orders=Orders(out=1, asked_at=now),
            terms=Terms.offered(offer, now),
        )

    @classmethod
    def found(cls, label: str, row: Row, now: float, *, first: bool) -> "Instance":
        """Return an instance that is listed but was not known: its order was lost, or the ledger is.

        A stopped one is taken to hold the model. first: no listing came before, so a running one may be hot.
        """
        down, up = row.actual_status in DOWN, row.actual_status in UP
        return cls(
            label=label,
            state=State.COLD if down else State.RUNNING if up else State.LOADING,
            since=now,
            why="found in the listing by its label",
            ordered_at=now,
            id=row.id,
            adopted=True,
            unverified=up and first,
            loaded=down,
            boot=BootRecord(up_at=now, maybe_busy=up),
        )

    @classmethod
    def restored(
        cls, saved: SavedInstance, state: State, since: float, profile: Profile, now: float
    ) -> "Instance":
        """Return an instance that the last process saved in that state; what was hot has to be verified."""
        was_hot = state in SERVING
        # The machine's clock may have been set back since; what was hot gets its time to be checked.
        since = now if was_hot else min(since, now)
        return cls(
            label=saved.label,
            state=State.RUNNING if was_hot else state,
            since=since,
            why="found again after a restart",
            ordered_at=saved.ordered_s,
            id=saved.instance,
            machine_id=saved.machine,
            price_usd_h=saved.usd_h,
            running_usd_h=saved.running_usd_h,
            loaded=saved.loaded,
            condemned=saved.condemned,
            looked_at=saved.looked_at,
            unverified=was_hot,
            throughput_work_s=saved.throughput or profile.throughput_work_s,
            boot=BootRecord.restored(state, since),
            orders=Orders(asked_at=since),
        )

    # -- what happens to it ----------------------------------------------------------------------------

    def enter(self, state: State, why: str, now: float) -> None:
        """Change the state; raise IllegalTransition and change nothing if that transition is not allowed."""
        check_transition(self.state, state)
        self.state, self.since, self.why = state, now, why
        self.unverified = self.suspected = False
        self.taken_out.end(state)

    def explain(self, why: str, *, suspected: bool = False) -> None:
        """Replace the reason for the state by a better one. suspected: it will hardly become hot soon."""
        self.why, self.suspected = why, self.suspected or suspected

    def read_row(self, row: Row, profile: Profile, now: float) -> bool:
        """Copy what the listing shows of the instance; return whether its address has changed."""
        self.absence.end()
        self.looked_at, self.container_began = now, None if row.up_s is None else now - row.up_s
        self.listed, self.intended, self.odd = True, row.intended_status, row.odd
        self.holds_gpu = row.cur_state == "running" or row.actual_status in BOOTING
        self.trouble.note_loading(given_up=_is_halted(row) and self.state is State.LOADING)
        self.id, self.machine_id = row.id, row.machine_id or self.machine_id
        self.host_id = row.host_id or self.host_id
        self.gpu_name, self.num_gpus = row.gpu_name or self.gpu_name, row.num_gpus
        self.gpu_told = numbers_of(row, self.gpu_told)
        if self.throughput_work_s <= 1.0:
            self.throughput_work_s = profile.throughput_on(row.gpu_name, row.num_gpus, self.gpu_told)
        if row.priced:
            self.price_usd_h = row.price_now_usd_h
            self.running_usd_h, self.stopped_usd_h = row.dph_total, self.terms.read(row)
        self.ssh = _ssh_address(row)
        self.lost_since = _since(self.lost_since, now, row.actual_status in LOST)
        self.trouble.note_status(row.status_msg, now)
        ended = row.actual_status in DOWN and row.intended_status != "stopped" and self.state in RUNS
        self.trouble.note_ended(now, ended=ended)
        before = self.host, self.ports
        self.host, self.ports = row.public_ip, row.ports
        return before != (self.host, self.ports)

    def spare_until(self, until: float) -> None:
        """Let no deadline of the instance pass before that time."""
        self.patience_until = max(until, self.patience_until)

    def condemn(self, evidence: str = "") -> None:
        """Give the instance up for good, on that evidence: if its label reappears it is destroyed."""
        self.condemned = True
        self.evidence = evidence or self.evidence

    def order_start(self, now: float) -> None:
        """Note that a start of the instance was ordered, or happened without our asking: a new boot."""
        self.boot.order(now)
        self.ear.forget()

    def come_up(self, now: float) -> None:
        """Begin a boot of the instance, because its container is up."""
        self.boot.come_up(now)
        self.trouble.forget()
        self.in_flight = None

    def warm_up(self) -> None:
        """Note that the instance becomes hot: the model is on its disk."""
        self.boot.become_hot()
        self.loaded = True

    def drain_from(self, version: int) -> None:
        """Note the version of the first hot set that says that the instance is draining."""
        self.drain_version = version

    def end_bill(self) -> None:
        """Note that the instance costs nothing any more."""
        self.price_usd_h = 0.0

    def accept_id(self, new_id: int | None) -> None:
        """Take the id that the cloud's answer gives, unless the listing gave one before."""
        self.id = self.id or new_id

    # -- health checks and messages --------------------------------------------------------------------

    def order_check(self, now: float) -> HealthCheckOrder | None:
        """Return the health check to make now, and count it; None while the instance is not listed."""
        if self.id is None or not self.listed:
            return None
        self.last_check_at = now
        self.checks += 1
        read_log = self.state is State.RUNNING or (
            self.state is State.HOT and self.checks % READ_LOG_EVERY == 0
        )
        where, accused = (self.ssh, self.auth_url, self.address), self.trouble.accused_by_clients
        known, word = (self.label, self.id, self.state), self.ear.word
        return HealthCheckOrder(*known, *where, read_log, self.certificate, accused, word)

    def check_at_once(self) -> None:
        """Make the instance's next health check due now."""
        self.last_check_at = float("-inf")

    def read_check(self, check: HealthCheck) -> bool:
        """Copy what a check of this boot found; return whether the instance's certificate has changed."""
        self.unverified = False
        if check.in_flight is not None:
            self.in_flight, self.in_flight_at = check.in_flight, check.started_at
        # A signed word goes before what ssh showed: its signer has what only this machine was given.
        return self._show_certificate(self.ear.certificate or check.certificate)

    def _show_certificate(self, shown: str | None) -> bool:
        """Take over the instance's certificate, if it shows one; return whether it is another than before."""
        before, self.certificate = self.certificate, shown or self.certificate
        return before != self.certificate

    def hear(self, said: ReadyBody, now: float) -> Hearing:
        """Take in a message of the instance itself, and have it checked; return what became of it."""
        if (hearing := self.ear.hear(said, now)).taken:
            self._show_certificate(self.ear.certificate)
            self.check_at_once()
            if self.state is State.RUNNING:
                self.why = f"it says: {self.ear.says}"
            if self.state in CHECKED:
                self.trouble.note_word(self.ear.says if said.state == "failed" else None, now)
        return hearing

    def measure(self, throughput_work_s: float) -> bool:
        """Take over a measured throughput (work a second); return whether it differs by more than noise."""
        differs = abs(throughput_work_s - self.throughput_work_s) > THROUGHPUT_NOISE * self.throughput_work_s
        if differs:
            self.throughput_work_s = throughput_work_s
        return differs

    # -- what can be asked -----------------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        """The URL to which clients send prompts; None until the listing shows the host and port."""
        return self._url(8000)

    @property
    def auth_url(self) -> str | None:
        """The URL from which loadbalancers fetch tokens; None until the listing shows the host and port."""
        return self._url(3000)

    def _url(self, inside: int) -> str | None:
        scheme, known = "https" if self.certificate else "http", self.host and inside in self.ports
        return f"{scheme}://{self.host}:{self.ports[inside]}" if known else None

    @property
    def usd_per_work(self) -> float:
        """The price of throughput, by which instances are ranked: $/h for each work a second."""
        return self.running_usd_h / max(self.throughput_work_s, 1e-9)

    @property
    def committed_usd_h(self) -> float:
        """The most that the instance may cost in its state, in $/h, as far as is known."""
        if self.state in BILLS_GPU:
            return max(self.price_usd_h, self.running_usd_h)
        return max(self.price_usd_h, self.stopped_usd_h) or self.running_usd_h  # no price: never listed

    @property
    def is_of_no_use(self) -> bool:
        """Whether the instance was stopped before its model was on its disk: a start would begin anew."""
        return self.state is State.COLD and not (self.loaded or self.adopted or self.boot.interrupted)

    @property
    def is_coming(self) -> bool:
        """Whether the instance is on its way to hot with the model on its disk, as far as is known."""
        loaded = (self.loaded or self.unverified) and not self.suspected
        return self.state is State.STARTING or (self.state is State.RUNNING and loaded)

    def saved(self) -> SavedInstance:
        """Return what a restarted autoscaler must know of the instance."""
        known = self.label, self.id, self.machine_id, self.loaded, self.condemned, self.ordered_at
        prices = self.price_usd_h, self.running_usd_h
        return SavedInstance(*known, self.throughput_work_s, self.state, self.since, *prices)

    def interval(self, now: float) -> BillingInterval:
        """Return the billing interval that begins now, with the instance's present state and price."""
        what, prices = (self.label, self.id, self.machine_id), (self.price_usd_h, self.running_usd_h)
        return BillingInterval(*what, str(self.state), now, None, *prices, self.why)

    def __repr__(self) -> str:
        """Return the instance in short, as <1001 fleet/3f2a… hot 'ok'>, for test failures."""
        return f"<{self.id} {self.label} {self.state} {self.why!r}>"


def _since(before: float | None, now: float, lasts: bool) -> float | None:
    """Return since when a condition lasts, given since when it lasted before; None: it does not."""
    return (now if before is None else before) if lasts else None


def _is_halted(row: Row) -> bool:
    return row.actual_status in BOOTING and row.intended_status == "stopped"


def _ssh_address(row: Row) -> tuple[str, int] | None:
    """Return the direct ssh address where the listing maps port 22, else the cloud's proxy's.

    See vast-contract 2.7.
    """
    if row.public_ip and 22 in row.ports:
        return row.public_ip, row.ports[22]
    return (row.ssh_host, row.ssh_port) if row.ssh_host and row.ssh_port else None
