"""Tests with real processes wait on conditions, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], limit_s: float = 60.0) -> T:
    """What `look` gives as soon as it is true; fails after limit_s."""
    until = time.monotonic() + limit_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.05)
