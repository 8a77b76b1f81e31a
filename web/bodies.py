"""Check the JSON bodies of requests, field by field."""

import json
import re
from collections.abc import Iterator
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from typing import Any, NoReturn

from flask import request

from web.messages.decoding import BadField

# -- bodies ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A string of so many characters. form: a regular expression for all of it, and in words for people."""

    least: int
    most: int
    optional: bool = False
    form: tuple[re.Pattern[str], str] | None = None

    def check(self, name: str, value: object) -> str:
        """The value, or BadField."""
        if not isinstance(value, str) or not self.least <= len(value) <= self.most:
            raise BadField(
                name, f"wanted text of {self.least} to {self.most} characters, got {_shown(value)}"
            )
        if self.form is not None and self.form[0].fullmatch(value) is None:
            raise BadField(name, f"wanted {self.form[1]}, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    least: int
    most: int
    optional: bool = False

    def check(self, name: str, value: object) -> int:
        """The value, or BadField. true and false are no numbers here."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            raise BadField(name, f"wanted a whole number {self.least} to {self.most}, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number in a range."""

    least: float
    most: float
    optional: bool = False

    def check(self, name: str, value: object) -> float:
        """The value as float, or BadField."""
        # The range also refuses NaN, infinity and whole numbers too long for a float.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not self.least <= value <= self.most
        ):
            raise BadField(name, f"wanted a number {self.least:g} to {self.most:g}, got {_shown(value)}")
        return float(value)


@dataclass(frozen=True)
class Boolean:
    """true or false."""

    optional: bool = False

    def check(self, name: str, value: object) -> bool:
        """The value, or BadField."""
        if not isinstance(value, bool):
            raise BadField(name, f"wanted true or false, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]
    optional: bool = False

    def check(self, name: str, value: object) -> str:
        """The value, or BadField."""
        if not isinstance(value, str) or value not in self.words:
            raise BadField(name, f"wanted one of {', '.join(self.words)}, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class Mapping:
    """A JSON object; its inside is checked by the view."""

    optional: bool = False

    def check(self, name: str, value: object) -> dict[str, Any]:
        """The value, or BadField."""
        if not isinstance(value, dict):
            raise BadField(name, f"wanted an object, got {_shown(value)}")
        return value


@dataclass(frozen=True)
class ListOf:
    """A list of at most so many of one kind."""

    kind: "Field"
    most: int
    optional: bool = False

    def check(self, name: str, value: object) -> list[Any]:
        """The value, or BadField naming the entry."""
        if not isinstance(value, list) or len(value) > self.most:
            raise BadField(name, f"wanted a list of at most {self.most}, got {_shown(value)}")
        check = self.kind.check
        try:
            return [check(name, one) for one in value]
        except BadField:  # which one is looked for only now: to name every one takes as long as to check it
            return [check(f"{name}[{n}]", one) for n, one in enumerate(value)]


Field = Text | Whole | Number | Boolean | Choice | Mapping | ListOf


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # JSON may be nested as deep as we can just read it
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def check_fields(said: object, fields: MappingType[str, Field], inside: str = "") -> dict[str, Any]:
    """The object with every field checked; BadField names the first that is wrong, missing or unknown.

    inside: what to put before the names, as in "instances[3].". Absent optional fields stay absent.
    """
    if not isinstance(said, dict):
        raise BadField(inside.rstrip(".") or "body", f"wanted a JSON object, got {_shown(said)}")
    for name in said:
        if name not in fields:
            raise BadField(inside + _shown(name)[1:-1], f"unknown field; known are {', '.join(fields)}")
    out: dict[str, Any] = {}
    for name, kind in fields.items():
        if name in said and not (kind.optional and said[name] is None):
            out[name] = kind.check(inside + name, said[name])
        elif not kind.optional:
            raise BadField(inside + name, "is missing")
    return out


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one a call: 20 µs


def parse_json(raw: bytes) -> Any:
    """The JSON in raw, NaN and Infinity refused; raises BadField."""
    try:
        return _DECODER.decode(raw.decode())
    except (ValueError, RecursionError) as e:
        raise BadField("body", f"not JSON: {e}") from None


_SPACE = re.compile(r"[ \t\n\r]*")


def json_parts(raw: bytes, name: str) -> Iterator[tuple[str, Any, bool]]:
    """(field, value, False) of the JSON object in raw; a list under that name comes empty.

    Then its entries come one by one, with True: so a long list is not decoded in one go, in which nothing
    else happens. Raises BadField.
    """
    try:
        text = raw.decode()
        at = _after(text, 0, "{")
        more = text[at : at + 1] != "}"
        while more:
            if text[at : at + 1] != '"':
                _after(text, at, '"')
            key, at = _DECODER.raw_decode(text, at)
            at = _after(text, at, ":")
            if key == name and text[at : at + 1] == "[":
                yield key, [], False
                at = _after(text, at, "[")
                more = text[at : at + 1] != "]"
                while more:
                    value, at = _DECODER.raw_decode(text, at)
                    yield key, value, True
                    more, at = _comma(text, at)
                at = _after(text, at, "]")
            else:
                value, at = _DECODER.raw_decode(text, at)
                yield key, value, False
            more, at = _comma(text, at)
        at = _after(text, at, "}")
        if at < len(text):
            _after(text, at, "")
    except (ValueError, RecursionError) as e:
        raise BadField("body", f"not JSON: {e}") from None


def _comma(text: str, at: int) -> tuple[bool, int]:
    """Whether a comma comes, and where it goes on after it."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    return (True, _after(text, at, ",")) if text[at : at + 1] == "," else (False, at)


def _after(text: str, at: int, sign: str) -> int:
    """Where it goes on after that sign, or the end, and spaces around it."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text[at : at + 1] != sign:
        raise ValueError(f"wanted {sign or 'the end'} at character {at}")
    return _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]


def json_body(most: int | None = None) -> Any:
    """The JSON of the request being served, unchecked; most: bytes, where a path may have larger bodies."""
    if most is not None:
        request.max_content_length = most
    return parse_json(request.get_data(cache=False))


def body(fields: MappingType[str, Field]) -> dict[str, Any]:
    """The checked body of the request being served."""
    return check_fields(json_body(), fields)


def query_number(name: str, default: float, least: float, most: float) -> float:
    """A number of the query string, or the default."""
    raw = request.args.get(name)
    if raw is None:
        return default
    try:
        return Number(least, most).check(name, float(raw))
    except ValueError:
        raise BadField(name, f"wanted a number, got {_shown(raw)}") from None
