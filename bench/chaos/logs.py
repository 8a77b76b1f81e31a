"""What the logs of a campaign must not have: tracebacks, and secrets."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.chaos.stack import Stack
from fleet.outside.keys import FleetKeys

TRACEBACK = "Traceback (most recent call last)"

SHORTEST = 24
"""Characters of the shortest word of a key file that is a secret; others are "-----BEGIN" and the like."""

AROUND_LINES = 25
"""Lines that are shown of a traceback."""


@dataclass
class LogFindings:
    """What was found. tracebacks: each with its end; secrets: which secret is in which log."""

    lines: int = 0
    tracebacks: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)


def look_through(stack: Stack, canary: str, labels: Iterable[str]) -> LogFindings:
    """Search all logs of our processes and of the cloud. labels: of all machines there were."""
    secrets = secrets_of(stack) | {"a prompt": canary}
    keys = FleetKeys(stack.state_dir)
    secrets |= {f"master token of {label}": keys.master_token(label) for label in labels}
    found = LogFindings()
    for path in sorted(stack.logs.glob("*.log")):
        text = path.read_text(errors="replace")
        lines = text.splitlines()
        found.lines += len(lines)
        found.secrets += [f"{name} in {path.name}" for name, secret in secrets.items() if secret in text]
        found.tracebacks += [
            f"{path.name}:{at + 1}: " + "\n".join(lines[max(0, at - 1) : at + AROUND_LINES])
            for at, line in enumerate(lines)
            if TRACEBACK in line
        ]
    return found


def secrets_of(stack: Stack) -> dict[str, str]:
    """Return every secret of that stack by name."""
    found = {f"client key {name}": key for name, key in stack.client_keys.items()}
    found |= {"the cloud's key": stack.cloud_key, "the operator's key": stack.operator_key}
    for path in (*stack.state_dir.glob("*.key"), stack.state_dir / "ssh_ed25519"):
        for number, word in enumerate(path.read_text().split()):
            if len(word) >= SHORTEST:
                found[f"{path.name} {number}"] = word
    return found
