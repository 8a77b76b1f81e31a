"""Days on which the ledger was held against the account's own charges, and when the difference matters."""

from dataclasses import dataclass

from fleet.budget import DAY_S

SHARE_OFF, USD_OFF = 0.02, 0.05
"""Share of a day's charges, and dollars, that both must be passed before a difference is told."""


@dataclass(frozen=True)
class ReconciledDay:
    """One day (UTC, as when it began), and what it came to by the account and by the ledger, in dollars.

    at_s: when they were compared.
    """

    day_s: float
    at_s: float
    charged_usd: float
    ledger_usd: float

    @property
    def difference_usd(self) -> float:
        """By how much the account's charges are more than the ledger has."""
        return self.charged_usd - self.ledger_usd

    @property
    def is_whole(self) -> bool:
        """Whether the day was over when it was compared; charges of a day under way come late."""
        return self.at_s >= self.day_s + DAY_S

    @property
    def is_off(self) -> bool:
        """Whether the day is over, and the two are too far apart."""
        return self.is_whole and abs(self.difference_usd) > max(USD_OFF, SHARE_OFF * self.charged_usd)

    def shown(self) -> dict[str, float | bool]:
        """Return it as JSON for people and programs."""
        return {
            "day": self.day_s,
            "at": self.at_s,
            "charged_usd": round(self.charged_usd, 6),
            "ledger_usd": round(self.ledger_usd, 6),
            "difference_usd": round(self.difference_usd, 6),
            "whole": self.is_whole,
            "off": self.is_off,
        }
