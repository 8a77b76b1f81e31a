"""One arrival of a log, and what reading the log had to say."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Request(NamedTuple):
    """One arrival of a log, seconds since the first. session: the number of its session; -1: not known."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    session: int


@dataclass
class ReadNotes:
    """How a log was read: what its reader assumed or left out. A log that is read again says it once.

    failed: requests that failed where the log was made. moved: rows that stood too early in it.
    """

    failed: int = 0
    moved: int = 0
    _said: dict[str, str] = field(default_factory=dict)
    _read: Callable[[], float] | None = None

    def begin(self) -> None:
        """Forget what an earlier reading said."""
        self.failed = self.moved = 0
        self._said.clear()

    def follow(self, read: Callable[[], float] | None) -> None:
        """Ask this how much of the file was read, 0 to 1; None: it is read as a whole, or has no size."""
        self._read = read

    @property
    def read_share(self) -> float | None:
        """How much of the file was read so far, 0 to 1; None: that says nothing."""
        return None if self._read is None else self._read()

    def count_failed(self) -> None:
        """Count one more request that is left out since it failed."""
        self.failed += 1

    def count_moved(self) -> None:
        """Count one more row that was put in order."""
        self.moved += 1

    def say(self, what: str, text: str) -> None:
        """Note something, once for each `what`."""
        self._said.setdefault(what, text)

    @property
    def lines(self) -> list[str]:
        """All of it, one sentence each."""
        found = list(self._said.values())
        if self.moved:
            found.append(f"{self.moved:,} rows stood a little too early or late and are put in order")
        if self.failed:
            found.append(f"{self.failed:,} requests that failed there are left out")
        return found
