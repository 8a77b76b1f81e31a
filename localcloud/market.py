"""What is for rent: machines, the offers made of them, and the query language that searches offers.

A machine has slots of equal size, each one offer of `num_gpus` GPUs; whoever rents an offer holds the
slot while the rental runs, and gives it up when it stops. The disk is the machine's, and stays held.

    price of an offer, $/h = num_gpus * usd_gpu_h + storage_gb_month * allocated GB / 720
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from process.errors import ConfigError

HOURS_PER_MONTH = 720.0
"""storage_total_cost = storage_cost * disk_space / 720 (vast-contract 2.11)."""

DAY_S = 86_400.0

OFFER_LIMIT = 64
"""Offers in an answer that was not asked for a number."""

MIN_BID_SHARE = 0.5
"""Least bid as a share of the price on demand: interruptible is "50 %+ cheaper" (timing.md 4)."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. ram_mb as its driver reports it; tflops at fp32; dlperf as Vast scores it, roughly."""

    ram_mb: int
    arch: str
    compute_cap: int
    tflops: float
    dlperf: float
    mem_bw_gb_s: float
    max_power_w: float


# Ram and capability as vast-contract 2.1 describes the fields, the rest from the makers' data sheets.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "RTX 3090": Gpu(24_576, "ampere", 860, 35.6, 45.0, 936.0, 350.0),
        "RTX 4090": Gpu(24_564, "ada", 890, 82.6, 95.0, 1_008.0, 450.0),
        "RTX A6000": Gpu(49_140, "ampere", 860, 38.7, 50.0, 768.0, 300.0),
        "L40S": Gpu(46_068, "ada", 890, 91.6, 100.0, 864.0, 350.0),
        "A100 SXM4": Gpu(81_920, "ampere", 800, 19.5, 120.0, 2_039.0, 400.0),
        "H100 SXM": Gpu(81_559, "hopper", 900, 66.9, 250.0, 3_350.0, 700.0),
    }
)


@dataclass(frozen=True)
class Machine:
    """A host's machine: `slots` offers of `num_gpus` GPUs each. inet in Mbit/s, disk_gb of all of it."""

    machine_id: int
    gpu_name: str
    usd_gpu_h: float
    num_gpus: int = 1
    slots: int = 4
    host_id: int = 7_000
    disk_gb: float = 2_000.0
    storage_usd_gb_month: float = 0.15
    inet_down: float = 900.0
    inet_up: float = 700.0
    inet_usd_gb: float = 0.002
    reliability: float = 0.995
    cuda_max_good: float = 12.8
    driver_version: str = "570.86.15"
    direct_port_count: int = 100
    geolocation: str = "Sweden, SE"
    verification: str = "verified"
    rental_days: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot be: ConfigError names the machine, the field and the range."""
        if self.gpu_name not in GPUS:
            self._refuse("gpu_name", f"one of {', '.join(GPUS)}")
        for name, least, most in _RANGES:
            if not least <= getattr(self, name) <= most:
                self._refuse(name, f"{least:g} to {most:g}")
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.driver_version):
            self._refuse("driver_version", "three numbers with dots")
        if self.verification not in ("verified", "unverified", "deverified"):
            self._refuse("verification", "verified, unverified or deverified")

    def _refuse(self, name: str, wanted: str) -> None:
        raise ConfigError(
            f"machine {self.machine_id}: {name}: wanted {wanted}, got {getattr(self, name)!r:.80}"
        )

    @property
    def gpu(self) -> Gpu:
        """What is known of its kind of GPU."""
        return GPUS[self.gpu_name]

    @property
    def usd_h(self) -> float:
        """GPU price of one slot, $/h on demand."""
        return self.num_gpus * self.usd_gpu_h

    def offer_id(self, slot: int) -> int:
        """The number to rent that slot by."""
        return self.machine_id * 100 + slot

    def storage_usd_h(self, gb: float) -> float:
        """What so much disk costs, $/h."""
        return self.storage_usd_gb_month * gb / HOURS_PER_MONTH


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("machine_id", 1, 10**8),
    ("usd_gpu_h", 0.001, 128.0),
    ("num_gpus", 1, 16),
    ("slots", 1, 64),
    ("host_id", 1, 10**9),
    ("disk_gb", 8.0, 10**6),
    ("storage_usd_gb_month", 0.0, 10.0),
    ("inet_down", 0.1, 10**6),
    ("inet_up", 0.1, 10**6),
    ("inet_usd_gb", 0.0, 10.0),
    ("reliability", 0.0, 1.0),
    ("cuda_max_good", 9.0, 99.0),
    ("direct_port_count", 0, 65_535),
    ("rental_days", 0.01, 3_650.0),
)

# Prices per GPU-hour within the ranges of timing.md section 4; L40S has none there and is an assumption,
# as are the storage prices (0.10 to 0.20 suggested there). 4103 and 4204 fail the filters of every
# profile (reliability, network), as part of every real search does.
MACHINES: tuple[Machine, ...] = (
    Machine(4101, "RTX 3090", 0.21, slots=4, host_id=7001, inet_down=780.0, inet_up=640.0),
    Machine(
        4102, "RTX 3090", 0.26, slots=4, host_id=7002, geolocation="Germany, DE", storage_usd_gb_month=0.12
    ),
    Machine(4103, "RTX 3090", 0.18, slots=4, host_id=7003, reliability=0.91, geolocation="Bulgaria, BG"),
    Machine(4201, "RTX 4090", 0.45, slots=4, host_id=7001, geolocation="Sweden, SE"),
    Machine(4202, "RTX 4090", 0.68, slots=8, host_id=7004, geolocation="Texas, US", inet_down=2_400.0),
    Machine(4204, "RTX 4090", 0.39, slots=4, host_id=7005, inet_down=95.0, geolocation="Vietnam, VN"),
    Machine(4301, "RTX A6000", 0.55, slots=4, host_id=7006, geolocation="Quebec, CA"),
    Machine(4302, "RTX A6000", 0.56, num_gpus=2, slots=4, host_id=7006, geolocation="Quebec, CA"),
    Machine(4303, "RTX A6000", 0.60, num_gpus=2, slots=4, host_id=7007, geolocation="Iceland, IS"),
    Machine(4401, "L40S", 0.75, slots=4, host_id=7008, geolocation="France, FR", inet_down=1_800.0),
    Machine(4501, "A100 SXM4", 0.78, slots=4, host_id=7009, disk_gb=8_000.0, geolocation="Ohio, US"),
    Machine(4502, "A100 SXM4", 0.95, num_gpus=2, slots=4, host_id=7009, disk_gb=8_000.0),
    Machine(4503, "A100 SXM4", 1.10, slots=4, host_id=7010, disk_gb=8_000.0, inet_down=5_200.0),
    Machine(4601, "H100 SXM", 1.99, slots=4, host_id=7011, disk_gb=8_000.0, inet_down=8_000.0),
    Machine(4602, "H100 SXM", 2.40, slots=4, host_id=7012, disk_gb=8_000.0, geolocation="Nevada, US"),
)


def machines_from(data: object) -> tuple[Machine, ...]:
    """Machines from parsed JSON: objects with the fields of Machine; ConfigError names what is wrong."""
    if not isinstance(data, list) or not data:
        raise ConfigError(f"offers: wanted a list of at least one machine, got {str(data)[:80]!r}")
    kinds: dict[str, Any] = {f.name: f.type for f in fields(Machine)}
    machines = []
    for at, entry in enumerate(data):
        if not isinstance(entry, dict):
            raise ConfigError(f"offers: entry {at}: wanted an object, got {str(entry)[:80]!r}")
        for name, value in entry.items():
            if name not in kinds:
                raise ConfigError(f"offers: entry {at}: unknown field {name!r}; known: {', '.join(kinds)}")
            kind = kinds[name]
            if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
                raise ConfigError(f"offers: entry {at}: {name}: wanted {kind.__name__}, got {value!r:.80}")
        missing = {"machine_id", "gpu_name", "usd_gpu_h"} - entry.keys()
        if missing:
            raise ConfigError(f"offers: entry {at}: missing {', '.join(sorted(missing))}")
        machines.append(Machine(**entry))
    ids = [m.machine_id for m in machines]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"offers: machine_id given twice: {sorted(i for i in ids if ids.count(i) > 1)[0]}")
    return tuple(machines)


@dataclass(frozen=True)
class Slot:
    """One slot as the market sees it now. holder_bid: $/h of an interruptible rental that runs there."""

    machine: Machine
    index: int
    free_disk_gb: float
    rented: bool = False
    holder_bid: float | None = None


def hardware(machine: Machine) -> dict[str, Any]:
    """The fields that offers and instances share, and that never change."""
    gpu, n = machine.gpu, machine.num_gpus
    return {
        "machine_id": machine.machine_id,
        "host_id": machine.host_id,
        "bundle_id": machine.machine_id * 10,
        "num_gpus": n,
        "gpu_name": machine.gpu_name,
        "gpu_ram": gpu.ram_mb,
        "gpu_frac": 1.0 / machine.slots,
        "gpu_arch": "nvidia",
        "gpu_lanes": 16,
        "gpu_mem_bw": gpu.mem_bw_gb_s,
        "gpu_max_power": gpu.max_power_w,
        "gpu_max_temp": 90.0,
        "gpu_display_active": False,
        "compute_cap": gpu.compute_cap,
        "total_flops": gpu.tflops * n,
        "bw_nvlink": 0.0,
        "cuda_max_good": machine.cuda_max_good,
        "driver_version": machine.driver_version,
        "driver_vers": int("".join(part.zfill(3) for part in machine.driver_version.split("."))),
        "cpu_name": "AMD EPYC 7543 32-Core Processor",
        "cpu_arch": "amd64",
        "cpu_cores": 16 * machine.slots,
        "cpu_cores_effective": 16.0,
        "cpu_ghz": 3.7,
        "cpu_ram": 64_000 * machine.slots,
        "has_avx": 1,
        "mobo_name": "ROME2D32GM-2T",
        "os_version": "22.04",
        "ubuntu_version": "22.04",
        "pci_gen": 4.0,
        "pcie_bw": 22.6,
        "disk_bw": 3_200.0,
        "disk_name": "nvme",
        "inet_up": machine.inet_up,
        "inet_down": machine.inet_down,
        "inet_up_cost": machine.inet_usd_gb,
        "inet_down_cost": machine.inet_usd_gb,
        "internet_up_cost_per_tb": machine.inet_usd_gb * 1_000.0,
        "internet_down_cost_per_tb": machine.inet_usd_gb * 1_000.0,
        "direct_port_count": machine.direct_port_count,
        "storage_cost": machine.storage_usd_gb_month,
        "reliability": machine.reliability,
        "reliability2": machine.reliability,
        "verification": machine.verification,
        "vericode": 1 if machine.verification == "verified" else 0,
        "external": False,
        "static_ip": True,
        "geolocation": machine.geolocation,
        "country_code": machine.geolocation.rpartition(", ")[2],
        "hosting_type": 1,
        "datacenter": True,
        "cluster_id": None,
        "public_ipaddr": "127.0.0.1",
        "vms_enabled": False,
        "resource_type": "gpu",
    }


def prices(machine: Machine, gpu_usd_h: float, disk_gb: float, *, is_bid: bool) -> dict[str, Any]:
    """The price fields of an offer or instance; disk_gb is what is or would be allocated."""
    disk_usd_h = machine.storage_usd_h(disk_gb)
    total = gpu_usd_h + disk_usd_h
    dlperf = machine.gpu.dlperf * machine.num_gpus
    return {
        "dph_base": gpu_usd_h,
        "dph_total": total,
        "storage_total_cost": disk_usd_h,
        "is_bid": is_bid,
        "dlperf": dlperf,
        "dlperf_per_dphtotal": dlperf / total,
        "flops_per_dphtotal": machine.gpu.tflops * machine.num_gpus / total,
        "score": 10.0 * machine.reliability * dlperf / total,
        "vram_costperhour": gpu_usd_h / (machine.gpu.ram_mb * machine.num_gpus),
        "search": cost_now(gpu_usd_h, disk_usd_h),
    }


def cost_now(gpu_usd_h: float, disk_usd_h: float) -> dict[str, float]:
    """The sub-object `search` (price when running) or `instance` (price now) of a row; vast-contract 2.13."""
    return {
        "gpuCostPerHour": gpu_usd_h,
        "diskHour": disk_usd_h,
        "totalHour": gpu_usd_h + disk_usd_h,
        "discountTotalHour": 0.0,
        "discountedTotalPerHour": gpu_usd_h + disk_usd_h,
    }


def min_bid(slot: Slot) -> float:
    """The least $/h for which an interruptible rental gets that slot now."""
    floor = MIN_BID_SHARE * slot.machine.usd_h
    return floor if slot.holder_bid is None else max(floor, slot.holder_bid + 0.001)


def offer(slot: Slot, disk_gb: float, now: float, *, bid: bool) -> dict[str, Any]:
    """The slot as an offer, priced with so much disk."""
    machine = slot.machine
    gpu_usd_h = min_bid(slot) if bid else machine.usd_h
    priced = prices(machine, gpu_usd_h, disk_gb, is_bid=bid)
    offer_id = machine.offer_id(slot.index)
    return (
        hardware(machine)
        | priced
        | {
            "id": offer_id,
            "ask_contract_id": offer_id,
            "gpu_total_ram": machine.gpu.ram_mb * machine.num_gpus,
            "disk_space": slot.free_disk_gb,
            "min_bid": min_bid(slot),
            # An interruptible rental gives way to one on demand, so its slot is still for rent.
            "rentable": not slot.rented,
            "rented": slot.rented,
            "duration": machine.rental_days * DAY_S,
            "start_date": now,
            "end_date": now + machine.rental_days * DAY_S,
            "instance": priced["search"],
        }
    )


# --- the query language ----------------------------------------------------------------------------

_OFFER_FIELDS = (
    "bw_nvlink compute_cap cpu_arch cpu_cores cpu_cores_effective cpu_ghz cpu_ram cuda_max_good datacenter "
    "direct_port_count driver_version disk_bw disk_space dlperf dlperf_per_dphtotal dph_total dph_base "
    "duration external flops_per_dphtotal gpu_arch gpu_display_active gpu_frac gpu_mem_bw gpu_name gpu_ram "
    "gpu_total_ram gpu_max_power gpu_max_temp has_avx host_id id inet_down inet_down_cost inet_up "
    "inet_up_cost machine_id min_bid mobo_name num_gpus pci_gen pcie_bw reliability reliability2 rentable "
    "rented storage_cost static_ip total_flops ubuntu_version verification verified vms_enabled geolocation "
    "cluster_id"
)
OFFER_FIELDS = frozenset(_OFFER_FIELDS.split())
"""What an offer may be searched by (vast-contract 2.1)."""

OPERATORS = ("eq", "neq", "gt", "gte", "lt", "lte", "in", "notin")


class BadQuery(ValueError):
    """A query that means nothing; the text says why."""


def matches(row: Mapping[str, Any], filters: Mapping[str, Any]) -> bool:
    """Whether the row passes all filters: {"field": {"operator": operand}}.

    Operands travel as text, so each is read as what the row has there: "1" is a number beside a number.
    Raises BadQuery for an unknown operator or an operand that cannot be read so.
    """
    return all(_passes(_value(row, name), name, wanted) for name, wanted in filters.items())


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name == "verified":
        return row["verification"] == "verified"
    # The CLI turns 535.86.05 into 535086005, which offers carry under another name.
    return row.get("driver_vers" if name == "driver_version" else name)


def _passes(value: Any, name: str, wanted: object) -> bool:
    if not isinstance(wanted, Mapping):
        raise BadQuery(f"{name}: wanted an object of operators, got {wanted!r:.60}")
    return all(_holds(value, name, operator, operand) for operator, operand in wanted.items())


def _holds(value: Any, name: str, operator: str, operand: object) -> bool:
    if operator not in OPERATORS:
        raise BadQuery(f"{name}: unknown operator {operator!r}; known: {' '.join(OPERATORS)}")
    if operator in ("in", "notin"):
        if not isinstance(operand, Sequence) or isinstance(operand, str):
            raise BadQuery(f"{name}: {operator} wants a list, got {operand!r:.60}")
        found = any(_equal(value, name, each) for each in operand)
        return found if operator == "in" else not found
    if operator in ("eq", "neq"):
        return _equal(value, name, operand) == (operator == "eq")
    if value is None:
        return False
    ours, theirs = _comparable(value, name, operand)
    if operator in ("gt", "gte") and ours > theirs:
        return True
    if operator in ("lt", "lte") and ours < theirs:
        return True
    return operator in ("gte", "lte") and bool(ours == theirs)


def _equal(value: Any, name: str, operand: object) -> bool:
    if value is None or operand is None:
        return value is operand
    if name == "geolocation" and operand == value.rpartition(", ")[2]:
        return True  # a country code stands for all that lies there
    ours, theirs = _comparable(value, name, operand)
    return bool(ours == theirs)


def _comparable(value: Any, name: str, operand: object) -> tuple[Any, Any]:
    """Both as the kind of thing that the row has; raises BadQuery."""
    if isinstance(value, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        read = words.get(str(operand).lower())
        if read is None:
            raise BadQuery(f"{name}: wanted true or false, got {operand!r:.60}")
        return value, read
    if isinstance(value, int | float):
        try:
            number = float(operand)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise BadQuery(f"{name}: wanted a number, got {operand!r:.60}") from None
        if math.isnan(number):
            raise BadQuery(f"{name}: not a number")
        return value, number
    return str(value), str(operand)


@dataclass(frozen=True)
class Query:
    """A search for offers, read from the body that the CLI sends."""

    filters: Mapping[str, Any]
    order: tuple[tuple[str, bool], ...] = (("score", True),)
    limit: int = OFFER_LIMIT
    bid: bool = False
    disk_gb: float = 5.0

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Query":
        """The query of a body as vast-contract 2.1 shows it; raises BadQuery naming what is wrong."""
        body = dict(body)
        kind = body.pop("type", "on-demand")
        if kind not in ("on-demand", "ondemand", "reserved", "bid", "interruptible"):
            raise BadQuery(f"type: wanted on-demand, reserved or bid, got {kind!r:.60}")
        limit = _whole(body.pop("limit", None), "limit", OFFER_LIMIT)
        disk_gb = body.pop("allocated_storage", 5.0)
        if isinstance(disk_gb, bool) or not isinstance(disk_gb, int | float) or not 0 <= disk_gb <= 10**6:
            raise BadQuery(f"allocated_storage: wanted 0 to 1000000, got {disk_gb!r:.60}")
        order = order_of(body.pop("order", [["score", "desc"]]))
        body.pop("disable_bundling", None)
        for name in body:
            if name not in OFFER_FIELDS:
                raise BadQuery(f"unknown field {name!r:.60}")
        return cls(body, order, limit, kind in ("bid", "interruptible"), float(disk_gb))

    def answer(self, slots: Iterable[Slot], now: float) -> list[dict[str, Any]]:
        """The offers that match, in order. A machine without the disk asked for is no offer."""
        rows = [
            offer(slot, self.disk_gb, now, bid=self.bid)
            for slot in slots
            if slot.free_disk_gb >= self.disk_gb
        ]
        found = [row for row in rows if matches(row, self.filters)]
        return in_order(found, self.order)[: self.limit]


def order_of(said: object) -> tuple[tuple[str, bool], ...]:
    """[["name", "asc"|"desc"], …] as (name, descending); raises BadQuery."""
    if not isinstance(said, list):
        raise BadQuery(f"order: wanted a list, got {said!r:.60}")
    order = []
    for each in said:
        if not (isinstance(each, list) and len(each) == 2 and isinstance(each[0], str)):
            raise BadQuery(f"order: wanted [name, asc or desc], got {each!r:.60}")
        if each[1] not in ("asc", "desc"):
            raise BadQuery(f"order: wanted asc or desc, got {each[1]!r:.60}")
        order.append((each[0], each[1] == "desc"))
    return tuple(order)


def in_order(rows: list[dict[str, Any]], order: Iterable[tuple[str, bool]]) -> list[dict[str, Any]]:
    """The rows sorted; what has no value comes first when ascending, equal rows stay by id."""
    rows = sorted(rows, key=lambda row: int(row["id"]))
    for name, descending in reversed(tuple(order)):
        rows.sort(key=lambda row: sort_key(row.get(name)), reverse=descending)
    return rows


def sort_key(value: Any) -> tuple[int, Any]:
    """A key under which nothing, numbers and texts can be sorted together."""
    if value is None:
        return 0, 0
    if isinstance(value, int | float):
        return 1, value
    return 2, str(value)


def _whole(value: object, name: str, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadQuery(f"{name}: wanted a whole number of 1 or more, got {value!r:.60}")
    return value
