"""Reads the file of machines for rent that the flag --offers names."""

import json
from pathlib import Path

from fleet_client.text_files import read_text
from localcloud.machines import MACHINES, Machine, machines_from
from process.errors import ConfigError


def read_machines(path: Path | None) -> tuple[Machine, ...]:
    """Return the machines for rent in a JSON file, the built-in ones for None; raise ConfigError."""
    if path is None:
        return MACHINES
    text = read_text(path, "--offers")
    try:
        return machines_from(json.loads(text))
    except (ValueError, RecursionError, ConfigError) as e:
        raise ConfigError(f"--offers {path}: {e}") from None
