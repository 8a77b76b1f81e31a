"""Chapter 1: the fleet's instances, and what to ask of the cloud next.

`InstanceSet` is arithmetic only: no I/O, no clock, no lock of its own. A turn is three calls with the I/O
between them:

    observe(rows, checks, now)     copy what the world says; deadlines          fleet/reconcile.py
    decide(demand, policy, now)    what was seen, what is wanted, which commands fleet/planner.py
    begin / finish(command)        an order was written down / its reply came   fleet/reconcile.py

The parts, each of which owns its data: `Reconciler` (the instances and their states), `Market` (offers, bad
machines, pauses after failed creates), `Holds` (why nothing is rented at all), `MeasuredDurations` (how long
starts and loads take), `Journal` (what the ledger must learn). The states are in fleet/states.py, one
instance in fleet/instance.py, draining in fleet/drain.py, the hard limits in fleet/limits.py; threads, the
cloud and the disk are in fleet/outside/.

Invariants
- Exactly one place makes an instance hot (`judge`), exactly one checks the hard limits (`LimitGuard`).
- An order counts as capacity and as money from `begin` until it is seen or its deadline has passed.
- A listing that failed, or that lost most of what was there, is "unknown": nothing is decided on it, no
  deadline passes, and what answers a test prompt exists whatever the listing says.
- Nothing with requests is stopped, unless it failed, passed its drain deadline, or a person asked.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from engine.profile import Profile
from fleet import planner
from fleet.blame import Blame
from fleet.commands import AskPage, Command, Drain, LookForOffers, Performed, Undrain
from fleet.contract_ends import Horizon
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.drain import drained
from fleet.durations import MeasuredDurations
from fleet.evidence import Health
from fleet.health_check import HealthCheck, HealthCheckOrder
from fleet.holds import Holds
from fleet.host_keys import HostKeys
from fleet.instance import Instance
from fleet.instance_messages import Hearing
from fleet.journal import Decision, Journal, SavedFleet
from fleet.limits import Commitment, Limits, commitment
from fleet.market import Market
from fleet.money import Money
from fleet.planner import Situation
from fleet.preferences import ANY_MACHINE, Preferences
from fleet.reconcile import Reconciler
from fleet.slow_counters import compare_counters
from fleet.snapshot import take_snapshot
from fleet.states import CHECKED, SERVING, State
from fleet.unasked_stops import UnaskedStops
from policies import FleetSnapshot, Policy
from vast.rows import Row
from web.messages.reports import ReadyBody


class InstanceSet:
    """All instances of one fleet, in the order in which they were ordered or found."""

    def __init__(
        self,
        fleet_name: str,
        profile: Profile,
        limits: Limits,
        deadlines: Deadlines,
        speedup: float = 1.0,
        check_hot_every_s: float = 15.0,
        check_boot_every_s: float = 3.0,
        *,
        manage: bool = True,
        preferences: Preferences = ANY_MACHINE,
    ) -> None:
        """Begin without instances. fleet_name: labels of the fleet are `<fleet_name>/<something>`.

        speedup: of a local cloud, which divides the profile's times. check_hot_every_s, check_boot_every_s:
        seconds between health checks of a hot instance, and of others. manage: see `set_manage`. preferences:
        which machines are rented.
        """
        self.fleet_name = fleet_name
        self.profile = profile
        self.limits = limits
        self.deadlines = deadlines
        self.speedup = speedup
        self.manage = manage
        self.journal = Journal()
        self.holds = Holds(self.journal.log)
        self.durations = MeasuredDurations(profile, speedup)
        self.preferences = preferences
        self.market = Market(profile, deadlines, preferences)
        self._host_keys = HostKeys()
        self._check_every_s = {True: check_hot_every_s, False: check_boot_every_s}  # by whether it is hot
        gb = profile.download_gb / speedup  # billed by a sped-up cloud: bytes shrink as hours do
        self.money = Money(limits, deadlines, gb, self.holds)
        self.blame = Blame(self.holds, self.market, self.journal, deadlines)
        stops = UnaskedStops(self.money.credit, self.market, self.journal)
        parts = self.market, self.blame, self.durations, self.journal, stops, gb
        self._reconciler = Reconciler(fleet_name, profile, deadlines, *parts)

    def restore(self, saved: SavedFleet, now: float) -> None:
        """Take over the fleet that the last process saved; instances that were hot have to be checked."""
        self.market.restore(saved.bad_machines)
        self.durations.restore(saved.start_times_s, saved.load_times_s)
        self._host_keys.restore(saved.host_keys)
        self.money.budgets.restore(saved.used_up)
        self._reconciler.restore(saved, now)

    def set_manage(self, manage: bool) -> None:
        """Set whether new orders are made; orders that were begun are finished either way.

        Switched on, also again, it says that what held creates back is mended.
        """
        self.manage = manage
        if manage:
            self.blame.mended()

    # -- a turn ----------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[Row] | None, checks: Iterable[HealthCheck], now: float) -> None:
        """Copy what the world says: a listing (None when it failed), then the finished health checks."""
        self._reconciler.observe(rows, checks, now)

    def judge(self, check: HealthCheck, now: float) -> None:
        """Apply one finished health check."""
        self._reconciler.judge(check, now)

    def decide(self, demand: Demand, policy: Policy, now: float, *, writable: bool = True) -> Decision:
        """Return what to ask of the cloud so that the fleet's capacity meets demand; change nothing.

        Calling it twice gives the same answer. On a listing that is not believed nothing is decided; while
        the ledger is not writable, nothing that it would have to know.
        """
        return planner.decide(self.situation(demand, now, policy.memory_s, writable=writable), policy)

    def situation(
        self, demand: Demand, now: float, memory_s: float = math.inf, *, writable: bool = True
    ) -> Situation:
        """Return all that a decision now depends on, for a policy that looks back memory_s seconds."""
        return Situation(
            now=now,
            believed=self.listing_believed,
            snapshot=self.snapshot(demand, now, memory_s),
            instances=tuple(self),
            drained=drained(self, demand, self.deadlines.lease_s),
            market=self.market.snapshot(now),
            committed=self.committed(),
            limits=self.limits,
            deadlines=self.deadlines,
            manage=self.manage,
            writable=writable,
            heard=demand.heard(now),
            holds=tuple(self.holds),
            preferences=self.preferences,
            purse=self.money.purse(self.durations.load_s, now),
            horizon=self.horizon,
        )

    @property
    def horizon(self) -> Horizon:
        """How far ahead the ends of contracts matter."""
        return Horizon(self.durations.load_s, self.durations.start_s, self.deadlines.draining_s)

    def settle_money(self, spent_usd: Mapping[str, float], now: float) -> None:
        """Take in what the fleet has spent by the ledger: dollars by the names of budgets' periods."""
        self.money.settle(spent_usd, self, self.durations.load_s, now)

    def note_credit(self, usd: float, now: float) -> None:
        """Take in the credit that the cloud's account has, in dollars."""
        self._reconciler.note_credit(usd, now)

    def begin(self, command: Command, now: float) -> None:
        """Write an order down before it is sent, so that it counts and can be found again.

        Raises IllegalTransition when the instance has moved on since the decision; then nothing is sent.
        """
        if isinstance(command, LookForOffers):
            self.market.begin_search(now)
        else:
            self._reconciler.begin(command, now)

    def finish(self, command: Command, done: Performed, now: float) -> None:
        """Note how the cloud answered a begun order, once. What stays UNKNOWN the next listing settles."""
        if done.offer_gone:
            self.market.note_offer_gone(now)
        if isinstance(command, LookForOffers):
            self.market.end_search(done.offers, now)
            self.blame.note_search(done, now)
        elif isinstance(command, AskPage):
            self._reconciler.finish_page(command, done, now)
        elif not isinstance(command, Drain | Undrain):
            self._reconciler.finish(command, done, now)

    def record_anew(self, now: float) -> None:
        """Put all that a ledger must know into the journal: it begins anew."""
        for label, key in self._host_keys:
            self.journal.add_host_key(label, key)
        self._reconciler.record_anew(now)

    def excuse(self, now: float) -> None:
        """Let no deadline pass for a while, because for some time a fault of ours kept us from acting."""
        self._reconciler.excuse(now)

    # -- health checks and reports ---------------------------------------------------------------------

    def checks_due(self, now: float, under_way: Collection[str] = ()) -> list[HealthCheckOrder]:
        """Return the health checks to make now, and count them as made.

        under_way: labels of instances that are being checked. An instance is not checked before a listing has
        shown to this process where it is.
        """
        due = []
        for i in self:
            every_s = self._check_every_s[i.state is State.HOT]
            if i.state in CHECKED and i.label not in under_way and now - i.last_check_at >= every_s:
                due.append(i.order_check(now))
        return [order for order in due if order is not None]

    def remember_host_key(self, label: str, key: str, now: float) -> str:
        """Take in the ssh host key that an instance shows; return the one that is believed of it."""
        if self._host_keys.show(label, key, self._reconciler.instances.get(label), now):
            self.journal.add_host_key(label, key)
        return self._host_keys.get(label) or key

    @property
    def wants_reach(self) -> bool:
        """Whether it should be checked that our own network works, because a health check met nobody."""
        return self._reconciler.wants_reach()

    def record_reach(self, health: Health, now: float) -> None:
        """Take in what a check of our own network found."""
        self._reconciler.reach.note(health, now)

    def record_message(self, label: str, said: ReadyBody, now: float) -> Hearing:
        """Take in a message that an instance sends about itself; return whether it was news.

        It makes nothing hot or failed; the next health check is due at once.
        """
        return self._reconciler.hear(label, said, now)

    def record_report(
        self,
        throughput_work_s: Mapping[int, float],
        failing: Collection[int],
        now: float,
        slow: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Take in what a loadbalancer reports of instances, by their ids.

        throughput_work_s: measured work per second. failing: instances where clients met new failures: that
        is evidence of its own, and their next health check is due at once. slow: those that clients find
        many times slower than their peers, by all loadbalancers' words, and in which way.
        """
        for i in self:
            if i.id is None:
                continue
            if i.id in failing:
                i.check_at_once()
                i.trouble.note_clients(now)
            if i.trouble.slow.note_clients(slow.get(i.id), now):
                i.check_at_once()
                self.journal.log(f"{i.id} {i.label}: slow: {slow[i.id]}")
            measured = throughput_work_s.get(i.id)
            if measured is not None and i.measure(measured):
                self.journal.save(i.saved())
        if slow:
            compare_counters((i for i in self if i.state is State.HOT), self.profile)

    # -- what a person asks ----------------------------------------------------------------------------

    def take_out(self, label: str, *, for_good: bool) -> None:
        """Drain an instance, whatever the policy wants. for_good: destroy it after that, and rent another."""
        self[label].taken_out.ask(for_good=for_good)

    def ban(self, machine_id: int, why: str, now: float, for_s: float | None = None) -> None:
        """Rent a machine no more for so many seconds; None: for as long as one that failed."""
        until = self.market.avoid(machine_id, why, now, for_s)
        self.journal.add_bad_machine(machine_id, until, why)

    def forgive(self, machine_id: int, now: float) -> bool:
        """Let a machine that failed or was banned be rented again; return whether it was avoided."""
        avoided = self.market.forgive(machine_id)
        if avoided:
            self.journal.add_bad_machine(machine_id, now, "forgiven")
        return avoided

    # -- what others ask -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Instance]:
        """Iterate over the instances of the fleet."""
        return iter(self._reconciler.instances.values())

    def __len__(self) -> int:
        """Return the number of instances, failed ones and those being destroyed included."""
        return len(self._reconciler.instances)

    def __contains__(self, label: object) -> bool:
        """Return whether the fleet has an instance with that label."""
        return label in self._reconciler.instances

    def __getitem__(self, label: str) -> Instance:
        """Return the instance with that label; raise KeyError without one."""
        return self._reconciler.instances[label]

    def snapshot(self, demand: Demand, now: float, memory_s: float = math.inf) -> FleetSnapshot:
        """Return the fleet in numbers, for a policy that looks back memory_s seconds."""
        return take_snapshot(self, demand, self.profile, self.durations, now, memory_s)

    def committed(self) -> Commitment:
        """Return the instances and $/h that exist or may exist, which the hard limits are held against."""
        return commitment(self, (usd_h for _, usd_h in self._reconciler.vanished.values()))

    @property
    def listing_believed(self) -> bool:
        """Whether the last listing of the cloud came and is believed."""
        return self._reconciler.listing.believed

    @property
    def hot(self) -> int:
        """How many instances are hot."""
        return sum(i.state is State.HOT for i in self)

    @property
    def hot_version(self) -> int:
        """The version of the hot set; it grows with each change of that set."""
        return self._reconciler.hot_version

    def knows_hot_set(self) -> bool:
        """Return whether it is known what is hot: a listing came, and no check after a restart is missing."""
        return self._reconciler.listing.read_at is not None and not any(i.unverified for i in self)

    def serving(self) -> list[Instance]:
        """Return the hot and the draining instances, ordered by id."""
        return sorted(
            (i for i in self if i.state in SERVING and i.address and i.auth_url), key=lambda i: i.id or 0
        )

    def expected_hot_s(self, now: float) -> float | None:
        """Return in how many seconds one more instance is likely to be hot; None when none is on its way."""
        waits = []
        for i in self:
            if i.state is State.STARTING or (i.state is State.RUNNING and i.loaded):
                waits.append(self.durations.start_s - (now - (i.boot.ordered_at or i.since)))
            elif i.state in (State.ORDERED, State.LOADING, State.RUNNING):
                waits.append(self.durations.load_s - (now - i.ordered_at))
        return max(1.0, min(waits)) if waits else None

    def describe(
        self, now: float, out: Mapping[int, str] = MappingProxyType({})
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return (all instances, those that went last, newest first) as JSON for people, without secrets.

        out: the instances that a loadbalancer does not listen to, and why.
        """
        there = sorted(self, key=lambda i: (i.ordered_at, i.label))
        rows = [_described_there(i, now, out, self._host_keys.get(i.label)) for i in there]
        return rows, [_described(i, now) for i in reversed(self._reconciler.gone)]


def _described_there(i: Instance, now: float, out: Mapping[int, str], host_key: str | None) -> dict[str, Any]:
    return _described(i, now) | {"out": out.get(i.id or 0), "host_key": host_key}


def _described(i: Instance, now: float) -> dict[str, Any]:
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
        "stopped_usd_h": round(i.stopped_usd_h, 6),
        "contract_ends": i.terms.ends_at if i.terms.ends_at != math.inf else None,
        "address": i.address,
        "ssh": None if i.ssh is None else f"{i.ssh[0]}:{i.ssh[1]}",
        "loaded": i.loaded,
        "throughput_work_s": round(i.throughput_work_s, 1),
        "slow": i.trouble.slow.said,
    }
