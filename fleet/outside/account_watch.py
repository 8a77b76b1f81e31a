"""Looks at the cloud's account, in a thread of its own: credit, price increases, charges.

    credit            each minute, and at once when machines stop unasked
    price increases   each ten minutes; those that cost no more than another machine are accepted
    charges           four times a day: yesterday and today, held against the ledger

The last two intervals are divided by a local cloud's speed-up. What the cloud does not answer is tried again
at the next interval; a key that may not ask is said in the log.
"""

import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass

from fleet.budget import DAY_S
from fleet.commands import Command, LookForOffers, Performed
from fleet.holds import HoldKind
from fleet.outside.turns import Autoscaler
from fleet.price_increases import Judged, PriceAnswer, judge_increase
from process.errors import CloudError
from vast.billing import Billing
from vast.client import Vast
from vast.rows import Offer, PriceIncrease

log = logging.getLogger("autoscaler")

CREDIT_EVERY_S = 60.0
"""Seconds between two looks at the credit: a call of the CLI, half a second of a processor."""

GONE_EVERY_S = 15.0
"""The same while there is none: the fleet goes on when somebody pays in."""

INCREASES_EVERY_S = 600.0
"""Seconds between two looks at price increases: hosts ask days before a contract ends."""

CHARGES_EVERY_S = 21_600.0
"""Seconds between two looks at what the account was charged: charges come late, and by the day."""

LEAST_S = 5.0
"""Least seconds between two looks of a kind, however fast the cloud is."""

TICK_S = 1.0
"""Seconds between two thoughts of whether a look is due."""

AGREED = "agreed_ends"
"""Name in the ledger: JSON, until when contracts go on by increases that were accepted, by label."""


@dataclass
class Timetable:
    """When a kind of look was taken last, and how far apart they are."""

    every_s: float
    looked_at: float = float("-inf")

    def due(self, now: float) -> bool:
        """Return whether to look now; if so, note that."""
        is_due = now - self.looked_at >= self.every_s
        self.looked_at = now if is_due else self.looked_at
        return is_due


class AccountWatch:
    """Asks the cloud for what it knows of the account, and gives it to the autoscaler."""

    def __init__(
        self,
        scaler: Autoscaler,
        vast: Vast,
        billing: Billing | None = None,
        perform: Callable[[Command], Performed] | None = None,
    ) -> None:
        """Ask by that client. billing: for charges and price increases; None: they are not looked at.

        perform: looks for offers, to compare prices with.
        """
        speedup = scaler.instances.speedup
        self._scaler = scaler
        self._vast = vast
        self._billing = billing
        self._perform = perform
        self._tried = Timetable(GONE_EVERY_S / 3.0)
        self._increases = Timetable(max(LEAST_S, INCREASES_EVERY_S / speedup))
        self._charges = Timetable(max(LEAST_S, CHARGES_EVERY_S / speedup))
        self._agreed: dict[str, float] = {}
        self._restore()

    def run(self, stopped: threading.Event) -> None:
        """Look whenever it is due, until the event is set."""
        while not stopped.wait(TICK_S):
            self.look()

    def look(self) -> None:
        """Look at what is due now; what the cloud does not answer is tried again later."""
        now = self._scaler.clock()
        if self._credit_due(now) and self._tried.due(now):
            self._try("the credit is not known", self._look_at_credit)
        if self._billing is None or not self._scaler.instances.listing_believed:
            return
        if self._increases.due(now):
            self._try("price increases are not known", self._look_at_increases)
        if self._charges.due(now):
            self._try("the account's charges are not known", self._look_at_charges)

    def _try(self, trouble: str, look: Callable[[], None]) -> None:
        try:
            look()
        except CloudError as e:
            if self._scaler.own.may_complain(trouble, self._scaler.clock()):
                log.warning("%s: %s", trouble, e)
        except (sqlite3.Error, OSError) as e:
            self._scaler.own.complain(trouble, e, self._scaler.clock())

    # -- credit ----------------------------------------------------------------------------------------

    def _credit_due(self, now: float) -> bool:
        fleet = self._scaler.instances
        credit, hold = fleet.money.credit, fleet.holds.of(HoldKind.NO_CREDIT)
        refused = hold is not None and not credit.gone and credit.looked_at <= hold.since
        return refused or credit.look_due(CREDIT_EVERY_S, GONE_EVERY_S, now)

    def _look_at_credit(self) -> None:
        usd = self._vast.credit()
        with self._scaler.lock:
            self._scaler.instances.note_credit(usd, self._scaler.clock())
        self._scaler.turn_due.set()

    # -- price increases -------------------------------------------------------------------------------

    def _look_at_increases(self) -> None:
        if self._billing is None:
            return
        asked = self._billing.price_increases()
        with self._scaler.lock:
            labels = {i.id: i.label for i in self._scaler.instances}
            self._apply_agreed()
        ours = [one for one in asked if one.instance in labels]
        offers = self._offers() if ours else None
        judged = [self._judge(one, labels[one.instance], offers) for one in ours]
        for one in judged:
            if one.verdict is PriceAnswer.ACCEPTED:
                self._billing.answer_price_increase(one.increase.instance, accept=True)
                self._accept(labels[one.increase.instance], one)
        with self._scaler.lock:
            self._scaler.instances.money.note_increases(judged)

    def _offers(self) -> tuple[Offer, ...] | None:
        """Return what is for rent now, to compare prices with; None where that is not known."""
        if self._perform is None:
            return None
        return self._perform(LookForOffers("a host asks for a higher price")).offers

    def _judge(self, asked: PriceIncrease, label: str, offers: tuple[Offer, ...] | None) -> Judged:
        with self._scaler.lock:
            fleet = self._scaler.instances
            return judge_increase(asked, fleet[label], offers, fleet.profile, fleet.horizon)

    def _accept(self, label: str, one: Judged) -> None:
        log.info("%s: its host's higher price is accepted: %s", label, one.why)
        until = one.increase.new_end_at
        self._agreed[label] = float("inf") if until is None else until
        with self._scaler.lock:
            self._apply_agreed()
        self._scaler.ledger.note({AGREED: json.dumps(self._agreed)})

    def _apply_agreed(self) -> None:
        for label, until in self._agreed.items():
            if label in self._scaler.instances:
                self._scaler.instances[label].terms.extend(until)

    def _restore(self) -> None:
        try:
            said = json.loads(self._scaler.ledger.noted(AGREED) or "{}")
            self._agreed = {str(label): float(until) for label, until in said.items()}
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as e:
            log.warning("which prices were accepted is not known: %s", type(e).__name__)
        with self._scaler.lock:
            self._apply_agreed()

    # -- charges ---------------------------------------------------------------------------------------

    def _look_at_charges(self) -> None:
        if self._billing is None:
            return
        now = self._scaler.clock()
        today = now - now % DAY_S
        prefix = self._scaler.instances.fleet_name + "/"
        for day in (today - DAY_S, today):
            charged = self._billing.charges(day, min(now, day + DAY_S - 1.0))
            with self._scaler.lock:
                known = {i.id for i in self._scaler.instances}
            ours = [c for c in charged if c.instance in known or (c.label or "").startswith(prefix)]
            self._scaler.ledger.reconcile(day, ours, now)
        days = self._scaler.ledger.reconciled(today - DAY_S)
        with self._scaler.lock:
            self._scaler.instances.money.note_reconciled(days)
