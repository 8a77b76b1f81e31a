"""Directories and files that only their owner may read: state directories, and keys made on first use."""

import os
import re
import secrets
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from fleet_client.errors import ConfigError
from fleet_client.text_files import read_text, said_in

LEAST_KEY, LONGEST_KEY = 16, 1024
"""Characters of a key: fewer can be guessed, more do not fit the head of a request beside the rest."""


def default_state_dir(label: str) -> Path:
    """Return the directory of one fleet's keys and ledger; raise ConfigError for an impossible label."""
    if not label or "/" in label or not label.isprintable() or label in (".", "..") or len(label) > 64:
        raise ConfigError(f"--label {label!r}: wanted 1 to 64 printable characters without '/'")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "autoscaler-py" / label


def make_private_dir(path: Path) -> Path:
    """Make a directory with mode 0700 if it is missing, and return it.

    Raises ConfigError when it cannot be made or is open to others.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} is open to other users: chmod 700 it")
    except OSError as e:
        raise ConfigError(f"{path} cannot be used: {e.strerror}") from e
    return path


def write_private(path: Path, text: str) -> None:
    """Write a file atomically, mode 0600; leave an existing one alone.

    Raises OSError when the directory cannot be written.
    """
    fd, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(made, path)
        except FileExistsError:
            return  # another process of ours was first: its key counts
    finally:
        os.unlink(made)


def load_or_make_key(path: Path) -> str:
    """Return the key in a file, which is made on first use (256 bits, 0600).

    Two processes at once get the same key. Raises ConfigError when the file cannot be made, is open to
    others, or holds anything but one key.
    """
    try:
        if not path.exists():
            write_private(path, secrets.token_hex(32) + "\n")
    except OSError as e:
        raise ConfigError(f"key file {path} cannot be made: {e.strerror}") from e
    return load_one_key(path)


def load_one_key(path: Path) -> str:
    """Return the only key in a file of mode 0600; raise ConfigError when it does not hold one."""
    keys = load_keys(path)
    if len(keys) != 1:
        raise ConfigError(f"key file {path}: wanted one key, got {len(keys)}")
    return next(iter(keys))


def load_keys(path: Path | None) -> frozenset[str]:
    """Return the keys in a file of mode 0600, one a line; an empty set for None.

    Blank lines, lines that begin with # and a byte order mark are no keys. Raises ConfigError that names the
    line, and never shows it, for what a client could not send or somebody could guess.
    """
    return frozenset(_keys(path, None))


def load_key_rights(path: Path | None, right: str, values: Collection[str]) -> dict[str, str | None]:
    """Return the keys in a file as `load_keys` does, each with the value of that right, or None.

    A line is a key, and may end with ` right=value`, one of the values.
    """
    return _keys(path, _KeyNote(right, "|".join(map(re.escape, values)), f"one of {', '.join(values)}"))


def load_named_keys(path: Path | None) -> dict[str, str | None]:
    """Return the keys in a file as `load_keys` does, each with its name, or None.

    A line is a key, and may end with ` name=NAME`.
    """
    return _keys(path, _KeyNote("name", r"[\w.@-]{1,40}", "up to 40 letters, digits and any of . _ @ -"))


class _KeyNote(NamedTuple):
    """What a line may say of its key, as ` word=value`.

    allowed: a pattern of all values; wanted: the same in words.
    """

    word: str
    allowed: str
    wanted: str


def _keys(path: Path | None, note: _KeyNote | None) -> dict[str, str | None]:
    if path is None:
        return {}
    what = "key file"
    found: dict[str, str | None] = {}
    for number, said in said_in(_read_private(path, what)):
        where = f"{what} {path}, line {number}"
        if not said.isascii() or not said.isprintable():
            raise ConfigError(f"{where}: a key has printable ASCII characters only")
        key, spaced, rest = said.partition(" ")
        value = re.fullmatch(f"{note.word}=({note.allowed})", rest.strip()) if note else None
        if spaced and note is None:
            raise ConfigError(
                f"{where}: a key has no spaces; a comment has a line of its own and begins with #"
            )
        if spaced and note is not None and value is None:
            raise ConfigError(f"{where}: after a key there may be {note.word}=, with {note.wanted}")
        if not LEAST_KEY <= len(key) <= LONGEST_KEY:
            raise ConfigError(
                f"{where}: a key has at least {LEAST_KEY} characters, and {LONGEST_KEY} at most"
            )
        found[key] = value[1] if value else None
    if not found:
        raise ConfigError(
            f"{what} {path}: wanted keys of at least {LEAST_KEY} characters, one a line; got none"
        )
    return found


def load_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a file of mode 0600 that are no comments. what: its name in errors."""
    return [said for _, said in said_in(_read_private(path, what))]


def load_salt(path: Path) -> str:
    """Return the salt in a file of mode 0600: its only line that is no comment; it may have spaces."""
    what = "salt file"
    lines = list(said_in(_read_private(path, what)))
    if len(lines) != 1:
        raise ConfigError(f"{what} {path}: wanted one line, got {len(lines)}")
    number, salt = lines[0]
    if not salt.isprintable() or len(salt) < LEAST_KEY:
        where = f"{what} {path}, line {number}"
        raise ConfigError(f"{where}: a salt has at least {LEAST_KEY} printable characters")
    return salt


def check_private(path: Path, what: str) -> None:
    """Raise ConfigError unless the file exists and only its owner can read it. what: its name in errors.

    A credential of systemd is root's, and its service's by an access list, whose mask stands in the place of
    the group's rights: 0440. Its directory is open to that service alone.
    """
    credential = str(path.parent) == os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        if path.stat().st_mode & (0o007 if credential else 0o077):
            raise ConfigError(f"{what} {path} can be read by others: chmod 600 it")
    except OSError as e:
        raise ConfigError(f"{what} {path} cannot be read: {e.strerror}") from e


def _read_private(path: Path, what: str) -> str:
    """Return the text of a file; raise ConfigError unless only its owner can read it."""
    check_private(path, what)
    return read_text(path, what)
