"""The unfinished leases: given once for each token, ended once in whatever way.

    given ──► started (a report says that its token was taken) ──► ended
       └──► rests (its room is free) ─────────────────────────────►

A lease ends when a report or its client says so, when it expires without having started, when its instance
leaves or reboots, or when nothing was said of a started one for MAX_SERVE_S.
"""

from collections import deque
from collections.abc import Iterator

from dispatch.allowance import Allowance
from dispatch.duration_histogram import DurationHistogram
from dispatch.instance import ServingInstance
from dispatch.lease import Lease
from dispatch.route_request import RouteRequest
from dispatch.token_stock import TokenLot
from engine.forward import KIND, Floats

MAX_SERVE_S = 3600.0
"""Seconds after which a started lease is released whose end was never reported."""

MAX_LEASES = 200_000
"""Unfinished leases in all, a bound on memory (about 0.5 kB each)."""

ENDS = ("finished", "aborted", "failed", "unused", "expired", "lost")
"""How a lease ends: the first three by a report or its client, unused by its client; expired without having
started; lost with its instance, or because no end was reported."""

NOT_USED = frozenset(("unused", "expired"))
"""Ends of leases whose requests were never sent, as far as is known."""

LASTED_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Upper ends of the buckets by which leases are counted, seconds from their start to their end."""

REMEMBER_DONE = 10_000
"""Leases ended by their client that are remembered until the report that tells their length."""

REMEMBER_ENDED = 4_096
"""Used leases that are remembered until their client tells how fast the answer came: two seconds of 2,000
requests a second, about 2 MB. Of more requests some answers will do."""


class LeaseBook:
    """The unfinished leases by request id, and counts of all leases that were given and have ended."""

    def __init__(self, lease_s: float, max_unused: int) -> None:
        """Start without leases. lease_s: seconds in which one must start; max_unused: most of one client."""
        self.allowance = Allowance(max_unused, lease_s)
        self.given = 0
        self.ends: dict[str, int] = {}  # how leases ended -> how many
        self.lasted = {how: DurationHistogram(LASTED_S) for how in ENDS}
        self.working = 0  # instances with a lease
        self._lease_s = lease_s
        self._leases: dict[str, Lease] = {}
        self._expiring: deque[Lease] = deque()  # by expires_at
        self._serving: deque[Lease] = deque()  # started when they would have expired; by given_at
        self._ended_early: dict[str, int] = {}  # request id -> kind, ended by their client
        self._ended: dict[str, Lease] = {}  # the last ones that were used, until their client tells of them

    def __len__(self) -> int:
        """Return the number of unfinished leases."""
        return len(self._leases)

    def __contains__(self, request_id: str) -> bool:
        """Return whether the lease with that request id is unfinished."""
        return request_id in self._leases

    def get(self, request_id: str) -> Lease | None:
        """Return the unfinished lease with that request id, or None."""
        return self._leases.get(request_id)

    def belongs(self, request_id: str, client: str) -> bool:
        """Return whether the lease with that request id is unfinished and was given to that client."""
        lease = self._leases.get(request_id)
        return lease is not None and lease.client == client

    @property
    def left(self) -> int:
        """How many more leases there may be before MAX_LEASES are unfinished."""
        return MAX_LEASES - len(self._leases)

    def give(
        self,
        inst: ServingInstance,
        request_id: str,
        token: str,
        lot: TokenLot,
        ask: RouteRequest,
        row: Floats,
        prompt_work: float,
        now: float,
    ) -> Lease:
        """Make a lease on an instance and enter it as unfinished. lot: the batch that its token came in.

        row: the request as the instance sees it. prompt_work: the part of its work that is reading its
        prompt.
        """
        spec = inst.spec
        lease = Lease(
            request_id,
            token,
            spec,
            spec.id,
            ask.work,
            now,
            min(now + self._lease_s, lot.expires_at),
            lot,
            inst.boot_id,
            row,
            ask.client,
            inst.room_of(ask.work, row),
            priority=ask.priority,
            trace=ask.trace,
        )
        if not inst.leases:
            self.working += 1
        inst.add_lease(lease, prompt_work, now)
        lease.expect(inst.read_at - now, inst.step_times.told_token_s(len(inst.load.ids)))
        self._leases[request_id] = lease
        self._expiring.append(lease)
        self.allowance.given(lease)
        self.given += 1
        return lease

    def start(self, inst: ServingInstance, lease: Lease, report: int, now: float) -> None:
        """Note that a load report (by its number) says that the lease's token was taken."""
        if lease.rests:
            inst.wake_lease(lease, now)
        self.allowance.settled(lease)
        inst.circuit.started(lease.request_id)
        lease.start(report)

    def end(self, inst: ServingInstance, lease: Lease, how: str, now: float) -> None:
        """End an unfinished lease; how: one of ENDS. The caller updates the index of candidates."""
        lease.end()
        if not lease.started:
            self.allowance.settled(lease)
        if not lease.pace_told and how not in NOT_USED:
            self._ended[lease.request_id] = lease
            if len(self._ended) > REMEMBER_ENDED:
                del self._ended[next(iter(self._ended))]
        del self._leases[lease.request_id]
        inst.end_lease(lease, now)
        if not inst.leases:
            self.working -= 1
        self.ends[how] = self.ends.get(how, 0) + 1
        self.lasted[how].add(now - lease.given_at)

    def lose_all(self, inst: ServingInstance, now: float, *, started_only: bool = False) -> None:
        """End all leases (or only the started ones) of an instance that lost their requests.

        The clients know by their broken connections.
        """
        for lease in list(inst.leases.values()):
            if lease.started or not started_only:
                self.end(inst, lease, "lost", now)

    def take_pace(self, request_id: str, client: str) -> Lease | None:
        """Return a lease of that client whose answer it tells of, once; None: there is none, or it has."""
        lease = self._ended.get(request_id) or self._leases.get(request_id)
        if lease is None or lease.client != client or lease.pace_told:
            return None
        self._ended.pop(request_id, None)
        lease.tell_pace()
        return lease

    def remember_early(self, lease: Lease) -> None:
        """Remember a lease that its client ended, until the report comes that tells the answer's length."""
        self._ended_early[lease.request_id] = int(lease.row[KIND])
        if len(self._ended_early) > REMEMBER_DONE:
            del self._ended_early[next(iter(self._ended_early))]

    def ended_early(self, request_id: str) -> bool:
        """Return whether the client of that lease ended it before its instance reported the end."""
        return request_id in self._ended_early

    def forget_early(self, request_id: str) -> int | None:
        """Forget a lease that its client ended early; return its kind of request, or None if not found."""
        return self._ended_early.pop(request_id, None)

    def due(self, now: float) -> Iterator[tuple[Lease, str]]:
        """Yield (lease, how it ends) for each lease whose time is up; the caller ends it before the next."""
        expiring, serving = self._expiring, self._serving
        while expiring and (expiring[0].over or expiring[0].expires_at <= now):
            lease = expiring.popleft()
            if lease.started and not lease.over:
                serving.append(lease)
            elif not lease.over:
                yield lease, "expired"
        while serving and (serving[0].over or serving[0].given_at + MAX_SERVE_S <= now):
            lease = serving.popleft()
            if not lease.over:
                yield lease, "lost"
        if len(expiring) > 2 * len(self._leases) + 1000:
            self._expiring = deque(lease for lease in expiring if not lease.over)
