"""A gated model, on this machine: few machines are rented, none is banned; mended, all goes on."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for

KEY, TOKEN = "k-of-a-test-0123456789", "hf_right"
SPEEDUP = "120"


class FirstDay:
    """A local cloud whose model is gated, and an autoscaler that wants two machines of it."""

    def __init__(self, path: Path) -> None:
        self.cloud, self.autoscaler = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self.environ = {**os.environ, "LOCALCLOUD_API_KEY": KEY, "XDG_STATE_HOME": str(path)}
        self.where = ("--local", "--cloud-url", self.cloud, "--speedup", SPEEDUP, "--state-dir", f"{path}/f")
        self.log = path / "log"
        self._children = [
            self._start(
                *("-m", "localcloud", "--port", self.cloud.rpartition(":")[2], "--speedup", SPEEDUP),
                *("--root", f"{path}/cloud", "--realism", "none", "--fault", f"gated-model:token={TOKEN}"),
            )
        ]
        wait_for("the cloud answers", lambda: self.ask(self.cloud, "/localcloud/status"))
        self._children.append(
            self._start(
                *("autoscaler_server.py", "--port", self.autoscaler.rpartition(":")[2], *self.where),
                *("--policy", "fixed", "--policy-param", "hot=1", "--policy-param", "total=2"),
                *("--poll-interval-s", "1.5", "--check-boot-every-s", "1"),
                *("--public-url", self.autoscaler),
            )
        )

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=self.environ, stdout=log, stderr=log
            )

    def command(self, *argv: str, given: str = "") -> str:
        """What a command of the operator prints."""
        done = subprocess.run(
            [sys.executable, "autoscaler_server.py", *argv],
            cwd=ROOT,
            env=self.environ,
            input=given,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, server: str, path: str) -> Any:
        """The JSON that a server answers, also with an error; None while it does not answer."""
        try:
            with urllib.request.urlopen(server + path, timeout=5) as reply:  # noqa: S310 our own port
                return json.load(reply)
        except urllib.error.HTTPError as e:
            return json.load(e)
        except (OSError, ValueError):
            return None

    def hold(self) -> str | None:
        """The sentence of the hold that GET /health tells, once two hosts have said it."""
        health = self.ask(self.autoscaler, "/health") or {}
        said = [h["sentence"] for h in health.get("holds", []) if h["kind"] == "deployment"]
        return next((one for one in said if "machines of 2 hosts say" in one), None)

    def rented(self) -> int:
        """How many machines were ever rented."""
        status = self.ask(self.cloud, "/localcloud/status")
        return len(status["instances"]) + int(status["destroyed"])

    def states(self) -> list[str]:
        """The states of the fleet's instances."""
        return [i["state"] for i in (self.ask(self.autoscaler, "/instances") or {}).get("instances", [])]

    def end(self) -> None:
        """End both, the cloud last."""
        for child in reversed(self._children):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout=40)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.fixture
def day(tmp_path: Path) -> Iterator[FirstDay]:
    made = FirstDay(tmp_path)
    yield made
    made.end()


@pytest.mark.timeout(280)
def test_a_gated_model_costs_two_machines_and_mended_it_goes_on(day: FirstDay) -> None:
    """Before: 18 machines in 4.7 minutes, and seven banned for a day."""
    sentence = wait_for("two hosts have said it", day.hold, 120.0)
    assert "the model is gated" in sentence
    assert "secrets set HF_TOKEN" in sentence
    wait_for("nothing of it bills any more", lambda: not day.states(), 60.0)
    decisions = day.ask(day.autoscaler, "/decisions")
    assert decisions["bans"] == []
    assert [h["kind"] for h in decisions["holds"]] == ["deployment"]
    rented = day.rented()
    print(f"\nMEASURED machines rented for a gated model: {rented}")
    assert rented <= 3, "two, and one more where an order was late"

    assert "HF_TOKEN is set" in day.command("secrets", "set", "HF_TOKEN", *day.where, given=TOKEN + "\n")
    assert day.command("secrets", "list", *day.where) == "HF_TOKEN\n"
    assert "manage: on" in day.command("manage", "on", "--autoscaler", day.autoscaler)
    wait_for("a machine is hot", lambda: "hot" in day.states(), 120.0)
    assert day.ask(day.autoscaler, "/health").get("holds") is None
    assert day.rented() <= rented + 2
    assert TOKEN not in day.log.read_text()
