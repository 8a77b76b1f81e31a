"""What an operator may be told, and the page that says what to do about it, hold together."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet import evidence, planner
from fleet.outside.own_health import REASONS
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "operating.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "fleet").rglob("*.py"), *(ROOT / "dispatch").rglob("*.py")]

LEAST = 6
"""Characters of a constant part of a sentence by which it is found on the page."""


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def reasons() -> set[str]:
    """The word of every Reason that the code makes."""
    found = set()
    for path in SOURCES:
        for call in calls(path):
            if isinstance(call.func, ast.Name) and call.func.id == "Reason":
                [word] = constant_parts(call.args[0], {})
                found.add(word)
    return found


def constant_parts(node: ast.expr, names: dict[str, object]) -> list[str]:
    """The constant parts of a text that is put together, in order."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return [str(v.value) for v in values if isinstance(v, ast.Constant)]
        case ast.Name(id=name):
            return [str(names[name])]
    raise AssertionError(f"a note that is not written out: {ast.unparse(node)}")


def notes() -> list[list[str]]:
    """The constant parts of every note that a decision may have."""
    return [
        constant_parts(call.args[0], vars(planner))
        for name in ("planner", "limits")
        for call in calls(ROOT / "fleet" / f"{name}.py")
        if ast.unparse(call.func) == "self._notes.append"
    ] + [[planner.NOT_BELIEVED]]


def evidences() -> list[list[str]]:
    """The constant parts of the evidence of every Destroy that does not come from the policy."""
    return [
        constant_parts(call.args[3], {})
        for path in (ROOT / "fleet" / "planner.py", ROOT / "fleet" / "outside" / "turns.py")
        for call in calls(path)
        if ast.unparse(call.func) == "Destroy" and isinstance(call.args[3], ast.Constant | ast.JoinedStr)
    ]


def is_on_page(parts: list[str]) -> bool:
    """Whether a part of it that can be recognised stands in code on the page."""
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
    texts = [part.strip(" :") for whole in quoted for part in whole.split("…")]
    return any(len(text) >= LEAST and any(text in part.strip() for part in parts) for text in texts)


def test_every_reason_of_health_has_a_line_that_says_what_to_do() -> None:
    told = set(re.findall(r"^- `([a-z_]+)`: ", PAGE, re.M))
    assert len(reasons()) >= 6
    assert told == reasons(), "a reason without a line, or a line without a reason"


@pytest.mark.parametrize("parts", notes(), ids="…".join)
def test_every_note_of_a_decision_is_on_the_page(parts: list[str]) -> None:
    assert is_on_page(parts)


@pytest.mark.parametrize("parts", evidences(), ids="…".join)
def test_every_evidence_for_a_destroy_is_on_the_page(parts: list[str]) -> None:
    assert is_on_page(parts)


def test_the_sentences_of_unknown_that_need_an_operator_are_on_the_page() -> None:
    source = Path(evidence.__file__).read_text()
    for sentence in (
        "our own network is not known to work",
        "no other machine shows that our own network works",
    ):
        assert sentence in source
        assert f"`{sentence}`" in PAGE


def test_every_test_that_security_names_exists() -> None:
    """`::name` alone is in the file that was named before it on its line."""
    named = 0
    for line in SECURITY.splitlines():
        path = ""
        for file, test in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", line):
            path = file or path
            assert re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.M), f"{path}::{test}"
            named += 1
    assert named > 20


def test_every_reason_is_a_row_of_the_metrics_page() -> None:
    assert set(REASONS) == reasons()
