"""An app with one of each kind of view."""

import threading
from typing import Annotated, Any

from flask import Flask, jsonify
from msgspec import Meta, Struct

from tests.web_server import KEY
from web.answers import JsonAnswer
from web.app import QueryNumber, body, make_app, requires
from web.direct import DirectRoutes


class Digit(Struct, forbid_unknown_fields=True):
    """A body with a number of one digit."""

    n: Annotated[int, Meta(ge=0, le=9)]


class Empty(Struct, forbid_unknown_fields=True):
    """A body that says nothing."""


def sample_app() -> Flask:
    app = make_app("test", large_bodies={"/large": 200_000})

    @app.post("/echo")
    def echo() -> Any:
        return jsonify(n=body(Digit).n)

    @app.post("/large")
    def large() -> Any:
        return jsonify(size=len(body(str)))

    @app.get("/broken")
    def broken() -> Any:
        raise RuntimeError("secret detail")

    @app.get("/number")
    def number() -> Any:
        return jsonify(QueryNumber("x", "A number.", 0.0, 9.0).asked(7.0))

    @app.get("/guarded")
    @requires(lambda: {KEY, "another-key-of-16"})
    def guarded() -> Any:
        return jsonify(fine=True)

    @app.get("/slow")
    def slow() -> Any:
        return jsonify(thread=threading.current_thread().name)

    @DirectRoutes(app).post("/direct", Digit, lambda: {KEY})
    def direct(said: Digit, client: str) -> JsonAnswer:
        if said.n == 9:
            raise RuntimeError("secret detail")
        return JsonAnswer({"n": said.n}, 200, (("X-Kind", "direct"),))

    return app
