"""The child processes of the local stack: start, start again with back-off, end, and look for leftovers.

A child asks the kernel for SIGKILL at the end of the thread that started it (process/children.py). It leads a
session of its own: the terminal's Ctrl-C does not reach it, and its whole process group can be ended.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fleet_client.back_off import back_off_s
from localcloud import processes
from process.children import end_child, start_child

ROOT = Path(__file__).resolve().parents[2]

STRAY_GRACE_S = 3.0
"""Seconds that instances' processes may take to be gone after their cloud has ended."""

RESTART_PAUSE_S = (0.2, 5.0)
"""Seconds before a dead child is started again: the first pause, doubling up to the second while it dies at
once."""

SETTLED_S = 10.0
"""Seconds after which a child counts as well started; its next death is answered with the short pause
again."""

NOT_FOR_CHILDREN = ("VAST_", "LOCALCLOUD_", "AUTOSCALER_", "LOADBALANCER_")
"""Beginnings of names in the environment that are for other processes than the stack's."""

TAIL_LINES = 20
"""Lines of a log that are shown when something failed."""


class StackChild:
    """One child process of the local stack, which is to run until the stack ends, and its restarts."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start the child process; its output is appended to the log, except stdout where that is given.

        pass_fds: files of ours that stay open in it.
        """
        self.name = name
        self.log = log
        self.restarts = 0
        self.restart_at: float | None = None  # on the monotonic clock, while it is dead
        self._command = command
        self._environment = environment
        self._pass_fds = tuple(pass_fds)
        self._deaths = 0  # in a row, each soon after its start
        self.process = self._popen(stdout)
        self._started_at = time.monotonic()

    def _popen(self, stdout: int | None = None) -> subprocess.Popen[bytes]:
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            return start_child(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdout=out if stdout is None else stdout,
                stderr=out,
                pass_fds=self._pass_fds,
            )

    def revive(self, now: float) -> None:
        """Start the child process again if it has died and its pause is over.

        The watcher calls this again and again.
        """
        if self.process.poll() is None:
            return
        if self.restart_at is None:
            if now - self._started_at > SETTLED_S:
                self._deaths = 0
            self._deaths += 1
            self.restart_at = now + back_off_s(self._deaths, *RESTART_PAUSE_S)
            with self.log.open("a") as log:
                log.write(f"local stack: exited with status {self.process.returncode}, starting it again\n")
        elif now >= self.restart_at:
            try:
                self.process = self._popen()
            except OSError:  # no memory or processes left for now: the watcher must live, and tries again
                return
            self._started_at, self.restart_at = now, None
            self.restarts += 1

    def end(self, grace_s: float) -> None:
        """Send SIGTERM to the child, and after grace_s seconds SIGKILL to all processes of its session."""
        end_child(self.process, grace_s)


def child_environment(cloud_key: str, state_dir: Path) -> dict[str, str]:
    """Return the environment for children of the stack: ours without a real Vast.ai key or URL.

    It has a key that only this local cloud takes. Flags for servers of the operator's are left out, too:
    those of the stack are told all on their command lines.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_FOR_CHILDREN)}
    local = "127.0.0.1,localhost"
    return kept | {
        "LOCALCLOUD_API_KEY": cloud_key,
        "NO_PROXY": local,
        "no_proxy": local,
        "TMPDIR": str(state_dir),
    }


def end_strays(state_dir: Path) -> list[str]:
    """End processes of instances that outlived their local cloud; return their names."""
    limit = time.monotonic() + STRAY_GRACE_S
    while (strays := _strays(state_dir)) and time.monotonic() < limit:
        time.sleep(0.05)
    for pid in strays:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process {pid} ({what})" for pid, what in strays.items()]


def _strays(state_dir: Path) -> dict[int, str]:
    """Return processes whose home lies in the state directory, as an instance's does: name by process id."""
    found = {}
    for pid in processes.living_in(state_dir):
        program, *arguments = (part.decode(errors="replace") for part in processes.command_line(pid))
        if program:  # else it has ended meanwhile
            found[pid] = " ".join((Path(program).name, *arguments)).strip()[:80]
    return found


def log_tail(log: Path) -> str:
    """Return the last lines of a log, indented, or why it cannot be read."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as e:
        return f"  ({log}: {e.strerror})"
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
