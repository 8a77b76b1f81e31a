"""A clock for the time of day that no later setting of the machine's clock moves; it goes on in suspend."""

import time
from collections.abc import Callable
from pathlib import Path

STEP_S = 2.0
"""Seconds by which the wall clock must leave the steady one to have been set: it drifts by less in a turn."""


def boot_time() -> float:
    """Return seconds since the machine started, suspended ones too; setting the clock changes nothing."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str | None:
    """Return the kernel's id of the machine's present boot; None where it cannot be read."""
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def wall_offset() -> float:
    """Return the seconds to add to `boot_time` for the time of day, as the wall clock stands now."""
    return time.time() - boot_time()


def steady_clock(offset: float | None = None) -> Callable[[], float]:
    """Return a clock of epoch seconds that goes on evenly when somebody sets the wall clock.

    Otherwise a jump would pass every deadline at once. offset: that of an earlier process in the same boot of
    the machine, seconds; None takes the wall clock's.
    """
    added = wall_offset() if offset is None else offset
    return lambda: boot_time() + added


class StepDetector:
    """Notices that somebody set the wall clock."""

    def __init__(self) -> None:
        """Make a detector that compares with the wall clock as it stands now."""
        self._offset = wall_offset()

    def step_s(self) -> float:
        """Return by how many seconds the wall clock was set since the last call; 0 when it was not."""
        offset = wall_offset()
        by_s, self._offset = offset - self._offset, offset
        return by_s if abs(by_s) >= STEP_S else 0.0
