"""The environment that a create's `--env` becomes, by the vastai package's own parser."""

from typing import cast

from vastai.utils import parse_env  # type: ignore[import-untyped]


def received(env: str) -> dict[str, str]:
    """Return what the service is sent: variables, and ports as {"-p 8000:8000": "1"}."""
    return cast(dict[str, str], parse_env(env))
