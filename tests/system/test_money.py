"""Money, the whole system: the bill agrees, credit ends and comes back, contracts and budgets end."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig
from tests.paths import ROOT
from tests.ports import free_port
from tests.process.test_localcloud import KEY, LocalCloud
from tests.system.test_end_to_end import cloud_rows, fleet_rows, get
from tests.waiting import wait_for

DEAR = ("bandwidth", "stopped_storage")


def fault(stack: LocalStack, method: str, name: str, **args: Any) -> None:
    """Switch a fault of the cloud on (POST) or off (DELETE)."""
    path = "/localcloud/faults" + (f"/{name}" if method == "DELETE" else "")
    asked = urllib.request.Request(  # noqa: S310 our own port
        stack.cloud_url + path,
        json.dumps({"name": name, **args}).encode() if method == "POST" else None,
        {"Authorization": f"Bearer {stack.cloud_key}", "Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(asked, timeout=5):  # noqa: S310
        pass


def health(url: str) -> dict[str, Any]:
    """GET /health, whatever its status; nothing while there is nobody."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:  # noqa: S310
            return dict(json.load(reply))
    except urllib.error.HTTPError as e:
        return dict(json.load(e))
    except OSError:
        return {}


def states(stack: LocalStack) -> dict[int, str]:
    return {row["id"]: row["state"] for row in fleet_rows(stack)}


def hot(stack: LocalStack) -> set[int]:
    return {number for number, state in states(stack).items() if state == "hot"}


@pytest.mark.timeout(280)
def test_the_bill_agrees_credit_comes_back_and_a_contract_ends_without_a_surprise(tmp_path: Path) -> None:
    """A price that is too high lapses on the way."""
    config = StackConfig(
        instances=2, speedup=120.0, seed=7, hot=2, state_dir=tmp_path / "stack", realism="harsh", only=DEAR
    )
    fixed = ("--policy", "fixed", "--policy-param", "hot=2", "--policy-param", "total=2")
    with LocalStack(replace(config, autoscaler_args=fixed)) as stack:
        rented = set(states(stack))
        costs = get(f"{stack.autoscaler_url}/costs")
        spent = get(f"{stack.cloud_url}/localcloud/status")["spent_usd"]
        assert spent["traffic"] > 0.08 / 120.0, "2 x 22.4 GB at $2 a TB, by the speed-up"
        assert costs["usd"]["traffic"] == pytest.approx(spent["traffic"], rel=0.02)
        assert costs["usd"]["total"] == pytest.approx(spent["total"], rel=0.15)
        assert costs["credit"]["usd"] == pytest.approx(100.0, abs=1.0)

        fault(stack, "POST", "credit-zero")
        wait_for("everything is stopped", lambda: set(states(stack).values()) == {"cold"}, 60.0)
        said = wait_for(
            "it says why", lambda: (h := health(stack.autoscaler_url))["status"] != "ok" and h, 30.0
        )
        assert "pay in" in said["message"]
        fault(stack, "DELETE", "credit-zero")
        wait_for("the same machines serve again", lambda: hot(stack) == rented, 90.0)
        assert get(f"{stack.autoscaler_url}/decisions")["bans"] == []

        leaving, staying = sorted(rented)
        fault(stack, "POST", "price-increase", share=2.0, instance_id=staying)
        asked = wait_for(
            "the increase is seen", lambda: get(f"{stack.autoscaler_url}/costs")["price_increases"], 60.0
        )
        assert [(one["instance"], one["verdict"]) for one in asked] == [(staying, "lapses")]
        fault(stack, "POST", "contract-ends", in_s=90.0, instance_id=leaving)
        fewest = 2

        def replaced() -> bool:
            nonlocal fewest
            serving = hot(stack)
            fewest = min(fewest, len(serving))
            return len(serving) == 2 and leaving not in states(stack)

        wait_for("another has taken its place", replaced, 120.0)
        assert fewest >= 1, "the fleet never was without a hot machine"
        assert {row["id"] for row in cloud_rows(stack)} == set(states(stack))
        end = stack.stop()
    assert end.left_behind == ()


@pytest.mark.timeout(200)
def test_a_budget_that_is_used_up_starts_nothing_and_destroys_nothing(tmp_path: Path) -> None:
    """By the ledger a budget of less than the download is used up when the autoscaler begins."""
    cloud = LocalCloud(tmp_path, "--realism", "harsh", "--only", "bandwidth")
    url = f"http://127.0.0.1:{free_port()}"
    common = ["--local", "--cloud-url", cloud.url, "--state-dir", str(tmp_path / "state"), "--speedup", "300"]
    common += ["--port", url.rpartition(":")[2]]
    policy = ["--policy", "fixed", "--policy-param", "hot=1", "--policy-param", "total=2"]
    environ = {**os.environ, "LOCALCLOUD_API_KEY": KEY}
    command = [sys.executable, "autoscaler_server.py"]
    try:
        prepared = [*command, "prepare", "--count", "1", *common]
        subprocess.run(prepared, cwd=ROOT, env=environ, check=True, capture_output=True, timeout=120)
        served = subprocess.Popen(
            [*command, *common, *policy, "--budget-usd-day", "0.0001"],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            said = wait_for("it says why", lambda: (h := health(url)).get("holds") and h, 60.0)
            assert [hold["kind"] for hold in said["holds"]] == ["budget-day"]
            assert "raise --budget-usd-day" in said["message"]
            day = get(f"{url}/costs")["budgets"]["day"]
            assert day["used_up"]
            assert day["spent_usd"] > 0.0001
            decided = wait_for("it has decided", lambda: get(f"{url}/decisions")["decisions"], 30.0)
            assert not any(one["commands"] for one in decided)
            (machine,) = cloud.status()["instances"]
            assert machine["state"] == "stopped"
        finally:
            served.terminate()
            served.wait(30)
    finally:
        cloud.process.kill()
        cloud.process.wait()
