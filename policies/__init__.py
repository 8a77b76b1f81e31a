"""Management policies: pure functions from what is seen to how many hot and how many in all.

A policy never says *which* instance: that is `InstanceSet.decide`, and so are the hard limits.
Shapes are shared here; each policy has a file of its own and one line in `POLICIES`.
"""

from policies.busy import Busy
from policies.fixed import Fixed
from policies.types import Policy, Seen, Targets

POLICIES: dict[str, type[Policy]] = {"busy": Busy, "fixed": Fixed}

__all__ = ["POLICIES", "Busy", "Fixed", "Policy", "Seen", "Targets"]
