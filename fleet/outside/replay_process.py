"""Plays the fleet's last day in a process of its own, because numba takes a second and 60 MB to import."""

import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from fleet.replay import BadReply
from process.children import end_child, start_child
from process.own_profiles import VARIABLE

MOST_REPLY = 4 * 2**20
"""Bytes of a reply: a curve of a thousand levels is 200 kB."""

TIMEOUT_S = 600.0
"""Seconds after which a replay is ended: it takes seconds, and ten minutes are a fault."""

ROOT = Path(__file__).parents[2]

SAFE_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", VARIABLE)
"""Variables of our environment that the replay gets: no key is among them."""


class ReplayFailed(BadReply):
    """The command ended with an error. said: the last line that it wrote about it."""

    def __init__(self, status: int, said: str) -> None:
        """Make the error. status: the exit status."""
        super().__init__(f"exit {status}: {said}")
        self.said = said


class ReplayProcess:
    """Runs a command that reads a request from its input and prints a reply; one process at a time."""

    def __init__(self, command: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        """Start no process yet. command: of the replay. timeout_s: seconds after which it is killed."""
        self._command = command
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._stopping = False
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, request: bytes, flags: Sequence[str] = ()) -> bytes:
        """Run the command with that request, and further flags; return its reply.

        Raises OSError, subprocess.TimeoutExpired, ReplayFailed or BadReply.
        """
        environment = {name: os.environ[name] for name in SAFE_ENVIRONMENT if name in os.environ}
        with self._lock:
            if self._stopping:
                raise BadReply("the autoscaler ends")
            child = self._child = start_child(
                [*self._command, *flags],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        with child:
            try:
                out, err = child.communicate(request, timeout=self._timeout_s)
            finally:
                end_child(child)
                with self._lock:
                    self._child = None
        if child.returncode != 0:
            last = err.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise ReplayFailed(child.returncode, last[0][:200])
        if len(out) > MOST_REPLY:
            raise BadReply(f"{len(out)} bytes; {MOST_REPLY} at most")
        return out

    def stop(self) -> None:
        """End the replay process that is running, and start none any more."""
        with self._lock:
            self._stopping, child = True, self._child
        if child is not None:
            end_child(child)
