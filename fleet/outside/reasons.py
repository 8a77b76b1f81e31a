"""Why this autoscaler process cannot do its job: what `GET /health`, metrics and notifications say."""

from fleet.holds import HoldKind
from fleet.outside.own_health import Reason
from fleet.outside.turns import Autoscaler

HEALTHY_FOR = 60.0, 5.0
"""Seconds, and listings, without a good turn after which the autoscaler does not do its job."""


class OwnReasons:
    """Tells how long ago the last good turn was, and the reasons why the process is not well."""

    def __init__(self, scaler: Autoscaler, poll_interval_s: float) -> None:
        """Look at that autoscaler, which lists every poll_interval_s seconds and has just started."""
        self._scaler = scaler
        self._patience_s = max(HEALTHY_FOR[0], HEALTHY_FOR[1] * poll_interval_s)
        self._started = scaler.clock()

    @property
    def good_turn_age_s(self) -> float:
        """Seconds since the last good turn; before the first one, since the start."""
        last = self._scaler.last_good_turn
        return self._scaler.clock() - (self._started if last is None else last)

    @property
    def turns_go_well(self) -> bool:
        """Whether there was a good turn, not too long ago."""
        return self._scaler.last_good_turn is not None and self.good_turn_age_s <= self._patience_s

    def now(self) -> list[Reason]:
        """Return the reasons why the process cannot do its job now; an empty list when it can."""
        scaler, market = self._scaler, self._scaler.instances.market
        found = scaler.own.reasons(market.failed_creates, market.last_failure, scaler.clock())
        if not self.turns_go_well:
            message = f"no turn went well for {self.good_turn_age_s:.0f} s: {scaler.last_error}"
            found.insert(0, Reason("no_good_turn", message))
        for hold in scaler.instances.holds:
            no_credit = hold.kind is HoldKind.NO_CREDIT
            found.append(Reason("no_credit", hold.note) if no_credit else Reason("held", hold.note))
        return found
