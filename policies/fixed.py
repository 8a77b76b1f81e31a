"""The policy of a fixed number of hot instances and a fixed number in all.

It is the baseline of every comparison, and the command `prepare` runs it.
"""

from dataclasses import dataclass

from policies.types import FleetSnapshot, Targets


@dataclass(frozen=True)
class Fixed:
    """Keep `hot` instances hot and `total` in all, whatever the load; total None: as many as there are."""

    hot: int = 1
    total: int | None = None

    @property
    def memory_s(self) -> float:
        """For how many seconds into the past this policy reads the load: none."""
        return 0.0

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return the numbers of hot and of all instances that the policy was made for, whatever the load."""
        total = max(self.hot, seen.total if self.total is None else self.total)
        return Targets(self.hot, total, f"fixed at {self.hot} hot, {total} in all")

    def scaled(self, speedup: float) -> "Fixed":  # noqa: ARG002 - it has no times
        """Return the policy itself: it has no times that a faster cloud would shorten."""
        return self
