"""What every Flask app of ours shares: errors as JSON, limits on bodies, and keys."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import ParamSpec, TypeVar

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from fleet_client.bearer import bearer_is
from web.answers import OUR_FAULT, UNAUTHORIZED, error, response
from web.direct import EXTENSION, DirectRoutes
from web.messages.decoding import BadField

log = logging.getLogger("http")

P = ParamSpec("P")
R = TypeVar("R")

MAX_BODY = 65536
"""Bytes a request body may have: none of our routes takes a prompt, and everything else is small."""


def make_app(name: str, max_body: int = MAX_BODY, *, large_bodies: Mapping[str, int] | None = None) -> Flask:
    """Return a Flask app whose every error is JSON, without a traceback to the client.

    max_body: bytes; a longer body gets 413, however it is sent. large_bodies: path -> bytes, for routes
    between our own processes that grow with the fleet; their views read with json_body(most).
    """
    app = Flask(name, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body
    app.extensions[EXTENSION] = DirectRoutes(dict(large_bodies or {}), {}, {})
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # //route is an unknown route, not a redirect

    @app.errorhandler(BadField)
    def bad_field(e: BadField) -> Response:
        return error(400, "bad_request", str(e))

    @app.errorhandler(HTTPException)
    def http_error(e: HTTPException) -> Response:
        status = e.code or 500
        answer = error(status, (e.name or "error").lower().replace(" ", "_"), e.description or e.name)
        for header, value in e.get_headers():
            if header.lower() == "allow":
                answer.headers[header] = value
        return answer

    @app.errorhandler(Exception)
    def crashed(e: Exception) -> Response:
        log.error("%s %s failed", request.method, request.path, exc_info=e)
        return response(OUR_FAULT)

    return app


def requires(keys: Callable[[], Collection[str]]) -> Callable[[Callable[P, R]], Callable[P, R | Response]]:
    """Let a view be reached only with `Authorization: Bearer <one of the keys>`; with no keys it is open.

    Compared in constant time; 401 otherwise.
    """

    def decorate(view: Callable[P, R]) -> Callable[P, R | Response]:
        @functools.wraps(view)
        def guarded(*args: P.args, **more: P.kwargs) -> R | Response:
            known = keys()
            if known and not bearer_is(request.headers.get("Authorization"), known):
                return response(UNAUTHORIZED)
            return view(*args, **more)

        return guarded

    return decorate
