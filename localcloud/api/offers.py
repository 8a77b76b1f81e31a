"""Routes of the market: search the offers, rent one."""

import secrets
from typing import Any

from flask import Blueprint, Response, jsonify

from localcloud import templates
from localcloud.api import bodies
from localcloud.api.calls import api
from localcloud.cloud import Cloud
from localcloud.query import BadQuery, Query

routes = Blueprint("offers", __name__)


@routes.post("/api/v0/bundles/")
@api("search", every_s=6.0)
def bundles(cloud: Cloud, now: float) -> Response:
    return jsonify(offers=cloud.search(Query.read(bodies.body()), now))


@routes.put("/api/v0/search/asks/")
@api("search", every_s=6.0)
def search_asks(cloud: Cloud, now: float) -> Response:
    query = bodies.body().get("q")
    if not isinstance(query, dict):
        raise BadQuery("q: wanted an object")
    return jsonify(offers=cloud.search(Query.read(query), now))


@routes.put("/api/v0/asks/<id:offer_id>/")
@api("create", every_s=4.5)
def create(cloud: Cloud, now: float, offer_id: int) -> Any:
    key = secrets.token_hex(32)
    said = bodies.body()
    if asked := said.get("template_hash_id"):
        template = templates.template_of(asked)
        if template is None:
            raise bodies.bad(f"template_hash_id: no template {asked!r:.60}", ask_id=offer_id)
        said["image"] = said.get("image") or templates.image_of(template)
    new = cloud.create(offer_id, bodies.order(said, key, offer_id), now)
    if cloud.faults.strikes("create-lost", now) is not None:
        return Response("<html>Gateway Timeout</html>", 504, mimetype="text/html")
    return jsonify(success=True, new_contract=new, instance_api_key=key)
