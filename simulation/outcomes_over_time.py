"""What became of the requests of a run: counts of those in time, late and failed, by when they came.

A request counts where it was due, not where it ended: a bar shows who came then, and how it went for them.
"""

from typing import Any

MOST_BINS = 4096
"""Most bins that are kept; when a run goes on for longer each becomes twice as wide."""

MOST_SHOWN = 240
"""Most bins of a picture: one for about four pixels of a wide screen."""


class OutcomesOverTime:
    """Counts requests by when they were due and by outcome, in little memory for a run of any length."""

    __slots__ = ("_bins", "_width_s")

    def __init__(self) -> None:
        """Begin without requests, with bins of a second."""
        self._bins: list[list[int]] = []  # in time, late, failed
        self._width_s = 1.0

    def add(self, due_s: float, *, failed: bool, late: bool) -> None:
        """Count a request that was due at that second of the run; late: answered, but not in time."""
        at = int(max(0.0, due_s) / self._width_s)
        while at >= MOST_BINS:
            self._bins = _joined(self._bins, 2)
            self._width_s *= 2.0
            at //= 2
        while at >= len(self._bins):
            self._bins.append([0, 0, 0])
        self._bins[at][2 if failed else 1 if late else 0] += 1

    def columns(self) -> dict[str, Any]:
        """Return the counts as lists by outcome, one value for each width_s seconds from 0 on."""
        factor = max(1, -(-len(self._bins) // MOST_SHOWN))
        bins = _joined(self._bins, factor)
        names = ("in_time", "late", "failed")
        return {"width_s": self._width_s * factor} | {
            name: [one[n] for one in bins] for n, name in enumerate(names)
        }


def _joined(bins: list[list[int]], factor: int) -> list[list[int]]:
    """Return bins that are `factor` times as wide."""
    return [
        [sum(counts) for counts in zip(*bins[at : at + factor], strict=True)]
        for at in range(0, len(bins), factor)
    ]
