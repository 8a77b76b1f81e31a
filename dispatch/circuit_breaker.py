"""Whether an instance may be given requests: avoided at once when it fails, and trusted again step by step.

             a client reports a failure         its report is good, or a request is finished
    CLOSED ────────────────────► DOUBTED ──────────────────────────────────────────────────► CLOSED
       │                            │ no report within DOUBT_S, or it says: engine down
       │ sure                       │ a second client reports one, or one client reports ALONE of them
       └─────────────► OPEN ◄───────┘◄───────────────────────────┐
                        │ after a pause that doubles,            │ a probe fails
                        │ and its report is good                 │
                        ▼                                        │
                     PROBING: 1 lease ─ finished ─► 2 ─► 4 ─► 8 … ─► CLOSED

Sure is what the loadbalancer has seen itself: a load report that did not come, or that says that the engine
is down. What a client reports is no more than that: it makes the instance DOUBTED, so that it gets single
leases, as probes, and is asked for a report at once. The report takes milliseconds, so a client that lies
costs an instance that, and when it was found to be wrong its reports raise no doubt for CALM_S. What a load
report cannot show (a port that is closed for clients only, answers of 500) is believed when two clients
report it, or one client ALONE times while no request of any client is finished there; the caller bounds how
many instances one client alone may open.

An instance that comes back has nothing to do and so looks better than all others: without the steps it would
be given everything at once (a stampede), and fail again.

Times are epoch seconds.
"""

import math
from enum import Enum

from fleet_client.back_off import back_off_s

PAUSE_S = (1.0, 30.0)
"""Least seconds OPEN: the first time, doubling up to the second until it is CLOSED again."""

DOUBT_S = 1.0
"""Seconds within which a report comes that was asked for because of a doubt: it takes milliseconds."""

ALONE = 3
"""Consecutive failures one client must report to open the breaker, with no request finished in between."""

MEMORY_S = 10.0
"""Seconds after which a reported failure is forgotten: two in an hour say nothing about the instance."""

CALM_S = 10.0
"""Seconds in which a client whose report was wrong raises no doubt about the instance."""

PROBE_S = 10.0
"""Seconds after which a probe that has not started does not count: its client may never use it."""

WHOLE = 32
"""Probes at a time after which, when all are finished, the instance may have as many as it holds."""


class CircuitState(Enum):
    """The states of a circuit breaker; the module's docstring pictures the transitions."""

    CLOSED = "closed"
    DOUBTED = "doubted"
    OPEN = "open"
    PROBING = "probing"


class CircuitBreaker:
    """The circuit breaker of one instance: whether it is trusted with requests, and with how many."""

    def __init__(self) -> None:
        """Start CLOSED: the instance is trusted."""
        self.state = CircuitState.CLOSED
        self.until = -math.inf  # OPEN at least until then
        self.failures = 0  # of any kind, so far
        self._opened = 0  # times in a row, without having been CLOSED
        self._most = 1  # leases at a time while PROBING
        self._probes: dict[str, float] = {}  # request id -> until when it counts
        self._reported: dict[str, tuple[int, float]] = {}  # client -> (failures in a row, time of the last)
        self._calm: dict[str, float] = {}  # client -> until when it raises no doubt
        self._doubted_at = -math.inf
        self._asked_at: float | None = None

    @property
    def left(self) -> float:
        """Leases that the instance may be given now; inf when CLOSED."""
        if self.state is CircuitState.CLOSED:
            return math.inf
        if self.state is CircuitState.OPEN:
            return 0
        return max(0, (self._most if self.state is CircuitState.PROBING else 1) - len(self._probes))

    @property
    def to_ask(self) -> bool:
        """Whether the instance is to be asked for a load report at once, because of a new doubt."""
        return self.state is CircuitState.DOUBTED and self._asked_at is None

    def asked(self, now: float) -> None:
        """Note that the instance is asked for a load report, which when DOUBTED must come within DOUBT_S."""
        if self.state is CircuitState.DOUBTED:
            self._asked_at = now

    # -- what happens to leases --

    def given(self, request_id: str, now: float) -> None:
        """Count a lease as a probe, unless CLOSED; the caller gives no more leases than `left`."""
        if self.state in (CircuitState.DOUBTED, CircuitState.PROBING):
            self._probes[request_id] = now + PROBE_S

    def started(self, request_id: str) -> None:
        """Let the probe of a request that has started at the instance count until its lease is over."""
        if request_id in self._probes:
            self._probes[request_id] = math.inf

    def over(self, request_id: str) -> None:
        """Forget the probe of a lease that is over in whatever way."""
        self._probes.pop(request_id, None)

    def finished(self, request_id: str) -> None:
        """Trust the instance more, because it answered a request in full; call this before `over`."""
        self._reported.clear()
        if self.state is CircuitState.DOUBTED:
            self._close()
        elif self.state is CircuitState.PROBING and request_id in self._probes:
            self._most *= 2
            if self._most > WHOLE:
                self._close()

    # -- what is reported of the instance --

    def doubt(self, now: float) -> None:
        """Doubt the instance: something failed, and its load report will show whether it is broken."""
        self.failures += 1
        self._doubt(now)

    def trip(self, now: float) -> None:
        """Open the breaker: the loadbalancer itself saw the instance fail."""
        self.failures += 1
        self._open(now)

    def record_harmless_failure(self) -> None:
        """Count a failure that may be no fault of the instance, and nothing more."""
        self.failures += 1

    def record_client_failure(
        self, client: str, now: float, *, alone: bool, probe: str | None = None, weight: int = 1
    ) -> None:
        """Count a request that failed at the instance, as its client says.

        alone: whether the reports of a single client may open the breaker. probe: request id of the lease,
        which may be a probe. weight: how many failures it counts for.
        """
        self.failures += 1
        self._reported = {c: r for c, r in self._reported.items() if now - r[1] <= MEMORY_S}
        times = self._reported.get(client, (0, now))[0] + weight
        self._reported[client] = times, now
        if self.state is CircuitState.PROBING:
            if probe in self._probes:
                self._open(now)
        elif self.state is not CircuitState.OPEN:
            if len(self._reported) > 1 or (times >= ALONE and alone):
                self._open(now)
            elif self._calm.get(client, -math.inf) <= now:
                self._doubt(now)

    def record_healthy_report(self, asked_at: float, now: float) -> None:
        """Take in a load report without a fault. asked_at: when it was asked for, in epoch seconds."""
        if self.state is CircuitState.DOUBTED and asked_at >= self._doubted_at:
            self._calm = {c: until for c, until in self._calm.items() if until > now}
            self._calm.update(dict.fromkeys(self._reported, now + CALM_S))
            self._probes.clear()
            self.state = CircuitState.CLOSED
        elif self.state is CircuitState.OPEN and now >= self.until:
            self.state, self._most = CircuitState.PROBING, 1

    def tick(self, now: float) -> bool:
        """Open the breaker if a doubt got no report in time; drop old probes. Return whether it changed."""
        asked_at = self._asked_at
        if self.state is CircuitState.DOUBTED and asked_at is not None and now - asked_at > DOUBT_S:
            self._open(now)
            return True
        before = len(self._probes)
        if before:
            self._probes = {i: until for i, until in self._probes.items() if until > now}
        return len(self._probes) < before

    def _doubt(self, now: float) -> None:
        if self.state is CircuitState.CLOSED:
            self.state, self._doubted_at, self._asked_at = CircuitState.DOUBTED, now, None

    def _open(self, now: float) -> None:
        if self.state is not CircuitState.OPEN:
            self._opened += 1
            self.state, self.until = CircuitState.OPEN, now + back_off_s(self._opened, *PAUSE_S)
            self._probes.clear()
            self._reported.clear()

    def _close(self) -> None:
        self.state = CircuitState.CLOSED
        self._opened = 0
        self._probes.clear()
