"""Whether an instance may be given requests: avoided at once when it fails, and trusted again step by step.

             a client says that one failed      our own contact is good, or a request is finished
    CLOSED ────────────────────► DOUBTED ──────────────────────────────────────────────────► CLOSED
       │                            │ our own contact is bad, or there is none within DOUBT_S
       │ sure                       │ answers failed for two clients, or ALONE times for one
       └─────────────► OPEN ◄───────┘◄───────────────────────────┐
                        │ after a pause that doubles,            │ a probe fails
                        │ and our own contact is good            │
                        ▼                                        │
                     PROBING: 1 lease ─ finished ─► 2 ─► 4 ─► 8 … ─► CLOSED

Sure is what the loadbalancer has seen itself: a load report that did not come, or that says that the engine
is down. What a client says is no more than a claim: it makes the instance DOUBTED, so that it gets single
leases, as probes, and is contacted at once, its report and the address that clients use. That takes
milliseconds, so a client that lies costs an instance that.

A claim that nobody was reached there, or somebody else, is true or false by our own contact and never opens
the circuit beside it. A claim that an answer failed (500, a connection that breaks off) our contact cannot
decide: it is believed of two clients, or of one ALONE times while no request is finished there, where the
caller lets clients' words open it: for a bounded share of the instances only, and of clients whose claims
have not proven false (dispatch/client_votes.py). What the instance itself says of an answer counts the same.

An instance that comes back has nothing to do and so looks better than all others: without the steps it would
be given everything at once (a stampede), and fail again.

Beside all that an instance may be slow, by what clients met there (dispatch/client_paces.py): then it gets
one lease now and then, as a probe.

Times are epoch seconds.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from fleet_client.back_off import back_off_s

PAUSE_S = (1.0, 30.0)
"""Least seconds OPEN: the first time, doubling up to the second until it is CLOSED again."""

DOUBT_S = 1.5
"""Seconds within which a report comes that was asked for because of a doubt: it takes milliseconds, and a new
connection under TLS to the other side of the world four round trips of 0.3 s."""

ALONE = 3
"""Answers in a row of one client that must fail to open the breaker, with no request finished in between."""

MEMORY_S = 10.0
"""Seconds after which a reported failure is forgotten: two in an hour say nothing about the instance."""

CALM_S = 10.0
"""Seconds in which a client whose claim our own contact did not confirm raises no doubt about it."""

PROBE_S = 10.0
"""Seconds after which a probe that has not started does not count: its client may never use it."""

SLOW_PROBE_S = (15.0, 120.0)
"""Seconds between two leases of a slow instance: the first time, doubling up to the second."""

WHOLE = 32
"""Probes at a time after which, when all are finished, the instance may have as many as it holds."""


class CircuitState(Enum):
    """The states of a circuit breaker; the module's docstring pictures the transitions."""

    CLOSED = "closed"
    DOUBTED = "doubted"
    OPEN = "open"
    PROBING = "probing"


@dataclass(slots=True)
class Claim:
    """What one client claims about an instance: that requests of the client failed there.

    at: when the last one did. answers: how many answers in a row failed. missed_at: when the client met
    nobody there. seen: the instance itself has said so of some of them.
    """

    at: float
    answers: int = 0
    missed_at: float | None = None
    seen: bool = False

    def count(self, now: float, *, missed: bool, seen: bool) -> None:
        """Count one more failed request. missed: the client met nobody; seen: the instance itself says so."""
        self.at = now
        self.seen = self.seen or seen
        if missed:
            self.missed_at = now
        else:
            self.answers += 1

    def is_refuted(self, asked_at: float) -> bool:
        """Return whether our own contact since has met the instance that the client did not meet; only once.

        asked_at: when our contact began.
        """
        if self.missed_at is None or self.missed_at > asked_at:
            return False
        self.missed_at = None
        return True


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
        self._claims: dict[str, Claim] = {}  # by client
        self._accusers: frozenset[str] = frozenset()  # clients by whose word alone it was opened
        self._calm: dict[str, float] = {}  # client -> until when it raises no doubt
        self._doubted_at = -math.inf
        self._asked_at: float | None = None
        self.slow: str | None = None  # why it is held back as slow
        self._slow_boot: str | None = None
        self._slow_probes = 0
        self._slow_probe_at = math.inf
        self._spared = False  # slow, but no other can serve

    @property
    def left(self) -> float:
        """How many leases the instance may be given now; inf when CLOSED."""
        if self.slow is not None and not self._spared and self._slow_probe_at > -math.inf:
            return 0
        if self.state is CircuitState.CLOSED:
            return math.inf if self.slow is None or self._spared else 1
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
        if self.slow is not None:
            self._slow_probes += 1
            self._slow_probe_at = now + back_off_s(self._slow_probes, *SLOW_PROBE_S)
        if self.state in (CircuitState.DOUBTED, CircuitState.PROBING):
            self._probes[request_id] = now + PROBE_S

    def started(self, request_id: str) -> None:
        """Let the probe of a request that has started at the instance count until its lease is over."""
        if request_id in self._probes:
            self._probes[request_id] = math.inf

    def over(self, request_id: str) -> None:
        """Forget the probe of a lease that is over in whatever way."""
        self._probes.pop(request_id, None)

    def finished(self, request_id: str) -> Collection[str]:
        """Trust the instance more, because it answered a request in full; call this before `over`.

        Return the clients whose claims this proves false: they opened the circuit, and the first probe is
        fine.
        """
        self._claims.clear()
        if self.state is CircuitState.DOUBTED:
            self._close()
        elif self.state is CircuitState.PROBING and request_id in self._probes:
            self._most *= 2
            liars, self._accusers = self._accusers, frozenset()
            if self._most > WHOLE:
                self._close()
            return liars
        return ()

    # -- what is reported of the instance --

    def doubt(self, now: float) -> None:
        """Doubt the instance: something failed, and its load report will show whether it is broken."""
        self.failures += 1
        self._doubt(now)

    def trip(self, now: float) -> Collection[str]:
        """Open the breaker, because the loadbalancer itself saw the instance fail.

        Return the clients whose claims this confirms.
        """
        self.failures += 1
        right = list(self._claims)
        self._open(now)
        return right

    def record_harmless_failure(self) -> None:
        """Count a failed request that may be no fault of the instance; its state does not change."""
        self.failures += 1

    def record_client_failure(
        self,
        client: str,
        now: float,
        *,
        on_word: bool,
        missed: bool = False,
        seen: bool = False,
        probe: str | None = None,
    ) -> None:
        """Count a request that failed at the instance, as its client says.

        on_word: whether clients' words may open the breaker. missed: the client met nobody, or somebody else.
        seen: the instance itself says that its answer failed. probe: the lease's request id, if it may be a
        probe.
        """
        self.failures += 1
        if self.state is CircuitState.OPEN:
            return
        if self.state is CircuitState.PROBING:
            if probe in self._probes and on_word and not missed:
                self._open(now)
            return
        self._claims = {c: claim for c, claim in self._claims.items() if now - claim.at <= MEMORY_S}
        claim = self._claims.setdefault(client, Claim(now))
        claim.count(now, missed=missed, seen=seen)
        accusers = {c: said for c, said in self._claims.items() if said.answers}
        if on_word and (len(accusers) > 1 or claim.answers >= ALONE):
            self._open(now)
            self._accusers = frozenset(c for c, said in accusers.items() if not said.seen)
        elif self._calm.get(client, -math.inf) <= now:
            self._doubt(now)

    def record_healthy_report(self, asked_at: float, now: float, *, reached: bool = True) -> Collection[str]:
        """Take in a load report without a fault; return the clients whose claims it proves false.

        asked_at: when it was asked for, epoch seconds. reached: whether the address that clients use
        answered, too.
        """
        if self.state is CircuitState.DOUBTED and asked_at >= self._doubted_at:
            self._calm = {c: until for c, until in self._calm.items() if until > now}
            self._calm.update(dict.fromkeys(self._claims, now + CALM_S))
            self._probes.clear()
            self.state = CircuitState.CLOSED
        elif self.state is CircuitState.OPEN and now >= self.until:
            self.state, self._most = CircuitState.PROBING, 1
        if not reached:
            return ()
        return [c for c, claim in self._claims.items() if claim.is_refuted(asked_at)]

    def tick(self, now: float) -> bool:
        """Open the breaker if a doubt got no report in time; drop old probes. Return whether it changed."""
        asked_at = self._asked_at
        if self.state is CircuitState.DOUBTED and asked_at is not None and now - asked_at > DOUBT_S:
            self._open(now)
            return True
        due = -math.inf < self._slow_probe_at <= now
        if due:
            self._slow_probe_at = -math.inf
        before = len(self._probes)
        if before:
            self._probes = {i: until for i, until in self._probes.items() if until > now}
        return due or len(self._probes) < before

    # -- slow by what clients met

    def hold_back(self, why: str, boot_id: str | None, now: float) -> None:
        """Give the instance a lease now and then only, because in this boot it is slow. why: in words."""
        self.slow, self._slow_boot, self._slow_probes, self._spared = why, boot_id, 0, False
        self._slow_probe_at = now + SLOW_PROBE_S[0]

    def trust_pace(self) -> None:
        """Hold the instance back as slow no longer."""
        self.slow, self._slow_probe_at = None, math.inf

    def spare(self, *, alone: bool, boot_id: str | None) -> bool:
        """Let a slow instance serve as others do while it is alone, or when it has rebooted since.

        Return whether that changes anything.
        """
        if boot_id != self._slow_boot:
            self.trust_pace()
            return True
        changed, self._spared = alone != self._spared, alone
        return changed

    def _doubt(self, now: float) -> None:
        if self.state is CircuitState.CLOSED:
            self.state, self._doubted_at, self._asked_at = CircuitState.DOUBTED, now, None

    def _open(self, now: float) -> None:
        if self.state is not CircuitState.OPEN:
            self._opened += 1
            self.state, self.until = CircuitState.OPEN, now + back_off_s(self._opened, *PAUSE_S)
            self._probes.clear()
            self._claims.clear()
            self._accusers = frozenset()

    def _close(self) -> None:
        self.state = CircuitState.CLOSED
        self._opened = 0
        self._probes.clear()
