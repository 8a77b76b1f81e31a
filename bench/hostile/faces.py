"""The servers that hostile inputs are sent to, as processes, and the routes that read messages."""

import contextlib
import os
import random
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.children import ROOT, ChildProcess, child, free_port, memory_mb, wait_for
from bench.hostile.inputs import TRICKS, message, mutated, request
from localcloud.paced.machine import SimulatedMachine
from remote.speaker import signed
from web.messages.busy import BusyReport
from web.messages.hot_set import HotSet
from web.messages.leases import DoneBody, PaceBody, RouteBody, WellBody
from web.messages.operator import ManageBody, PolicyBody
from web.messages.reports import PushedReport, ReadyBody
from web.signatures import instance_key

RAW_SHARE = 0.25
"""Share of the inputs that are changed bytes or tricks; the others are messages in right requests."""

PACED = ("vllm.entrypoints.openai.api_server", "--served-model-name", "vllm-13")
"""The paced engine, by its name on an instance of a local cloud."""

MASTER = "master-token-of-one-instance"


@dataclass(frozen=True)
class Route:
    """A route that reads a message. kind: of its body, None for one without; key: whose, "" for none."""

    method: str
    path: str
    kind: Any = None
    key: str = ""


@dataclass(frozen=True)
class Face:
    """One server. keys: what to send as Authorization, by whose key it is."""

    name: str
    port: int
    process: ChildProcess = field(repr=False)
    routes: tuple[Route, ...]
    keys: Mapping[str, str]

    def input(self, rng: random.Random) -> tuple[bytes, bool]:
        """Return the bytes of one input, and whether it is a whole request, which is to be answered."""
        route = rng.choice(self.routes)
        body = b"" if route.kind is None else message(route.kind, rng)
        headers = {"Content-Type": "application/json"}
        if route.key == "instance":
            headers["Authorization"] = signed(instance_key(MASTER), route.path, body)
        elif route.key:
            headers["Authorization"] = f"Bearer {self.keys[route.key]}"
        path = (
            route.path
            if rng.random() < 0.97
            else route.path + rng.choice(("/", "?x=1", "%00", "/../x", "?after=-1"))
        )
        whole = request(route.method, path, headers, body)
        if rng.random() >= RAW_SHARE:
            return whole, True
        return (mutated(whole, rng) if rng.random() < 0.7 else rng.choice(TRICKS)), False

    def tracebacks(self) -> list[str]:
        """Return the ends of the tracebacks in its log."""
        text = self.process.log.read_text(errors="replace")
        return [part[:3000] for part in text.split("Traceback (most recent call last)")[1:]]

    @property
    def mb(self) -> float:
        """What it has in memory."""
        return memory_mb(self.process.pid)


LOADBALANCER = (
    Route("POST", "/route", RouteBody),
    Route("POST", "/done", DoneBody),
    Route("POST", "/pace", PaceBody),
    Route("POST", "/well", WellBody),
    Route("PUT", "/hot", HotSet, "control"),
    Route("POST", "/report", PushedReport, "instance"),
    Route("GET", "/model"),
    Route("GET", "/status"),
    Route("GET", "/metrics"),
    Route("GET", "/health"),
)
AUTOSCALER = (
    Route("POST", "/busy", BusyReport, "control"),
    Route("POST", "/ready", ReadyBody, "instance"),
    Route("PUT", "/manage", ManageBody),
    Route("PUT", "/policy", PolicyBody),
    Route("GET", "/hot", None, "control"),
    Route("GET", "/instances"),
    Route("GET", "/decisions"),
    Route("GET", "/costs"),
    Route("GET", "/policy/curve"),
    Route("GET", "/health"),
)
CLOUD = (
    Route("GET", "/localcloud/status"),
    Route("POST", "/localcloud/faults", dict[str, Any], "cloud"),
    Route("GET", "/api/v1/instances/", None, "cloud"),
    Route("PUT", "/api/v0/asks/1/", dict[str, Any], "cloud"),
    Route("PUT", "/api/v0/instances/1/", dict[str, Any], "cloud"),
    Route("POST", "/api/v0/bundles/", dict[str, Any], "cloud"),
    Route("GET", "/"),
)
ENGINE = (
    Route("POST", "/v1/completions", dict[str, Any]),
    Route("POST", "/v1/chat/completions", dict[str, Any]),
    Route("POST", "/tokenize", dict[str, Any]),
    Route("GET", "/v1/models"),
    Route("GET", "/metrics"),
)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5.0):  # noqa: S310 ours
            return True
    except OSError as e:
        return isinstance(e, urllib.error.HTTPError)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[list[Face]]:
    """Run a local cloud, autoscaler, loadbalancer, gateway and paced engine; no machine is rented."""
    ports = [free_port() for _ in range(5)]
    cloud, scaler, balancer, gateway, engine = (f"http://127.0.0.1:{port}" for port in ports)
    state = directory / "state"
    state.mkdir(mode=0o700)
    SimulatedMachine("A100 SXM4", 1, 0.0, 0.0, None, None).write(directory / "machine.json")
    key, common = "k" * 32, ["--state-dir", str(state)]
    local = ["--local", "--cloud-url", cloud, "--no-manage", "--max-instances", "1"]
    programs = (
        (
            "cloud",
            CLOUD,
            f"{cloud}/localcloud/status",
            ["-m", "localcloud", "--root", str(directory / "cloud")],
        ),
        ("autoscaler", AUTOSCALER, f"{scaler}/health", ["autoscaler_server.py", *local, *common]),
        (
            "loadbalancer",
            LOADBALANCER,
            f"{balancer}/health",
            ["loadbalancer_server.py", "--autoscaler", "http://127.0.0.1:9", *common],
        ),
        (
            "gateway",
            (*ENGINE, Route("GET", "/health")),
            f"{gateway}/metrics",
            ["gateway.py", "--loadbalancer", balancer, "--wait-s", "0"],
        ),
        ("engine", ENGINE, f"{engine}/health", ["-m", *PACED, "--model", "m"]),
    )
    environ = {
        "LOCALCLOUD_API_KEY": key,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "localcloud" / "image"), str(ROOT)]),
        "LOCALCLOUD_MACHINE": str(directory / "machine.json"),
    }
    with ExitStack() as stack:
        started: list[ChildProcess] = []
        for (name, _, url, command), port in zip(programs, ports, strict=True):
            whole = [sys.executable, *command, "--port", str(port)]
            started.append(stack.enter_context(child(whole, directory / f"{name}.log", environ=environ)))
            if name == "cloud":  # the autoscaler looks for it once
                wait_for(name, started[0], lambda url=url: _answers(url))  # type: ignore[misc]
        for (name, _, url, _), process in zip(programs, started, strict=True):
            wait_for(name, process, lambda url=url: _answers(url))  # type: ignore[misc]
        keys = {"control": (state / "control.key").read_text().strip(), "cloud": key}
        yield [
            Face(name, port, process, routes, keys)
            for (name, routes, _, _), port, process in zip(programs, ports, started, strict=True)
        ]
