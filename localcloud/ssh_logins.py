"""How a host's ssh treats a login: late keys, greetings, tmux, or no ssh at all."""

from dataclasses import dataclass
from random import Random

from localcloud.realism import Realism

GREETING = (
    "Welcome to vast.ai. If authentication fails, try again after a few seconds,"
    " and double check your ssh key.\nHave fun!\n"
)
"""What comes before the login, and before the output of a command."""

NO_TMUX_FILE = ".no_auto_tmux"
"""The file in the home directory with which a command is not run in tmux."""

TMUX_SAYS = "no sessions\n"


@dataclass(frozen=True)
class SshLogin:
    """One host's ssh. key_lag_s: until a key of the account, or an attached one, is accepted, seconds.

    greeting: it greets. tmux: it runs commands in tmux, where there are none, until a file forbids it.
    account_keys: whether the keys of the account are accepted; attached ones always are. refused: nobody
    listens, ever.
    """

    greeting: bool = False
    tmux: bool = False
    key_lag_s: float = 0.0
    account_keys: bool = True
    refused: bool = False

    @classmethod
    def of(cls, machine_id: int, realism: Realism, speedup: float) -> "SshLogin":
        """Return the ssh of that machine's host, the same each time."""
        lot = Random(f"ssh of {machine_id}").random()
        return cls(
            realism.ssh_greeting,
            realism.ssh_tmux,
            realism.ssh_key_lag_s / speedup,
            account_keys=Random(f"keys of {machine_id}").random() >= realism.ssh_keys_lost,
            refused=lot < realism.ssh_refused,
        )


KIND = SshLogin()
