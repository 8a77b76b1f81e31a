"""Instances that the cloud stopped unasked while they loaded, until it is known whether the credit is why."""

from collections.abc import Iterable

from fleet.credit import Credit, Turned
from fleet.instance import Instance
from fleet.journal import Journal
from fleet.market import Market


def unasked(i: Instance) -> str:
    """Return why that instance, which the cloud stopped without our asking, is stopped."""
    before = "" if i.loaded or i.adopted else " before its model was loaded"
    return f"stopped without our asking{before}: outbid, out of credit, or by hand"


class UnaskedStops:
    """Keeps them, and asks by `credit` whose fault they are."""

    def __init__(self, credit: Credit, market: Market, journal: Journal) -> None:
        """Begin without any. credit: of the account. market: counts creates that failed."""
        self.credit = credit
        self._market = market
        self._journal = journal
        self._waiting: list[Instance] = []

    def add(self, i: Instance, now: float) -> None:
        """Note that the cloud stopped that instance."""
        self.credit.note_stop(now)
        if i.is_of_no_use:
            self._waiting.append(i)
        if self.credit.gone:
            self._interrupt()

    def judge(self, now: float) -> None:
        """Count creates as failed whose machines were stopped while they loaded, credit being there."""
        for i in self._waiting:
            self._market.note_create_failed(now, i.why)
        self._waiting.clear()

    def restore(self, instances: Iterable[Instance], *, credit_gone: bool) -> None:
        """Take over what an earlier process knew of the credit, and thereby of these instances."""
        self.credit.restore(gone=credit_gone)
        self._waiting += (i for i in instances if credit_gone and i.is_of_no_use)
        if credit_gone:
            self._interrupt()

    def note_credit(self, usd: float, instances: Iterable[Instance], now: float) -> Turned:
        """Take in the account's credit, dollars; return what that changes for these instances."""
        turned = self.credit.note(usd, now)
        if turned is Turned.GONE:
            self._journal.log(f"the account has ${usd:.2f} left: no machine is blamed for what it stops")
            self._interrupt()
        elif turned is Turned.BACK:
            self._journal.log(f"there is credit again, ${usd:.2f}: what was stopped is started again")
            for i in instances:
                i.boot.forget_refusals()
        return turned

    def _interrupt(self) -> None:
        for i in self._waiting:
            i.boot.interrupt()
        self._waiting.clear()
