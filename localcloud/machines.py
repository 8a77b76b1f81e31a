"""The machines for rent: GPUs, disk, network and prices; a built-in market, and one read from a file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from process.errors import ConfigError

HOURS_PER_MONTH = 720.0
"""Hours of a month in Vast's formula: storage_total_cost = storage_cost * disk_space / 720 (vast-contract
2.11)."""

DAY_S = 86_400.0
"""Seconds of a day."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model. ram_mb: as the driver reports it; tflops: at fp32; dlperf: roughly Vast's score."""

    ram_mb: int
    arch: str
    compute_cap: int
    tflops: float
    dlperf: float
    mem_bw_gb_s: float
    max_power_w: float


# Ram and capability as vast-contract 2.1 describes the fields, the rest from the makers' data sheets but for
# dlperf, which is the service's own score: as far as it was seen, else estimated from bandwidth and flops.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "RTX 3060": Gpu(12_288, "ampere", 860, 12.7, 16.0, 360.0, 170.0),
        "RTX 3090": Gpu(24_576, "ampere", 860, 35.6, 45.0, 936.0, 350.0),
        "RTX 4090": Gpu(24_564, "ada", 890, 82.6, 95.0, 1_008.0, 450.0),
        "RTX 5090": Gpu(32_607, "blackwell", 1200, 104.8, 190.0, 1_792.0, 575.0),
        "RTX A5000": Gpu(24_564, "ampere", 860, 27.8, 38.0, 768.0, 230.0),
        "RTX A6000": Gpu(49_140, "ampere", 860, 38.7, 50.0, 768.0, 300.0),
        "RTX 6000Ada": Gpu(49_140, "ada", 890, 91.1, 98.0, 960.0, 300.0),
        "RTX PRO 6000 WS": Gpu(97_887, "blackwell", 1200, 125.0, 210.0, 1_792.0, 600.0),
        "Tesla V100": Gpu(32_768, "volta", 700, 15.7, 30.0, 897.0, 300.0),
        "A40": Gpu(46_068, "ampere", 860, 37.4, 48.0, 696.0, 300.0),
        "L40S": Gpu(46_068, "ada", 890, 91.6, 100.0, 864.0, 350.0),
        "A100 PCIE": Gpu(81_920, "ampere", 800, 19.5, 110.0, 1_935.0, 300.0),
        "A100 SXM4": Gpu(81_920, "ampere", 800, 19.5, 120.0, 2_039.0, 400.0),
        "H100 SXM": Gpu(81_559, "hopper", 900, 66.9, 250.0, 3_350.0, 700.0),
        "H100 NVL": Gpu(95_830, "hopper", 900, 60.0, 240.0, 3_938.0, 400.0),
        "GH200 SXM": Gpu(97_871, "hopper", 900, 66.9, 250.0, 4_022.0, 700.0),
        "H200": Gpu(143_771, "hopper", 900, 66.9, 280.0, 4_800.0, 700.0),
    }
)


UNKNOWN_CAP, UNKNOWN_POWER_W = 890, 300.0
"""Compute capability (x 100) and power of a GPU that is not in GPUS: those of a card of 2023."""


@dataclass(frozen=True)
class Machine:
    """A machine for rent: `slots` offers of `num_gpus` GPUs each. inet in Mbit/s, disk_gb of all slots.

    gpu_ram_mb, gpu_tflops (at fp32) and gpu_mem_bw (GB/s) say what a GPU is that is not in GPUS.

    sliced: it is rented in any power of two of its slots, so each of its GPUs is part of several offers. With
    `share` slots it is seen as one such slice sees it.
    """

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
    cpu_arch: str = "amd64"
    datacenter: bool = True
    static_ip: bool = True
    sliced: bool = False
    gpu_ram_mb: int = 0
    gpu_tflops: float = 0.0
    gpu_mem_bw: float = 0.0

    def __post_init__(self) -> None:
        """Raise ConfigError naming the machine, the field and its range when a value is out of range."""
        if self.gpu_name not in GPUS and not (self.gpu_ram_mb and self.gpu_tflops and self.gpu_mem_bw):
            self._refuse("gpu_name", f"gpu_ram_mb, gpu_tflops and gpu_mem_bw, or one of {', '.join(GPUS)}")
        for name, least, most in _RANGES:
            if not least <= getattr(self, name) <= most:
                self._refuse(name, f"{least:g} to {most:g}")
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.driver_version):
            self._refuse("driver_version", "three numbers with dots")
        if self.cpu_arch not in ("amd64", "arm64"):
            self._refuse("cpu_arch", "amd64 or arm64")
        if self.sliced and self.slots not in (1, 2, 4, 8, 16, 32):
            self._refuse("slots", "1, 2, 4, 8, 16 or 32 where the machine is sliced")
        if self.verification not in ("verified", "unverified", "deverified"):
            self._refuse("verification", "verified, unverified or deverified")

    def _refuse(self, name: str, wanted: str) -> None:
        raise ConfigError(
            f"machine {self.machine_id}: {name}: wanted {wanted}, got {getattr(self, name)!r:.80}"
        )

    @property
    def gpu(self) -> Gpu:
        """The data of the machine's GPU model; of one that is not known, as far as the machine says it."""
        known = GPUS.get(self.gpu_name)
        if known is not None:
            return known
        ram_mb, tflops, gb_s = self.gpu_ram_mb, self.gpu_tflops, self.gpu_mem_bw
        return Gpu(ram_mb, "unknown", UNKNOWN_CAP, tflops, tflops, gb_s, UNKNOWN_POWER_W)

    @property
    def cpu_cores(self) -> int:
        """The processor cores of all slots; a slice has as many as its slots."""
        return 16 * self.slots * (self.num_gpus if self.sliced else 1)

    @property
    def usd_h(self) -> float:
        """The price of all GPUs of one slot of the machine, $/h on demand."""
        return self.num_gpus * self.usd_gpu_h

    def slices(self) -> "tuple[Slice, ...]":
        """Return what can be rented of the machine, by index: its slots; if sliced, powers of two of them."""
        sizes = [1]
        while self.sliced and sizes[-1] < self.slots:
            sizes.append(2 * sizes[-1])
        places = [(first, n) for n in sizes for first in range(0, self.slots, n)]
        return tuple(Slice(index, first, n) for index, (first, n) in enumerate(places))

    def share(self, slots: int) -> "Machine":
        """Return the machine as one rental of that many of its slots sees it."""
        if slots == 1:
            return self
        return replace(self, num_gpus=self.num_gpus * slots, slots=self.slots // slots)

    def offer_id(self, slot: int) -> int:
        """Return the number of the offer by which that slot of the machine is rented."""
        return self.machine_id * 100 + slot

    def storage_usd_h(self, gb: float) -> float:
        """Return the price of that many GB of the machine's disk, $/h."""
        return self.storage_usd_gb_month * gb / HOURS_PER_MONTH


@dataclass(frozen=True)
class Slice:
    """What one offer has of a machine: `count` of its slots from number `first` on. index: the offer's."""

    index: int
    first: int
    count: int

    @property
    def places(self) -> range:
        """The numbers of the slots that it takes."""
        return range(self.first, self.first + self.count)


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
    ("gpu_ram_mb", 0, 10**7),
    ("gpu_tflops", 0.0, 10**5),
    ("gpu_mem_bw", 0.0, 10**6),
)

# Prices per GPU-hour within the ranges of docs/reference/timing.md 4; L40S has none there and is an
# assumption, as are the storage prices (0.10 to 0.20 suggested there). 4103 and 4204 fail the filters of
# every profile (reliability, network), as part of every real search does.
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
    """Return the machines in parsed JSON, objects with Machine's fields; raise ConfigError for a bad one."""
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
            wanted = int | float if kind is float else kind
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, wanted):
                raise ConfigError(f"offers: entry {at}: {name}: wanted {kind.__name__}, got {value!r:.80}")
        missing = {"machine_id", "gpu_name", "usd_gpu_h"} - entry.keys()
        if missing:
            raise ConfigError(f"offers: entry {at}: missing {', '.join(sorted(missing))}")
        machines.append(Machine(**entry))
    ids = [m.machine_id for m in machines]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"offers: machine_id given twice: {sorted(i for i in ids if ids.count(i) > 1)[0]}")
    return tuple(machines)
