"""What the fleet cost within a window of time, by what the dollars were spent on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fleet.journal import BillingInterval, BytesBilled
from fleet.states import SERVING, State

BOOTING = frozenset({State.ORDERED, State.LOADING, State.RUNNING, State.STARTING})
LOST = frozenset({State.FAILED, State.DESTROYING})

SPENT_ON = ("hot_working", "hot_idle", "loading", "stopped", "lost", "traffic")
"""What dollars are spent on: fields of CostBreakdown."""


@dataclass(frozen=True)
class CostBreakdown:
    """What the fleet cost within a window, in dollars by what they were spent on.

    hot_working, hot_idle: hot instances with and without requests. lost: failed machines that still billed.
    traffic: bytes that came to instances or went from them.
    utilisation: the share of the hot dollars that was spent on work. usd_if_all_hot: every instance at its
    running price for as long as it existed in the window.
    """

    hot_working: float
    hot_idle: float
    loading: float
    stopped: float
    lost: float
    usd_if_all_hot: float
    utilisation: float | None
    intervals: tuple[BillingInterval, ...]
    bytes_billed: tuple[BytesBilled, ...] = ()

    @property
    def traffic(self) -> float:
        """What the fleet paid for bytes, in dollars."""
        return sum(t.usd for t in self.bytes_billed)

    @property
    def total(self) -> float:
        """All that the fleet cost within the window, in dollars."""
        return self.hot_working + self.hot_idle + self.loading + self.stopped + self.lost + self.traffic


def break_down(
    intervals: Sequence[BillingInterval],
    worked_s: Mapping[str, float],
    from_s: float,
    to_s: float,
    bytes_billed: Sequence[BytesBilled] = (),
) -> CostBreakdown:
    """Return what the fleet cost from from_s to to_s, by its billing intervals.

    worked_s: seconds in the window with at least one request in flight, by label; they split the hot dollars.
    bytes_billed: the traffic of the window.
    """
    hot_s: defaultdict[str, float] = defaultdict(float)
    hot_usd: defaultdict[str, float] = defaultdict(float)
    loading = stopped = lost = all_hot = 0.0
    for i in intervals:
        seconds = i.seconds_within(from_s, to_s)
        usd = i.usd_h * seconds / 3600.0
        all_hot += i.running_usd_h * seconds / 3600.0
        if i.state in SERVING:
            hot_s[i.label] += seconds
            hot_usd[i.label] += usd
        elif i.state in BOOTING:
            loading += usd
        elif i.state in LOST:
            lost += usd
        else:
            stopped += usd
    working = sum(
        usd * (min(1.0, worked_s.get(label, 0.0) / hot_s[label]) if hot_s[label] > 0 else 0.0)
        for label, usd in hot_usd.items()
    )
    hot = sum(hot_usd.values())
    return CostBreakdown(
        hot_working=working,
        hot_idle=hot - working,
        loading=loading,
        stopped=stopped,
        lost=lost,
        usd_if_all_hot=all_hot + sum(t.usd for t in bytes_billed),
        utilisation=working / hot if hot > 0 else None,
        intervals=tuple(intervals),
        bytes_billed=tuple(bytes_billed),
    )
