"""What the money allows in one decision: whether one more create fits budgets and credit."""

from collections.abc import Iterable
from dataclasses import dataclass

from fleet.budget import CreateCost, Standing
from vast.rows import Offer


@dataclass(frozen=True)
class Purse:
    """What the money allows in one decision.

    spares: no machine is blamed or ended, and none rented: the credit is gone or may be. credit_usd: None
    where it is not known. download_gb: of one create. load_s: seconds from order to hot.
    """

    standings: tuple[Standing, ...] = ()
    spares: bool = False
    credit_usd: float | None = None
    min_credit_hours: float = 0.0
    download_gb: float = 0.0
    load_s: float = 0.0

    @property
    def used_up(self) -> str | None:
        """Which budget is used up, as a reason to drain; None while none is."""
        return next((f"the {s.period.name}'s budget is used up" for s in self.standings if s.used_up), None)

    def cost_of(self, offer: Offer) -> CreateCost:
        """Return what an instance from that offer costs. A host that names no price is taken to ask none."""
        return CreateCost(
            self.download_gb * (offer.inet_down_usd_gb or 0.0),
            offer.dph_total,
            max(0.0, offer.dph_total - offer.dph_base),
            self.load_s,
        )

    def refusal(self, cost: CreateCost, usd_h: float, admitted: Iterable[CreateCost] = ()) -> str | None:
        """Return why a create at that cost is too much now; None where it fits.

        usd_h: what all costs then. admitted: what the same decision rents already.
        """
        costs = [*admitted, cost]
        for s in self.standings:
            needs = sum(c.until_loaded_usd(s.left_s) for c in costs)
            if s.spent_usd + s.bound_usd + needs > s.period.limit_usd:
                left = max(0.0, s.period.limit_usd - s.spent_usd - s.bound_usd)
                return f"${left:.2f} of the {s.period.name}'s budget are free, and ${needs:.2f} are needed"
            ends = s.forecast_usd + sum(c.until_the_end_usd(s.left_s) for c in costs)
            if s.near and ends > s.period.limit_usd:
                return (
                    f"the {s.period.name} would cost ${ends:.2f} at this rate, and the budget of "
                    f"${s.period.limit_usd:.2f} is near its end"
                )
        if self.credit_usd is None or self.min_credit_hours <= 0.0 or usd_h <= 0.0:
            return None
        hours = (self.credit_usd - sum(c.download_usd for c in costs)) / usd_h
        if hours >= self.min_credit_hours:
            return None
        return (
            f"the credit of ${self.credit_usd:.2f} would last {max(0.0, hours):.1f} h, "
            f"and --min-credit-hours is {self.min_credit_hours:g}"
        )
