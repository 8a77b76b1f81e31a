"""A Vast.ai in virtual time: localcloud's cloud model, seen as `Vast` and `Performer` see the real one.

    Autoscaler ── list_instances ──► Row of each rental       what the vastai CLI would print, parsed
               ── perform(command) ─► create, start, stop …   what it would answer

Prices, states, billing, slots and draws of times are those of `localcloud/cloud.py`; here is only the
translation, and chance: what a market does to a fleet, as rates (`Hazards`), drawn from a seeded generator
and played as the faults that localcloud knows.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.gpus import GpuNumbers
from engine.profile import Profile
from fleet.commands import AskPage, Command, Create, Destroy, LookForOffers, Performed, Reply, Start, Stop
from fleet.gpu_numbers import MB_A_GB
from localcloud.cloud import Cloud
from localcloud.durations import Times
from localcloud.effects import Boot, Effect
from localcloud.faults import Faults
from localcloud.machines import HOURS_PER_MONTH, MACHINES, Machine
from localcloud.orders import CloudRefusal, Order
from localcloud.phases import SHOWN, Phase
from localcloud.query import Query, matches
from localcloud.realism import NONE, Realism
from localcloud.rental import Rental
from process.errors import ConfigError
from vast.rows import Offer, Row

_PORTS = {"-p 3000:3000": "1", "-p 8000:8000": "1"}
_OPERATORS = {">=": "gte", "<=": "lte", "!=": "neq", ">": "gt", "<": "lt", "=": "eq"}
_MULTIPLIED = {"gpu_ram": 1e3, "gpu_total_ram": 1e3, "cpu_ram": 1e3, "duration": 86_400.0}  # by the CLI


@dataclass(frozen=True)
class Hazards:
    """What goes wrong by chance: shares of starts, and rates per hour that an instance is up.

    no_gpu: a start finds its GPU taken for no_gpu_s. dies_h: its processes end. offline_h: its host is lost
    for offline_s. outbid_h: an interruptible one is stopped for outbid_s. bid: rent interruptible ones, at so
    many times the price on demand; None on demand.
    """

    no_gpu: float = 0.0
    no_gpu_s: float = 1800.0
    dies_h: float = 0.0
    offline_h: float = 0.0
    offline_s: float = 600.0
    outbid_h: float = 0.0
    outbid_s: float = 1200.0
    bid: float | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a number that cannot be a share, a rate or a duration."""
        if not 0.0 <= self.no_gpu <= 1.0:
            raise ConfigError(f"hazard no_gpu: wanted 0 to 1, got {self.no_gpu:g}")
        for name in ("dies_h", "offline_h", "outbid_h"):
            if not 0.0 <= getattr(self, name) <= 3600.0:
                raise ConfigError(f"hazard {name}: wanted 0 to 3600 an hour, got {getattr(self, name):g}")
        for name in ("no_gpu_s", "offline_s", "outbid_s"):
            if not 0.01 <= getattr(self, name) <= 1e7:
                raise ConfigError(f"hazard {name}: wanted 0.01 to 1e7 s, got {getattr(self, name):g}")
        if self.bid is not None and not 0.5 <= self.bid <= 2.0:
            raise ConfigError(f"hazard bid: wanted 0.5 to 2 times the price, got {self.bid:g}")
        if self.outbid_h and self.bid is None:
            raise ConfigError("hazard outbid_h: only interruptible instances are outbid: set bid")


def parse_hazards(text: str) -> Hazards:
    """Return the hazards in a text `name=number,…`; raise ConfigError that says what was wanted."""
    given: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in Hazards.__dataclass_fields__ or not equals:
            known = ", ".join(Hazards.__dataclass_fields__)
            raise ConfigError(f"{part!r:.60}: wanted name=number with a name of {known}")
        try:
            given[name] = float(value)
        except ValueError:
            raise ConfigError(f"{name}: wanted a number, got {value!r:.60}") from None
    return Hazards(**given)


def times_for(profile: Profile, spread: float = 1 / 3) -> Times:
    """Return start and load times around the profile's, each drawn within ±spread of its mean.

    A third makes 60 to 120 s of a start of 90 s.
    """
    t = Times()
    return Times(
        start_s=max(1.0, profile.start_time_s - t.restart_s),
        load_s=max(1.0, profile.load_time_s - t.provision_s - t.create_s - t.pull_s),
        spread=spread,
    )


def deep_market(machines: Iterable[Machine] = MACHINES, depth: int = 8) -> tuple[Machine, ...]:
    """Return the machines for rent with `depth` times the slots and disk: room for a large fleet.

    A machine has at most 64 slots.
    """
    return tuple(
        Machine(
            **{
                **m.__dict__,
                "slots": min(64, m.slots * depth),
                "disk_gb": min(1e6, m.disk_gb * depth),
            }
        )
        for m in machines
    )


class SimulatedCloud:
    """The cloud in virtual time, with one customer. Methods that take `now` first do what was due by then."""

    def __init__(
        self,
        machines: Sequence[Machine],
        profile: Profile,
        rng: random.Random,
        times: Times | None = None,
        speedup: float = 1.0,
        realism: Realism = NONE,
    ) -> None:
        """Make a cloud in which nothing is rented, with practically unlimited credit.

        realism: how unkind it is.
        """
        self.dearest_usd_h = 0.0  # of a machine that has booted
        self._hazards = Hazards()
        self._ends = realism.contract_ends
        self._profile = profile
        self._rng = rng
        self.faults = Faults()
        self.model = Cloud(
            machines,
            random.Random(rng.getrandbits(64)),
            speedup=speedup,
            times=times or times_for(profile),
            faults=self.faults,
            credit_usd=1e12,
            realism=realism,
        )
        self._rows: dict[int, tuple[object, Row]] = {}

    # -- as time passes --

    def advance(self, now: float) -> list[Effect]:
        """Let the cloud's time pass; return what it does to machines by now: boots, ends, kills."""
        self.model.advance(now)
        return self.model.take_effects()

    def booted(self, boot: Boot, now: float) -> None:
        """Note that the processes of a rental's boot run."""
        self.dearest_usd_h = max(self.dearest_usd_h, boot.machine.usd_h)
        ports = {inside: 10_000 + 10 * (boot.id % 5000) + n for n, inside in enumerate(boot.order.ports)}
        self.model.booted(boot.id, boot.boot, ports, now)

    def crashed(self, id: int, now: float) -> None:
        """Note that the processes of a rental have died by themselves."""
        rental = self.model.rentals.get(id)
        if rental is not None:
            self.model.crashed(id, rental.boot, now)

    def next_event(self, now: float) -> float | None:
        """Return when `advance` will have something to do; None when nothing is under way."""
        return self.model.next_event(now)

    def begin_hazards(self, hazards: Hazards) -> None:
        """Let these hazards strike by chance from now on."""
        self._hazards = hazards

    def draw_hazards(self, now: float, for_s: float) -> None:
        """Draw by chance which hazards strike running instances in for_s seconds; called at that interval."""
        h = self._hazards
        for rate, fault, args in (
            (h.dies_h, "dies-hot", {"count": 1}),
            (h.offline_h, "offline", {"seconds": h.offline_s}),
            (h.outbid_h, "outbid", {"seconds": h.outbid_s}),
        ):
            if not rate:
                continue
            for r in self.model.rentals.values():
                if r.phase is Phase.RUNNING and self._rng.random() < rate * for_s / 3600.0:
                    self.faults.add(fault, {**args, "instance_id": r.id}, now)

    # -- what Vast does --

    def rows(self) -> list[Row]:
        """Return the listing of all rentals, as the vast package parses it."""
        rows = []
        for r in self.model.rentals.values():
            contract = (r.contract.end_at, r.bill.gpu_usd_h)
            key = (r.phase, r.wanted, r.offline, r.bill.bid, r.status_msg, r.boot, contract)
            known = self._rows.get(r.id)
            if known is None or known[0] != key:
                known = self._rows[r.id] = (key, _row(r, ends=self._ends))
            rows.append(known[1])
        if len(self._rows) > 2 * len(rows) + 64:
            self._rows = {r.id: self._rows[r.id] for r in self.model.rentals.values()}
        return rows

    def perform(self, command: Command, now: float) -> Performed:
        """Carry out a command of the autoscaler; return the cloud's answer."""
        try:
            if isinstance(command, Create):
                return Performed(Reply.DONE, new_id=self._create(command, now))
            if isinstance(command, LookForOffers):
                return Performed(Reply.DONE, offers=tuple(self.offers(now)))
            if isinstance(command, Start):
                if self._rng.random() < self._hazards.no_gpu:
                    args = {"instance_id": command.id, "seconds": self._hazards.no_gpu_s, "count": 1}
                    self.faults.add("start-waits", args, now)
                with self.model.changing(command.id, now) as rental:
                    rental.start(now)
            elif isinstance(command, Stop):
                with self.model.changing(command.id, now) as rental:
                    rental.stop(now)
            elif isinstance(command, Destroy):
                self.model.destroy(command.id, now)
            elif isinstance(command, AskPage):
                found = self.model.rentals.get(command.id)
                return Performed(Reply.DONE, row=None if found is None else _row(found, ends=self._ends))
        except CloudRefusal as e:
            done = isinstance(command, Destroy) and e.status == 404
            return Performed(Reply.DONE if done else Reply.REFUSED, e.msg, offer_gone=e.status == 410)
        return Performed(Reply.DONE)

    def _create(self, command: Create, now: float) -> int:
        bid = self._hazards.bid
        order = Order(
            image=self._profile.image.name,
            disk_gb=self._profile.disk_gb,
            label=command.label,
            env={**_PORTS, "MODEL": self._profile.model},  # whose size is billed
            cancel_unavail=True,
            price=None if bid is None else bid * command.offer.dph_base,
        )
        return self.model.create(command.offer.id, order, now)

    def offers(self, now: float) -> list[Offer]:
        """Return the offers that match the profile's query."""
        filters = _filters(self._profile.offer_query())
        disk_gb = self._profile.disk_gb
        query = Query({}, limit=100_000, disk_gb=disk_gb)
        return [
            Offer(
                id=row["id"],
                machine_id=row["machine_id"],
                host_id=row["host_id"],
                gpu_name=row["gpu_name"],
                num_gpus=row["num_gpus"],
                gpu_ram_mb=row["gpu_ram"],
                dph_total=row["dph_total"],
                dph_base=row["dph_base"],
                storage_cost_gb_month=row["storage_cost"],
                inet_down_mbps=row["inet_down"],
                reliability=row["reliability"],
                dlperf=row["dlperf"],
                geolocation=row["geolocation"],
                is_bid=False,
                min_bid=row["min_bid"],
                duration_s=row["duration"],
                gpu_mem_bw_gb_s=row["gpu_mem_bw"],
                total_tflops=row["total_flops"],
                inet_down_usd_gb=row["inet_down_cost"],
                inet_up_usd_gb=row["inet_up_cost"],
            )
            for row in self.model.search(query, now)
            if not row["rented"] and matches(row, filters)
        ]

    # -- the bill --

    def unfinished_download_usd(self) -> float:
        """Return the dollars for bytes of machines that never had all of them: an upper bound."""
        gb = self._profile.download_gb
        whole = sum(gb * r.machine.inet_usd_gb for r in self.model.rentals.values() if not r.loaded)
        return whole + self.model.destroyed * gb * self.dearest_usd_gb

    @property
    def dearest_usd_gb(self) -> float:
        """The highest price of a byte on the market, $ a GB."""
        return max((m.inet_usd_gb for m in self.model.machines.values()), default=0.0)

    def spent_usd(self) -> float:
        """Return all dollars that the cloud has charged, exact as of the last `advance`."""
        return self.model.account.spent_usd()["total"]


def told_of(machine: Machine) -> GpuNumbers:
    """Return what offers of that machine say of one of its GPUs."""
    gpu = machine.gpu
    return GpuNumbers(gpu.ram_mb / MB_A_GB, gpu.mem_bw_gb_s, gpu.tflops)


def _filters(query: str) -> dict[str, dict[str, str]]:
    """Return an offer query in the CLI's language (`gpu_ram>=22 num_gpus=1`) as the service's filters."""
    filters: dict[str, dict[str, str]] = {}
    for part in query.split():
        found = re.fullmatch(r"(\w+)(>=|<=|!=|>|<|=)(.+)", part)
        if found is None:
            raise ConfigError(f"offer query: wanted name, operator and value, got {part!r:.60}")
        name, operator, value = found.groups()
        if name in _MULTIPLIED:
            value = str(float(value) * _MULTIPLIED[name])
        filters.setdefault(name, {})[_OPERATORS[operator]] = value
    return filters


def _row(r: Rental, *, ends: bool) -> Row:
    shown = SHOWN[r.phase]
    gpu_usd_h, storage_usd_h = r.usd_h_now()
    running = r.phase is Phase.RUNNING
    ports = {int(inside.partition("/")[0]): outside for inside, outside in r.ports.items()} if running else {}
    return Row(
        id=r.id,
        machine_id=r.machine.machine_id,
        label=r.label,
        actual_status="offline" if r.offline else shown.actual_status,
        intended_status="running" if r.phase is Phase.STOPPING and r.wanted else shown.intended_status,
        cur_state=shown.cur_state,
        status_msg=r.status_msg,
        public_ip="127.0.0.1",
        ports=ports,
        ssh_host=None,
        ssh_port=None,
        gpu_name=r.machine.gpu_name,
        num_gpus=r.machine.num_gpus,
        dph_base=r.bill.gpu_usd_h,
        dph_total=r.bill.gpu_usd_h + r.bill.storage_usd_h,
        storage_usd_h=r.machine.storage_usd_gb_month * r.order.disk_gb / HOURS_PER_MONTH,
        price_now_usd_h=gpu_usd_h + storage_usd_h,
        start_date=r.created_at,
        end_date=r.contract.end_at if ends else None,
        image=r.order.image,
        gpu_ram_mb=r.machine.gpu.ram_mb,
        gpu_mem_bw_gb_s=r.machine.gpu.mem_bw_gb_s,
        total_tflops=r.machine.gpu.tflops * r.machine.num_gpus,
        inet_down_usd_gb=r.machine.inet_usd_gb,
        inet_up_usd_gb=r.machine.inet_usd_gb,
    )
