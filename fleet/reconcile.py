"""Reconcile what is known of each instance with what the world says: the only file that moves a state.

    observe   the listing, then the finished health checks, then the deadlines
    judge     one health check; the only place that makes an instance hot
    begin     an order was written down and is about to be sent
    finish    its reply came, or did not

Passive transitions, which copy what the world says, come before active ones.

- On a listing that is not believed (fleet/listing.py) no deadline passes.
- An instance that passes its checks exists, whatever the listing says.
- An instance that is given up is condemned: if its label reappears later it is destroyed.
- One that vanished goes on counting against the hard limits for a while: it may still exist, and bill.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from engine.profiles import Profile
from fleet.commands import (
    Create,
    Destroy,
    Drain,
    Performed,
    Reply,
    Start,
    Stop,
    Undrain,
)
from fleet.deadlines import Deadlines
from fleet.durations import MeasuredDurations
from fleet.health_check import HealthCheck, Verdict
from fleet.instance import DOWN, UP, Instance
from fleet.journal import Journal, SavedInstance
from fleet.listing import ListingTrust, rows_by_label
from fleet.market import Market
from fleet.states import CHECKED, GIVEN_UP, SERVING, IllegalTransition, State
from process.errors import ConfigError
from vast.rows import Row

FAILED_STARTS = 3
"""Starts in a row without a GPU after which an instance is given up."""

ABSENT_TURNS = 3
"""Believed listings in a row that must lack an instance before it counts as gone."""

DESTROYED_TURNS = 2
"""The same for one that is being destroyed; to forget another, which may bill, is the costlier mistake."""

GONE_KEPT = 50
"""Instances that are gone and can still be asked why."""

OrderToInstance = Create | Start | Stop | Destroy | Drain | Undrain


class Reconciler:
    """Owns the instances by label, and moves them from state to state."""

    def __init__(
        self,
        fleet_name: str,
        profile: Profile,
        deadlines: Deadlines,
        market: Market,
        durations: MeasuredDurations,
        journal: Journal,
    ) -> None:
        """Begin without instances; labels of this fleet are `<fleet_name>/<something>`."""
        self.instances: dict[str, Instance] = {}
        self.vanished: dict[str, tuple[float, float]] = {}  # until when it counts against the limits, $/h
        self.gone: deque[Instance] = deque(maxlen=GONE_KEPT)
        self.hot_version = 0  # grows with each change of the hot set
        self.listing = ListingTrust(deadlines.disbelief_s)
        self._prefix = fleet_name + "/"
        self._profile = profile
        self._deadlines = deadlines
        self._market = market
        self._durations = durations
        self._journal = journal
        self._condemned: set[str] = set()  # labels, also of instances that are gone

    def restore(
        self, saved: Iterable[SavedInstance], vanished: Mapping[str, tuple[float, float]], now: float
    ) -> None:
        """Take over what the ledger knows of the last process; what was hot is to be verified.

        Labels of another fleet are left alone: a state directory may have served two.
        """
        self.vanished.update(vanished)
        for s in saved:
            if not s.label.startswith(self._prefix):
                continue
            if s.condemned:
                self._condemned.add(s.label)
            if s.state is not None and s.since is not None:
                self.instances[s.label] = Instance.restored(s, State(s.state), s.since, self._profile, now)

    def observe(self, rows: Sequence[Row] | None, checks: Iterable[HealthCheck], now: float) -> None:
        """Copy the listing (None when it failed), apply the checks, let deadlines pass."""
        if rows is None:
            self.listing.fail(now)
        else:
            self._read(rows, now)
        for check in checks:
            self.judge(check, now)
        if self.listing.believed:
            for i in list(self.instances.values()):
                if now >= i.patience_until:
                    self._pass_deadline(i, now)

    def _read(self, rows: Sequence[Row], now: float) -> None:
        """Take over a listing."""
        ours, twins = rows_by_label(rows, self._prefix, self.instances)
        self._condemned |= twins
        expected = [
            i.label in ours
            for i in self.instances.values()
            if i.id is not None and i.state not in (State.ORDERED, State.DESTROYING)
        ]
        found, first = sum(expected), self.listing.read_at is None
        if self.listing.weigh(found, len(expected), now):
            lacking = len(expected) - found
            self._journal.log(f"the listing lacks {lacking} of {len(expected)}: not believed for now")
        if self.listing.believed and self.listing.end_outage(now) > self._deadlines.absent_s:
            for i in self.instances.values():
                i.spare_until(now + self._deadlines.patience_s)
        missing = [i for i in self.instances.values() if i.label not in ours]
        for i in missing:
            if i.state is not State.ORDERED:
                self._miss(i, now)
        self.vanished = {
            label: v for label, v in self.vanished.items() if v[0] > now and label not in self.instances
        }
        for label, row in ours.items():
            i = self.instances.get(label) or self._adopt(label, row, now, first=first)
            self._read_row(i, row, now)
        self.listing.note_read(now)

    def _miss(self, i: Instance, now: float) -> None:
        """Give up an instance that the listings lack for too long."""
        absent_s = i.miss(now)
        if not self.listing.believed:
            return
        away = absent_s >= self._deadlines.absent_s
        if i.state is State.DESTROYING:
            if i.absent_turns >= DESTROYED_TURNS and (i.orders.destroyed or away):
                self._move(i, State.GONE, "destroyed", now)
        elif i.absent_turns >= ABSENT_TURNS and away and i.state not in SERVING:
            self._vanish(i, "the cloud does not list it any more", now)

    def _adopt(self, label: str, row: Row, now: float, *, first: bool) -> Instance:
        """Take in a listed instance that is not known; first: this process has read no listing before."""
        i = self.instances[label] = Instance.found(label, row, now, first=first)
        if label in self._condemned:
            i.condemn()
            self._move(i, State.DESTROYING, "given up earlier, and still listed", now)
        else:
            self._record(i, now)
        return i

    def _read_row(self, i: Instance, row: Row, now: float) -> None:
        """Copy one row, then make the transitions it causes."""
        before, repriced = i.state, i.price_usd_h != row.price_now_usd_h
        if i.read_row(row, self._profile, now) and i.state in SERVING:
            self.hot_version += 1
        if i.state is State.ORDERED:
            self._move(i, State.LOADING, "listed", now)
        if row.actual_status in UP:
            if i.state in (State.LOADING, State.STARTING):
                self._come_up(i, "container up", now)
            elif i.state is State.COLD:
                i.boot.order(now)
                self._come_up(i, "runs without our asking", now)
        elif row.actual_status in DOWN:
            self._go_down(i, now)
        if repriced and i.state is before:
            self._record(i, now)

    def _come_up(self, i: Instance, why: str, now: float) -> None:
        kind = "start" if i.state is State.STARTING else "create"
        since = i.ordered_at if i.boot.ordered_at is None else i.boot.ordered_at
        self._journal.add_duration(kind, since, now)
        i.come_up(now)
        self._move(i, State.RUNNING, why, now)

    def _go_down(self, i: Instance, now: float) -> None:
        if i.state is State.STOPPING:
            self._journal.add_duration("stop", i.orders.asked_at, now)
            self._move(i, State.COLD, "stopped", now)
        elif i.state is State.LOADING or i.state in CHECKED:
            if i.intended != "stopped":
                self._fail(i, "its container ended by itself", now)
            elif i.loaded:
                why = "stopped without our asking: outbid, out of credit, or by hand"
                self._move(i, State.COLD, why, now)
            else:
                self._fail(i, "stopped before its model was loaded", now)

    def judge(self, check: HealthCheck, now: float) -> None:
        """Apply one health check of the present boot. The only place that makes an instance hot."""
        i = self.instances.get(check.label)
        if i is None or i.state not in CHECKED or check.started_at < i.boot.up_at:
            return
        if i.read_check(check) and i.state in SERVING:
            self.hot_version += 1
        if check.verdict is Verdict.FATAL:
            self._fail(i, check.why, now)
        elif check.verdict is Verdict.PASSED:
            if i.state is State.RUNNING and i.lost_since is None:
                self._warm_up(i, now)
                self._move(i, State.HOT, check.why, now)
        elif i.state in SERVING:
            self._move(i, State.RUNNING, check.why, now)
        else:
            i.explain(check.why)

    def _warm_up(self, i: Instance, now: float) -> None:
        """Note how long it took to become hot, and that its disk holds the model."""
        self._market.note_create_worked()
        if not i.boot.was_hot:
            if i.boot.ordered_at is not None:
                self._journal.add_duration("boot", i.boot.ordered_at, now)
                self._durations.add_start(now - i.boot.ordered_at)
            elif not i.loaded and not i.adopted:
                self._journal.add_duration("load", i.ordered_at, now)
                self._durations.add_load(now - i.ordered_at)
        i.warm_up()

    def _pass_deadline(self, i: Instance, now: float) -> None:
        """Act on what has lasted too long."""
        d = self._deadlines
        if i.lost_since is not None and i.state not in GIVEN_UP:
            if i.state in SERVING:
                self._move(i, State.RUNNING, "its host is offline", now)
            # A stopped machine that is offline costs nothing and may come back with the model.
            lost_s = now - i.lost_since
            if lost_s > (d.lost_cold_s if i.state is State.COLD else d.lost_s):
                self._fail(i, f"host offline for {lost_s:.0f} s", now)
        elif i.state is State.STARTING:
            if not i.orders.out and now - i.orders.answered_at > d.starting_s:
                i.boot.miss_gpu(d.no_gpu_rest_s, now)
                if i.boot.failed_starts >= FAILED_STARTS:
                    self._fail(i, "three starts found no GPU", now)
                else:
                    self._move(i, State.STOPPING, f"its GPU was not free within {d.starting_s:.0f} s", now)
        elif why := _overdue(i, d, now):
            if i.state is State.ORDERED and i.id is None:
                self._condemn(i)
                self._vanish(i, "its order was never seen", now)
            else:
                self._fail(i, why, now)

    def begin(self, command: OrderToInstance, now: float) -> None:
        """Write the order down before it is sent, so that it counts and can be found again.

        Raises IllegalTransition when the instance has moved on since the decision; then nothing is sent.
        """
        if isinstance(command, Create):
            self._begin_create(command, now)
            return
        i = self.instances.get(command.label)
        if i is None or i.id != command.id:
            raise IllegalTransition(f"{command.label}: not there any more")
        match command:
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
                    i.boot.order(now)
            case Stop():
                if i.state is not State.STOPPING:
                    self._move(i, State.STOPPING, command.why, now)
                    i.orders.ask(now)
            case Destroy():
                if i.state is not State.DESTROYING:
                    self._condemn(i)
                    self._move(i, State.DESTROYING, command.why, now)
                    i.orders.ask(now)
        i.orders.begin()

    def _begin_create(self, create: Create, now: float) -> None:
        if not create.label.startswith(self._prefix) or create.label in self.instances:
            raise ConfigError(f"label {create.label!r} is not a new one of fleet {self._prefix[:-1]!r}")
        i = Instance.ordered(create.label, create.offer, create.why, self._profile, now)
        self.instances[create.label] = i
        self._market.take(create.offer)
        self._record(i, now)

    def finish(self, command: Create | Start | Stop | Destroy, done: Performed, now: float) -> None:
        """Note how the cloud answered; what stays UNKNOWN the listing settles."""
        i = self.instances.get(command.label)
        if i is None:
            return
        destroyed = isinstance(command, Destroy) and done.reply is Reply.DONE
        i.orders.answer(now, destroyed=destroyed)
        if destroyed:
            self._journal.add_duration("destroy", i.orders.asked_at, now)
        elif isinstance(command, Create) and done.reply is Reply.DONE:
            i.accept_id(done.new_id)
            self._journal.save(i.saved())
        elif isinstance(command, Create) and done.reply is Reply.REFUSED and i.state is State.ORDERED:
            if not done.offer_gone:
                self._market.note_create_failed(now)
            self._condemn(i)
            self._move(i, State.GONE, done.why, now)
        elif isinstance(command, Start) and done.reply is Reply.REFUSED and i.state is State.STARTING:
            i.boot.be_refused(self._deadlines, now)
            self._move(i, State.COLD, f"start refused: {done.why}", now)

    def _move(self, i: Instance, to: State, why: str, now: float) -> None:
        """Move an instance: the only caller of `Instance.enter`."""
        before, why_before, spent_s = i.state, i.why, now - i.since
        i.enter(to, why, now)
        self._journal.log(f"{i.id or i.label} {before} -> {to}: {why} (after {spent_s:.0f} s)")
        if before in SERVING or to in SERVING:
            self.hot_version += 1
        if to is State.GONE:
            if before is State.DESTROYING:
                self._journal.add_duration("destroyed", i.orders.asked_at, now)
            i.explain(f"{why} (was {before}: {why_before})")
            self.gone.append(i)
            del self.instances[i.label]
        self._record(i, now)

    def _fail(self, i: Instance, why: str, now: float) -> None:
        """Give the instance up, and its machine for a while."""
        if i.state in GIVEN_UP:
            return
        if not i.loaded:
            self._market.note_create_failed(now)
        if i.machine_id is not None:
            self._journal.add_bad_machine(i.machine_id, self._market.avoid(i.machine_id, now), why)
        self._condemn(i)
        self._move(i, State.FAILED, why, now)

    def _vanish(self, i: Instance, why: str, now: float) -> None:
        """Count the instance as gone, as far as the listing can be trusted."""
        until, usd_h = now + self._deadlines.vanished_s, max(i.price_usd_h, i.running_usd_h)
        self.vanished[i.label] = (until, usd_h)
        self._journal.add_vanished(i.label, until, usd_h)
        self._move(i, State.GONE, why, now)

    def _condemn(self, i: Instance) -> None:
        i.condemn()
        self._condemned.add(i.label)

    def _record(self, i: Instance, now: float) -> None:
        self._journal.open_interval(i.interval(now))
        self._journal.save(i.saved())


def _overdue(i: Instance, deadlines: Deadlines, now: float) -> str | None:
    """Return why the instance's time in its state is over, for good; None while it is not."""
    d, age = deadlines, now - i.since
    if (
        i.state is State.ORDERED
        and not i.orders.out
        and now - max(i.since, i.orders.answered_at) > d.ordered_s
    ):
        return "ordered, but never listed"
    if i.state is State.LOADING:
        if i.broken_since and now - i.broken_since >= d.broken_host_s:
            return "docker or host error in status_msg"
        return f"its container was not up after {age:.0f} s" if age > d.loading_s else None
    if i.state is State.RUNNING:
        limit_s = d.recover_s if i.boot.was_hot else d.reload_s if i.loaded else d.first_load_s
        return f"not hot after {age:.0f} s: {i.why}" if age > limit_s else None
    if i.state is State.STOPPING and not i.orders.out and age > 3 * d.stopping_s:
        return f"would not stop in {age:.0f} s"
    return None
