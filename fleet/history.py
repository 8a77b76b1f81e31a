"""The fleet over time, as the operator's page draws it: one sample a turn, the older ones thinned.

    turn ─► note ─┬─► the last MEMORY samples, each turn
                  └─► one every SAVED_EVERY_S for the ledger, so that a restart keeps the picture

Pure: its methods take now, in seconds.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from fleet.answer_window import SHARES, AnswerQuantiles
from fleet.demand import Demand
from fleet.instance import Instance
from fleet.journal import Decision
from fleet.limits import Limits

MEMORY = 3600
"""Samples kept in memory: five hours of turns that come every five seconds."""

SAVED_EVERY_S = 15.0
"""Least seconds between two samples that are written down: 5,760 a day, half a megabyte."""

OFFERED_OVER_S, OFFERED_LEAST_S = 60.0, 10.0
"""Seconds over which arriving work is averaged: shorter, and a few long requests look like a burst. The first
is divided by a local cloud's speed-up, down to the second, since requests take their real time there."""


class Fleet(Protocol):
    """The protocol of an InstanceSet, as far as samples are taken of it."""

    limits: Limits

    def __iter__(self) -> Iterator[Instance]:
        """Iterate over the instances of the fleet."""
        ...

    def __len__(self) -> int:
        """Return the number of instances."""
        ...


@dataclass(frozen=True)
class FleetSample:
    """The fleet and its load at one moment; instances are counted by where they are in their life.

    at_s: on the autoscaler's clock. booting: on their way to hot. lost: failed, or being destroyed.
    wanted_hot, wanted_total: what the policy asked for, inside the limits. offered: arriving work, in
    instances' worth of capacity, without what waits. busy: the same of what is being served. held: requests
    that wait; oldest_wait_s: the longest of them so far. arrived, late: requests since the start of this
    process, and how many of them could not be in time. usd_h: what all instances cost now. answers,
    answers_late: of the last minute, by what clients told; first_, token_, whole_: percentiles of theirs in
    seconds (fleet/answer_window.py), None without answers. held_high, held_normal, held_low: of held.
    """

    at_s: float
    hot: int
    draining: int
    booting: int
    cold: int
    lost: int
    wanted_hot: int
    wanted_total: int
    offered: float
    busy: float
    held: int
    oldest_wait_s: float
    arrived: int
    late: int
    usd_h: float
    answers: int = 0
    answers_late: int = 0
    first_p50: float | None = None
    first_p95: float | None = None
    first_p99: float | None = None
    token_p50: float | None = None
    token_p95: float | None = None
    token_p99: float | None = None
    whole_p50: float | None = None
    whole_p95: float | None = None
    whole_p99: float | None = None
    held_high: int = 0
    held_normal: int = 0
    held_low: int = 0


NAMES = tuple(f.name for f in fields(FleetSample))
"""Names of the columns, in the ledger and in `GET /history`."""

HELD_BY = ("held_high", "held_normal", "held_low")

_PEAKS = frozenset({"held", "oldest_wait_s", "lost", "arrived", "late", *HELD_BY})
"""Of several samples drawn as one point the largest is shown: a mean would hide a short wait."""


class History:
    """The samples of the fleet that this process has taken."""

    def __init__(self, speedup: float = 1.0) -> None:
        """Begin without samples. speedup: of a local cloud, whose fleet follows the load so much faster."""
        self._offered_over_s = max(OFFERED_LEAST_S, OFFERED_OVER_S / speedup)
        self._samples: deque[FleetSample] = deque(maxlen=MEMORY)
        self._unsaved: list[FleetSample] = []
        self._saved_at = float("-inf")
        self._work: deque[tuple[float, float]] = deque()  # (when, work that had arrived by then)

    def note(self, sample: FleetSample | None) -> None:
        """Add a sample of the fleet, which is newer than all others; None changes nothing."""
        if sample is None:
            return
        self._samples.append(sample)
        if sample.at_s - self._saved_at >= SAVED_EVERY_S:
            self._saved_at = sample.at_s
            self._unsaved.append(sample)

    def offered(self, work_total: float, work_s: float | None, now: float) -> float:
        """Return the work that arrives, in instances' worth of capacity; call it once a turn.

        work_total: work arrived since the start. work_s: what one instance does in a second, None if not
        known.
        """
        self._work.append((now, work_total))
        while len(self._work) > 2 and self._work[1][0] <= now - self._offered_over_s:
            self._work.popleft()
        at, before = self._work[0]
        if not work_s or now <= at:
            return 0.0
        return max(0.0, work_total - before) / (now - at) / work_s

    @property
    def begins_at(self) -> float:
        """When the oldest sample in memory was taken; infinity while there is none."""
        return self._samples[0].at_s if self._samples else float("inf")

    def since(self, from_s: float) -> list[FleetSample]:
        """Return the samples in memory from that time on, oldest first."""
        found = list(self._samples)
        return found[bisect_left(found, from_s, key=lambda s: s.at_s) :]

    @property
    def latest(self) -> FleetSample | None:
        """The newest sample of the fleet, or None."""
        return self._samples[-1] if self._samples else None

    def share_in_time(self, over_s: float, now: float) -> float | None:
        """Return which share of the requests of the last over_s seconds could be in time; None: none came."""
        found = self.since(now - over_s)
        if len(found) < 2:
            return None
        arrived, late = found[-1].arrived - found[0].arrived, found[-1].late - found[0].late
        return None if arrived <= 0 else max(0.0, 1.0 - late / arrived)

    def take_unsaved(self) -> list[FleetSample]:
        """Return the samples that the ledger is to keep of those added since the last call."""
        taken, self._unsaved = self._unsaved, []
        return taken

    def put_back(self, samples: Iterable[FleetSample]) -> None:
        """Keep samples that could not be written, for the next `take_unsaved`."""
        self._unsaved = [*samples, *self._unsaved][-MEMORY:]


def take_sample(decision: Decision, fleet: Fleet, demand: Demand, history: History) -> FleetSample | None:
    """Return a sample of the fleet after a turn; None where the turn decided nothing, as nothing is known."""
    seen, targets = decision.seen, decision.targets
    if seen is None or targets is None:
        return None
    traffic, most = seen.traffic, fleet.limits.max_instances
    work_s = seen.capacity.work_s if seen.capacity is not None else None
    return FleetSample(
        at_s=decision.at,
        hot=seen.hot,
        draining=seen.draining,
        booting=seen.coming + seen.loading,
        cold=seen.cold,
        lost=len(fleet) - seen.total,
        wanted_hot=max(0, min(targets.hot, most)),
        wanted_total=max(0, min(targets.total, most)),
        offered=round(history.offered(traffic.work_total, work_s, decision.at), 4),
        busy=round(demand.busy, 4),
        held=int(traffic.held),
        oldest_wait_s=round(traffic.oldest_wait_s, 3),
        arrived=demand.arrivals,
        late=demand.turned_late,
        usd_h=round(sum(i.price_usd_h for i in fleet), 6),
        **_answers(demand.answers.lately(decision.at)),
        **dict(zip(HELD_BY, demand.held_by_priority, strict=True)),
    )


def _answers(lately: AnswerQuantiles) -> dict[str, Any]:
    found: dict[str, Any] = {"answers": lately.answers, "answers_late": lately.late}
    for name, seconds in (("first", lately.first_token), ("token", lately.token), ("whole", lately.whole)):
        found |= {f"{name}_p{round(share * 100)}": s for share, s in zip(SHARES, seconds, strict=True)}
    return found


def columns(samples: Sequence[FleetSample], points: int) -> dict[str, list[float | None]]:
    """Return samples as lists by field, of at most `points` values, evenly over the time of the samples."""
    if not samples:
        return {name: [] for name in NAMES}
    begin = samples[0].at_s
    width = max((samples[-1].at_s - begin) / points, 1e-9)
    groups: dict[int, list[FleetSample]] = {}
    for sample in samples:
        groups.setdefault(min(points - 1, int((sample.at_s - begin) / width)), []).append(sample)
    return {name: [_drawn(group, name) for group in groups.values()] for name in NAMES}


def joined(samples: Sequence[FleetSample]) -> FleetSample:
    """Return neighbouring samples as one, as a picture shows them: means, and the peaks of what is short."""
    return FleetSample(**{name: _drawn(samples, name) for name in NAMES})  # type: ignore[arg-type]


def _drawn(group: Sequence[FleetSample], name: str) -> float | None:
    values = [float(value) for sample in group if (value := getattr(sample, name)) is not None]
    if not values:
        return None
    if name == "at_s":
        return values[-1]
    is_peak = name in _PEAKS or name.endswith(("_p95", "_p99"))
    return max(values) if is_peak else round(sum(values) / len(values), 4)
