"""Everything on one machine: started in order, revived when it dies, and gone when it is over."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from process.errors import ConfigError
from simulation.live import local_stack, stack_children
from simulation.live.local_stack import AUTOSCALER, CLOUD, LOADBALANCER, ChildFailed, LocalStack
from simulation.live.stack_children import StackChild
from simulation.live.stack_config import Programs, StackConfig
from tests.paths import ROOT
from tests.waiting import wait_for

SERVER = """
import http.server, json, os, sys, time
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
    time.sleep(float(os.environ.get("PREPARE_S", "0")))
    sys.exit(int(os.environ.get("PREPARE_STATUS", "0")))
if "destroy-fleet" in words:
    time.sleep(float(os.environ.get("DESTROY_S", "0")))
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
        assert f"loadbalancer: {stack.loadbalancer_url}  autoscaler: {stack.autoscaler_url}" in said
        assert f"watch the fleet in a browser: {stack.autoscaler_url}/" in said
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
        wait_for("it answers", lambda: local_stack.get_json(f"{url}/health"))
        assert dict(stack.restarts) == {name: 1}
    assert running(tmp_path) == []


IGNORES_SIGTERM = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
del sys.argv[0]
exec(open(sys.argv[0]).read())
"""

LEAVES_ONE_BEHIND = """
import os, subprocess, sys
root = sys.argv[sys.argv.index("--root") + 1]
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]],
                 env={"HOME": root + "/instances/7"}, start_new_session=True)
del sys.argv[0]
exec(open(sys.argv[0]).read())
"""


def test_a_child_that_dies_again_and_again_is_given_longer_and_longer(tmp_path: Path) -> None:
    """It must not take the processor from those that are well; after a settled life it is quick again."""
    child = StackChild(CLOUD, ("false",), tmp_path / "log", os.environ)
    pauses, now = [], time.monotonic()
    for _ in range(7):
        child.process.wait()
        child.revive(now)
        assert child.restart_at is not None
        pauses.append(round(child.restart_at - now, 3))
        child.revive(child.restart_at - 0.001)
        assert child.restart_at is not None, "not before its time"
        now = child.restart_at
        child.revive(now)
        assert child.restart_at is None
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    child.process.wait()
    child.revive(now + stack_children.SETTLED_S + 1.0)
    assert child.restart_at == pytest.approx(now + stack_children.SETTLED_S + 1.0 + 0.2)
    assert child.restarts == 7


def test_a_child_that_ignores_sigterm_is_killed(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_stack, "TERM_GRACE_S", 0.3)
    deaf = (sys.executable, "-c", IGNORES_SIGTERM, str(tmp_path / "server.py"))
    with LocalStack(config(tmp_path), stand_ins(tmp_path, loadbalancer=deaf), lambda _: None) as stack:
        assert len(running(tmp_path)) == 3
    assert running(tmp_path) == []
    assert stack.stop().left_behind == ()


def test_a_process_that_outlives_its_cloud_is_named_and_ended(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_children, "STRAY_GRACE_S", 0.2)
    cloud = (sys.executable, "-c", LEAVES_ONE_BEHIND, str(tmp_path / "server.py"))
    with LocalStack(config(tmp_path), stand_ins(tmp_path, cloud=cloud), lambda _: None) as stack:
        assert len(running(tmp_path)) == 4
    (left,) = stack.stop().left_behind
    assert left.startswith("process ")
    assert "sleep(60)" in left
    wait_for("it is gone", lambda: not running(tmp_path))


def test_what_is_left_is_named(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESTROY_FAILS", "1")
    with LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None) as stack:
        pass
    assert stack.stop().left_behind == ("instance 1",)


def test_a_destroy_fleet_that_hangs_is_ended_and_what_it_left_is_named(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESTROY_S", "60")
    monkeypatch.setattr(local_stack, "DESTROY_TIMEOUT_S", 0.5)
    said: list[str] = []
    with LocalStack(config(tmp_path), stand_ins(tmp_path), said.append) as stack:
        pass
    assert stack.stop().left_behind == ("instance 1",)
    assert any("destroy-fleet hung" in line for line in said)
    assert running(tmp_path) == []


def test_a_cloud_that_does_not_answer_at_the_end_leaves_it_unknown(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is claimed to be gone that nobody has seen gone."""
    monkeypatch.setenv("DESTROY_FAILS", "1")  # else it would mend what the cloud answers
    with LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None) as stack:
        monkeypatch.setattr(local_stack, "UP_TIMEOUT_S", 0.3)
        rows.write_text("not JSON")
    assert stack.stop().left_behind == ("unknown: the local cloud does not answer",)


def test_a_temporary_directory_goes_with_it_unless_something_was_left(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LocalStack(StackConfig(), stand_ins(tmp_path), lambda _: None) as stack:
        assert stack.state_dir.stat().st_mode & 0o077 == 0
    assert not stack.state_dir.exists()
    rows.write_text('[{"id": 1, "state": "hot"}]')
    monkeypatch.setenv("DESTROY_FAILS", "1")
    with LocalStack(StackConfig(), stand_ins(tmp_path), lambda _: None) as stack:
        pass
    assert (stack.state_dir / "logs" / "autoscaler.log").exists(), "its logs are needed now"


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


def test_a_program_that_never_answers_is_told(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_stack, "UP_TIMEOUT_S", 1.0)
    mute = (sys.executable, "-c", "print('thinking', flush=True); import time; time.sleep(60)")
    with (
        pytest.raises(ChildFailed, match=r"(?s)localcloud did not answer within 1 s.*thinking"),
        LocalStack(config(tmp_path), stand_ins(tmp_path, cloud=mute), lambda _: None),
    ):
        pass


def test_a_pool_that_is_never_ready_is_given_up(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREPARE_S", "60")
    monkeypatch.setattr(local_stack, "PREPARE_TIMEOUT_S", 0.5)
    with (
        pytest.raises(ChildFailed, match=r"prepare was not done after 0\.5 s"),
        LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None),
    ):
        pass
    assert running(tmp_path) == []


def test_a_fleet_that_never_becomes_hot_is_told_with_its_states(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_stack, "HOT_TIMEOUT_S", 0.5)
    rows.write_text('[{"id": 1, "state": "cold"}]')
    with (
        pytest.raises(ChildFailed, match=r"0 of 1 instances hot after 0\.5 s, states \['cold'\]"),
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
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from simulation.live.local_stack import LOADBALANCER, LocalStack
from simulation.live.stack_config import Programs, StackConfig
program = (sys.executable, sys.argv[2])
programs = Programs(program, program, program)
with LocalStack(StackConfig(state_dir=Path(sys.argv[3])), programs, print) as stack:
    if sys.argv[4] == "revived":
        first = stack.pid(LOADBALANCER)
        os.kill(first, signal.SIGKILL)
        while stack.pid(LOADBALANCER) == first:
            time.sleep(0.01)
    print("all are up", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("when", ["up", "revived", "preparing"])
def test_no_child_outlives_its_parent(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, when: str
) -> None:
    """After kill -9 and after Ctrl-C: when all are up, when one was started again by the watcher's thread,
    and while the pool is still being prepared."""
    stand_ins(tmp_path)
    if when == "preparing":
        monkeypatch.setenv("PREPARE_S", "60")
    arguments = (str(ROOT), str(tmp_path / "server.py"), str(tmp_path / "state"), when)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    awaited = "prepared 1 of 1" if when == "preparing" else "all are up"
    try:
        assert parent.stdout is not None
        wait_for(awaited, lambda: parent.stdout and awaited in parent.stdout.readline())
        wait_for("there are children", lambda: len(running(tmp_path)) >= 2)
        parent.send_signal(number)
        parent.wait(timeout=30)
        wait_for("all are gone", lambda: running(tmp_path) == [])
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


def command_of(stack: LocalStack, name: str) -> list[str]:
    return Path(f"/proc/{stack.pid(name)}/cmdline").read_text().split("\0")


def flag_of(stack: LocalStack, name: str, flag: str) -> str:
    words = command_of(stack, name)
    return words[words.index(flag) + 1]


def test_with_real_vllm_the_cloud_is_sped_up_and_deadlines_are_not(tmp_path: Path, rows: Path) -> None:
    """Its model server takes its own time, and no more than two fit."""
    wanted = config(tmp_path, engine="vllm", model="tiny", instances=2)
    with LocalStack(wanted, stand_ins(tmp_path), lambda _: None) as stack:
        assert stack.engine == "local cloud, vllm engine"
        assert flag_of(stack, CLOUD, "--engine") == "vllm"
        assert flag_of(stack, CLOUD, "--speedup") == "60"
        assert flag_of(stack, AUTOSCALER, "--speedup") == "1"
        assert flag_of(stack, AUTOSCALER, "--max-instances") == "2"
        assert flag_of(stack, AUTOSCALER, "--model") == "tiny"


def test_with_the_paced_engine_both_are_sped_up(tmp_path: Path, rows: Path) -> None:
    with LocalStack(config(tmp_path), stand_ins(tmp_path), lambda _: None) as stack:
        assert flag_of(stack, CLOUD, "--engine") == "paced"
        assert flag_of(stack, CLOUD, "--speedup") == flag_of(stack, AUTOSCALER, "--speedup") == "60"
        assert flag_of(stack, AUTOSCALER, "--max-instances") == "6"


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "no-such"},
        {"instances": 0},
        {"instances": 99},
        {"speedup": 0.5},
        {"engine": "gpu"},
        {"engine": "vllm", "instances": 1},
        {"engine": "vllm", "model": "tiny", "instances": 3},
    ],
    ids=str,
)
def test_a_stack_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LocalStack(config(tmp_path, **wrong))


def test_a_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        LocalStack(config(tmp_path))
