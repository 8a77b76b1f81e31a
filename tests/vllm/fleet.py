"""How these tests talk to the fleet: the one place that knows of leases, tokens and certificates."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx2
import openai

from fleet_client import FleetTransport
from fleet_client.tls_pins import context_for
from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import ENGINES

BOOT_S = 200.0
"""From an order to hot: 30 to 60 s, and more when somebody else uses the processor."""

INSTANCES = 2
MODEL = ENGINES["vllm"].model

_direct = urllib.request.ProxyHandler({})


@dataclass(frozen=True)
class Lease:
    """Where one request may go."""

    address: str
    token: str
    request_id: str
    instance_id: int
    model: str
    certificate: str | None


@dataclass(frozen=True)
class Answer:
    """What an instance said; said is the decoded body."""

    status: int
    said: Any


class Fleet:
    """The fleet of a stack, as a client and as an operator."""

    def __init__(self, stack: LocalStack) -> None:
        """The stack runs."""
        self.stack = stack

    # -- as a client ------------------------------------------------------------------------------

    @contextmanager
    def openai(self) -> Iterator[openai.OpenAI]:
        """The OpenAI client; it tries nothing again by itself."""
        transport = FleetTransport(self.stack.loadbalancer_url)
        with httpx2.Client(transport=transport, timeout=60.0) as http:
            yield openai.OpenAI(base_url="http://fleet/v1", api_key="-", http_client=http, max_retries=0)

    def lease(self, avoid: tuple[int, ...] = ()) -> Lease:
        """A lease for a short request, not on an instance that is to be avoided."""
        wanted = {"prompt_tokens": 5, "max_tokens": 5, "wait_s": 30, "avoid": avoid}
        got = _ask("POST", f"{self.stack.loadbalancer_url}/route", wanted)
        assert got.status == 200, got
        return Lease(**{field.name: got.said.get(field.name) for field in fields(Lease)})

    def lease_on(self, instance_id: int) -> Lease:
        """A lease on that instance."""
        others = tuple(row["id"] for row in self.status()["instances"] if row["id"] != instance_id)
        lease = self.lease(avoid=others)
        assert lease.instance_id == instance_id
        return lease

    def give_back(self, lease: Lease) -> None:
        """The lease was not used."""
        told = {"request_id": lease.request_id, "outcome": "unused"}
        assert _ask("POST", f"{self.stack.loadbalancer_url}/done", told).status == 200

    def post(self, lease: Lease, path: str, body: Mapping[str, Any], token: str | None = None) -> Answer:
        """A request to the instance of the lease, with its token or that one."""
        bearer = {"Authorization": f"Bearer {lease.token if token is None else token}"}
        return _ask("POST", lease.address + path, body, bearer, lease.certificate)

    def get(self, lease: Lease, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """A GET to the instance of the lease, without its token."""
        return _ask("GET", lease.address + path, None, headers, lease.certificate)

    # -- as an operator ---------------------------------------------------------------------------

    def instances(self) -> dict[int, dict[str, Any]]:
        """What the autoscaler says of each instance, by number; none while it does not answer."""
        got = _ask("GET", f"{self.stack.autoscaler_url}/instances")
        return {row["id"]: row for row in got.said["instances"]} if got.status == 200 else {}

    def in_state(self, state: str) -> list[int]:
        """The instances in that state."""
        return [number for number, row in self.instances().items() if row["state"] == state]

    def keep_hot(self, count: int, total: int) -> None:
        """So many of so many instances are to be hot from now on."""
        wanted = {"name": "fixed", "params": {"hot": count, "total": total}}
        assert _ask("PUT", f"{self.stack.autoscaler_url}/policy", wanted).status == 200

    def status(self) -> Any:
        """What the loadbalancer says of itself."""
        return _ask("GET", f"{self.stack.loadbalancer_url}/status").said

    def stocks(self) -> dict[int, int]:
        """Tokens in stock by instance."""
        return {row["id"]: row["tokens_in_stock"] for row in self.status()["instances"]}

    def working_s(self) -> dict[int, float]:
        """Seconds in which each instance had work, until now."""
        return {row["id"]: row["working_s"] for row in self.status()["instances"]}

    def rentals(self) -> dict[int, dict[str, Any]]:
        """What the local cloud says of each instance, by number."""
        got = _ask("GET", f"{self.stack.cloud_url}/localcloud/status")
        return {row["id"]: row for row in got.said["instances"]}

    def home(self, instance_id: int) -> Path:
        """The disk of that instance."""
        return self.stack.state_dir / "cloud" / "instances" / str(instance_id) / "home"


def _ask(
    method: str,
    url: str,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    certificate: str | None = None,
) -> Answer:
    """The answer, whatever it is; status 0 when there is none."""
    raw = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(  # noqa: S310 our own ports
        url, raw, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    secure = urllib.request.HTTPSHandler(context=context_for(url, certificate))
    try:
        with urllib.request.build_opener(_direct, secure).open(asked, timeout=60) as reply:
            return Answer(reply.status, _decoded(reply.read()))
    except urllib.error.HTTPError as e:
        with e:
            return Answer(e.code, _decoded(e.read()))
    except OSError as e:
        return Answer(0, str(e))


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")
