"""Routes of what the account is charged, and of the prices that hosts ask for going on.

Shapes: the vendor's page "show charges" and its OpenAPI file of GET /api/v0/charges/ (2026-10), the items
gpu, disk, bwd and bwu as reported by users; the module price_increase of the vastai package 1.9.1.
"""

import base64
from typing import Any

from flask import Blueprint, Response, jsonify, request

from localcloud.api import bodies
from localcloud.api.calls import api
from localcloud.api.listing import json_argument
from localcloud.charges import RentalCharges
from localcloud.cloud import Cloud
from localcloud.machines import DAY_S
from localcloud.orders import CloudRefusal
from localcloud.rental import Rental

routes = Blueprint("billing", __name__)

MOST_ROWS = 500
"""Most charges on one page."""

NO_DAYS = "Must provide both 'day' gte and lte filters for instance charges"

SAID = {"gpu": "hours at ${:.3f}/hour", "disk": "hours at ${:.5f}/hour", "bwd": "GB at ${:.4f}/GB"}


@routes.get("/api/v0/charges/")
@api("account", every_s=1.0)
def charges(cloud: Cloud, now: float) -> Response:
    cloud.advance(now)
    filters, limit, after = _asked()
    from_s, to_s = filters
    rows = [row for one in cloud.account.charges.values() if (row := _row(one, from_s, to_s)) is not None]
    page = [row for number, row in rows if number > after][:limit]
    last = int(page[-1]["source"].rpartition("-")[2]) if page else 0
    more = bool(page) and last != rows[-1][0]
    return jsonify(
        success=True,
        count=len(page),
        total=len(rows),
        next_token=base64.b64encode(str(last).encode()).decode() if more else None,
        results=page,
    )


def _asked() -> tuple[tuple[float, float], int, int]:
    """Return ((from, to), rows of a page, number after which the page begins) of the present request."""
    day = json_argument(request.args, "select_filters", {})
    try:
        from_s, to_s = float(day["day"]["gte"]), float(day["day"]["lte"])
    except (ValueError, KeyError, TypeError):
        raise CloudRefusal(400, "invalid_request", NO_DAYS) from None
    limit = max(1, min(MOST_ROWS, bodies.number(request.args.get("limit"), 100)))
    token = request.args.get("after_token")
    try:
        after = 0 if token is None else int(base64.b64decode(token).decode())
    except ValueError:
        raise CloudRefusal(400, "invalid_token", "after_token is not one of ours") from None
    return (from_s, to_s), limit, after


def _row(one: RentalCharges, from_s: float, to_s: float) -> tuple[int, dict[str, Any]] | None:
    days, sums = one.within(from_s, to_s)
    if not days:
        return None
    start, end = days[0] * DAY_S, days[-1] * DAY_S
    items: list[dict[str, Any]] = [
        {
            "start": start,
            "end": end,
            "type": kind,
            "source": None,
            "description": _said(kind, charge.usd, charge.amount),
            "amount": round(charge.usd, 9),
            "metadata": {},
            "items": [],
        }
        for kind, charge in sums.items()
    ]
    return one.number, {
        "start": start,
        "end": end,
        "type": "instance",
        "source": f"instance-{one.number}",
        "description": f"Instance {one.number} Charges - {len(days)} days",
        "amount": round(sum(c.usd for c in sums.values()), 9),
        "metadata": {"template_id": None, "label": one.label, "endpoint_id": None, "workergroup_id": None},
        "items": items,
    }


def _said(kind: str, usd: float, amount: float) -> str:
    rate = usd / amount if amount else 0.0
    return f"{amount:.3f} {SAID.get(kind, SAID['bwd']).format(rate)}"


@routes.get("/api/v0/instances/pending-price-increases/")
@api("account", every_s=2.0)
def pending(cloud: Cloud, now: float) -> Response:
    cloud.advance(now)
    rows = [row for r in cloud.rentals.values() if (row := _increase(r)) is not None]
    return jsonify(success=True, count=len(rows), truncated=False, pending_price_increases=rows)


def _increase(r: Rental) -> dict[str, Any] | None:
    asked = r.contract.pending
    if asked is None:
        return None
    old = {"disk_ram_costpersec": r.bill.storage_usd_h / 3600.0, "bwu_cost": r.machine.inet_usd_gb}
    kept = {f"{age}_{name}": value for age in ("old", "new") for name, value in old.items()}
    return kept | {
        "pending_price_increase_id": asked.number,
        "contract_id": r.id,
        "host_id": r.machine.host_id,
        "old_gpu_costpersec": asked.old_gpu_usd_h / 3600.0,
        "new_gpu_costpersec": asked.gpu_usd_h / 3600.0,
        "old_bwd_cost": r.machine.inet_usd_gb,
        "new_bwd_cost": r.machine.inet_usd_gb,
        "old_platform_fee": None,
        "new_platform_fee": None,
        "contract_end_date": r.contract.end_at,
        "ask_end_date": asked.new_end_at,
        "created_at": asked.asked_at,
    }


@routes.put("/api/v0/instances/accept-price-increase/")
@api("change", every_s=1.0)
def accept(cloud: Cloud, now: float) -> Response:
    return _answered(cloud, now, accept=True)


@routes.put("/api/v0/instances/reject-price-increase/")
@api("change", every_s=1.0)
def reject(cloud: Cloud, now: float) -> Response:
    return _answered(cloud, now, accept=False)


def _answered(cloud: Cloud, now: float, *, accept: bool) -> Response:
    said = bodies.body()
    number = said.get("pending_price_increase_id")
    if set(said) != {"pending_price_increase_id"} or type(number) is not int:
        raise bodies.bad("wanted pending_price_increase_id and nothing else")
    cloud.advance(now)
    for r in cloud.rentals.values():
        if r.contract.pending is not None and r.contract.pending.number == number:
            r.contract.answer(accept=accept)
            return jsonify(success=True, pending_price_increase_id=number, contract_id=r.id)
    raise CloudRefusal(404, "no_pending_price_increase", "no such price increase is pending")
