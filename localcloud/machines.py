"""The machines for rent: GPUs, disk, network and prices; a built-in market, and one read from a file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
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
    """A machine for rent: `slots` offers of `num_gpus` GPUs each. inet in Mbit/s, disk_gb of all slots."""

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
        """Raise ConfigError naming the machine, the field and its range when a value is out of range."""
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
        """The data of the machine's GPU model."""
        return GPUS[self.gpu_name]

    @property
    def usd_h(self) -> float:
        """The price of all GPUs of one slot of the machine, $/h on demand."""
        return self.num_gpus * self.usd_gpu_h

    def offer_id(self, slot: int) -> int:
        """Return the number of the offer by which that slot of the machine is rented."""
        return self.machine_id * 100 + slot

    def storage_usd_h(self, gb: float) -> float:
        """Return the price of that many GB of the machine's disk, $/h."""
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
