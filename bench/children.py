"""Child processes of a benchmark: started with a log, waited for, measured and ended.

Each ends with the benchmark, whatever ends that (process/children.py); what one of them started itself is
ended by its number.

Processor time is utime + stime of /proc/PID/stat, with that of children it has waited for. The kernel says it
in steps of 10 ms.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from process.children import end_child, start_child

ROOT = Path(__file__).parent.parent

UP_S = 120.0
"""Seconds for a child to be ready; litellm imports for some 15 s before its first answer."""

END_S = 15.0
"""Seconds from SIGTERM to SIGKILL."""

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


# -- what /proc says -----------------------------------------------------------------------------------


def parse_stat(text: str) -> tuple[int, float]:
    """Return (parent, seconds of processor with those of children it has waited for) of a /proc/PID/stat."""
    fields = text.rpartition(")")[2].split()  # the name before may have spaces and brackets
    return int(fields[1]), sum(int(fields[n]) for n in (11, 12, 13, 14)) * _TICK_S


def tree_of(parents: dict[int, int], root: int) -> list[int]:
    """Return that process and all that descend from it. parents: of each process."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found


def snapshot() -> dict[int, tuple[int, float]]:
    """Return (parent, seconds of processor) of every process."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                found[int(path.name)] = parse_stat((path / "stat").read_text())
    return found


def cpu_s(pid: int) -> float:
    """Return seconds of processor that one process has used."""
    return parse_stat(Path(f"/proc/{pid}/stat").read_text())[1]


def tree_cpu_s(roots: Sequence[int]) -> float:
    """Return seconds of processor of those processes and all that they started."""
    seen = snapshot()
    parents = {pid: parent for pid, (parent, _) in seen.items()}
    pids = {pid for root in roots for pid in tree_of(parents, root)}
    return sum(seen[pid][1] for pid in pids if pid in seen)


def memory_mb(pid: int) -> float:
    """Return what that process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# -- children ------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Run what is started inside on that core alone; -1 is the last, None any."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {sorted(before)[core if len(before) > 1 else 0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class ChildProcess:
    """A process of ours. log: all that it says."""

    pid: int
    log: Path
    process: "subprocess.Popen[bytes]" = field(repr=False)


@contextlib.contextmanager
def child(
    command: Sequence[str], log: Path, *, core: int | None = None, environ: dict[str, str] | None = None
) -> Iterator[ChildProcess]:
    """Start that process, on that core; it and what it started is gone afterwards."""
    with log.open("wb") as out, on_core(core):
        process = start_child(
            tuple(command),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield ChildProcess(process.pid, log, process)
    finally:
        parents = {pid: parent for pid, (parent, _) in snapshot().items()}
        started = tree_of(parents, process.pid)[1:]
        end_child(process, END_S)
        for pid in started:
            with contextlib.suppress(OSError):
                if os.getsid(pid) == process.pid:  # else it has ended, and its number is another's
                    os.kill(pid, signal.SIGKILL)


def wait_for(what: str, of: ChildProcess, ready: Callable[[], bool], limit_s: float = UP_S) -> None:
    """Return when it is so; RuntimeError with the end of the log when it ends before, or takes too long."""
    limit = time.monotonic() + limit_s
    while not ready():
        if of.process.poll() is not None or time.monotonic() > limit:
            end = of.log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{what} does not answer after at most {limit_s:g} s:\n{end}")
        time.sleep(0.1)


def said(what: str, of: ChildProcess, pattern: str) -> str:
    """Return the first group of what the log matches, as soon as it does."""
    wait_for(what, of, lambda: re.search(pattern, of.log.read_text()) is not None)
    found = re.search(pattern, of.log.read_text())
    assert found is not None
    return str(found[1])
