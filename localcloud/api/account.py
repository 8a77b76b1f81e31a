"""Routes of the customer's account: the user with its credit, and ssh keys."""

from typing import Any

from flask import Blueprint, Response, jsonify

from localcloud.api import bodies
from localcloud.api.calls import api
from localcloud.cloud import Cloud
from localcloud.machines import GPUS

routes = Blueprint("account", __name__)


@routes.get("/api/v0/gpu_names/unique/")
def gpu_names() -> Response:
    return jsonify(gpu_names=sorted(GPUS))


@routes.get("/api/v0/users/current", strict_slashes=False)
@api("account")
def user(cloud: Cloud, now: float) -> Response:
    cloud.advance(now)
    return jsonify(
        id=1,
        username="local",
        email="local@localcloud.invalid",
        balance=0.0,
        credit=round(cloud.account.credit_usd(now), 6),
        balance_threshold=0.0,
        balance_threshold_enabled=False,
        can_pay=True,
        has_billing=True,
        host_agreement_accepted=False,
        ssh_key="\n".join(cloud.account.public_keys),
        sid="local",
    )


@routes.get("/api/v0/ssh/")
@api("account")
def ssh_keys(cloud: Cloud, now: float) -> Response:  # noqa: ARG001
    return jsonify([_shown(cloud, number) for number in cloud.account.ssh_keys])


@routes.post("/api/v0/ssh/")
@api("account", every_s=1.0)
def add_ssh_key(cloud: Cloud, now: float) -> Response:
    number = cloud.account.add_key(bodies.ssh_key(bodies.body()), now)
    return jsonify(success=True, key=_shown(cloud, number))


@routes.put("/api/v0/ssh/<id:number>/")
@api("account", every_s=1.0)
def change_ssh_key(cloud: Cloud, now: float, number: int) -> Response:  # noqa: ARG001
    cloud.account.change_key(number, bodies.ssh_key(bodies.body()))
    return jsonify(success=True, key=_shown(cloud, number))


@routes.delete("/api/v0/ssh/<id:number>/")
@api("account", every_s=1.0)
def delete_ssh_key(cloud: Cloud, now: float, number: int) -> Response:  # noqa: ARG001
    cloud.account.remove_key(number)
    return jsonify(success=True)


def _shown(cloud: Cloud, number: int) -> dict[str, Any]:
    key, added_at = cloud.account.ssh_keys[number]
    return {"id": number, "user_id": 1, "public_key": key, "created_at": added_at, "deleted_at": None}
