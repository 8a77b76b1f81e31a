"""The command `secrets`: the account's secret variables, such as HF_TOKEN for gated models.

Every container of the account gets them, so every host that it rents from can read them. A value comes from
standard input, or is asked for without being shown; it is no argument, and is written down nowhere here.
"""

import getpass
import os
import sys
from pathlib import Path

from fleet.outside.config import AutoscalerConfig, vast_settings
from fleet_client import private_files
from process.errors import CloudError, ConfigError
from vast.account_secrets import SecretVariables
from vast.cli import Cli

DOES = ("set", "list", "delete")

SEEN_BY = "every container that this account creates from now on gets it, so its host can read it"


def run_secrets_command(config: AutoscalerConfig, does: str, name: str | None) -> None:
    """Set, list or delete secret variables and print what was done; raise ConfigError when it was not."""
    if (name is None) != (does == "list"):
        raise ConfigError(f"secrets {does}: wanted {'no name' if does == 'list' else 'a name, as HF_TOKEN'}")
    state_dir = config.state_dir or private_files.default_state_dir(config.label)
    private_files.make_private_dir(state_dir)
    variables = SecretVariables(Cli(vast_settings(config, state_dir, os.environ, Path.home())))
    try:
        if name is None:
            print("\n".join(variables.names()) or "the account has no secret variables")
        elif does == "delete":
            variables.delete(name)
            print(f"{name} is deleted; containers that run keep it until they are destroyed")
        else:
            variables.set(name, _ask(name))
            print(f"{name} is set: {SEEN_BY}")
    except ValueError as e:
        raise ConfigError(str(e)) from None
    except CloudError as e:
        raise ConfigError(f"the cloud did not do it: {e}") from None


def _ask(name: str) -> str:
    """Return the value from standard input, without the end of its line."""
    if sys.stdin.isatty():
        return getpass.getpass(f"{name}: ").strip()
    return sys.stdin.read().strip()
