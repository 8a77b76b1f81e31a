"""The users of a run in virtual time: requests as they arrive, wait for a lease, and are tried again.

    arrive ──► ask for a lease ──► sent ──► answered
                 ▲   │ held: granted later        │ broken off, not started
                 │   └ refused: later             │
                 └────────────────────────────────┘

The next arrival is read from the trace when the one before has happened, and figures are kept as digests, so
memory does not grow with the length of the trace.
"""

import random
from collections.abc import Iterable, Iterator

from dispatch.lease import Lease
from dispatch.route_request import Granted, QueuedRequest, RouteRefused, RouteRequest
from loadbalancer import LoadBalancer
from process.errors import ConfigError
from simulation.outcomes_over_time import OutcomesOverTime
from simulation.report import missed_by
from simulation.traces.request import Request
from simulation.virtual.instances import SimulatedInstances
from simulation.virtual.loop import ARRIVAL, EventLoop
from simulation.virtual.outcome import RequestFigures
from simulation.virtual.setting import Setting
from simulation.virtual.user_request import Place, UserRequest

GRANT_S = (0.02, 0.1)
"""Seconds between two checks whether time alone has made room for a waiting request.

The first pause, doubling up to the second while there is no room. Anything else that makes room causes a
check at once.
"""

STALL_S = 30.0
"""Seconds without a token after which the client breaks an answer off (simulation/live/users.py)."""

LAST_TRY_S = 0.1
"""Shortest pause before another try: when less time is left, the request fails."""


class Users:
    """The users of a run in virtual time, with all their requests.

    figures: of the requests that count; outcomes: of all since the trace began. arrived, ended: requests so
    far. held: requests that wait at the loadbalancer. tokens_delivered: output tokens of the requests that
    were answered.
    """

    def __init__(
        self,
        setting: Setting,
        context: int,
        loop: EventLoop,
        balancer: LoadBalancer,
        instances: SimulatedInstances,
        rng: random.Random,
    ) -> None:
        """Make users without requests. context: the longest request, prompt and answer, in tokens."""
        self.figures = RequestFigures()
        self.outcomes = OutcomesOverTime()
        self.arrived = 0
        self.ended = 0
        self.tokens_delivered = 0
        self.held: dict[QueuedRequest, UserRequest] = {}
        self._setting = setting
        self._context = context
        self._loop = loop
        self._balancer = balancer
        self._instances = instances
        self._rng = rng
        self._requests: Iterator[Request] = iter(())
        self._begun = 0.0
        self._coming = False
        self._asking = 0
        self._sent = 0
        self._grant_due = False
        self._grant_s = GRANT_S[0]
        self._granting = False

    @property
    def idle(self) -> bool:
        """Whether no request is under way and the trace has no more."""
        return not (self._coming or self._asking or self._sent or self.held)

    # -- arrivals --

    def play(self, requests: Iterable[Request], begun_at: float) -> None:
        """Let the requests of this trace arrive; raise ConfigError when it has none. begun_at: its time 0."""
        self._requests = iter(requests)
        self._begun = begun_at
        self._next_arrival()
        if not self._coming:
            raise ConfigError("the trace has no request")

    def _next_arrival(self) -> None:
        request = next(self._requests, None)
        self._coming = request is not None
        if request is not None:
            self._loop.at(self._begun + request.at_s, self._arrive, request, ARRIVAL)

    def _arrive(self, request: Request) -> None:
        offset, prompt, output, _ = request
        if prompt + output > self._context:
            self.figures.add_cut()
            output = min(output, self._context // 2)
            prompt = min(prompt, self._context - output)
        s, balancer, now = self._setting, self._balancer, self._loop.now
        told = output if s.tells_length else None
        ask = RouteRequest(balancer.work_of(prompt, told), told, (), prompt)
        scored = s.score_from_s <= offset < s.score_to_s
        self.arrived += 1
        self._asking += 1
        self._ask(UserRequest(now, prompt, output, ask, now + s.timeout_s, scored), again=False)
        self._next_arrival()

    # -- leases --

    def _ask(self, request: UserRequest, again: bool = True) -> None:
        """Ask the loadbalancer for a lease: the request is sent, waits there, or asks again later."""
        now = self._loop.now
        self.grant()
        answer = self._balancer.request(request.ask, request.up_at - now, None, now, again=again)
        if isinstance(answer, RouteRefused):
            self._refused(request, answer)
            return
        self._asking -= 1
        if isinstance(answer, Granted):
            self._send(request, answer.leases[0])
        else:
            request.hold()
            self.held[answer] = request
            self._plan_grant()

    def _refused(self, request: UserRequest, refused: RouteRefused) -> None:
        now = self._loop.now
        if request.scored:
            self.figures.add_refusal(refused.why)
        after_s = min(refused.retry_after_s * self._rng.uniform(1.0, 1.25), (request.up_at - now) / 2)
        if after_s < LAST_TRY_S:
            self._asking -= 1
            self._give_up(request, "no_capacity")
        else:
            self._loop.at(now + after_s, self._ask, request)

    def _plan_grant(self) -> None:
        if not self._grant_due:
            self._grant_due = True
            self._loop.at(self._loop.now + self._grant_s, self._grant_again)

    def _grant_again(self) -> None:
        self._grant_due = False
        self._grant_s = min(GRANT_S[1], 2.0 * self._grant_s)
        self.grant()
        if self.held:
            self._plan_grant()

    def grant(self) -> None:
        """Send the requests that wait at the loadbalancer and for which instances have room now."""
        if not self.held or self._granting:
            return
        self._granting = True  # what is sent may free room at once: no other round may begin in this one
        for queued, leases in self._balancer.grant(self._loop.now):
            self._grant_s = GRANT_S[0]
            self._send(self.held.pop(queued), leases[0], queued.late)
        self._granting = False
        if len(self.held) > self._balancer.queue.held:
            for queued in [w for w in self.held if w.over]:
                self._give_up(self.held.pop(queued), "no_capacity")

    # -- on instances --

    def _send(self, request: UserRequest, lease: Lease, late: bool = False) -> None:
        request.send(lease, self._loop.now, late)
        self._sent += 1
        instance = self._instances.find(lease.instance_id)
        if instance is not None and instance.frozen:
            self.stall(request)
        elif instance is None or not instance.ready:
            self._set_back(request, "not_started")
        else:
            self._instances.submit(instance, request)

    def answered(self, request: UserRequest, first_at: float, at: float) -> None:
        """Record that a request was answered: when its first token came and when it ended, seconds.

        The loadbalancer is told at once, and learns the answer's length from the instance's report.
        """
        request.complete()
        self._sent -= 1
        self.ended += 1
        self.tokens_delivered += request.output
        came = request.at
        first_s, whole_s = first_at - came, at - came
        missed = missed_by(self._setting.slo, request.prompt, request.output, first_s, whole_s)
        if came >= self._begun:
            self.outcomes.add(came - self._begun, failed=False, late=missed is not None)
        if request.scored:
            figures = self.figures
            figures.add_completed(
                request.prompt, request.output, request.given_at - came, first_s, whole_s, missed
            )
            if request.tries > 1:
                figures.add_retried()
            if request.late:
                figures.add_late()
        self._balancer.end_lease(request.given.request_id, "finished", self._loop.now)

    def broken_off(self, request: UserRequest) -> None:
        """Handle the end of the instance that served a request: ask for another one."""
        self._set_back(request, "broken_off")

    def stall(self, request: UserRequest) -> None:
        """Break a request off in STALL_S seconds if its instance is still silent then."""
        self._loop.at(self._loop.now + STALL_S, self._stalled, request)

    def _stalled(self, request: UserRequest) -> None:
        if request.place is Place.SENT and self._instances.silent(request):
            self._instances.cancel(request)
            self._set_back(request, "broken_off")

    def _set_back(self, request: UserRequest, why: str) -> None:
        """Tell the loadbalancer that an instance failed the request, and ask again while there is time."""
        now = self._loop.now
        lease = request.given
        again = now + request.set_back()
        self._sent -= 1
        self._balancer.end_lease(lease.request_id, "failed", now)
        if request.scored:
            self.figures.add_setback(why)
        if again >= request.up_at:
            self._give_up(request, why)
            return
        self._asking += 1
        self._loop.at(again, self._ask, request)

    def _give_up(self, request: UserRequest, why: str) -> None:
        request.give_up()
        self.ended += 1
        if request.at >= self._begun:
            self.outcomes.add(request.at - self._begun, failed=True, late=False)
        if request.scored:
            self.figures.add_failed(why)
            if request.tries > 1:
                self.figures.add_retried()
