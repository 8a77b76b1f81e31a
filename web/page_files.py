"""The operator's page as files: which there are, with what headers they are served.

Nothing of the fleet is in them, so they need no key. The page may load from this server only, run no script
that stands in it, and be shown in no frame.
"""

import functools
import secrets
from collections.abc import Callable, Mapping
from typing import ParamSpec

from flask import Flask, Response, request

from fleet_client.bearer import bearer_is
from web.answers import error
from web.page_bundle import FOLDER, UPLOT

P = ParamSpec("P")

KINDS: Mapping[str, str] = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "charts.js": "text/javascript",
    "words.js": "text/javascript",
    f"{UPLOT}/uPlot.esm.js": "text/javascript",
    f"{UPLOT}/uPlot.min.css": "text/css",
}
"""File below FOLDER -> its media type; others are not served."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageToken:
    """What only a page of this server can read: a browser must show it to act where no key is set."""

    def __init__(self) -> None:
        """Make one that nobody can guess, for as long as this process lives."""
        self.value = secrets.token_urlsafe(24)

    def required(self, view: Callable[P, Response]) -> Callable[P, Response]:
        """Let the view be reached from a browser only with this token; programs need none."""

        @functools.wraps(view)
        def guarded(*args: P.args, **more: P.kwargs) -> Response:
            from_browser = "Sec-Fetch-Site" in request.headers or "Origin" in request.headers
            shown = request.headers.get("X-Page-Token", "")
            if from_browser and not bearer_is(f"Bearer {shown}", {self.value}):
                return error(
                    403, "no_page_token", "from a browser only the page of this server may act: reload it"
                )
            return view(*args, **more)

        return guarded


def add_page_files(app: Flask, token: PageToken) -> None:
    """Serve the page at / and its files below /page/."""
    index = (FOLDER / "index.html").read_text().replace("{page_token}", token.value)

    @app.get("/")
    def page() -> Response:
        return Response(index, mimetype="text/html", headers=dict(HEADERS))

    for name, kind in KINDS.items():
        content = (FOLDER / name).read_bytes()
        app.add_url_rule(f"/page/{name}", name, _file(content, kind))


def _file(content: bytes, kind: str) -> Callable[[], Response]:
    return lambda: Response(content, mimetype=kind, headers=dict(HEADERS))
