"""A home directory in which the real start script runs, with a stand-in for vLLM: no GPU, no cloud."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from engine.profile import Profile
from engine.profiles import get_profile
from fleet.outside.start_script import render
from fleet_client.tls_pins import pinned_context
from remote.speaker import signed
from tests.ports import free_port
from tests.waiting import wait_for

MASTER = "master-token-of-a-test"
MODEL = "vllm.entrypoints.cli.main"
AUTH = "remote.auth_server"

ENGINE = """
import http.server, os, ssl, sys
print("starting", flush=True)
if os.path.exists("broken"):
    sys.exit(3)
print("path", *sys.path, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 1.0")
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", port), Answer)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*(sys.argv[sys.argv.index(f"--ssl-{what}file") + 1] for what in ("cert", "key")))
server.socket = context.wrap_socket(server.socket, server_side=True)
print("INFO:     Application startup complete.", flush=True)
server.serve_forever()
"""
"""Ready at once; ends with 3 while there is a file "broken"."""

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "core" not in sys.argv:
    import subprocess
    core = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.cli.main", "core"])
    print("INFO:     Application startup complete.", flush=True)
    print("core", core.pid, flush=True)
while True:
    time.sleep(60)
"""
"""Does not hear SIGTERM, nor does its own child, as little as an engine in the middle of a CUDA call."""


class Machine:
    """A rented machine, as the start script finds it. python: the directory of the image's python3."""

    def __init__(self, path: Path, engine: str = ENGINE, python: Path | None = None) -> None:
        """Nothing runs yet. engine: what the image has for vLLM."""
        self.home = path / "home"
        self.home.mkdir()
        self.image = path / "image"
        package = self.image / "vllm" / "entrypoints" / "cli"
        package.mkdir(parents=True)
        (self.image / "vllm" / "__init__.py").touch()
        (self.image / "vllm-0.32.0.dist-info").mkdir()
        (package / "main.py").write_text(engine)
        self.script = path / "onstart.sh"
        self.log = path / "console.log"
        self.auth_port, self.model_port = free_port(), free_port()
        self.environ = {
            "HOME": str(self.home),
            "PATH": f"{python or Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(self.image),
            "FLEET_BIND": "127.0.0.1",
            "FLEET_PORT_3000": str(self.auth_port),
            "FLEET_PORT_8000": str(self.model_port),
        }
        self.give(get_profile("vllm-13"))

    @property
    def fleet(self) -> Path:
        """Where our files lie."""
        return self.home / "fleet"

    def give(self, profile: Profile, ready_url: str | None = None) -> None:
        """It was created with that profile, by an autoscaler of that URL."""
        made = render(profile, MASTER, ready_url)
        self.script.write_text(made.onstart)
        self.environ |= dict(word.split("=", 1) for word in shlex.split(made.env) if "=" in word)

    @contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        """The container runs; afterwards it was killed and nothing of it is left."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["bash", str(self.script)], env=self.environ, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            wait_for("its children die with it", lambda: not self.all_processes())

    def all_processes(self) -> list[tuple[int, str]]:
        """(id, module) of each Python program that runs in that home."""
        found = []
        home = f"HOME={self.home}\0".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = (entry / "environ").read_bytes()
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if home in environ and b"-m" in words:
                    found.append((int(entry.name), words[words.index(b"-m") + 1].decode()))
        return found

    def processes(self) -> dict[str, int]:
        """The process id of each module."""
        return {module: pid for pid, module in self.all_processes()}

    def kill(self, module: str) -> int:
        """kill -9; the process id that it had."""
        pid = self.processes()[module]
        os.kill(pid, 9)
        return pid

    def model_log(self) -> str:
        """Of the model server that runs, or ran last."""
        path = self.fleet / "model.log"
        return path.read_text() if path.exists() else ""

    def is_ready(self) -> bool:
        """As the autoscaler's log check sees it."""
        return "Application startup complete." in self.model_log()

    def wait_until_ready(self) -> None:
        """The model server is."""
        wait_for("ready", self.is_ready)

    def wait_for_another(self, module: str, pid: int) -> None:
        """Another process than that one runs the module."""
        wait_for(f"another {module}", lambda: self.processes().get(module) not in (None, pid))

    def ask(self, path: str, body: bytes | None = None) -> dict[str, Any] | None:
        """What the auth_server says to the owner of the master token; None when it does not answer."""
        asked = urllib.request.Request(
            f"https://127.0.0.1:{self.auth_port}{path}",
            data=body,
            headers={"Authorization": f"Bearer {MASTER}"},
        )
        try:
            context = pinned_context((self.fleet / "tls.crt").read_text())
            with urllib.request.urlopen(asked, timeout=5, context=context) as reply:  # noqa: S310 ours
                said: dict[str, Any] = json.load(reply)
                return said
        except OSError:
            return None

    def tokens(self) -> dict[str, Any] | None:
        """A batch of one token."""
        return self.ask("/tokens", b'{"count": 1}')


class Ears:
    """An autoscaler's `POST /ready`, which keeps what instances say."""

    def __init__(self) -> None:
        """Listen on a free port."""
        told: list[tuple[str, bytes]] = []

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                told.append((self.headers["Authorization"], body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.told = told
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/ready"

    def __enter__(self) -> "Ears":
        """Begin to listen."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End listening."""
        self._server.shutdown()
        self._server.server_close()

    def heard(self, key: str) -> list[dict[str, Any]]:
        """All that was said, each signed with that key."""
        assert all(header == signed(key, "/ready", body) for header, body in self.told)
        return [json.loads(body) for _, body in self.told]


def ended_within(process: "subprocess.Popen[bytes]", limit_s: float) -> float:
    """Seconds until it ended; raises subprocess.TimeoutExpired."""
    begun = time.monotonic()
    process.wait(timeout=limit_s)
    return time.monotonic() - begun
