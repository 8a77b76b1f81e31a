"""Routes of templates and copies; of what the local cloud does not do, an error in the service's shape."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify, request

from localcloud import rows, templates
from localcloud.api import bodies
from localcloud.api.calls import Later, api, refuse, service
from localcloud.api.listing import json_argument
from localcloud.cloud import Cloud
from localcloud.images import with_its_tag
from localcloud.orders import CloudRefusal
from localcloud.phases import Phase
from localcloud.query import BadQuery, matches
from localcloud.rental import Rental

METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH")

routes = Blueprint("others", __name__)


@routes.get("/api/v0/template/")
@api("search", every_s=1.0)
def search_templates(cloud: Cloud, now: float) -> Response:  # noqa: ARG001
    filters = json_argument(request.args, "select_filters", {})
    if not isinstance(filters, dict):
        raise BadQuery("select_filters: wanted an object")
    found = [dict(t) for t in templates.TEMPLATES if matches(t, filters)]
    return jsonify(success=True, templates_found=len(found), templates=found)


@routes.put("/api/v0/instances/update_template/<id:instance_id>/")
@api("change", every_s=1.0)
def update_instance(cloud: Cloud, now: float, instance_id: int) -> Response:
    said = bodies.body()
    asked = said.get("template_hash_id") or said.get("template_id")
    template = None
    if asked is not None:
        template = templates.template_of(asked)
        if template is None:
            raise bodies.bad(f"no template {asked!r:.60}")
    with cloud.changing(instance_id, now) as rental:
        rental.make_anew(_changed(rental, said, template), now)
        return jsonify(success=True, updated_instance=rows.row(rental, cloud.faults, now))


def _changed(rental: Rental, said: Mapping[str, Any], template: Mapping[str, Any] | None) -> Any:
    """Return a rental's order with what the body of an update changes."""
    image = said.get("image") or (templates.image_of(template) if template else rental.order.image)
    env = said.get("env", dict(rental.order.env))
    onstart = said.get("onstart", rental.order.onstart)
    if not isinstance(image, str) or not isinstance(env, dict) or not isinstance(onstart, str | None):
        raise bodies.bad("image and onstart: wanted text; env: wanted an object")
    return replace(rental.order, image=with_its_tag(image, rental.machine), env=env, onstart=onstart)


@routes.put("/api/v0/commands/copy_direct/")
@api("change", every_s=1.0)
def copy(cloud: Cloud, now: float) -> Later:  # noqa: ARG001
    said = bodies.body()
    ends = []
    for end in ("src", "dst"):
        number = str(said.get(f"{end}_id")).removeprefix("C.")
        rental = cloud.rentals.get(bodies.number(number, 0))
        if rental is None or rental.phase is not Phase.RUNNING:
            raise CloudRefusal(400, "invalid_args", f"{end}_id: instance {number:.40} is not running.")
        ends.append((rental.id, str(said.get(f"{end}_path") or "")))
    world = service().world

    def answer() -> Any:
        try:
            world.logs.copy(*ends[0], *ends[1])
        except (OSError, ValueError, shutil.Error) as e:
            return refuse(400, "invalid_args", f"{type(e).__name__}: {e}")
        return jsonify(success=True, msg="Remote to Remote copy initiated")

    return Later(answer)


@routes.route("/api/<path:path>", methods=METHODS)
@api("other")
def unknown(cloud: Cloud, now: float, path: str) -> tuple[Response, int]:  # noqa: ARG001
    return refuse(404, "not_found", f"{request.method} /api/{path:.200}: the local cloud does not do this")
