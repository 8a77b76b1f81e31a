"""Directories and files that only their owner may look into: states, and keys made on first use."""

import os
import secrets
import tempfile
from pathlib import Path

from fleet_client.errors import ConfigError


def default_state_dir(label: str) -> Path:
    """Return where the processes of one fleet keep keys and ledger; ConfigError for an impossible label."""
    if not label or "/" in label or not label.isprintable() or label in (".", "..") or len(label) > 64:
        raise ConfigError(f"--label {label!r}: wanted 1 to 64 printable characters without '/'")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "autoscaler-py" / label


def make_private_dir(path: Path) -> Path:
    """Return the directory, 0700; raise ConfigError when it cannot be made or is open to others."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} is open to other users: chmod 700 it")
    except OSError as e:
        raise ConfigError(f"{path} cannot be used: {e.strerror}") from e
    return path


def write_private(path: Path, text: str) -> None:
    """Write the file, 0600, in one step: a reader sees all of it or none; an existing one is left alone.

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
    """Return the key in the file, made on first use (256 bits, 0600). Two processes at once get the same one.

    Raises ConfigError when it cannot be made, is open to others, or holds anything but one key.
    """
    try:
        if not path.exists():
            write_private(path, secrets.token_hex(32) + "\n")
    except OSError as e:
        raise ConfigError(f"key file {path} cannot be made: {e.strerror}") from e
    return load_one_key(path)


def load_one_key(path: Path) -> str:
    """Return the only key (or salt) of a 0600 file; raise ConfigError when there is not one."""
    keys = load_keys(path)
    if len(keys) != 1:
        raise ConfigError(f"key file {path}: wanted one key, got {len(keys)}")
    return next(iter(keys))


def load_keys(path: Path | None) -> frozenset[str]:
    """Return the keys of a 0600 file, one a line; none without a file. Raises ConfigError."""
    if path is None:
        return frozenset()
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"key file {path} can be read by others: chmod 600 it")
        keys = frozenset(line.strip() for line in path.read_text().splitlines() if line.strip())
    except OSError as e:
        raise ConfigError(f"key file {path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError:
        raise ConfigError(f"key file {path} is not text") from None
    if not keys or any(len(key) < 16 for key in keys):
        raise ConfigError(f"key file {path}: wanted keys of at least 16 characters, one a line")
    return keys
