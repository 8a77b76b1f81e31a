"""Flags from elsewhere than the command line: a TOML file, and the environment.

What they say is looked at in full, also where the command line says otherwise: a mistake in a file shows at
the first start, not at the one that needs it.
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
    """A declared flag, as far as it matters here. Each raises ConfigError that begins with `before`."""

    @property
    def key(self) -> str:
        """Return its name in a file."""

    def from_text(self, before: str, text: str) -> Any:
        """Return the value of a text."""

    def from_toml(self, before: str, value: Any) -> Any:
        """Return the value of what TOML has."""


def read_file(path: Path, flags: Mapping[str, ReadsValues], passed_over: Collection[str]) -> dict[str, Any]:
    """Return the values in a TOML file, by field; passed_over: fields that may be there and are not wanted.

    Raises ConfigError that names the file, and the name or line.
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
    """Return the values of variables that begin with the prefix, by field. An empty one says nothing.

    Raises ConfigError for a wrong value, and for a name that is nearly a flag's.
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
