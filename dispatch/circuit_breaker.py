"""Whether an instance may be given requests: avoided at once when it fails, and trusted again step by step.

             a word of failure                  its report is good, or a request is finished
    CLOSED ────────────────────► DOUBTED ──────────────────────────────────────────────────► CLOSED
       │                            │ no report within DOUBT_S, or it says: engine down
       │ sure                       │ a second client says so, or one says it ALONE times
       └─────────────► OPEN ◄───────┘◄───────────────────────────┐
                        │ after a pause that doubles,            │ a probe fails
                        │ and its report is good                 │
                        ▼                                        │
                     PROBING: 1 lease ─ finished ─► 2 ─► 4 ─► 8 … ─► CLOSED

Sure is what the loadbalancer has seen itself: a load report that did not come, or that says that the engine
is down. A client's word is no more than that: it makes the instance DOUBTED, which gets single leases, as
probes, and is asked for a report at once. The report takes milliseconds, so a client that lies costs an
instance that, and when it was found to have been wrong no more of its words count as doubt for CALM_S. What
a report cannot show (a port that is closed for clients only, answers of 500) is believed of two clients, or
of one that says so ALONE times while nobody's request is finished there; how many instances one client's
word alone may open is for the caller to bound.

An instance that comes back has nothing to do and so looks better than all others: without the steps it would
be given everything at once (a stampede), and fail again.

Times are epoch seconds.
"""

import math
from enum import Enum

PAUSE_S = (1.0, 30.0)
"""How long it is avoided at least: the first time, doubling up to the second until it is CLOSED again."""

DOUBT_S = 1.0
"""A report that was asked for because of a doubt comes within so long: it takes milliseconds."""

ALONE = 3
"""Failures in a row of which one client tells, with none finished in between by anybody, are believed."""

WORD_S = 10.0
"""A word is forgotten after so long: two in an hour say nothing about the instance."""

CALM_S = 10.0
"""Whose word was wrong raises no doubt about the instance for so long."""

PROBE_S = 10.0
"""A probe that has not started by then does not count: its client may never use it."""

WHOLE = 32
"""With so many at a time all finished, it may have as many as it holds."""


class State(Enum):
    """See above."""

    CLOSED = "closed"
    DOUBTED = "doubted"
    OPEN = "open"
    PROBING = "probing"


class Circuit:
    """The trust in one instance."""

    def __init__(self) -> None:
        """It is trusted."""
        self.state = State.CLOSED
        self.until = -math.inf  # OPEN: it stays so at least until then
        self._pause_s = PAUSE_S[0]
        self._most = 1  # leases at a time while PROBING
        self._probes: dict[str, float] = {}  # request id -> until when it counts
        self._words: dict[str, tuple[int, float]] = {}  # client -> (failures in a row, when the last)
        self._calm: dict[str, float] = {}  # client -> until when its word is no doubt
        self._doubted_at = -math.inf
        self._asked_at: float | None = None

    @property
    def left(self) -> float:
        """Leases it may be given now: inf when it is trusted."""
        if self.state is State.CLOSED:
            return math.inf
        if self.state is State.OPEN:
            return 0
        return max(0, (self._most if self.state is State.PROBING else 1) - len(self._probes))

    @property
    def to_ask(self) -> bool:
        """Whether it is to be asked for a report at once."""
        return self.state is State.DOUBTED and self._asked_at is None

    def asked(self, now: float) -> None:
        """It is asked for a report."""
        if self.state is State.DOUBTED:
            self._asked_at = now

    # -- what happens to leases --

    def given(self, request_id: str, now: float) -> None:
        """It is given a lease; one more than `left` is possible only while it is trusted."""
        if self.state in (State.DOUBTED, State.PROBING):
            self._probes[request_id] = now + PROBE_S

    def started(self, request_id: str) -> None:
        """A request has come there."""
        if request_id in self._probes:
            self._probes[request_id] = math.inf

    def over(self, request_id: str) -> None:
        """A lease is over, in whatever way."""
        self._probes.pop(request_id, None)

    def finished(self, request_id: str) -> None:
        """A request was answered in full; call it before `over`."""
        self._words.clear()
        if self.state is State.DOUBTED:
            self._close()
        elif self.state is State.PROBING and request_id in self._probes:
            self._most *= 2
            if self._most > WHOLE:
                self._close()

    # -- what is said of it --

    def doubt(self, now: float) -> None:
        """Something is wrong that may be no failure: its report will say."""
        if self.state is State.CLOSED:
            self.state, self._doubted_at, self._asked_at = State.DOUBTED, now, None

    def word(
        self, client: str, now: float, *, alone: bool, probe: str | None = None, weight: int = 1
    ) -> None:
        """A client's request failed there. alone: whether one client's word may open it.

        probe: the lease, if it may have been a probe. weight: it counts as so many.
        """
        self._words = {c: w for c, w in self._words.items() if now - w[1] <= WORD_S}
        times = self._words.get(client, (0, now))[0] + weight
        self._words[client] = times, now
        if self.state is State.PROBING:
            if probe in self._probes:
                self.broke(now)
        elif self.state is not State.OPEN:
            if len(self._words) > 1 or (times >= ALONE and alone):
                self.broke(now)
            elif self._calm.get(client, -math.inf) <= now:
                self.doubt(now)

    def broke(self, now: float) -> None:
        """It fails: that is sure."""
        if self.state is not State.OPEN:
            self.state, self.until = State.OPEN, now + self._pause_s
            self._pause_s = min(PAUSE_S[1], 2.0 * self._pause_s)
            self._probes.clear()
            self._words.clear()

    def well(self, asked_at: float, now: float) -> None:
        """A report came that finds nothing wrong. asked_at: when it was asked for."""
        if self.state is State.DOUBTED and asked_at >= self._doubted_at:
            self._calm = {c: until for c, until in self._calm.items() if until > now}
            self._calm.update(dict.fromkeys(self._words, now + CALM_S))
            self._probes.clear()
            self.state = State.CLOSED
        elif self.state is State.OPEN and now >= self.until:
            self.state, self._most = State.PROBING, 1

    def tick(self, now: float) -> bool:
        """Time has passed; whether that changed anything."""
        if self.state is State.DOUBTED and self._asked_at is not None and now - self._asked_at > DOUBT_S:
            self.broke(now)
            return True
        before = len(self._probes)
        if before:
            self._probes = {i: until for i, until in self._probes.items() if until > now}
        return len(self._probes) < before

    def _close(self) -> None:
        self.state = State.CLOSED
        self._pause_s = PAUSE_S[0]
        self._probes.clear()
