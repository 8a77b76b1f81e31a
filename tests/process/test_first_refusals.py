"""The commands of the first hour with a gated model: refused in one sentence, and nothing is rented.

The real vastai command runs against the local cloud's face; hub and registry are on loopback.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import autoscaler_server
from engine.profiles import get_profile
from tests.commands import Exited, run_command
from tests.unit.fleet.test_beforehand import RIGHT, HubAndRegistry, server  # noqa: F401 a fixture
from tests.unit.localcloud.api.face import KEY, Face
from tests.web_server import served

Run = Callable[..., Exited]


@pytest.fixture
def face(tmp_path: Path) -> Face:
    return Face(tmp_path)


@pytest.fixture
def run(
    face: Face,
    server: HubAndRegistry,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Run]:
    """Runs a command of the autoscaler against a cloud and a hub where its model is gated."""
    server.gated = get_profile("vllm-13").model
    monkeypatch.setenv("LOCALCLOUD_API_KEY", KEY)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with served(face.client.application) as port:

        def command(*argv: str, given: str = "") -> Exited:
            monkeypatch.setattr("sys.stdin", io.StringIO(given))
            where = ("--local", "--cloud-url", f"http://127.0.0.1:{port}", "--state-dir", str(tmp_path / "s"))
            return run_command("autoscaler_server.py", autoscaler_server.main, *argv, *where)

        yield command


def test_prepare_refuses_a_gated_model_before_anything_is_rented(run: Run, face: Face) -> None:
    ended = run("prepare", "--count", "1")
    assert ended.status == 2
    assert "is gated, and cannot be read without a token" in ended.err
    assert "secrets set HF_TOKEN" in ended.err
    assert "Traceback" not in ended.err
    assert face.cloud.rentals == {}


def test_plan_says_whether_the_model_can_be_read(run: Run) -> None:
    assert "is gated, and cannot be read without a token" in run("plan").out
    assert run("secrets", "set", "HF_TOKEN", given=RIGHT).status == 0
    said = run("plan").out
    assert "can be read with the account's HF_TOKEN" in said
    assert RIGHT not in said


@pytest.mark.parametrize("permission", ["user_read", "user_write"])
def test_a_key_without_a_permission_is_told_at_the_start(run: Run, face: Face, permission: str) -> None:
    face.fault("key-lacks", permission=permission)
    ended = run("prepare", "--count", "1")
    assert ended.status == 2
    assert permission in ended.err
    assert face.cloud.rentals == {}
