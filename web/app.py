"""What every Flask app of ours shares: errors as JSON, limits on bodies, and keys."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import IntegerConverter, Map, MapAdapter

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

MAX_ID = 2**53
"""Largest id of an instance, machine or offer in a path: what JSON's numbers hold exactly."""

MAX_BODY = 65536
"""Bytes a request body may have: none of our routes takes a prompt, and everything else is small."""


class _IdConverter(IntegerConverter):
    """Lets <id:name> in a route stand for an id: a whole number that fits everywhere it is kept."""

    def __init__(self, into: Map) -> None:
        super().__init__(into, max=MAX_ID)


def make_app(name: str, *, large_bodies: Mapping[str, int] | None = None) -> Flask:
    """Return a Flask app whose every error is JSON, without a traceback to the client.

    A body over MAX_BODY gets 413, however it is sent. large_bodies: path -> bytes, for routes between our own
    processes that grow with the fleet.
    """
    app = Flask(name, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["LARGE_BODIES"] = dict(large_bodies or {})
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.converters["id"] = _IdConverter
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


@dataclass(frozen=True)
class QueryNumber:
    """A number that may stand in a route's query string, from least to most."""

    name: str
    says: str
    least: float
    most: float
    whole: bool = False

    def asked(self, default: float) -> float:
        """Return the number of the request being served, or the default if it has none.

        Raises BadField for what is no number from least to most.
        """
        raw = request.args.get(self.name)
        try:
            value = default if raw is None else float(raw)
        except ValueError:
            value = float("nan")
        if not self.least <= value <= self.most or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise BadField(self.name, f"wanted {kind} {self.least:g} to {self.most:g}")
        return value


def check_query(*known: QueryNumber) -> None:
    """Raise BadField if the request being served has a parameter that is none of these."""
    names = {one.name for one in known}
    for name in request.args:
        if name not in names:
            raise BadField(name[:60], f"is no parameter here; wanted {', '.join(sorted(names))}")


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
