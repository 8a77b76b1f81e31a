"""Whether the model is complete on the disk: a start that became ready leaves a file that says which one."""

import os
import shlex
from contextlib import suppress


def model_key(model: str, args: list[str]) -> str:
    """Return the name of a model with its arguments: other ones, such as a revision, may need other files."""
    return shlex.join((model, *args))


class Disk:
    """The disk of this machine, for one model."""

    def __init__(self, fleet: str, key: str) -> None:
        """Look at nothing yet. fleet: our directory. key: of the model, by `model_key`."""
        self.key = key
        self._path = os.path.join(fleet, "complete")

    @property
    def complete(self) -> bool:
        """Whether a start with this model and these arguments was ready on this disk."""
        try:
            with open(self._path) as f:
                return bool(self.key) and f.read() == self.key
        except OSError:
            return False

    def note_complete(self) -> None:
        """Note that the model is complete, because its server is ready; raise OSError for a full disk."""
        with open(self._path, "w") as f:
            f.write(self.key)

    def doubt(self) -> None:
        """Forget that the model is complete, because a start that believed it has failed."""
        with suppress(OSError):
            os.remove(self._path)
