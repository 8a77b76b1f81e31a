"""Which instance serves a request: the one where the request delays all requests least.

Candidates are those instances of each class of speed with the least work, and those that have served the
request's prefix; the best few of all are predicted in full (engine/forward.py). Where the best instance has
no room a waiting request claims it: no later request is given that instance before, and others pass to other
instances.

Room is KV memory for what the requests there will grow to, and no more prompts to read than the instance
reads in READING_S: requests that wait inside an instance can be put into no order. Where step times are not
known room is capacity in work.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from dispatch.demand_counter import DemandCounter
from dispatch.hot_instances import HotInstances
from dispatch.instance import READING_S, KvMemory, ServingInstance
from dispatch.prefix_cache import PrefixCache
from dispatch.request_estimates import RequestEstimates
from dispatch.request_queue import RequestQueue
from dispatch.route_request import RouteRequest
from engine.forward import UNREAD, Floats

BEST_FEW = 8
"""Candidates priced by full prediction, the best by the work they have: of 32 instances 8 are
enough (+2 %)."""

PREDICT_MOST = 512
"""Requests that are run forward for one choice: with many on each instance fewer instances are predicted, and
two at least. More would take longer than it may be worth."""

FIRST_TOKEN_WEIGHT = 10.0
"""Seconds of whole latency that a second of first token is worth; 1 is better for the whole latency on
unequal machines, by 4 to 7 %, and costs 12 to 18 % of first token (docs/reference/dispatch-study.md)."""


@dataclass(slots=True, eq=False)
class Chooser:
    """Chooses instances for requests; remembers waiting requests' claims, and who has read which prefix.

    output_token_s: the objective, seconds between tokens. first_token_weight: see FIRST_TOKEN_WEIGHT.
    """

    instances: HotInstances
    estimates: RequestEstimates
    demand: DemandCounter
    queue: RequestQueue
    output_token_s: float
    first_token_weight: float
    _prefixes: PrefixCache[KvMemory] = field(init=False, default_factory=PrefixCache)
    _claimed: set[int] = field(init=False, default_factory=set)  # ids of instances
    _claims_for: RouteRequest | None = field(
        init=False, default=None
    )  # the request that claimed the last one

    # -- one instance for one request --

    def best(self, ask: RouteRequest, row: Floats, now: float, *, hurries: bool) -> ServingInstance | None:
        """Return the instance where the request delays all requests least; None when that has no room for it.

        row: the request in the table of predictions (engine/forward.py). hurries: the request is late, and no
        other is to be served before it (see RequestQueue).
        """
        found = self._candidates(ask.work, {*ask.avoid, *self._claimed}, now, room_is_predicted=True)
        if ask.affinity:
            self._add_holders(found, ask, now)
        if not found or (len(found) == 1 and not found[0].timed):
            return found[0] if found else None
        if self.queue.held and not any(self._admits(row, inst, now, hurries) for inst in found):
            # It would wait for the best of them, whichever that is: a later request must not take it.
            self._claim(found[0], ask)
            return None
        cached = None
        if ask.affinity:
            cached = [self._prefixes.cached_tokens(ask.affinity, inst.memory) for inst in found]
        best = found[
            self.instances.table.best(
                [inst.load.place for inst in found],
                row,
                cached,
                self.estimates.usual,
                # The arrivals that each gets anyway, by its share of the work that all can do.
                self.demand.arrivals_s / max(self.instances.throughput, 1e-9),
                self.estimates.output_lengths.table,
                self.first_token_weight,
                PREDICT_MOST,
                now,
            )
        ]
        if self._admits(row, best, now, hurries):
            return best
        self._claim(best, ask)
        return None

    def _admits(self, row: Floats, inst: ServingInstance, now: float, hurries: bool) -> bool:
        lengths = self.estimates.output_lengths.table
        return inst.admits(row, lengths, self.output_token_s, now, hurries=hurries)

    def _candidates(
        self, work: float, avoid: Collection[int], now: float, *, room_is_predicted: bool = False
    ) -> list[ServingInstance]:
        """Return the best few instances with room, ordered by when each would be done with the added work.

        avoid: ids of instances to leave out. room_is_predicted: whether an instance with known step times has
        room is not looked at here, because the caller predicts it.
        """
        found: list[tuple[float, float, int, ServingInstance]] = []
        for left_s, chance, number, inst in self.instances.index.first(BEST_FEW + len(avoid), now):
            if (not avoid or inst.id not in avoid) and (
                (room_is_predicted and inst.timed) or inst.has_room(work, left_s * inst.throughput, now)
            ):
                found.append((left_s + work / inst.throughput, chance, number, inst))
        found.sort()
        return [inst for _, _, _, inst in found[:BEST_FEW]]

    def _add_holders(self, found: list[ServingInstance], ask: RouteRequest, now: float) -> None:
        """Add to the found candidates the instances that have served the request's prefix."""
        for memory in self._prefixes.holders(ask.affinity):
            inst = memory.instance
            if (
                inst is None
                or inst not in self.instances.index
                or inst.id in ask.avoid
                or inst.id in self._claimed
            ):
                continue
            if (inst.timed or inst.has_room(ask.work, inst.work(now), now)) and inst not in found:
                found.append(inst)

    # -- claims --

    def drop_claims(self) -> None:
        """Drop the claims of waiting requests, so that each instance may be given to any request."""
        self._claimed.clear()
        self._claims_for = None

    def _claim(self, inst: ServingInstance, ask: RouteRequest) -> None:
        """Reserve an instance for a waiting request, so that no later request is given it."""
        self._claimed.add(inst.id)
        self._claims_for = ask

    def only_avoids(self, ask: RouteRequest, now: float) -> bool:
        """Return whether a waiting request lets later requests go first.

        It does when it has claimed an instance, or when the only instances with room are ones that it must
        avoid.
        """
        if self._claims_for is ask:
            return True
        return bool(ask.avoid) and bool(self._candidates(ask.work, (), now))

    # -- several at once --

    def spread(self, ask: RouteRequest, count: int, now: float) -> list[tuple[ServingInstance, int]]:
        """Return (instance, number of leases) pairs for up to count requests like this one.

        Each goes where the least work is, counting those before it. There is no full prediction, because when
        the requests of a batch will come is not known.
        """
        # (score, number, leases so far, work, seconds to read, instance), of more than there are leases
        heap: list[tuple[float, int, int, float, float, ServingInstance]] = []
        work, avoid = ask.work, {*ask.avoid, *self._claimed}
        few = max(BEST_FEW, count // max(1, self.instances.index.classes)) + len(avoid)
        for left_s, _, _, inst in self.instances.index.first(few, now):
            if inst.id not in avoid:
                left = left_s * inst.throughput
                score = left_s + work / inst.throughput
                heap.append((score, len(heap), 0, left, inst.read_at - now, inst))
        heapify(heap)
        share: dict[int, tuple[ServingInstance, int]] = {}
        prompt_work = ask.prompt_tokens * self.estimates.prefill_weight
        while heap and count > 0:
            _, number, n, left, reading_s, inst = heap[0]
            fits = left + work <= inst.capacity and reading_s <= READING_S
            most = min(inst.stock.size, inst.circuit.left, inst.places_left)
            if n >= most or not (fits or (n == 0 and inst.idle)):
                heappop(heap)
                continue
            n += 1
            share[number] = inst, n
            count -= 1
            left += work
            reading_s = max(0.0, reading_s) + prompt_work / inst.throughput
            heapreplace(heap, ((left + work) / inst.throughput, number, n, left, reading_s, inst))
        return list(share.values())

    # -- prefixes --

    def row_at(self, inst: ServingInstance, ask: RouteRequest, row: Floats) -> Floats:
        """Return the request's row as the instance sees it: without a prefix that the instance has served."""
        cached = self._prefixes.cached_tokens(ask.affinity, inst.memory) if ask.affinity else 0.0
        if not cached:
            return row
        here = row.copy()
        here[UNREAD] = max(1.0, row[UNREAD] - cached)
        return here

    def remember_prefixes(self, inst: ServingInstance, ask: RouteRequest) -> None:
        """Note that a request with these prefixes goes to the instance, whose KV memory will hold them."""
        if ask.affinity:
            self._prefixes.served(ask.affinity, inst.memory)
