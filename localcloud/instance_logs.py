"""What a customer can read of an instance without ssh: its console, and the output of three commands."""

import shlex
import shutil
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

LOG_LIMIT = 256 * 1024
"""Most bytes, from the end of a log, that one call may ask for."""

UPLOADS = 64
"""Most texts that are kept to be fetched; the oldest is dropped first."""


class InstanceLogs:
    """Consoles and command outputs of the instances below one directory; usable from any thread."""

    def __init__(self, instances: Path, search_path: str, clock: Callable[[], float]) -> None:
        """Make the reader of the instances in that directory. search_path: the PATH of the commands."""
        self._instances = instances
        self._search_path = search_path
        self._clock = clock
        self._lock = threading.Lock()
        self._uploads: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def console(self, instance_id: int) -> str:
        """Return the end of what an instance's start script printed; empty when there is nothing."""
        path = self._instances / str(instance_id) / "console.log"
        try:
            with path.open("rb") as f:
                f.seek(max(0, path.stat().st_size - LOG_LIMIT))
                return f.read().decode(errors="replace")
        except OSError:
            return ""

    def command(self, instance_id: int, command: str) -> str:
        """Return what `ls`, `rm` or `du` print, run on an instance's disk only (vast-contract 2.8)."""
        home = (self._instances / str(instance_id) / "home").resolve()
        try:
            words = shlex.split(command)
            for word in words[1:]:
                if not word.startswith("-") and not (home / word).resolve().is_relative_to(home):
                    return f"{words[0]}: {word}: not on this instance's disk"
            ran = subprocess.run(
                words,
                cwd=home,
                env={"PATH": self._search_path, "HOME": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=5.0,
                check=False,
            )
            return ran.stdout[:LOG_LIMIT].decode(errors="replace")
        # RuntimeError: links that lead in a circle.
        except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as e:
            return f"{type(e).__name__}: {e}"

    def copy(self, src_id: int, src_path: str, dst_id: int, dst_path: str) -> None:
        """Copy a file or directory from one instance's disk to another's; raise OSError or ValueError."""
        homes = [(self._instances / str(id) / "home").resolve() for id in (src_id, dst_id)]
        found = []
        for home, said in zip(homes, (src_path, dst_path), strict=True):
            path = (home / said.lstrip("/")).resolve()
            if not path.is_relative_to(home):
                raise ValueError(f"{said:.200}: not on this instance's disk")
            found.append(path)
        source, target = found
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / source.name if target.is_dir() else target)

    def upload(self, name: str, text: str, ready_at: float) -> None:
        """Let a text be fetched under that name from ready_at on."""
        with self._lock:
            self._uploads[name] = (ready_at, text)
            while len(self._uploads) > UPLOADS:
                self._uploads.popitem(last=False)

    def uploaded(self, name: str) -> str | None:
        """Return the text that can be fetched under that name; None while there is none."""
        with self._lock:
            ready_at, text = self._uploads.get(name, (float("inf"), ""))
        return text if self._clock() >= ready_at else None
