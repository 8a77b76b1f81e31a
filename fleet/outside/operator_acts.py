"""All that an operator can do to a running autoscaler, as the routes and the process share it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fleet.outside.audit import AuditTrail
from fleet.outside.by_hand import ByHand
from fleet.outside.engine_log import EngineLog
from fleet.outside.market_view import MarketView
from fleet.outside.standing import StandingOrders
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from fleet.outside.what_if_runs import WhatIfRuns


@dataclass(frozen=True)
class OperatorActs:
    """What is done by hand to single instances and to the whole fleet, and what is written down of it.

    engine_log, market, what_if: None in a process that cannot reach instances, cloud or sim.py.
    """

    audit: AuditTrail
    by_hand: ByHand
    standing: StandingOrders
    engine_log: EngineLog | None = None
    market: MarketView | None = None
    what_if: WhatIfRuns | None = None

    @classmethod
    def of(
        cls,
        scaler: Autoscaler,
        audit_path: Path | None = None,
        flags: Mapping[str, str] | None = None,
        tuner: Tuner | None = None,
        **looks: Any,
    ) -> Self:
        """Return what can be done to that autoscaler.

        flags, tuner: as in StandingOrders. looks: engine_log, market and what_if, as far as there are any.
        """
        audit = AuditTrail(scaler.clock, audit_path)
        return cls(audit, ByHand(scaler, audit), StandingOrders(scaler, audit, flags, tuner), **looks)

    def take_over(self) -> None:
        """Go on with what the last process was told by hand and what still holds."""
        self.by_hand.take_over()
        self.standing.take_over()
