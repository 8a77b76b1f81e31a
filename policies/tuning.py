"""What a replay of the last day may ask of the policy `objective`, and how long its answer is kept."""

from collections import deque

MARGIN = 0.8
"""Share of the misses the goal allows that a replayed day may have (docs/reference/policy-study.md)."""

MARGIN_KEEP = 0.985
"""Factor by which earlier misses fade at each replay: half in a day of 46, since misses come in bursts."""

MARGIN_LEAST = 5.0
"""Misses that the goal must allow by now before they are judged: with fewer a single one would decide."""

MARGIN_SURE = 12
"""Replays, six hours of them, after which the misses are fully believed."""

LEAST_SHARE = 0.02
"""Least share of the allowed misses that a replayed day may have, however much the fleet missed."""


def worth_keeping_s(load_s: float, running_usd_h: float, stopped_usd_h: float) -> float:
    """Return for how many seconds a stopped instance is worth its storage.

    That is until storage has cost as much as loading the model again: the ski rental rule (Karlin et al.,
    1988), which costs at most twice what perfect knowledge of the future would.
    """
    return load_s * running_usd_h / max(stopped_usd_h, 1e-9)


class Margin:
    """A safety margin: the share of the late requests allowed by the goal that a replayed day may have.

    A replay knows no batching, no single instances and no deaths, so the fleet can miss more than was
    replayed. While it keeps the goal the share is MARGIN, because tomorrow is not today. When it has missed
    more than the goal allows the share falls with the third power of how much: a replay that is wrong by a
    factor m ends at about m^(1/4) times what is allowed.
    """

    def __init__(self, goal: float) -> None:
        """Make a margin for a goal (the share of requests to be served in time), with no misses noted yet."""
        self.goal = goal
        self.share = MARGIN
        self._requests = self._missed = 0.0
        self._notes = 0

    def note(self, requests: float, missed: float) -> float:
        """Add how many requests came and were late since the last replay; return the share for the next."""
        self._notes += 1
        self._requests = self._requests * MARGIN_KEEP + requests
        self._missed = self._missed * MARGIN_KEEP + missed
        allowed = (1.0 - self.goal) * self._requests
        if allowed >= MARGIN_LEAST:
            sure = min(1.0, self._notes / MARGIN_SURE)
            over = 1.0 + sure * max(0.0, self._missed / allowed - 1.0)
            self.share = max(LEAST_SHARE, MARGIN * over**-3)
        return self.share


class KeptPool:
    """The largest pool of loaded instances that replays have asked for lately, so that it is kept.

    From replay to replay the answer changes by an instance, and each change would cost a load.
    """

    def __init__(self) -> None:
        """Make a memory of pool sizes that is still empty."""
        self._found: deque[tuple[float, int]] = deque()

    def note(self, now: float, pool: int, keep_s: float) -> int:
        """Add the pool that a replay asks for now; return the largest one of the last keep_s seconds."""
        while self._found and self._found[-1][1] <= pool:
            self._found.pop()
        self._found.append((now, pool))
        while self._found[0][0] < now - keep_s:
            self._found.popleft()
        return self._found[0][1]
