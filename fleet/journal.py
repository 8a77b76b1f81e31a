"""What the fleet decided and what happened to it, as plain data for the ledger, the log and the operator."""

from dataclasses import dataclass, field

from fleet.commands import (
    Command,
)
from policies import FleetSnapshot, Targets

BUCKET_S = 15.0
"""Width of a `worked` bucket: fine enough to clip to a run of a minute, 5,760 rows an instance and day."""

HOT_STATES = frozenset({"hot", "draining"})
BOOT_STATES = frozenset({"ordered", "loading", "running", "starting"})


@dataclass(frozen=True)
class BillingInterval:
    """One instance in one state at one price. usd_h is what it pays, running_usd_h what it would pay hot."""

    label: str
    instance: int | None
    machine: int | None
    state: str
    from_s: float
    to_s: float | None
    usd_h: float
    running_usd_h: float
    why: str

    def seconds_within(self, from_s: float, to_s: float) -> float:
        """How long it lasted inside the window, seconds."""
        end = to_s if self.to_s is None else min(self.to_s, to_s)
        return max(0.0, end - max(self.from_s, from_s))


@dataclass(frozen=True)
class SavedInstance:
    """What a restarted autoscaler must know of an instance; from `state` on it is its open stretch."""

    label: str
    instance: int | None
    machine: int | None
    loaded: bool
    condemned: bool
    ordered_s: float
    throughput: float | None
    state: str | None
    since: float | None
    usd_h: float = 0.0
    running_usd_h: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Dollars of a window, by what they were spent on; `lost` is failed machines that still billed."""

    hot_working: float
    hot_idle: float
    loading: float
    stopped: float
    lost: float
    usd_if_all_hot: float
    utilisation: float | None
    intervals: tuple[BillingInterval, ...]

    @property
    def total(self) -> float:
        """All dollars of the window."""
        return self.hot_working + self.hot_idle + self.loading + self.stopped + self.lost


@dataclass(frozen=True)
class Decision:
    """What was seen, what was wanted and what is ordered; the record `GET /decisions` shows."""

    at: float
    seen: FleetSnapshot | None
    targets: Targets | None
    commands: tuple[Command, ...]
    notes: tuple[str, ...]
    clamped: tuple[str, ...] = ()  # "hot", "total": what the policy wanted was beyond the hard limits


@dataclass
class Journal:
    """What the ledger must learn since the last `take_journal`."""

    intervals: list[BillingInterval] = field(default_factory=list)
    fleet: dict[str, SavedInstance] = field(default_factory=dict)
    durations: list[tuple[str, float, float]] = field(default_factory=list)
    bad_machines: dict[int, tuple[float, str]] = field(default_factory=dict)
    vanished: dict[str, tuple[float, float]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to write down; the log lines are not."""
        return bool(self.intervals or self.fleet or self.durations or self.bad_machines or self.vanished)

    def before(self, later: "Journal") -> "Journal":
        """This one and a later one as one; its log lines are taken for written."""
        return Journal(
            self.intervals + later.intervals,
            self.fleet | later.fleet,
            self.durations + later.durations,
            self.bad_machines | later.bad_machines,
            self.vanished | later.vanished,
            later.log,
        )
