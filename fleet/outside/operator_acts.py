"""All that an operator can do to a running autoscaler, as the routes and the process share it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fleet.outside.audit import AuditTrail
from fleet.outside.by_hand import ByHand
from fleet.outside.engine_log import EngineLog
from fleet.outside.standing import StandingOrders
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler


@dataclass(frozen=True)
class OperatorActs:
    """What is done by hand to single instances and to the whole fleet, and what is written down of it.

    engine_log: None in a process that has no ssh key.
    """

    audit: AuditTrail
    by_hand: ByHand
    standing: StandingOrders
    engine_log: EngineLog | None = None

    @classmethod
    def of(
        cls,
        scaler: Autoscaler,
        audit_path: Path | None = None,
        flags: Mapping[str, str] | None = None,
        tuner: Tuner | None = None,
        engine_log: EngineLog | None = None,
    ) -> Self:
        """Return what can be done to that autoscaler. flags, tuner: as in StandingOrders."""
        audit = AuditTrail(scaler.clock, audit_path)
        return cls(audit, ByHand(scaler, audit), StandingOrders(scaler, audit, flags, tuner), engine_log)

    def take_over(self) -> None:
        """Go on with what the last process was told by hand and what still holds."""
        self.by_hand.take_over()
        self.standing.take_over()
