"""The page's files: what is served, with which headers, and who may act."""

import re
from typing import Any

import pytest
from flask import Flask, Response, jsonify

from web.app import make_app
from web.page_bundle import FOLDER
from web.page_files import KINDS, PageToken, add_page_files

BROWSER = {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost", "Content-Type": "application/json"}


@pytest.fixture
def token() -> PageToken:
    return PageToken()


@pytest.fixture
def app(token: PageToken) -> Flask:
    app = make_app("test")
    add_page_files(app, token)

    @app.post("/act")
    @token.required
    def act() -> Response:
        return jsonify(done=True)

    return app


def test_the_page_may_load_from_its_own_server_only(app: Flask) -> None:
    for path in ("/", *(f"/page/{name}" for name in KINDS)):
        answer = app.test_client().get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert app.test_client().get("/page/vendor").status_code == 404
    assert app.test_client().get("/page/../page_files.py").status_code == 404


def test_nothing_in_our_files_needs_another_server_or_stands_inline() -> None:
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|<style|\bon\w+=|style=", html)
    ours = [html, *((FOLDER / name).read_text() for name in KINDS if "vendor" not in name)]
    for text in ours:
        assert not re.search(r"(https?:)?//[a-z]", text.replace("/* ", "")), text[:60]
        for path in re.findall(r'(?:from|href=|src=)\s*"(/page/[^"]+)"', text):
            assert path.removeprefix("/page/") in KINDS, path


def test_each_file_of_the_folder_is_served_or_in_a_report_or_is_the_licence() -> None:
    there = {str(f.relative_to(FOLDER)) for f in FOLDER.rglob("*") if f.is_file()}
    licence = {name for name in there if name.endswith("LICENSE")}
    in_reports = {"report.html", "report.js"}  # web/page_bundle.py
    assert there == set(KINDS) | {"index.html"} | in_reports | licence
    assert len(licence) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl
        (BROWSER, 403),
        (BROWSER | {"X-Page-Token": "guessed"}, 403),
        ({"Sec-Fetch-Site": "none", "Content-Type": "application/json"}, 403),
    ],
)
def test_a_browser_acts_with_the_pages_token_only(app: Flask, headers: dict[str, Any], status: int) -> None:
    assert app.test_client().post("/act", headers=headers).status_code == status


def test_the_page_has_the_token(app: Flask, token: PageToken) -> None:
    html = app.test_client().get("/").text
    assert f'content="{token.value}"' in html
    answer = app.test_client().post("/act", headers=BROWSER | {"X-Page-Token": token.value})
    assert answer.status_code == 200
