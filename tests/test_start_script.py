"""The start script and the supervisor: what is deployed is what is tested, here with stand-ins for vLLM."""

import ast
import base64
import hashlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from errors import ConfigError
from profiles import PROFILES, get_profile
from remote.supervise import DEATHS, EARLY_DEATHS, PAUSE_S, SETTLED_S, Deaths, Pause, model_command
from start_script import LIMIT_BYTES, NEEDS, REMOTE, render, without_words
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent
MASTER = "master-token-of-a-test"


# -- the text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROFILES))
def test_every_profile_fits_into_the_services_limit_with_room(name: str) -> None:
    """Room for a longer model name and more arguments of a user's own profile."""
    assert len(render(get_profile(name), MASTER).encode()) <= LIMIT_BYTES - 2_000


def test_a_script_over_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="16384"):
        render(replace(get_profile("vllm-13"), vllm_args="--x " * 2000), MASTER)


def test_arguments_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="vllm_args"):
        render(replace(get_profile("vllm-13"), vllm_args="--x 'open"), MASTER)


def test_the_script_holds_the_hash_of_the_master_token_only() -> None:
    script = render(get_profile("vllm-13"), MASTER)
    assert MASTER not in script
    assert hashlib.sha256(MASTER.encode()).hexdigest() in script


def test_what_travels_is_all_of_remote_but_its_words() -> None:
    script = render(get_profile("vllm-13"), MASTER)
    packed = script.split("<<'END'\n")[1].split("\nEND\n")[0]
    archive = tarfile.open(fileobj=io.BytesIO(lzma.decompress(base64.b85decode(packed))))  # noqa: SIM115
    found = {}
    for entry in archive.getmembers():
        member = archive.extractfile(entry)
        assert member is not None
        found[entry.name] = member.read().decode()
    assert set(found) == {f"remote/{p.name}" for p in REMOTE.glob("*.py")}
    for name, source in found.items():
        whole = (ROOT / name).read_text()
        assert ast.dump(ast.parse(without_words(whole))) == ast.dump(ast.parse(source)), name
        assert '"""' not in source


def test_a_function_of_words_only_stays_a_function() -> None:
    source = 'def f():\n    """Words."""\n\nclass C:\n    """Words."""\n'
    assert without_words(source) == "def f():\n    pass\n\nclass C:\n    pass\n"


def test_the_image_gets_the_versions_that_are_tested() -> None:
    pinned = (ROOT / "requirements.txt").read_text().split()
    assert set(NEEDS) <= set(pinned)


def test_a_word_of_a_profile_cannot_become_a_command(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    evil = f"x'; touch {trap}; echo '$(touch {trap})`touch {trap}`"
    profile = replace(get_profile("vllm-13"), name=evil, model=evil, vllm_args=f'"$(touch {trap})"')
    script = (
        render(profile, MASTER)
        .replace("exec python3", "exit 0; exec python3")
        .replace("until ", "false && until ")
    )
    subprocess.run(
        ["bash", "-c", script], env={"HOME": str(tmp_path), "PATH": _path()}, check=False, timeout=30
    )
    assert not trap.exists()


# -- decisions of the supervisor -----------------------------------------------------------------------


def test_a_model_server_that_never_gets_ready_is_given_up() -> None:
    deaths = Deaths()
    assert [deaths.died(False, 60.0 * n) is None for n in range(EARLY_DEATHS)] == [True] * (
        EARLY_DEATHS - 1
    ) + [False]


def test_a_model_server_that_was_ready_may_die_now_and_then() -> None:
    deaths = Deaths()
    assert all(deaths.died(True, 3600.0 * n) is None for n in range(20))


def test_a_model_server_that_dies_again_and_again_is_given_up() -> None:
    deaths = Deaths()
    assert [deaths.died(True, 10.0 * n) is None for n in range(DEATHS)] == [True] * (DEATHS - 1) + [False]


def test_the_pause_doubles_until_a_process_has_settled() -> None:
    pause = Pause()
    assert [pause.after(1.0) for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [pause.after(SETTLED_S), pause.after(0.0)] == [PAUSE_S[0], 2 * PAUSE_S[0]]


def _command(args: list[str], **environ: str) -> list[str]:
    return model_command("vllm-13", "some/model", args, environ)  # type: ignore[arg-type]


def test_vllm_is_started_with_the_check_in_front() -> None:
    assert _command(["--max-model-len", "4096"])[1:] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"),
        *("--served-model-name", "vllm-13", "some/model", "--host", "0.0.0.0", "--port", "8000"),
        *("--middleware", "remote.token_check.TokenCheck", "--max-model-len", "4096"),
    ]


@pytest.mark.parametrize(
    ("gpus", "args", "parallel"),
    [
        ("1", [], False),
        ("2", [], True),
        ("2", ["--tensor-parallel-size", "1"], False),
        ("2", ["--tensor-parallel-size=1"], False),
        ("2", ["-tp", "1"], False),
        ("two", [], False),
    ],
)
def test_all_gpus_are_used_unless_the_profile_says_otherwise(
    gpus: str, args: list[str], parallel: bool
) -> None:
    command = _command(args, GPU_COUNT=gpus)
    assert (command[command.index("8000") + 1 :][:2] == ["--tensor-parallel-size", "2"]) is parallel


# -- a whole instance ----------------------------------------------------------------------------------

STAND_IN = """
import http.server, os, sys
print("starting", flush=True)
if os.path.exists("broken"):
    sys.exit(3)
port = int(sys.argv[sys.argv.index("--port") + 1])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 1.0")
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", port), Answer)
print("INFO:     Application startup complete.", flush=True)
server.serve_forever()
"""


def _path() -> str:
    return f"{Path(sys.executable).parent}:/usr/bin:/bin"


class Machine:
    """A home directory in which the real start script runs, with a stand-in for vLLM."""

    def __init__(self, path: Path, ports: tuple[int, int]) -> None:
        self.home = path / "home"
        self.home.mkdir()
        package = path / "image" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        (package / "api_server.py").write_text(STAND_IN)
        self.script = path / "onstart.sh"
        self.script.write_text(render(get_profile("vllm-13"), MASTER))
        self.auth_port, self.model_port = ports
        self.environ = {
            "HOME": str(self.home),
            "PATH": _path(),
            "PYTHONPATH": str(path / "image"),
            "FLEET_BIND": "127.0.0.1",
            "FLEET_PORT_3000": str(self.auth_port),
            "FLEET_PORT_8000": str(self.model_port),
        }
        self.log = path / "log"

    @contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                ["bash", str(self.script)], env=self.environ, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            wait_for("its children die with it", lambda: not self.processes())

    def processes(self) -> dict[str, int]:
        """Process ids of what runs in that home, by the module that each runs."""
        found = {}
        home = f"HOME={self.home}\0".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ, words = (
                        (entry / "environ").read_bytes(),
                        (entry / "cmdline").read_bytes().split(b"\0"),
                    )
                except OSError:
                    continue
                if home in environ and b"-m" in words:
                    found[words[words.index(b"-m") + 1].decode()] = int(entry.name)
        return found

    def model_log(self) -> str:
        path = self.home / "fleet" / "model.log"
        return path.read_text() if path.exists() else ""

    def tokens(self) -> dict[str, object] | None:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.auth_port}/tokens",
            data=b'{"count": 1}',
            headers={"Authorization": f"Bearer {MASTER}"},
        )
        try:
            with urllib.request.urlopen(asked, timeout=5) as reply:  # noqa: S310 our own port
                said: dict[str, object] = json.load(reply)
                return said
        except OSError:
            return None


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    import socket

    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return Machine(tmp_path, (a.getsockname()[1], b.getsockname()[1]))


def test_a_boot_serves_tokens_restarts_what_dies_and_ends_when_told(machine: Machine) -> None:
    with machine.running() as boot:
        wait_for("ready", lambda: "Application startup complete." in machine.model_log())
        first = wait_for("tokens", machine.tokens)
        running = machine.processes()
        os.kill(running["vllm.entrypoints.openai.api_server"], signal.SIGKILL)
        wait_for(
            "another model server is ready",
            lambda: (
                machine.processes().get(
                    "vllm.entrypoints.openai.api_server", running["vllm.entrypoints.openai.api_server"]
                )
                != running["vllm.entrypoints.openai.api_server"]
                and "Application startup complete." in machine.model_log()
            ),
        )
        os.kill(running["remote.auth_server"], signal.SIGKILL)
        wait_for(
            "another auth_server answers",
            lambda: (
                machine.processes().get("remote.auth_server") not in (None, running["remote.auth_server"])
                and machine.tokens()
            ),
        )
        again = wait_for("tokens", machine.tokens)
        assert again["boot_id"] == first["boot_id"], "a dead process is no new boot"
        boot.send_signal(signal.SIGTERM)
        assert boot.wait(timeout=15) == 0
        assert machine.processes() == {}
    with machine.running():
        last = wait_for("tokens after a restart of the container", machine.tokens)
        assert last["boot_id"] != first["boot_id"]
    assert MASTER not in machine.log.read_text()


def test_a_model_server_that_cannot_start_is_given_up_where_the_log_check_sees_it(machine: Machine) -> None:
    with machine.running() as boot:
        wait_for("ready", lambda: "Application startup complete." in machine.model_log())
        wait_for("a working directory", lambda: (machine.home / "fleet").exists())
        (machine.home / "fleet" / "broken").touch()
        os.kill(machine.processes()["vllm.entrypoints.openai.api_server"], signal.SIGKILL)
        wait_for("giving up", lambda: "fleet: giving up" in machine.model_log())
        assert wait_for("the auth_server is still there", machine.tokens)
        assert "vllm.entrypoints.openai.api_server" not in machine.processes()
        assert boot.poll() is None


def test_nothing_outlives_a_killed_supervisor(machine: Machine) -> None:
    with machine.running() as boot:
        wait_for("both run", lambda: len(machine.processes()) == 3)
        boot.kill()
        boot.wait()
        wait_for("the kernel has ended them", lambda: not machine.processes())


def test_a_second_supervisor_in_one_home_leaves_the_first_alone(machine: Machine) -> None:
    with machine.running():
        first = wait_for("tokens", machine.tokens)
        second = subprocess.run(
            ["bash", str(machine.script)], env=machine.environ, capture_output=True, timeout=30, check=False
        )
        assert (second.returncode, b"another one runs here already" in second.stderr) == (1, True)
        assert wait_for("tokens", machine.tokens)["boot_id"] == first["boot_id"]
