"""A fixed number hot and a fixed number in all: the baseline of every comparison, and what `prepare` runs."""

from dataclasses import dataclass

from policies.types import FleetSnapshot, Targets


@dataclass(frozen=True)
class Fixed:
    """Keep `hot` instances hot and `total` in all, whatever the load."""

    hot: int = 1
    total: int = 1

    @property
    def memory_s(self) -> float:
        """How far it looks back: not at all."""
        return 0.0

    def targets(self, seen: FleetSnapshot) -> Targets:  # noqa: ARG002 - a fixed fleet looks at nothing
        """Return the numbers of hot and of all instances that it was made with, whatever is seen."""
        return Targets(self.hot, max(self.hot, self.total), f"fixed at {self.hot} hot, {self.total} in all")

    def scaled(self, speedup: float) -> "Fixed":  # noqa: ARG002 - it has no times
        """Return itself: it has no times."""
        return self
