"""What nobody may see: the account's secret variables, and the login of a private registry.

Secret variables (`vastai … env-var`) are put into every container of the account, so every host of the
account's instances can read them. Their values, and the password of a login, go to the command by standard
input.
"""

import json
import re
from dataclasses import dataclass, field

from vast.cli import ONCE, SECRETS, Cli, api_error, in_words
from vast.errors import short, unexpected
from vast.rows import parse_json


@dataclass(frozen=True)
class RegistryLogin:
    """How to log in to the registry of a private image; registry: its address, "" for Docker Hub."""

    user: str
    password: str = field(repr=False)
    registry: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError, without the password, for what the service would split at its spaces."""
        for name, text in (("user", self.user), ("password", self.password), ("registry", self.registry)):
            if not re.fullmatch(r"[!-&(-~]*" if name == "registry" else r"[!-&(-~]+", text):
                raise ValueError(
                    f"registry login, {name}: wanted printable characters, no spaces and no quotes"
                )

    @property
    def words(self) -> str:
        """The login as the service takes it."""
        return f"-u {self.user} -p {self.password} {self.registry}".rstrip()


class SecretVariables:
    """The secret variables of one account."""

    def __init__(self, cli: Cli) -> None:
        """Call the service by that command."""
        self._cli = cli

    def names(self) -> list[str]:
        """Return the variables' names; the command prints no values."""
        words = ["show", "env-vars"]
        printed = parse_json(in_words(words), self._cli.run(SECRETS, words, ["--raw"]))
        if not isinstance(printed, dict):
            raise unexpected(in_words(words), "an object of names", repr(short(str(printed))))
        return sorted(str(name) for name in printed)

    def value(self, name: str) -> str | None:
        """Return the value of a variable as the service shows it, None where there is no such variable.

        It is for the hub that the containers ask with it, and never in an error, a log or a file.
        """
        words = ["show", "env-vars"]
        printed = self._cli.run(SECRETS, words, ["--show-values", "--raw"])
        try:
            said = json.loads(printed)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise unexpected(in_words(words), "an object", "something else")
        value = said.get(name)
        return value if isinstance(value, str) and value else None

    def set(self, name: str, value: str) -> None:
        """Create or change a variable. Raises ValueError, without the value, before anything is sent."""
        _check_name(name)
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,4096}", value):
            # The pattern of the service's OpenAPI description (create_env_var.yaml, 2026-11).
            raise ValueError(
                f"{name}: the service takes letters, digits, _, - and . in a value, nothing else"
            )
        self._change(
            ["update" if name in self.names() else "create", "env-var"], [name, "--", value], (value,)
        )

    def delete(self, name: str) -> None:
        """Delete a variable."""
        _check_name(name)
        self._change(["delete", "env-var"], [name], ())

    def _change(self, words: list[str], flags: list[str], secrets: tuple[str, ...]) -> None:
        stdout = self._cli.run(SECRETS, words, [ONCE, *flags], secrets=secrets)
        if (said := short(stdout)).startswith("Failed to "):
            raise api_error(in_words(words), SECRETS, 200, said)
        if not said:
            raise unexpected(in_words(words), "a sentence", "nothing")


def _check_name(name: str) -> None:
    """Raise ValueError for a name that the service would change: it writes names in capitals."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,127}", name):
        raise ValueError(f"{name[:40]!r}: wanted a name of capitals, digits and _, such as HF_TOKEN")
