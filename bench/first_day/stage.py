"""What the first day is played on: a harsh local cloud, a home for one operator, and the documented commands.

The commands are those of docs/vast-ai.md, unchanged. The environment leads them here: each flag may be set
there, so the operator's home, the ports, and that the cloud is a local one need not be written into them.
"""

import contextlib
import http.client
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.children import ROOT, ChildProcess, child, free_port, wait_for
from fleet_client.private_files import make_private_dir

COMMAND_S = 600.0
"""Seconds for a command that ends by itself; prepare waits for machines to load."""

PROGRAMS = Path(sys.executable).parent
"""Where the commands of the environment are: `vastai`."""

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, and all that it said."""

    command: str
    status: int
    out: str
    seconds: float


@dataclass
class Stage:
    """A running local cloud and the home of an operator. environ: that of every command."""

    root: Path
    speedup: float
    environ: dict[str, str]
    servers: dict[str, contextlib.ExitStack] = field(default_factory=dict)
    log: list[Ended] = field(default_factory=list)

    @property
    def cloud_url(self) -> str:
        """Where the cloud is."""
        return self.environ["VAST_URL"]

    @property
    def autoscaler_url(self) -> str:
        """Where the autoscaler is."""
        return f"http://127.0.0.1:{self.environ['AUTOSCALER_PORT']}"

    # -- the operator ----------------------------------------------------------------------------------

    def use_key(self, key: str) -> None:
        """Let the operator's programs find that key of the account from now on."""
        self.environ["LOCALCLOUD_API_KEY"] = key

    def run(self, command: str, *, given: str = "", python: str = "", limit_s: float = COMMAND_S) -> Ended:
        """Run a documented command to its end. given: what is typed into it; python: run that instead.

        limit_s: seconds after which TimeoutExpired is raised.
        """
        argv = [sys.executable, "-c", python] if python else _argv(command, self.environ["HOME"])
        begun = time.monotonic()
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=self.environ,
            input=given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
        ended = Ended(command, done.returncode, done.stdout, time.monotonic() - begun)
        self.log.append(ended)
        return ended

    def serve(self, command: str, *more: str) -> ChildProcess:
        """Start a documented command that runs until it is ended. more: flags that the page does not name."""
        name = shlex.split(command)[1]
        stack = contextlib.ExitStack()
        started = stack.enter_context(
            child(
                [*_argv(command, self.environ["HOME"]), *more],
                self.root / f"{name}.log",
                environ=self.environ,
            )
        )
        self.servers[name] = stack
        return started

    def end(self, name: str) -> None:
        """End a server as Ctrl-C does."""
        self.servers.pop(name).close()

    # -- the world -------------------------------------------------------------------------------------

    def ask(self, url: str, body: Any = None, *, key: str = "", method: str = "") -> Any:
        """Return the JSON at a URL of a server on this machine, an error's too."""
        request = urllib.request.Request(  # noqa: S310 loopback
            url,
            data=None if body is None else json.dumps(body).encode(),
            method=method or ("GET" if body is None else "POST"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        try:
            with _direct.open(request, timeout=10.0) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as e:
            return json.loads(e.read() or b"null")

    def fault(self, name: str, **args: float | str) -> None:
        """Switch a fault of the cloud on."""
        said = self.ask(
            f"{self.cloud_url}/localcloud/faults",
            {"name": name, **args},
            key=self.environ["LOCALCLOUD_API_KEY"],
        )
        if "error" in said:
            raise RuntimeError(f"the cloud has no such fault: {said}")

    def heal(self, name: str) -> None:
        """Switch a fault of the cloud off."""
        url = f"{self.cloud_url}/localcloud/faults/{name}"
        self.ask(url, method="DELETE", key=self.environ["LOCALCLOUD_API_KEY"])

    def wait(self, what: str, so: Callable[[], Any], limit_s: float = 120.0) -> float:
        """Wait until that holds; return how many seconds it took, or raise TimeoutError."""
        begun = time.monotonic()
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, LookupError, ValueError):
                if so():
                    return time.monotonic() - begun
            if time.monotonic() - begun > limit_s:
                raise TimeoutError(f"not so after {limit_s:g} s: {what}")
            time.sleep(0.2)

    def bill(self) -> Mapping[str, Any]:
        """Return what the cloud itself says of the account: what was charged for what, and its rentals."""
        status: Mapping[str, Any] = self.ask(f"{self.cloud_url}/localcloud/status")
        return status


def _argv(command: str, home: str) -> list[str]:
    """Return a documented command as it is run here; ~ is the operator's home, as in a shell."""
    program, *arguments = (word.replace("~/", f"{home}/") for word in shlex.split(command))
    if program == "python":
        return [sys.executable, *arguments]
    own = PROGRAMS / program
    return [str(own) if own.exists() else program, *arguments]


@contextlib.contextmanager
def stage(root: Path, speedup: float, flags: Sequence[str], key: str, hub: str) -> Iterator[Stage]:
    """Start the cloud with those flags; everything has ended afterwards. hub: where models are read."""
    home = make_private_dir(root / "home")
    ports = {name: free_port() for name in ("cloud", "autoscaler", "loadbalancer", "gateway")}
    url = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    environ = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "TMPDIR": str(make_private_dir(root / "tmp")),
        "NO_PROXY": "127.0.0.1,localhost",
        "VAST_URL": url["cloud"],
        "VASTAI_NO_UPDATE_CHECK": "1",
        "LOCALCLOUD_API_KEY": key,
        "HF_ENDPOINT": hub,
        "AUTOSCALER_LOCAL": "true",
        "AUTOSCALER_CLOUD_URL": url["cloud"],
        "AUTOSCALER_SPEEDUP": f"{speedup:g}",
        "AUTOSCALER_PORT": str(ports["autoscaler"]),
        "AUTOSCALER_LOADBALANCER": url["loadbalancer"],
        "AUTOSCALER_POLL_INTERVAL_S": "1",
        "AUTOSCALER_CHECK_BOOT_EVERY_S": "1",
        "OPERATOR_AUTOSCALER": url["autoscaler"],
        "LOADBALANCER_PORT": str(ports["loadbalancer"]),
        "LOADBALANCER_AUTOSCALER": url["autoscaler"],
        "FLEET_GATEWAY_PORT": str(ports["gateway"]),
        "FLEET_GATEWAY_LOADBALANCER": url["loadbalancer"],
        "OPENAI_BASE_URL": f"{url['gateway']}/v1",
        "OPENAI_API_KEY": "none",
    }
    command = [
        sys.executable,
        "-m",
        "localcloud",
        "--port",
        str(ports["cloud"]),
        "--root",
        str(root / "cloud"),
    ]
    command += ["--speedup", f"{speedup:g}", *flags]
    with contextlib.ExitStack() as stack:
        cloud = stack.enter_context(child(command, root / "cloud.log", environ=environ))
        wait_for("the local cloud", cloud, lambda: bool(_answers(url["cloud"])))
        found = Stage(root, speedup, environ)
        try:
            yield found
        finally:
            for name in reversed(tuple(found.servers)):
                found.end(name)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), _direct.open(f"{url}/localcloud/status", timeout=2.0):
        return True
    return False
