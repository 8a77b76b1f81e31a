"""A machine becomes hot by its word where ssh is refused, and by ssh where its word does not reach us."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for

KEY = "k-of-a-test-0123456789"
SPEEDUP = "120"
UNKIND = ("script_bytes", "ssh_greeting", "ssh_tmux", "ssh_key_lag_s", "ssh_keys_lost")


class OneMachine:
    """A local cloud with those flags, and an autoscaler that wants one machine."""

    def __init__(self, path: Path, stack: ExitStack, *cloud_flags: str) -> None:
        self.path, self.stack = path, stack
        self.cloud, self.autoscaler = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self.environ = {**os.environ, "LOCALCLOUD_API_KEY": KEY, "XDG_STATE_HOME": str(path)}
        port = self.cloud.rpartition(":")[2]
        root = ("--root", f"{path}/cloud", "--speedup", SPEEDUP)
        self.start("-m", "localcloud", "--port", port, *root, *cloud_flags)
        wait_for("the cloud answers", lambda: self.ask(self.cloud, "/localcloud/status"))

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        with (self.path / "log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=self.environ, stdout=log, stderr=log
            )
        self.stack.callback(self.end, child)
        return child

    def end(self, child: "subprocess.Popen[bytes]") -> None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=40)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def scale(self, public_url: str) -> "subprocess.Popen[bytes]":
        """Start the autoscaler. public_url: where instances are told to reach it."""
        return self.start(
            *("autoscaler_server.py", "--port", self.autoscaler.rpartition(":")[2], "--local"),
            *("--cloud-url", self.cloud, "--speedup", SPEEDUP, "--state-dir", f"{self.path}/f"),
            *("--policy", "fixed", "--policy-param", "hot=1", "--policy-param", "total=1"),
            *("--poll-interval-s", "1.5", "--check-boot-every-s", "1", "--public-url", public_url),
        )

    def ask(self, server: str, path: str) -> Any:
        """The JSON that a server answers; None while it does not answer."""
        try:
            with urllib.request.urlopen(server + path, timeout=5) as reply:  # noqa: S310 our own port
                return json.load(reply)
        except (OSError, ValueError):
            return None

    def hot(self) -> dict[str, Any] | None:
        """The row of the machine once it is hot."""
        rows = (self.ask(self.autoscaler, "/instances") or {}).get("instances", [])
        return next((row for row in rows if row["state"] == "hot"), None)

    def rented(self) -> int:
        status = self.ask(self.cloud, "/localcloud/status")
        return len(status["instances"]) + int(status["destroyed"])


@pytest.mark.timeout(280)
def test_a_machine_whose_host_refuses_ssh_becomes_hot_by_its_word_and_again_after_a_restart(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        one = OneMachine(tmp_path, stack, "--realism", "none", "--fault", "ssh-refuses")
        scaler = one.scale(one.autoscaler)
        row = wait_for("it is hot", one.hot, 120.0)
        assert row["host_key"] is None, "nobody listens for ssh"
        assert row["address"].startswith("https://")
        one.end(scaler)
        one.scale(one.autoscaler)
        wait_for("it is hot again", one.hot, 90.0)
        assert one.rented() == 1


@pytest.mark.timeout(280)
def test_a_machine_that_does_not_reach_us_becomes_hot_by_ssh_however_unkind(tmp_path: Path) -> None:
    with ExitStack() as stack:
        flags = ("--realism", "harsh", *(word for name in UNKIND for word in ("--only", name)))
        one = OneMachine(tmp_path, stack, *flags)
        one.scale(f"http://127.0.0.1:{free_port()}")  # where nobody is
        row = wait_for("it is hot", one.hot, 120.0)
        assert row["host_key"] is not None
        assert "says: " not in (tmp_path / "log").read_text()
        assert one.rented() == 1
