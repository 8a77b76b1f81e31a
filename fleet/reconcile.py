"""Reconciles what is known of each instance with what the world says: the only file that moves a state.

    observe   the listing, then the finished health checks, then the deadlines
    judge     one health check; the only place that makes an instance hot
    begin     an order was written down and is about to be sent
    finish    its reply came, or did not

Passive transitions, which copy what the world says, come before active ones.

- On a listing that is not believed (fleet/listing.py) no deadline passes.
- An instance that passes its checks exists, whatever the listing says.
- What was seen once is gone when its own page says so (fleet/commands.py: AskPage); a listing may lack rows.
- What is broken and what is only unknown is decided by fleet/evidence.py, and by nothing else.
- An instance that is given up is condemned: if its label reappears later it is destroyed.
- An order that was never seen goes on counting against the hard limits for a while: it may still bill.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.profile import Profile
from fleet.accusations import final_accusation, lost_host, no_gpu, others_well, overdue, start_limit
from fleet.blame import Blame
from fleet.commands import AskPage, Create, Destroy, Drain, Performed, Reply, Start, Stop, Undrain
from fleet.credit import Turned
from fleet.deadlines import Deadlines
from fleet.durations import MeasuredDurations
from fleet.evidence import Accusation, Circumstances, Health, Reachability, Ruling, weigh
from fleet.health_check import HealthCheck, Verdict
from fleet.instance import DOWN, UP, Instance
from fleet.instance_messages import Hearing
from fleet.journal import Journal, SavedFleet
from fleet.listing import ListingTrust, rows_by_label
from fleet.market import Market
from fleet.price_dates import ended_at, price_changes
from fleet.states import CHECKED, GIVEN_UP, SERVING, IllegalTransition, State
from fleet.unasked_stops import UnaskedStops, unasked
from process.errors import ConfigError
from vast.rows import Row
from web.messages.reports import ReadyBody

DESTROYED_TURNS = 2
"""Listings in a row that must lack an instance whose end the cloud has confirmed, before it is gone."""

GONE_KEPT = 50
"""Instances that are gone and can still be asked why."""

NOT_DONE = frozenset({Reply.REFUSED, Reply.UNSENT})
"""Replies after which it is certain that nothing happened."""

OrderToInstance = Create | Start | Stop | Destroy | Drain | Undrain | AskPage


@dataclass(eq=False, repr=False)
class InstanceBook:
    """The instances by label, and how an instance moves from state to state; each move is journaled.

    fleet_name: labels of this fleet are `<fleet_name>/<something>`. vanished: by label until when it counts
    against the limits, and $/h. hot_version: grows with each change of the hot set. _condemned: labels, also
    of instances that are gone.
    """

    fleet_name: str
    profile: Profile
    deadlines: Deadlines
    market: Market
    blame: Blame
    durations: MeasuredDurations
    journal: Journal
    stops: UnaskedStops
    download_gb: float  # billed for a new instance
    instances: dict[str, Instance] = field(default_factory=dict, init=False)
    vanished: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)
    gone: deque[Instance] = field(default_factory=lambda: deque(maxlen=GONE_KEPT), init=False)
    hot_version: int = field(default=0, init=False)
    _condemned: set[str] = field(default_factory=set, init=False)

    @property
    def _prefix(self) -> str:
        return self.fleet_name + "/"

    def _move(self, i: Instance, to: State, why: str, now: float) -> None:
        """Move an instance to another state; the only caller of `Instance.enter`."""
        before, why_before, spent_s = i.state, i.why, now - i.since
        i.enter(to, why, now)
        self.journal.log(f"{i.id or i.label} {before} -> {to}: {why} (after {spent_s:.0f} s)")
        if before in SERVING or to in SERVING:
            self.hot_version += 1
        if to is State.GONE:
            if before is State.DESTROYING:
                self.journal.add_duration("destroyed", i.orders.asked_at, now)
            i.explain(f"{why} (was {before}: {why_before})")
            self.gone.append(i)
            del self.instances[i.label]
        self._record(i, now)

    def _fail(self, i: Instance, ruling: Ruling, now: float) -> None:
        """Give an instance up on the evidence of a ruling; who is to blame is decided by fleet/blame.py."""
        if i.state in GIVEN_UP:
            return
        others = [o for o in self.instances.values() if o is not i]
        self.blame.fail(i, ruling.why, ruling.evidence, others, now)
        self._condemn(i, ruling.evidence)
        self._move(i, State.FAILED, ruling.why, now)

    def _vanish(self, i: Instance, why: str, now: float) -> None:
        """Count an instance as gone, but its price against the limits for a while: it may still bill."""
        until, usd_h = now + self.deadlines.vanished_s, max(i.price_usd_h, i.running_usd_h)
        self.vanished[i.label] = (until, usd_h)
        self.journal.add_vanished(i.label, until, usd_h)
        self._move(i, State.GONE, why, now)

    def _condemn(self, i: Instance, evidence: str = "") -> None:
        i.condemn(evidence)
        self._condemned.add(i.label)

    def _end_bill(self, i: Instance, since: float) -> None:
        if i.price_usd_h:
            self.journal.change_price(i.label, since, 0.0)
            i.end_bill()

    def record_anew(self, now: float) -> None:
        """Put all that a ledger must know into the journal: it begins anew."""
        for i in self.instances.values():
            self._record(i, now)
        for machine, until in self.market.bad_machines.items():
            self.journal.add_bad_machine(machine, until, self.market.bad_reasons.get(machine, ""))
        for label, (until, usd_h) in self.vanished.items():
            self.journal.add_vanished(label, until, usd_h)

    def _record(self, i: Instance, now: float) -> None:
        self.journal.open_interval(i.interval(now))
        self.journal.save(i.saved())


@dataclass(eq=False, repr=False)
class Judge(InstanceBook):
    """Weighs health checks and all else that speaks for or against an instance, by fleet/evidence.py."""

    def __post_init__(self) -> None:
        """Begin without a listing, and with nothing known of our own network."""
        self.listing = ListingTrust(self.deadlines.disbelief_s, self.deadlines.absent_s)
        self.reach = Reachability()

    def judge(self, check: HealthCheck, now: float) -> None:
        """Apply a health check, if it is of the present boot. The only place that makes an instance hot."""
        i = self.instances.get(check.label)
        if i is None or i.state not in CHECKED or check.started_at < i.boot.up_at:
            return
        if i.read_check(check) and i.state in SERVING:
            self.hot_version += 1
        if check.verdict is Verdict.PASSED:
            i.trouble.note_pass(check.started_at)
            if check.pace is not None:
                peers = (o.trouble.slow for o in self.instances.values() if o is not i and o.state in SERVING)
                i.trouble.slow.note_pace(check.pace, peers)
            if i.state is State.RUNNING and i.lost_since is None and i.trouble.ended_since is None:
                self._warm_up(i, now)
                self._move(i, State.HOT, check.why, now)
            return
        if i.state in SERVING:
            self._move(i, State.RUNNING, check.why, now)
        else:
            i.explain(check.why)
        i.trouble.note_trouble(check.started_at, now, met=check.met)
        if check.stalled:
            i.trouble.slow.note_stall(check.started_at)
        if check.verdict is Verdict.FATAL:
            i.trouble.accuse(check.why)
        if self.listing.believed and not self.stops.credit.spares(now):
            self._accuse(i, final_accusation(i, self.deadlines, now), now)

    # -- what speaks against it ------------------------------------------------------------------------

    def _accuse(self, i: Instance, accusation: Accusation | None, now: float) -> None:
        """Give an instance up if the accusation shows that it is broken; otherwise explain or suspect it."""
        if accusation is None or i.state in GIVEN_UP:
            return
        ruling = weigh(accusation, self._circumstances(i, now))
        if ruling.health is Health.BROKEN:
            self._fail(i, ruling, now)
        elif i.state is State.RUNNING and accusation.lasts_s > accusation.deadline_s:
            # One silent machine may be broken, and another takes its place; several show our own network.
            silent = sum(o.trouble.silent_since is not None for o in self.instances.values())
            i.explain(ruling.evidence, suspected=silent == 1)

    def _circumstances(self, i: Instance, now: float) -> Circumstances:
        """Return what is known besides an accusation of that instance."""
        well, d = others_well(i, self.instances.values(), self.deadlines, now), self.deadlines
        return Circumstances(self.listing.believed, well, self.reach.at(now), d.together_s)

    def hear(self, label: str, said: ReadyBody, now: float) -> Hearing:
        """Take in a message of an instance; it makes nothing hot or failed."""
        i = self.instances.get(label)
        if i is None:
            return Hearing.HEARD
        before = i.certificate
        hearing = i.hear(said, now)
        if i.certificate != before and i.state in SERVING:
            self.hot_version += 1
        return hearing

    def wants_reach(self) -> bool:
        """Return whether our own network should be checked, because a machine does not answer."""
        return any(i.trouble.silent_since is not None for i in self.instances.values() if i.state in CHECKED)

    def _warm_up(self, i: Instance, now: float) -> None:
        """Note how long the instance took to become hot, and that its disk holds the model."""
        self.blame.note_hot(i, now)
        if not i.boot.was_hot:
            if i.boot.ordered_at is not None:
                if i.loaded:  # not one that was stopped while it loaded
                    self.journal.add_duration("boot", i.boot.ordered_at, now)
                    self.durations.add_start(now - i.boot.ordered_at)
            elif not i.loaded and not i.adopted:
                self.journal.add_duration("load", i.ordered_at, now)
                self.durations.add_load(now - i.ordered_at)
        i.warm_up()

    def _pass_deadline(self, i: Instance, now: float) -> None:
        """Act on what has lasted too long with an instance: its state, or trouble with it."""
        d = self.deadlines
        if i.lost_since is not None and i.state not in GIVEN_UP:
            if i.state in SERVING:
                self._move(i, State.RUNNING, "its host is offline", now)
            self._accuse(i, lost_host(i, d, now), now)
        elif i.state is State.STARTING:
            limit_s, overtime = start_limit(i, d)
            if (not i.orders.out or i.orders.is_stuck(now)) and now - i.orders.answered_at > limit_s:
                i.boot.miss_gpu(d.no_gpu_rest_s, now)
                self._accuse(i, no_gpu(i, d, now), now)
                if i.state is State.STARTING:
                    self._move(i, State.STOPPING, overtime, now)
        elif final := final_accusation(i, self.deadlines, now):
            self._accuse(i, final, now)
        elif late := overdue(i, d, now):
            if i.state is State.ORDERED and i.id is None:
                self._condemn(i)
                self._vanish(i, "its order was never seen", now)
            else:
                self._accuse(i, late, now)

    def excuse(self, now: float) -> None:
        """Let no deadline pass for a while, because for some time the fault was our own."""
        for i in self.instances.values():
            i.spare_until(now + self.deadlines.patience_s)


@dataclass(eq=False, repr=False)
class Reconciler(Judge):
    """Copies what the world says of the instances, and notes what was ordered of them."""

    _observed_at: float = field(default=float("inf"), init=False)
    _gap_s: float = field(default=0.0, init=False)  # between the last two looks

    def restore(self, saved: SavedFleet, now: float) -> None:
        """Take over the fleet that the last process saved; instances that were hot have to be verified.

        Labels of another fleet are left alone: a state directory may have served two.
        """
        self.vanished.update(saved.vanished)
        lacking_since, seen_at = saved.lacking
        if 0.0 <= now - seen_at <= self.deadlines.disbelief_s:
            self.listing.restore(lacking_since)
        for s in saved.instances:
            if not s.label.startswith(self._prefix):
                continue
            if s.condemned:
                self._condemned.add(s.label)
            if s.state is not None and s.since is not None:
                self.instances[s.label] = Instance.restored(s, State(s.state), s.since, self.profile, now)
        self.stops.restore(self.instances.values(), credit_gone=saved.credit_gone)

    def observe(self, rows: Sequence[Row] | None, checks: Iterable[HealthCheck], now: float) -> None:
        """Copy a listing (None when it failed), apply finished checks, and let deadlines pass."""
        gap_s, usual_s = now - self._observed_at, self._gap_s
        self._observed_at, self._gap_s = now, gap_s
        if gap_s > max(self.deadlines.absent_s, 3.0 * usual_s):
            self.excuse(now)  # the computer slept, or we hung: no machine has been looked at meanwhile
        if rows is None:
            self.listing.fail(now)
        else:
            self._read(rows, now)
        for check in checks:
            self.judge(check, now)
        if self.listing.believed and not self.stops.credit.spares(now):
            self.stops.judge(now)
            for i in list(self.instances.values()):
                if now >= i.patience_until:
                    self._pass_deadline(i, now)

    def _read(self, rows: Sequence[Row], now: float) -> None:
        """Copy the rows of a listing to the instances; note which it lacks, adopt those that are new."""
        ours, twins = rows_by_label(rows, self._prefix, self.instances)
        self._condemned |= twins
        expected = [
            i
            for i in self.instances.values()
            if i.id is not None and i.state not in (State.ORDERED, State.DESTROYING)
        ]
        shown_after = now - self.deadlines.absent_s
        lacking = [i for i in expected if i.label not in ours and i.absence.shown_at <= shown_after]
        dead = all(i.state in CHECKED and i.trouble.silent_since is not None for i in lacking)
        first = self.listing.read_at is None
        if self.listing.weigh(len(expected) - len(lacking), len(expected), now, dead=dead):
            self.journal.log(f"the listing lacks {len(lacking)} of {len(expected)}: not believed for now")
        self.journal.note_lacking(self.listing.lacking_since, now)
        if self.listing.believed and self.listing.end_outage(now) > self.deadlines.absent_s:
            self.excuse(now)
        missing = [i for i in self.instances.values() if i.label not in ours]
        for i in missing:
            if i.state is not State.ORDERED or i.id is not None:
                self._miss(i, now)
        self.vanished = {
            label: v for label, v in self.vanished.items() if v[0] > now and label not in self.instances
        }
        for label, row in ours.items():
            i = self.instances.get(label) or self._adopt(label, row, now, first=first)
            self._read_row(i, row, now)
        self.listing.note_read(now)

    def _miss(self, i: Instance, now: float) -> None:
        """Note that the listing lacks an instance; give up one whose own page cannot be had for too long."""
        absent_s = i.absence.miss(now)
        if not self.listing.believed:
            return
        if i.state is State.DESTROYING and i.orders.destroyed:
            if i.absence.turns >= DESTROYED_TURNS:
                self._move(i, State.GONE, "destroyed", now)
        elif (
            absent_s >= self.deadlines.vanished_s
            and now - i.absence.shown_at >= self.deadlines.vanished_s
            and i.state not in SERVING
        ):
            self._vanish(i, f"not listed for {absent_s:.0f} s, and its page cannot be had", now)

    def finish_page(self, command: AskPage, done: Performed, now: float) -> None:
        """Take over what the cloud's page of an instance says; without an answer nothing changes."""
        i = self.instances.get(command.label)
        if i is None:
            return
        i.absence.answer(now, shown=done.reply is Reply.DONE and done.row is not None)
        if done.reply is not Reply.DONE or i.id != command.id or i.absence.since is None:
            return
        if done.row is not None:
            self._read_row(i, done.row, now)
        else:
            self._end_bill(i, ended_at(i, now))
            why = "the listings lack it, and its own page says that it is gone"
            self._move(i, State.GONE, "destroyed" if i.state is State.DESTROYING else why, now)

    def _adopt(self, label: str, row: Row, now: float, *, first: bool) -> Instance:
        """Take in a listed instance that is not known. first: this process has read no listing before."""
        i = self.instances[label] = Instance.found(label, row, now, first=first)
        if label in self._condemned:
            i.condemn()
            self._move(i, State.DESTROYING, "given up earlier, and still listed", now)
        else:
            self._record(i, now)
        return i

    def _read_row(self, i: Instance, row: Row, now: float) -> None:
        """Copy one row of a listing to its instance, then make the transitions that follow from it."""
        odd, ended = i.odd, i.trouble.ended_since
        for since, usd_h in price_changes(i, row, now):
            self.journal.change_price(i.label, since, usd_h)
        if i.read_row(row, self.profile, now) and i.state in SERVING:
            self.hot_version += 1
        if i.odd not in (None, odd):
            self.journal.log(f"{i.id} {i.label}: its row is odd: {i.odd}")
        if i.state is State.ORDERED:
            gb = self.download_gb
            self.journal.add_download(i.label, i.id, gb, i.terms.download_usd(gb), now)
            self._move(i, State.LOADING, "listed", now)
        if i.trouble.given_up == 1:
            self.stops.credit.note_stop(now)  # without credit everything is meant to be stopped
        if row.actual_status in UP:
            if i.state in (State.LOADING, State.STARTING):
                self._come_up(i, "container up", now)
            elif i.state is State.COLD:
                i.order_start(now)
                self._come_up(i, "runs without our asking", now)
            elif ended is not None:
                i.come_up(now)  # its container was started again: what a check found before says nothing
        elif row.actual_status in DOWN:
            self._go_down(i, now)

    def _come_up(self, i: Instance, why: str, now: float) -> None:
        kind = "start" if i.state is State.STARTING else "create"
        since = i.ordered_at if i.boot.ordered_at is None else i.boot.ordered_at
        self.journal.add_duration(kind, since, now)
        i.come_up(now)
        self._move(i, State.RUNNING, why, now)

    def _go_down(self, i: Instance, now: float) -> None:
        if i.state is State.STOPPING:
            self.journal.add_duration("stop", i.orders.asked_at, now)
            self._move(i, State.COLD, "stopped", now)
        elif i.state is State.LOADING or i.state in CHECKED:
            if i.intended != "stopped":
                self._end(i, now)
            else:
                self._move(i, State.COLD, unasked(i), now)
                self.stops.add(i, now)

    def note_credit(self, usd: float, now: float) -> None:
        """Take in the account's credit; when it is back, all that it had stopped begins anew."""
        if self.stops.note_credit(usd, self.instances.values(), now) is Turned.BACK:
            self.excuse(now)

    def _end(self, i: Instance, now: float) -> None:
        """Take an instance out of service whose container the listing shows as ended; check it at once."""
        if i.state in SERVING:
            self._move(i, State.RUNNING, "its container ended by itself, says the listing", now)
        if i.trouble.ended_since == now:
            i.check_at_once()

    def begin(self, command: OrderToInstance, now: float) -> None:
        """Write an order down before it is sent, so that it counts and can be found again.

        Raises IllegalTransition when the instance has moved on since the decision; then nothing is sent.
        """
        if isinstance(command, Create):
            self._begin_create(command, now)
            return
        i = self.instances.get(command.label)
        if i is None or i.id != command.id:
            raise IllegalTransition(f"{command.label}: not there any more")
        match command:
            case AskPage():
                i.absence.ask(now)
                return
            case Drain():
                self._move(i, State.DRAINING, command.why, now)
                i.drain_from(self.hot_version)
                return
            case Undrain():
                self._move(i, State.HOT, command.why, now)
                return
            case Start():
                if i.state is not State.STARTING:
                    self._move(i, State.STARTING, command.why, now)
                    i.order_start(now)
            case Stop():
                if i.state is not State.STOPPING:
                    self._move(i, State.STOPPING, command.why, now)
                    i.orders.ask(now)
            case Destroy():
                if i.state is not State.DESTROYING:
                    self._condemn(i)
                    self._move(i, State.DESTROYING, command.why, now)
                    i.orders.ask(now)
        i.orders.begin(now)

    def _begin_create(self, create: Create, now: float) -> None:
        if not create.label.startswith(self._prefix) or create.label in self.instances:
            raise ConfigError(f"label {create.label!r} is not a new one of fleet {self._prefix[:-1]!r}")
        i = Instance.ordered(create.label, create.offer, create.why, self.profile, now)
        self.instances[create.label] = i
        self.market.take(create.offer)
        self.blame.note_create(now)
        self._record(i, now)

    def finish(self, command: Create | Start | Stop | Destroy, done: Performed, now: float) -> None:
        """Note how the cloud answered an order; what stays UNKNOWN the next listing settles."""
        i = self.instances.get(command.label)
        if i is None:
            return
        if isinstance(command, Create):
            self.blame.note_order(done, now)
        done_at = done.done_at(now)
        destroyed = isinstance(command, Destroy) and done_at is not None
        i.orders.answer(now, done_at=done_at, destroyed=destroyed)
        if done.reply is Reply.UNSENT:
            i.orders.ask(now)  # it cannot be late with what it was not asked for
        if destroyed and done_at is not None:
            self.journal.add_duration("destroy", i.orders.asked_at, now)
            self._end_bill(i, ended_at(i, now) if done.absent else done_at)
        elif isinstance(command, Create) and done.reply is Reply.DONE:
            i.accept_id(done.new_id)
            self.journal.save(i.saved())
        elif isinstance(command, Create) and done.reply in NOT_DONE and i.state is State.ORDERED:
            self._condemn(i)
            self._move(i, State.GONE, done.why, now)
        elif isinstance(command, Start) and done.reply in NOT_DONE and i.state is State.STARTING:
            if done.reply is Reply.REFUSED:  # what we could not send is no fault of the machine
                i.boot.be_refused(self.deadlines, now)
            self._move(i, State.COLD, f"start {done.reply}: {done.why}", now)
