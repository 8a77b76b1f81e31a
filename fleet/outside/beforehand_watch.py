"""Holds creates while hub or registry clearly refuse the model or the image, from the start on."""

import logging
import threading

from fleet.outside.beforehand import Access, Beforehand, Finding
from fleet.outside.turns import Autoscaler

log = logging.getLogger("autoscaler")

AGAIN_S = 60.0
"""Seconds between two looks at what was refused."""


class BeforehandWatch:
    """Looks at hub and registry for one autoscaler."""

    def __init__(self, scaler: Autoscaler, beforehand: Beforehand) -> None:
        """Ask nothing yet."""
        self._scaler = scaler
        self._beforehand = beforehand
        self._told: list[Finding] = []

    def look(self) -> list[str]:
        """Ask hub and registry, tell the fleet and the log; return what is refused, in sentences."""
        found = self._beforehand.findings()
        refused = [f.says for f in found if f.access is Access.REFUSED]
        if found != self._told:
            for one in found:
                log.log(logging.INFO if one.access is Access.THERE else logging.WARNING, "%s", one.says)
            self._told = found
        with self._scaler.lock:
            self._scaler.instances.blame.note_beforehand("; ".join(refused), self._scaler.clock())
        return refused

    def run(self, stopped: threading.Event) -> None:
        """Look again until nothing is refused any more, or the event is set; `look` was called once."""
        while any(f.access is Access.REFUSED for f in self._told) and not stopped.wait(AGAIN_S):
            self.look()
