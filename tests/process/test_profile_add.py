"""From ORG/MODEL to a served model on the local cloud, by the commands of docs/models.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback_hub import running_hub
from tests.paths import ROOT
from tests.unit.fleet.test_profile_command import MODELS


def run(*words: str, timeout: float = 240.0, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_a_mixture_of_experts_is_added_and_served(tmp_path: Path) -> None:
    own = tmp_path / "profiles.toml"
    with running_hub(dict(MODELS)) as hub:
        said = run(
            *("autoscaler_server.py", "profile", "add", "Qwen/Qwen3-30B-A3B", "--name", "mine"),
            *("--profiles", str(own), "--no-market"),
            HF_ENDPOINT=hub.url,
        )
    assert "serve it with --model mine" in said
    report = tmp_path / "report.json"
    run(
        *("sim.py", "--local", "--model", "mine", "--profiles", str(own), "--state-dir", str(tmp_path / "s")),
        *("--num-iterations", "3", "--base-num-users", "8", "--request-probability", "0.5"),
        *("--speedup", "300", "--json", str(report), "--quiet"),
    )
    found = json.loads(report.read_text())
    assert found["requests"]["completed"] == found["requests"]["sent"] > 0
    assert found["requests"]["failed"] == 0
