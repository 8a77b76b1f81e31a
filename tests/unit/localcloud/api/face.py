"""The local cloud's face in one process, with a clock that a test moves."""

from pathlib import Path
from random import Random
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from localcloud.api import create_app
from localcloud.cloud import Cloud
from localcloud.machines import MACHINES
from localcloud.realism import NONE, Realism
from localcloud.world import World

KEY = "k-of-a-test-0123456789"


AUTH = {"Authorization": f"Bearer {KEY}"}


OFFER = 4201 * 100


ORDER: dict[str, Any] = {
    "client_id": "me",
    "image": "vllm/vllm-openai:x",
    "env": {"A": "1", "-p 8000:8000": "1"},
    "disk": 40.0,
    "label": "fleet/a",
    "onstart": "echo hi",
    "price": None,
    "runtype": "ssh_direc ssh_proxy",
    "cancel_unavail": True,
}


class Face:
    """A face whose world never runs: time stands still unless `now` is moved."""

    def __init__(self, root: Path, realism: Realism = NONE) -> None:
        self.now = 1000.0
        self.cloud = Cloud(MACHINES, Random(1), speedup=60.0, realism=realism)
        self.world = World(self.cloud, root / "cloud", "paced", clock=lambda: self.now)
        self.client: FlaskClient = create_app(self.world, KEY).test_client()

    def ask(self, method: str, path: str, body: Any = None, headers: Any = AUTH) -> TestResponse:
        return self.client.open(path, method=method, json=body, headers=headers)

    def rent(self, **other: Any) -> int:
        reply = self.ask("PUT", f"/api/v0/asks/{other.pop('offer', OFFER)}/", {**ORDER, **other})
        assert reply.status_code == 200, reply.text
        return int(reply.get_json()["new_contract"])

    def listing(self, query: str = "") -> Any:
        return self.ask("GET", f"/api/v1/instances/{query}").get_json()

    def fault(self, name: str, **args: Any) -> None:
        reply = self.ask("POST", "/localcloud/faults", {"name": name, **args})
        assert reply.status_code == 201, reply.text
