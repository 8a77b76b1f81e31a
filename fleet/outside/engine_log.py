"""The beginning of an instance's engine log, for an operator who wants to know why it does not become ready.

Only what the engine wrote before it was ready: afterwards it may write what requests say, and prompts do not
come to the autoscaler. `python autoscaler_server.py logs ID` follows all of it, from the instance to the
operator's own terminal.
"""

from dataclasses import dataclass

from fleet.outside.ssh_log import READY_LINES, UNTIL_READY, SshLog, between_marks, marked
from fleet.outside.turns import Autoscaler
from process.errors import InstanceError
from process.safe_text import safe_text

LINES = 60
"""Last lines that are shown."""

LONGEST_LINE = 400
"""Characters of a line: an engine's progress bar may be one line of many thousands."""

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class LogBeginning:
    """Lines of an engine's log, oldest first. ready: they end with the engine being ready."""

    lines: list[str]
    ready: bool


class EngineLog:
    """Reads the logs of a fleet's engines over ssh; any thread may call."""

    def __init__(self, scaler: Autoscaler, ssh: SshLog) -> None:
        """Read the logs of that autoscaler's instances. ssh: has the fleet's key and knows the host keys."""
        self._scaler = scaler
        self._ssh = ssh

    def beginning(self, instance_id: int) -> LogBeginning:
        """Return the last lines that the engine wrote before it was ready.

        Raises KeyError when there is no such instance, InstanceError when its log cannot be read.
        """
        with self._scaler.lock:
            found = next((i for i in self._scaler.instances if i.id == instance_id), None)
            if found is None:
                raise KeyError(instance_id)
            label, ssh = found.label, found.ssh
        if ssh is None:
            raise InstanceError("the cloud has not said yet where its ssh is")
        text = self._ssh.run(label, *ssh, command(), TIMEOUT_S)
        lines = [safe_text(line, LONGEST_LINE) for line in between_marks(text) if line.strip()]
        return LogBeginning(lines, bool(lines) and any(ready in lines[-1] for ready in READY_LINES))


def command() -> str:
    """Return the shell command that prints those lines; all words in it are constants."""
    # A progress bar is one line with carriage returns: its last state is what counts.
    log = f"sed '{UNTIL_READY}' \"$HOME/fleet/model.log\" 2>/dev/null"
    return marked(f"{log} | tail -n {LINES} | sed 's/.*\\r\\(.\\)/\\1/' | cut -c 1-{LONGEST_LINE}")
