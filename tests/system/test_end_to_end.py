"""The whole system on this machine: real vastai, real ssh, real tokens; killed, it loses nothing."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from simulation.live.local_stack import AUTOSCALER, LOADBALANCER, LocalStack
from simulation.live.stack_config import StackConfig
from tests.paths import ROOT
from tests.waiting import wait_for


def get(url: str, key: str = "") -> Any:
    """The JSON of a 200 answer; None when there is none."""
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=5) as reply:  # noqa: S310 our own port
            return json.load(reply)
    except (OSError, ValueError):
        return None


def cloud_rows(stack: LocalStack) -> list[Any]:
    return list((get(f"{stack.cloud_url}/localcloud/status") or {}).get("instances", []))


def fleet_rows(stack: LocalStack) -> list[Any]:
    return list((get(f"{stack.autoscaler_url}/instances") or {}).get("instances", []))


def routed(stack: LocalStack) -> int:
    return int((get(f"{stack.loadbalancer_url}/status") or {}).get("routed", 0))


def busiest(stack: LocalStack) -> int | None:
    """The hot instance with the most requests, if it has a few."""
    rows = (get(f"{stack.loadbalancer_url}/status") or {}).get("instances", [])
    busy = [(row["unfinished"], row["id"]) for row in rows if row["state"] == "hot" and row["unfinished"] > 2]
    return int(max(busy)[1]) if busy else None


def killed(stack: LocalStack, name: str) -> None:
    """kill -9 of that process; back when it was started again."""
    before = stack.pid(name)
    os.kill(before, signal.SIGKILL)
    wait_for(f"{name} is started again", lambda: stack.pid(name) != before)


@pytest.mark.timeout(280)
def test_with_everything_killed_in_turn_no_request_and_no_machine_is_lost(tmp_path: Path) -> None:
    """kill -9 of autoscaler, loadbalancer and one instance in the middle of a run: 0 requests lost, and the
    cloud lists nothing that the autoscaler does not account for, before and after."""
    config = StackConfig(
        instances=3, speedup=120.0, seed=5, hot=1, max_instances=5, state_dir=tmp_path / "stack"
    )
    said: list[str] = []
    with LocalStack(config, say=said.append) as stack:
        report_file = tmp_path / "report.json"
        users = subprocess.Popen(
            [
                *(sys.executable, "sim.py", "--quiet", "--seed", "3", "--json", str(report_file)),
                *("--num-iterations", "24", "--base-num-users", "66", "--request-timeout-s", "150"),
                *("--loadbalancer", stack.loadbalancer_url, "--autoscaler", stack.autoscaler_url),
                *("--state-dir", str(stack.state_dir)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for("requests are served", lambda: routed(stack) > 10)
            rented = {row["id"] for row in cloud_rows(stack)}

            killed(stack, AUTOSCALER)
            wait_for("the fleet is found again", lambda: {r["id"] for r in fleet_rows(stack)} == rented)

            killed(stack, LOADBALANCER)
            wait_for("requests are served again", lambda: routed(stack) > 0)

            victim = wait_for("one is busy", lambda: busiest(stack))
            pids = next(row["pids"] for row in cloud_rows(stack) if row["id"] == victim)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_for(
                "the dead one is given up",
                lambda: not any(r["id"] == victim and r["state"] == "hot" for r in fleet_rows(stack)),
            )

            output, _ = users.communicate(timeout=200)
        finally:
            users.kill()
            users.wait()
        assert users.returncode == 0, output.decode()
        report = json.loads(report_file.read_text())
        assert report["requests"]["failed"] == 0
        assert report["requests"]["completed"] == report["requests"]["sent"] > 60
        assert report["requests"]["retried"] > 0, "nobody was on the machine that died"
        wait_for(
            "what the cloud bills is what the autoscaler accounts for",
            lambda: {r["id"] for r in cloud_rows(stack)} == {r["id"] for r in fleet_rows(stack)},
        )
        spent = get(f"{stack.cloud_url}/localcloud/status")["spent_usd"]["total"]
        ledger = get(f"{stack.autoscaler_url}/costs")["usd"]["total"]
        assert ledger == pytest.approx(spent, rel=0.15), "both count in seconds; they look at other moments"
        end = stack.stop()
    assert end.left_behind == ()
    assert end.restarts == {AUTOSCALER: 1, LOADBALANCER: 1}
