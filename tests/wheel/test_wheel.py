"""The wheel in an environment of its own, with openai, out of the checkout, against a small local stack."""

import json
import os
import re
import signal
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig
from tests.paths import ROOT
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(300)  # of which the start of the stack takes most

BIN = ROOT / "build" / "wheel" / "venv" / "bin"
"""Programs of the environment that the Makefile makes."""

LOADBALANCER = "http://127.0.0.1:8200"
"""The one that the README's example names."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A fleet of one hot instance that stays hot; after it nothing is left."""
    config = StackConfig(
        instances=1,
        max_instances=1,
        speedup=200.0,
        state_dir=tmp_path_factory.mktemp("wheel") / "stack",
        autoscaler_args=("--policy-param", "min_hot=1"),
    )
    with LocalStack(config) as running:
        yield running
    end = running.stop()
    assert (end.left_behind, dict(end.restarts)) == ((), {})


def installed(cwd: Path, program: str, *arguments: str) -> str:
    """What a program of the environment prints, run in another folder than the checkout."""
    assert (BIN / program).exists(), "run `make test-wheel`, which makes the environment"
    done = subprocess.run(
        [BIN / program, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """Ours, without what would lead Python to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def example() -> str:
    """The README's program that uses the openai package."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if "from openai import" in block]
    assert found.count(LOADBALANCER) == 1
    return str(found)


def names(requirements: list[str]) -> set[str]:
    """Names of packages, without versions, as pip lists them in lower case."""
    return {re.split(r"[^\w.-]", line)[0].lower() for line in requirements if line and line[0] != "#"}


def test_the_readmes_example_runs(stack: LocalStack, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(example().replace(LOADBALANCER, stack.loadbalancer_url))
    said = installed(tmp_path, "python", str(program))
    assert re.match(r"ChatCompletion\(id='.*model='vllm-13'", said), said
    assert "completion_tokens=20" in said


def test_the_gateway_is_a_command(stack: LocalStack, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = ["--port", str(port), "--loadbalancer", stack.loadbalancer_url]

    def ask(method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        with closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()

    def answers() -> bool:
        try:
            return ask("GET", "/health")[0] == 200
        except OSError:
            return False

    with (tmp_path / "log").open("w") as log:
        gateway = subprocess.Popen(
            [BIN / "fleet-gateway", *flags], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
    try:
        wait_for("the gateway answers", answers)
        body = {"model": "vllm-13", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
        status, said = ask("POST", "/v1/chat/completions", json.dumps(body))
        assert (status, json.loads(said)["usage"]["completion_tokens"]) == (200, 20)
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(20) == 0
    finally:
        gateway.kill()
        gateway.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_of_our_modules_only_the_client_is_there(tmp_path: Path) -> None:
    ours = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    assert {"autoscaler", "gateway", "fleet", "web"} < ours
    look = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
    assert installed(tmp_path, "python", "-c", look, *sorted(ours)).split() == ["fleet_client"]
    place = installed(tmp_path, "python", "-c", "import fleet_client; print(fleet_client.__file__)")
    assert Path(place).is_relative_to(BIN.parent)


def test_nothing_of_the_servers_is_installed(tmp_path: Path) -> None:
    listed = installed(tmp_path, "python", "-m", "pip", "list", "--format", "json")
    there = {package["name"].lower().replace("_", "-") for package in json.loads(listed)}
    client = names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    servers = names((ROOT / "requirements.txt").read_text().splitlines()) - client - {"openai"}
    assert {"flask", "vastai", "numba", "paramiko"} < servers
    assert client | {"autoscaler-py", "openai"} <= there
    assert there & servers == set()
