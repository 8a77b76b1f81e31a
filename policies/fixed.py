"""A fixed fleet: so many hot, so many in all. The baseline of every comparison, and what `prepare` runs."""

from dataclasses import dataclass

from policies.types import FleetSnapshot, Targets


@dataclass(frozen=True)
class Fixed:
    """Keeps `hot` instances hot and `total` in all, whatever the load."""

    hot: int = 1
    total: int = 1

    @property
    def memory_s(self) -> float:
        """It looks at nothing."""
        return 0.0

    def targets(self, seen: FleetSnapshot) -> Targets:  # noqa: ARG002 - a fixed fleet looks at nothing
        """The same two numbers, always."""
        return Targets(self.hot, max(self.hot, self.total), f"fixed at {self.hot} hot, {self.total} in all")

    def scaled(self, speedup: float) -> "Fixed":  # noqa: ARG002 - it has no times
        """Itself: it has no times."""
        return self
