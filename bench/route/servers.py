"""The real loadbalancer as a process: its port, its cores, and what it says of itself."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bench.children import child, free_port


def pin(pid: int, core: int) -> None:
    """Give that process (0: this one) one of the cores it may use, where it may use two.

    What a process starts may use its cores only.
    """
    cores = sorted(os.sched_getaffinity(pid))
    if len(cores) >= 2:
        os.sched_setaffinity(pid, {cores[core]})


@dataclass(frozen=True)
class RunningLoadbalancer:
    """A running loadbalancer."""

    port: int
    pid: int
    control_key: Path

    def status(self) -> dict[str, Any]:
        """Return GET /status, empty while nothing answers."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/status", timeout=30.0) as reply:
                said: dict[str, Any] = json.load(reply)
                return said
        except OSError:
            return {}

    def wait_up(self) -> None:
        """Return when it answers."""
        while not self.status():
            time.sleep(0.1)

    def wait_stocked(self, instances: int, timeout_s: float = 180.0) -> None:
        """Return when every instance has tokens in stock."""
        limit = time.monotonic() + timeout_s
        stocked = -1
        while time.monotonic() < limit:
            rows = self.status().get("instances", [])
            stocked = sum(row["tokens_in_stock"] > 0 for row in rows)
            if stocked == instances:
                return
            time.sleep(max(0.2, instances / 5000))
        raise SystemExit(f"bench.route: {stocked} of {instances} instances have tokens after {timeout_s:g} s")

    def wait_held(self, held: int, timeout_s: float = 60.0) -> None:
        """Return when so many clients wait."""
        limit = time.monotonic() + timeout_s
        while self.status().get("held") != held:
            if time.monotonic() > limit:
                raise SystemExit(f"bench.route: not {held} clients wait after {timeout_s:g} s")
            time.sleep(0.2)


@contextmanager
def loadbalancer(autoscaler_port: int, *flags: str) -> Iterator[RunningLoadbalancer]:
    """Run a fresh server."""
    port = free_port()
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "loadbalancer_server.py", "--port", str(port), *flags]
        command += ["--autoscaler", f"http://127.0.0.1:{autoscaler_port}", "--state-dir", state]
        with child(command, Path(state, "log")) as server:
            yield RunningLoadbalancer(port, server.pid, Path(state, "control.key"))
