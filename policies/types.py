"""What every policy is given and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Seen:
    """The fleet and its load at one moment, as a policy may see it.

    now: seconds on the caller's clock.
    demand: (time, demand) pairs, oldest first; demand in instances' worth of capacity, held requests counted.
    hot: instances that take requests. coming: started or booting with the model on disk.
    loading: ordered or loading the model for the first time. cold: stopped with the model on disk.
    draining: hot, but get no new requests.
    start_time_s, load_time_s: stop-to-hot and order-to-hot as measured on this fleet, seconds.
    """

    now: float
    demand: Sequence[tuple[float, float]]
    hot: int
    coming: int
    loading: int
    cold: int
    draining: int
    start_time_s: float
    load_time_s: float

    @property
    def total(self) -> int:
        """Instances of the fleet that are or will be able to serve."""
        return self.hot + self.coming + self.loading + self.cold + self.draining


@dataclass(frozen=True)
class Targets:
    """How many instances shall be hot, and how many there shall be in all (hot + cold), and why."""

    hot: int
    total: int
    why: str


class Policy(Protocol):
    """A frozen dataclass whose fields are its parameters; `targets` has no memory beside `seen`."""

    def targets(self, seen: Seen) -> Targets:
        """Say what the fleet should be; the same `seen` gives the same answer."""
        ...

    def scaled(self, speedup: float) -> "Policy":
        """The same policy for a cloud whose boot and load times are divided by `speedup`."""
        ...

    @property
    def memory_s(self) -> float:
        """How much of the demand series it reads, seconds."""
        ...
