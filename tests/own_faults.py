"""Faults of our own side, and a cloud that acts behind our back: how each is caused on a local stack.

ledger_locked     somebody else holds the ledger: a backup, a shell
small_disk, full  the state directory's disk is full; needs root
DAMAGE            what may happen to the ledger's file
tests.odd_clock   the clock is set, the computer sleeps
cloud_call        the local cloud's faults (network gone: `ssh-hangs` and `port-drops`), and a machine that is
                  destroyed behind our back
lie               an instance whose auth_server, or whatever it is, is another program
"""

import json
import os
import signal
import sqlite3
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from localcloud import processes

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(
    url: str, method: str = "GET", body: Any = None, key: str = "", timeout_s: float = 10.0
) -> tuple[int, Any]:
    """Return status and JSON of an answer; (0, None) when none came."""
    asked = urllib.request.Request(  # noqa: S310 our own ports
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with _direct.open(asked, timeout=timeout_s) as reply:
            return int(reply.status), json.load(reply)
    except urllib.error.HTTPError as e:
        with suppress(ValueError):
            return e.code, json.load(e)
        return e.code, None
    except (OSError, ValueError):
        return 0, None


def cloud_call(stack: Any, method: str, path: str, body: Any = None) -> Any:
    """Ask the local cloud of that stack, with its key; fail where it refuses."""
    status, said = call(stack.cloud_url + path, method, body, stack.cloud_key)
    assert 200 <= status < 300, (method, path, status, said)
    return said


def fault_on(stack: Any, name: str, **args: Any) -> None:
    """Switch a fault of the local cloud on."""
    cloud_call(stack, "POST", "/localcloud/faults", {"name": name, **args})


def fault_off(stack: Any, name: str) -> None:
    """Switch a fault of the local cloud off."""
    cloud_call(stack, "DELETE", f"/localcloud/faults/{name}")


def destroy_unasked(stack: Any, instance_id: int) -> None:
    """Destroy an instance behind the autoscaler's back, as its owner, or a person, would."""
    cloud_call(stack, "DELETE", f"/api/v0/instances/{instance_id}/", {})


@contextmanager
def ledger_locked(path: Path) -> Iterator[None]:
    """Hold the ledger's lock."""
    db = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    try:
        db.execute("BEGIN EXCLUSIVE")
        yield
        db.execute("ROLLBACK")
    finally:
        db.close()


@contextmanager
def small_disk(path: Path, megabytes: int = 8) -> Iterator[None]:
    """Let the directory be a disk of its own, so that it can be full; it is empty at first."""
    path.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(path)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(path)], check=False)


@contextmanager
def full(path: Path) -> Iterator[None]:
    """Fill the disk on which that directory is, which must be a small one, to its last byte."""
    ballast = path / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as f:
        for size in (1 << 16, 1 << 9, 1):
            with suppress(OSError):
                while f.write(b"x" * size):
                    pass
    try:
        yield
    finally:
        ballast.unlink(missing_ok=True)


def _overwritten(begin: Callable[[int], int], length: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        at = begin(path.stat().st_size)
        with path.open("r+b") as f:
            f.seek(at)
            f.write(b"\xa5" * length)

    return damage


def _every_page(path: Path) -> None:
    with path.open("r+b") as f:
        for at in range(4096, path.stat().st_size, 4096):
            f.seek(at + 100)
            f.write(b"\xa5" * 64)


def _no_database(path: Path) -> None:
    path.write_bytes(b"no database " * 999)


def _without_log(path: Path) -> None:
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


DAMAGE: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "lost": lambda path: path.unlink(),
        "empty": lambda path: os.truncate(path, 0),
        "half": lambda path: os.truncate(path, path.stat().st_size // 2),
        "no database": _no_database,
        "first bytes": _overwritten(lambda _: 0, 16),
        "schema page": _overwritten(lambda _: 100, 300),
        "second page": _overwritten(lambda _: 4096, 512),
        "middle": _overwritten(lambda size: size // 2 // 4096 * 4096, 4096),
        "last page": _overwritten(lambda size: size - 4096, 4096),
        "every page": _every_page,
    }
)
"""What may happen to a file of SQLite, by name."""


def damage(path: Path, how: str) -> None:
    """Damage the ledger's file, and take its write-ahead log away, which would mend it."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=2.0)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    DAMAGE[how](path)
    _without_log(path)


def lie(home: Path, program: str, module: str = "remote.auth_server") -> None:
    """Replace one module of a running instance by another program, and let its supervisor start that.

    home: the directory of the instance on the local cloud. The next boot brings the right one back.
    """
    (home / "home/fleet" / (module.replace(".", "/") + ".py")).write_text(program)
    for pid in processes.living_in(home):
        if module.encode() in processes.command_line(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
