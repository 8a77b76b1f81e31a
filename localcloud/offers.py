"""Offers: the slots of machines as the market shows them, with their prices.

A machine has slots of equal size, each one offer of `num_gpus` GPUs; if it is sliced, two, four, … of its
slots are an offer, too. A rental holds its slots while it runs and gives them up when it stops. Its disk
stays reserved on the machine until it is destroyed.

    price of an offer, $/h = num_gpus * usd_gpu_h + storage_gb_month * allocated GB / 720
"""

from dataclasses import dataclass
from typing import Any

from localcloud.machines import DAY_S, Machine

MIN_BID_SHARE = 0.5
"""Least bid as a share of the price on demand: interruptible is "50 %+ cheaper"
(docs/reference/timing.md 4)."""


_CPU_NAMES = {"amd64": "AMD EPYC 7543 32-Core Processor", "arm64": "Neoverse-V2"}


@dataclass(frozen=True)
class Slot:
    """What can be rented of a machine under one number, as the market sees it now: a slot, or several.

    machine: as that share of it is seen. rented: somebody on demand holds some of it. holder_bid: $/h of the
    interruptible rentals that hold some of it, None if there is none.
    """

    machine: Machine
    index: int
    free_disk_gb: float
    rented: bool = False
    holder_bid: float | None = None


def hardware(machine: Machine) -> dict[str, Any]:
    """Return the fields of a machine's hardware that offers and instances share and that never change."""
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
        "cpu_name": _CPU_NAMES[machine.cpu_arch],
        "cpu_arch": machine.cpu_arch,
        "cpu_cores": machine.cpu_cores,
        "cpu_cores_effective": machine.cpu_cores / machine.slots,
        "cpu_ghz": 3.7,
        "cpu_ram": 4_000 * machine.cpu_cores,
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
        "static_ip": machine.static_ip,
        "geolocation": machine.geolocation,
        "country_code": machine.geolocation.rpartition(", ")[2],
        "hosting_type": int(machine.datacenter),
        "datacenter": machine.datacenter,
        "cluster_id": None,
        "public_ipaddr": "127.0.0.1",
        "vms_enabled": False,
        "resource_type": "gpu",
    }


def prices(machine: Machine, gpu_usd_h: float, disk_gb: float, *, is_bid: bool) -> dict[str, Any]:
    """Return the price fields of an offer or instance. disk_gb: what is or would be allocated."""
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
    """Return the sub-object `search` (price when running) or `instance` (price now); vast-contract 2.13."""
    return {
        "gpuCostPerHour": gpu_usd_h,
        "diskHour": disk_usd_h,
        "totalHour": gpu_usd_h + disk_usd_h,
        "discountTotalHour": 0.0,
        "discountedTotalPerHour": gpu_usd_h + disk_usd_h,
    }


def min_bid(slot: Slot) -> float:
    """Return the least $/h for which an interruptible rental gets that slot now."""
    floor = MIN_BID_SHARE * slot.machine.usd_h
    return floor if slot.holder_bid is None else max(floor, slot.holder_bid + 0.001)


def offer(slot: Slot, disk_gb: float, now: float, *, bid: bool) -> dict[str, Any]:
    """Return a slot as an offer of the market, priced with disk_gb of disk.

    bid: at the least bid that wins the slot, else on demand.
    """
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
