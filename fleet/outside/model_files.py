"""What a model's own files say: its config.json and the sizes of its weights, from the hub or from a folder.

The hub is that of HF_ENDPOINT, else huggingface.co. A token goes to the hub and to nobody else: requests
drops it where a redirect leads to another host.
"""

import json
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from fleet.outside.beforehand import HUB
from fleet_client.loopback import is_loopback_url
from process.errors import ConfigError
from process.safe_text import safe_text

TIMEOUT_S = 20.0
"""For each answer of the hub; there are three."""

MOST_BYTES = 64 * 2**20
"""Of one answer: the index of the largest models has some MB."""

INDEX = "model.safetensors.index.json"

EMBEDDERS = ("feature-extraction", "sentence-similarity")
"""What the hub calls models that make vectors, and no text."""

POOLING_FILE = "modules.json"
"""A file that only models of sentence-transformers have: they make vectors."""


@dataclass(frozen=True)
class ModelFiles:
    """What was read of a model. stored_bytes: of all its safetensors; None where there are none.

    source: where it was read, with the commit where the hub says it.
    """

    config: Mapping[str, Any]
    stored_bytes: int | None
    pooling: bool
    source: str


def read_folder(folder: Path) -> ModelFiles:
    """Return what the files in a folder say; raise ConfigError where there is no config.json."""
    config = _json_of(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    stored: int | None = sum(path.stat().st_size for path in weights) or None
    if index.is_file():
        stored = _total_size(_json_of(index)) or stored
    return ModelFiles(config, stored, (folder / POOLING_FILE).is_file(), str(folder))


def _json_of(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}: over {MOST_BYTES} bytes")
        said = json.loads(path.read_bytes())
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    except ValueError:
        raise ConfigError(f"{path}: no JSON") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{path}: wanted a JSON object")
    return said


def _total_size(index: Mapping[str, Any]) -> int | None:
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if isinstance(size, int) and 0 < size < 10**14 else None


# -- the hub -----------------------------------------------------------------------------------------------


class HubFiles:
    """Reads a model's files from the hub."""

    def __init__(self, token: str | None, environ: Mapping[str, str] = os.environ) -> None:
        """Ask nothing yet; raise ConfigError for a hub to which a token must not be sent."""
        self._hub = (environ.get("HF_ENDPOINT", "").strip() or HUB).rstrip("/")
        local = is_loopback_url(self._hub)
        if not self._hub.startswith("https://") and not local:
            raise ConfigError(f"HF_ENDPOINT {self._hub!r}: wanted https://…, or a hub on this machine")
        self._token = token
        self._session = requests.Session()
        self._session.trust_env = False  # a .netrc would go before the token
        self._session.proxies = {} if local else urllib.request.getproxies()
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def read(self, repository: str, revision: str = "") -> ModelFiles:
        """Return what the hub says of a model; raise ConfigError with what is to be done where it refuses."""
        at = quote(revision or "main", safe="")
        page = self._json(repository, f"/api/models/{repository}/revision/{at}?blobs=true")
        config = self._json(repository, f"/{repository}/resolve/{at}/config.json")
        files = [f for f in page.get("siblings") or () if isinstance(f, dict)]
        sizes = {str(f.get("rfilename")): f.get("size") for f in files}
        stored: int | None = None
        if INDEX in sizes:
            stored = _total_size(self._json(repository, f"/{repository}/resolve/{at}/{INDEX}"))
        if stored is None:
            weights = [n for name, n in sizes.items() if name.endswith(".safetensors") and "/" not in name]
            stored = sum(n for n in weights if isinstance(n, int)) or None
        pooling = POOLING_FILE in sizes or page.get("pipeline_tag") in EMBEDDERS
        commit = page.get("sha")
        where = f"{self._hub}/{repository}"
        source = f"{where} at {safe_text(commit, 40)}" if isinstance(commit, str) else where
        return ModelFiles(config, stored, pooling, source)

    def _json(self, repository: str, path: str) -> dict[str, Any]:
        try:
            with self._session.get(self._hub + path, timeout=TIMEOUT_S, stream=True) as reply:
                if reply.status_code != 200:
                    raise ConfigError(self._refused(repository, path, reply))
                body = reply.raw.read(MOST_BYTES + 1, decode_content=True)
        except (requests.RequestException, OSError) as e:
            raise ConfigError(f"the hub {self._hub} does not answer: {safe_text(str(e), 200)}") from e
        if len(body) > MOST_BYTES:
            raise ConfigError(f"{self._hub}{path}: over {MOST_BYTES} bytes")
        try:
            said = json.loads(body)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise ConfigError(f"{self._hub}{path}: wanted a JSON object")
        return said

    def _refused(self, repository: str, path: str, reply: requests.Response) -> str:
        code = reply.headers.get("X-Error-Code", "")
        as_who = "with this token" if self._token else "without a token"
        give = "give one of an account that accepted its terms: HF_TOKEN in the environment, or --token-stdin"
        if code == "GatedRepo":
            return f"{repository} is gated, and cannot be read {as_who}: {give}"
        if code == "EntryNotFound":
            return f"{repository} has no {path.rpartition('/')[2]}: it is no model that vLLM can load"
        if code == "RevisionNotFound":
            return f"{repository} has no such revision: correct --revision"
        if code == "RepoNotFound" or reply.status_code == 404:
            return (
                f"the hub shows no {repository} {as_who}: correct its name, or, if it is private, give a "
                "token that may read it: HF_TOKEN in the environment, or --token-stdin"
            )
        if reply.status_code in (401, 403):
            return f"the hub refuses {repository} {as_who} ({reply.status_code}): {give}"
        return f"the hub answers {reply.status_code} to {path}"
