"""Messages are decoded into structs; what is wrong with one is said with the name of the field."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from web.messages.decoding import BadField, decode


class Inner(Struct, forbid_unknown_fields=True):
    work: Annotated[float, Meta(ge=0.0, le=10.0)]
    kind: Literal["a", "b"] = "a"


class Outer(Struct, forbid_unknown_fields=True):
    whole: Annotated[int, Meta(ge=0, le=10)] = 0
    number: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    text: Annotated[str, Meta(min_length=1, max_length=3)] = "x"
    form: Annotated[str, Meta(pattern=r"\A[a-c]{1,3}\Z")] | None = None
    yes: bool = False
    word: Literal["a", "b"] | None = None
    some: Annotated[list[Annotated[int, Meta(ge=0, le=9)]], Meta(max_length=2)] | None = None
    list: tuple[Inner, ...] = ()
    named: Mapping[Annotated[int, Meta(ge=0)], Inner] = {}


class Needs(Struct):
    a: int
    b: int | None = None


def said(**fields: object) -> bytes:
    return msgspec.json.encode(fields)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("whole", 10, 10),
        ("number", 10, 10.0),
        ("number", 0.5, 0.5),
        ("text", "abc", "abc"),
        ("form", "abc", "abc"),
        ("form", None, None),
        ("yes", True, True),
        ("word", "b", "b"),
        ("some", [1, 2], [1, 2]),
        ("list", [{"work": 1}], (Inner(1.0),)),
        ("named", {"7": {"work": 1}}, {7: Inner(1.0)}),
    ],
    ids=str,
)
def test_a_good_value_passes(name: str, value: object, found: object) -> None:
    assert getattr(decode(said(**{name: value}), Outer), name) == found


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("whole", [-1], "wanted `int` >= 0"),
        ("whole", [11], "wanted `int` <= 10"),
        ("whole", [1.0, "1", None, True, [1]], "wanted `int`, got"),
        ("number", [-0.1], "wanted `float` >= 0.0"),
        ("number", [10.1], "wanted `float` <= 10.0"),
        ("number", ["1", None, False, float("nan"), float("inf")], "wanted `float`, got"),
        ("text", ["", "abcd"], "wanted `str` of length"),
        ("text", [1, None, ["a"]], "wanted `str`, got"),
        ("form", ["", "abca", "d", "ad", "a\n"], "wanted `str` matching regex"),
        ("yes", [0, 1, "true", None], "wanted `bool`, got"),
        ("word", ["c", ""], "wanted one of a, b"),
        ("some", [[1, 2, 3]], "wanted `array` of length <= 2"),
        ("some", [1, "12", {"0": 1}], "wanted `array | null`, got"),
        ("named", [[], 1, None], "wanted `object`, got"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_the_name_of_its_field(name: str, values: Any, wanted: str) -> None:
    for value in values:
        with pytest.raises(BadField) as e:
            decode(said(**{name: value}), Outer)
        assert str(e.value).startswith(f"{name}: {wanted}")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"some": [1, -1]}', "some[1]: wanted `int` >= 0"),
        (b'{"list": [{"work": 1}, {"work": -1}]}', "list[1].work: wanted `float` >= 0.0"),
        (b'{"list": [{"work": 1, "kind": "c"}]}', "list[0].kind: wanted one of a, b"),
        (b'{"list": [{}]}', "list[0].work: is missing"),
        (b'{"list": [{"work": 1, "colour": 1}]}', "list[0].colour: unknown field"),
        (b'{"named": {"7": {"work": "1"}}}', "named[...].work: wanted `float`, got `str`"),
        (b'{"named": {"x": {"work": 1}}}', "named: wanted `int`, got `str` as a key"),
        (b'{"named": {"-7": {"work": 1}}}', "named: wanted `int` >= 0 as a key"),
        (b'{"colour": 1}', "colour: unknown field"),
        (b'{"number": 1e400}', "number: wanted a number of usual size"),
        (b'{"whole": ' + b"9" * 5000 + b"}", "whole: wanted a number of usual size"),
    ],
)
def test_an_error_says_where_it_is(raw: bytes, text: str) -> None:
    with pytest.raises(BadField) as e:
        decode(raw, Outer)
    assert str(e.value) == text
    with pytest.raises(BadField) as e:
        decode(raw, Outer, "instances[3]")
    assert str(e.value) == f"instances[3].{text}"


def test_a_missing_field_is_named_and_an_optional_one_may_be_absent_or_null() -> None:
    with pytest.raises(BadField, match=r"^a: is missing"):
        decode(b'{"b": 1}', Needs)
    assert decode(b'{"a": 1}', Needs) == decode(b'{"a": 1, "b": null}', Needs) == Needs(1)


def test_an_unknown_field_is_ignored_where_two_versions_of_ours_may_meet() -> None:
    assert decode(b'{"a": 1, "new": [{}]}', Needs) == Needs(1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe",
        b'{"z": ' + b"[" * 100_000,
        b'{"a": 1} x',
        b'{"a": 1,}',
    ],
    ids=["empty", "cut", "word", "nan", "infinity", "not-utf8", "deep", "more", "comma"],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadField, match=r"^body: not JSON"):
        decode(raw, Needs)
    with pytest.raises(BadField, match=r"^instances\[3\]: not JSON"):
        decode(raw, Needs, "instances[3]")


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_json_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadField, match=r"^body: wanted `object`"):
        decode(raw, Needs)


def test_a_long_value_or_name_is_not_repeated() -> None:
    secret = "the quick brown fox" * 100
    for raw in (said(text=secret), said(word=secret), said(form=secret), said(**{secret: 1})):
        with pytest.raises(BadField) as e:
            decode(raw, Outer)
        assert len(str(e.value)) < 120


def test_numbers_that_json_does_not_have_are_refused_and_not_made() -> None:
    assert msgspec.json.encode({"x": math.nan}) == b'{"x":null}'
