"""A hub on this machine on which one model is gated: what a token may read, in the hub's own words."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def gated_hub(model: str, token: str) -> Iterator[str]:
    """Serve a hub that shows the model to that token only; yield its URL."""

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            said = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if self.path.startswith(f"/{model}/") and said == token:
                self._say(200)
            elif said and said != token:
                self._say(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
            elif self.path.startswith(f"/{model}/"):
                self._say(
                    401, **{"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {model} is gated"}
                )
            else:
                self._say(404, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        do_GET = do_HEAD

        def _say(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
