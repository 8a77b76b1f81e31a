"""What the contract of one instance says beside its price now: traffic, storage while stopped, its end."""

from dataclasses import dataclass

from vast.rows import Offer, Row

STOPPED = ("stopped", "unloaded")
"""Words of `cur_state` of a machine whose GPU is given up (vast-contract 2.12)."""


@dataclass
class Terms:
    """The terms of one instance as it was offered and listed; None: the cloud does not say.

    down_usd_gb, up_usd_gb: price of each GB that comes to it, and goes from it. end_at: when its contract
    ends, and agreed_end_at when it ends by an increase that was accepted, epoch seconds. stopped_usd_h: what
    it cost while it was stopped, where that was seen.
    """

    down_usd_gb: float | None = None
    up_usd_gb: float | None = None
    end_at: float | None = None
    stopped_usd_h: float | None = None
    agreed_end_at: float | None = None

    @property
    def ends_at(self) -> float | None:
        """When the contract ends, as far as is known and agreed; None: nobody says."""
        known = [at for at in (self.end_at, self.agreed_end_at) if at is not None]
        return max(known, default=None)

    def extend(self, end_at: float | None) -> None:
        """Note until when the contract goes on by an increase that was accepted; None: for good."""
        self.agreed_end_at = float("inf") if end_at is None else end_at

    @classmethod
    def offered(cls, offer: Offer, now: float) -> "Terms":
        """Return the terms of a machine that is rented from that offer now."""
        end_at = None if offer.duration_s is None else now + offer.duration_s
        return cls(offer.inet_down_usd_gb, offer.inet_up_usd_gb, end_at)

    def read(self, row: Row) -> float:
        """Copy what the listing says; return the instance's price while it is stopped, $/h.

        Until it was seen stopped that is what its storage costs now: a host may ask more for a stopped one.
        """
        self.down_usd_gb = self.down_usd_gb if row.inet_down_usd_gb is None else row.inet_down_usd_gb
        self.up_usd_gb = self.up_usd_gb if row.inet_up_usd_gb is None else row.inet_up_usd_gb
        self.end_at = self.end_at if row.end_date is None else row.end_date
        if row.cur_state in STOPPED and row.price_now_usd_h > 0.0:  # an offline host asks nothing
            self.stopped_usd_h = row.price_now_usd_h
        return row.storage_usd_h if self.stopped_usd_h is None else self.stopped_usd_h

    def download_usd(self, gb: float) -> float:
        """Return what so many GB cost that come to it; a host that names no price is taken to ask none."""
        return gb * (self.down_usd_gb or 0.0)
