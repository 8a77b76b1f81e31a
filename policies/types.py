"""What every policy is given (a snapshot of the fleet), and what it gives back (two targets)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

BIN_S = 5.0
"""Seconds of one bin of `FleetSnapshot.arriving`: about one turn of the autoscaler."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the loadbalancers report of the load.

    Fields that end in _total count arrivals since some start (output tokens and work as expected when they
    came); the others say how things stand now. in_flight: requests on instances. held: requests that wait at
    a loadbalancer, held_work their work, late ones included, oldest_wait_s the longest wait among them.
    kv_tokens: context in the memory of all instances; 0 where it is not reported, as in production.
    """

    requests_total: float = 0.0
    prompt_tokens_total: float = 0.0
    output_tokens_total: float = 0.0
    work_total: float = 0.0
    in_flight: float = 0.0
    held: float = 0.0
    held_work: float = 0.0
    held_prompt_tokens: float = 0.0
    oldest_wait_s: float = 0.0
    kv_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one typical hot instance gives when it is full, with requests as long as those of this load.

    work_s, requests_s: per second. concurrency: requests at once. kv_tokens: context it can hold.
    """

    work_s: float
    requests_s: float
    concurrency: float
    kv_tokens: float


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """The fleet and its load at one moment, as a policy sees them.

    now: seconds on the caller's clock.
    demand: (time, demand) pairs, oldest first; demand in instances' worth of capacity, held requests counted.
    hot: instances that take requests. coming: started or booting with the model on disk.
    loading: ordered, or loading the model for the first time. cold: stopped with the model on disk.
    draining: hot, but given no new requests.
    start_time_s, load_time_s: from start to hot and from order to hot as measured on this fleet, seconds.
    capacity: None until something is known. arriving: work per second that arrived, a value per BIN_S,
    oldest first; the last bin ends now. running_usd_h, stopped_usd_h: $/h of one typical instance.
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
    traffic: Traffic = Traffic()
    capacity: Capacity | None = None
    arriving: Sequence[float] = ()
    running_usd_h: float = 0.0
    stopped_usd_h: float = 0.0

    @property
    def total(self) -> int:
        """How many instances of the fleet serve or will be able to."""
        return self.hot + self.coming + self.loading + self.cold + self.draining


@dataclass(frozen=True)
class Targets:
    """How many instances shall be hot, how many there shall be in all (hot + cold), and why."""

    hot: int
    total: int
    why: str


class Policy(Protocol):
    """A rule from a snapshot of the fleet to targets: a frozen dataclass whose fields are its parameters.

    It has no memory: all that it knows is in the snapshot.
    """

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return how many instances shall be hot and in all; the same snapshot gives the same answer."""
        ...

    def scaled(self, speedup: float) -> "Policy":
        """Return the same policy for a cloud whose boot and load times are divided by `speedup`."""
        ...

    @property
    def memory_s(self) -> float:
        """For how many seconds into the past the policy reads what the snapshot holds."""
        ...
