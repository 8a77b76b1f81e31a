"""JSON answers, and the one shape that errors have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from flask import Response
from msgspec import Struct

from web.messages.decoding import BadField


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """A JSON answer. said: an object, or its JSON already encoded."""

    said: Mapping[str, Any] | Struct | bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def payload(self) -> bytes:
        """The bytes of the body."""
        return self.said if isinstance(self.said, bytes) else msgspec.json.encode(self.said)


def error(status: int, code: str, message: str) -> Response:
    """Return an error for Flask."""
    return response(error_answer(status, code, message))


def error_answer(status: int, code: str, message: str, *headers: tuple[str, str]) -> JsonAnswer:
    """Return an error in the one shape that errors have."""
    return JsonAnswer({"error": code, "message": message}, status, headers)


def bad_request(wrong: BadField) -> JsonAnswer:
    """Return the answer to a body that cannot be."""
    return error_answer(400, "bad_request", str(wrong))


def response(answer: JsonAnswer) -> Response:
    """Return the answer for Flask."""
    response = Response(answer.payload, answer.status, mimetype="application/json")
    for name, value in answer.headers:
        response.headers[name] = value
    return response


UNAUTHORIZED = error_answer(
    401, "unauthorized", "this route needs Authorization: Bearer <key>", ("WWW-Authenticate", "Bearer")
)
OUR_FAULT = error_answer(500, "internal_error", "a fault of ours; the log has it")
CLOSING = error_answer(503, "shutting_down", "the server is shutting down: ask again")
