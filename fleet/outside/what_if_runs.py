"""Plays the fleet's last day in virtual time twice, as it is and as an operator asks, in the background.

    arrivals of the last day in the ledger ─► log ─┬─► sim.py --virtual, as it is      ─► two reports
                                                   └─► sim.py --virtual, as was asked  ─►

The runs are child processes of low priority, one at a time, and end with this process.
"""

import logging
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fleet.outside.replay_process import ReplayFailed, ReplayProcess
from fleet.outside.turns import Autoscaler
from fleet.replay import WINDOW_S, BadReply
from fleet.what_if import LEAST_REQUESTS, FleetNow, flags_of, log_of, summary_of
from process.safe_text import safe_text
from web.messages.operator import WhatIfBody

log = logging.getLogger("autoscaler")

MOST_S = 1800.0
"""Seconds after which a run is given up: a day of a million requests takes two minutes."""

SIDES = ("now", "then")
"""The fleet as it is now, and as it was asked for."""


class WhatIfRefused(Exception):
    """No run can begin now; the message says why."""


@dataclass
class _Question:
    """One question and what is known of its answer."""

    asked: WhatIfBody
    since: float
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)
    pages: dict[str, bytes] = field(default_factory=dict)
    trouble: str = ""
    over: bool = False

    def add(self, side: str, summary: dict[str, Any], page: bytes) -> None:
        """Take in the report of one side's run."""
        self.sides[side] = summary
        self.pages[side] = page

    def end(self, trouble: str = "") -> None:
        """Note that nothing more will come. trouble: why it is not complete."""
        self.trouble, self.over = trouble, True


class WhatIfRuns:
    """Answers one question after the other; any thread may call."""

    def __init__(self, scaler: Autoscaler, command: Sequence[str]) -> None:
        """Play the arrivals of that autoscaler. command: of a run in virtual time, without its flags."""
        self._scaler = scaler
        self._process = ReplayProcess(["nice", "-n", "19", *command], MOST_S)
        self._lock = threading.Lock()
        self._question: _Question | None = None
        self._stopping = False

    def ask(self, asked: WhatIfBody) -> None:
        """Begin to play the last day; raise WhatIfRefused where that cannot be."""
        scaler, now = self._scaler, self._scaler.clock()
        scaler.try_write_counts()
        arrived = scaler.ledger.arrived(now - WINDOW_S, now)
        requests = sum(a.requests for a in arrived)
        if requests < LEAST_REQUESTS:
            raise WhatIfRefused(f"{requests:.0f} requests are known of the last day, {LEAST_REQUESTS} needed")
        with scaler.lock:
            fleet = scaler.instances
            state = FleetNow(
                fleet.profile.name,
                scaler.policy,
                fleet.limits.max_instances,
                fleet.limits.max_usd_h,
                scaler.demand.late_bound_s is not None,
            )
            prefill_weight = fleet.profile.prefill_weight
        with self._lock:
            if self._stopping or (self._question is not None and not self._question.over):
                raise WhatIfRefused("the last question is not answered yet")
            question = self._question = _Question(asked, now)
        lines = list(log_of(arrived, prefill_weight))
        threading.Thread(
            target=self._answer, args=(question, lines, state), name="what-if", daemon=True
        ).start()

    def state(self) -> dict[str, Any]:
        """Return the question, how far it is, and the figures of both sides as far as they are known."""
        with self._lock:
            question = self._question
        if question is None:
            return {"state": "none"}
        state = "running" if not question.over else "failed" if question.trouble else "done"
        return {
            "state": state,
            "asked": {k: v for k, v in msgspec.to_builtins(question.asked).items() if v is not None},
            "seconds": round(self._scaler.clock() - question.since, 1),
            "message": question.trouble,
            "sides": dict(question.sides),
        }

    def page(self, side: str) -> bytes | None:
        """Return the report of a side as a page that needs nothing else; None while there is none."""
        with self._lock:
            return None if self._question is None else self._question.pages.get(side)

    def stop(self) -> None:
        """End the run that is under way, and begin none any more."""
        with self._lock:
            self._stopping = True
        self._process.stop()

    def _answer(self, question: _Question, lines: Sequence[str], state: FleetNow) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="what-if-") as folder:
                trace = Path(folder) / "day.csv"
                trace.write_text("".join(lines))
                for side in SIDES:
                    asked = question.asked if side == "then" else None
                    question.add(side, *self._run(Path(folder), trace, flags_of(state, asked)))
        except ReplayFailed as e:
            log.warning("a what-if run failed: %s", e)
            question.end(safe_text(e.said))
        except (BadReply, OSError, ValueError, subprocess.TimeoutExpired) as e:
            log.warning("a what-if run failed: %s", e)
            question.end(safe_text(str(e)))
        else:
            question.end()

    def _run(self, folder: Path, trace: Path, flags: Sequence[str]) -> tuple[dict[str, Any], bytes]:
        report, page = folder / "report.json", folder / "report.html"
        files = [f"--trace={trace}", f"--json={report}", f"--html={page}", "--quiet"]
        self._process.run(b"", [*files, *flags])
        return summary_of(report.read_bytes()), page.read_bytes()
