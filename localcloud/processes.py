"""The processes of instances: found by their home, signalled together, ended also when the cloud is killed.

    python processes.py DIR     the warden of the instances in DIR; ends when its input does

A session or a process group does not hold an instance together: its start script may say `setsid` or end
before what it started, and commands given over ssh are nobody's children. What they all have is HOME, which
lies in the instance's directory. The warden is a process of its own, which waits for the local cloud to end,
however that comes about, and then ends what it left; until then it holds the lock of the cloud's directory.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GONE_S = 5.0
"""How long killed processes may take to be gone."""


def living() -> Iterator[tuple[int, int]]:
    """(process, session) of every process that has not ended."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{entry.name}/stat", "rb") as f:
                fields = f.read().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    yield int(entry.name), int(fields[3])


def home_of(pid: int) -> str:
    """HOME of that process as it was started; empty when it has none, or is another user's."""
    return next((e[5:].decode(errors="replace") for e in _read(pid, "environ") if e[:5] == b"HOME="), "")


def command_line(pid: int) -> list[bytes]:
    """Its program and arguments; one empty string when it has ended."""
    return _read(pid, "cmdline") or [b""]


def _read(pid: int, name: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as f:
            return f.read().split(b"\0")
    except OSError:
        return []


def living_in(directory: Path, session: int | None = None) -> list[int]:
    """The processes whose home lies below that directory, and those of that session."""
    below = f"{directory}/"
    return [pid for pid, of in living() if of == session or home_of(pid).startswith(below)]


def signal_all(directory: Path, number: int, session: int | None = None) -> int:
    """That signal to all of `living_in`; how many there were."""
    found = living_in(directory, session)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(found)


def end_all(directory: Path, session: int | None = None) -> None:
    """None of `living_in` is left, or GONE_S are over."""
    limit = time.monotonic() + GONE_S
    while signal_all(directory, signal.SIGKILL, session) and time.monotonic() < limit:
        time.sleep(0.005)


def lock(path: Path, wait_s: float) -> int | None:
    """The file, locked for this process and those it is given to; None when another has it for so long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    limit = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                os.close(fd)
                return None
            time.sleep(0.02)
        else:
            return fd


class Warden:
    """Runs from now on; when this process has ended no process has its home below that directory."""

    def __init__(self, directory: Path, locked: int) -> None:
        """locked: a lock, which is free again when all of them are gone."""
        self._process = subprocess.Popen(
            # -S: half the memory; nothing but the standard library is needed.
            (sys.executable, "-I", "-S", __file__, str(directory)),
            stdin=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=(locked,),
            start_new_session=True,  # a Ctrl-C is for the cloud
        )

    def close(self) -> None:
        """It has done its work; call it last."""
        self._process.communicate()


def main() -> None:
    """Wait for the end of the input; then end them all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    end_all(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
