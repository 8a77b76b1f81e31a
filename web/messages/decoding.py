"""Decode the JSON of a message into a struct; an error names the field and says what was wanted."""

import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

T = TypeVar("T")


class BadField(Exception):
    """A message has a wrong field; a server answers 400 and names the field."""

    def __init__(self, name: str, message: str) -> None:
        """Make the error. name: of the field; message: what was wanted, and what came."""
        super().__init__(f"{name}: {message}")


def decode(raw: bytes | msgspec.Raw, kind: type[T], inside: str = "") -> T:
    """Return the message in this JSON as a `kind`; raise BadField when it is none.

    NaN and Infinity are refused: they are not JSON. inside: where the JSON stands in a larger message, as
    "instances[3]".
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        found: T = decoder.decode(raw)
    except msgspec.ValidationError as e:
        raise _bad_field(str(e), kind, inside) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise BadField(inside or "body", f"not JSON: {e}") from None
    return found


def fits(raw: bytes | msgspec.Raw, kind: Any) -> bool:
    """Return whether this JSON is a message, or a value, of that kind."""
    try:
        decode(raw, kind)
    except BadField:
        return False
    return True


_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {}

_WHERE = re.compile(r"(?P<what>.*) - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`", re.DOTALL)
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_NAMED = re.compile(r"[a-z_0-9\[\]]+: ")


def _bad_field(text: str, kind: type[Any], inside: str) -> BadField:
    """Turn an error of msgspec, "Expected `int` >= 0 - at `$.ended[3].tokens`", into one of ours."""
    found = _WHERE.fullmatch(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    name = ""
    if about := _FIELD.fullmatch(what):
        name, what = about[2][:60], "is missing" if about[1] == "missing required" else "unknown field"
    elif _NAMED.match(what):  # from a __post_init__
        name, _, what = what.partition(": ")
    elif what.startswith("Invalid enum value"):
        what = f"wanted one of {', '.join(_choices(kind, path))}"
    elif what.endswith("out of range"):
        what = "wanted a number of usual size"
    what = what.replace("Expected", "wanted", 1) + (" as a key" if found and found["key"] else "")
    return BadField(".".join(part for part in (inside, path, name) if part) or "body", what)


def _choices(kind: type[Any], path: str) -> list[str]:
    """Return the words that are allowed in the field at that path of a message."""
    parts: list[Any] = []
    for name in re.sub(r"\[[^]]*\]", "", path).split("."):
        parts = list(_parts(get_type_hints(kind)[name]))
        kind = next((p for p in parts if isinstance(p, type) and issubclass(p, msgspec.Struct)), kind)
    return [word for part in parts if get_origin(part) is Literal for word in get_args(part)]


def _parts(hint: Any) -> Iterator[Any]:
    """Yield a type, and all the types that it is made of."""
    yield hint
    if get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from _parts(part)
