"""What an answer must be: a call of a tool, JSON of a schema, one of some choices; else placeholder text.

vLLM makes models keep to it; here the least JSON that fits is written down and cut into tokens of four
characters. With tool_choice auto the first tool is called, unless the last message is a tool's result: so a
program that answers calls comes to an end.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHARACTERS_A_TOKEN = 4

DEEPEST = 12
"""Levels of a schema that are written; below, and where it refers to itself, it is null."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer must be.

    pieces: the tokens of the text, None: placeholder text as long as it comes. tool: whose arguments it is.
    finish: why the answer ends where it is whole.
    """

    pieces: tuple[str, ...] | None = None
    tool: str | None = None
    finish: str = "stop"

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole; the name of a tool is one. None: as they come."""
        return None if self.pieces is None else len(self.pieces) + (self.tool is not None)


PLACEHOLDER = Shape()


def of_text(text: str) -> Shape:
    """Return the shape of an answer that is exactly that text."""
    return Shape(cut(text))


def of_call(name: str, parameters: object, finish: str) -> Shape:
    """Return the shape of a call of that tool. parameters: the schema of its arguments."""
    return Shape(cut(json.dumps(least(parameters or {"type": "object"}))), name, finish)


def cut(text: str) -> tuple[str, ...]:
    """Return the tokens of a text."""
    return tuple(text[at : at + CHARACTERS_A_TOKEN] for at in range(0, len(text), CHARACTERS_A_TOKEN))


def least(schema: object) -> Any:
    """Return the least value that a JSON schema takes."""
    return _least(schema, schema if isinstance(schema, dict) else {}, 0)


def _least(schema: object, root: Mapping[str, Any], depth: int) -> Any:
    if not isinstance(schema, dict) or depth > DEEPEST:
        return None
    if isinstance(schema.get("$ref"), str):
        return _least(_referred(schema["$ref"], root), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for name in ("anyOf", "oneOf"):
        if schema.get(name):
            return _least(schema[name][0], root, depth + 1)
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for one in schema["allOf"]:
            merged |= _referred(one["$ref"], root) if isinstance(one, dict) and "$ref" in one else one
        return _least(merged, root, depth + 1)
    return _of_kind(schema, root, depth)


def _of_kind(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> Any:
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        fields = schema.get("properties") or {}
        wanted = schema.get("required") or list(fields)
        return {name: _least(fields.get(name, {}), root, depth + 1) for name in wanted}
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        count = max(int(schema.get("minItems", 1)), len(schema.get("prefixItems") or ()))
        return [_least(items[min(n, len(items) - 1)], root, depth + 1) for n in range(min(count, 100))]
    if kind in ("integer", "number"):
        return _number(schema, whole=kind == "integer")
    if kind == "string":
        return _text(schema)
    return kind == "boolean" or None


def _number(schema: Mapping[str, Any], *, whole: bool) -> float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    value = low + 1 if "exclusiveMinimum" in schema and "minimum" not in schema else low
    if (step := schema.get("multipleOf")) is not None:
        value = math.ceil(value / step) * step
    value = min(value, schema.get("maximum", math.inf))
    return math.ceil(value) if whole else float(value)


_FORMATS = {
    "date": "2026-11-30",
    "date-time": "2026-11-30T00:00:00Z",
    "time": "00:00:00",
    "email": "a@b.example",
}
_FORMATS |= {"uri": "http://localhost/", "uuid": "00000000-0000-4000-8000-000000000000", "ipv4": "127.0.0.1"}


def _text(schema: Mapping[str, Any]) -> str:
    text = _FORMATS.get(str(schema.get("format")), "placeholder")
    return text.ljust(min(int(schema.get("minLength", 0)), 10_000), ".")[: schema.get("maxLength")]


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(part) if isinstance(found, dict) else None
    return found
