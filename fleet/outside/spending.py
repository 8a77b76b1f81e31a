"""What the ledger says of money before each turn, and what it must keep of it after the turn."""

import contextlib
import sqlite3

from fleet.money import Money
from fleet.outside.ledger import Ledger
from fleet.outside.ledger_reading import CREDIT_GONE, USED_UP


class Spending:
    """Reads what each budget's period has cost, and keeps what a restarted autoscaler must know of money."""

    def __init__(self, money: Money, ledger: Ledger) -> None:
        """Read and write that ledger for that money."""
        self._money = money
        self._ledger = ledger
        self._kept: dict[str, str | float | None] = {}

    def spent(self, now: float) -> dict[str, float]:
        """Return the dollars spent in each period that has a budget, as far as the ledger says it."""
        try:
            return {p.name: self._ledger.spent(p.from_s, now) for p in self._money.budgets.periods(now)}
        except sqlite3.Error:  # the budgets stand as before; that the ledger fails is said besides
            return {}

    def keep(self) -> None:
        """Write down whether the credit is gone, and which budgets are used up."""
        used_up = "\n".join(sorted(self._money.budgets.used_up))
        known: dict[str, str | float | None] = {
            CREDIT_GONE: "yes" if self._money.credit.gone else None,
            USED_UP: used_up or None,
        }
        if known != self._kept:
            with contextlib.suppress(sqlite3.Error):  # the next turn tries again
                self._ledger.note(known)
                self._kept = known
