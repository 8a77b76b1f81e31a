"""Everything on one machine: started in order, revived when it dies, and gone when it is over."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import local_stack
from errors import ConfigError
from local_stack import AUTOSCALER, CLOUD, LOADBALANCER, ChildFailed, LocalStack, Programs, StackConfig
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent

SERVER = """
import http.server, json, os, sys
rows = json.loads(os.environ.get("ROWS", "[]"))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        file = os.environ.get("ROWS_FILE", "")
        now = json.load(open(file)) if file and os.path.exists(file) else rows
        body = json.dumps({"instances": now, "status": "ok"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
words = sys.argv[1:]
if "prepare" in words:
    print("prepared 1 of 1", flush=True)
    sys.exit(int(os.environ.get("PREPARE_STATUS", "0")))
if "destroy-fleet" in words:
    file = os.environ.get("ROWS_FILE", "")
    if file and not os.environ.get("DESTROY_FAILS"):
        open(file, "w").write("[]")
    sys.exit(0)
port = int(words[words.index("--port") + 1])
print("listening", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def stand_ins(tmp_path: Path, **broken: Sequence[str]) -> Programs:
    """Programs that answer with one hot instance; `broken` names those that are something else."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    good = (sys.executable, str(script))
    return Programs(**{"cloud": good, "autoscaler": good, "loadbalancer": good, **broken})


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-ins list; destroy-fleet empties it."""
    file = tmp_path / "rows.json"
    file.write_text('[{"id": 1, "state": "hot"}]')
    monkeypatch.setenv("ROWS_FILE", str(file))
    return file


def config(tmp_path: Path, **other: Any) -> StackConfig:
    return StackConfig(state_dir=tmp_path / "state", **other)


def running(tmp_path: Path) -> list[int]:
    """Processes that run the stand-in of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(tmp_path / "server.py").encode() in words:
                found.append(int(entry.name))
    return found


def test_inside_it_all_run_and_after_it_none_does(tmp_path: Path, rows: Path) -> None:
    said: list[str] = []
    with LocalStack(config(tmp_path), stand_ins(tmp_path), said.append) as stack:
        assert len(running(tmp_path)) == 3
        assert "prepared 1 of 1" in said
        assert "hot: 1 of 1 instances" in said
    assert running(tmp_path) == []
    end = stack.stop()
    assert (end.left_behind, dict(end.restarts)) == ((), {})


@pytest.mark.parametrize("name", [CLOUD, AUTOSCALER, LOADBALANCER])
def test_a_child_that_dies_is_started_again_on_its_port(tmp_path: Path, rows: Path, name: str) -> None:
    with LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None) as stack:
        url = {
            CLOUD: stack.cloud_url,
            AUTOSCALER: stack.autoscaler_url,
            LOADBALANCER: stack.loadbalancer_url,
        }[name]
        before = stack.pid(name)
        os.kill(before, signal.SIGKILL)
        wait_for("another one", lambda: stack.pid(name) != before)
        wait_for("it answers", lambda: local_stack._get(f"{url}/health"))
        assert dict(stack.restarts) == {name: 1}
    assert running(tmp_path) == []


def test_what_is_left_is_named(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESTROY_FAILS", "1")
    with LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None) as stack:
        pass
    assert stack.stop().left_behind == ("instance 1",)


def test_a_program_that_does_not_start_is_told_with_its_log_and_all_are_ended(
    tmp_path: Path, rows: Path
) -> None:
    broken = (sys.executable, "-c", "print('no luck today'); raise SystemExit(3)")
    with (
        pytest.raises(ChildFailed, match=r"(?s)loadbalancer exited with status 3.*no luck today"),
        LocalStack(config(tmp_path), stand_ins(tmp_path, loadbalancer=broken), lambda _: None),
    ):
        pass
    assert running(tmp_path) == []


def test_a_pool_that_cannot_be_prepared_ends_everything(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREPARE_STATUS", "2")
    with (
        pytest.raises(ChildFailed, match="prepare exited with status 2"),
        LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None),
    ):
        pass
    assert running(tmp_path) == []


def test_an_error_inside_ends_everything(tmp_path: Path, rows: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="inside"),
        LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None),
    ):
        raise RuntimeError("inside")
    assert running(tmp_path) == []


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from local_stack import LocalStack, Programs, StackConfig
program = (sys.executable, sys.argv[2])
with LocalStack(StackConfig(state_dir=Path(sys.argv[3])), Programs(program, program, program), print):
    print("all are up", flush=True)
    import time
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path: Path, rows: Path, number: signal.Signals) -> None:
    stand_ins(tmp_path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(ROOT), str(tmp_path / "server.py"), str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert parent.stdout is not None
        wait_for("all are up", lambda: parent.stdout and "all are up" in parent.stdout.readline())
        parent.send_signal(number)
        parent.wait(timeout=30)
        wait_for("all are gone", lambda: not running(tmp_path))
    finally:
        parent.kill()
        parent.communicate()


def test_no_real_key_and_no_real_address_reaches_a_child(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing VAST_URL means the paid service, and a real key is nobody's business here."""
    monkeypatch.setenv("VAST_API_KEY", "a-real-key")
    monkeypatch.setenv("VAST_URL", "https://console.vast.ai")
    with LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None) as stack:
        for name in (CLOUD, AUTOSCALER, LOADBALANCER):
            environ = Path(f"/proc/{stack.pid(name)}/environ").read_bytes()
            assert b"a-real-key" not in environ
            assert b"console.vast.ai" not in environ


@pytest.mark.parametrize(
    "wrong", [{"model": "no-such"}, {"instances": 0}, {"instances": 99}, {"speedup": 0.5}], ids=str
)
def test_a_stack_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LocalStack(config(tmp_path, **wrong))


def test_a_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        LocalStack(config(tmp_path))
