"""The servers that hostile inputs are sent to, as processes, and the routes that read messages."""

import contextlib
import hashlib
import os
import random
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from bench.children import ROOT, ChildProcess, child, free_port, memory_mb, wait_for
from bench.hostile.inputs import TRICKS, message, mutated, request
from localcloud.paced.machine import SimulatedMachine
from remote import boot
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
CLOUD_KEY = "k" * 32
AUTH_SERVER = "auth_server"


class TokensBody(Struct):
    """What POST /tokens of an instance reads; its reader there has no msgspec."""

    count: Annotated[int, Meta(ge=1, le=2000)]
    report_to: Annotated[str, Meta(max_length=100)] | None = None


@dataclass(frozen=True)
class Route:
    """A route that reads a message. kind: of its body, None for one without; key: whose, "" for none."""

    method: str
    path: str
    kind: Any = None
    key: str = ""


@dataclass(frozen=True)
class Face:
    """One server. keys: what to send as Authorization, by whose key it is. tls: it speaks under TLS."""

    name: str
    port: int
    process: ChildProcess = field(repr=False)
    routes: tuple[Route, ...]
    keys: Mapping[str, str]
    tls: bool = False

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


AUTH = (
    Route("POST", "/tokens", TokensBody, "master"),
    Route("POST", "/tokens", TokensBody),
    Route("GET", "/load", None, "master"),
    Route("GET", "/load?after=x", None, "master"),
    Route("GET", "/load"),
    Route("GET", "/health"),
)


def blind_context() -> ssl.SSLContext:
    """Return a context that takes any certificate: who answers is our own process."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5.0, context=blind_context()):  # noqa: S310 ours
            return True
    except OSError as e:
        return isinstance(e, urllib.error.HTTPError)


@dataclass(frozen=True)
class Program:
    """One server before it runs. url: answers once it is up."""

    name: str
    routes: tuple[Route, ...]
    url: str
    command: tuple[str, ...]


def _programs(directory: Path, ports: list[int], instance: Path) -> list[Program]:
    """Return the servers, in the order of their starts. instance: the fleet's part of a machine's disk."""
    cloud, scaler, balancer, gateway, engine = (f"http://127.0.0.1:{port}" for port in ports[:5])
    auth, tls_balancer, tls_gateway = (f"https://127.0.0.1:{port}" for port in ports[5:])
    tls = ("--tls-cert", str(instance / "tls.crt"), "--tls-key", str(instance / "tls.key"))
    local = ("--local", "--cloud-url", cloud, "--no-manage", "--max-instances", "1")
    state = ("--state-dir", str(directory / "state"))
    balance = ("loadbalancer_server.py", "--autoscaler", "http://127.0.0.1:9", "--state-dir")
    pass_on = ("gateway.py", "--loadbalancer", balancer, "--wait-s", "0")
    passed = (*ENGINE, Route("GET", "/health"))
    return [
        Program(
            "cloud",
            CLOUD,
            f"{cloud}/localcloud/status",
            ("-m", "localcloud", "--root", str(directory / "cloud"), "--realism", "none"),
        ),
        Program("autoscaler", AUTOSCALER, f"{scaler}/health", ("autoscaler_server.py", *local, *state)),
        Program("loadbalancer", LOADBALANCER, f"{balancer}/health", (*balance, str(directory / "state"))),
        Program("gateway", passed, f"{gateway}/metrics", pass_on),
        Program("engine", ENGINE, f"{engine}/health", ("-m", *PACED, "--model", "m")),
        Program(AUTH_SERVER, AUTH, f"{auth}/health", ("-m", "remote.auth_server")),
        Program(
            "loadbalancer-tls",
            LOADBALANCER,
            f"{tls_balancer}/health",
            (*balance, str(directory / "tls-state"), *tls),
        ),
        Program("gateway-tls", passed, f"{tls_gateway}/metrics", (*pass_on, *tls)),
    ]


@contextlib.contextmanager
def running(directory: Path) -> Iterator[list[Face]]:
    """Run cloud, autoscaler, loadbalancer, gateway, paced engine and an auth_server; no machine is rented.

    Loadbalancer and gateway run a second time, under TLS.
    """
    ports = [free_port() for _ in range(8)]
    instance = _home(directory / "instance")
    state, tls_state = directory / "state", directory / "tls-state"
    for made in (state, tls_state):
        made.mkdir(mode=0o700)
    SimulatedMachine("A100 SXM4", 1, 0.0, 0.0, None, None).write(directory / "machine.json")
    programs = _programs(directory, ports, instance)
    environ = {
        "LOCALCLOUD_API_KEY": CLOUD_KEY,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "localcloud" / "image"), str(ROOT)]),
        "LOCALCLOUD_MACHINE": str(directory / "machine.json"),
    }
    at_home = {"HOME": str(instance.parent), "FLEET_BIND": "127.0.0.1", "FLEET_PORT_3000": str(ports[5])}
    with ExitStack() as stack:
        started: list[ChildProcess] = []
        for program, port in zip(programs, ports, strict=True):
            by_environ = program.name == AUTH_SERVER  # it has no flags
            whole = [sys.executable, *program.command, *([] if by_environ else ["--port", str(port)])]
            given, log = environ | (at_home if by_environ else {}), directory / f"{program.name}.log"
            started.append(stack.enter_context(child(whole, log, environ=given)))
            if program.name == "cloud":  # the autoscaler looks for it once
                wait_for("cloud", started[0], partial(_answers, program.url))
        for program, process in zip(programs, started, strict=True):
            wait_for(program.name, process, partial(_answers, program.url))
        keys = {"control": (state / "control.key").read_text().strip(), "cloud": CLOUD_KEY, "master": MASTER}
        tls_keys = keys | {"control": (tls_state / "control.key").read_text().strip()}
        faces = []
        for program, port, process in zip(programs, ports, started, strict=True):
            tls = program.url.startswith("https")
            faces.append(
                Face(program.name, port, process, program.routes, tls_keys if tls else keys, tls=tls)
            )
        yield faces


def _home(home: Path) -> Path:
    """Make the home directory of an instance that has booted; return the fleet's part of it."""
    fleet = home / "fleet"
    fleet.mkdir(parents=True)
    (fleet / "model.log").touch()
    (fleet / "master.sha256").write_text(hashlib.sha256(MASTER.encode()).hexdigest())
    boot.begin(str(fleet))
    return fleet
