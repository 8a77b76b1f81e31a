"""The files that a run of sim.py writes: checked before the run begins, written when it has ended."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from process.errors import ConfigError


def check_output(flag: str, path: Path | None) -> None:
    """Raise ConfigError if this file, named by a flag, cannot be written because of its directory."""
    if path is not None:
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.absolute().parent}")
        if path.is_dir():
            raise ConfigError(f"{flag} {path}: wanted a file, that is a directory")


def write_report(found: Mapping[str, Any], path: Path | None) -> None:
    """Write a run's report to a file as JSON; do nothing if the path is None. Raises ConfigError."""
    if path is not None:
        try:
            path.write_text(json.dumps(found, indent=1, default=str) + "\n")
        except OSError as e:
            raise ConfigError(f"--json {path} cannot be written: {e.strerror}") from e
