"""What a program reads when something goes wrong: what happened, whose turn it is, what to do."""

import pytest

from tests import texts_page


@pytest.fixture(scope="module")
def table() -> str:
    """The table, made anew: each case happens."""
    return texts_page.table()


def test_the_page_has_the_texts_that_programs_get(table: str) -> None:
    assert texts_page.BEGIN + table + texts_page.END in texts_page.PAGE.read_text(), "make texts"


def test_no_text_misleads(table: str) -> None:
    """What was seen in use: a loadbalancer that is down looked like TLS, and more."""
    rows = {row.split(" | ")[0].strip("| "): row for row in table.splitlines()[2:]}
    assert len(rows) == len(texts_page.CASES)
    assert not any(
        word in table for word in ("ssl:default", "instance_failed", "Traceback", "has been told of")
    )
    assert "has been told" not in rows["nothing is hot, and no autoscaler was ever there"]
    assert "wait_s" not in rows["nothing is hot yet, and the request was held"]
    assert "401" not in rows["the loadbalancer wants a key (gateway)"]
    assert "503" in rows["the same, `GET /health` of the gateway"]
