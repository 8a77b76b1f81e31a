"""Routes of our own: status, page, faults, killing."""

import json
from typing import Any

import pytest

from tests.unit.localcloud.api.face import KEY, Face


def test_a_label_with_half_a_character_is_shown(face: Face) -> None:
    face.rent(label="half \ud800")
    assert "half ?" in face.client.get("/").text


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"name": 5},
        {"name": "no-such"},
        {"name": "list-500", "count": 0},
        {"name": "list-500", "odd": 1},
    ],
)
def test_a_fault_that_there_is_not_is_refused(face: Face, body: Any) -> None:
    reply = face.ask("POST", "/localcloud/faults", body)
    assert reply.status_code == 400
    assert face.ask("GET", "/localcloud/faults").get_json()["on"] == []


def test_the_page_says_what_it_is_and_escapes_what_renters_wrote(face: Face) -> None:
    face.rent(label="<script>alert(1)</script>")
    page = face.client.get("/").text
    assert "This is not Vast.ai" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_status_shows_no_script_and_no_key(face: Face) -> None:
    face.rent(onstart="secret-of-a-script")
    shown = json.dumps(face.client.get("/localcloud/status").get_json())
    assert '"engine": "paced"' in shown
    assert "secret-of-a-script" not in shown
    assert KEY not in shown


def test_killing_what_does_not_run_is_refused(face: Face) -> None:
    instance_id = face.rent()
    assert face.ask("POST", f"/localcloud/instances/{instance_id}/kill", {}).status_code == 400
    assert face.ask("POST", "/localcloud/instances/5/kill", {}).status_code == 404
    assert face.ask("POST", f"/localcloud/instances/{instance_id}/kill", {"part": "x"}).status_code == 400
