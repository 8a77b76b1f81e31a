"""An ed25519 key in a file of its own, made on first use: the fleet's, and each local instance's host key."""

from pathlib import Path

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fleet_client.private_files import write_private
from process.errors import ConfigError


def load_or_make_ssh_key(path: Path) -> paramiko.Ed25519Key:
    """Return the ssh key in that file, which is made (mode 0600) if there is none.

    Raises ConfigError when others can read the file or it holds something else.
    """
    try:
        return _load_or_make(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be made or read: {e.strerror}") from e
    except (paramiko.SSHException, ValueError) as e:
        raise ConfigError(f"{path} is not an ed25519 private key: {e}") from e


def _load_or_make(path: Path) -> paramiko.Ed25519Key:
    if not path.exists():
        made = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        write_private(path, made.decode())
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others: chmod 600 it")
    return paramiko.Ed25519Key.from_private_key_file(str(path))
