"""The autoscaler's turns: list, observe and decide under the lock, then send the commands."""

import logging
import secrets
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from autoscaler import InstanceSet
from fleet.arrivals import ARRIVING_S, MIX_S
from fleet.commands import (
    AskPage,
    Command,
    Create,
    Destroy,
    LookForOffers,
    Performed,
    Reply,
    Start,
    Stop,
    with_label,
)
from fleet.demand import Demand
from fleet.evidence import Health
from fleet.health_check import HealthCheck, HealthCheckOrder
from fleet.history import History, take_sample
from fleet.instance_messages import Hearing
from fleet.journal import Decision, remember
from fleet.outside.ledger import Ledger
from fleet.outside.ledger_prices import LOOKED_AT
from fleet.outside.ledger_reading import BUCKET_S
from fleet.outside.order_queue import OrderQueue
from fleet.outside.own_health import OwnHealth
from fleet.outside.performer import Performer
from fleet.outside.spending import Spending
from fleet.states import CHECKED, IllegalTransition, State
from policies import Policy
from process.clock import steady_clock
from process.errors import CloudError
from vast.client import Vast
from vast.rows import Row
from web.messages.busy import BusyReport
from web.messages.reports import ReadyBody

log = logging.getLogger("autoscaler")


# --- outside world ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A command that the cloud did not do, or perhaps not, and why."""

    at: float
    command: Command
    reply: Reply
    why: str


REMEMBERED_S = max(ARRIVING_S, MIX_S)
"""Seconds of the arrivals in the ledger that a new process takes over."""

COUNTS_EVERY_S = 30.0
"""Seconds between two writes of seconds worked and arrivals: a kill loses no more, and a turn stays cheap."""


class Autoscaler:
    """Takes turns: lists, observes and decides under the lock, then sends the orders.

    Two threads call it: one runs `turn` at every poll interval, one runs `perform_next` for ever. The Flask
    routes and the health checks call the rest from others. `lock` is held for arithmetic only; another lock
    makes writers to the ledger wait, so that it learns things in the order in which they happened.
    """

    def __init__(
        self,
        instances: InstanceSet,
        policy: Policy,
        demand: Demand,
        vast: Vast,
        performer: Performer,
        ledger: Ledger,
        clock: Callable[[], float] | None = None,
        new_label: Callable[[], str] = lambda: secrets.token_hex(6),
    ) -> None:
        """Take over the fleet that the ledger knows; nothing is asked of the cloud yet.

        clock: never goes back. new_label: returns the name of a new instance in its fleet, each time another.
        """
        self.lock = threading.Lock()
        self.instances = instances
        self.policy = policy
        self.demand = demand
        self.decisions: deque[Decision] = deque(maxlen=500)
        self.failures: deque[Failure] = deque(maxlen=100)
        self.clamps: Counter[str] = Counter()  # turns in which the policy wanted what the limits forbid
        self.history = History(instances.speedup)
        self.last_good_turn: float | None = None
        self.last_error = "no turn yet"
        self._new_label = new_label
        self._worked: defaultdict[tuple[str, int], float] = defaultdict(float)  # s by label, bucket; unsaved
        self._counts_at = float("-inf")
        self._vast = vast
        self._performer = performer
        self.ledger = ledger
        self._spending = Spending(instances.money, ledger)
        self.own = OwnHealth()
        self.clock = clock or steady_clock()
        self._writing = threading.Lock()
        self.orders = OrderQueue()
        self._ending = False
        self.turn_due = threading.Event()  # the next turn should not wait for its time
        now = self.clock()
        instances.restore(ledger.saved_fleet(now), now)
        demand.history.restore(ledger.arrived(now - REMEMBERED_S, now), instances.profile.prefill_weight)

    def set_policy(self, policy: Policy) -> None:
        """Let that policy decide from the next turn on; the caller holds `lock`."""
        self.policy = policy

    def turn(self) -> Decision:
        """Take one turn; raise when the ledger cannot be written. Without a listing nothing is decided."""
        rows, trouble = self._list()
        now = self.clock()
        self._mind_ledger(now, looked=rows is not None)
        spent_usd = self._spending.spent(now)
        with self.lock:
            self.instances.observe(rows, (), now)
            self.instances.settle_money(spent_usd, now)
            self.demand.tick(now, self.instances.hot)
            decision = self.instances.decide(self.demand, self.policy, now, writable=self.own.writable)
            if trouble is not None:
                decision = replace(decision, notes=(*decision.notes, trouble))
            begun = self._begin(decision, now)
            remember(self.decisions, decision)
            self.history.note(take_sample(decision, self.instances, self.demand, self.history))
            self.clamps.update(decision.clamped)
        self._send(begun)
        self._spending.keep()
        if now >= self._counts_at:
            self.write_counts()
        if rows is not None and self.instances.listing_believed:
            self.last_good_turn = now
        elif rows is not None:
            self.last_error = "the listing lacks most of the fleet"
        return decision

    def note_failed_turn(self, error: Exception) -> None:
        """Keep the error that a turn raised, for `GET /health`."""
        self.last_error = f"a turn failed: {type(error).__name__}: {error}"

    def _list(self) -> tuple[list[Row] | None, str | None]:
        """Return (the listed rows of this fleet, None), or (None, why there are none)."""
        try:
            return self._vast.list_instances(self.instances.fleet_name + "/"), None
        except CloudError as e:
            self.last_error = str(e)
            log.warning("listing failed, nothing is decided this turn: %s", e)
            return None, self.last_error

    def _send(self, begun: Sequence[Command]) -> None:
        """Write down the orders that were begun, then queue them for sending.

        After a kill in between the label is known, and its order is looked for. What cannot be written down
        is not sent, but the stop of what is drained: to go on costs money, to stop unrecorded does not.
        """
        try:
            self._flush()
        except Exception as e:  # whatever it was: what was begun is either sent or known not to be
            unsent = Performed(Reply.UNSENT, f"not sent, the ledger cannot be written: {e}")
            for command in begun:
                if isinstance(command, Stop | AskPage):
                    self.orders.put(command)
                else:
                    with self.lock:
                        self.instances.finish(command, unsent, self.clock())
            raise
        for command in begun:
            self.orders.put(command)

    def _begin(self, decision: Decision, now: float) -> list[Command]:
        begun: list[Command] = []
        for command in decision.commands:
            if isinstance(command, Create):
                command = with_label(command, f"{self.instances.fleet_name}/{self._new_label()}")
            try:
                self.instances.begin(command, now)
            except IllegalTransition as e:
                log.warning("order dropped: %s", e)
                continue
            begun.append(command)
        return begun

    def perform_next(self) -> bool:
        """Send the next order and note the cloud's reply; False when `stop_performing` was called."""
        command = self.orders.take()
        if command is None:
            return False
        if self._ending and isinstance(command, Create | Start | LookForOffers):
            self._noted(command, Performed(Reply.UNSENT, "not sent: the autoscaler ends"))
            return True
        sent_at = self.clock()
        try:
            done = replace(self._performer.perform(command), sent_at=sent_at)
        except Exception as e:
            log.exception("%s: a fault of ours", _words(command))
            done = Performed(Reply.UNKNOWN, f"a fault of ours, the log has it: {type(e).__name__}")
        self._noted(command, done)
        return True

    def stop_performing(self) -> None:
        """Rent and start no more; let `perform_next` return False once begun stops and destroys are sent."""
        self._ending = True
        self.orders.end()

    def _noted(self, command: Command, done: Performed) -> None:
        now = self.clock()
        if done.reply is not Reply.DONE:
            log.warning("%s: %s: %s", _words(command), done.reply, done.why)
        with self.lock:
            if done.reply is not Reply.DONE:
                self.failures.append(Failure(now, command, done.reply, done.why))
            self.instances.finish(command, done, now)
        self.flush_soon()

    def checks_due(self, under_way: Collection[str] = ()) -> list[HealthCheckOrder]:
        """Return the health checks to make now, except of labels that are being checked."""
        with self.lock:
            return self.instances.checks_due(self.clock(), under_way)

    def judge(self, check: HealthCheck) -> None:
        """Apply a finished health check at once: a new hot instance should not wait for the next turn."""
        with self.lock:
            self.instances.judge(check, self.clock())
        self.flush_soon()

    def remember_host_key(self, label: str, key: str) -> str:
        """Return the ssh host key that is believed of the instance; a new one is kept for the ledger."""
        with self.lock:
            return self.instances.remember_host_key(label, key, self.clock())

    def wants_reach(self) -> bool:
        """Return whether our own network should be checked, because a machine does not answer."""
        with self.lock:
            return self.instances.wants_reach

    def record_reach(self, health: Health) -> None:
        """Take in what a check of our own network found."""
        with self.lock:
            self.instances.record_reach(health, self.clock())

    def record_message(self, label: str, said: ReadyBody) -> Hearing:
        """Take in a message that an instance sends about itself; return what became of it."""
        with self.lock:
            hearing = self.instances.record_message(label, said, self.clock())
            if hearing.taken and self.instances[label].state not in CHECKED:
                self.turn_due.set()  # the last listing is older than the machine
        return hearing

    def record_report(self, report: BusyReport) -> None:
        """Take in the busy report of a loadbalancer."""
        now = self.clock()
        measured = {i: u.throughput_work_s for i, u in report.instances.items() if u.throughput_work_s > 0.0}
        self.own.note_report(report.loadbalancer, now)
        with self.lock:
            worked, failing = self.demand.add_report(report, now)
            self.instances.record_report(measured, failing, now, self.demand.slow())
            if worked:
                bucket = int(now // BUCKET_S)
                for i in self.instances:
                    seconds = worked.get(i.id) if i.id is not None else None
                    if seconds is not None:
                        self._worked[i.label, bucket] += seconds

    def write_counts(self) -> None:
        """Write the instances' working seconds and the arrived requests to the ledger.

        Every COUNTS_EVERY_S a turn of the autoscaler does it, too.
        """
        with self._writing:
            now = self.clock()
            with self.lock:
                worked, self._worked = self._worked, defaultdict(float)
                arrived = self.demand.history.take_unsaved()
                samples = self.history.take_unsaved()
                self._counts_at = now + COUNTS_EVERY_S
            try:
                self.ledger.add_counts(worked, arrived, now, samples)
            except Exception as e:
                self.own.note_unwritten(e, now)
                with self.lock:
                    for where, seconds in worked.items():
                        self._worked[where] += seconds
                    self.demand.history.put_back(arrived)
                    self.history.put_back(samples)
                raise

    def try_write_counts(self) -> bool:
        """Write working seconds and arrivals to the ledger if possible; return whether it was possible."""
        return self._try_to(self.write_counts)

    def destroy(self, why: str, label: str | None = None) -> None:
        """Order the end of one instance, or of all, busy ones too, because a person asked."""
        now = self.clock()
        with self.lock:
            commands = [
                Destroy(i.label, i.id, why, f"a person asked: {why}")
                for i in self.instances
                if label in (None, i.label) and i.id is not None and i.state is not State.DESTROYING
            ]
            decision = Decision(now, None, None, tuple(commands), (why,))
            begun = self._begin(decision, now)
            remember(self.decisions, decision)
        self._send(begun)

    def _flush(self) -> None:
        """Log and write to the ledger what has happened; what cannot be written is kept for the next time."""
        with self._writing:
            with self.lock:
                entries = self.instances.journal.take()
            for line in entries.lines:
                log.info("%s", line)
            if not entries:
                return
            try:
                self.ledger.write(entries)
            except Exception as e:
                self.own.note_unwritten(e, self.clock())
                with self.lock:
                    self.instances.journal.put_back(entries)
                raise

    def flush_soon(self) -> None:
        """Write to the ledger what has happened, or leave it to the next turn."""
        self._try_to(self._flush)

    def _try_to(self, write: Callable[[], None]) -> bool:
        """Call a function that writes to the ledger; return whether it could. Failures are logged rarely."""
        try:
            write()
        except Exception as e:  # noqa: BLE001 it is told, and what was to be written is kept
            self.own.complain("not written down yet", e, self.clock())
            return False
        return True

    def _mind_ledger(self, now: float, *, looked: bool) -> None:
        """Begin a ledger that is damaged or lost anew, and try one that failed; then no machine is late.

        looked: the cloud was looked at, which is noted.
        """
        try:
            if self.ledger.begin_anew():
                with self.lock:
                    self.instances.record_anew(now)
            elif self.own.writable and not looked:
                return
            self.ledger.note({LOOKED_AT if looked else "tried_at": now})
        except Exception as e:  # noqa: BLE001 it is noted, and said by GET /health
            self.own.note_unwritten(e, now)
            return
        if self.own.note_written():
            log.info("the ledger can be written again")
            with self.lock:
                self.instances.excuse(now)


def _words(command: Command) -> str:
    """Return a command in words, for a log line."""
    name = type(command).__name__.lower()
    if isinstance(command, LookForOffers):
        return name
    return f"{name} {command.label}"
