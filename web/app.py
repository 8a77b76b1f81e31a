"""What every Flask app of ours shares: errors as JSON, limits on bodies, and keys."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import ParamSpec, TypeVar

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import MapAdapter

from fleet_client.bearer import bearer_is
from fleet_client.browser_pages import by_name, page_refusal
from web.answers import OUR_FAULT, UNAUTHORIZED, JsonAnswer, bad_request, error, error_answer, response
from web.messages.decoding import BadField, decode

log = logging.getLogger("http")

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

HeadCheck = Callable[[str | None], JsonAnswer | None]
"""Of the Authorization header, before the body is read: the refusal, None for one that may go on."""

MAX_BODY = 65536
"""Bytes a request body may have: none of our routes takes a prompt, and everything else is small."""


def make_app(name: str, *, large_bodies: Mapping[str, int] | None = None) -> Flask:
    """Return a Flask app whose every error is JSON, without a traceback to the client.

    A body over MAX_BODY gets 413, however it is sent. large_bodies: path -> bytes, for routes between our own
    processes that grow with the fleet.
    """
    app = Flask(name, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["LARGE_BODIES"] = dict(large_bodies or {})
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # //route is an unknown route, not a redirect

    @app.before_request
    def limit_body() -> Response | None:
        request.max_content_length = max_body(app, request.path)
        # FlaskBridge has looked already; the local cloud is served without it.
        headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in request.headers]
        why = page_refusal(request.method, request.path, by_name(headers))
        return None if why is None else error(*why)

    @app.errorhandler(BadField)
    def bad_field(e: BadField) -> Response:
        return response(bad_request(e))

    @app.errorhandler(HTTPException)
    def http_error(e: HTTPException) -> Response:
        return response(_answer_of(e))

    @app.errorhandler(Exception)
    def crashed(e: Exception) -> Response:
        log.error("%s %s failed", request.method, request.path, exc_info=e)
        return response(OUR_FAULT)

    return app


def _answer_of(e: HTTPException) -> JsonAnswer:
    code = (e.name or "error").lower().replace(" ", "_")
    allow = [(name, value) for name, value in e.get_headers() if name.lower() == "allow"]
    return error_answer(e.code or 500, code, e.description or e.name, *allow)


def refused_by_head(
    app: Flask, views: MapAdapter, method: str, path: str, authorization: str | None
) -> JsonAnswer | None:
    """Return Flask's refusal of a request by its head alone: no such route, or its key is missing.

    None if there is no refusal, so that the body is to be read. views: the app's url_map, bound.
    """
    try:
        endpoint, _ = views.match(path, method)
    except HTTPException as e:
        return _answer_of(e)
    check: HeadCheck | None = getattr(app.view_functions[endpoint], _HEAD_CHECK, None)
    return None if check is None else check(authorization)


def max_body(app: Flask, path: str) -> int:
    """Return how many bytes the body of a request to that path may have."""
    found: int = app.config["LARGE_BODIES"].get(path, MAX_BODY)
    return found


def body(kind: type[T]) -> T:
    """Return the JSON body of the request being served as a `kind`; raise BadField when it is none."""
    return decode(request.get_data(cache=False), kind)


def query_number(name: str, default: float, least: float, most: float) -> float:
    """Return a number from the query string of the request being served, or the default if it has none.

    Raises BadField for what is no number from least to most.
    """
    raw = request.args.get(name)
    try:
        value = default if raw is None else float(raw)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise BadField(name, f"wanted a number {least:g} to {most:g}")
    return value


def admits(check: HeadCheck) -> Callable[[Callable[P, R]], Callable[P, R | Response]]:
    """Return a decorator: a view is reached only by requests whose Authorization header passes the check.

    The check comes before a request's body is read. Under a server that reads bodies first (the local
    cloud's) it is made before the view.
    """

    def decorate(view: Callable[P, R]) -> Callable[P, R | Response]:
        @functools.wraps(view)
        def guarded(*args: P.args, **more: P.kwargs) -> R | Response:
            refusal = check(request.headers.get("Authorization"))
            return view(*args, **more) if refusal is None else response(refusal)

        setattr(guarded, _HEAD_CHECK, check)
        return guarded

    return decorate


_HEAD_CHECK = "head_check"


def key_check(keys: Callable[[], Collection[str]]) -> HeadCheck:
    """Return the check that a request has `Authorization: Bearer <one of the keys>`, else 401.

    With no keys every request passes. Keys are compared in constant time.
    """

    def check(authorization: str | None) -> JsonAnswer | None:
        known = keys()
        return UNAUTHORIZED if known and not bearer_is(authorization, known) else None

    return check


def requires(keys: Callable[[], Collection[str]]) -> Callable[[Callable[P, R]], Callable[P, R | Response]]:
    """Return a decorator: a view is reached only with one of the keys, and by everybody if there are none."""
    return admits(key_check(keys))
