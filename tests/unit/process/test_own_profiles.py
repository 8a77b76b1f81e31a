"""Where a process finds the file of one's own model profiles."""

from pathlib import Path

import pytest

from process.errors import ConfigError
from process.own_profiles import VARIABLE, find_own_profiles, read_own_profiles


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory, and a variable that is put back as it was."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_file_there_are_none(tmp_path: Path) -> None:
    assert read_own_profiles(None, tmp_path) == ("", "profiles.toml")
    assert find_own_profiles(None) is None


def test_the_flag_goes_before_the_variable_that_before_this_directory_that_before_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "profiles.toml").write_text("# state")
    assert find_own_profiles(None, state) == state / "profiles.toml"
    (tmp_path / "profiles.toml").write_text("# here")
    assert find_own_profiles(None, state) == Path("profiles.toml")
    (tmp_path / "named.toml").write_text("# named")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named.toml"))
    assert find_own_profiles(None, state) == tmp_path / "named.toml"
    (tmp_path / "given.toml").write_text("# given")
    assert find_own_profiles(Path("given.toml"), state) == Path("given.toml")


def test_child_processes_find_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "given.toml").write_text("# given")
    assert read_own_profiles(Path("given.toml")) == ("# given", "given.toml")
    assert find_own_profiles(None) == tmp_path / "given.toml"


def test_a_file_that_is_named_and_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--profiles none.toml: no such file"):
        find_own_profiles(Path("none.toml"))
