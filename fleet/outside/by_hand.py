"""What an operator does by hand to single instances and machines.

    drain     out of service; its requests end first, then it is stopped and is cold like others
    replace   the same, but it is destroyed in the end, and another is rented meanwhile
    destroy   ended at once, with its disk and its requests
    ban       its machine is rented no more for a while; forgive: it is, from now on

Each act is in the audit trail with who asked. Drains and replacements that are not over yet survive a
restart.
"""

import json
import logging
import sqlite3
from enum import StrEnum

from fleet.outside.audit import AuditTrail
from fleet.outside.turns import Autoscaler
from fleet.states import GIVEN_UP, SERVING

log = logging.getLogger("autoscaler")

NOTED = "taken_out"
"""Name in the ledger of what is under way: JSON, label -> act."""


class Act(StrEnum):
    """What an operator can do by hand to one instance."""

    DRAIN = "drain"
    REPLACE = "replace"
    DESTROY = "destroy"


class ActRefused(Exception):
    """What an operator asked for makes no sense now; the message says why."""


class ByHand:
    """Carries out what an operator does by hand to instances and machines; any thread may call."""

    def __init__(self, scaler: Autoscaler, audit: AuditTrail | None = None) -> None:
        """Act on the instances of that autoscaler, and write down each act."""
        self._scaler = scaler
        self._audit = audit or AuditTrail(scaler.clock)
        self._noted: dict[str, str] = {}

    def take_over(self) -> None:
        """Go on with drains and replacements that the last process had begun and not ended."""
        scaler = self._scaler
        try:
            noted = json.loads(scaler.ledger.noted(NOTED) or "{}")
        except (sqlite3.Error, ValueError) as e:
            log.warning("what was taken out by hand is not known: %s", e)
            noted = {}
        self._noted = noted
        with scaler.lock:
            for label, act in noted.items():
                if label in scaler.instances:
                    scaler.instances.take_out(label, for_good=act == Act.REPLACE)

    def act(self, act: Act, instance_id: int, who: str) -> str:
        """Carry out an act on an instance; return its label. who: the operator, for the log.

        Raises KeyError when there is no such instance, ActRefused when the act makes no sense now.
        """
        scaler, why = self._scaler, f"{who} asked: {act}"
        with scaler.lock:
            found = next((i for i in scaler.instances if i.id == instance_id), None)
            if found is None:
                raise KeyError(instance_id)
            if found.state in GIVEN_UP:
                raise ActRefused(f"instance {instance_id} is {found.state} already")
            if act is Act.DRAIN and found.state not in SERVING:
                raise ActRefused(f"instance {instance_id} is {found.state}: only what is hot can be drained")
            if act is not Act.DESTROY:
                scaler.instances.take_out(found.label, for_good=act is Act.REPLACE)
                found.explain(why)
        self._audit.add(who, f"{act} instance {instance_id} ({found.label})")
        if act is Act.DESTROY:
            scaler.destroy(why, found.label)
        else:
            self.remember()
            scaler.turn_due.set()
        return found.label

    def ban(self, machine_id: int, for_s: float | None, who: str) -> None:
        """Rent a machine no more for for_s seconds; None: for as long as one that failed."""
        scaler, now = self._scaler, self._scaler.clock()
        with scaler.lock:
            scaler.instances.ban(machine_id, f"{who} asked", now, for_s)
        hours = "as one that failed" if for_s is None else f"for {for_s / 3600.0:g} h"
        self._audit.add(who, f"ban machine {machine_id} {hours}")
        scaler.flush_soon()

    def forgive(self, machine_id: int, who: str) -> bool:
        """Let a machine be rented again; return whether it was avoided."""
        scaler, now = self._scaler, self._scaler.clock()
        with scaler.lock:
            avoided = scaler.instances.forgive(machine_id, now)
        self._audit.add(who, f"forgive machine {machine_id}")
        scaler.flush_soon()
        return avoided

    def remember(self) -> None:
        """Write to the ledger which instances are taken out by hand, where that changed; called each turn."""
        with self._scaler.lock:
            out: dict[str, str] = {
                i.label: Act.REPLACE if i.taken_out.for_good else Act.DRAIN
                for i in self._scaler.instances
                if i.taken_out
            }
        if out == self._noted:
            return
        try:
            self._scaler.ledger.note({NOTED: json.dumps(out)})
        except sqlite3.Error as e:
            log.warning("what was taken out by hand will not survive a restart: %s", e)
            return
        self._noted = out
