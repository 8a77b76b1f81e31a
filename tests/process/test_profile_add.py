"""From ORG/MODEL to a served model on the local cloud, by the commands of docs/models.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback_hub import TOKEN, running_hub
from tests.paths import ROOT
from tests.process.test_localcloud import KEY, LocalCloud
from tests.unit.fleet.test_profile_command import MODELS


def run(*words: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=240.0,
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


@pytest.mark.timeout(300)
def test_any_kind_of_model_is_added_and_vectors_and_quantised_ones_become_hot(tmp_path: Path) -> None:
    """`prepare` ends when the model was loaded: when a test prompt of its kind was answered."""
    own = tmp_path / "profiles.toml"
    models = ("Qwen/Qwen3-8B", "google/gemma-3-12b-it", "BAAI/bge-m3", "Qwen/Qwen3-8B-AWQ")
    cloud = LocalCloud(tmp_path)
    flags = ["--profiles", str(own), "--local", "--cloud-url", cloud.url, "--speedup", "300"]
    try:
        with running_hub(dict(MODELS)) as hub:
            for number, model in enumerate(models):
                asked = ["autoscaler_server.py", "profile", "add", model, "--name", f"m{number}", *flags]
                state = ["--state-dir", str(tmp_path / "plan")]
                environ = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "LOCALCLOUD_API_KEY": KEY}
                assert "$/M tokens" in run(*asked, *state, **environ)
        for number in (2, 3):
            state = ["--state-dir", str(tmp_path / f"s{number}"), "--label", f"f{number}"]
            asked = ["autoscaler_server.py", "prepare", "--count", "1", "--model", f"m{number}"]
            run(*asked, *flags, *state, LOCALCLOUD_API_KEY=KEY)
    finally:
        cloud.process.kill()
        cloud.process.wait()
