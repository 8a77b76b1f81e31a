"""Child processes: they do not outlive their parent, whatever ends it, and end with all that they started.

prctl(PR_SET_PDEATHSIG) makes the kernel send a signal when the *thread* that started the child ends
(prctl(2)), also after `kill -9`. It holds through exec, so a small Python sets it and becomes the program;
doing it between fork and exec in a process with threads would not be safe. The starting thread must therefore
live as long as the child shall.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_PROGRAM = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # else it died before the line above
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def dying_with_parent(command: Sequence[str]) -> tuple[str, ...]:
    """Return that command in a wrapper for Popen, with which the program is killed when this thread ends."""
    return (sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid()), *command)


def start_child(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    pass_fds: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process that is killed when the calling thread ends; it leads a session of its own.

    A terminal's Ctrl-C does not reach it, and `end_child` also ends what it has started in that session.
    stdin, stdout and stderr are as for Popen; by default its input is empty.
    pass_fds: files that stay open in it.
    """
    return subprocess.Popen(
        dying_with_parent(command),
        cwd=cwd,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def end_child(process: "subprocess.Popen[Any]", grace_s: float = 0.0) -> None:
    """Send SIGTERM to a child, after at most grace_s seconds SIGKILL to its whole process group; reap it.

    The child leads its group. One that was reaped before is left alone: its number may be another's by now.
    """
    if process.returncode is not None:
        return
    if grace_s > 0.0:
        os.kill(process.pid, signal.SIGTERM)  # Popen's own would reap one that has ended by itself
        _wait_for_end(process.pid, grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    process.wait()


def _wait_for_end(pid: int, most_s: float) -> None:
    """Wait until the child of that process number has ended, at most most_s seconds; do not reap it."""
    fd = os.pidfd_open(pid)
    try:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        ended.poll(most_s * 1000.0)
    finally:
        os.close(fd)
