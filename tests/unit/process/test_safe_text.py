"""Text from outside is made safe where it enters."""

import json
import sqlite3

import pytest

from process.safe_text import MAX_WHY, safe_text


@pytest.mark.parametrize(
    "text",
    [
        json.loads('"engine died \\ud800"'),
        "\x00\x1b[2J\r\nfake line\x7f\x9b",
        "right\u202eleft\u2066",
        "x" * 10_000_000,
        "\ud83d",
    ],
)
def test_whatever_is_said_can_be_written_shown_and_stored(text: str) -> None:
    safe = safe_text(text)
    safe.encode()
    sqlite3.connect(":memory:").execute("SELECT ?", (safe,))
    assert len(safe) <= MAX_WHY
    assert safe.isprintable() or "\ufffd" in safe
    assert "\n" not in safe


def test_ordinary_text_stays_as_it_is() -> None:
    said = "vLLM: größe 4096 > 2048, 温度 ok 🙂"
    assert safe_text(said) == said
    assert safe_text("x" * 5, 5) == "xxxxx"
    assert safe_text("x" * 6, 5) == "xxxx…"
