"""Bodies of requests are checked field by field."""

import json
import re
from typing import Any

import pytest

from web.bodies import (
    Boolean,
    Choice,
    Field,
    ListOf,
    Mapping,
    Number,
    Text,
    Whole,
    check_fields,
    json_parts,
    parse_json,
)
from web.messages.decoding import BadField


def nested(deep: int) -> list[Any]:
    """A list in a list in a list, as JSON may have it."""
    found: list[Any] = []
    for _ in range(deep):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Whole(0, 10), 10),
        (Number(0.0, 10.0), 10),
        (Number(0.0, 10.0), 0.5),
        (Text(1, 3), "abc"),
        (Boolean(), False),
        (Choice(("a", "b")), "b"),
        (ListOf(Whole(0, 9), 2), [1, 2]),
        (Mapping(), {"x": 1}),
    ],
    ids=str,
)
def test_a_good_value_passes(field: Field, value: object) -> None:
    assert check_fields({"f": value}, {"f": field}) == {"f": value}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (Whole(0, 10), [-1, 11, 1.0, "1", None, True, [1], 10**400]),
        (
            Number(0.0, 10.0),
            [-0.1, 10.1, "1", None, False, float("nan"), float("inf"), -float("inf"), 10**400],
        ),
        (Text(1, 3), ["", "abcd", 1, None, ["a"]]),
        (Text(1, 3, form=(re.compile("[a-c]*"), "a to c")), ["", "abca", 1, "d", "ad", "a\n"]),
        (Boolean(), [0, 1, "true", None]),
        (Choice(("a", "b")), ["c", 1, None, ["a"]]),
        (ListOf(Whole(0, 9), 2), [[1, 2, 3], [1, -1], ["1"], 1, "12", {"0": 1}]),
        (ListOf(Whole(0, 9), 9), [nested(900)]),
        (Mapping(), [[], 1, "x", None]),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_the_name_of_its_field(field: Field, values: list[object]) -> None:
    for value in values:
        with pytest.raises(BadField, match=r"^f(\[\d\])?: wanted"):
            check_fields({"f": value}, {"f": field})


def test_a_missing_field_is_named_and_an_optional_one_may_be_absent_or_null() -> None:
    fields = {"a": Whole(0, 9), "b": Whole(0, 9, optional=True)}
    with pytest.raises(BadField, match=r"^a: is missing"):
        check_fields({"b": 1}, fields)
    assert check_fields({"a": 1}, fields) == {"a": 1}
    assert check_fields({"a": 1, "b": None}, fields) == {"a": 1}


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(BadField, match=r"^list\[3\]\.colour: unknown field; known are a"):
        check_fields({"a": 1, "colour": 2}, {"a": Whole(0, 9)}, "list[3].")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000,
    ],
    ids=["empty", "cut", "word", "nan", "infinity", "not-utf8", "deep", "long-number"],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadField, match=r"^body: not JSON"):
        parse_json(raw)


@pytest.mark.parametrize("said", [[], 1, "x", None, True], ids=str)
def test_json_that_is_no_object_is_refused(said: object) -> None:
    with pytest.raises(BadField, match=r"^body: wanted a JSON object"):
        check_fields(said, {})


def rebuilt(raw: bytes) -> Any:
    """What the parts say, as one."""
    out: dict[str, Any] = {}
    for name, value, entry in json_parts(raw, "list"):
        if entry:
            out[name].append(value)
        else:
            out[name] = value
    return out


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"a": 1},
        {"list": []},
        {"list": [1]},
        {"list": [[], {}, "x,]}", [1, [2]], None]},
        {"a": {"list": [1, 2]}, "list": [{"list": [3]}], "b": [4, 5], "c": "}"},
        {"list": {"not": "a list"}},
        {"list": 5, "ü": "\u2028"},
    ],
    ids=str,
)
def test_json_read_in_parts_is_the_same_json(said: dict[str, Any]) -> None:
    for indent in (None, 1):
        assert rebuilt(json.dumps(said, indent=indent).encode()) == said
        assert rebuilt(b" \n" + json.dumps(said, ensure_ascii=False).encode() + b"\t ") == said


def test_what_is_not_json_is_refused_in_parts_too() -> None:
    whole = json.dumps({"a": 1, "list": [1, {"b": 2}], "c": "d"}).encode()
    bad = [whole[:n] for n in range(len(whole))]
    bad += [whole + b"x", whole + whole, b"[]", b"5", b'{"a": 1,}', b'{"list": [1,]}', b'{"list": [1 2]}']
    bad += [b"{5: 1}", b"{'a': 1}", b'{"a" 1}', b'{"list": [NaN]}', b'{"a": Infinity}', b"\xff", b"{,}"]
    bad += [b'{"list": [' + b"[" * 100_000 + b"]}"]
    for raw in bad:
        with pytest.raises(BadField, match=r"^body: not JSON"):
            rebuilt(raw)
