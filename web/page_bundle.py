"""The page's files as one file that needs no server: for the report of a run.

Modules are data: URLs in an import map, which is how browsers take modules without a bundler. The page says
itself, by a Content-Security-Policy, that it loads nothing from anywhere.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parent / "page"
UPLOT = "vendor/uplot-1.6.32"

MODULES = (f"{UPLOT}/uPlot.esm.js", "words.js", "charts.js")
STYLES = (f"{UPLOT}/uPlot.min.css", "page.css")


def self_contained(template: str, script: str, title: str, data: Mapping[str, Any]) -> str:
    """Return a page with all that it needs in it.

    template, script: names of files of the page; the script finds the data as JSON in the element `report`.
    """
    imports = {f"page/{name}": _url(_module(name)) for name in MODULES}
    css = "".join((FOLDER / name).read_text() for name in STYLES)
    parts = {
        "title": escape(title),
        "css": css,
        # What closes the element, or opens a comment, would end the JSON early.
        "report": msgspec.json.encode(data, enc_hook=str).decode().replace("<", "\\u003c"),
        "imports": json.dumps({"imports": imports}),
        "script": _module(script),
    }
    allowed = " ".join(_hash(parts[name]) for name in ("imports", "script"))
    parts["policy"] = (
        f"default-src 'none'; script-src data: {allowed}; style-src {_hash(css)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    found = (FOLDER / template).read_text()
    return re.sub(r"\{(" + "|".join(parts) + r")\}", lambda name: parts[name[1]], found)


def _module(name: str) -> str:
    """Return a module whose imports are names of the import map, not paths of the server."""
    return (FOLDER / name).read_text().replace(' from "/page/', ' from "page/')


def _url(module: str) -> str:
    return "data:text/javascript;base64," + base64.b64encode(module.encode()).decode()


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
