"""The audit trail: one line for each act of an operator, in the log and in the state directory.

    {"at": 1764500000.0, "who": "anna", "did": "drain instance 7 (fleet/3)"}     audit.jsonl, mode 0600

A line that cannot be written is in the log all the same; the act goes on, because it may be urgent.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from process.safe_text import safe_text

log = logging.getLogger("autoscaler")

MEMORY = 200
"""Acts that are shown; the file has all of them."""

LONGEST_TAIL = 65_536
"""Bytes at the end of the file that are read at a start: more than MEMORY lines."""


@dataclass(frozen=True)
class AuditLine:
    """One act of an operator. at: on the autoscaler's clock. who: name of the key, or the address."""

    at: float
    who: str
    did: str


class AuditTrail:
    """Writes down who did what, and when; any thread may call."""

    def __init__(self, clock: Callable[[], float], path: Path | None = None) -> None:
        """Go on with the lines of that file; without one they are kept in memory and in the log only."""
        self._clock = clock
        self._path = path
        self._lines: deque[AuditLine] = deque(_read_tail(path), maxlen=MEMORY)

    def add(self, who: str, did: str) -> None:
        """Write down that this operator did this now."""
        line = AuditLine(self._clock(), safe_text(who, 80), safe_text(did))
        log.info("by hand: %s: %s", line.who, line.did)
        self._lines.append(line)
        if self._path is None:
            return
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(fd, "a") as f:
                f.write(json.dumps(asdict(line)) + "\n")
        except OSError as e:
            log.warning("%s cannot be written: %s", self._path, e)

    def newest(self) -> list[dict[str, Any]]:
        """Return the acts that are shown, newest first."""
        return [asdict(line) for line in reversed(list(self._lines))]


def _read_tail(path: Path | None) -> list[AuditLine]:
    """Return the last lines of a file of acts; none of a file that is not there or cannot be read."""
    if path is None or not path.exists():
        return []
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - LONGEST_TAIL))
            raw = f.read()
    except OSError as e:
        log.warning("%s cannot be read: %s", path, e)
        return []
    found = []
    for one in raw.decode(errors="replace").splitlines():
        try:
            said = json.loads(one)
            found.append(AuditLine(float(said["at"]), str(said["who"]), str(said["did"])))
        except (ValueError, LookupError, TypeError):
            continue  # cut at the begin of the tail, or by a full disk
    return found
