"""What the money allows: budgets and credit together, as one decision sees them and as holds say them.

spent, credit ─► Money.settle ─┬─► holds (fleet/holds.py): for what lasts
                               └─► Purse (fleet/purse.py) ─► LimitGuard: whether one more create fits
"""

from collections.abc import Iterable, Mapping

from fleet.budget import DAY, MONTH, Budgets, Habits
from fleet.credit import Credit
from fleet.deadlines import Deadlines
from fleet.holds import HeldOrders, HoldKind, Holds
from fleet.instance import Instance
from fleet.limits import Limits
from fleet.price_increases import Judged
from fleet.purse import Purse
from fleet.reconciled import ReconciledDay

BUDGET_HOLDS = {DAY: HoldKind.BUDGET_DAY, MONTH: HoldKind.BUDGET_MONTH}


class Money:
    """The budgets and the credit of one fleet; it sets and ends their holds."""

    def __init__(self, limits: Limits, deadlines: Deadlines, download_gb: float, holds: Holds) -> None:
        """Know nothing of what was spent yet. download_gb: what comes over the network for one create."""
        self.budgets = Budgets(limits.budget_usd_day, limits.budget_usd_month)
        self.credit = Credit(limits.min_credit_hours)
        self.increases: tuple[Judged, ...] = ()
        self.reconciled: tuple[ReconciledDay, ...] = ()
        self._drain_s = deadlines.draining_s
        self._download_gb = download_gb
        self._holds = holds

    def settle(
        self, spent_usd: Mapping[str, float], instances: Iterable[Instance], load_s: float, now: float
    ) -> None:
        """Take in what was spent in each period; set or end the holds that follow from money.

        load_s: seconds from order to hot.
        """
        there = list(instances)
        habits = Habits(load_s, self._drain_s, self._download_gb)
        self.budgets.settle(spent_usd, there, habits, now)
        by_name = {s.period.name: s for s in self.budgets.standings}
        for name, kind in BUDGET_HOLDS.items():
            s = by_name.get(name)
            if s is None or not s.used_up:
                self._holds.clear(kind)
            elif self._holds.of(kind) is None:
                ends = f"with the {name}, or by a higher budget"
                self._holds.set(kind, s.sentence, now, HeldOrders.CREATES_AND_STARTS, ends)
        self._hold_for_credit(sum(i.price_usd_h for i in there), now)

    def _hold_for_credit(self, usd_h: float, now: float) -> None:
        credit = self.credit
        credit.settle(usd_h)
        if credit.gone:
            if self._holds.of(HoldKind.NO_CREDIT) is None:
                said = f"the account has {credit.usd or 0.0:.2f} $ left, and the cloud stops all: pay in"
                ends = "by itself, when there is credit; what was stopped is then started again"
                self._holds.set(HoldKind.NO_CREDIT, said, now, HeldOrders.CREATES_AND_STARTS, ends)
        elif (hold := self._holds.of(HoldKind.NO_CREDIT)) and credit.looked_at > hold.since:
            self._holds.clear(HoldKind.NO_CREDIT)  # a refused create may know it before the account was asked
        if not credit.low or credit.gone:
            self._holds.clear(HoldKind.CREDIT_LOW)
        elif self._holds.of(HoldKind.CREDIT_LOW) is None:
            hours = credit.hours_left(usd_h) or 0.0
            said = (
                f"the credit of ${credit.usd or 0.0:.2f} lasts {hours:.1f} h at ${usd_h:.2f}/h, and "
                f"--min-credit-hours is {credit.min_hours:g}: pay in"
            )
            self._holds.set(HoldKind.CREDIT_LOW, said, now, ends="by itself, when the credit lasts longer")

    def purse(self, load_s: float, now: float) -> Purse:
        """Return what the money allows now. load_s: seconds from order to hot."""
        credit = self.credit
        return Purse(
            self.budgets.standings,
            credit.spares(now),
            credit.usd,
            credit.min_hours,
            self._download_gb,
            load_s,
        )

    def note_increases(self, judged: Iterable[Judged]) -> None:
        """Take in which higher prices hosts ask for, and what is made of them."""
        self.increases = tuple(judged)

    def note_reconciled(self, days: Iterable[ReconciledDay]) -> None:
        """Take in which days were held against the account's charges."""
        self.reconciled = tuple(days)

    @property
    def charges_off_usd(self) -> float | None:
        """By how much a whole day's charges are beside the ledger, if that is too much; else None."""
        return next((d.difference_usd for d in self.reconciled if d.is_off), None)

    def warnings(self) -> dict[str, str]:
        """Return a sentence for each budget that is near its end and not used up, by the period's name."""
        return {s.period.name: s.sentence for s in self.budgets.standings if s.near and not s.used_up}
