"""The fleet's own secrets: the ssh key, and one secret from which every master token follows.

A master token is HMAC-SHA256(fleet secret, label): made when the instance is created, never stored,
and found again by a restarted autoscaler from the label in the listing.
"""

import hashlib
import hmac
from pathlib import Path

from fleet_client.private_files import load_or_make_key
from process.ssh_keys import load_or_make_ssh_key


class FleetKeys:
    """The fleet's keys in the state directory, made on first use, each file 0600."""

    def __init__(self, state_dir: Path) -> None:
        """Read the keys of the fleet or make them; raise ConfigError for a file that others can read."""
        self._secret = load_or_make_key(state_dir / "fleet.key").encode()
        self.ssh_key = load_or_make_ssh_key(state_dir / "ssh_ed25519")

    def master_token(self, label: str) -> str:
        """Return the master token of the instance with that label; 256 bits, hex."""
        return hmac.new(self._secret, label.encode(), hashlib.sha256).hexdigest()

    @property
    def ssh_public_key(self) -> str:
        """The fleet's public ssh key in one line, as an account's key list wants it."""
        return f"{self.ssh_key.get_name()} {self.ssh_key.get_base64()} autoscaler-py"
