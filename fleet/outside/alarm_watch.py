"""Looks every few seconds whether people are to be told of something, in a thread of its own.

What people were told is in the ledger: after a restart nothing is told twice, and the end of it is told.
"""

import json
import logging
import sqlite3
import threading
from collections.abc import Sequence

from fleet import contract_ends
from fleet.alarms import CREATES_OVER_S, STAYS_S, AlarmFacts, Alarms
from fleet.holds import HoldKind
from fleet.outside.notifier import Postbox
from fleet.outside.overview import IN_TIME_OVER_S
from fleet.outside.reasons import OwnReasons
from fleet.outside.turns import Autoscaler
from fleet.states import State
from policies import Objective

log = logging.getLogger("autoscaler")

LOOK_EVERY_S = 2.0
"""Seconds between two looks; each adds up to a few hundred instances."""

DURATIONS_EVERY_S = 60.0
"""Seconds between two looks into the ledger for what was rented."""

END_S = 3.0
"""Seconds that the process waits at its end for messages that are being sent."""

TOLD = "notified"
"""Name in the ledger: JSON, what people believe to be wrong."""


class AlarmWatch:
    """Tells the services when something begins to be wrong with a fleet, and when it is over."""

    def __init__(
        self,
        scaler: Autoscaler,
        reasons: OwnReasons,
        postboxes: Sequence[Postbox],
        calm_s: float,
        loadbalancers: int,
    ) -> None:
        """Watch that autoscaler. calm_s: least seconds between two messages about the same.

        loadbalancers: how many of them should be heard.
        """
        self._scaler = scaler
        self._reasons = reasons
        self._postboxes = postboxes
        self._loadbalancers = loadbalancers
        self._alarms = Alarms(calm_s, scaler.instances.speedup)
        self._rented: tuple[float, int, int] = (float("-inf"), 0, 0)  # when looked, created, loaded
        self._saved: dict[str, list[float | str]] = {}
        self._restore()

    def run(self, stopped: threading.Event) -> None:
        """Look until the event is set."""
        while not stopped.wait(LOOK_EVERY_S):
            self.look()

    def start(self) -> None:
        """Start the threads that send."""
        for one in self._postboxes:
            one.start()

    def end(self) -> None:
        """Let the services end; those that hang are left behind."""
        for one in self._postboxes:
            one.end(END_S / len(self._postboxes))

    def look(self) -> None:
        """Queue the messages that are due now."""
        now = self._scaler.clock()
        notices = self._alarms.settle(self._facts(now), now)
        for notice in notices:
            log.info("people are told: %s %s", notice.kind, "begins" if notice.begins else "is over")
            for one in self._postboxes:
                one.put(notice)
        self._save()

    def _facts(self, now: float) -> AlarmFacts:
        scaler = self._scaler
        created, loaded = self._rented_lately(now)
        with scaler.lock:
            fleet, policy, demand = scaler.instances, scaler.policy, scaler.demand
            ending = [i for i in fleet if i.state is State.DESTROYING]
            return AlarmFacts(
                reasons={r.code: r.message for r in self._reasons.now() if r.code != "held"},
                holds={str(h.kind): h.note for h in fleet.holds if h.kind is not HoldKind.NO_CREDIT},
                budgets_near=fleet.money.warnings(),
                contracts_end=contract_ends.ending(fleet, fleet.horizon, now).values(),
                charges_off_usd=fleet.money.charges_off_usd,
                hot=fleet.hot,
                demand=demand.demand,
                held=demand.held,
                in_time=scaler.history.share_in_time(IN_TIME_OVER_S, now),
                goal=policy.goal if isinstance(policy, Objective) else None,
                usd_h=sum(i.price_usd_h for i in fleet),
                limit_usd_h=fleet.limits.max_usd_h,
                clamped=scaler.clamps.total(),
                created=created,
                loaded=loaded,
                staying=[i.label for i in ending if now - i.since > STAYS_S],
                heard=scaler.own.heard(now),
                loadbalancers=self._loadbalancers,
            )

    def _rented_lately(self, now: float) -> tuple[int, int]:
        at, created, loaded = self._rented
        if now - at >= DURATIONS_EVERY_S:
            try:
                kinds = [k for k, _, _ in self._scaler.ledger.durations(now - CREATES_OVER_S, now + 1.0)]
            except sqlite3.Error:
                kinds = []  # that the ledger fails is told besides
            created, loaded = kinds.count("create"), kinds.count("load")
            self._rented = now, created, loaded
        return created, loaded

    def _restore(self) -> None:
        try:
            said = json.loads(self._scaler.ledger.noted(TOLD) or "{}")
            told = {str(kind): (float(at), str(text)) for kind, (at, text) in said.items()}
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as e:
            log.warning("what people were told is not known: %s", type(e).__name__)
            return
        self._alarms.restore(told, self._scaler.clock())
        self._saved = self._alarms.told()

    def _save(self) -> None:
        told = self._alarms.told()
        if told != self._saved:
            try:
                self._scaler.ledger.note({TOLD: json.dumps(told)})
            except (sqlite3.Error, OSError):
                return  # the next look tries again
            self._saved = told
