"""What the fleet decided and what happened to its instances, as plain data for ledger, log and operator."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fleet.commands import Command
from policies import FleetSnapshot, Targets


@dataclass(frozen=True)
class BillingInterval:
    """A time in which one instance was in one state at one price.

    usd_h: the price that is paid. running_usd_h: what the instance would cost when hot. to_s: None while the
    interval lasts.
    """

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
        """Return how many seconds of the interval lie between from_s and to_s."""
        end = to_s if self.to_s is None else min(self.to_s, to_s)
        return max(0.0, end - max(self.from_s, from_s))


@dataclass(frozen=True)
class PriceChange:
    """A price that an instance has had since a time that is over: in the ledger it is dated back."""

    label: str
    since: float
    usd_h: float


@dataclass(frozen=True)
class BytesBilled:
    """Dollars for bytes that came to or went from one instance, which every host bills at its own price.

    at_s: when that was known. of: ESTIMATED by us, or what the account's charges add to that (CHARGED).
    """

    label: str
    instance: int | None
    at_s: float
    usd: float
    gb: float | None
    of: str


ESTIMATED, CHARGED = "estimated", "charged"
"""Where the dollars of traffic are from."""


@dataclass(frozen=True)
class SavedInstance:
    """What a restarted autoscaler must know of an instance; the fields from `state` on say its last state.

    An instance that is gone has no state; it is kept when it is condemned, in case the cloud shows it again.
    looked_at: when the last process last looked at the cloud, and wrote it.
    """

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
    looked_at: float | None = None


@dataclass(frozen=True)
class SavedFleet:
    """All that a restarted autoscaler must know of its fleet.

    bad_machines: until when they are not rented, by machine_id. vanished: until when they count against the
    limits, and $/h, by label. lacking: since when the listings lack most of the fleet, and when that was last
    so. host_keys: the ssh host key that is believed of each, by label. start_times_s, load_times_s: the last
    times to hot, oldest first. credit_gone: the account had no credit. used_up: the budgets that were used up
    (fleet/budget.py).
    """

    instances: Sequence[SavedInstance] = ()
    bad_machines: Mapping[int, float] = field(default_factory=dict)
    vanished: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    start_times_s: Sequence[float] = ()
    load_times_s: Sequence[float] = ()
    lacking: tuple[float | None, float] = (None, float("-inf"))
    host_keys: Mapping[str, str] = field(default_factory=dict)
    credit_gone: bool = False
    used_up: Sequence[str] = ()


@dataclass(frozen=True)
class Decision:
    """What one turn saw, wanted and ordered; the record that `GET /decisions` shows.

    clamped: "hot", "total", where the policy wanted more than the hard limits allow, or less than none.
    """

    at: float
    seen: FleetSnapshot | None
    targets: Targets | None
    commands: tuple[Command, ...]
    notes: tuple[str, ...]
    clamped: tuple[str, ...] = ()


def remember(decisions: deque[Decision], decision: Decision) -> None:
    """Append a decision to the kept ones if it orders or says something new, with the last demand only."""
    last = decisions[-1] if decisions else None
    said = (decision.targets, decision.notes)
    if decision.commands or last is None or (last.targets, last.notes) != said:
        seen = decision.seen and replace(decision.seen, demand=decision.seen.demand[-1:], arriving=())
        decisions.append(replace(decision, seen=seen))


@dataclass
class Entries:
    """What happened since the ledger was last written: rows for the ledger, and lines for the log.

    intervals: with changes of price, in the order of writing. instances: by label, as they are now.
    durations: (kind, at, seconds). bad_machines: (until, why) by machine_id. vanished: (until, $/h) by label.
    lacking: as in SavedFleet. host_keys: by label. traffic: dollars for bytes.
    """

    intervals: list[BillingInterval | PriceChange] = field(default_factory=list)
    instances: dict[str, SavedInstance] = field(default_factory=dict)
    durations: list[tuple[str, float, float]] = field(default_factory=list)
    bad_machines: dict[int, tuple[float, str]] = field(default_factory=dict)
    vanished: dict[str, tuple[float, float]] = field(default_factory=dict)
    host_keys: dict[str, str] = field(default_factory=dict)
    lacking: tuple[float | None, float] | None = None
    lines: list[str] = field(default_factory=list)
    traffic: list[BytesBilled] = field(default_factory=list)

    def note_lacking(self, since: float | None, now: float) -> None:
        """Note since when the listings lack most of the fleet; None: they do not."""
        self.lacking = since, now

    def __bool__(self) -> bool:
        """Return whether there is anything to write into the ledger."""
        rows = (self.intervals, self.instances, self.durations, self.bad_machines, self.vanished)
        return any(rows) or bool(self.host_keys or self.traffic) or self.lacking is not None


class Journal:
    """Collects what happens to the fleet until the ledger has it."""

    def __init__(self) -> None:
        """Begin without entries."""
        self._entries = Entries()
        self._lacked = False

    def log(self, line: str) -> None:
        """Add a line to what is to be logged."""
        self._entries.lines.append(line)

    def open_interval(self, interval: BillingInterval) -> None:
        """Add a billing interval that begins now; it ends the one before of the same instance."""
        self._entries.intervals.append(interval)

    def change_price(self, label: str, since: float, usd_h: float) -> None:
        """Add a price that an instance has had since then, whatever state it was in."""
        self._entries.intervals.append(PriceChange(label, since, usd_h))

    def save(self, instance: SavedInstance) -> None:
        """Add what a restarted autoscaler must know of an instance."""
        self._entries.instances[instance.label] = instance

    def add_duration(self, kind: str, since: float, now: float) -> None:
        """Add how long something took, from since to now; the kinds are those of `Ledger.write`."""
        self._entries.durations.append((kind, now, now - since))

    def add_bad_machine(self, machine_id: int, until: float, why: str) -> None:
        """Add a machine that is not to be rented until that time."""
        self._entries.bad_machines[machine_id] = (until, why)

    def add_download(self, label: str, instance: int | None, gb: float, usd: float, now: float) -> None:
        """Add what a new instance's download costs, by estimate, if it costs anything."""
        if usd > 0.0:
            self._entries.traffic.append(BytesBilled(label, instance, now, usd, gb, ESTIMATED))

    def add_vanished(self, label: str, until: float, usd_h: float) -> None:
        """Add an instance that the cloud does not list any more; it counts against the limits until then."""
        self._entries.vanished[label] = (until, usd_h)

    def add_host_key(self, label: str, key: str) -> None:
        """Add the ssh host key that is believed of an instance."""
        self._entries.host_keys[label] = key

    def note_lacking(self, since: float | None, now: float) -> None:
        """Note since when the listings lack most of the fleet, while they do; None: they do not."""
        if since is not None or self._lacked:
            self._entries.note_lacking(since, now)
        self._lacked = since is not None

    def take(self) -> Entries:
        """Return the entries that were added since the last call, and begin with none."""
        taken, self._entries = self._entries, Entries()
        return taken

    def put_back(self, taken: Entries) -> None:
        """Put back entries that the ledger could not take, before the present ones.

        Their log lines are left out, because they have been logged.
        """
        later = self._entries
        self._entries = Entries(
            taken.intervals + later.intervals,
            taken.instances | later.instances,
            taken.durations + later.durations,
            taken.bad_machines | later.bad_machines,
            taken.vanished | later.vanished,
            taken.host_keys | later.host_keys,
            later.lacking or taken.lacking,
            later.lines,
            taken.traffic + later.traffic,
        )
