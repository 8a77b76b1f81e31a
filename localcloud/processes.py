"""The processes of instances: found by their home, signalled together, ended also when the cloud is killed.

    python processes.py DIR     the warden of the instances in DIR; ends when its input does

A session or a process group does not hold an instance together: its start script may say `setsid` or end
before what it started, and commands given over ssh are not its children. What they all have is HOME, which
lies in the instance's directory. The warden is a process of its own, which waits for the local cloud to end,
in whatever way, and then ends what it left; until then it holds the lock of the cloud's directory.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

GONE_S = 5.0
"""Longest seconds to wait for killed processes to be gone."""


def living() -> Iterator[tuple[int, int]]:
    """Yield (process id, session id) of every process on this machine that has not ended."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{entry.name}/stat", "rb") as f:
                fields = f.read().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    yield int(entry.name), int(fields[3])


def home_of(pid: int) -> str:
    """Return the HOME that a process was started with; empty when it has none or is another user's."""
    return next((e[5:].decode(errors="replace") for e in _read(pid, "environ") if e[:5] == b"HOME="), "")


def command_line(pid: int) -> list[bytes]:
    """Return a process's program and arguments; one empty string when it has ended."""
    return _read(pid, "cmdline") or [b""]


def _read(pid: int, name: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as f:
            return f.read().split(b"\0")
    except OSError:
        return []


def living_in(directory: Path, session: int | None = None) -> list[int]:
    """Return the ids of processes whose HOME lies below that directory, or that belong to that session."""
    below = f"{directory}/"
    return [pid for pid, of in living() if of == session or home_of(pid).startswith(below)]


def signal_all(directory: Path, number: int, session: int | None = None) -> int:
    """Send a signal to all processes whose HOME lies below that directory or that belong to that session.

    Return how many there were.
    """
    found = living_in(directory, session)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(found)


def end_all(directory: Path, session: int | None = None) -> None:
    """Kill all processes whose HOME lies below that directory or that belong to that session.

    Return when none is left, or after GONE_S seconds.
    """
    limit = time.monotonic() + GONE_S
    while signal_all(directory, signal.SIGKILL, session) and time.monotonic() < limit:
        time.sleep(0.005)


def shared_memory_of(pids: Iterable[int]) -> set[int]:
    """Return the inodes in /dev/shm that these processes have open (a semaphore has another name there)."""
    found = set()
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/maps") as f:
            found |= {int(line.split(maxsplit=5)[4]) for line in f if "/dev/shm/" in line}  # noqa: S108
    return found


def remove_shared_memory(inodes: Collection[int]) -> None:
    """Delete the files in /dev/shm with these inodes.

    Docker removes a container's by itself; those of killed processes stay.
    """
    for entry in os.scandir("/dev/shm") if inodes else ():  # noqa: S108
        if entry.inode() in inodes:
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


def least_used_processor(used: Sequence[int | None]) -> int:
    """Return the processor that is least often in `used`, of those that this process may run on."""
    return min(sorted(os.sched_getaffinity(0)), key=used.count)


def lock(path: Path, wait_s: float) -> int | None:
    """Lock a file for this process and its children; return the file's descriptor.

    Return None if another process keeps the lock for wait_s seconds.
    """
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
    """A process that outlives this one and then kills every process whose home is below a directory."""

    def __init__(self, directory: Path, locked: int) -> None:
        """Start the warden of that directory.

        locked: descriptor of a lock, which is free again when all processes are gone.
        """
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
        """End the warden, which kills what is left below its directory; to be called last."""
        self._process.communicate()


def main() -> None:
    """Run as the warden: wait for the end of the input; then kill all processes below the directory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    end_all(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
