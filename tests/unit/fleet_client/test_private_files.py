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
        (f"{KEY}\nshort", 0o600, "line 2: a key has at least 16"),
        (f"# keys of the team\n\n{KEY}\n{'k' * 1025}", 0o600, "line 4: a key has at least 16 .*1024 at most"),
        ("# keys of the team\n", 0o600, "at least 16 characters, one a line; got none"),
        (f"{KEY}\n{KEY} # of Alice", 0o600, "line 2: a key has no spaces; a comment has a line of its own"),
        (f"{KEY}\nclé-de-l-équipe-16", 0o600, "line 2: a key has printable ASCII characters only"),
        (f"{KEY}\n\u200b{KEY}", 0o600, "line 2: a key has printable ASCII"),
        (f"{KEY}\n{KEY}\t{KEY}", 0o600, "line 2: a key has printable ASCII"),
        (f"{KEY}\n{KEY}\x00", 0o600, "line 2: a key has printable ASCII"),
        (f"{KEY}\r{KEY}", 0o600, "line 1: a key has printable ASCII"),
    ],
)
def test_a_key_file_that_is_open_or_weak_is_refused(
    tmp_path: Path, content: str, mode: int, what: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content, "utf-8", newline="")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=what) as refused:
        private_files.load_keys(path)
    assert KEY not in str(refused.value)
    assert "quipe" not in str(refused.value)


def private(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    path.chmod(0o600)
    return path


def test_a_line_may_say_what_its_key_may(tmp_path: Path) -> None:
    raw = (
        f"{KEY} priority=high\n{'b' * 32}\n# {'c' * 32} priority=high\n{'d' * 32}   priority=low \n".encode()
    )
    rights = private_files.load_key_rights(private(tmp_path / "keys", raw), "priority", ("high", "low"))
    assert rights == {KEY: "high", "b" * 32: None, "d" * 32: "low"}
    for rest in ("priority=highest", "priority=", "high", "owner=bob", "priority=high priority=low"):
        with pytest.raises(
            ConfigError, match="line 1: after a key there may be priority=, with one of high, low"
        ):
            private_files.load_key_rights(
                private(tmp_path / "keys", f"{KEY} {rest}".encode()), "priority", ("high", "low")
            )
    with pytest.raises(ConfigError, match="line 1: a key has no spaces"):
        private_files.load_keys(private(tmp_path / "keys", raw))


TWO_KEYS = f"# keys of the team\n{KEY}\n\n  # of Bob\n {'b' * 32} \n"


@pytest.mark.parametrize(
    "raw",
    [
        TWO_KEYS.encode(),
        TWO_KEYS.replace("\n", "\r\n").encode(),
        TWO_KEYS.encode("utf-8-sig"),
        TWO_KEYS.replace("keys of the team", "clés de l'équipe").encode("utf-8-sig"),
        f"{KEY}\n{'b' * 32}".encode("utf-8-sig"),
    ],
    ids=["comments", "crlf", "byte order mark", "accents in a comment", "byte order mark before a key"],
)
def test_keys_are_what_is_no_comment(tmp_path: Path, raw: bytes) -> None:
    assert private_files.load_keys(private(tmp_path / "keys", raw)) == {KEY, "b" * 32}


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (f"{KEY}\n".encode("utf-16"), "line 1: it is UTF-16 or UTF-32: save it as UTF-8"),
        (f"{KEY}\ncl\xe9-de-l-equipe-16\n".encode("latin-1"), "line 2: not text in UTF-8"),
    ],
)
def test_a_key_file_in_another_encoding_is_refused_with_its_line(
    tmp_path: Path, raw: bytes, what: str
) -> None:
    for load in (private_files.load_keys, private_files.load_one_key, private_files.load_salt):
        with pytest.raises(ConfigError, match=f"file {tmp_path / 'keys'}, {what}"):
            load(private(tmp_path / "keys", raw))


def test_a_salt_is_one_line_that_may_have_spaces_and_accents(tmp_path: Path) -> None:
    raw = "\ufeff# of all clients\r\nle sel de l'équipe\r\n".encode()
    assert private_files.load_salt(private(tmp_path / "salt", raw)) == "le sel de l'équipe"
    for raw, what in (
        (b"too short\n", "line 1: a salt has at least 16 printable characters"),
        (b"# only a comment\n", "wanted one line, got 0"),
        (b"one salt of the team\nand another one\n", "wanted one line, got 2"),
        (b"a bell\x07in the salt\n", "line 1: a salt has at least 16 printable"),
    ):
        with pytest.raises(ConfigError, match=what):
            private_files.load_salt(private(tmp_path / "salt", raw))


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
