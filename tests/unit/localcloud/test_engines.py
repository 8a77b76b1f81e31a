"""The engines' times and faults, and what is said when real vLLM is not there."""

from pathlib import Path

import pytest

from localcloud import engines
from localcloud.__main__ import main
from localcloud.durations import Times
from localcloud.engines import ENGINES, VLLM_STOP_S
from process.errors import ConfigError


def test_with_real_vllm_the_cloud_is_sped_up_and_the_model_server_is_not() -> None:
    paced, vllm = ENGINES["paced"].times(60.0), ENGINES["vllm"].times(60.0)
    assert paced == Times()
    assert (vllm.pull_s, vllm.restart_s) == (paced.pull_s, paced.restart_s)
    assert (vllm.load_s, vllm.start_s) == (0.0, 0.0)
    assert vllm.stop_s / 60.0 == vllm.reboot_s / 60.0 == VLLM_STOP_S


@pytest.mark.parametrize("fault", ["never-ready", "fatal-line:count=1"])
def test_a_fault_that_real_vllm_cannot_play_is_refused(fault: str) -> None:
    with pytest.raises(ConfigError, match="the vllm engine cannot play it"):
        main(["--engine", "vllm", "--fault", fault])


def test_without_vllm_it_is_said_how_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "VLLM_ENVIRONMENT", tmp_path / "venv")
    with pytest.raises(ConfigError, match=r"`make -C .* \.venv-vllm/\.ready` installs it"):
        main(["--engine", "vllm"])


def test_the_paced_engine_needs_nothing() -> None:
    ENGINES["paced"].make_ready()
