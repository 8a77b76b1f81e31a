"""Child processes end with all that they started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from process.children import end_child, start_child


def living(pid: int) -> bool:
    """Whether that process runs; one that has ended and is not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int) -> None:
    """Return when that process is gone; fail after 5 s."""
    limit = time.monotonic() + 5.0
    while living(pid):
        assert time.monotonic() < limit
        time.sleep(0.01)


def start(program: str, tmp_path: Path) -> "subprocess.Popen[bytes]":
    """Start a Python child."""
    command = (sys.executable, "-I", "-S", "-c", program)
    return start_child(command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def first_line(child: "subprocess.Popen[bytes]") -> str:
    """Return the first line that the child has written."""
    assert child.stdout is not None
    return child.stdout.readline().decode().strip()


STARTS_ANOTHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""


def test_a_child_leads_a_session_and_has_no_input(tmp_path: Path) -> None:
    with start(
        "import os, sys; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '')", tmp_path
    ) as child:
        assert first_line(child) == "True True"


def test_what_a_child_has_started_ends_with_it(tmp_path: Path) -> None:
    with start(STARTS_ANOTHER + "time.sleep(600)", tmp_path) as child:
        theirs = int(first_line(child))
        end_child(child)
        assert child.returncode == -signal.SIGKILL
        wait_gone(theirs)


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
def test_what_a_child_has_left_behind_ends_too(tmp_path: Path, grace_s: float) -> None:
    """It has ended by itself and was not reaped: its number is still its own."""
    with start(STARTS_ANOTHER, tmp_path) as child:
        theirs = int(first_line(child))
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert living(theirs)
        end_child(child, grace_s)
        assert child.returncode == 0
        wait_gone(theirs)


@pytest.mark.parametrize(("handles", "status"), [(True, 7), (False, -signal.SIGKILL)])
def test_a_child_may_end_by_itself_within_its_grace(tmp_path: Path, handles: bool, status: int) -> None:
    action = "lambda *_: sys.exit(7)" if handles else "signal.SIG_IGN"
    program = f"import signal, sys; signal.signal(signal.SIGTERM, {action}); print(1, flush=True)\n"
    program += "import time; time.sleep(600)"
    with start(program, tmp_path) as child:
        first_line(child)
        begun = time.monotonic()
        end_child(child, 60.0 if handles else 0.2)
        assert child.returncode == status
        assert time.monotonic() - begun < 30.0


def test_one_that_was_reaped_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start("", tmp_path) as child:
        child.wait()
        monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("its number may be another's"))
        end_child(child, 1.0)
