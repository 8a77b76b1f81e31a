"""The fleet: what each instance is, what the cloud shows of it, and what to ask of the cloud next.

The states and the moves between them are in `fleet/states.py`. `InstanceSet` is arithmetic
only. A turn is three calls with the I/O between them:

    observe(rows, checks, now)   copy what the world says; deadlines; passive moves
    decide(demand, policy, now)  a Decision: what was seen, what is wanted, which commands; changes nothing
    begin / finish(command)      an order was written down / its reply came (or did not)

Invariants
- Exactly one place makes an instance hot (`judge`), exactly one checks the hard limits (`_Room.admit`).
- An order counts as capacity and as money from `begin` until it is seen or its deadline has passed.
- A listing that failed, or that lost most of what was there, is "unknown": nothing is decided on it, no
  deadline passes, and what answers a test prompt exists whatever the listing says.
- Nothing with requests is stopped, unless it failed, passed its drain deadline, or a person asked.
"""

import logging
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from engine.profiles import Profile
from fleet.commands import (
    Command,
    Create,
    Destroy,
    Drain,
    LookForOffers,
    Reply,
    Start,
    Stop,
    Undrain,
)
from fleet.demand import Demand, Mix
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.instance import Instance
from fleet.journal import BillingInterval, Decision, Journal, SavedInstance
from fleet.states import SERVING, Deadlines, IllegalTransition, Limits, State, check_move
from policies import BIN_S, Capacity, FleetSnapshot, Policy
from process.errors import ConfigError
from vast.rows import Offer, Row

log = logging.getLogger("autoscaler")


CHECKED = SERVING | {State.RUNNING}
"""States in which health checks are made."""

EXPECTED_PROMPT_TOKENS = 300.0
"""Of a request, until one has arrived: the prompts that the profiles' throughputs are given for."""

GONE_FROM_POOL = frozenset({State.FAILED, State.DESTROYING, State.GONE})
"""States of what is no part of the fleet any more, although it may still bill."""

# Words of `actual_status` (vast-contract 2.12).
UP = frozenset({"running"})
DOWN = frozenset({"stopped", "exited"})
LOST = frozenset({"offline", "unknown", "frozen"})
# Docker and host failures seen in status_msg (vast-contract 6.2), matched without case.
BROKEN_HOST = (
    "error response from daemon",
    "oci runtime create failed",
    "failed to inject cdi",
    "no space left on device",
    "failed to resolve reference",
)


class InstanceSet:
    """All instances of one fleet, keyed by their unique labels. No I/O, no clock, no lock of its own."""

    def __init__(
        self,
        fleet_name: str,
        profile: Profile,
        limits: Limits,
        deadlines: Deadlines,
        speedup: float = 1.0,
        check_hot_every_s: float = 15.0,
        check_boot_every_s: float = 3.0,
    ) -> None:
        """An empty set for the fleet whose labels are `<fleet>/<something>`."""
        self.fleet_name = fleet_name
        self.profile = profile
        self.limits = limits
        self.deadlines = deadlines
        self.speedup = speedup
        self.check_hot_every_s = check_hot_every_s
        self.check_boot_every_s = check_boot_every_s
        self.instances: dict[str, Instance] = {}
        self.bad_machines: dict[int, float] = {}
        self.hot_version = 0  # of the hot set
        self.manage = True
        self.listed_at: float | None = None  # last good listing
        self.plausible = False
        self.gone: deque[Instance] = deque(maxlen=50)  # the last that went, and why
        self._strange_since: float | None = None  # since when the listings lack most of the fleet
        self._blind_since: float | None = float("-inf")  # since when there is no believable listing
        self._unverified: set[str] = set()  # hot before a restart, not yet checked again
        self._condemned: set[str] = set()  # labels given up: destroyed again if they reappear
        self._offers: tuple[Offer, ...] = ()
        self._offers_at = float("-inf")
        self._looking_since = float("-inf")
        self._failed_creates = 0
        self._no_create_before = float("-inf")
        self._start_times: list[float] = []
        self._load_times: list[float] = []
        self.start_time_s = profile.start_time_s / speedup
        self.load_time_s = profile.load_time_s / speedup
        self._vanished: dict[str, tuple[float, float]] = {}  # vanished without our asking: until when, $/h
        self._journal = Journal()

    def __iter__(self) -> Iterator[Instance]:
        """Iterate over the instances, in the order in which they were ordered or found."""
        return iter(self.instances.values())

    def __len__(self) -> int:
        """Return how many instances there are, failed ones and those being destroyed included."""
        return len(self.instances)

    def __contains__(self, label: object) -> bool:
        """Return whether there is an instance with that label."""
        return label in self.instances

    def __getitem__(self, label: str) -> Instance:
        """Return the instance with that label; raises KeyError."""
        return self.instances[label]

    def set_manage(self, manage: bool) -> None:
        """Set whether anything new is ordered; what was begun is finished either way."""
        self.manage = manage

    # -- restart ------------------------------------------------------------------------------------

    def restore(
        self,
        remembered: Iterable[SavedInstance],
        bad_machines: Mapping[int, float],
        start_times: Sequence[float] = (),
        load_times: Sequence[float] = (),
        *,
        vanished: Mapping[str, tuple[float, float]] | None = None,
        now: float | None = None,
    ) -> None:
        """Take over what the ledger knows of the last process. What was hot must earn it again.

        Labels of another fleet are left alone: a state directory may have served two.
        """
        self.bad_machines.update(bad_machines)
        self._vanished.update(vanished or {})
        self._start_times += start_times
        self._load_times += load_times
        self._time_it()
        for r in remembered:
            if not r.label.startswith(self.fleet_name + "/"):
                continue
            if r.condemned:
                self._condemned.add(r.label)
            if r.state is None or r.since is None:
                continue
            state = State(r.state)
            # The machine's clock may have been set back since.
            since = r.since if now is None else min(r.since, now)
            if state in SERVING:
                self._unverified.add(r.label)
                state = State.RUNNING
                since = r.since if now is None else now
            self.instances[r.label] = Instance(
                label=r.label,
                state=state,
                since=since,
                why="found again after a restart",
                ordered_at=r.ordered_s,
                id=r.instance,
                machine_id=r.machine,
                price_usd_h=r.usd_h,
                running_usd_h=r.running_usd_h,
                loaded=r.loaded,
                condemned=r.condemned,
                was_hot=State(r.state) in SERVING,
                maybe_busy=state is State.RUNNING,
                boot_ordered_at=since if state is State.STARTING else None,
                asked_at=since,
                throughput_work_s=r.throughput or self.profile.throughput_work_s,
            )

    def knows_hot_set(self) -> bool:
        """Whether the hot set can be told: a listing came, and what was hot before a restart was checked."""
        if self.listed_at is None:
            return False
        self._unverified = {
            label
            for label in self._unverified
            if label in self.instances and self.instances[label].state is State.RUNNING
        }
        return not self._unverified

    # -- observe ------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[Row] | None, checks: Iterable[HealthCheck], now: float) -> None:
        """Copy what the world says: the listing (None when it failed), then the finished health checks.

        Deadlines are judged only on a believable listing: with the cloud away nobody can tell a dead machine
        from a dead view of it.
        """
        if rows is None:
            self.plausible = False
        else:
            ours = self._ours(rows)
            self.plausible = self._believable(ours, now)
        if not self.plausible and self._blind_since is None:
            self._blind_since = now
        if rows is not None:
            if self.plausible:
                self._open_eyes(now)
            self._mark_absent(ours, now)
            for label, row in ours.items():
                self._see(label, row, now)
            self.listed_at = now
        for check in checks:
            self.judge(check, now)
        if self.plausible:
            self._pass_deadlines(now)

    def _believable(self, ours: Mapping[str, Row], now: float) -> bool:
        """False when more than half of what was there is missing, unless it stays so for long."""
        expected = [
            i.label in ours
            for i in self.instances.values()
            if i.id is not None and i.state not in (State.ORDERED, State.DESTROYING)
        ]
        if sum(expected) * 2 >= len(expected):
            self._strange_since = None
            return True
        if self._strange_since is None:
            self._strange_since = now
            lacking = len(expected) - sum(expected)
            self._journal.log.append(f"the listing lacks {lacking} of {len(expected)}: not believed for now")
        return now - self._strange_since >= self.deadlines.disbelief

    def _open_eyes(self, now: float) -> None:
        """After a time without a view (an outage, a restart) no deadline passes before all was looked at."""
        if self._blind_since is not None and now - self._blind_since > self.deadlines.absent:
            for i in self.instances.values():
                i.patience_until = now + self.deadlines.patience
        self._blind_since = None

    def _ours(self, rows: Sequence[Row]) -> dict[str, Row]:
        """The rows with our label; a second row of one label gets a label of its own and is condemned."""
        ours: dict[str, Row] = {}
        prefix = self.fleet_name + "/"
        for row in rows:
            if row.label is None or not row.label.startswith(prefix):
                continue
            known = self.instances.get(row.label)
            if row.label in ours or (known and known.id is not None and known.id != row.id):
                twin = f"{row.label}#{row.id}"
                self._condemned.add(twin)
                ours[twin] = row
            else:
                ours[row.label] = row
        return ours

    def _mark_absent(self, ours: Mapping[str, Row], now: float) -> None:
        """Count who is missing, and give up who is missing for too long."""
        absent = self.deadlines.absent
        for i in list(self.instances.values()):
            if i.label in ours:
                i.absent_since, i.absent_turns = None, 0
                continue
            if i.state is State.ORDERED:
                late = now - max(i.since, i.answered_at) > self.deadlines.ordered and not i.orders_out
                if self.plausible and late and now >= i.patience_until:
                    if i.id is None:
                        self._condemn(i)
                        self._vanish(i, "its order was never seen", now)
                    else:
                        self._fail(i, "ordered, but never listed", now)
                continue
            if i.absent_since is None:
                i.absent_since = now
            i.absent_turns += 1
            if not self.plausible:
                continue
            away = now - i.absent_since >= absent
            # A destroyed instance is gone when the cloud said so and two believable listings in a row lack
            # it; another is vanished longer, because to forget a machine that bills is the costlier mistake.
            # One that passes its checks exists: then it is the listing that lacks something.
            if i.state is State.DESTROYING:
                if i.absent_turns >= 2 and (i.destroyed or away):
                    self._move(i, State.GONE, "destroyed", now)
            elif i.absent_turns >= 3 and away and i.state not in SERVING:
                self._vanish(i, "the cloud does not list it any more", now)
        self._vanished = {
            label: m for label, m in self._vanished.items() if m[0] > now and label not in self.instances
        }

    def _see(self, label: str, row: Row, now: float) -> None:
        """Copy one row, then make the moves it causes."""
        i = self.instances.get(label)
        if i is None:
            i = self._adopt(label, row, now)
        records = len(self._journal.intervals)
        repriced = i.price_usd_h != row.price_now_usd_h
        i.price_usd_h = row.price_now_usd_h
        i.listed, i.intended = True, row.intended_status
        i.id = row.id
        i.machine_id = row.machine_id
        i.gpu_name, i.num_gpus = row.gpu_name, row.num_gpus
        if i.throughput_work_s <= 1.0:
            i.throughput_work_s = self.profile.throughput_on(row.gpu_name, row.num_gpus)
        i.running_usd_h, i.stopped_usd_h = row.dph_total, row.storage_usd_h
        if (i.host, i.ports) != (row.public_ip, row.ports):
            i.host, i.ports = row.public_ip, row.ports
            if i.state in SERVING:
                self._hot_changed()
        i.ssh = _ssh_address(row)
        i.lost_since = _since(i.lost_since, now, row.actual_status in LOST)
        i.broken_since = _since(i.broken_since, now, _says_broken(row.status_msg))
        self._follow(i, row, now)
        if repriced and len(self._journal.intervals) == records:
            self._record(i, now)

    def _adopt(self, label: str, row: Row, now: float) -> Instance:
        """An instance with our label that we do not know: a lost order, or the ledger is gone."""
        i = Instance(
            label=label,
            state=State.LOADING,
            since=now,
            why="found in the listing by its label",
            ordered_at=now,
            id=row.id,
            booted_at=now,
            adopted=True,
        )
        # Without a ledger a stopped instance is taken to hold the model: a start will show.
        i.loaded = row.actual_status in DOWN
        self.instances[label] = i
        if label in self._condemned:
            i.condemned = True
            self._move(i, State.DESTROYING, "given up earlier, and still listed", now)
        else:
            if row.actual_status in DOWN:
                i.state = State.COLD
            elif row.actual_status in UP:
                i.state, i.maybe_busy = State.RUNNING, True
                if self.listed_at is None:
                    self._unverified.add(label)  # may well be hot: its first check will tell
            self._record(i, now)
        return i

    def _follow(self, i: Instance, row: Row, now: float) -> None:
        """Move the instance to where the row says it is; passive moves only."""
        status, intended = row.actual_status, row.intended_status
        if i.state is State.ORDERED:
            self._move(i, State.LOADING, "listed", now)
        if status in UP:
            if i.state in (State.LOADING, State.STARTING):
                self._booted(i, "container up", now)
            elif i.state is State.COLD:
                i.boot_ordered_at = now
                self._booted(i, "runs without our asking", now)
        elif status in DOWN:
            self._follow_down(i, intended, now)

    def _follow_down(self, i: Instance, intended: str | None, now: float) -> None:
        if i.state is State.STOPPING:
            self._took("stop", i.asked_at, now)
            self._move(i, State.COLD, "stopped", now)
        elif i.state in (State.LOADING, State.RUNNING, State.HOT, State.DRAINING):
            if intended != "stopped":
                self._fail(i, "its container ended by itself", now)
            elif i.loaded:
                self._move(
                    i, State.COLD, "stopped without our asking: outbid, out of credit, or by hand", now
                )
            else:
                self._fail(i, "stopped before its model was loaded", now)

    def _booted(self, i: Instance, why: str, now: float) -> None:
        kind = "start" if i.state is State.STARTING else "create"
        self._took(kind, i.ordered_at if i.boot_ordered_at is None else i.boot_ordered_at, now)
        i.booted_at = now
        i.was_hot = i.maybe_busy = False
        i.in_flight = None
        self._move(i, State.RUNNING, why, now)

    def judge(self, check: HealthCheck, now: float) -> None:
        """Apply one health check. The only place that makes an instance hot."""
        i = self.instances.get(check.label)
        if i is None or i.state not in CHECKED or check.started_at < i.booted_at:
            return
        self._unverified.discard(i.label)
        if check.in_flight is not None:
            i.in_flight, i.in_flight_at = check.in_flight, check.started_at
        if check.certificate is not None and check.certificate != i.certificate:
            i.certificate = check.certificate
            if i.state in SERVING:
                self._hot_changed()
        if check.verdict is Verdict.FATAL:
            self._fail(i, check.why, now)
        elif check.verdict is Verdict.PASSED:
            if i.state is State.RUNNING and i.lost_since is None:
                self._warm(i, now)
                self._move(i, State.HOT, check.why, now)
        elif check.verdict in (Verdict.FAILED, Verdict.LOADING):
            if i.state in SERVING:
                self._move(i, State.RUNNING, check.why, now)
            else:
                i.why = check.why

    def _warm(self, i: Instance, now: float) -> None:
        """Remember how long it took to become hot, and that its disk holds the model."""
        self._failed_creates = 0
        i.failed_starts = i.refused_starts = 0
        if not i.was_hot:
            if i.boot_ordered_at is not None:
                self._took("boot", i.boot_ordered_at, now)
                self._start_times.append(now - i.boot_ordered_at)
            elif not i.loaded and not i.adopted:
                self._took("load", i.ordered_at, now)
                self._load_times.append(now - i.ordered_at)
            del self._start_times[:-20], self._load_times[:-20]
            self._time_it()
        i.was_hot = i.loaded = i.maybe_busy = True
        self._remember(i)

    def _pass_deadlines(self, now: float) -> None:
        d = self.deadlines
        for i in self.instances.values():
            age = now - i.since
            if now < i.patience_until:
                continue
            if i.lost_since is not None and i.state not in (State.FAILED, State.DESTROYING):
                if i.state in SERVING:
                    self._move(i, State.RUNNING, "its host is offline", now)
                # A stopped machine that is offline costs nothing and may come back with the model.
                if now - i.lost_since > (d.lost_cold if i.state is State.COLD else d.lost):
                    self._fail(i, f"host offline for {now - i.lost_since:.0f} s", now)
            elif i.state is State.LOADING and i.broken_since and now - i.broken_since >= d.broken_host:
                self._fail(i, "docker or host error in status_msg", now)
            elif i.state is State.LOADING and age > d.loading:
                self._fail(i, f"its container was not up after {age:.0f} s", now)
            elif i.state is State.RUNNING:
                limit = d.recover if i.was_hot else d.reload if i.loaded else d.first_load
                if age > limit:
                    self._fail(i, f"not hot after {age:.0f} s: {i.why}", now)
            elif i.state is State.STARTING and not i.orders_out and now - i.answered_at > d.starting:
                i.failed_starts += 1
                i.no_start_before = now + d.no_gpu_rest
                if i.failed_starts >= 3:
                    self._fail(i, "three starts found no GPU", now)
                else:
                    self._move(i, State.STOPPING, f"its GPU was not free within {d.starting:.0f} s", now)
            elif i.state is State.STOPPING and not i.orders_out and age > 3 * d.stopping:
                self._fail(i, f"would not stop in {age:.0f} s", now)

    # -- decide -------------------------------------------------------------------------------------

    def snapshot(self, demand: Demand, now: float, memory_s: float = math.inf) -> FleetSnapshot:
        """The fleet in numbers, as a policy sees it that looks back so far."""
        hot = coming = loading = cold = draining = 0
        speeds: list[float] = []  # of the hot
        loaded_speeds: list[float] = []
        running_usd_h: list[float] = []
        stopped_usd_h: list[float] = []
        for i in self.instances.values():
            state = i.state
            if state in GONE_FROM_POOL:
                continue
            if state is State.HOT:
                hot += 1
                speeds.append(i.throughput_work_s)
            elif state is State.DRAINING:
                draining += 1
            elif state is State.COLD or state is State.STOPPING:
                cold += 1
            elif state is State.STARTING or self._comes_back(i):
                coming += 1
            else:
                loading += 1
            if i.loaded:
                loaded_speeds.append(i.throughput_work_s)
            if i.running_usd_h > 0.0:
                running_usd_h.append(i.running_usd_h)
            if i.listed:
                stopped_usd_h.append(i.stopped_usd_h)
        work_s = _median(speeds) or _median(loaded_speeds) or self.profile.throughput_work_s
        work_s = demand.saturated_work_s() or work_s
        return FleetSnapshot(
            now=now,
            demand=demand.since(now - memory_s),
            hot=hot,
            coming=coming,
            loading=loading,
            cold=cold,
            draining=draining,
            start_time_s=self.start_time_s,
            load_time_s=self.load_time_s,
            traffic=demand.traffic,
            capacity=self._capacity(work_s, demand.mix),
            arriving=cast("Sequence[float]", demand.arriving(now, memory_s)) if memory_s >= BIN_S else (),
            running_usd_h=_median(running_usd_h) or 0.0,
            stopped_usd_h=_median(stopped_usd_h) or 0.0,
        )

    def _capacity(self, work_s: float, mix: Mix | None) -> Capacity:
        """Of one that does so much work per second, with requests like the mean of the last hours."""
        profile = self.profile
        if mix is None:
            output = profile.expected_output_tokens
            work = profile.prefill_weight * EXPECTED_PROMPT_TOKENS + output
            mix = Mix(work, EXPECTED_PROMPT_TOKENS, output)
        concurrency = work_s * profile.hold_s / mix.work
        # An answer that is under way is half there on average.
        kv_tokens = concurrency * (mix.prompt_tokens + mix.output_tokens / 2.0)
        return Capacity(work_s, work_s / mix.work, concurrency, kv_tokens)

    def decide(self, demand: Demand, policy: Policy, now: float) -> Decision:
        """Say what to ask of the cloud so that capacity meets demand; ask nothing, change nothing.

        Calling it twice gives the same answer. On a listing that is not believed nothing is decided.
        """
        if self.listed_at is None or not self.plausible:
            return Decision(now, None, None, (), ("the listing failed or is not believed: nothing decided",))
        seen = self.snapshot(demand, now, policy.memory_s)
        targets = policy.targets(seen)
        notes: list[str] = []
        clamped: list[str] = []
        most = self.limits.max_instances
        wanted_hot = _clamp("hot", targets.hot, most, notes, clamped)
        wanted_total = max(wanted_hot, _clamp("total", targets.total, most, notes, clamped))
        commands: list[Command] = list(self._finish_what_was_begun(demand, now))
        if self.manage:
            room = _Room(self, commands)
            states = self._by_state()
            commands += self._reach_hot(wanted_hot, states, room, now, notes)
            commands += self._reach_total(wanted_total, states, room, now, notes)
        return Decision(now, seen, targets, tuple(commands), tuple(notes), tuple(clamped))

    def _finish_what_was_begun(self, demand: Demand, now: float) -> Iterable[Command]:
        """Orders that follow from earlier ones, whatever the policy says and whether or not we manage."""
        for i in self.instances.values():
            if i.id is None:
                continue
            again = self._unheeded(i, now)
            if i.state is State.FAILED and self.manage:
                yield Destroy(i.label, i.id, i.why)
            elif i.state is State.DESTROYING and again:
                yield Destroy(i.label, i.id, "still listed")
            elif i.state is State.STOPPING and again:
                yield Stop(i.label, i.id, "not stopped yet")
            elif i.state is State.DRAINING:
                if now - i.since > self.deadlines.draining:
                    yield Stop(
                        i.label, i.id, f"still busy {self.deadlines.draining:.0f} s after the drain began"
                    )
                elif self._drained(i, demand):
                    yield Stop(i.label, i.id, "its last request has ended")

    def _unheeded(self, i: Instance, now: float) -> bool:
        """Whether its last order was answered a while ago. One that waits to be sent is not sent twice."""
        return not i.orders_out and now - i.answered_at >= self.deadlines.repeat

    def _drained(self, i: Instance, demand: Demand) -> bool:
        """Whether it is certain that no request is, or will be, on it.

        The instance itself must say it is idle, in a check made after the drain began; and no lease may be
        out: every loadbalancer knows of the drain and counts none, or, where none reports, it said so after
        the last lease had expired.
        """
        if i.id is None or i.in_flight != 0 or i.in_flight_at < i.since:
            return False
        if demand.reporting:
            return demand.no_lease_on(i.id, i.drain_version)
        return i.in_flight_at - i.since > self.deadlines.lease

    def _reach_hot(
        self,
        wanted: int,
        states: Mapping[State, list[Instance]],
        room: "_Room",
        now: float,
        notes: list[str],
    ) -> list[Command]:
        coming = [*states[State.STARTING], *filter(self._comes_back, states[State.RUNNING])]
        missing = wanted - len(states[State.HOT]) - len(coming)
        if missing > 0:
            out = self._add_hot(missing, states, room, now, notes)
        else:
            out = self._remove_hot(-missing, states, coming)
        changed = {c.label for c in out if isinstance(c, Stop)}
        for i in states[State.STARTING]:
            lost = i.intended == "stopped" and self._unheeded(i, now)
            if lost and i.id is not None and i.label not in changed:
                out.append(Start(i.label, i.id, "the cloud does not mean it to run: asked again"))
        return out

    def _add_hot(
        self,
        missing: int,
        states: Mapping[State, list[Instance]],
        room: "_Room",
        now: float,
        notes: list[str],
    ) -> list[Command]:
        """Undrain, then start the cold ones: whose start failed last behind the others, then by price."""
        out: list[Command] = []
        stopping = room.stopped
        for i in sorted(states[State.DRAINING], key=_cheapest_first):
            if missing > 0 and i.id is not None and i.label not in stopping:
                out.append(Undrain(i.label, i.id, "needed again"))
                missing -= 1
        for i in sorted(states[State.COLD], key=_likeliest_first):
            if missing <= 0:
                break
            # An earlier order that is still to be sent would follow the start.
            if i.id is None or i.orders_out or now < i.no_start_before or i.lost_since is not None:
                continue
            start = Start(i.label, i.id, f"{missing} more wanted hot")
            if room.admit(start, i.running_usd_h - i.stopped_usd_h, 0, notes):
                out.append(start)
                missing -= 1
        return out

    def _remove_hot(
        self, surplus: int, states: Mapping[State, list[Instance]], coming: Sequence[Instance]
    ) -> list[Command]:
        """Cancel what is still coming, newest first; then drain the dearest, idle ones before busy ones."""
        out: list[Command] = []
        for i in sorted(coming, key=lambda i: -i.since):
            if surplus > 0 and i.id is not None and not i.maybe_busy:
                out.append(Stop(i.label, i.id, "no longer needed"))
                surplus -= 1
        for i in sorted(states[State.HOT], key=lambda i: (bool(i.in_flight), -i.usd_per_work, i.label)):
            if surplus > 0 and i.id is not None:
                out.append(Drain(i.label, i.id, "not needed; the worst price for its throughput"))
                surplus -= 1
        return out

    def _reach_total(
        self,
        wanted: int,
        states: Mapping[State, list[Instance]],
        room: "_Room",
        now: float,
        notes: list[str],
    ) -> list[Command]:
        missing = wanted - sum(len(found) for s, found in states.items() if s not in GONE_FROM_POOL)
        if missing > 0:
            return self._create(missing, room, now, notes)
        if missing == 0:
            return []
        spare = [i for i in states[State.COLD] if i.label not in room.started]
        worst_first = sorted(spare, key=lambda i: (i.loaded, -i.usd_per_work, i.label))
        why = "more stopped instances than wanted"
        return [Destroy(i.label, i.id, why) for i in worst_first[:-missing] if i.id is not None]

    def _create(self, missing: int, room: "_Room", now: float, notes: list[str]) -> list[Command]:
        if now < self._no_create_before:
            notes.append(f"{self._failed_creates} creates in a row failed: none for a while")
            return []
        if now - self._offers_at > self.deadlines.offers:
            if now - self._looking_since <= self.deadlines.offers:
                notes.append("looking at the market")
                return []
            return [LookForOffers(f"{missing} more wanted in all")]
        out: list[Command] = []
        taken: set[int] = set()
        used = {i.machine_id for i in self.instances.values() if i.state is State.FAILED}
        for offer in sorted(self._offers, key=self._offer_rank):
            if len(out) >= min(missing, self.limits.max_creates_per_turn):
                break
            bad_until = self.bad_machines.get(offer.machine_id, now)
            if bad_until > now or offer.machine_id in used or offer.id in taken:
                continue
            create = Create(offer, f"{missing} more wanted in all")
            if room.admit(create, offer.dph_total, 1, notes):
                out.append(create)
                taken.add(offer.id)
        if not out and not notes:
            notes.append("no suitable offer on the market")
        return out

    def _offer_rank(self, offer: Offer) -> tuple[float, int]:
        """Dollars per work: the price over the throughput expected of that GPU."""
        return offer.dph_total / self.profile.throughput_on(offer.gpu_name, offer.num_gpus), offer.id

    def committed_usd_h(self) -> float:
        """Dollars per hour if every order goes through: what the hard limit is held against."""
        return sum(i.committed_usd_h for i in self.instances.values()) + sum(
            usd_h for _, usd_h in self._vanished.values()
        )

    def committed_instances(self) -> int:
        """Instances that exist or may exist: what the hard limit is held against."""
        return len(self.instances) + len(self._vanished)

    # -- orders -------------------------------------------------------------------------------------

    def begin(self, command: Command, now: float) -> None:
        """Write the order down before it is sent, so that it counts and can be found again.

        Raises IllegalTransition when the instance has moved on since the decision; then nothing is sent.
        """
        if isinstance(command, LookForOffers):
            self._looking_since = now
            return
        if isinstance(command, Create):
            if not command.label.startswith(self.fleet_name + "/") or command.label in self.instances:
                raise ConfigError(f"label {command.label!r} is not a new one of fleet {self.fleet_name!r}")
            o = command.offer
            self.instances[command.label] = i = Instance(
                label=command.label,
                state=State.ORDERED,
                since=now,
                why=command.why,
                ordered_at=now,
                machine_id=o.machine_id,
                gpu_name=o.gpu_name,
                num_gpus=o.num_gpus,
                running_usd_h=o.dph_total,
                throughput_work_s=self.profile.throughput_on(o.gpu_name, o.num_gpus),
                orders_out=1,
                asked_at=now,
            )
            self._offers = tuple(other for other in self._offers if other.id != o.id)
            self._remember(i)
            self._record(i, now)
            return
        found = self.instances.get(command.label)
        if found is None or found.id != command.id:
            raise IllegalTransition(f"{command.label}: not there any more")
        i = found
        if isinstance(command, Start):
            if i.state is not State.STARTING:
                self._move(i, State.STARTING, command.why, now)
                i.boot_ordered_at, i.was_hot, i.maybe_busy = now, False, False
        elif isinstance(command, Stop):
            if i.state is not State.STOPPING:
                self._move(i, State.STOPPING, command.why, now)
                i.asked_at = now
        elif isinstance(command, Destroy):
            if i.state is not State.DESTROYING:
                self._condemn(i)
                self._move(i, State.DESTROYING, command.why, now)
                i.asked_at = now
        elif isinstance(command, Drain):
            self._move(i, State.DRAINING, command.why, now)
            i.drain_version = self.hot_version
            return
        else:
            self._move(i, State.HOT, command.why, now)
            return
        i.orders_out += 1

    def finish(
        self,
        command: Command,
        reply: Reply,
        now: float,
        new_id: int | None = None,
        why: str = "",
        *,
        offer_gone: bool = False,
    ) -> None:
        """Note how the cloud answered; once for each order begun. What stays UNKNOWN the listing settles.

        offer_gone: somebody else has it, which says nothing against the next one.
        """
        if isinstance(command, LookForOffers):
            self._looking_since = float("-inf")
            return
        if isinstance(command, Drain | Undrain):
            return
        if offer_gone:
            self.offer_gone(now)
        i = self.instances.get(command.label)
        if i is None:
            return
        i.orders_out, i.answered_at = max(0, i.orders_out - 1), now
        if isinstance(command, Create):
            if reply is Reply.DONE:
                i.id = i.id or new_id
                self._remember(i)
            elif reply is Reply.REFUSED and i.state is State.ORDERED:
                if not offer_gone:
                    self._failed_create(now)
                self._condemn(i)
                self._move(i, State.GONE, why, now)
        elif isinstance(command, Start) and reply is Reply.REFUSED and i.state is State.STARTING:
            i.refused_starts += 1
            rest = self.deadlines.repeat * 2 ** min(i.refused_starts, 10)
            i.no_start_before = now + min(rest, self.deadlines.no_gpu_rest)
            self._move(i, State.COLD, f"start refused: {why}", now)
        elif isinstance(command, Destroy) and reply is Reply.DONE:
            i.destroyed = True
            self._took("destroy", i.asked_at, now)

    def offers_found(self, offers: Iterable[Offer], now: float) -> None:
        """The market as it was searched now."""
        self._offers = tuple(offers)
        self._offers_at = now
        self._looking_since = float("-inf")

    def offer_gone(self, now: float) -> None:
        """Somebody else took an offer: the market is searched again before the next create."""
        self._offers_at = min(self._offers_at, now - self.deadlines.offers - 1.0)

    # -- what others ask ----------------------------------------------------------------------------

    def checks_due(self, now: float, under_way: Collection[str] = ()) -> list[HealthCheckOrder]:
        """The health checks to make now; each is counted as made. under_way: labels that are being checked.

        Nothing is checked before a listing of this process said where it is.
        """
        due = []
        for i in self.instances.values():
            if i.state not in CHECKED or i.id is None or not i.listed:
                continue
            if i.label in under_way:
                continue
            every = self.check_hot_every_s if i.state is State.HOT else self.check_boot_every_s
            if now - i.last_check_at < every:
                continue
            i.last_check_at = now
            i.checks += 1
            # Reading the log of a hot instance costs an ssh handshake; the prompt is the sharper test.
            read_log = i.state is State.RUNNING or (i.state is State.HOT and i.checks % 4 == 0)
            due.append(
                HealthCheckOrder(
                    i.label, i.id, i.state, i.ssh, i.auth_url, i.address, read_log, i.certificate
                )
            )
        return due

    def record_message(self, label: str, boot_id: str, number: int, why: str) -> bool:
        """The instance says how it is. It is looked at now; what it says makes nothing hot or failed.

        False when it was heard before.
        """
        i = self.instances.get(label)
        if i is None or not i.replay_guard.accept(boot_id, number):
            return False
        i.last_check_at = float("-inf")
        if i.state is State.RUNNING:
            i.why = f"it says: {why}"
        return True

    def record_report(self, throughput_work_s: Mapping[int, float], failing: Collection[int]) -> None:
        """Take in what a loadbalancer says of instances, by id.

        throughput_work_s: measured work per second; a change of less than 2 % is noise. failing: instances
        with new failures, whose next health check is due at once.
        """
        for i in self.instances.values():
            if i.id in failing:
                i.last_check_at = float("-inf")
            new = throughput_work_s.get(i.id) if i.id is not None else None
            if new is not None and abs(new - i.throughput_work_s) > 0.02 * i.throughput_work_s:
                i.throughput_work_s = new
                self._remember(i)

    @property
    def hot(self) -> int:
        """Instances that are hot."""
        return sum(i.state is State.HOT for i in self.instances.values())

    def serving(self) -> list[Instance]:
        """The hot and the draining, in a fixed order."""
        return sorted(
            (i for i in self.instances.values() if i.state in SERVING and i.address and i.auth_url),
            key=lambda i: i.id or 0,
        )

    def expected_hot_s(self, now: float) -> float | None:
        """Seconds until one more is likely hot; None when none is on its way."""
        waits = []
        for i in self.instances.values():
            if i.state is State.STARTING or (i.state is State.RUNNING and i.loaded):
                waits.append(self.start_time_s - (now - (i.boot_ordered_at or i.since)))
            elif i.state in (State.ORDERED, State.LOADING, State.RUNNING):
                waits.append(self.load_time_s - (now - i.ordered_at))
        return max(1.0, min(waits)) if waits else None

    def take_journal(self) -> Journal:
        """What happened since the last call, for ledger and log."""
        journal, self._journal = self._journal, Journal()
        return journal

    def put_back(self, journal: Journal) -> None:
        """It could not be written: the next `take_journal` has it again."""
        self._journal = journal.before(self._journal)

    # -- inside -------------------------------------------------------------------------------------

    def _comes_back(self, i: Instance) -> bool:
        """Running and on its way to hot with the model on its disk, as far as we know."""
        return i.state is State.RUNNING and (i.loaded or i.label in self._unverified)

    def _by_state(self) -> dict[State, list[Instance]]:
        found: dict[State, list[Instance]] = {state: [] for state in State}
        for i in self.instances.values():
            found[i.state].append(i)
        return found

    def _move(self, i: Instance, to: State, why: str, now: float) -> None:
        check_move(i.state, to)
        spent = now - i.since
        self._journal.log.append(f"{i.id or i.label} {i.state} -> {to}: {why} (after {spent:.0f} s)")
        if (i.state in SERVING) or (to in SERVING):
            self.hot_version += 1
        if i.state is State.DESTROYING and to is State.GONE:
            self._took("destroyed", i.asked_at, now)
        if to is State.GONE:
            why = f"{why} (was {i.state}: {i.why})"
            self.gone.append(i)
        i.state, i.since, i.why = to, now, why
        self._record(i, now)
        if to is State.GONE:
            self._remember(i)
            del self.instances[i.label]

    def _fail(self, i: Instance, why: str, now: float) -> None:
        if i.state in (State.FAILED, State.DESTROYING, State.GONE):
            return
        if not i.loaded:
            self._failed_create(now)
        if i.machine_id is not None:
            until = now + self.deadlines.bad_machine
            self.bad_machines[i.machine_id] = until
            self._journal.bad_machines[i.machine_id] = (until, why)
        self._condemn(i)
        self._move(i, State.FAILED, why, now)

    def _vanish(self, i: Instance, why: str, now: float) -> None:
        """Gone, as far as the listing can be trusted: it goes on counting against the limits for a while."""
        usd_h = max(i.price_usd_h, i.running_usd_h)
        self._vanished[i.label] = self._journal.vanished[i.label] = (now + self.deadlines.vanished, usd_h)
        self._move(i, State.GONE, why, now)

    def _failed_create(self, now: float) -> None:
        if now < self._no_create_before:
            return  # ordered together with one that failed: the same trouble, not the next
        self._failed_creates += 1
        rest = min(900.0, self.deadlines.create_rest * 2 ** min(self._failed_creates - 1, 10))
        self._no_create_before = now + rest
        self.offer_gone(now)

    def _condemn(self, i: Instance) -> None:
        """Whatever the cloud does later, this label is not to live on."""
        i.condemned = True
        self._condemned.add(i.label)
        self._remember(i)

    def _hot_changed(self) -> None:
        self.hot_version += 1

    def _took(self, kind: str, since: float, now: float) -> None:
        self._journal.durations.append((kind, now, now - since))

    def _time_it(self) -> None:
        """Medians of the last measured times from start and from order to hot; till then the profile's."""
        self.start_time_s = _median(self._start_times) or self.profile.start_time_s / self.speedup
        self.load_time_s = _median(self._load_times) or self.profile.load_time_s / self.speedup

    @property
    def start_range_s(self) -> tuple[float, float]:
        """The shortest and the longest start-to-hot time measured lately, or the profile's -+ a third."""
        if len(self._start_times) > 1:
            return min(self._start_times), max(self._start_times)
        return self.start_time_s * 2.0 / 3.0, self.start_time_s * 4.0 / 3.0

    def _remember(self, i: Instance) -> None:
        self._journal.fleet[i.label] = SavedInstance(
            i.label,
            i.id,
            i.machine_id,
            i.loaded,
            i.condemned,
            i.ordered_at,
            i.throughput_work_s,
            i.state,
            i.since,
            i.price_usd_h,
            i.running_usd_h,
        )

    def _record(self, i: Instance, now: float) -> None:
        self._journal.intervals.append(
            BillingInterval(
                i.label,
                i.id,
                i.machine_id,
                str(i.state),
                now,
                None,
                i.price_usd_h,
                i.running_usd_h,
                i.why,
            )
        )
        if i.state is not State.GONE:
            self._remember(i)

    def describe(self, now: float) -> list[dict[str, Any]]:
        """Every instance for `GET /instances`; no secret is in it."""
        order = sorted(self.instances.values(), key=lambda i: (i.ordered_at, i.label))
        return [self._described(i, now) for i in order]

    def describe_gone(self, now: float) -> list[dict[str, Any]]:
        """The last that went, newest first, and why."""
        return [self._described(i, now) for i in reversed(self.gone)]

    def _described(self, i: Instance, now: float) -> dict[str, Any]:
        return {
            "id": i.id,
            "label": i.label,
            "machine_id": i.machine_id,
            "state": str(i.state),
            "since": i.since,
            "seconds_in_state": round(now - i.since, 1),
            "why": i.why,
            "gpu_name": i.gpu_name,
            "num_gpus": i.num_gpus,
            "price_usd_h": round(i.price_usd_h, 6),
            "running_usd_h": round(i.running_usd_h, 6),
            "address": i.address,
            "loaded": i.loaded,
            "throughput_work_s": round(i.throughput_work_s, 1),
        }


class _Room:
    """What the hard limits still leave while one decision is put together: the one place that checks them."""

    def __init__(self, fleet: InstanceSet, begun: Iterable[Command]) -> None:
        self._limits = fleet.limits
        self._instances = fleet.committed_instances()
        self._usd_h = fleet.committed_usd_h()
        self.stopped = {c.label for c in begun if isinstance(c, Stop | Destroy)}
        self.started: set[str] = set()

    def admit(
        self, command: Start | Create, more_usd_h: float, more_instances: int, notes: list[str]
    ) -> bool:
        """Whether the order fits; if so it is counted."""
        what = type(command).__name__.lower()
        if more_instances and self._instances + more_instances > self._limits.max_instances:
            notes.append(f"{what} refused: {self._instances} of {self._limits.max_instances} instances")
            return False
        if self._usd_h + more_usd_h > self._limits.max_usd_h + 1e-9:
            notes.append(
                f"{what} refused: {self._usd_h:.3f} + {more_usd_h:.3f} $/h is over {self._limits.max_usd_h:g}"
            )
            return False
        self._instances += more_instances
        self._usd_h += more_usd_h
        if isinstance(command, Start):
            self.started.add(command.label)
        return True


def _clamp(what: str, wanted: int, most: int, notes: list[str], clamped: list[str]) -> int:
    """The wanted number inside 0 … most; says so when it was not."""
    kept = max(0, min(wanted, most))
    if kept != wanted:
        clamped.append(what)
        notes.append(f"the policy wanted {wanted} {what}: clamped to {kept}")
    return kept


def _median(values: Sequence[float]) -> float | None:
    """None of none. `statistics.median` takes five times as long, and every turn asks four times."""
    if not values:
        return None
    order = sorted(values)
    half = len(order) // 2
    return order[half] if len(order) % 2 else (order[half - 1] + order[half]) / 2.0


def _since(before: float | None, now: float, lasts: bool) -> float | None:
    """Since when something lasts, given since when it did before."""
    return (now if before is None else before) if lasts else None


def _says_broken(status_msg: str | None) -> bool:
    if not status_msg:
        return False
    message = status_msg.lower()
    return any(words in message for words in BROKEN_HOST)


def _cheapest_first(i: Instance) -> tuple[float, str]:
    return i.usd_per_work, i.label


def _likeliest_first(i: Instance) -> tuple[int, float, str]:
    """By how often it could not be started since it was last hot, then by price per throughput."""
    return i.failed_starts + i.refused_starts, i.usd_per_work, i.label


def _ssh_address(row: Row) -> tuple[str, int] | None:
    """Direct where the listing maps port 22, else the cloud's proxy (vast-contract 2.7)."""
    if row.public_ip and 22 in row.ports:
        return row.public_ip, row.ports[22]
    return (row.ssh_host, row.ssh_port) if row.ssh_host and row.ssh_port else None
