"""The time of day that follows no later setting of the machine's clock, and goes on while it sleeps."""

import time
from collections.abc import Callable
from pathlib import Path

STEP_S = 2.0
"""Seconds by which the wall clock must leave the steady one to have been set: it drifts by less in a turn."""


def boot_time() -> float:
    """Return seconds since the machine started, with those of its sleep; no setting of the clock matters."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str | None:
    """Return the name of the machine's present start; None where it is not told."""
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def wall_offset() -> float:
    """Return what must be added to `boot_time` for the time of day, as the wall clock stands now."""
    return time.time() - boot_time()


def steady_clock(offset: float | None = None) -> Callable[[], float]:
    """Return epoch seconds that go on evenly: a step of the clock would pass every deadline at once.

    offset: that of an earlier process in the same start of the machine; None takes the wall clock's.
    """
    added = wall_offset() if offset is None else offset
    return lambda: boot_time() + added


class StepDetector:
    """Notices that the wall clock was set."""

    def __init__(self) -> None:
        """Begin with the wall clock as it is."""
        self._offset = wall_offset()

    def step_s(self) -> float:
        """Return by how much it was set since the last call; 0 when it was not."""
        offset = wall_offset()
        by_s, self._offset = offset - self._offset, offset
        return by_s if abs(by_s) >= STEP_S else 0.0
