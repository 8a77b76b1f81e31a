"""Load reports of the instances: when to ask for one, and what to learn from a polled or pushed one.

A report brings the ends of requests, which free work; starts, also of requests that other loadbalancers gave
the instance; and counters, from which throughput, capacity and step times are learned. An instance also
pushes its events by itself, which is faster; but it cannot tell in a push how busy its engine is, so it is
polled as well.
"""

import math
from dataclasses import dataclass, field
from itertools import repeat

from dispatch.allowance import REST_S
from dispatch.circuit_breaker import CircuitState
from dispatch.demand_counter import DemandCounter
from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.instance_failures import InstanceFailures
from dispatch.lease_book import ENDS, LeaseBook
from dispatch.request_estimates import RequestEstimates
from dispatch.token_refills import TokenRefills
from engine.forward import KIND, MOST
from web.messages.hot_set import HotInstance
from web.messages.reports import LoadReport, PushedReport, RequestEnd

IDLE_POLL_RATIO = 5.0
"""How many times less often an instance without work is polled."""

MAX_POLLS_S = 200.0
"""Most load reports asked for in a second, of all instances; at about 0.25 ms of processor each, 5 % of one
core."""

MAX_PUSHES_S, MAX_PUSHES_SOON_S = 400.0, 1000.0
"""Most reports that all instances push in a second, and where other loadbalancers give requests, too: 6 and
15 % of one core, at about 0.15 ms of processor each."""

PUSH_INTERVAL_S = 0.1
"""Least seconds between two pushes of one instance: to see, to send and this are well below 250 ms."""

PUSH_SOON_S = 0.02
"""The same where other loadbalancers give requests, too: what they gave is known only from the pushes. With
0.1 s first tokens came 7 % later (equal machines at 80 %, four loadbalancers; bench/dispatch)."""

SWEEP, POLL_FEW = 10, 4
"""Calls of `due` in which every instance is looked at once, 0.2 s, and most reports asked for in one call."""


@dataclass(frozen=True)
class Poll:
    """An order to ask an instance for its load report, and then to call LoadBalancer.complete_poll.

    after: number of the last event of that instance that is known. address_too: also look whether the address
    that clients use answers, with the instance's certificate.
    """

    spec: HotInstance = field(repr=False)
    after: int
    address_too: bool = False

    @property
    def instance_id(self) -> int:
        """The id of the instance to ask."""
        return self.spec.id


@dataclass(slots=True, eq=False)
class LoadReports:
    """Decides when instances are asked for load reports, and learns from these.

    poll_interval_s: how old a working instance's report may get. output_token_s: the objective, seconds
    between tokens.
    """

    instances: HotInstances
    leases: LeaseBook
    estimates: RequestEstimates
    demand: DemandCounter
    refills: TokenRefills
    failures: InstanceFailures
    poll_interval_s: float
    output_token_s: float
    _to_look_at: list[ServingInstance] = field(init=False, default_factory=list)  # of this sweep

    # -- asking --

    def due(self, now: float) -> list[Poll]:
        """Return which instances to ask for a load report now; none is asked while it still has to answer.

        Each call looks at a part of the instances and asks at most POLL_FEW, so that neither comes in bursts.
        """
        out = [self._poll(inst, now) for inst in self.failures.to_ask(POLL_FEW)]
        for _ in range(math.ceil(len(self.instances) / SWEEP)):
            if len(out) == POLL_FEW:
                break
            if not self._to_look_at:
                self._to_look_at = list(self.instances)
            inst = self._to_look_at.pop()
            reports = inst.reports
            if reports.look_at > now or reports.polling or inst.boot_id is None:
                continue
            due_at = max(reports.polled_at + self._interval_s(inst), reports.budget.out_until)
            if due_at > now:
                reports.look_again(min(due_at, now + self.poll_interval_s))
            elif self.instances.by_id.get(inst.id) is inst:
                out.append(self._poll(inst, now))
        return out

    def _poll(self, inst: ServingInstance, now: float) -> Poll:
        inst.reports.begin_poll(now)
        inst.circuit.asked(now)
        return Poll(inst.spec, inst.reports.seq, inst.circuit.state is not CircuitState.CLOSED)

    def _interval_s(self, inst: ServingInstance) -> float:
        """Return how old the instance's report may get, in seconds; older for idle ones and in large fleets.

        In a large fleet one that is half empty is asked half as often: it will not look full by mistake.
        """
        if inst.circuit.state is not CircuitState.CLOSED:
            return self.poll_interval_s
        if inst.idle and not inst.draining:
            return IDLE_POLL_RATIO * self.poll_interval_s
        half_full = 2.0 * (inst.leased_work + inst.other_work) >= inst.capacity
        share = (1.0 if half_full else 2.0) * self.leases.working / MAX_POLLS_S
        return max(self.poll_interval_s, share)

    # -- polled reports --

    def complete(self, poll: Poll, load: LoadReport | None, now: float, *, reached: bool | None) -> None:
        """Take in the load report that a poll asked for; None: it did not come, a failure of the instance.

        reached: whether the address that clients use answered; None: nobody has looked.
        """
        inst = self.instances.same(poll.spec)
        if inst is None:
            return
        if load is None:
            inst.reports.fail_poll(now)
            self.failures.record_sure_failure(inst, now)
            if inst.reports.silent:
                self.leases.lose_all(inst, now)
        elif inst.reports.budget.take(len(load.started) + len(load.ended), now):
            self._take(inst, load, now, reached)
        else:
            inst.reports.fail_poll(now)
            self.failures.record_sure_failure(inst, now)
        self.instances.index.update(inst, now)

    def _take(self, inst: ServingInstance, load: LoadReport, now: float, reached: bool | None) -> None:
        """Learn from a load report, end the requests that it says ended, and set the instance's work anew."""
        estimates = self.estimates
        asked_at = inst.reports.end_poll(now)
        if inst.boot_id != load.boot_id:
            self.refills.reboot(inst, load.boot_id, load.seq, now)
        inst.reports.take(load)
        inst.learn_speed(load, estimates.prefill_weight, self.output_token_s, now)
        self._take_events(inst, load, inst.reports.count, now)
        inst.rest_unstarted(asked_at - REST_S, now)
        inst.load.mark_reported(now)
        if inst.reports.quiet_twice(load):
            self._end_lost(inst, now)
        inst.drop_missing_others(load, now)
        inst.learn_step_times(load, estimates.mean_prompt, estimates.mean_prompt_squares, now)
        inst.count_requests(load, estimates.mean_work, now)
        down_twice = inst.reports.down_twice(load)
        if load.model_up and reached is not False:
            self.failures.record_contact(inst, asked_at, now, reached=reached is True)
        else:
            self.failures.record_sure_failure(inst, now)
            if down_twice:  # what it was answering has died with it
                self.leases.lose_all(inst, now, started_only=True)

    def _end_lost(self, inst: ServingInstance, now: float) -> None:
        """End the leases that started before this report, since two reports say that nothing is under way.

        Their ends were lost: an instance keeps a bounded number of events, and its figures can lag by a step.
        """
        for lease in [x for x in inst.leases.values() if 0 < x.started < inst.reports.count]:
            self.leases.end(inst, lease, "lost", now)

    # -- pushed reports --

    def take_push(self, instance_id: int, push: PushedReport, now: float) -> float | None:
        """Take in a report that an instance pushed; return the least seconds until its next one.

        None when the report is not believed: of a boot that is not known, not newer than the last one, or of
        an instance that says too much (dispatch/report_budget.py).
        """
        inst = self.instances.by_id.get(instance_id)
        if inst is None or inst.boot_id != push.boot_id or inst.reports.budget.excludes(now):
            return None
        if not inst.reports.budget.take_push(len(push.started) + len(push.ended), now):
            self.failures.record_sure_failure(inst, now)
            self.instances.index.update(inst, now)
            return None
        if not inst.reports.take_push(push):
            return None
        self._take_events(inst, push, inst.reports.count + 1, now)
        inst.load.mark_reported(now)
        inst.reports.follow_push(push, now)
        if not push.model_up:
            self.failures.record_sure_failure(inst, now)
        self.instances.index.update(inst, now)
        if inst.other_requests:
            next_in_s = max(PUSH_SOON_S, self.leases.working / MAX_PUSHES_SOON_S)
        else:
            next_in_s = max(PUSH_INTERVAL_S, self.leases.working / MAX_PUSHES_S)
        inst.reports.budget.promise(next_in_s)
        return next_in_s

    # -- starts and ends --

    def _take_events(
        self, inst: ServingInstance, report: LoadReport | PushedReport, number: int, now: float
    ) -> None:
        """Note the requests that started and end those that ended, by a report. number: of that report."""
        for request_id, body_bytes in zip(report.started, report.started_bytes or repeat(0), strict=False):
            lease = inst.leases.get(request_id)
            if lease is None:
                if request_id not in inst.other_requests and inst.takes_others:
                    self.demand.started()
                    if not self.leases.ended_early(request_id):
                        row = self.estimates.row_of_other(body_bytes)
                        inst.add_other(request_id, row, self.estimates.prefill_weight, now)
            elif not lease.started:
                self.leases.start(inst, lease, number, now)
                self.demand.started()
                self.estimates.started(lease.row, body_bytes, inst.id, self.instances.hot)
        for end in report.ended:
            if end.id in inst.other_requests:
                inst.end_other(end.id, now)
            self._end(inst, end, now)

    def _end(self, inst: ServingInstance, end: RequestEnd, now: float) -> None:
        lease = inst.leases.get(end.id)
        if lease is not None:
            if end.status == "finished":
                self.failures.record_finished(inst, end.id, now)
            elif end.status == "failed":
                self.failures.record_client_failure(inst, lease, now, seen=True)
            self.leases.end(inst, lease, end.status if end.status in ENDS else "failed", now)
            kind: int | None = int(lease.row[KIND])
            most = float(lease.row[MOST])
        else:
            kind, most = self.leases.forget_early(end.id), math.inf
        # An answer without tokens is a refusal, an embedding or the like, and says nothing of other answers.
        if kind is not None and end.status == "finished" and end.output_tokens:
            self.estimates.finished(kind, end.output_tokens, most, inst.id, self.instances.hot)
