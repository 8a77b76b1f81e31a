"""A world for InstanceSet tests: contracts that boot, load and stop after fixed times, and lie when told to.

`World.tick(seconds)` moves time in turns of 5 s: observe, decide, begin, perform on the fake cloud,
finish. Everything ordered is in `ordered`; `forget()` empties it, and `unexplained()` gives what no test
asked about.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from autoscaler import InstanceSet
from engine.gpus import GPUS
from engine.profiles import get_profile
from fleet.commands import (
    AskPage,
    Command,
    Create,
    Destroy,
    Drain,
    LookForOffers,
    Performed,
    Reply,
    Start,
    Stop,
    Undrain,
    with_label,
)
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.evidence import Health
from fleet.health_check import HealthCheck, Verdict
from fleet.journal import SavedFleet
from fleet.limits import Limits
from fleet.slowness import ProbePace
from fleet.states import State
from policies import Fixed, Policy
from tests.messages import busy_report
from vast.rows import Offer, Row

TURN_S = 5.0


def make_offer(id: int, usd_h: float = 0.4, gpu: str = "RTX 4090", machine: int | None = None) -> Offer:
    """An offer on machine 100 + id."""
    return Offer(
        id=id,
        machine_id=machine if machine is not None else 100 + id,
        host_id=1,
        gpu_name=gpu,
        num_gpus=1,
        gpu_ram_mb=1024.0 * GPUS[gpu].mem_gb if gpu in GPUS else 24_564.0,
        dph_total=usd_h,
        dph_base=usd_h - 0.01,
        storage_cost_gb_month=0.15,
        inet_down_mbps=1000.0,
        reliability=0.99,
        dlperf=80.0,
        geolocation="Norway, NO",
        is_bid=False,
        min_bid=0.2,
        duration_s=1e6,
    )


@dataclass
class Contract:
    """One rented machine of the fake cloud."""

    id: int
    label: str
    machine_id: int
    usd_h: float
    status: str | None = None
    intended: str = "running"
    up_at: float | None = None
    ready_at: float | None = None
    down_at: float | None = None
    hidden: bool = False
    status_msg: str = ""
    gpu: str = "RTX 4090"

    def row(self) -> Row:
        """As the listing shows it."""
        up = self.status == "running"
        return Row(
            id=self.id,
            machine_id=self.machine_id,
            label=self.label,
            actual_status=self.status,
            intended_status=self.intended,
            cur_state="stopped" if self.status in ("stopped", "exited") else "running",
            status_msg=self.status_msg,
            public_ip="127.0.0.1",
            ports={22: 20000 + self.id, 3000: 21000 + self.id, 8000: 22000 + self.id} if up else {},
            ssh_host=None,
            ssh_port=None,
            gpu_name=self.gpu,
            num_gpus=1,
            dph_base=self.usd_h - 0.01,
            dph_total=self.usd_h,
            storage_usd_h=0.01,
            price_now_usd_h=self.usd_h if up else 0.01,
            start_date=0.0,
            end_date=None,
            image="vllm",
            onstart=None,
        )


class FakeVast:
    """For an Autoscaler: lists what it is told to list, and does and keeps what it is sent."""

    def __init__(self, rows: Callable[[], list[Row]]) -> None:
        """rows: what the account has at the moment."""
        self.rows = rows
        self.listing_error: Exception | None = None
        self.error: Exception | None = None
        self.prefixes: list[str | None] = []
        self.sent: list[Command] = []

    def list_instances(self, label_prefix: str | None = None) -> list[Row]:
        """As `Vast` does it."""
        self.prefixes.append(label_prefix)
        if self.listing_error is not None:
            raise self.listing_error
        return [r for r in self.rows() if (r.label or "").startswith(label_prefix or "")]

    def perform(self, command: Command) -> Performed:
        """As `Performer` does it."""
        self.sent.append(command)
        if self.error is not None:
            raise self.error
        if isinstance(command, AskPage):
            return Performed(Reply.DONE, row=next((r for r in self.rows() if r.id == command.id), None))
        offers = (make_offer(1),) if isinstance(command, LookForOffers) else None
        return Performed(Reply.DONE, offers=offers, new_id=1 if isinstance(command, Create) else None)


@dataclass
class World:
    """The clock, the fake cloud, and the set under test."""

    policy: Policy = field(default_factory=lambda: Fixed(1, 1))
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    boot_s: float = 60.0
    load_s: float = 300.0
    start_s: float = 20.0
    reload_s: float = 40.0
    stop_s: float = 10.0
    now: float = 1000.0
    listing_works: bool = True
    listing_hook: Callable[[list[Row]], list[Row]] = lambda rows: rows
    reply_hook: Callable[[Command], Reply | None] = lambda command: None
    check_hook: Callable[[str], Verdict | None] = lambda label: None
    pace_hook: Callable[[str], ProbePace | None] = lambda label: None
    busy: set[str] = field(default_factory=set)
    loadbalancer: bool = True
    reach: Health = Health.WELL
    pages_work: bool = True

    def __post_init__(self) -> None:
        self.offers = [make_offer(n) for n in range(1, 20)]
        self.contracts: dict[str, Contract] = {}
        self.ordered: list[Command] = []
        self.pages: list[str] = []  # labels whose own page was asked for
        self.fleet = self.new_set()
        self.demand = Demand("e1")
        self.next_id = 1001
        self.labels = 0

    def new_set(self) -> InstanceSet:
        """A set as a process just started has it."""
        return InstanceSet("fleet", get_profile("vllm-13"), self.limits, self.deadlines)

    def saved(self) -> SavedFleet:
        """What the ledger has learnt since the last call."""
        entries = self.fleet.journal.take()
        return SavedFleet(
            [r for r in entries.instances.values() if r.state != "gone"],
            lacking=entries.lacking or (None, float("-inf")),
        )

    def restart(self, saved: SavedFleet | None = None) -> "World":
        """Put a process just started in the place of this one; it knows what the ledger holds."""
        held = self.saved() if saved is None else saved
        self.fleet = self.new_set()
        self.fleet.restore(held, self.now)
        return self

    def listing(self) -> list[Row]:
        """What the cloud shows at this moment."""
        return [c.row() for c in self.contracts.values() if not c.hidden]

    # -- time ---------------------------------------------------------------------------------------

    def tick(self, seconds: float = TURN_S) -> "World":
        """Let so much time pass, turn by turn."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + TURN_S)
            self.turn()
        return self

    def turn(self) -> None:
        """One turn at the present time."""
        self._advance()
        self.fleet.record_reach(self.reach, self.now)
        rows = self.listing_hook(self.listing())
        self.fleet.observe(rows if self.listing_works else None, (), self.now)
        for check in self._checks():
            self.fleet.judge(check, self.now)
        if self.loadbalancer:
            self.report()
        self.demand.tick(self.now)
        first = self.fleet.decide(self.demand, self.policy, self.now)
        decision = self.fleet.decide(self.demand, self.policy, self.now)
        assert first == decision, "deciding twice gave two answers"
        for command in decision.commands:
            labelled = command
            if isinstance(command, Create):
                self.labels += 1
                labelled = with_label(command, f"fleet/{self.labels:04d}")
            self.fleet.begin(labelled, self.now)
            self.perform(labelled)
        self.check_limits()

    def report(self, demand: float | None = None) -> None:
        """A loadbalancer's report: it knows the hot set and has leases on the busy."""
        if demand is not None:
            self.load = demand
        ids = {i.label: i.id for i in self.fleet}
        unfinished = {ids[label]: 1 for label in self.busy if ids.get(label)}
        self.demand.add_report(
            busy_report(
                demand=self.load, busy=0.0, hot_version=self.fleet.hot_version, unfinished=unfinished
            ),
            self.now,
        )

    load: float = 0.0

    def check_limits(self) -> None:
        """The hard limits hold at every moment, for what the cloud really has."""
        assert len(self.contracts) <= self.limits.max_instances
        usd_h = sum(c.usd_h if c.intended == "running" else 0.01 for c in self.contracts.values())
        assert usd_h <= self.limits.max_usd_h + 1e-9

    # -- the fake cloud -----------------------------------------------------------------------------

    def perform(self, command: Command) -> None:
        if isinstance(command, AskPage):
            self.pages.append(command.label)
            there = next((c.row() for c in self.contracts.values() if c.id == command.id), None)
            found = Performed(Reply.DONE, row=there) if self.pages_work else Performed(Reply.UNKNOWN)
            self.fleet.finish(command, found, self.now)
            return
        reply = self.reply_hook(command)
        self.ordered.append(command)
        if isinstance(command, LookForOffers):
            self.fleet.finish(command, Performed(Reply.DONE, offers=tuple(self.offers)), self.now)
            return
        if isinstance(command, Drain | Undrain):
            return
        new_id = None
        if reply in (None, Reply.UNKNOWN, Reply.DONE):
            new_id = self.apply(command)
        reply = reply or Reply.DONE
        new_id = new_id if reply is Reply.DONE else None
        self.fleet.finish(command, Performed(reply, "said the test", new_id), self.now)

    def apply(self, command: Command) -> int | None:
        if isinstance(command, Create):
            c = Contract(self.next_id, command.label, command.offer.machine_id, command.offer.dph_total)
            c.gpu = command.offer.gpu_name
            self.next_id += 1
            c.up_at = self.now + self.boot_s
            self.contracts[c.label] = c
            self.offers = [o for o in self.offers if o.id != command.offer.id]
            return c.id
        if isinstance(command, Destroy):
            self.contracts.pop(command.label, None)
            return None
        c = self.contracts[command.label]  # type: ignore[union-attr]
        if isinstance(command, Start):
            c.intended, c.up_at = "running", self.now + self.start_s
        elif isinstance(command, Stop):
            c.intended, c.down_at, c.up_at, c.ready_at = "stopped", self.now + self.stop_s, None, None
        return None

    def _advance(self) -> None:
        for c in self.contracts.values():
            if c.up_at is not None and self.now >= c.up_at:
                first = c.status in (None, "loading")
                c.status, c.ready_at, c.up_at = (
                    "running",
                    c.up_at + (self.load_s if first else self.reload_s),
                    None,
                )
            elif c.down_at is not None and self.now >= c.down_at:
                c.status, c.down_at = "exited", None
            elif c.status is None:
                c.status = "loading"

    def _checks(self) -> list[HealthCheck]:
        found = []
        for order in self.fleet.checks_due(self.now):
            c = self.contracts.get(order.label)
            verdict = self.check_hook(order.label)
            if verdict is None:
                ready = c is not None and c.ready_at is not None and self.now >= c.ready_at
                verdict = Verdict.PASSED if ready else Verdict.LOADING
            up = c is not None and c.status == "running"
            if (
                verdict in (Verdict.PASSED, Verdict.LOADING)
                and not up
                and self.check_hook(order.label) is None
            ):
                verdict = Verdict.FAILED  # nobody answers where nothing runs
            found.append(
                HealthCheck(
                    order.label,
                    self.now,
                    verdict,
                    str(verdict),
                    int(order.label in self.busy),
                    pace=self.pace_hook(order.label) if verdict is Verdict.PASSED else None,
                )
            )
        return found

    def check(
        self, label: str, verdict: Verdict = Verdict.PASSED, why: str = "ok", in_flight: int | None = None
    ) -> None:
        """A health check of this moment found that."""
        self.fleet.judge(HealthCheck(label, self.now, verdict, why, in_flight), self.now)

    def measure(self, *work_s: float, state: State | None = None) -> None:
        """A loadbalancer has measured these throughputs, of all instances or of those in that state."""
        ids = [i.id for i in self.fleet if i.id is not None and state in (None, i.state)]
        self.fleet.record_report(dict(zip(ids, work_s, strict=True)), (), self.now)

    # -- what a test asks ---------------------------------------------------------------------------

    def states(self) -> dict[str, int]:
        """How many instances are in each state."""
        count: dict[str, int] = {}
        for i in self.fleet:
            count[str(i.state)] = count.get(str(i.state), 0) + 1
        return count

    def kinds(self) -> list[str]:
        """The orders so far, by name, searches left out."""
        return [type(c).__name__ for c in self.ordered if not isinstance(c, LookForOffers)]

    def forget(self) -> "World":
        """Start a new list of orders."""
        self.ordered = []
        return self

    def only(self, state: State = State.HOT) -> str:
        """The label of the one instance in that state."""
        (label,) = [i.label for i in self.fleet if i.state is state]
        return label

    def with_pool(self, hot: int, total: int) -> "World":
        """Run until so many are hot and the rest stopped with the model."""
        self.policy = Fixed(hot, total)
        for _ in range(600):
            self.tick()
            if self.states() == {k: v for k, v in (("hot", hot), ("cold", total - hot)) if v}:
                return self.forget()
        raise AssertionError(f"pool not reached: {self.states()}")

    def reprice(self, *usd_h: float) -> None:
        """Change the prices of the rented machines, in the order in which they were rented."""
        for c, price in zip(self.contracts.values(), usd_h, strict=True):
            c.usd_h = price
        self.fleet.observe(self.listing(), (), self.now)
