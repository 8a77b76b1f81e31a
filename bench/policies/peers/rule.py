"""What all rules of others share: a loop of their own, a memory, limits on how many they may ask for.

    seen, as often as the caller likes  ->  every tick_s: decide(seen)  ->  Targets, repeated until the next

A rule reads `FleetSnapshot` and nothing else; what its source measures and the snapshot does not have is
written in the rule's own file. Fields that end in _s are seconds, and `scaled` divides exactly these. A rule
that knows no stopped pool says one number, N hot and N in all; `actuators.py` makes two of it.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Protocol, Self

from policies import Capacity, FleetSnapshot, Targets

NO_CAP = 10_000
"""The most a rule can ask for where its operator set no limit: more than any fleet here, and finite."""

ROUNDING = 1e-9
"""Less than this over a whole number is rounding: 0.3 / 0.1 is three replicas, not four."""

EARLY_S = 1e-6
"""A call so little before its time counts as in time: clocks are sums of floats."""


class PeerPolicy(Protocol):
    """A `Policy` that also says how often its source looks, and may remember what it saw."""

    @property
    def tick_s(self) -> float:
        """Seconds between two decisions of its own loop."""
        ...

    @property
    def memory_s(self) -> float:
        """How much of `FleetSnapshot.demand` it reads, seconds."""
        ...

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Say what the fleet should be; `seen.now` never goes back."""
        ...

    def scaled(self, speedup: float) -> "PeerPolicy":
        """Return a fresh one with all its times divided by `speedup`."""
        ...


def whole_up(wanted: float) -> int:
    """Return the smallest whole number that holds `wanted`: 0 for no number, at most NO_CAP, at least 0."""
    if not wanted > 0.0:  # nan too
        return 0
    return NO_CAP if wanted >= NO_CAP else math.ceil(wanted - ROUNDING)


def known(capacity: Capacity | None) -> Capacity | None:
    """Return the capacity, or None when there is none or a figure of it is not a positive number."""
    if capacity is None:
        return None
    figures = (capacity.work_s, capacity.requests_s, capacity.concurrency, capacity.kv_tokens)
    return capacity if all(0.0 < f < math.inf for f in figures) else None


def mean_lengths(seen: FleetSnapshot) -> tuple[float, float]:
    """Return prompt and output tokens of a mean request since the start; zeros before the first."""
    traffic = seen.traffic
    if not traffic.requests_total > 0.0:
        return 0.0, 0.0
    return (
        traffic.prompt_tokens_total / traffic.requests_total,
        traffic.output_tokens_total / traffic.requests_total,
    )


def tokens_in_use(seen: FleetSnapshot) -> float:
    """Return context tokens in the memory of the instances; guessed from mean lengths if not known.

    The guess is the prompt and half of the output for each request in flight.
    """
    if seen.traffic.kv_tokens > 0.0:
        return seen.traffic.kv_tokens
    prompt, output = mean_lengths(seen)
    return seen.traffic.in_flight * (prompt + output / 2.0)


@dataclass(eq=False)
class PeerRule:
    """The loop, the limits and the last answer. min_replicas, max_replicas: what it may ask for."""

    reads_setup_time: ClassVar[bool] = False
    """Whether it uses `FleetSnapshot.start_time_s` as the time a new instance takes."""

    tick_s: float = 5.0
    min_replicas: int = 1
    max_replicas: int = NO_CAP
    _due: float = field(default=-math.inf, init=False, repr=False)
    _said: Targets = field(default=Targets(0, 0, ""), init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot work."""
        if not 0.0 < self.tick_s < math.inf:
            raise ValueError(f"tick_s {self.tick_s!r}: wanted over 0")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas}: wanted 0 to {self.max_replicas}")

    @property
    def memory_s(self) -> float:
        """It keeps what it needs itself, so it reads none of the demand series."""
        return 0.0

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Decide when its time has come, else repeat what was said."""
        if seen.now >= self._due - EARLY_S:
            self._due = seen.now + self.tick_s
            self._said = self.decide(seen)
        return self._said

    def decide(self, seen: FleetSnapshot) -> Targets:
        """Return how many it wants: the rule itself."""
        raise NotImplementedError(type(self).__name__)

    def limited(self, wanted: int) -> int:
        """Return `wanted` within the limits."""
        return min(max(wanted, self.min_replicas), self.max_replicas)

    def scaled(self, speedup: float) -> Self:
        """Return a fresh one with every field that ends in _s divided."""
        times = {
            f.name: value / speedup
            for f in fields(self)
            if f.init and f.name.endswith("_s") and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **times)


def over_zero(rule: object, *names: str) -> None:
    """Raise ValueError unless each of these fields is a positive number or None."""
    for name in names:
        value = getattr(rule, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{type(rule).__name__}.{name}: wanted over 0, got {value!r}")
