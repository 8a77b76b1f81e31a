"""`logs ID` and `ssh ID`: the operator's own ssh to an instance, past the autoscaler.

What an engine logs may quote prompts, so it goes from the instance to the operator's terminal only. The host
key that the autoscaler saw first is the only one that is accepted.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from process.errors import ConfigError

FOLLOW_LOG = 'tail -n 100 -F "$HOME/fleet/model.log"'


def run_ssh(instance_id: int, row: Mapping[str, Any] | None, key: Path, remote: str | None) -> int:
    """Run ssh to an instance until it ends; return its exit status. Raises ConfigError where it cannot begin.

    row: what GET /instances says of the instance, None where it is not there. key: the fleet's ssh key file.
    remote: the command to run there, None for a shell.
    """
    if row is None:
        raise ConfigError(f"the fleet has no instance {instance_id}")
    if row.get("ssh") is None:
        raise ConfigError(f"instance {instance_id} is {row['state']}: nobody answers ssh there")
    if not key.exists():
        raise ConfigError(f"{key} is missing: this runs where the autoscaler runs, or give --state-dir")
    host, _, port = str(row["ssh"]).rpartition(":")
    with tempfile.NamedTemporaryFile("w", prefix="known_hosts.") as known:
        if row.get("host_key"):
            known.write(f"[{host}]:{port} {row['host_key']}\n")
            known.flush()
        else:
            sys.stderr.write("its host key was not seen before: the one it shows now is believed\n")
        try:
            return subprocess.call(
                ssh_command(host, port, key, Path(known.name), remote, known=bool(row.get("host_key")))
            )
        except FileNotFoundError:
            raise ConfigError("there is no ssh here: install OpenSSH's client") from None
        except KeyboardInterrupt:
            return 0


def ssh_command(
    host: str, port: str, key: Path, known_hosts: Path, remote: str | None, *, known: bool
) -> list[str]:
    """Return the command line of ssh. known: the host key is in that file, and no other is accepted."""
    settings = {
        "StrictHostKeyChecking": "yes" if known else "accept-new",
        "UserKnownHostsFile": str(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "IdentitiesOnly": "yes",
        "ForwardAgent": "no",
        "LogLevel": "ERROR",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    where = ["-i", str(key), "-p", port, f"root@{host}"]
    return ["ssh", *options, *where, *([] if remote is None else ["--", remote])]
