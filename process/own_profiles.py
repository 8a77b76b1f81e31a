"""Finds the file of one's own model profiles, for this process and those that it starts."""

import os
from pathlib import Path

from fleet_client.text_files import read_text
from process.errors import ConfigError

VARIABLE = "FLEET_PROFILES"
"""Environment variable that tells the processes that are started which file it is."""

FILE_NAME = "profiles.toml"
"""What the file is called where no flag says it."""


def find_own_profiles(given: Path | None, *places: Path) -> Path | None:
    """Return the file: the given one, that of the environment, ./profiles.toml, or that of a place; or None.

    Raises ConfigError where the one that is given is not there.
    """
    if given is not None:
        if not given.is_file():
            raise ConfigError(f"--profiles {given}: no such file")
        return given
    named = os.environ.get(VARIABLE)
    found = [Path(named)] if named else [place / FILE_NAME for place in (Path(), *places)]
    return next((path for path in found if path.is_file()), None)


def read_own_profiles(given: Path | None, *places: Path) -> tuple[str, str]:
    """Return the text of that file and what it is called; empty where there is none. Child processes find it.

    Raises ConfigError where it cannot be read.
    """
    path = find_own_profiles(given, *places)
    if path is None:
        return "", FILE_NAME
    os.environ[VARIABLE] = str(path.resolve())
    return read_text(path, "--profiles"), str(path)
