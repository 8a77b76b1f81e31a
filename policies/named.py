"""Make a policy from its name and parameters, as an operator gives them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policies.types import Policy
from process.errors import ConfigError


def make_policy(
    kinds: Mapping[str, type[Policy]], name: str, params: Mapping[str, float], speedup: float = 1.0
) -> Policy:
    """Return the policy of that name with those parameters.

    kinds: the known policies by name. speedup: of the cloud; it divides the waiting times that params does
    not give. Raises ConfigError for an unknown name or parameter, and lists the known ones.
    """
    kind = kinds.get(name)
    if kind is None:
        raise ConfigError(f"unknown policy {name!r}: known are {', '.join(sorted(kinds))}")
    fields: dict[str, Any] = {
        f: v.type
        for f, v in kind.__dataclass_fields__.items()  # type: ignore[attr-defined]
    }
    typed: dict[str, float] = {}
    for key, value in params.items():
        if key not in fields:
            raise ConfigError(f"policy {name} has no parameter {key!r}: it has {', '.join(fields)}")
        whole = fields[key] in (int, int | None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
            raise ConfigError(f"policy parameter {key} {value!r}: wanted a number from 0 to 1e6")
        if whole and value != int(value):
            raise ConfigError(f"policy parameter {key} {value!r}: wanted a whole number")
        typed[key] = int(value) if whole else float(value)
    try:
        return replace(kind().scaled(speedup), **typed)  # type: ignore[type-var]
    except ValueError as e:
        raise ConfigError(f"policy {name}: {e}") from None


def parse_params(flag: str, pairs: tuple[str, ...]) -> dict[str, float]:
    """Return the NAME=NUMBER pairs that were given to a flag as a mapping; raise ConfigError for others."""
    params: dict[str, float] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"{flag} {pair!r}: wanted NAME=NUMBER")
        params[key] = number
    return params
