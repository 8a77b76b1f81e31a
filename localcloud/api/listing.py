"""Routes that list the rentals: all of them page by page, and a single one (vast-contract 2.3)."""

import base64
import binascii
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, jsonify, request

from localcloud import rows
from localcloud.api import bodies
from localcloud.api.calls import Later, api, hang, refuse, too_many
from localcloud.cloud import Cloud
from localcloud.orders import CloudRefusal
from localcloud.query import BadQuery, in_order, matches

PAGE_ROWS = 25
"""The most rows that one page of the listing holds (vast-contract 2.3)."""

COMPUTED = frozenset({"dph_total", "num_gpus"})
"""Columns that the listing cannot be filtered by (vast-contract 2.3)."""

routes = Blueprint("listing", __name__, url_prefix="/api")


@routes.get("/v0/instances/")
@api("list")
def old_list(cloud: Cloud, now: float) -> tuple[Response, int]:  # noqa: ARG001
    return refuse(
        410,
        "deprecated_endpoint",
        "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead.",
    )


@routes.get("/v1/instances/")
@api("list", every_s=1.0)
def instances(cloud: Cloud, now: float) -> Any:
    if cloud.faults.strikes("list-hangs", now) is not None:
        return Later(hang)
    if cloud.faults.strikes("list-429", now) is not None:
        return too_many()
    if cloud.faults.strikes("list-500", now) is not None:
        return refuse(500, "internal_error", "the local cloud was told to fail")
    if cloud.faults.strikes("list-empty", now) is not None:
        return jsonify({})
    found = sorted(_rows(cloud, now), key=lambda row: int(row["id"]))
    total = len(found)
    odd = cloud.faults.strikes("list-odd", now)
    if odd is not None and found:
        found[0][str(odd["column"])] = _value(str(odd["value"]))
    missing = cloud.faults.strikes("list-missing", now)
    if missing is not None:
        kept = round(len(found) * (1.0 - float(missing["share"])))
        found = cloud.sample(found, kept) if missing["which"] == "random" else found[:kept]
        total = total if missing["total"] == "full" else len(found)
    return jsonify(_page(found, total, request.args))


@routes.get("/v0/instances/filters/")
@api("list")
def filters(cloud: Cloud, now: float) -> Response:
    names = ("actual_status", "verification", "gpu_name")
    return jsonify(filters=[{k: row[k] for k in names} for row in _rows(cloud, now)])


@routes.get("/v0/instances/<id:instance_id>/")
@api("show", every_s=2.0)
def show(cloud: Cloud, now: float, instance_id: int) -> Response:
    cloud.advance(now)
    found = cloud.rentals.get(instance_id)
    return jsonify(instances=None if found is None else rows.row(found, cloud.faults, now))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rows(cloud: Cloud, now: float) -> list[dict[str, Any]]:
    cloud.advance(now)
    return [rows.row(r, cloud.faults, now) for r in cloud.rentals.values()]


def json_argument(args: Mapping[str, str], name: str, default: Any) -> Any:
    """Return an argument of the query string, which is JSON, or the default; raise BadQuery."""
    try:
        return json.loads(args[name]) if name in args else default
    except (ValueError, RecursionError):
        raise BadQuery(f"{name}: wanted JSON") from None


def _page(rows: list[dict[str, Any]], total: int, args: Mapping[str, str]) -> dict[str, Any]:
    """Return one page of the listing as the service shows it (vast-contract 2.3). args: the query string."""

    filters = json_argument(args, "select_filters", {})
    if not isinstance(filters, dict):
        raise BadQuery("select_filters: wanted an object")
    for name in COMPUTED & filters.keys():
        raise BadQuery(f"select_filters: {name} is computed and cannot be filtered by")
    found = [row for row in rows if matches({**row, "label": row["label"] or ""}, filters)]
    order = json_argument(args, "order_by", [])
    if not isinstance(order, list) or not all(isinstance(o, dict) and "col" in o for o in order):
        raise BadQuery("order_by: wanted a list of {col, dir}")
    columns = json_argument(args, "select_cols", ["*"])
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise BadQuery("select_cols: wanted a list of names")
    ordered = [(str(o["col"]), o.get("dir") == "desc") for o in order]
    found = in_order(found, ordered)
    limit = bodies.number(args.get("limit"), PAGE_ROWS)
    most = 5 if limit <= 0 else min(limit, PAGE_ROWS)
    begin = _after(found, ordered, args.get("after_token"))
    page = found[begin : begin + most]
    token = None
    if begin + most < len(found):
        last = {name: page[-1].get(name) for name in ("id", *(name for name, _ in ordered))}
        token = base64.b64encode(json.dumps({"values": last}).encode()).decode()
    if columns and "*" not in columns:
        page = [{k: v for k, v in row.items() if k in {"id", *columns}} for row in page]
    return {
        "success": True,
        "instances_found": len(found),
        "total_instances": total,
        "label_counts": Counter(str(row["label"] or "") for row in rows),
        "next_token": token,
        "instances": page,
    }


def _after(rows: list[dict[str, Any]], order: list[tuple[str, bool]], token: str | None) -> int:
    """Return the index of the first row of a page, which follows the row that the page token holds.

    If that row has gone, it is the row that stands behind its place in the order.
    """
    if not token:
        return 0
    try:
        last = json.loads(base64.b64decode(token, validate=True))["values"]
        # Equal rows stay as they are, so it comes right behind itself.
        return next(at for at, row in enumerate(in_order([*rows, last], order)) if row is last)
    except (binascii.Error, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise CloudRefusal(400, "invalid_token", "after_token is not one of ours") from None
