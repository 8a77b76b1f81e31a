"""Describe a server's routes as OpenAPI 3.1, from the structs they decode and encode (GET /openapi.json)."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from flask import Flask, Response

from web.answers import JsonAnswer, Problem, response
from web.app import MAX_ID, QueryNumber

VERSION = "0.3.0"
"""Of the project, as in pyproject.toml."""

Who = Literal["anyone", "client", "operator", "our servers", "instance"]

KEYS: Mapping[str, tuple[str, str]] = {
    "client": ("client_key", "A key of --client-keys-file; without that file none is wanted."),
    "operator": ("operator_key", "A key of --operator-key-file; without that file none is wanted."),
    "our servers": ("control_key", "The control key, in the state directory of the fleet."),
    "instance": ("signature", "A signature of the body, by the SHA-256 of the instance's master token."),
}
"""Who may call a route -> the name of what it has to show, and what that is."""

ALWAYS = (400, 403)
"""Errors of every route: a field that is wrong, a request that a foreign web page may have caused."""

WITH_BODY = (413, 415)
"""Further errors of routes that read a body: it is too long, or a browser sent something else than JSON."""

PROBLEM_JSON = "application/problem+json"


@dataclass(frozen=True)
class Page:
    """An answer in another format than JSON."""

    media_type: str


@dataclass(frozen=True)
class Operation:
    """One route of a server.

    path: with {names}, which stand for whole numbers but for those in `words`: name -> what it may be.
    answer: what comes with 200, a type, a tuple of types or a Page. body: type of what is read. errors:
    further statuses whose answer is a Problem. told: status -> type, of errors that say more.
    """

    method: str
    path: str
    says: str
    who: Who
    answer: Any
    body: Any = None
    errors: Sequence[int] = ()
    told: Mapping[int, Any] = field(default_factory=dict)
    query: Sequence[QueryNumber] = ()
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def all_errors(self) -> list[int]:
        """The statuses of all errors that the route may answer with, but for faults of ours."""
        found = {*ALWAYS, *self.errors, *self.told}
        if self.body is not None or self.method in ("POST", "PUT"):
            found |= {*WITH_BODY}
        if self.who != "anyone":
            found.add(401)
        if "{" in self.path:
            found.add(404)
        return sorted(found)


def document(title: str, operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of a server that has these routes."""
    kinds = list(_types(operations))
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(map(repr, kinds), found, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = _described(one, schema_of)
    shown = {name: {"type": "http", "scheme": "bearer", "description": says} for name, says in KEYS.values()}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": VERSION},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": shown},
    }


def add_openapi(app: Flask, title: str, operations: Sequence[Operation]) -> None:
    """Serve the description of these routes at GET /openapi.json, to anyone: no secret is in it."""
    said = JsonAnswer(msgspec.json.encode(document(title, operations)))
    app.add_url_rule("/openapi.json", "openapi", _answer(said))


def _answer(said: JsonAnswer) -> Callable[[], Response]:
    return lambda: response(said)


def _types(operations: Sequence[Operation]) -> Iterator[Any]:
    yield Problem
    for one in operations:
        good = one.answer if isinstance(one.answer, tuple) else (one.answer,)
        for kind in (one.body, *good, *one.told.values()):
            if kind is not None and not isinstance(kind, Page):
                yield kind


def _described(one: Operation, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "OK", "content": _content(one.answer, schema_of)}}
    for status in one.all_errors:
        answers[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {PROBLEM_JSON: {"schema": schema_of[repr(one.told.get(status, Problem))]}},
        }
    described: dict[str, Any] = {
        "summary": one.says,
        "operationId": f"{one.method.lower()}_{re.sub(r'[^a-z]+', '_', one.path.strip('/')) or 'page'}",
        "parameters": list(_parameters(one)),
        "responses": answers,
    }
    if one.who != "anyone":
        described["security"] = [{KEYS[one.who][0]: []}]
    if one.body is not None:
        schema = schema_of[repr(one.body)]
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described


def _content(good: Any, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(good, Page):
        return {good.media_type: {"schema": {"type": "string"}}}
    several = isinstance(good, tuple)
    schema = {"anyOf": [schema_of[repr(one)] for one in good]} if several else schema_of[repr(good)]
    return {"application/json": {"schema": schema}}


def _parameters(one: Operation) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", one.path):
        words = one.words.get(name)
        schema = {"enum": list(words)} if words else {"type": "integer", "minimum": 0, "maximum": MAX_ID}
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    for asked in one.query:
        kind = "integer" if asked.whole else "number"
        bounds = {"type": kind, "minimum": asked.least, "maximum": asked.most}
        yield {"name": asked.name, "in": "query", "description": asked.says, "schema": bounds}
