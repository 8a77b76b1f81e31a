"""How rentals are shown: the rows of the service's listing, and the status for people."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from localcloud.cloud import Cloud
from localcloud.faults import Faults
from localcloud.offers import MIN_BID_SHARE, cost_now, hardware, prices
from localcloud.phases import SHOWN, Phase
from localcloud.rental import Rental

ALWAYS: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("template_id", "template_hash_id", "template_name")),
        **dict.fromkeys(("gpu_util", "gpu_temp", "cpu_util", "mem_limit", "mem_usage", "vmem_usage")),
        **dict.fromkeys(("webpage", "logo", "jupyter_token")),
        **dict.fromkeys(("credit_balance", "credit_discount", "credit_discount_max")),
        "ssh_host": "127.0.0.1",
        "ssh_idx": "1",
        "local_ipaddrs": "127.0.0.1\n",
        "direct_port_start": -1,
        "direct_port_end": -1,
        "disk_usage": -1,
        "disk_util": -1,
        "time_remaining": "",
        "time_remaining_isbid": "",
        "rentable": False,
    }
)
"""The fields of a row that are equal for every rental here; mostly what only a real host could measure."""


def row(r: Rental, faults: Faults, now: float) -> dict[str, Any]:
    """Return a rental as a row of the service's listing (vast-contract 2.11)."""
    shown = SHOWN[r.phase]
    machine, order, running = r.machine, r.order, r.phase is Phase.RUNNING
    ports = r.ports if running and faults.strikes("no-ports", now, r.on_boot) is None else {}
    end = r.contract.end_at
    return {
        **hardware(machine),
        **prices(machine, r.bill.gpu_usd_h, order.disk_gb, is_bid=r.bill.bid is not None),
        **ALWAYS,
        "id": r.id,
        "actual_status": "offline" if r.offline else shown.actual_status,
        "intended_status": _intended(r, faults, now),
        "cur_state": shown.cur_state,
        "next_state": "running" if r.wanted else "stopped",
        "status_msg": status_msg(r, now),
        "label": r.label,
        "image_uuid": order.image,
        "image_args": list(order.args),
        "image_runtype": order.runtype,
        "extra_env": [[name, value] for name, value in order.env.items()],
        "onstart": order.onstart,
        "ssh_port": r.ports.get("22/tcp"),
        "machine_dir_ssh_port": r.ports.get("22/tcp"),
        "ports": {
            inside: [{"HostIp": "0.0.0.0", "HostPort": str(outside)}]  # noqa: S104 a name in the format
            for inside, outside in ports.items()
        },
        "gpu_totalram": machine.gpu.ram_mb * machine.num_gpus,
        "disk_space": order.disk_gb,
        "min_bid": MIN_BID_SHARE * machine.usd_h,
        "start_date": r.created_at,
        "end_date": end,
        "duration": end - now,
        "uptime_mins": (now - r.booted_at) / 60.0 if running else None,
        "client_run_time": (now - r.created_at) / 3600.0,
        "host_run_time": (now - r.created_at) / 3600.0,
        "instance": cost_now(*r.usd_h_now()),
        "volume_info": [],
    }


def status_msg(r: Rental, now: float) -> str | None:
    """Return what the service says in status_msg of a rental.

    While the image is pulled it is docker's progress, below 100 % if a fault delays it.
    """
    if r.phase is not Phase.LOADING or r.pulled:
        return r.status_msg
    share = 1.0 if r.due is None else (now - r.since) / max(r.due - r.since, 1e-9)
    return f"{r.order.image}: Downloading {min(99, max(0, int(100 * share)))}%"


def _intended(r: Rental, faults: Faults, now: float) -> str:
    if r.phase is Phase.LOADING and faults.strikes("host-gives-up", now, r.on_boot) is not None:
        return "stopped"
    return "running" if r.phase is Phase.STOPPING and r.wanted else SHOWN[r.phase].intended_status


def status(cloud: Cloud, now: float) -> dict[str, Any]:
    """Return the cloud's status for people: rentals with their dollars by state, money, faults.

    It has no start script and no key.
    """
    cloud.advance(now)
    return {
        "credit_usd": cloud.account.credit_usd(now),
        "burn_usd_h": cloud.burn_usd_h(),
        "spent_usd": cloud.account.spent_usd(),
        "destroyed": cloud.destroyed,
        "faults": cloud.faults.shown(now),
        "instances": [_brief(r, now) for r in cloud.rentals.values()],
    }


def _brief(r: Rental, now: float) -> dict[str, Any]:
    shown = SHOWN[r.phase]
    gpus = f"{r.machine.num_gpus}x " if r.machine.num_gpus > 1 else ""
    return {
        "id": r.id,
        "label": r.label,
        "machine_id": r.machine.machine_id,
        "gpu": f"{gpus}{r.machine.gpu_name}",
        "state": "offline" if r.offline else str(r.phase),
        "since": r.since,
        "actual_status": "offline" if r.offline else shown.actual_status,
        "intended_status": shown.intended_status,
        "status_msg": status_msg(r, now),
        "boot": r.boot,
        "model_on_disk": r.loaded,
        "ports": dict(r.ports) if r.phase is Phase.RUNNING else {},
        "usd_h_now": sum(r.usd_h_now()),
        "usd": {**r.bill.usd, "total": sum(r.bill.usd.values()), "gpu": r.bill.gpu_usd},
    }
