"""Chapter 2: which instance serves the next request, and how much is going on. No I/O, no clock, no locks.

    hot set ──► HotInstances ◄── token batches, load reports, failures
                     │
    request ──► Chooser ──► lease ──► ended by: a report, its client, expiry before its start, a reboot
                     │                                                      │
                     └─ no room ──► RequestQueue ──► grant ◄── room ◄───────┘

A client asks with `request` and gets a lease (an address and a single-use token), a place in the queue, or a
refusal. The caller calls `grant` whenever room may have appeared, also with time alone, and passes the leases
on to the requests that waited. It performs `refills` and `polls` and brings the answers back.

All that is known of one instance is in dispatch/instance.py; each other part owns its data:

    dispatch/chooser.py             where a request does the least to all requests, claims of waiting ones
    dispatch/candidate_index.py     the instances that can serve, by class of speed
    dispatch/predicted_load.py      the requests inside the instances, moved along by the engine's rule
    dispatch/lease_giver.py         leases of chosen instances, for their tokens
    dispatch/lease_book.py          unfinished leases: given once, ended once
    dispatch/request_queue.py       requests that wait: two lanes, priorities
    dispatch/client_turns.py        whose turn it is among the clients that wait
    dispatch/token_refills.py       fetching tokens
    dispatch/load_reports.py        polls and pushed reports, and what is learned from them
    dispatch/request_estimates.py   expected work of a request, the usual request
    dispatch/demand_counter.py      arrivals and refusals
    dispatch/client_paces.py        instances that are slow by what clients met
    dispatch/agreement.py           instances that lie about lengths

True after every call:
- the work of an instance is the sum over its unfinished leases; a token is leased once;
- every unfinished lease of an instance stands in its predicted load;
- an instance of which only the capacity is known is not given more than that, unless it is idle;
- no new request is given an instance that a request before it in the queue waits for.

Times are epoch seconds, work is in output-token equivalents. All methods belong to one thread.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from dispatch.allowance import MOST_UNUSED
from dispatch.chooser import FIRST_TOKEN_WEIGHT, Chooser
from dispatch.client_paces import ClientPaces
from dispatch.demand_counter import DemandCounter
from dispatch.hot_instances import HotInstances
from dispatch.instance_failures import InstanceFailures
from dispatch.lease import Lease
from dispatch.lease_book import LeaseBook
from dispatch.lease_giver import LeaseGiver
from dispatch.load_reports import LoadReports, Poll
from dispatch.predicted_load import warm_up
from dispatch.request_estimates import EXPECTED_OUTPUT_TOKENS, RequestEstimates
from dispatch.request_queue import LATE_BOUND_S, RequestQueue
from dispatch.route_request import Granted, QueuedRequest, RouteRefused, RouteRequest
from dispatch.token_refills import Refill, TokenRefills
from dispatch.usage import describe, describe_instance, measure
from dispatch.wait_times import WaitTimes
from engine.slo import Slo
from web.messages.busy import BusyReport
from web.messages.hot_set import HotSet
from web.messages.reports import LoadReport, PushedReport, TokenBatch


class LoadBalancer:
    """The hot instances with their work, tokens and leases, and the requests that wait.

    instances, leases, queue: to be looked at; only the methods here change them. paces: what clients met.
    """

    def __init__(
        self,
        rng: random.Random,
        request_id: Callable[[str], str],
        lease_s: float = 60.0,
        max_held: int = 5000,
        poll_interval_s: float = 1.0,
        slo: Slo | None = None,
        late_bound_s: float | None = LATE_BOUND_S,
        first_token_weight: float = FIRST_TOKEN_WEIGHT,
        max_unused: int = MOST_UNUSED,
        grant_at_once: int | None = None,
    ) -> None:
        """Make a loadbalancer without instances. rng: breaks ties between equally good instances.

        request_id: gives the public id of a token. lease_s: a lease that has not started by then is released.
        max_held: requests held at once. poll_interval_s: how old a working instance's report may get. slo:
        what late means. late_bound_s: None for one lane, first come, first served. first_token_weight:
        seconds of whole latency that a second of first token is worth. max_unused: unused leases of one
        client. grant_at_once: requests served by one `grant`.
        """
        warm_up()
        self.slo = slo = slo or Slo()
        self._grant_at_once = grant_at_once
        self._estimates = estimates = RequestEstimates()
        self._demand = demand = DemandCounter()
        self.instances = instances = HotInstances(rng, EXPECTED_OUTPUT_TOKENS)
        self._index = instances.index
        self._failures = failures = InstanceFailures(instances)
        self.leases = leases = LeaseBook(lease_s, max_unused)
        self.queue = queue = RequestQueue(max_held, late_bound_s)
        self.paces = ClientPaces(instances, leases, failures, slo)
        self._refills = refills = TokenRefills(instances, leases, failures)
        token_s = slo.output_token_s
        self._chooser = Chooser(instances, estimates, demand, queue, token_s, first_token_weight)
        self._giver = LeaseGiver(request_id, instances, estimates, self._chooser, refills, leases)
        self._waits = WaitTimes(instances, queue, estimates, slo)
        self._reports = LoadReports(
            instances, leases, estimates, demand, refills, failures, poll_interval_s, token_s
        )

    # -- the hot set --

    def update_hot_set(self, hot_set: HotSet, now: float) -> bool:
        """Take over which instances are hot; False when the hot set is older than the one known.

        Instances that stay keep their leases, tokens and measurements. One that is not named any more, or
        under another address, is forgotten; one that drains keeps its leases and is given no more.
        """
        steps = self.begin_hot_set(hot_set, now)
        if steps is None:
            return False
        for _ in steps:
            pass
        return True

    def begin_hot_set(self, hot_set: HotSet, now: float) -> Iterator[None] | None:
        """Return an iterator that takes over a hot set, one instance a step; None when the hot set is older.

        10,000 new instances take 0.2 s. `instances.hot_set` is the one before until the last step: who has
        it gives no lease on what drains there. A newer hot set, once begun, ends these steps.
        """
        if not self.instances.take(hot_set):
            return None
        self._estimates.update(hot_set)
        self.instances.expect(hot_set.expected_hot_s, now)
        return self._take_over(hot_set, now)

    def _take_over(self, hot_set: HotSet, now: float) -> Iterator[None]:
        instances = self.instances
        named = {spec.id: spec for spec in hot_set.instances}
        for inst in list(instances):
            if not instances.takes(hot_set):
                return
            spec = named.get(inst.id)
            if spec is None or (spec.address, spec.auth_url) != (inst.spec.address, inst.spec.auth_url):
                self.leases.lose_all(inst, now)
                self._refills.forget(inst)
                instances.remove(inst)
                yield
        for spec in hot_set.instances:
            if not instances.takes(hot_set):
                return
            known = instances.by_id.get(spec.id)
            if known is None:
                known = instances.add(spec, now)
            elif known.spec is spec:
                continue  # of 10,000 few have changed
            else:
                known.update(spec, now)
            self._refills.check(known, now)
            self._index.update(known, now)
            yield
        instances.complete(hot_set)

    def expect_hot(self, expected_hot_s: float | None, now: float) -> None:
        """Note in how many seconds the next instance is expected to become hot; None: not known."""
        self.instances.expect(expected_hot_s, now)

    # -- requests --

    def possible_prompt(self, prompt_tokens: int, prompts: int) -> int | None:
        """Return the prompt tokens that a client believes to send, bounded by the context of the model.

        prompts: how many prompts they are in. None: the model can never take them; this counts as no demand.
        """
        found = self._estimates.possible_prompt(prompt_tokens, prompts)
        self._demand.count_impossible(found is None)
        return found

    def work_of(self, prompt_tokens: int, max_tokens: int | None) -> float:
        """Return the work expected of a request with such lengths, in output-token equivalents."""
        return self._estimates.work_of(prompt_tokens, max_tokens)

    def request(
        self, ask: RouteRequest, wait_s: float, count: int | None, now: float, *, again: bool = False
    ) -> Granted | QueuedRequest | RouteRefused:
        """Give a request leases, a place in the queue for up to wait_s, or a refusal.

        count: up to so many leases, and at least one; None: one. again: it is no new arrival. Call `grant`
        first while requests wait: what has become free since the last call is theirs.
        """
        instances = self.instances
        ask = self._estimates.usable(ask, instances.largest_capacity)
        after_s = self.leases.allowance.asks(ask.client, instances.hot, now)
        if after_s is not None:
            return self._too_many(ask, after_s)
        given = self._give(ask, count, now)
        weight = self._estimates.prefill_weight
        counted = again or self._demand.asks(ask, weight, len(given), now, instances)
        if given:
            return Granted(given)
        if wait_s > 0.0:
            queued = self.queue.hold(
                ask,
                now + wait_s,
                now,
                self._waits.until_late_s(ask),
                self._waits.until_served_s(ask, now),
                blocks=not self._chooser.only_avoids(ask, now),
                count=count,
                takes_s=self._waits.takes_s(ask),
                arrives=not counted,
            )
            if queued is not None:
                return queued
        return self._refuse(ask, now)

    def _refuse(self, ask: RouteRequest, now: float) -> RouteRefused:
        self._demand.refuse(ask, now)
        why = "all_busy" if self.instances.hot else "nothing_hot"
        return RouteRefused(why, self._waits.retry_after_s(ask, now))

    def cancel(self, queued: QueuedRequest) -> None:
        """Take a request out of the queue, because its client went away."""
        self.queue.cancel(queued)

    def time_out(self, queued: QueuedRequest, now: float) -> RouteRefused:
        """Refuse a waiting request that has waited for as long as it may."""
        self.queue.cancel(queued)
        after_s = self.leases.allowance.refuse(queued.ask.client, self.instances.hot, now)
        return self._refuse(queued.ask, now) if after_s is None else self._too_many(queued.ask, after_s)

    def _too_many(self, ask: RouteRequest, after_s: float) -> RouteRefused:
        return RouteRefused("too_many_unused", after_s, self.leases.allowance.unused(ask.client))

    def grant(self, now: float) -> list[tuple[QueuedRequest, list[Lease]]]:
        """Give leases to the waiting requests that can be served now; return (request, its leases) pairs.

        Call it whenever room may have appeared, also with time alone, and again when queue.cut.
        """
        self._chooser.drop_claims()
        served = self.queue.grant(
            now,
            lambda ask, hurries: self._giver.one(ask, now, hurries=hurries),
            lambda ask: self._chooser.only_avoids(ask, now),
            self._grant_at_once,
            lambda client: self.leases.allowance.is_used_up(client, self.instances.hot, now),
        )
        granted = [(queued, [lease]) for queued, lease in served]
        self._demand.granted((queued for queued, _ in served), self._estimates.prefill_weight)
        if not self.queue.cut:
            for queued, leases in granted:
                used_up = self.leases.allowance.is_used_up(queued.ask.client, self.instances.hot, now)
                if queued.count is not None and queued.count > 1 and not used_up:
                    # The first lease of a batch is as any; the others are of what the queue leaves.
                    more = self._give(queued.ask, queued.count - 1, now)
                    self._demand.arrived(queued.ask, self._estimates.prefill_weight, len(more))
                    leases += more
        return granted

    def _give(self, ask: RouteRequest, count: int | None, now: float) -> list[Lease]:
        """Give up to count leases for such requests; none if others wait that must be served before."""
        if self.queue.held:
            if self.queue.blocks(ask, now, lambda other: self._chooser.only_avoids(other, now)):
                return []
        else:
            self._chooser.drop_claims()
        if count is not None and (given := self._giver.some(ask, count, now)):
            return given
        lease = self._giver.one(ask, now, hurries=False)
        return [] if lease is None else [lease]

    def end_lease(
        self, request_id: str, outcome: str, now: float, *, blame: bool = True, missed: bool = False
    ) -> bool:
        """End a lease as its client says: finished, failed or unused. False when no such lease is unfinished.

        An unused token is kept for the same client, which knows it and could use it; it is dropped where a
        report said that it was taken. blame: whether the request failed in a way that may be the instance's
        fault. missed: its client met nobody there, or somebody else.
        """
        lease = self.leases.get(request_id)
        if lease is None:
            return False
        inst = self.instances.by_id[lease.instance_id]
        if outcome == "finished":
            self._failures.record_finished(inst, request_id, now)
            self.leases.remember_early(lease)
        elif outcome == "failed":
            self._failures.record_client_failure(inst, lease, now, blame=blame, missed=missed)
        elif not lease.started and lease.boot_id == inst.boot_id:
            inst.stock.give_back(lease.token, lease.lot, lease.client)
        self.leases.end(inst, lease, outcome, now)
        self._index.update(inst, now)
        return True

    def tick(self, now: float) -> None:
        """Let time pass: end leases that expired, drop tokens that are old. Call it every second or so."""
        for _ in self.expire(now):
            pass
        for inst in self.instances:
            inst.stock.drop_old(now)
            if inst.circuit.tick(now) or (not inst.stock.size and inst in self._index):
                self._index.update(inst, now)
            self._refills.check(inst, now)
        self.paces.tick(now)
        self._demand.tick(now)
        self._estimates.tick()
        self._index.drop_empty_classes()
        self.instances.survey()

    def expire(self, now: float) -> Iterator[None]:
        """Return an iterator that ends the leases that expired, one a step; 20,000 take 0.2 s."""
        for lease, how in self.leases.due(now):
            inst = self.instances.by_id[lease.instance_id]
            self.leases.end(inst, lease, how, now)
            self._index.update(inst, now)
            yield

    # -- what to ask of the instances --

    def refills(self, now: float) -> list[Refill]:
        """Return which tokens to fetch from which instances, for `complete_refill`. Call it every 20 ms."""
        return self._refills.begin(now)

    def polls(self, now: float) -> list[Poll]:
        """Return which instances to ask for load reports, for `complete_poll`. Call it every 20 ms."""
        return self._reports.due(now)

    def complete_refill(self, refill: Refill, batch: TokenBatch | None, now: float) -> None:
        """Take in the tokens that a refill fetched; None: the refill failed."""
        self._refills.complete(refill, batch, now)

    def complete_poll(
        self, poll: Poll, report: LoadReport | None, now: float, *, reached: bool | None = None
    ) -> None:
        """Take in the load report that a poll asked for; None: the report did not come.

        reached: whether the address that clients use answered, as it must; None: nobody has looked.
        """
        self._reports.complete(poll, report, now, reached=reached)

    def pushed(self, instance_id: int, report: PushedReport, now: float) -> float | None:
        """Take in a report that an instance pushed; return the least seconds until its next one.

        None when it is not believed.
        """
        return self._reports.take_push(instance_id, report, now)

    # -- what it looks like --

    def usage(self, now: float, name: str = "") -> BusyReport:
        """Return how busy the instances are, for the autoscaler. name: of this loadbalancer."""
        return measure(name, self.instances, self.queue, self._demand, self.leases, self.paces, now)

    def describe(self, now: float) -> dict[str, Any]:
        """Return the figures of the whole that an operator may see, without those of each instance."""
        return describe(self.usage(now), self.instances, self.leases, self._demand, self._failures)

    def describe_instances(self, now: float) -> Iterator[dict[str, Any]]:
        """Yield the figures of each instance that an operator may see; they may change between steps."""
        for inst in list(self.instances):
            yield describe_instance(inst, now) | {"in_queue": inst in self._index}
