"""Looks at the cloud's account, in a thread of its own: at its credit, at once when machines stop unasked."""

import logging
import threading

from fleet.holds import HoldKind
from fleet.outside.turns import Autoscaler
from process.errors import CloudError
from vast.client import Vast

log = logging.getLogger("autoscaler")

CREDIT_EVERY_S = 60.0
"""Seconds between two looks at the credit: a call of the CLI, half a second of a processor."""

GONE_EVERY_S = 15.0
"""The same while there is none: the fleet goes on when somebody pays in."""

TICK_S = 1.0
"""Seconds between two thoughts of whether a look is due."""

COMPLAIN = "the account"


class AccountWatch:
    """Asks the cloud for what it knows of the account, and gives it to the autoscaler."""

    def __init__(self, scaler: Autoscaler, vast: Vast) -> None:
        """Ask by that client. Nothing is asked yet."""
        self._scaler = scaler
        self._vast = vast
        self._tried_at = float("-inf")

    def run(self, stopped: threading.Event) -> None:
        """Look whenever it is due, until the event is set."""
        while not stopped.wait(TICK_S):
            self.look()

    def look(self) -> None:
        """Look at what is due now; what the cloud does not answer is tried again a little later."""
        now = self._scaler.clock()
        if self._credit_due(now) and now - self._tried_at >= GONE_EVERY_S / 3.0:
            self._tried_at = now
            self._look_at_credit()

    def _credit_due(self, now: float) -> bool:
        fleet = self._scaler.instances
        credit, hold = fleet.money.credit, fleet.holds.of(HoldKind.NO_CREDIT)
        refused = hold is not None and not credit.gone and credit.looked_at <= hold.since
        return refused or credit.look_due(CREDIT_EVERY_S, GONE_EVERY_S, now)

    def _look_at_credit(self) -> None:
        try:
            usd = self._vast.credit()
        except CloudError as e:
            if self._scaler.own.may_complain(COMPLAIN, self._scaler.clock()):
                log.warning("the credit is not known: %s", e)
            return
        with self._scaler.lock:
            self._scaler.instances.note_credit(usd, self._scaler.clock())
        self._scaler.turn_due.set()
