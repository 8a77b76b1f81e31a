"""What a policy is shown of a run of the fluid model: snapshots of its fleet."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from policies.types import BIN_S, FleetSnapshot, Traffic
from simulation.virtual.fluid.bins import PREFILL_WEIGHT, Floats
from simulation.virtual.fluid.fleet import FluidFleet
from simulation.virtual.fluid.kernel import (
    BEGAN,
    BEGAN_PROMPT,
    LATE,
    ON,
    ON_PROMPT,
    ON_WORK,
    QUEUED,
    FluidState,
)

T = TypeVar("T")


class TailView(Sequence[T]):
    """A view of a part of a list that grows, which costs nothing to make.

    A policy gets one at every tick; copying hours of history each time would cost more than the simulation.
    `array`, if given, holds the same values for numpy.
    """

    __slots__ = ("_array", "_end", "_of", "_start")

    def __init__(self, of: list[T], start: int, end: int, array: Floats | None = None) -> None:
        self._of, self._start, self._end, self._array = of, max(0, start), end, array

    def __len__(self) -> int:
        """Return how many values the view has."""
        return self._end - self._start

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """Return one value of the view, or the values of a slice as a list."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self._of[self._start : self._end][index]
            return self._of[self._start + start : self._start + max(start, stop)]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._of[(self._end if index < 0 else self._start) + index]

    def __iter__(self) -> Iterator[T]:
        """Iterate over the values of the view, oldest first."""
        return iter(self._of[self._start : self._end])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the values of the view for numpy: a numpy view where an array is at hand."""
        if self._array is None:
            return np.asarray(self._of[self._start : self._end], dtype=dtype)
        return np.array(self._array[self._start : self._end], dtype=dtype, copy=copy)


class SnapshotBuilder:
    """Builds snapshots of the fluid model's fleet, as the autoscaler would show its own to a policy."""

    def __init__(
        self,
        fleet: FluidFleet,
        state: FluidState,
        arriving: Floats,
        totals: Sequence[Floats],
        memory_s: float,
    ) -> None:
        """Make the builder for one run, which must be tracked (ValueError otherwise).

        totals: requests, work, prompt and output tokens that arrived before each second. memory_s: for how
        many seconds the policy looks back.
        """
        if not len(state.began):
            raise ValueError("a policy is asked only in a run that is tracked")
        self._fleet = fleet
        self._state = state
        self._totals = totals
        self._memory_s = memory_s
        self._array = arriving
        self._arriving = arriving.tolist()
        self._demand: list[tuple[float, float]] = []
        self._start_s = (fleet.start_lo_s + fleet.start_hi_s) / 2.0
        self._holds = fleet.capacity.work_s * fleet.service_s

    def look(self, now: int) -> FleetSnapshot:
        """Return the snapshot of the fleet at second `now`, before the requests of that second arrive."""
        fleet = self._fleet
        hot, starting, loading, stopping, cold, head, late_head = self._state.whole[:7].tolist()
        real = self._state.real.tolist()
        requests, work, prompt, output = (float(total[now]) for total in self._totals)
        held_work = real[QUEUED] + real[LATE]
        waits = held_work > 0.0
        oldest = 0.0
        if waits:
            first = head if real[QUEUED] > 0.0 else now
            oldest = float(now - min(first, late_head if real[LATE] > 0.0 else now))
        self._demand.append((float(now), (real[ON_WORK] + held_work) / self._holds))
        while self._demand[0][0] < now - self._memory_s:
            if len(self._demand) == 1:
                break
            self._demand.pop(0)
        ended = now // int(BIN_S)
        return FleetSnapshot(
            now=float(now),
            demand=self._demand,
            hot=hot,
            coming=starting,
            loading=loading,
            cold=cold + stopping,
            draining=0,
            start_time_s=self._start_s,
            load_time_s=fleet.load_s,
            traffic=Traffic(
                requests_total=requests,
                prompt_tokens_total=prompt,
                output_tokens_total=output,
                work_total=work,
                in_flight=real[ON],
                held=max(0.0, requests - real[BEGAN]) if waits else 0.0,
                held_work=held_work,
                held_prompt_tokens=max(0.0, prompt - real[BEGAN_PROMPT]) if waits else 0.0,
                oldest_wait_s=oldest,
                kv_tokens=real[ON_PROMPT] + max(0.0, real[ON_WORK] - PREFILL_WEIGHT * real[ON_PROMPT]) / 2.0,
            ),
            capacity=fleet.capacity,
            arriving=TailView(self._arriving, 0, ended, self._array),
            running_usd_h=fleet.running_usd_h,
            stopped_usd_h=fleet.stopped_usd_h,
        )
