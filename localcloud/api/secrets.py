"""Routes of the account's secret variables, as docs.vast.ai describes them (create-env-var, 2026-11)."""

import re
from typing import Any

from flask import Blueprint, Response, jsonify

from localcloud.api import bodies
from localcloud.api.calls import api
from localcloud.cloud import Cloud
from localcloud.orders import CloudRefusal

MOST = 100
"""Variables of one account; the service has a limit, which it does not name."""

routes = Blueprint("secrets", __name__)


@routes.get("/api/v0/secrets/")
@api("account")
def secrets(cloud: Cloud, now: float) -> Response:  # noqa: ARG001
    return jsonify(success=True, secrets=cloud.account.secrets)


@routes.post("/api/v0/secrets/")
@api("account", every_s=1.0)
def add_secret(cloud: Cloud, now: float) -> Response:  # noqa: ARG001
    name, value = _name(said := bodies.body()), _value(said)
    if name in cloud.account.secrets or len(cloud.account.secrets) >= MOST:
        raise CloudRefusal(400, "invalid_args", f"Environment variable {name} exists, or there are too many.")
    cloud.account.set_secret(name, value)
    return jsonify(success=True, msg="Environment variable added successfully")


@routes.put("/api/v0/secrets/")
@api("account", every_s=1.0)
def change_secret(cloud: Cloud, now: float) -> Response:  # noqa: ARG001
    name, value = _known(cloud, said := bodies.body()), _value(said)
    cloud.account.set_secret(name, value)
    return jsonify(success=True, msg="Environment variable updated successfully")


@routes.delete("/api/v0/secrets/")
@api("account", every_s=1.0)
def delete_secret(cloud: Cloud, now: float) -> Response:  # noqa: ARG001
    cloud.account.delete_secret(_known(cloud, bodies.body()))
    return jsonify(success=True, msg="Operation completed successfully")


def _name(said: dict[str, Any]) -> str:
    name = str(said.get("key") or "").upper()
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,127}", name):
        raise bodies.bad("key: wanted the name of an environment variable")
    return name


def _value(said: dict[str, Any]) -> str:
    value = said.get("value")
    if not isinstance(value, str) or not re.fullmatch(r"[a-zA-Z0-9_.-]{1,4096}", value):
        raise bodies.bad("value: wanted letters, digits, _, - and .")
    return value


def _known(cloud: Cloud, said: dict[str, Any]) -> str:
    name = _name(said)
    if name not in cloud.account.secrets:
        raise CloudRefusal(404, "not_found", f"Environment variable {name} not found.")
    return name
