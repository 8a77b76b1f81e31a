"""Management policies: pure functions from a snapshot of the fleet to two targets.

The targets are how many instances shall be hot and how many there shall be in all. A policy never says
*which* instance, and knows no hard limits: that is fleet/planner.py. The types are in types.py; each policy
has a file of its own and one line in `POLICIES`.
"""

from policies.busy import Busy
from policies.fixed import Fixed
from policies.named import make_policy, parse_params
from policies.objective import Objective
from policies.types import BIN_S, Capacity, FleetSnapshot, Policy, Targets, Traffic

POLICIES: dict[str, type[Policy]] = {"objective": Objective, "busy": Busy, "fixed": Fixed}

__all__ = [
    "BIN_S",
    "POLICIES",
    "Busy",
    "Capacity",
    "Fixed",
    "FleetSnapshot",
    "Objective",
    "Policy",
    "Targets",
    "Traffic",
    "make_policy",
    "parse_params",
]
