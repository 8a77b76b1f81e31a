"""What an operator sets for the whole fleet by hand: whether instances are ordered at all, and the policy.

Both hold over a restart, until a flag says something else than it said when they were set:

    set by hand ─► ledger, with what the flag said then ─► next start ─┬─ same flag:    what was set holds
                                                                       └─ another one:  the flag holds
"""

import json
import logging
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fleet.outside.audit import AuditTrail
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from policies import POLICIES, make_policy
from process.errors import ConfigError

log = logging.getLogger("autoscaler")

MANAGE, POLICY = "set_manage", "set_policy"
"""Names in the ledger: JSON, what was set and what the flag said then."""


class StandingOrders:
    """Sets the manage switch and the policy of an autoscaler, and keeps them over a restart."""

    def __init__(
        self,
        scaler: Autoscaler,
        audit: AuditTrail,
        flags: Mapping[str, str] | None = None,
        tuner: Tuner | None = None,
    ) -> None:
        """Set what that autoscaler goes by. flags: what the flags of this process say, by MANAGE and POLICY.

        tuner: is told of a new policy.
        """
        self._scaler = scaler
        self._audit = audit
        self._flags = dict(flags or {})
        self._tuner = tuner

    def take_over(self) -> None:
        """Go on with what was set by hand in the last process, where the flags are still the same."""
        manage = self._kept(MANAGE)
        if isinstance(manage, bool):
            self._set_manage(manage)
        policy = self._kept(POLICY)
        if isinstance(policy, dict):
            try:
                self._set_policy(str(policy["name"]), dict(policy["params"]))
            except (ConfigError, LookupError, TypeError, ValueError) as e:
                log.warning("the policy that was set by hand cannot be used any more: %s", e)

    def set_manage(self, wanted: bool, who: str) -> None:
        """Start and stop instances from now on, or do not."""
        self._set_manage(wanted)
        self._audit.add(who, f"manage: {'on' if wanted else 'off'}")
        self._keep(MANAGE, wanted)

    def set_policy(self, name: str, params: Mapping[str, Any], who: str) -> dict[str, Any]:
        """Go by another policy from now on; return its parameters. Raises ConfigError for a wrong one."""
        said = self._set_policy(name, params)
        shown = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())
        self._audit.add(who, f"policy: {name}{f' with {shown}' if shown else ''}")
        self._keep(POLICY, {"name": name, "params": dict(params)})
        return said

    def _set_manage(self, wanted: bool) -> None:
        with self._scaler.lock:
            self._scaler.instances.set_manage(wanted)

    def _set_policy(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        scaler = self._scaler
        made = make_policy(POLICIES, name, params, scaler.instances.speedup)
        with scaler.lock:
            scaler.set_policy(made)
        log.info("policy is now %r", made)
        if self._tuner is not None:
            self._tuner.policy_was_set()
        said = asdict(made)  # type: ignore[call-overload]
        return {k: v for k, v in said.items() if v is not None and math.isfinite(v)}

    def _keep(self, name: str, value: object) -> None:
        try:
            self._scaler.ledger.note({name: json.dumps({"value": value, "flag": self._flags.get(name)})})
        except sqlite3.Error as e:
            log.warning("what was set by hand will not survive a restart: %s", e)

    def _kept(self, name: str) -> object:
        """Return what was set under that name and still holds, else None."""
        try:
            said = json.loads(self._scaler.ledger.noted(name) or "{}")
            if not said or said["flag"] != self._flags.get(name):
                return None
        except (sqlite3.Error, ValueError, LookupError, TypeError) as e:
            log.warning("what was set by hand is not known: %s", e)
            return None
        log.info("%s by hand before this start, and still so: %s", name.replace("_", " "), said["value"])
        return said["value"]
