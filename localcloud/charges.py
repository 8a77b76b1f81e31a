"""What the account is charged, by rental, day (UTC) and kind, as `show invoices-v1 --charges` shows it."""

from collections import defaultdict
from dataclasses import dataclass, field

from localcloud.machines import DAY_S

KINDS = ("gpu", "disk", "bwd", "bwu")
"""The kinds of charges, in the service's words: GPUs, storage, bytes in and out."""


@dataclass
class Charge:
    """The charges of one kind for one rental on one day. amount: in hours, or in GB for bytes."""

    usd: float = 0.0
    amount: float = 0.0

    def add(self, usd: float, amount: float) -> None:
        """Add dollars, and hours or GB."""
        self.usd += usd
        self.amount += amount


@dataclass
class RentalCharges:
    """All that one rental was charged. label: as it is now."""

    number: int
    label: str | None
    by_day: defaultdict[tuple[int, str], Charge] = field(default_factory=lambda: defaultdict(Charge))

    def relabel(self, label: str | None) -> None:
        """Show the rental under that label from now on."""
        self.label = label

    def add_hours(self, kind: str, usd_h: float, from_s: float, to_s: float) -> None:
        """Charge a price by the hour from one time to another."""
        at = from_s
        while at < to_s and usd_h > 0.0:
            day = int(at // DAY_S)
            until = min(to_s, (day + 1) * DAY_S)
            self._add(day, kind, usd_h * (until - at) / 3600.0, (until - at) / 3600.0)
            at = until

    def add_bytes(self, kind: str, usd: float, gb: float, now: float) -> None:
        """Charge so many GB, which came or went now."""
        self._add(int(now // DAY_S), kind, usd, gb)

    def _add(self, day: int, kind: str, usd: float, amount: float) -> None:
        self.by_day[day, kind].add(usd, amount)

    def within(self, from_s: float, to_s: float) -> tuple[list[int], dict[str, Charge]]:
        """Return the days that touch the window on which something was charged, and the sums by kind."""
        first, last = int(from_s // DAY_S), int(to_s // DAY_S)
        days, sums = set(), {kind: Charge() for kind in KINDS}
        for (day, kind), charge in self.by_day.items():
            if first <= day <= last:
                days.add(day)
                sums[kind].add(charge.usd, charge.amount)
        return sorted(days), sums
