"""Routes by which a customer changes its instances: start, stop, label, reboot, bid, keys, destroy."""

from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, jsonify

from localcloud.api import bodies
from localcloud.api.calls import api
from localcloud.cloud import Cloud
from localcloud.orders import CloudRefusal

routes = Blueprint("instances", __name__, url_prefix="/api/v0/instances")


@routes.put("/<id:instance_id>/")
@api("change", every_s=1.0)
def put_instance(cloud: Cloud, now: float, instance_id: int) -> Response:
    _change(cloud, now, instance_id, bodies.body())
    return jsonify(success=True)


@routes.put("/")
@api("change", every_s=1.0)
def put_instances(cloud: Cloud, now: float) -> Response:
    said = bodies.body()
    for instance_id in bodies.ids(said.get("ids"), "ids"):
        _change(cloud, now, instance_id, {"state": said.get("state")})
    return jsonify(success=True)


def _change(cloud: Cloud, now: float, instance_id: int, said: Mapping[str, Any]) -> None:
    state, label = said.get("state"), said.get("label")
    if "state" in said and state not in ("running", "stopped"):
        raise CloudRefusal(400, "invalid_args", "state: wanted running or stopped")
    if "state" not in said and not isinstance(label, str):
        raise CloudRefusal(400, "invalid_args", "wanted state or label")
    with cloud.changing(instance_id, now) as rental:
        if state == "running":
            rental.start(now)
        elif state == "stopped":
            rental.stop(now)
        else:
            rental.relabel(str(label))


@routes.delete("/<id:instance_id>/")
@api("destroy", every_s=3.0)
def destroy(cloud: Cloud, now: float, instance_id: int) -> Response:
    cloud.destroy(instance_id, now)
    return jsonify(success=True)


@routes.delete("/")
@api("destroy", every_s=3.0)
def destroy_many(cloud: Cloud, now: float) -> Response:
    for instance_id in bodies.ids(bodies.body().get("instance_ids"), "instance_ids"):
        cloud.destroy(instance_id, now)
    return jsonify(success=True)


@routes.put("/reboot/<id:instance_id>/")
@api("change", every_s=1.0)
def reboot(cloud: Cloud, now: float, instance_id: int) -> Response:
    with cloud.changing(instance_id, now) as rental:
        rental.reboot(now)
    return jsonify(success=True)


@routes.put("/recycle/<id:instance_id>/")
@api("change", every_s=1.0)
def recycle(cloud: Cloud, now: float, instance_id: int) -> Response:
    with cloud.changing(instance_id, now) as rental:
        rental.reboot(now, recycle=True)
    return jsonify(success=True)


@routes.put("/bid_price/<id:instance_id>/")
@api("change", every_s=5.5)
def bid_price(cloud: Cloud, now: float, instance_id: int) -> Response:
    cloud.change_bid(instance_id, bodies.price(bodies.body().get("price")), now)
    return jsonify(success=True)


@routes.post("/<id:instance_id>/ssh/")
@api("change", every_s=1.0)
def attach(cloud: Cloud, now: float, instance_id: int) -> Response:
    key = bodies.ssh_key(bodies.body())
    with cloud.changing(instance_id, now) as rental:
        rental.attach_key(key)
    return jsonify(success=True, msg="SSH key added to instance.")


@routes.delete("/<id:instance_id>/ssh/<id:number>/")
@api("change", every_s=1.0)
def detach(cloud: Cloud, now: float, instance_id: int, number: int) -> Response:
    key = cloud.account.key(number)
    with cloud.changing(instance_id, now) as rental:
        rental.detach_key(key)
    return jsonify(success=True, msg="SSH key removed from instance.")
