"""The fleet of the fluid model, and the results of a run of the model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import Capacity
from simulation.virtual.fluid.bins import Floats

Ints = NDArray[np.int64]

MOST_INSTANCES = 4096
"""Most instances that may be starting, loading or stopping at a time: the length of those lists."""


@dataclass(frozen=True)
class FluidFleet:
    """The instances, which are all alike, and the prices of their cloud.

    capacity: of one hot instance. start_lo_s, start_hi_s: a start from cold takes a time drawn evenly from
    between these. load_s: order to hot. stop_s: hot to cold, paid as running. Prices in $/h of one instance.
    late_lane: whether late requests wait behind the others; late_bound_s: until they have waited so long.
    """

    capacity: Capacity
    start_lo_s: float = 60.0
    start_hi_s: float = 120.0
    load_s: float = 600.0
    stop_s: float = 15.0
    running_usd_h: float = 0.78
    stopped_usd_h: float = 0.0083
    late_lane: bool = True
    late_bound_s: float = 300.0
    max_instances: int = 1000

    def __post_init__(self) -> None:
        """Raise ValueError for a capacity, time, price or limit that is out of range."""
        for name, most in (("work_s", 1e9), ("requests_s", 1e9), ("concurrency", 1e9)):
            _wanted(f"capacity.{name}", getattr(self.capacity, name), 1e-6, most)
        for name in ("start_lo_s", "start_hi_s", "load_s", "stop_s", "late_bound_s"):
            _wanted(name, getattr(self, name), 0.0, 7 * 86_400.0)
        for name in ("running_usd_h", "stopped_usd_h"):
            _wanted(name, getattr(self, name), 0.0, 1e4)
        _wanted("max_instances", self.max_instances, 1, MOST_INSTANCES)
        if self.start_hi_s < self.start_lo_s:
            raise ValueError(f"start_hi_s {self.start_hi_s:g}: wanted at least start_lo_s")

    @property
    def service_s(self) -> float:
        """Seconds that a request stays on a full instance: concurrency over throughput (Little's law)."""
        return self.capacity.concurrency / self.capacity.requests_s


def _wanted(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} {value!r}: wanted {least:g} to {most:g}")


@dataclass(frozen=True)
class FluidSeries:
    """A run of the fluid model over time, for plots: at each tick the instances by state.

    at_s: the times of the ticks. wanted: instances that should be hot.
    """

    at_s: Ints
    hot: Ints
    starting: Ints
    loading: Ints
    cold: Ints
    wanted: Ints
    demand: Floats
    """Work that arrived since the tick before, in instances' worth."""


@dataclass(frozen=True)
class FluidResult:
    """What a run of the fluid model cost and how many requests it failed, in the scored seconds only.

    missed: requests served late, or certain to be. late_*: how long these waited, seconds; to the end of
    the run where they still do. uncovered: share of the wanted hot instances that was neither hot nor
    coming nor could be started, because no more were loaded. peak_wanted: most hot wanted at once.
    """

    requests: float
    missed: float
    gpu_h: float
    usd_hot: float
    usd_starting: float
    usd_loading: float
    usd_stopping: float
    usd_stopped: float
    starts: int
    stops: int
    creates: int
    destroys: int
    late_mean_s: float
    late_p50_s: float
    late_p95_s: float
    late_max_s: float
    uncovered: float
    most_hot: int
    peak_wanted: int
    work_arrived: float
    work_served: float
    work_waiting: float
    series: FluidSeries | None = None

    @property
    def misses(self) -> float:
        """The share of the run's requests that were late; 0 when there were none."""
        return self.missed / self.requests if self.requests > 0.0 else 0.0

    @property
    def usd(self) -> float:
        """All dollars that the run's instances cost."""
        return self.usd_hot + self.usd_starting + self.usd_loading + self.usd_stopping + self.usd_stopped

    @property
    def usd_serving(self) -> float:
        """The run's dollars without the loaded pool: no storage, no loads."""
        return self.usd_hot + self.usd_starting + self.usd_stopping
