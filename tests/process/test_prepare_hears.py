"""`prepare` hears what machines say of themselves, so that one without ssh can be prepared, too."""

from pathlib import Path

import pytest
import requests

from fleet.outside.config import AutoscalerConfig
from fleet.outside.process import AutoscalerProcess
from fleet.outside.ready_route import hear_ready
from policies import Fixed
from tests.ports import free_port


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AutoscalerProcess:
    monkeypatch.setenv("LOCALCLOUD_API_KEY", "key-of-a-test")
    config = AutoscalerConfig(state_dir=tmp_path / "state", local=True, speedup=1000.0, port=free_port())
    return AutoscalerProcess(config, no_balancers=True, policy=Fixed(0, 0))


def test_words_are_taken_with_a_signature_only_and_nothing_else_is(process: AutoscalerProcess) -> None:
    url = f"http://127.0.0.1:{process.config.port}"
    with hear_ready(process, process.config):
        assert requests.post(f"{url}/ready", data="{}", timeout=5).status_code == 401
        assert requests.get(f"{url}/instances", timeout=5).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{url}/ready", data="{}", timeout=5)
    process.close()


def test_a_port_that_another_program_has_is_said_and_no_error(
    process: AutoscalerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with hear_ready(process, process.config), hear_ready(process, process.config):
        assert "instances cannot say that they are ready" in caplog.text
    process.close()
