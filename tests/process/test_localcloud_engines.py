"""Making the tiny model with the Python of real vLLM, which is a script here."""

from pathlib import Path

import pytest

from localcloud import engines
from localcloud.engines import ENGINES
from process.errors import ConfigError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of vLLM whose Python is a script, to be written; gives that."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "venv" / ".ready").touch()
    monkeypatch.setattr(engines, "VLLM_ENVIRONMENT", tmp_path / "venv")
    monkeypatch.setattr(engines, "TINY_MODEL", tmp_path / "tiny")
    return python


def write(python: Path, *lines: str) -> None:
    python.write_text("\n".join(("#!/bin/sh", *lines, "")))
    python.chmod(0o700)


def test_the_model_is_made_once_by_the_python_of_vllm(installed: Path) -> None:
    write(installed, 'mkdir "$3" && echo made >> "$3/log"')
    for _ in range(2):
        ENGINES["vllm"].make_ready()
    assert (engines.TINY_MODEL / "log").read_text() == "made\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("echo Traceback; echo No space left; exit 1", "cannot be made: No space left"),
        ("exit 3", "cannot be made: 3"),
        ("sleep 60", "cannot be made: .* timed out"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(
    installed: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.setattr(engines, "MAKE_MODEL_TIMEOUT_S", 0.5)
    write(installed, f"exec sh -c '{line}'")
    with pytest.raises(ConfigError, match=words):
        ENGINES["vllm"].make_ready()


def test_a_python_that_is_not_there_is_one_line(installed: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be made: .*No such file"):
        ENGINES["vllm"].make_ready()
