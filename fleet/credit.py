"""The account's credit: how long it lasts, and the one state in which it is gone and everything is stopped.

    machines are stopped unasked ─► in doubt: the credit is looked at, at once; nobody is blamed meanwhile
                                        ├─► there is credit: the machines were outbid, or stopped by hand
                                        └─► none is left: GONE. Nothing is rented, started, blamed or ended
    GONE ─► there is credit again: what was stopped is started again, and all deadlines begin anew

At or below 0 the service stops every instance of the account (vast-contract 2.13). Times are epoch seconds.
"""

from enum import StrEnum

DOUBT_S = 60.0
"""Seconds for which machines stopped unasked are not judged while the credit cannot be asked for."""

HELD_LOW, FREE_AGAIN = 1.0, 1.1
"""Creates stop below the least hours times the one, and go on above them times the other."""


class Turned(StrEnum):
    """What a look at the credit changed."""

    NOTHING = "nothing"
    GONE = "gone"
    BACK = "back"
    NOT_THE_REASON = "not the reason"  # machines had been stopped unasked, and there is credit


class Credit:
    """What is known of the credit of the account."""

    def __init__(self, min_hours: float = 0.0) -> None:
        """Know nothing yet. min_hours: hours at the present rate below which nothing more is rented."""
        self.usd: float | None = None
        self.min_hours = min_hours
        self.gone = False
        self.low = False
        self.looked_at = float("-inf")
        self._stopped_at = float("-inf")

    def note(self, usd: float, now: float) -> Turned:
        """Take in the credit that the account has now, dollars; return what that changes."""
        doubted, was_gone = self._stopped_at > self.looked_at, self.gone
        self.usd, self.looked_at = usd, now
        self.gone = usd <= 0.0
        if self.gone:
            return Turned.NOTHING if was_gone else Turned.GONE
        if was_gone:
            return Turned.BACK
        return Turned.NOT_THE_REASON if doubted else Turned.NOTHING

    def restore(self, *, gone: bool) -> None:
        """Take over what an earlier process knew."""
        self.gone = gone

    def note_stop(self, now: float) -> None:
        """Note that the cloud has stopped a machine unasked."""
        self._stopped_at = now

    def in_doubt(self, now: float) -> bool:
        """Return whether machines were stopped unasked, and it is not known yet whether credit is left."""
        return self._stopped_at > self.looked_at and now - self._stopped_at <= DOUBT_S

    def spares(self, now: float) -> bool:
        """Return whether no machine is to be blamed or ended now: the credit is gone, or may be."""
        return self.gone or self.in_doubt(now)

    def look_due(self, every_s: float, gone_every_s: float, now: float) -> bool:
        """Return whether the account is to be asked now: at once where machines were stopped unasked."""
        since_s = now - self.looked_at
        return self._stopped_at > self.looked_at or since_s >= (gone_every_s if self.gone else every_s)

    def hours_left(self, usd_h: float) -> float | None:
        """Return for how many hours the credit lasts at that rate; None: not known, or for ever."""
        return None if self.usd is None or usd_h <= 0.0 else max(0.0, self.usd) / usd_h

    def settle(self, usd_h: float) -> None:
        """Note whether the credit is low, at the fleet's present rate."""
        hours = self.hours_left(usd_h)
        factor = FREE_AGAIN if self.low else HELD_LOW
        self.low = hours is not None and hours < factor * self.min_hours
