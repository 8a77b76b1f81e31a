"""The processes of the comparison: engines, auth_servers, our loadbalancer, and the other routers.

    core 0   the router that is measured (all of them run, one is used at a time)
    core 1   engines, auth_servers and the load (this process)

With one core they share it. A process is started on its core, so that a router with threads makes as many as
it has cores.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from bench.children import ROOT, ChildProcess, child, free_port, wait_for
from bench.route.stub_fleet import StubHttp
from bench.routers.backend import MODEL
from bench.routers.load import completion
from process.errors import ConfigError
from remote import boot as boots
from remote.log_lines import READY

VENV = ROOT / ".venv-routers"

ROOM = {"throughput_work_s": 1e7, "capacity_work": 1e8}
"""Of an instance: never full, as the others do not look at capacity either."""


# -- engines and ours ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandInEngine:
    """A stand-in for an engine, and the auth_server beside it. pids: (engine, auth_server)."""

    number: int
    ports: dict[str, int]
    auth_port: int
    certificate: str
    master_token: str
    pids: tuple[int, int]

    @property
    def told(self) -> dict[str, Any]:
        """The line of the hot set."""
        return {
            "id": self.number,
            "state": "hot",
            "address": f"https://127.0.0.1:{self.ports['tls']}",
            "certificate": self.certificate,  # each lease carries it
            "auth_url": f"https://127.0.0.1:{self.auth_port}",
            "master_token": self.master_token,
            **ROOM,
        }


@contextlib.contextmanager
def engine(number: int, home: Path) -> Iterator[StandInEngine]:
    """Run one instance: stand-in, token check, real auth_server."""
    fleet = home / "fleet"
    fleet.mkdir(parents=True)
    boots.begin(str(fleet))
    master_token = f"master-{number}-" + "m" * 40
    (fleet / "master.sha256").write_text(hashlib.sha256(master_token.encode()).hexdigest())
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "bench.routers.backend", str(home)]
        model = stack.enter_context(child(command, home / "ports", core=-1))
        wait_for("an engine", model, lambda: model.log.read_text().endswith("}\n"))
        ports = json.loads(model.log.read_text())
        (fleet / "model.log").write_bytes(READY + b"\n")
        auth_port = free_port()
        environ = {
            **{"HOME": str(home), "FLEET_BIND": "127.0.0.1"},
            **{"FLEET_PORT_3000": str(auth_port), "FLEET_PORT_8000": str(ports["tls"])},
        }
        command = [sys.executable, "-m", "remote.auth_server"]
        auth = stack.enter_context(child(command, home / "auth.log", core=-1, environ=environ))
        certificate = (fleet / "tls.crt").read_text()
        yield StandInEngine(number, ports, auth_port, certificate, master_token, (model.pid, auth.pid))


class HotSetStub(StubHttp):
    """The autoscaler's two routes, for our loadbalancer."""

    def __init__(self, engines: Sequence[StandInEngine]) -> None:
        """engines: all are hot."""
        super().__init__([], None)
        self._engines = engines

    def _answer(self, target: str, body: bytes) -> dict[str, Any]:
        if target == "/busy":
            return super()._answer(target, body)
        return super()._answer(target, body) | {"instances": [e.told for e in self._engines]}


@contextlib.contextmanager
def our_loadbalancer(directory: Path, autoscaler_port: int) -> Iterator[tuple[ChildProcess, int]]:
    """Run the real one; gives it and its port. Nothing is known to be hot yet."""
    port = free_port()
    flags = ["--port", str(port), "--autoscaler", f"http://127.0.0.1:{autoscaler_port}"]
    command = [sys.executable, "loadbalancer_server.py", *flags, "--state-dir", str(directory / "state")]
    with child(command, directory / "loadbalancer.log", core=0) as it:
        yield it, port


def stocked(port: int, engines: int) -> bool:
    """Return whether our loadbalancer on that port has tokens of so many engines."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/status", timeout=5.0) as reply:
            rows: list[dict[str, Any]] = json.load(reply)["instances"]
    except OSError:
        return False
    return bool(sum(row["tokens_in_stock"] > 0 for row in rows) == engines)


# -- the others ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PypiRouter:
    """A router from PyPI, with one policy. policy None: its default."""

    package: str
    program: str
    policy: str | None

    @property
    def name(self) -> str:
        """As tables and --ways have it."""
        return self.package + ("" if self.policy is None else f" {self.policy}")

    def command(self, venv: Path, port: int, engines: Sequence[int], directory: Path) -> list[str]:
        """Return its command line. engines: their ports."""
        program = str(venv / "bin" / self.program)
        if self.package == "litellm":
            config = directory / "litellm.yaml"
            config.write_text(json.dumps(litellm_config(engines)))  # JSON is YAML, too
            return [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        urls = [f"http://127.0.0.1:{one}" for one in engines]
        command = [program, "launch"] if self.program == "sglang-router" else [program]
        command += ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        quiet = {"sglang-router": "warn", "vllm-router": "warning"}[self.package]
        policy = [] if self.policy is None else ["--policy", self.policy]
        return [*command, "--log-level", quiet, *policy]


ROUTERS = (
    PypiRouter("vllm-router", "vllm-router", None),
    PypiRouter("vllm-router", "vllm-router", "round_robin"),
    PypiRouter("sglang-router", "sglang-router", None),
    PypiRouter("sglang-router", "sglang-router", "round_robin"),
    PypiRouter("litellm", "litellm", None),  # it has no round_robin: its default takes one at random
)

LITELLM_ENVIRON = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks GitHub for prices, and waits for it
    "LITELLM_LOG": "ERROR",
    "LITELLM_TELEMETRY": "False",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # on loopback, as the others: no keys
}


def litellm_config(engines: Sequence[int]) -> dict[str, Any]:
    """Return two OpenAI-compatible deployments of one model; no database, keys or callbacks."""
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {
                "model": f"text-completion-openai/{MODEL}",
                "api_base": f"http://127.0.0.1:{port}/v1",
                "api_key": "unused",
            },
        }
        for port in engines
    ]
    return {"model_list": models}


def versions(venv: Path) -> dict[str, str]:
    """Return versions of the routers in that environment; ConfigError when one is missing."""
    found = {}
    for router in ROUTERS:
        name = router.package.replace("-", "_")
        infos = sorted(venv.glob(f"lib/python*/site-packages/{name}-*.dist-info"))
        if not infos or not (venv / "bin" / router.program).exists():
            raise ConfigError(f"{router.package} is not in {venv}: make {VENV.name}/.ready installs it")
        found[router.package] = infos[0].name.removesuffix(".dist-info").rpartition("-")[2]
    return found


@contextlib.contextmanager
def running(
    router: PypiRouter, venv: Path, engines: Sequence[int], directory: Path
) -> Iterator[tuple[ChildProcess, int]]:
    """Run that router; gives it and its port. It may not answer yet."""
    port = free_port()
    command = router.command(venv, port, engines, directory)
    log = directory / f"{router.name.replace(' ', '-')}.log"
    environ = LITELLM_ENVIRON if router.package == "litellm" else {}
    # Of its own environment, and of no other: our Python path has other versions of what it needs.
    with child(command, log, core=0, environ={**environ, "PYTHONPATH": ""}) as it:
        yield it, port


def answers(port: int) -> bool:
    """Return whether a completion comes from that port."""
    body = completion(0, 1, 0.0, stream=False)
    request = Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=10.0) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except (HTTPError, OSError):
        return False
