"""The decision: which commands bring the fleet to what the policy wants.

    Situation ─► policy.targets(snapshot) ─► clamped to the hard limits ─► commands
                                                │
                  1. what follows from earlier orders: repeated, drains that ended, failed ones destroyed
                  2. hot:   take drains back, start cold ones  |  stop what is coming, drain the dearest
                  3. total: rent the cheapest for its work     |  destroy stopped ones, the dearest first

`decide` is a pure function of a Situation, which is plain data: a pickled one replays the decision.

- Every order that costs more passes `LimitGuard` (fleet/limits.py); none is made against a hold
  (fleet/holds.py).
- While the credit is gone, or may be, nothing is ended: what was stopped is started again when it is back.
- Where a contract ends, another instance takes the place before (fleet/contract_ends.py).
- Once a budget is used up, what is hot is drained, whatever the policy wants.
- Nothing with requests is stopped here before its drain has ended (fleet/drain.py).
- On a listing that is not believed nothing is decided; only own pages are asked for.
- While the ledger cannot be written, only what is drained is stopped: that need not be written down first.
- Until demand has been heard of, a fleet that was found hot stays hot.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from fleet.blame import host_of
from fleet.commands import (
    AskPage,
    Command,
    Create,
    Destroy,
    Drain,
    LookForOffers,
    Start,
    Stop,
    Undrain,
)
from fleet.contract_ends import Horizon, ends_said
from fleet.deadlines import Deadlines
from fleet.drain import drain_order, end_of_drain
from fleet.holds import Hold
from fleet.instance import Instance
from fleet.journal import Decision
from fleet.limits import Commitment, LimitGuard, Limits
from fleet.market import MarketSnapshot
from fleet.preferences import ANY_MACHINE, Preferences
from fleet.purse import Purse
from fleet.slowness import STOP_AFTER_S
from fleet.states import GIVEN_UP, State
from policies import FleetSnapshot, Policy

NOT_WRITABLE = "the ledger cannot be written: only what is drained is stopped"
NOT_HEARD = "no loadbalancer has been heard for long enough: nothing is taken out of service"

MOST_PAGES = 3
"""Own pages that are asked for in one turn: each is a call of the CLI, two seconds from the next."""

NOT_BELIEVED = "the listing failed or is not believed: nothing decided"


@dataclass(frozen=True)
class Situation:
    """All that a decision depends on. The instances are the live ones: they are read, never written.

    believed: the listing is. drained: labels of the instances whose drain has ended. manage: whether anything
    new may be ordered. writable: the ledger is. heard: the demand is known. holds: why some orders
    are not made now. preferences: which machines are wanted. purse: what budgets and credit allow.
    horizon: how far ahead contracts' ends matter.
    """

    now: float
    believed: bool
    snapshot: FleetSnapshot
    instances: Collection[Instance]
    drained: frozenset[str]
    market: MarketSnapshot
    committed: Commitment
    limits: Limits
    deadlines: Deadlines
    manage: bool
    writable: bool = True
    heard: bool = True
    holds: tuple[Hold, ...] = ()
    preferences: Preferences = ANY_MACHINE
    purse: Purse = field(default_factory=Purse)
    horizon: Horizon = field(default_factory=Horizon)


def decide(situation: Situation, policy: Policy) -> Decision:
    """Return what to ask of the cloud so that the fleet's capacity meets demand; change nothing."""
    if not situation.believed:
        return Decision(situation.now, None, None, tuple(_pages(situation)), (NOT_BELIEVED,))
    return Planner(situation).decide(policy)


def _pages(situation: Situation) -> Iterator[AskPage]:
    """Yield orders to ask the cloud for its pages of single instances that the listings lack.

    At most MOST_PAGES, those first that were not asked for longest.
    """
    repeat_s, now = situation.deadlines.repeat_s, situation.now
    due = [i for i in situation.instances if i.id is not None and i.absence.page_due(repeat_s, now)]
    for i in sorted(due, key=lambda i: (i.absence.asked_at, i.label))[:MOST_PAGES]:
        if i.id is not None and not (i.state is State.DESTROYING and i.orders.destroyed):
            yield AskPage(i.label, i.id, f"{i.absence.turns} listings in a row lack it")


NOT_NOW = GIVEN_UP | {State.STOPPING}
"""States in which a retired instance is left alone: it ends already, or its stop does first."""


class Planner:
    """Puts one decision together, from a situation and a policy."""

    def __init__(self, situation: Situation) -> None:
        """Begin a decision in that situation, without commands."""
        self._situation = situation
        self._now, self._deadlines = situation.now, situation.deadlines
        self._by_state: dict[State, list[Instance]] = {state: [] for state in State}
        self._slow: list[Instance] = []  # hot, and held back: another is to serve instead
        self._ending: list[Instance] = []  # their contracts end: others are to take their places
        for i in situation.instances:
            if i.taken_out.for_good:
                continue  # it is on its way out, and another is to take its place
            if i.state not in GIVEN_UP and situation.horizon.is_ending(i, situation.now):
                self._ending.append(i)
                continue
            slow = i.state is State.HOT and i.trouble.slow.clients is not None
            (self._slow if slow else self._by_state[i.state]).append(i)
        self._notes: list[str] = []
        self._clamped: list[str] = []
        self._commands: list[Command] = []
        self._evidence = ""
        self._guard = LimitGuard(situation.limits, situation.committed, self._notes, situation.purse)

    def decide(self, policy: Policy) -> Decision:
        """Return the decision that brings the fleet to what the policy wants."""
        snapshot = self._situation.snapshot
        targets = policy.targets(snapshot)
        hot = self._clamp("hot", targets.hot)
        total = max(hot, self._clamp("total", targets.total))
        if not self._situation.writable:
            self._commands += (c for c in self._follow_up() if isinstance(c, Stop))
            self._commands += self._pages()
            self._notes.append(NOT_WRITABLE)
            return Decision(self._now, snapshot, targets, tuple(self._commands), tuple(self._notes))
        self._commands += self._follow_up()
        if self._situation.manage:
            self._evidence = _evidence(snapshot, hot, total)
            if self._situation.purse.used_up is not None:
                self._drain_all(self._situation.purse.used_up)
            else:
                self._reach_hot(hot)
                self._resume()
            self._leave(hot, total)
            self._reach_total(total)
        self._commands += self._pages()
        return Decision(
            self._now, snapshot, targets, tuple(self._commands), tuple(self._notes), tuple(self._clamped)
        )

    def _pages(self) -> list[AskPage]:
        """Return requests for own pages, but not of instances about which something else is ordered."""
        ordered = {c.label for c in self._commands if not isinstance(c, LookForOffers)}
        return [page for page in _pages(self._situation) if page.label not in ordered]

    def _clamp(self, what: str, wanted: int) -> int:
        """Return the wanted number of instances inside 0 … max_instances; note where it was outside."""
        kept = max(0, min(wanted, self._situation.limits.max_instances))
        if kept != wanted:
            self._clamped.append(what)
            self._notes.append(f"the policy wanted {wanted} {what}: clamped to {kept}")
        return kept

    # -- 1. what follows from earlier orders -----------------------------------------------------------

    def _follow_up(self) -> Iterator[Command]:
        """Yield the orders that follow from earlier ones, whatever the policy says."""
        repeat_s = self._deadlines.repeat_s
        for i in self._situation.instances:
            if i.id is None:
                continue
            if i.state is State.FAILED and self._situation.manage:
                yield Destroy(i.label, i.id, i.why, f"broken: {i.evidence or i.why}")
            elif i.is_of_no_use and self._may_end and self._now - i.since >= repeat_s:
                stopped_s = self._now - i.since
                evidence = f"the listing shows it stopped for {stopped_s:.0f} s, with nothing on its disk"
                yield Destroy(i.label, i.id, i.why, evidence)
            elif i.state is State.DESTROYING and i.orders.unheeded(repeat_s, self._now):
                yield Destroy(i.label, i.id, "still listed", f"asked for before: {i.why}")
            elif i.state is State.STOPPING and i.orders.unheeded(repeat_s, self._now):
                yield Stop(i.label, i.id, "not stopped yet")
            elif i.state is State.DRAINING:
                drained = i.label in self._situation.drained
                if stop := end_of_drain(i, i.id, drained, self._deadlines, self._now):
                    yield Destroy(i.label, i.id, stop.why, i.evidence) if i.taken_out.for_good else stop
            elif i.state is State.HOT and i.taken_out:
                yield Drain(i.label, i.id, "a person takes it out of service")
            elif i.taken_out.for_good and i.state not in NOT_NOW:
                yield Destroy(i.label, i.id, "another takes its place", i.evidence)

    # -- 2. hot ----------------------------------------------------------------------------------------

    def _reach_hot(self, wanted: int) -> None:
        running = self._by_state[State.RUNNING]
        coming = [*self._by_state[State.STARTING], *(i for i in running if i.is_coming)]
        missing = wanted - len(self._by_state[State.HOT]) - len(coming)
        if missing > 0:
            self._start(self._undrain(missing))
        elif not self._situation.heard:
            if missing:
                self._notes.append(NOT_HEARD)
        else:
            self._drain(self._cancel(-missing, coming))
        self._replace_slow(wanted)
        stopped = self._labels(Stop)
        for i in self._by_state[State.STARTING]:
            lost = i.intended == "stopped" and i.orders.unheeded(self._deadlines.repeat_s, self._now)
            lost = lost and not self._situation.purse.spares
            if lost and i.id is not None and i.label not in stopped:
                why = "the cloud does not mean it to run: asked again"
                self._commands.append(Start(i.label, i.id, why))

    @property
    def _may_end(self) -> bool:
        """Whether stopped instances may be destroyed: not for what the missing credit may have done."""
        return self._situation.manage and not self._situation.purse.spares

    def _drain_all(self, why: str) -> None:
        """Take all out of service, because a budget is used up; what loads goes on, as it was admitted."""
        coming = [i for i in (*self._by_state[State.STARTING], *self._by_state[State.RUNNING]) if i.is_coming]
        self._cancel(len(coming), coming)
        for i in (*self._by_state[State.HOT], *self._slow, *self._ending):
            if i.id is not None and i.state is State.HOT:
                self._commands.append(Drain(i.label, i.id, why))
        self._notes += (hold.note for hold in self._situation.holds if hold.stops_starts)

    def _resume(self) -> None:
        """Start again what the missing credit stopped before its model was loaded."""
        if any(hold.stops_starts for hold in self._situation.holds) or self._situation.purse.spares:
            return
        for i in self._by_state[State.COLD]:
            ready = i.boot.interrupted and not i.orders.out and self._now >= i.boot.no_start_before
            if ready and i.id is not None and self._guard.admit_start(i.running_usd_h - i.stopped_usd_h):
                self._commands.append(Start(i.label, i.id, "there is credit again: it goes on loading"))

    def _leave(self, hot: int, total: int) -> None:
        """Take instances out of the fleet whose contracts end, once others serve and hold the model."""
        there = [i for s, found in self._by_state.items() if s not in GIVEN_UP for i in found]
        hot_enough = len(self._by_state[State.HOT]) >= hot
        loaded_enough = sum(i.loaded for i in there) >= total
        drained = self._labels(Drain)
        for i in self._ending:
            self._notes.append(f"replaced in time: {ends_said(i)}")
            must = self._situation.horizon.must_leave(i, self._now)
            if i.id is None or i.label in drained:
                continue
            if i.state is State.HOT and (hot_enough or must):
                self._commands.append(Drain(i.label, i.id, ends_said(i)))
            elif must and i.is_coming and i.loaded and not i.boot.maybe_busy:
                self._commands.append(Stop(i.label, i.id, ends_said(i)))
            elif i.state is State.COLD and self._may_end and (loaded_enough or must):
                self._commands.append(Destroy(i.label, i.id, ends_said(i), self._evidence))
            elif not i.loaded and i.state in (State.LOADING, State.RUNNING) and self._may_end:
                self._commands.append(Destroy(i.label, i.id, ends_said(i), "it would not be of use any more"))

    def _replace_slow(self, wanted: int) -> None:
        """Drain machines that clients find slow, once enough others serve; they are not given up for that."""
        enough = self._situation.heard and len(self._by_state[State.HOT]) >= max(1, wanted)
        for i in self._slow:
            slow = i.trouble.slow
            self._notes.append(f"{i.id} is slow, and does not count as hot: {slow.clients}")
            if enough and i.id is not None and not i.taken_out and self._now - slow.since >= STOP_AFTER_S:
                self._commands.append(Drain(i.label, i.id, f"slow, and others serve: {slow.clients}"))

    def _undrain(self, missing: int) -> int:
        """Take draining instances back, the cheapest first; return how many are still missing."""
        stopped = self._labels(Stop)
        for i in sorted(self._by_state[State.DRAINING], key=_cheapest_first):
            if missing > 0 and i.id is not None and i.label not in stopped and not i.taken_out:
                self._commands.append(Undrain(i.label, i.id, "needed again"))
                missing -= 1
        return missing

    def _start(self, missing: int) -> None:
        """Start as many cold instances as are missing, in order of fewest failed starts, then of price."""
        if missing > 0 and self._held(h for h in self._situation.holds if h.stops_starts):
            return
        for i in sorted(self._by_state[State.COLD], key=_likeliest_first):
            if missing <= 0:
                break
            # An earlier order that is still to be sent would follow the start.
            if (
                i.is_of_no_use
                or i.boot.interrupted
                or i.id is None
                or i.orders.out
                or self._now < i.boot.no_start_before
                or i.lost_since is not None
            ):
                continue
            if i.odd is not None and not i.running_usd_h:
                continue  # nobody knows what it would cost
            if self._guard.admit_start(i.running_usd_h - i.stopped_usd_h):
                self._commands.append(Start(i.label, i.id, f"{missing} more wanted hot"))
                missing -= 1

    def _cancel(self, surplus: int, coming: list[Instance]) -> int:
        """Stop instances that are still coming, the newest first; return how many are still too many."""
        for i in sorted(coming, key=lambda i: -i.since):
            if surplus > 0 and i.id is not None and not i.boot.maybe_busy:
                self._commands.append(Stop(i.label, i.id, "no longer needed"))
                surplus -= 1
        return surplus

    def _drain(self, surplus: int) -> None:
        for i in drain_order(self._by_state[State.HOT]):
            if surplus > 0 and i.id is not None:
                why = "not needed; the worst price for its throughput"
                self._commands.append(Drain(i.label, i.id, why))
                surplus -= 1

    # -- 3. total --------------------------------------------------------------------------------------

    def _reach_total(self, wanted: int) -> None:
        there = sum(len(found) for s, found in self._by_state.items() if s not in GIVEN_UP)
        missing = wanted - there - len(self._slow)
        if missing > 0:
            self._create(missing, wanted)
        elif missing < 0 and self._may_end:
            started = self._labels(Start)
            spare = [i for i in self._by_state[State.COLD] if i.label not in started and not i.is_of_no_use]
            spare.sort(key=lambda i: (i.loaded, -i.usd_per_work, i.label))
            for i in spare[:-missing]:
                if i.id is not None:
                    why = "more stopped instances than wanted"
                    self._commands.append(Destroy(i.label, i.id, why, self._evidence))

    def _create(self, missing: int, wanted: int) -> None:
        """Rent the offers that are cheapest for their work; search the market first if they are too old.

        wanted: instances in all.
        """
        holds = self._situation.holds
        if self._held(holds) and (self._first_on_way or any(self._now < h.trial_at for h in holds)):
            return
        market, why = self._situation.market, f"{missing} more wanted in all"
        if holds:
            missing, why = 1, "to see whether others fail in the same way, or it is over"
        if self._situation.purse.spares:
            self._notes.append("machines were stopped unasked: nothing is rented before the credit is known")
        elif market.resting:
            self._notes.append(f"{market.failed_creates} creates in a row failed: none for a while")
        elif market.fresh:
            most_at_host = self._situation.preferences.most_at_host(wanted)
            self._take_offers(min(missing, self._situation.limits.max_creates_per_turn), most_at_host, why)
        elif market.searching:
            self._notes.append("looking at the market")
        else:
            self._commands.append(LookForOffers(why))

    @property
    def _first_on_way(self) -> bool:
        """Whether there is an instance that has not been hot and may still become so."""
        states = (State.ORDERED, State.LOADING, State.RUNNING)
        return any(not i.loaded for state in states for i in self._by_state[state])

    def _held(self, holds: Iterable[Hold]) -> bool:
        """Return whether there are such holds, and note each of them once."""
        notes = [hold.note for hold in holds]
        self._notes += [note for note in notes if note not in self._notes]
        return bool(notes)

    def _take_offers(self, most: int, most_at_host: int | None, why: str) -> None:
        avoided = {
            i.machine_id for i in self._situation.instances if i.taken_out.for_good or i.state is State.FAILED
        }
        said_so = {host for hold in self._situation.holds for host in hold.not_at}
        others = [offer for offer in self._situation.market.offers if host_of(offer) not in said_so]
        taken: set[int] = set()
        short = 0
        full: set[int | None] = set()  # hosts that have their share of the fleet
        for offer in others or self._situation.market.offers:
            if len(taken) >= most:
                break
            if offer.machine_id in avoided or offer.id in taken:
                continue
            if self._situation.horizon.is_too_short(offer):
                short += 1
            elif not self._guard.has_room_at(offer.host_id, most_at_host):
                full.add(offer.host_id)
            elif self._guard.admit_create(offer):
                self._commands.append(Create(offer, why, evidence=self._evidence))
                taken.add(offer.id)
        if not taken and (not self._notes or self._situation.holds):
            refused = [*self._situation.market.refused]
            if short:
                refused.append(f"the contracts of {short} end too soon")
            if full:
                refused.append(f"{len(full)} hosts have their share, {most_at_host} instances")
            why_not = f" ({', '.join(refused)})" if refused else ""
            self._notes.append(f"no suitable offer on the market{why_not}")

    def _labels(self, kind: type[Start] | type[Stop] | type[Drain]) -> set[str]:
        """Return the labels of the instances that the commands so far start, stop or drain."""
        return {c.label for c in self._commands if isinstance(c, kind)}


def _evidence(seen: FleetSnapshot, hot: int, total: int) -> str:
    """Return a sentence on what an order to rent or destroy follows from: demand, targets, the fleet."""
    demand = seen.demand[-1][1] if seen.demand else 0.0
    return (
        f"demand {demand:.2f}, wanted {hot} hot and {total} in all; there are {seen.hot} hot, "
        f"{seen.coming} coming, {seen.loading} loading, {seen.cold} cold, {seen.draining} draining"
    )


def _cheapest_first(i: Instance) -> tuple[float, str]:
    return i.usd_per_work, i.label


def _likeliest_first(i: Instance) -> tuple[int, float, str]:
    """Return what cold instances are sorted by: failed starts since last hot and slow boots, then price."""
    failed = i.boot.failed_starts + i.boot.refused_starts + i.trouble.slow.times
    return failed, i.usd_per_work, i.label
