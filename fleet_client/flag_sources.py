"""Reads flags from elsewhere than the command line: from a TOML file, and from the environment.

All of it is checked, also where the command line says otherwise: a mistake in a file shows at the first
start, not at the one that needs it.
"""

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fleet_client.errors import ConfigError
from fleet_client.text_files import read_text

NEAR = 0.85
"""Share of letters in common (difflib's ratio) from which a name in the environment is a flag's, misspelt.
What is further off is somebody else's: AUTOSCALER_SERVICE_HOST is set by Kubernetes."""


class ReadsValues(Protocol):
    """What this module needs of a declared flag. Its methods raise ConfigError, beginning with `before`."""

    @property
    def key(self) -> str:
        """The flag's name in a file."""

    def from_text(self, before: str, text: str) -> Any:
        """Return the flag's value, given as text in the environment."""

    def from_toml(self, before: str, value: Any) -> Any:
        """Return the flag's value, given in a TOML file."""


def read_file(path: Path, flags: Mapping[str, ReadsValues], passed_over: Collection[str]) -> dict[str, Any]:
    """Return the values of flags in a TOML file, by field.

    passed_over: fields that may be in the file and are not wanted. Raises ConfigError that names the file,
    and the name or line.
    """
    try:
        said = tomllib.loads(read_text(path, "the file of --config"))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: {e}") from None
    found: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for key, value in said.items():
        name = key.replace("-", "_")
        if name in seen:
            raise ConfigError(f"{path}: {seen[name]} and {key} are the same name: wanted one of them")
        seen[name] = key
        if name in flags:
            found[name] = flags[name].from_toml(f"{path}: {key} = ", value)
        elif name not in passed_over:
            known = [one.key for one in flags.values()]
            raise ConfigError(f"{path}: {key} is not known; the nearest name is {_nearest(key, known)}")
    return found


def read_environment(
    prefix: str, flags: Mapping[str, ReadsValues], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return the values of flags in environment variables whose names begin with prefix, by field.

    An empty variable is ignored. Raises ConfigError for a wrong value, and for a name that is nearly a
    flag's.
    """
    found = {}
    for variable, text in environ.items():
        name = variable.removeprefix(prefix).lower()
        if not variable.startswith(prefix) or not text or name == "config":
            continue
        if name in flags:
            found[name] = flags[name].from_text(f"{variable}=", text)
        elif near := difflib.get_close_matches(name, flags, n=1, cutoff=NEAR):
            raise ConfigError(f"{variable} is not known; the nearest name is {prefix}{near[0].upper()}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name.replace("_", "-"), list(known), n=1, cutoff=0.0)[0]
