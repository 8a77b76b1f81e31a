"""A hub of models on this machine, with configurations and indexes in the shape of the real ones."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_an_account_that_may"


@dataclass(frozen=True)
class HubModel:
    """One repository. sizes: of its files, bytes; where there are several weights they have an index."""

    config: dict[str, Any] | None
    sizes: dict[str, int]
    gated: bool = False
    pipeline_tag: str = "text-generation"
    revisions: tuple[str, ...] = ("main",)

    def files(self) -> dict[str, bytes]:
        """The small files that can be read."""
        found = {}
        if self.config is not None:
            found["config.json"] = json.dumps(self.config).encode()
        weights = {
            name: n for name, n in self.sizes.items() if name.endswith(".safetensors") and "/" not in name
        }
        if len(weights) > 1:
            tensors = {f"model.layers.{n}.weight": name for n, name in enumerate(weights)}
            index = {"metadata": {"total_size": sum(weights.values())}, "weight_map": tensors}
            found["model.safetensors.index.json"] = json.dumps(index).encode()
        return found


@dataclass
class LoopbackHub:
    """A hub that is running. asked: paths, with the Authorization that came. moved: redirects go there."""

    url: str
    models: dict[str, HubModel]
    asked: list[tuple[str, str]] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)


@contextmanager
def running_hub(models: dict[str, HubModel]) -> Iterator[LoopbackHub]:
    """Serve these models until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = LoopbackHub(f"http://127.0.0.1:{server.server_address[1]}", models)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub: LoopbackHub = self.server.hub  # type: ignore[attr-defined]
        said, path = self.headers.get("Authorization", ""), unquote(urlsplit(self.path).path)
        hub.asked.append((path, said))
        if path in hub.moved:
            self._answer(307, {"Location": hub.moved[path]}, b"")
            return
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            wanted = None
        else:
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, wanted = rest.partition("/")
        self._about(hub.models.get(name), revision, wanted, said == f"Bearer {TOKEN}")

    def _about(self, model: HubModel | None, revision: str, wanted: str | None, allowed: bool) -> None:
        if model is None:
            self._answer(401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif revision not in model.revisions:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        elif wanted is None:
            shown = {name: {"rfilename": name, "size": n} for name, n in model.sizes.items()}
            files = model.files()
            shown |= {name: {"rfilename": name, "size": len(body)} for name, body in files.items()}
            page = {"sha": "a" * 40, "pipeline_tag": model.pipeline_tag, "siblings": list(shown.values())}
            self._answer(200, {}, json.dumps(page | {"gated": model.gated and "manual"}).encode())
        elif model.gated and not allowed:
            self._answer(401, {"X-Error-Code": "GatedRepo"}, b"")
        elif wanted not in model.files():
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        else:
            self._answer(200, {}, model.files()[wanted])

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Be silent."""
