"""Routes that Vast.ai does not have: status of the local cloud, faults, kills, and a page for browsers."""

import logging
from typing import Any, Literal

import msgspec
from flask import Blueprint, Response, jsonify

from localcloud.api import page
from localcloud.api.calls import service
from localcloud.faults import FAULTS, BadFault, limits_of
from localcloud.orders import CloudRefusal
from web.answers import error
from web.app import body, requires
from web.messages.decoding import BadField

log = logging.getLogger("localcloud")

routes = Blueprint("control", __name__)
_keyed = requires(lambda: frozenset({service().api_key}))


class KillBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a call that kills all processes of an instance, or its model server only."""

    part: Literal["all", "model"] | None = None


@routes.get("/localcloud/status")
def status() -> Response:
    return jsonify(service().world.status())


@routes.get("/localcloud/faults")
def faults() -> Response:
    world = service().world
    with world.lock:
        on = world.cloud.faults.shown(world.clock())
    known = {
        name: {"says": kind.says, "parameters": [*kind.params, *limits_of(kind)]}
        for name, kind in FAULTS.items()
    }
    return jsonify(on=on, known=known)


@routes.post("/localcloud/faults")
@_keyed
def add_fault() -> tuple[Response, int]:
    said = body(dict[str, Any])
    name = said.pop("name", None)
    if not isinstance(name, str):
        raise BadField("name", "wanted the name of a fault")
    world = service().world
    try:
        with world.lock:
            fault = world.cloud.faults.add(name, said, world.clock())
    except BadFault as e:
        raise BadField("name" if name not in FAULTS else "parameters", str(e)) from None
    world.kick()
    log.info("fault on: %s", fault.shown())
    return jsonify(fault.shown()), 201


@routes.delete("/localcloud/faults/<name>")
@_keyed
def remove_fault(name: str) -> Any:
    world = service().world
    try:
        with world.lock:
            removed = world.cloud.faults.remove(name)
    except BadFault as e:
        return error(404, "not_found", str(e))
    world.kick()
    log.info("fault off: %s (%d)", name, removed)
    return jsonify(removed=removed)


@routes.post("/localcloud/instances/<id:instance_id>/kill")
@_keyed
def kill(instance_id: int) -> Any:
    part = body(KillBody).part or "all"
    world = service().world
    try:
        with world.lock, world.cloud.changing(instance_id, world.clock()) as rental:
            rental.kill(part)
    except CloudRefusal as e:
        return error(e.status, e.error, e.msg)
    world.kick()
    return jsonify(killed=part)


@routes.get("/")
def start_page() -> Response:
    # A renter may have written half a character, which has no bytes.
    return Response(page.render(service().world.status()).encode(errors="replace"), mimetype="text/html")
