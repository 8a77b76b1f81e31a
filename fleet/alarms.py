"""What a person is told of without asking (`--notify`): what is wrong at one moment, and when it is told.

    AlarmFacts ─► wrong_now ─► what is wrong, by kind ─► Alarms.settle ─► Notice: it began, or it is over

A kind is told when it has been wrong for AFTER_S of its own, and told to be over when it has not been for
CLEAR_S. Two messages of one kind are at least calm_s apart; what is true then is told then, once. So a fault
that comes and goes is two messages in calm_s twice, however fast it does. Pure: methods take now, in seconds.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from process.safe_text import safe_text

AFTER_S = {
    "no_hot_instance": 300.0,
    "below_goal": 600.0,
    "near_dollar_limit": 900.0,
    "loadbalancer_silent": 120.0,
    "not_well": 60.0,
}
"""Seconds for which something must be wrong before it is told, as `for` in deploy/alerts.yml; others: none.
The first is divided by a local cloud's speed-up: its machines start so much faster."""

CLEAR_S = 60.0
"""Seconds for which it must not have been wrong any more."""

NEAR_LIMIT = 0.9
"""Share of the limit on dollars an hour from which on it is near."""

CLAMPED_TURNS, CLAMPED_OVER_S = 10, 900.0
"""Turns, within so many seconds, in which the policy wanted more than the limits allow, that are too many."""

CREATES, CREATES_OVER_S = 5, 3600.0
"""Instances rented within so many seconds, from which on one of them should have become hot."""

STAYS_S = 1800.0
"""Seconds after the order of its end for which an instance may still be listed."""

LONGEST_TOLD = 600
"""Characters of a message."""

MOST_KINDS = 50
"""Kinds that are remembered; there are two dozen."""


@dataclass(frozen=True, kw_only=True)
class AlarmFacts:
    """What the autoscaler knows at one moment, as far as a person is told of it.

    reasons: sentences by word, as GET /health has them, without holds. holds: sentences by kind. in_time: the
    share of the last ten minutes, None without requests; goal: None for a policy without one. clamped: turns
    in which the policy wanted more than the limits allow, since the start. created, loaded: instances rented,
    and of new ones those that became hot, in the last CREATES_OVER_S. staying: labels listed STAYS_S after
    the order of their end. heard, loadbalancers: how many of them are heard, and how many should be.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    holds: Mapping[str, str] = field(default_factory=dict)
    budgets_near: Mapping[str, str] = field(default_factory=dict)
    contracts_end: Collection[str] = ()
    charges_off_usd: float | None = None
    hot: int = 1
    demand: float = 0.0
    held: int = 0
    in_time: float | None = None
    goal: float | None = None
    usd_h: float = 0.0
    limit_usd_h: float = 0.0
    clamped: int = 0
    created: int = 0
    loaded: int = 0
    staying: Collection[str] = ()
    heard: int = 0
    loadbalancers: int = 0


@dataclass(frozen=True)
class Notice:
    """A message for people: something began to be wrong (begins), or is over. at: when that was seen."""

    kind: str
    begins: bool
    text: str
    at: float


def wrong_now(facts: AlarmFacts) -> dict[str, str]:
    """Return a sentence for each kind of thing that is wrong by these facts, but for too many clamped turns.

    A reason of GET /health is the kind `not_well: REASON`, a hold is `held: KIND`.
    """
    found = {f"not_well: {reason}": said for reason, said in facts.reasons.items()}
    found |= {f"held: {kind}": said for kind, said in facts.holds.items()}
    found |= {f"budget_near: {period}": said for period, said in facts.budgets_near.items()}
    if facts.contracts_end:
        found["contract_ends"] = "; ".join(sorted(facts.contracts_end))
    if facts.charges_off_usd is not None:
        found["charges_differ"] = (
            f"the account was charged ${facts.charges_off_usd:+.2f} beside the ledger on a day (GET /costs)"
        )
    if facts.hot == 0 and (facts.held or facts.demand > 0.0):
        found["no_hot_instance"] = (
            f"no instance is hot, {facts.held} requests wait, the load is {facts.demand:.2f} instances' worth"
        )
    if facts.goal is not None and facts.in_time is not None and facts.in_time < facts.goal:
        found["below_goal"] = (
            f"{facts.in_time:.2%} of the requests of ten minutes are in time, the goal is {facts.goal:.2%}"
        )
    if facts.usd_h > NEAR_LIMIT * facts.limit_usd_h:
        found["near_dollar_limit"] = (
            f"the fleet costs ${facts.usd_h:.2f}/h of at most ${facts.limit_usd_h:.2f}/h"
        )
    if facts.created > CREATES and not facts.loaded:
        found["create_loop"] = f"{facts.created} machines were rented within an hour, and none became hot"
    if facts.staying:
        found["machine_does_not_go_away"] = (
            f"still listed long after its end was ordered, and may bill: {', '.join(sorted(facts.staying))}"
        )
    if facts.heard < facts.loadbalancers:
        found["loadbalancer_silent"] = f"{facts.heard} of {facts.loadbalancers} loadbalancers are heard"
    return found


@dataclass
class Alarm:
    """One kind: since when it is as it is, and what people were told last and when."""

    wrong: bool = False
    since: float = 0.0
    told: bool = False
    told_at: float = float("-inf")
    text: str = ""

    def settle(self, said: str | None, now: float, after_s: float, calm_s: float) -> bool:
        """Take in what is said to be wrong now, None for nothing; return whether to tell people how it is.

        after_s: for how long it must be wrong before. calm_s: least seconds between two messages.
        """
        if (said is not None) != self.wrong:
            self.wrong, self.since = said is not None, now
        if said is not None:
            self.text = safe_text(said, LONGEST_TOLD)
        lasts_s = after_s if self.wrong else CLEAR_S
        if self.wrong == self.told or now - self.since < lasts_s or now - self.told_at < calm_s:
            return False
        self.told, self.told_at = self.wrong, now
        return True


class Alarms:
    """Decides which messages are due."""

    def __init__(self, calm_s: float, speedup: float = 1.0) -> None:
        """Begin with nothing told. calm_s: least seconds between two messages of one kind."""
        self._calm_s = calm_s
        self._after_s = AFTER_S | {"no_hot_instance": AFTER_S["no_hot_instance"] / speedup}
        self._kinds: dict[str, Alarm] = {}
        self._clamped: deque[tuple[float, int]] = deque()

    def settle(self, facts: AlarmFacts, now: float) -> list[Notice]:
        """Take in how things stand; return the messages that are due now."""
        wrong = wrong_now(facts) | self._clamps(facts.clamped, now)
        for kind in wrong:
            if kind not in self._kinds and len(self._kinds) < MOST_KINDS:
                self._kinds[kind] = Alarm(since=now)
        return [
            Notice(kind, alarm.told, alarm.text, now)
            for kind, alarm in self._kinds.items()
            if alarm.settle(
                wrong.get(kind), now, self._after_s.get(kind.partition(":")[0], 0.0), self._calm_s
            )
        ]

    def _clamps(self, clamped: int, now: float) -> dict[str, str]:
        """Return the sentence of clamped turns where they were too many of late."""
        self._clamped.append((now, clamped))
        while len(self._clamped) > 1 and self._clamped[1][0] <= now - CLAMPED_OVER_S:
            self._clamped.popleft()
        turns = clamped - self._clamped[0][1]
        if turns <= CLAMPED_TURNS:
            return {}
        return {"limits_in_the_way": f"in {turns} turns the policy wanted more than the limits allow"}

    def told(self) -> dict[str, list[float | str]]:
        """Return what people believe to be wrong, by kind, for the next process: [when told, the text]."""
        return {kind: [a.told_at, a.text] for kind, a in self._kinds.items() if a.told}

    def restore(self, told: Mapping[str, tuple[float, str]], now: float) -> None:
        """Take over what an earlier process had told to be wrong."""
        for kind, (told_at, text) in list(told.items())[:MOST_KINDS]:
            self._kinds[kind] = Alarm(wrong=True, since=now, told=True, told_at=min(told_at, now), text=text)
