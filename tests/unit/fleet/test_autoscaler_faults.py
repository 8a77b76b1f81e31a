"""Days of bad luck, each replayed from its seed: whatever happens, the invariants of the design hold.

Listings fail, lie and lack rows; replies are lost before and after their effect; checks fail; machines die,
go offline and are outbid; and the process is killed between any two steps. Meanwhile it is asked of every
order whether it was allowed, and in the end, whether everything can be given back.
"""

import random
from dataclasses import dataclass, field

import pytest

from fleet.commands import Command, Create, Destroy, Drain, LookForOffers, Reply, Start, Stop, Undrain
from fleet.demand import Demand
from fleet.health_check import Verdict
from fleet.journal import SavedFleet, SavedInstance
from fleet.limits import Limits
from fleet.states import State
from policies import Fixed
from tests.fleet_world import World, make_offer
from vast.rows import Row


class Killed(Exception):
    """The process ended at this step."""


@dataclass
class BadDay(World):
    """A World in which everything goes wrong now and then."""

    chance: random.Random = field(default_factory=random.Random)
    trouble: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.offers = [make_offer(n, 0.3 + n % 7 / 10) for n in range(1, 400)]
        self.held: dict[str, SavedInstance] = {}
        self.vanished: dict[str, tuple[float, float]] = {}
        self.bad: dict[int, float] = {}
        self.outage_until = 0.0
        self.hide_until = 0.0
        self.swallowed = False
        self.listing_hook = self._lie
        self.reply_hook = self._answer
        self.check_hook = self._look

    def happens(self, probability: float) -> bool:
        """Whether something of that probability does."""
        return self.chance.random() < probability * self.trouble

    # -- what goes wrong ----------------------------------------------------------------------------

    def _lie(self, rows: list[Row]) -> list[Row]:
        if self.now < self.hide_until:
            return [] if self.chance.random() < 0.5 else [r for r in rows if self.chance.random() < 0.6]
        return rows

    def _answer(self, command: Command) -> Reply | None:
        if self.happens(0.1):
            return Reply.REFUSED
        if self.happens(0.1):
            self.swallowed = self.chance.random() < 0.5  # lost on the way there, or on the way back
            return Reply.UNKNOWN
        # A start or stop may be confirmed and have no effect all the same.
        self.swallowed = isinstance(command, Start | Stop) and self.happens(0.03)
        return None

    def _look(self, label: str) -> Verdict | None:
        if self.happens(0.05):
            return self.chance.choice([Verdict.FAILED, Verdict.LOADING])
        return Verdict.FATAL if self.happens(0.002) else None

    def turn(self) -> None:
        """One turn in which it may happen that the process is killed."""
        self.go_wrong()
        try:
            super().turn()
        except Killed:
            self.kill()
        else:
            if self.happens(0.01):
                self.kill()
        self.write_down()

    def go_wrong(self) -> None:
        """Change the world behind the fleet's back."""
        if not self.trouble:
            return
        if self.now >= self.outage_until and self.happens(0.01):
            self.outage_until = self.now + self.chance.uniform(5, 400)
        self.listing_works = self.now >= self.outage_until and not self.happens(0.05)
        if self.happens(0.005):
            self.hide_until = self.now + self.chance.uniform(5, 90)
        for c in self.contracts.values():
            if self.happens(0.002):
                c.status, c.up_at = "exited", None
                c.intended = self.chance.choice(["running", "stopped"])
                self.busy.discard(c.label)
            elif self.happens(0.002):
                c.status = "offline"
            elif c.status == "offline" and self.happens(0.1):
                c.status = "running" if c.intended == "running" else "exited"
        alive = {c.label for c in self.contracts.values() if c.status == "running"}
        serving = [i.label for i in self.fleet if i.state is State.HOT and i.label in alive]
        self.busy = {
            label for label in sorted(self.busy) if self.chance.random() < 0.9 and label in self.contracts
        }
        self.busy |= {label for label in serving if self.chance.random() < 0.2}
        if self.chance.random() < 0.02:
            hot = self.chance.randint(0, 6)
            self.policy = Fixed(hot, hot + self.chance.randint(0, 3))

    def calm(self, policy: Fixed) -> None:
        """Nothing goes wrong any more, and there are no requests."""
        self.trouble, self.policy = 0.0, policy
        self.listing_works, self.hide_until = True, 0.0
        self.busy.clear()
        for c in self.contracts.values():
            if c.status == "offline":
                c.status = "running" if c.intended == "running" else "exited"

    # -- the process ----------------------------------------------------------------------------------

    def write_down(self) -> None:
        """As the ledger would."""
        entries = self.fleet.journal.take()
        self.held |= entries.instances
        self.vanished |= entries.vanished
        self.bad |= {machine: until for machine, (until, _) in entries.bad_machines.items()}

    def kill(self) -> None:
        """kill -9, and a new process with what was written down."""
        self.write_down()
        gone = {label: r for label, r in self.held.items() if r.state == "gone"}
        self.held = {label: r for label, r in self.held.items() if r.state != "gone" or r.condemned}
        known = [
            SavedInstance(
                r.label, r.instance, r.machine, r.loaded, r.condemned, r.ordered_s, r.throughput, None, None
            )
            if label in gone
            else r
            for label, r in self.held.items()
        ]
        vanished = {label: m for label, m in self.vanished.items() if m[0] > self.now}
        self.restart(SavedFleet(known, self.bad, vanished))
        self.demand = Demand("e1")

    def perform(self, command: Command) -> None:
        self.write_down()  # before anything is sent
        if self.happens(0.002):
            raise Killed
        super().perform(command)
        if self.happens(0.002):
            raise Killed

    def apply(self, command: Command) -> int | None:
        self.judge_order(command)
        there = isinstance(command, Create) or getattr(command, "label", "") in self.contracts
        if self.swallowed or not there:
            return None
        return super().apply(command)

    # -- what must never be ------------------------------------------------------------------------------

    def judge_order(self, command: Command) -> None:
        """Nothing with requests is stopped or destroyed, unless it failed or had its time to drain."""
        if not isinstance(command, Stop | Destroy) or command.label not in self.busy:
            return
        # Repeated orders follow a first one that was judged; what failed is destroyed, whatever it does.
        allowed = ("still busy", "not stopped yet", "still listed", "given up")
        failed = isinstance(command, Destroy) and command.why != "more stopped instances than wanted"
        assert failed or any(words in command.why for words in allowed), f"{command} although it is busy"


@pytest.mark.parametrize("seed", range(15))
def test_whatever_goes_wrong_the_limits_hold_nothing_busy_is_stopped_and_all_can_be_given_back(
    seed: int,
) -> None:
    w = BadDay(limits=Limits(max_instances=7, max_usd_h=3.5), chance=random.Random(seed))
    for _ in range(2 * 720):  # two hours
        w.now += 5.0
        w.turn()
    w.calm(Fixed(0, 0))
    w.tick(3 * 3600)
    assert w.contracts == {}
    assert list(w.fleet) == []
    assert w.fleet.committed().instances == 0


def test_after_bad_luck_the_fleet_is_what_the_policy_wants() -> None:
    for seed in range(8):
        w = BadDay(limits=Limits(max_instances=7, max_usd_h=9.0), chance=random.Random(100 + seed))
        for _ in range(720):
            w.now += 5.0
            w.turn()
        w.calm(Fixed(2, 4))
        w.tick(4 * 3600)
        assert w.states() == {"hot": 2, "cold": 2}, f"seed {100 + seed}"
        assert not any(
            isinstance(c, LookForOffers | Drain | Undrain | Start) for c in w.forget().tick(600).ordered
        )
