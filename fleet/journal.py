"""What the fleet decided and what happened to it, as plain data for the ledger, the log and the operator."""

from dataclasses import dataclass, field

from fleet.commands import (
    Command,
)
from policies import Seen, Targets

BUCKET_S = 15.0
"""Width of a `worked` bucket: fine enough to clip to a run of a minute, 5,760 rows an instance and day."""

HOT_STATES = frozenset({"hot", "draining"})
BOOT_STATES = frozenset({"ordered", "loading", "running", "starting"})


@dataclass(frozen=True)
class Stretch:
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
class Remembered:
    """What a restarted autoscaler must know of an instance; from `state` on it is its open stretch."""

    label: str
    instance: int | None
    machine: int | None
    loaded: bool
    doomed: bool
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
    stretches: tuple[Stretch, ...]

    @property
    def total(self) -> float:
        """All dollars of the window."""
        return self.hot_working + self.hot_idle + self.loading + self.stopped + self.lost


@dataclass(frozen=True)
class Decision:
    """What was seen, what was wanted and what is ordered; the record `GET /decisions` shows."""

    at: float
    seen: Seen | None
    targets: Targets | None
    commands: tuple[Command, ...]
    notes: tuple[str, ...]
    clamped: tuple[str, ...] = ()  # "hot", "total": what the policy wanted was beyond the hard limits


@dataclass
class Journal:
    """What the ledger must learn since the last `take_journal`."""

    stretches: list[Stretch] = field(default_factory=list)
    fleet: dict[str, Remembered] = field(default_factory=dict)
    took: list[tuple[str, float, float]] = field(default_factory=list)
    bad_machines: dict[int, tuple[float, str]] = field(default_factory=dict)
    mourned: dict[str, tuple[float, float]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to write down; the log lines are not."""
        return bool(self.stretches or self.fleet or self.took or self.bad_machines or self.mourned)

    def before(self, later: "Journal") -> "Journal":
        """This one and a later one as one; its log lines are taken for written."""
        return Journal(
            self.stretches + later.stretches,
            self.fleet | later.fleet,
            self.took + later.took,
            self.bad_machines | later.bad_machines,
            self.mourned | later.mourned,
            later.log,
        )
