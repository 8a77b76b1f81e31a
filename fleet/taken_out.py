"""Taking an instance out of service by hand: what a person asked, until it is over."""

from dataclasses import dataclass

from fleet.states import SERVING, State

TAKEN_OUT = SERVING | {State.RUNNING, State.STOPPING}
"""States in which it still counts that a person has taken it out of service; once cold it is as others."""


@dataclass
class TakenOut:
    """Whether a person wants an instance out of service; true while that is so.

    for_good: another takes its place, and it is destroyed once it is drained.
    """

    asked: bool = False
    for_good: bool = False

    def ask(self, *, for_good: bool) -> None:
        """Take the instance out of service: no drain of it is taken back."""
        self.asked, self.for_good = True, self.for_good or for_good

    def end(self, state: State) -> None:
        """Note the instance's new state: once it is cold it is as others."""
        self.asked = self.asked and state in TAKEN_OUT

    def __bool__(self) -> bool:
        """Return whether the instance is to be out of service and that is not over."""
        return self.asked
