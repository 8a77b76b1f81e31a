"""Keys and states that only their owner can read."""

import threading
from pathlib import Path

import pytest

from fleet_client import private_files
from process.errors import ConfigError
from tests.web_server import KEY


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "control.key"
    key = private_files.load_or_make_key(path)
    assert len(key) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert private_files.load_or_make_key(path) == key


def test_processes_that_make_a_key_at_once_get_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "control.key"
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(private_files.load_or_make_key(path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["control.key"]


@pytest.mark.parametrize(
    ("content", "mode", "what"),
    [
        (KEY, 0o640, "can be read by others"),
        (KEY, 0o604, "can be read by others"),
        ("", 0o600, "at least 16"),
        ("short", 0o600, "at least 16"),
        (f"{KEY}\nshort", 0o600, "at least 16"),
    ],
)
def test_a_key_file_that_is_open_or_weak_is_refused(
    tmp_path: Path, content: str, mode: int, what: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=what):
        private_files.load_keys(path)


def test_a_key_file_that_is_missing_binary_or_unwritable_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        private_files.load_keys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(ConfigError, match="not text"):
        private_files.load_keys(tmp_path / "binary")
    with pytest.raises(ConfigError, match="cannot be made"):
        private_files.load_or_make_key(tmp_path / "nowhere" / "key")


def test_a_file_of_several_keys_is_no_control_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n{'z' * 32}\n")
    path.chmod(0o600)
    assert private_files.load_keys(path) == {KEY, "z" * 32}
    with pytest.raises(ConfigError, match="wanted one key, got 2"):
        private_files.load_or_make_key(path)


def test_the_state_directory_is_private(tmp_path: Path) -> None:
    made = private_files.make_private_dir(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        private_files.make_private_dir(made)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        private_files.make_private_dir(tmp_path / "file")


@pytest.mark.parametrize("label", ["", "a/b", "..", ".", "a\n", "x" * 65])
def test_a_label_that_is_no_file_name_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match="--label"):
        private_files.default_state_dir(label)


def test_a_file_of_one_key_holds_one_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "client.key"
    path.write_text(KEY + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        private_files.load_one_key(path)
    path.chmod(0o600)
    assert private_files.load_one_key(path) == KEY
    path.write_text(f"{KEY}\n{'m' * 32}\n")
    with pytest.raises(ConfigError, match="wanted one key, got 2"):
        private_files.load_one_key(path)
