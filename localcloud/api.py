"""The HTTP face of the local cloud: the service's API as `vastai` 1.9.1 uses it, and a few routes of our own.

It holds no state: each view reads the request, asks the cloud under its lock, and answers in the service's
words (vast-contract 2). Faults of calls strike here, before the view or after it had its effect.
"""

import base64
import binascii
import functools
import hmac
import html
import json
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flask import Flask, Response, jsonify, request

from localcloud.account import Order, Refused
from localcloud.faults import FAULTS, BadFault, limits_of
from localcloud.market import GPUS, BadQuery, Query, in_order, matches
from localcloud.world import World
from web.answers import error
from web.app import make_app, requires
from web.bodies import BadField, Choice, body, json_body

log = logging.getLogger("localcloud")

PAGE_ROWS = 25
"""The most that one page of the listing holds (vast-contract 2.3)."""

HANG_S = 300.0
"""How long a call that is never answered is kept, unless its caller hangs up."""

HUNG_UP_CHECK_S = 0.25
"""A call that hangs looks so often whether its caller is still there."""

UPLOAD_S = 0.4
"""From asking for a log to its being there, on the wall clock: the host uploads it meanwhile."""

MIN_DISK_GB = 8.0
MAX_ONSTART = 16_384
MAX_LABEL = 256

# Seconds between two calls of an endpoint (vast-contract 1.3), by its view; the others have no limit.
THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {
        "instances": 1.0,
        "show": 2.0,
        "bundles": 6.0,
        "search_asks": 6.0,
        "create": 4.5,
        "put_instance": 1.0,
        "put_instances": 1.0,
        "destroy": 3.0,
        "destroy_many": 3.0,
        "bid_price": 5.5,
        "command": 1.5,
        "reboot": 1.0,
        "recycle": 1.0,
        "attach": 1.0,
        "add_ssh_key": 1.0,
    }
)
CREATE_PENALTY_S = 12.0
"""For a create too soon."""

COMPUTED = frozenset({"dph_total", "num_gpus"})
"""Columns that the listing cannot be filtered by (vast-contract 2.3)."""

View = Callable[..., Any]


@dataclass(frozen=True)
class Later:
    """An answer whose rest is made without the cloud's lock."""

    rest: Callable[[], Any]


class _Pace:
    """When each endpoint may be called again. Times are the caller's."""

    def __init__(self, speedup: float) -> None:
        self._speedup = speedup
        self._not_before: dict[str, float] = {}

    def too_soon(self, view: str, now: float) -> bool:
        threshold = THRESHOLDS.get(view)
        if threshold is None:
            return False
        early = now < self._not_before.get(view, 0.0)
        wait_s = CREATE_PENALTY_S if early and view == "create" else threshold
        self._not_before[view] = now + wait_s / self._speedup
        return early


def _no(status: int, error: str, msg: str, **also: Any) -> tuple[Response, int]:
    return jsonify({"success": False, "error": error, "msg": msg, **also}), status


def _too_many() -> Response:
    return Response("API requests too frequent", 429, mimetype="text/plain")


def create_app(world: World, api_key: str) -> Flask:
    """All routes. api_key: what an Authorization header must carry, but for the few that are open."""
    app = make_app("localcloud")
    # A page in somebody's browser can reach loopback under a name of its own (DNS rebinding).
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost", "[::1]"]
    pace = _Pace(world.cloud.speedup)
    cloud = world.cloud

    def knows_key() -> bool:
        header = request.headers.get("Authorization", "")
        return hmac.compare_digest(header.encode(), f"Bearer {api_key}".encode())

    def hang() -> tuple[Response, int]:
        hung_up = request.environ.get("waitress.client_disconnected", lambda: False)
        limit = time.monotonic() + HANG_S
        while not (world.stopping.wait(HUNG_UP_CHECK_S) or hung_up() or time.monotonic() > limit):
            pass
        return _no(504, "timeout", "the local cloud had this call hang")

    def broken(kind: str, when: str) -> Any | None:
        """The answer of a fault that strikes this call before or after its effect."""
        now = world.clock()
        with world.lock:
            stuck = cloud.faults.strikes_route("api-hangs", kind, when, now) is not None
            error = cloud.faults.strikes_route("api-error", kind, when, now)
        if stuck:
            return hang()
        return (
            None
            if error is None
            else _no(int(error["status"]), "injected", "an error by the fault api-error")
        )

    def api(kind: str) -> Callable[[View], View]:
        """A route of the service: the key, the faults of calls, the service's refusals."""

        def decorate(view: View) -> View:
            @functools.wraps(view)
            def guarded(**given: Any) -> Any:
                if not knows_key():
                    return _no(401, "auth_error", "Invalid user key")
                with world.lock:
                    now = world.clock()
                    early = cloud.faults.any_on("rate-limits") and pace.too_soon(view.__name__, now)
                    if early and cloud.faults.strikes("rate-limits", now) is not None:
                        return _too_many()
                if (answer := broken(kind, "before")) is not None:
                    return answer
                try:
                    with world.lock:
                        answer = view(**given)
                except Refused as e:
                    return _no(e.status, e.error, e.msg, **e.also)
                except BadQuery as e:
                    return _no(400, "invalid_request", str(e))
                finally:
                    world.kick()
                if isinstance(answer, Later):
                    answer = answer.rest()
                struck = broken(kind, "after")
                return answer if struck is None else struck

            return guarded

        return decorate

    def told() -> dict[str, Any]:
        """The body, an object; raises Refused."""
        try:
            said = request.get_json(force=True, silent=True)
        except RecursionError:
            said = None
        if not isinstance(said, dict):
            raise Refused(400, "invalid_args", "error 400/3467: Invalid args: wanted a JSON object")
        return said

    # -- the account --------------------------------------------------------------------------------

    @app.get("/api/v0/gpu_names/unique/")
    def gpu_names() -> Response:
        return jsonify(gpu_names=sorted(GPUS))

    @app.get("/api/v0/users/current", strict_slashes=False)
    @api("account")
    def user() -> Response:
        cloud.advance(world.clock())
        credit = cloud.credit(world.clock())
        keys = [key for key, _ in cloud.ssh_keys.values()]
        return jsonify(
            id=1,
            username="local",
            email="local@localcloud.invalid",
            balance=0.0,
            credit=round(credit, 6),
            balance_threshold=0.0,
            balance_threshold_enabled=False,
            can_pay=True,
            has_billing=True,
            host_agreement_accepted=False,
            ssh_key="\n".join(keys),
            sid="local",
        )

    @app.get("/api/v0/ssh/")
    @api("account")
    def ssh_keys() -> Response:
        return jsonify(
            [
                {"id": number, "user_id": 1, "public_key": key, "created_at": at, "deleted_at": None}
                for number, (key, at) in cloud.ssh_keys.items()
            ]
        )

    @app.post("/api/v0/ssh/")
    @api("account")
    def add_ssh_key() -> Response:
        key = _ssh_key(told())
        number = cloud.add_key(key, world.clock())
        return jsonify(
            success=True,
            key={
                "id": number,
                "user_id": 1,
                "public_key": key,
                "created_at": cloud.ssh_keys[number][1],
                "deleted_at": None,
            },
        )

    # -- the market ---------------------------------------------------------------------------------

    @app.post("/api/v0/bundles/")
    @api("search")
    def bundles() -> Response:
        return jsonify(offers=cloud.search(Query.read(told()), world.clock()))

    @app.put("/api/v0/search/asks/")
    @api("search")
    def search_asks() -> Response:
        query = told().get("q")
        if not isinstance(query, dict):
            raise BadQuery("q: wanted an object")
        return jsonify(offers=cloud.search(Query.read(query), world.clock()))

    @app.put("/api/v0/asks/<int:offer_id>/")
    @api("create")
    def create(offer_id: int) -> Any:
        key = secrets.token_hex(32)
        new = cloud.create(offer_id, _order(told(), key, offer_id), world.clock())
        if cloud.faults.strikes("create-lost", world.clock()) is not None:
            return Response("<html>Gateway Timeout</html>", 504, mimetype="text/html")
        return jsonify(success=True, new_contract=new, instance_api_key=key)

    # -- instances ----------------------------------------------------------------------------------

    @app.get("/api/v0/instances/")
    @api("list")
    def old_list() -> tuple[Response, int]:
        return _no(
            410,
            "deprecated_endpoint",
            "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead.",
        )

    @app.get("/api/v1/instances/")
    @api("list")
    def instances() -> Any:
        now = world.clock()
        if cloud.faults.strikes("list-hangs", now) is not None:
            return Later(hang)
        if cloud.faults.strikes("list-429", now) is not None:
            return _too_many()
        if cloud.faults.strikes("list-500", now) is not None:
            return _no(500, "internal_error", "the local cloud was told to fail")
        if cloud.faults.strikes("list-empty", now) is not None:
            return jsonify({})
        cloud.advance(now)
        rows = [cloud.row(r, now) for r in cloud.rentals.values()]
        total = len(rows)
        missing = cloud.faults.strikes("list-missing", now)
        if missing is not None:
            rows.sort(key=lambda row: int(row["id"]))
            rows = rows[: round(len(rows) * (1.0 - float(missing["share"])))]
            total = total if missing["total"] == "full" else len(rows)
        return jsonify(_page(rows, total, request.args))

    @app.get("/api/v0/instances/filters/")
    @api("list")
    def filters() -> Response:
        now = world.clock()
        cloud.advance(now)
        rows = [cloud.row(r, now) for r in cloud.rentals.values()]
        return jsonify(
            filters=[{k: row[k] for k in ("actual_status", "verification", "gpu_name")} for row in rows]
        )

    @app.get("/api/v0/instances/<int:instance_id>/")
    @api("show")
    def show(instance_id: int) -> Response:
        now = world.clock()
        cloud.advance(now)
        found = cloud.rentals.get(instance_id)
        return jsonify(instances=None if found is None else cloud.row(found, now))

    def change(instance_id: int, said: Mapping[str, Any]) -> None:
        now = world.clock()
        if "state" in said:
            if said["state"] == "running":
                cloud.start(instance_id, now)
            elif said["state"] == "stopped":
                cloud.stop(instance_id, now)
            else:
                raise Refused(400, "invalid_args", "state: wanted running or stopped")
        elif isinstance(said.get("label"), str):
            cloud.relabel(instance_id, said["label"], now)
        else:
            raise Refused(400, "invalid_args", "wanted state or label")

    @app.put("/api/v0/instances/<int:instance_id>/")
    @api("change")
    def put_instance(instance_id: int) -> Response:
        change(instance_id, told())
        return jsonify(success=True)

    @app.put("/api/v0/instances/")
    @api("change")
    def put_instances() -> Response:
        said = told()
        for instance_id in _ids(said.get("ids"), "ids"):
            change(instance_id, {"state": said.get("state")})
        return jsonify(success=True)

    @app.delete("/api/v0/instances/<int:instance_id>/")
    @api("destroy")
    def destroy(instance_id: int) -> Response:
        cloud.destroy(instance_id, world.clock())
        return jsonify(success=True)

    @app.delete("/api/v0/instances/")
    @api("destroy")
    def destroy_many() -> Response:
        for instance_id in _ids(told().get("instance_ids"), "instance_ids"):
            cloud.destroy(instance_id, world.clock())
        return jsonify(success=True)

    @app.put("/api/v0/instances/reboot/<int:instance_id>/")
    @api("change")
    def reboot(instance_id: int) -> Response:
        cloud.reboot(instance_id, world.clock())
        return jsonify(success=True)

    @app.put("/api/v0/instances/recycle/<int:instance_id>/")
    @api("change")
    def recycle(instance_id: int) -> Response:
        cloud.reboot(instance_id, world.clock(), recycle=True)
        return jsonify(success=True)

    @app.put("/api/v0/instances/bid_price/<int:instance_id>/")
    @api("change")
    def bid_price(instance_id: int) -> Response:
        price = _price(told().get("price"))
        cloud.change_bid(instance_id, price, world.clock())
        return jsonify(success=True)

    @app.post("/api/v0/instances/<int:instance_id>/ssh/")
    @api("change")
    def attach(instance_id: int) -> Response:
        cloud.attach_key(instance_id, _ssh_key(told()), world.clock())
        return jsonify(success=True, msg="SSH key added to instance.")

    def uploaded_later(find: Callable[[], str]) -> Later:
        """The rest of an answer: it says where what `find` finds can be fetched in a moment."""
        name = f"{uuid.uuid4().hex}.log"
        never = cloud.faults.strikes("log-never", world.clock()) is not None
        ready_at = float("inf") if never else world.clock() + UPLOAD_S
        url = f"{request.host_url}instance_logs/{name}"

        def answer() -> Response:
            world.upload(name, find(), ready_at)
            return jsonify(success=True, result_url=url, msg="Log request sent.")

        return Later(answer)

    @app.put("/api/v0/instances/request_logs/<int:instance_id>/", strict_slashes=False)
    @api("logs")
    def request_logs(instance_id: int) -> Later:
        said = told()
        found = cloud.rentals.get(instance_id)
        if found is None:
            raise Refused(404, "no_such_instance", f"Instance {instance_id} not found.")
        history = list(found.history)
        daemon = str(said.get("daemon_logs", "")).lower() == "true"
        words = str(said.get("filter") or "")
        most = max(0, _number(said.get("tail"), 1000))

        def find() -> str:
            lines = history if daemon else world.console(instance_id).splitlines()
            lines = [line for line in lines if words in line]
            return "\n".join(lines[-most:] if most else []) + "\n"

        return uploaded_later(find)

    @app.put("/api/v0/instances/command/<int:instance_id>/", strict_slashes=False)
    @api("logs")
    def command(instance_id: int) -> Later:
        said = told().get("command")
        if instance_id not in cloud.rentals:
            raise Refused(404, "no_such_instance", f"Instance {instance_id} not found.")
        if not isinstance(said, str) or len(said) > 512 or said.split()[:1] not in (["ls"], ["rm"], ["du"]):
            raise Refused(400, "invalid_args", "command: wanted ls, rm or du, at most 512 characters")
        return uploaded_later(lambda: world.command(instance_id, said))

    @app.get("/instance_logs/<name>")
    def instance_log(name: str) -> Response:
        text = world.uploaded(name)
        if text is None:
            return Response("not there yet", 403, mimetype="text/plain")
        return Response(text.encode(errors="replace"), 200, mimetype="text/plain")

    # -- our own ------------------------------------------------------------------------------------

    keyed = requires(lambda: frozenset({api_key}))

    @app.get("/localcloud/status")
    def status() -> Response:
        return jsonify(world.status())

    @app.get("/localcloud/faults")
    def faults() -> Response:
        with world.lock:
            on = cloud.faults.shown(world.clock())
        known = {
            name: {"says": kind.says, "parameters": [*kind.params, *limits_of(kind)]}
            for name, kind in FAULTS.items()
        }
        return jsonify(on=on, known=known)

    @app.post("/localcloud/faults")
    @keyed
    def add_fault() -> tuple[Response, int]:
        said = json_body()
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            raise BadField("name", "wanted the name of a fault")
        name = said.pop("name")
        try:
            with world.lock:
                fault = cloud.faults.add(name, said, world.clock())
        except BadFault as e:
            raise BadField("name" if name not in FAULTS else "parameters", str(e)) from None
        world.kick()
        log.info("fault on: %s", fault.shown())
        return jsonify(fault.shown()), 201

    @app.delete("/localcloud/faults/<name>")
    @keyed
    def remove_fault(name: str) -> Any:
        try:
            with world.lock:
                removed = cloud.faults.remove(name)
        except BadFault as e:
            return error(404, "not_found", str(e))
        world.kick()
        log.info("fault off: %s (%d)", name, removed)
        return jsonify(removed=removed)

    @app.post("/localcloud/instances/<int:instance_id>/kill")
    @keyed
    def kill(instance_id: int) -> Any:
        part = body({"part": Choice(("all", "model"), optional=True)}).get("part", "all")
        try:
            with world.lock:
                cloud.kill(instance_id, world.clock(), part)
        except Refused as e:
            return error(e.status, e.error, e.msg)
        world.kick()
        return jsonify(killed=part)

    @app.get("/")
    def page() -> Response:
        # A renter may have written half a character, which has no bytes.
        return Response(_page_html(world.status()).encode(errors="replace"), mimetype="text/html")

    return app


# -- what requests say -----------------------------------------------------------------------------------


def _bad(text: str, **also: Any) -> Refused:
    return Refused(400, "invalid_args", f"error 400/3467: Invalid args: {text}", **also)


def _ssh_key(said: Mapping[str, Any]) -> str:
    key = said.get("ssh_key")
    if not isinstance(key, str) or len(key.split()) < 2 or len(key) > 4096 or "\n" in key.strip():
        raise _bad("ssh_key: wanted a public key on one line")
    return key.strip()


def _ids(said: object, name: str) -> list[int]:
    if not isinstance(said, list) or not all(type(i) is int for i in said):
        raise _bad(f"{name}: wanted a list of numbers")
    return said


def _number(said: object, default: int) -> int:
    """A number that travels as text; the default for what is none, as the service is lenient there."""
    try:
        return int(str(said))
    except ValueError:
        return default


def _price(price: object) -> float | None:
    if price is None:
        return None
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0.001 <= price <= 128.0:
        raise Refused(400, "invalid_price", f"price: wanted 0.001 to 128, got {price!r:.40}")
    return float(price)


def _order(said: Mapping[str, Any], instance_key: str, offer_id: int) -> Order:
    """The order in the body of a create (vast-contract 2.2); raises Refused."""

    def text(name: str, most: int) -> str | None:
        value = said.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > most):
            raise _bad(f"{name}: wanted text of at most {most} characters", ask_id=offer_id)
        return value

    image = text("image", 1024)
    if not image:
        raise _bad("image: is missing", ask_id=offer_id)
    disk = said.get("disk", 10.0)
    if isinstance(disk, bool) or not isinstance(disk, int | float) or not MIN_DISK_GB <= disk <= 1e6:
        raise _bad(f"disk: wanted {MIN_DISK_GB:g} or more", ask_id=offer_id)
    env = said.get("env") or {}
    if not isinstance(env, dict) or not all(isinstance(v, str) for v in env.values()):
        raise _bad("env: wanted an object of texts", ask_id=offer_id)
    args = said.get("args") or []
    if not isinstance(args, list) or not all(isinstance(a, str) for a in args):
        raise _bad("args: wanted a list of texts", ask_id=offer_id)
    return Order(
        image=image,
        disk_gb=float(disk),
        label=text("label", MAX_LABEL),
        env=env,
        onstart=text("onstart", MAX_ONSTART),
        price=_price(said.get("price")),
        cancel_unavail=said.get("cancel_unavail") is True,
        runtype=text("runtype", 100) or "ssh",
        args=tuple(args),
        instance_key=instance_key,
    )


def _page(rows: list[dict[str, Any]], total: int, args: Mapping[str, str]) -> dict[str, Any]:
    """One page of the listing (vast-contract 2.3)."""

    def parsed(name: str, default: Any) -> Any:
        try:
            return json.loads(args[name]) if name in args else default
        except (ValueError, RecursionError):
            raise BadQuery(f"{name}: wanted JSON") from None

    filters = parsed("select_filters", {})
    if not isinstance(filters, dict):
        raise BadQuery("select_filters: wanted an object")
    for name in COMPUTED & filters.keys():
        raise BadQuery(f"select_filters: {name} is computed and cannot be filtered by")
    labels: dict[str, int] = {}
    for row in rows:
        label = str(row["label"] or "")
        labels[label] = labels.get(label, 0) + 1
    found = [row for row in rows if matches({**row, "label": row["label"] or ""}, filters)]
    order = parsed("order_by", [])
    if not isinstance(order, list) or not all(isinstance(o, dict) and "col" in o for o in order):
        raise BadQuery("order_by: wanted a list of {col, dir}")
    columns = parsed("select_cols", ["*"])
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise BadQuery("select_cols: wanted a list of names")
    ordered = [(str(o["col"]), o.get("dir") == "desc") for o in order]
    found = in_order(found, ordered)
    limit = _number(args.get("limit"), PAGE_ROWS)
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
        "label_counts": labels,
        "next_token": token,
        "instances": page,
    }


def _after(rows: list[dict[str, Any]], order: list[tuple[str, bool]], token: str | None) -> int:
    """Where the page begins: after the row in the token, or its place if it has gone meanwhile."""
    if not token:
        return 0
    try:
        last = json.loads(base64.b64decode(token, validate=True))["values"]
        # Equal rows stay as they are, so it comes right behind itself.
        return next(at for at, row in enumerate(in_order([*rows, last], order)) if row is last)
    except (binascii.Error, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise Refused(400, "invalid_token", "after_token is not one of ours") from None


def _page_html(status: Mapping[str, Any]) -> str:
    """The status for a browser. Everything in it may come from a renter, so everything is escaped."""

    def cell(value: object) -> str:
        return f"<td>{html.escape(str(value))}</td>"

    rows = "".join(
        "<tr>"
        + "".join(
            cell(v)
            for v in (
                i["id"],
                i["label"] or "",
                i["machine_id"],
                i["gpu"],
                i["state"],
                "yes" if i["model_on_disk"] else "no",
                f"{i['usd_h_now']:.3f}",
                f"{i['usd']['total']:.5f}",
                " ".join(str(p) for p in i["pids"]),
                i["status_msg"] or "",
            )
        )
        + "</tr>"
        for i in status["instances"]
    )
    heads = (
        "id",
        "label",
        "machine",
        "GPU",
        "state",
        "model on disk",
        "$/h",
        "$ so far",
        "processes",
        "message",
    )
    head = "".join(f"<th>{h}</th>" for h in heads)
    faults = html.escape(", ".join(f["name"] for f in status["faults"]) or "none")
    engine = html.escape(str(status["engine"]))
    return (
        "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content=2><title>local cloud</title>"
        "<style>body{font:14px system-ui;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}</style>"
        f"<h1>local cloud, {engine} engine</h1>"
        "<p>This is not Vast.ai: machines, prices and answers are made up, one computer plays them all.</p>"
        f"<p>times divided by {status['speedup']:g} · credit ${status['credit_usd']:.2f} · "
        f"burning ${status['burn_usd_h']:.3f}/h · spent ${status['spent_usd']['total']:.5f} · "
        f"faults: {faults}</p>"
        f"<table><tr>{head}</tr>{rows}</table>"
    )
