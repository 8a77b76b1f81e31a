"""JSON answers of our HTTP servers, and the one shape that their errors have (RFC 9457)."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from flask import Response
from msgspec import Struct

from web.messages.decoding import BadField

PROBLEM_TYPE = "urn:autoscaler-py:problem:"
"""Beginning of a problem's type, which ends in its code."""


class Problem(Struct, frozen=True):
    """An error of a server, by RFC 9457.

    error: a code for programs, with which type ends. message: a sentence for people, the same as detail.
    """

    error: str
    message: str
    type: str
    title: str
    status: int
    detail: str


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """An HTTP answer in JSON. said: an object, or JSON that is encoded already."""

    said: Mapping[str, Any] | Struct | bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def content_type(self) -> bytes:
        """The media type of the answer."""
        return b"application/json" if self.status < 400 else b"application/problem+json"

    @property
    def payload(self) -> bytes:
        """The body of the answer, as bytes of JSON."""
        return self.said if isinstance(self.said, bytes) else msgspec.json.encode(self.said)


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """An HTTP answer in another format than JSON."""

    payload: bytes
    content_type: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


Answer = JsonAnswer | PageAnswer


def error(status: int, code: str, message: str) -> Response:
    """Return an error answer as a Flask response: HTTP status, a code for programs, a message for people."""
    return response(error_answer(status, code, message))


def error_answer(status: int, code: str, message: str, *headers: tuple[str, str]) -> JsonAnswer:
    """Return an error answer: HTTP status, a code for programs, a message for people, and headers."""
    return JsonAnswer(problem(status, code, message), status, headers)


def problem(status: int, code: str, message: str, **more: Any) -> dict[str, Any]:
    """Return the fields of a Problem, and more that this kind of problem says."""
    title = HTTPStatus(status).phrase
    return {
        "error": code,
        "message": message,
        "type": PROBLEM_TYPE + code,
        "title": title,
        "status": status,
        "detail": message,
        **more,
    }


def bad_request(wrong: BadField) -> JsonAnswer:
    """Return the answer 400 to a request whose body has a wrong field."""
    return error_answer(400, "bad_request", str(wrong))


def response(answer: Answer) -> Response:
    """Return an answer as a Flask response."""
    response = Response(answer.payload, answer.status, content_type=answer.content_type.decode("latin-1"))
    for name, value in answer.headers:
        response.headers[name] = value
    return response


UNAUTHORIZED = error_answer(
    401, "unauthorized", "this route needs Authorization: Bearer <key>", ("WWW-Authenticate", "Bearer")
)
OUR_FAULT = error_answer(500, "internal_error", "a fault of ours; the log has it")
CLOSING = error_answer(503, "shutting_down", "the server is shutting down: ask again")
