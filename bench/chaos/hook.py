"""The hook of one process: its clock, its network and its disk go wrong, and nobody else's (hook.c).

It is a library that is put before the C library (LD_PRELOAD) and looks into a file that is mapped here,
too. It needs gcc and Linux on x86-64; without them the kinds that need it are left out,
and the campaign says so.
"""

import mmap
import os
import platform
import shutil
import socket
import struct
import subprocess
from collections.abc import Collection
from pathlib import Path

from bench.children import ROOT

SOURCE = Path(__file__).with_name("hook.c")
BUILT = ROOT / "build" / "chaos" / "hook.so"

_HEAD = struct.Struct("<qqiiii32i")
_PATH_MAX = 4096
SIZE = _HEAD.size + _PATH_MAX

WORKS = 0
HANGS, UNREACHABLE = 1, 2
FULL, READ_ONLY = 1, 2


def build_hook() -> Path | None:
    """Return the library, made anew when its source is younger; None where it cannot be made."""
    if platform.machine() != "x86_64" or shutil.which("gcc") is None:
        return None
    if not BUILT.exists() or BUILT.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        made = BUILT.with_name(f"hook-{os.getpid()}.so")
        subprocess.run(
            ("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", made, SOURCE, "-ldl"),
            check=True,
        )
        made.replace(BUILT)
    return BUILT


class Hook:
    """What one process is told. Its methods take effect at once."""

    def __init__(self, library: Path, path: Path, directory: Path) -> None:
        """Begin with all well. directory: whose disk is spoilt for it."""
        path.touch(mode=0o600)
        os.truncate(path, SIZE)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self.environ = {"LD_PRELOAD": str(library), "CHAOS_HOOK": str(path)}
        name = os.fsencode(directory.resolve())
        self._map[_HEAD.size : _HEAD.size + len(name)] = name
        self._wall_s = self._boot_s = 0.0
        self._network = self._disk = WORKS
        self._known: tuple[int, ...] = ()
        self._hole = _hole_port()

    def _tell(self) -> None:
        known = self._known[:32]
        self._map[: _HEAD.size] = _HEAD.pack(
            *(
                int(self._wall_s * 1e9),
                int(self._boot_s * 1e9),
                self._network,
                self._disk,
                self._hole,
                len(known),
            ),
            *(*known, *(0,) * (32 - len(known))),
        )

    @property
    def boot_s(self) -> float:
        """Seconds that its machine has slept."""
        return self._boot_s

    def step(self, by_s: float) -> None:
        """Set its time of day forward, or back."""
        self._wall_s += by_s
        self._tell()

    def sleep(self, for_s: float) -> None:
        """Let its machine have slept for so long."""
        self._wall_s += for_s
        self._boot_s += for_s
        self._tell()

    def network(self, how: int, known: Collection[int] = ()) -> None:
        """Let its network behave so, but for those ports."""
        self._known = tuple(known)
        self._network = how
        self._tell()

    def disk(self, how: int) -> None:
        """Let its disk behave so."""
        self._disk = how
        self._tell()


_holes: list[socket.socket] = []


def _hole_port() -> int:
    """Return a port of loopback where a connection is never made: its queue is full and nobody takes one."""
    if not _holes:
        hole = socket.socket()
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        _holes.append(hole)
        for _ in range(4):  # Linux keeps one more than it was told
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(hole.getsockname())
            _holes.append(one)
    port: int = _holes[0].getsockname()[1]
    return port
