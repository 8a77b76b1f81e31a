"""Holds: the reasons for which nothing is rented, or nothing started either, although the policy wants more.

    who finds the reason ─► holds.set(kind, sentence, now) ─┬─► the planner: no Create (no Start), and a note
                                                            └─► health, decisions, overview, metrics, alarms
    the same one, later  ─► holds.clear(kind)

- A kind belongs to one part of the program: only that part sets and clears it. Set again, it keeps its
  `since`.
- A hold stops only what costs more. Stops, drains and destroys go on, and so does what was begun.
- Holds are not saved: their owner knows its reason again soon after a restart (the credit, the ledger's
  sums), or a restart is a way to end it (a fault of the deployment, after it was mended).
- The sentence ends with what the operator can do, and changes seldom: each change is a new decision in
  `GET /decisions`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum


class HoldKind(StrEnum):
    """What is in the way; the same words are in routes and metrics."""

    DEPLOYMENT = "deployment"  # model, image or arguments: each machine would fail in the same way
    REFUSED = "refused"  # the cloud refuses orders of this account or API key
    NO_CREDIT = "no-credit"
    CREDIT_LOW = "credit-low"
    SPEND_LIMIT = "spend-limit"  # the cloud's own limit on what a new account may spend an hour
    BUDGET_DAY = "budget-day"
    BUDGET_MONTH = "budget-month"


class HeldOrders(StrEnum):
    """Which orders a hold stops."""

    CREATES = "creates"
    CREATES_AND_STARTS = "creates and starts"


@dataclass(frozen=True)
class Hold:
    """One reason, in force since then (epoch seconds).

    sentence: for the operator, with what to do. held: which orders it stops. ends: how it comes to an end.
    trial_at: from then on one machine may be rented to see whether it is over (never, if not given); not_at:
    hosts that it is not to be rented from while there are others.
    """

    kind: HoldKind
    sentence: str
    since: float
    held: HeldOrders = HeldOrders.CREATES
    ends: str = ""
    trial_at: float = float("inf")
    not_at: frozenset[int] = frozenset()

    @property
    def stops_starts(self) -> bool:
        """Whether stopped instances are not started either."""
        return self.held is HeldOrders.CREATES_AND_STARTS

    def shown(self) -> dict[str, str | float]:
        """Return the hold as JSON for people and programs."""
        shown = asdict(self)
        del shown["trial_at"], shown["not_at"]
        return shown

    @property
    def note(self) -> str:
        """The hold as a note of a decision."""
        return f"{self.held} are held ({self.kind}): {self.sentence}"


class Holds:
    """The holds of one fleet, one of a kind. Any thread may read; writers hold the autoscaler's lock."""

    def __init__(self, log: Callable[[str], None] = lambda _: None) -> None:
        """Begin without any. log: takes a line when a hold begins, changes what it stops, or ends."""
        self._holds: tuple[Hold, ...] = ()
        self._log = log

    def set(
        self,
        kind: HoldKind,
        sentence: str,
        now: float,
        held: HeldOrders = HeldOrders.CREATES,
        ends: str = "",
        trial_at: float = float("inf"),
        not_at: frozenset[int] = frozenset(),
    ) -> None:
        """Hold orders back for that reason, or go on to do so with another sentence."""
        before = self.of(kind)
        since = now if before is None else before.since
        hold = Hold(kind, sentence, since, held, ends, trial_at, not_at)
        if before is None or before.held is not held:
            self._log(hold.note)
        self._holds = (*(h for h in self._holds if h.kind is not kind), hold)

    def postpone(self, kind: HoldKind, trial_at: float) -> None:
        """Let no machine be tried before that time while the hold of that kind is in force."""
        self._holds = tuple(replace(h, trial_at=trial_at) if h.kind is kind else h for h in self._holds)

    def clear(self, kind: HoldKind) -> bool:
        """End the hold of that kind; return whether there was one."""
        before = self.of(kind)
        if before is not None:
            self._log(f"no longer held: {before.held} ({kind})")
            self._holds = tuple(h for h in self._holds if h.kind is not kind)
        return before is not None

    def of(self, kind: HoldKind) -> Hold | None:
        """Return the hold of that kind; None without one."""
        return next((h for h in self._holds if h.kind is kind), None)

    def __iter__(self) -> Iterator[Hold]:
        """Iterate over the holds that are in force, those in force longest first."""
        return iter(sorted(self._holds, key=lambda h: (h.since, h.kind)))

    def __len__(self) -> int:
        """Return how many holds are in force."""
        return len(self._holds)
