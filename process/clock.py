"""The time of day that follows no later setting of the machine's clock."""

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], float]:
    """Epoch seconds as of now, going on evenly: a step of the clock would pass every deadline at once."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset
