"""Routes of logs and commands: the answer is an address from which the text can be fetched a moment later."""

import uuid
from collections.abc import Callable

from flask import Blueprint, Response, jsonify, request

from localcloud.api import bodies
from localcloud.api.calls import Later, api, service
from localcloud.cloud import Cloud
from localcloud.orders import CloudRefusal
from localcloud.rental import Rental

UPLOAD_S = 0.4
"""Seconds of the wall clock until a log can be fetched, since a real host uploads it first."""

routes = Blueprint("logs", __name__)


@routes.put("/api/v0/instances/request_logs/<id:instance_id>/", strict_slashes=False)
@api("logs")
def request_logs(cloud: Cloud, now: float, instance_id: int) -> Later:
    said = bodies.body()
    history = list(_found(cloud, instance_id).history)
    daemon = str(said.get("daemon_logs", "")).lower() == "true"
    words = str(said.get("filter") or "")
    most = max(0, bodies.number(said.get("tail"), 1000))
    world = service().world

    def find() -> str:
        lines = history if daemon else world.logs.console(instance_id).splitlines()
        lines = [line for line in lines if words in line]
        return "\n".join(lines[-most:] if most else []) + "\n"

    return _uploaded_later(cloud, now, find)


@routes.put("/api/v0/instances/command/<id:instance_id>/", strict_slashes=False)
@api("logs", every_s=1.5)
def command(cloud: Cloud, now: float, instance_id: int) -> Later:
    said = bodies.body().get("command")
    _found(cloud, instance_id)
    if not isinstance(said, str) or len(said) > 512 or said.split()[:1] not in (["ls"], ["rm"], ["du"]):
        raise CloudRefusal(400, "invalid_args", "command: wanted ls, rm or du, at most 512 characters")
    world = service().world
    return _uploaded_later(cloud, now, lambda: world.logs.command(instance_id, said))


@routes.get("/instance_logs/<name>")
def instance_log(name: str) -> Response:
    text = service().world.logs.uploaded(name)
    if text is None:
        return Response("not there yet", 403, mimetype="text/plain")
    return Response(text.encode(errors="replace"), 200, mimetype="text/plain")


def _found(cloud: Cloud, instance_id: int) -> Rental:
    found = cloud.rentals.get(instance_id)
    if found is None:
        raise CloudRefusal(404, "no_such_instance", f"Instance {instance_id} not found.")
    return found


def _uploaded_later(cloud: Cloud, now: float, find: Callable[[], str]) -> Later:
    """Return an answer with the address where the text that `find` returns can be fetched a moment later."""
    name = f"{uuid.uuid4().hex}.log"
    never = cloud.faults.strikes("log-never", now) is not None
    ready_at = float("inf") if never else now + UPLOAD_S
    url = f"{request.host_url}instance_logs/{name}"

    def answer() -> Response:
        service().world.logs.upload(name, find(), ready_at)
        return jsonify(success=True, result_url=url, msg="Log request sent.")

    return Later(answer)
