"""The big market: some hundred machines of 17 kinds, drawn once and always alike.

What a kind costs is between the ends that docs/reference/timing.md 4 cites, where it has any; the others are
set between their neighbours by memory and bandwidth. The shares of old drivers, dear bandwidth, short
contracts and so on are assumptions: enough of each that a search without a filter for it finds some.
"""

import random
from dataclasses import dataclass
from typing import Any

from localcloud.machines import Machine


@dataclass(frozen=True)
class GpuKind:
    """How many machines of a kind of GPU there are, and $/h of one GPU, from the cheapest to the dearest.

    gpus: how many a machine may have. datacenter: share of machines in data centres. modern: there is no old
    driver for it. cpu_arch: of its machines.
    """

    machines: int
    cheapest: float
    dearest: float
    gpus: tuple[int, ...] = (1, 2, 4, 8)
    datacenter: float = 0.3
    modern: bool = False
    cpu_arch: str = "amd64"


_KINDS: dict[str, GpuKind] = {
    "RTX 3060": GpuKind(6, 0.05, 0.11),
    "RTX 3090": GpuKind(16, 0.13, 0.30),
    "RTX 4090": GpuKind(22, 0.29, 0.88),
    "RTX 5090": GpuKind(10, 0.38, 0.95, modern=True),
    "RTX A5000": GpuKind(5, 0.16, 0.30),
    "RTX A6000": GpuKind(10, 0.40, 0.62, datacenter=0.6),
    "RTX 6000Ada": GpuKind(5, 0.60, 0.95, datacenter=0.6),
    "RTX PRO 6000 WS": GpuKind(5, 0.90, 1.40, datacenter=0.6, modern=True),
    "Tesla V100": GpuKind(4, 0.12, 0.28, (4, 8), 0.8),
    "A40": GpuKind(4, 0.33, 0.52, (2, 4, 8), 0.9),
    "L40S": GpuKind(6, 0.53, 0.95, (4, 8), 0.9),
    "A100 PCIE": GpuKind(7, 0.58, 0.95, (2, 4, 8), 0.9),
    "A100 SXM4": GpuKind(8, 0.78, 1.21, (4, 8), 1.0),
    "H100 SXM": GpuKind(7, 1.85, 2.53, (8,), 1.0),
    "H100 NVL": GpuKind(4, 1.80, 2.50, (2, 4, 8), 1.0),
    "GH200 SXM": GpuKind(4, 0.95, 1.60, (1,), 1.0, cpu_arch="arm64"),
    "H200": GpuKind(4, 2.40, 3.60, (8,), 1.0, modern=True),
}
_ARM_4090S = 3
"""Machines with cards that everybody wants and a processor that no usual image runs on."""

FLAW_PRICE = 0.8
"""What each flaw leaves of a machine's price: the cheapest offers are those that others know to leave."""

PLACES = (
    *("Sweden, SE", "Norway, NO", "Germany, DE", "Germany, DE", "France, FR", "Netherlands, NL"),
    *("Poland, PL", "Czechia, CZ", "Bulgaria, BG", "Spain, ES", "United Kingdom, GB", "Iceland, IS"),
    *("Finland, FI", "Texas, US", "California, US", "Ohio, US", "Virginia, US", "Washington, US"),
    *("Utah, US", "Quebec, CA", "British Columbia, CA", "Vietnam, VN", "Taiwan, TW", "Japan, JP"),
    *("South Korea, KR", "Thailand, TH", "China, CN", "Hong Kong, HK", "Australia, AU", "Brazil, BR"),
    "South Africa, ZA",
)

_DRIVERS = (  # CUDA version and driver: NVIDIA's release notes pair them
    *((13.0, "580.65.06", 30), (12.8, "570.86.15", 35), (12.6, "560.35.03", 10)),
    *((12.4, "550.54.15", 15), (12.2, "535.54.03", 10)),
)
_INET_USD_GB = ((0.0, 15), (0.002, 30), (0.003, 20), (0.006, 15), (0.01, 10), (0.02, 10))


def big_market(seed: int = 17) -> tuple[Machine, ...]:
    """Return the machines of the big market; the same for the same seed."""
    rng = random.Random(seed)
    made: list[Machine] = []
    for name, kind in _KINDS.items():
        host = 0
        for at in range(kind.machines):
            # A host has one machine or a few of a kind.
            if not host or rng.random() < 0.6:
                host = 20_000 + 100 * len(made) + at
            made.append(_machine(30_001 + len(made), name, kind, host, rng))
    arm = GpuKind(_ARM_4090S, 0.24, 0.30, (1, 2), 1.0, modern=True, cpu_arch="arm64")
    for at in range(_ARM_4090S):
        made.append(_machine(30_001 + len(made), "RTX 4090", arm, 19_000 + at, rng))
    return tuple(made)


def _machine(machine_id: int, name: str, kind: GpuKind, host_id: int, rng: random.Random) -> Machine:
    professional = rng.random() < kind.datacenter
    cuda, driver = _one_of(_DRIVERS[:2] if kind.modern else _DRIVERS, rng)
    gpus = rng.choice(kind.gpus)
    inet_down = rng.uniform(900.0, 9_000.0) if professional else rng.choice((60, 120, 240, 400, 700, 900))
    reliability = rng.uniform(0.985, 0.9995) if rng.random() < 0.85 else rng.uniform(0.9, 0.985)
    days = rng.uniform(0.3, 4.0) if rng.random() < 0.15 else rng.uniform(7.0, 120.0)
    flaws = (cuda < 12.8) + (reliability < 0.985) + (days < 7.0) + (kind.cpu_arch != "amd64")
    return Machine(
        machine_id,
        name,
        round(rng.uniform(kind.cheapest, kind.dearest) * FLAW_PRICE**flaws, 3),
        slots=gpus,
        sliced=True,
        host_id=host_id,
        disk_gb=float(rng.choice((400, 1_000, 2_000, 4_000)) * max(1, gpus // 2)),
        storage_usd_gb_month=rng.choice((0.1, 0.15, 0.15, 0.2, 0.3)),
        inet_down=round(inet_down * rng.uniform(0.9, 1.1), 1),
        inet_up=round(inet_down * rng.uniform(0.3, 0.9), 1),
        inet_usd_gb=_one_of(_INET_USD_GB, rng)[0],
        reliability=round(reliability, 4),
        cuda_max_good=cuda,
        driver_version=driver,
        direct_port_count=rng.choice((2, 20, 50, 100, 200)) if not professional else 200,
        geolocation=rng.choice(PLACES),
        verification="verified" if professional or rng.random() < 0.75 else "unverified",
        rental_days=round(days, 2),
        cpu_arch=kind.cpu_arch,
        datacenter=professional,
        static_ip=professional or rng.random() < 0.5,
    )


def _one_of(rows: tuple[tuple[Any, ...], ...], rng: random.Random) -> tuple[Any, ...]:
    """Return one of the rows, whose last value is its weight, without the weight."""
    (found,) = rng.choices(rows, [row[-1] for row in rows])
    return tuple(found[:-1])
