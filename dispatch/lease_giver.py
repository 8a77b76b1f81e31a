"""Give leases: choose an instance, take a token of its stock, and enter the lease."""

from collections.abc import Callable
from dataclasses import dataclass

from dispatch.chooser import Chooser
from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.lease import Lease
from dispatch.lease_book import LeaseBook
from dispatch.request_estimates import RequestEstimates
from dispatch.route_request import RouteRequest
from dispatch.token_refills import TokenRefills
from dispatch.token_stock import TokenLot
from engine.forward import Floats


@dataclass(slots=True, eq=False)
class LeaseGiver:
    """Gives leases for requests that need not wait. request_id: a function from a token to its public id."""

    request_id: Callable[[str], str]
    instances: HotInstances
    estimates: RequestEstimates
    chooser: Chooser
    refills: TokenRefills
    leases: LeaseBook

    def one(self, ask: RouteRequest, now: float, *, hurries: bool) -> Lease | None:
        """Give a lease on the instance where the request delays all requests least; None: there is no room.

        hurries: the request is late, and no other is to be served before it (see RequestQueue).
        """
        if self.leases.left <= 0:
            return None
        row = self.estimates.row(ask)
        while (inst := self.chooser.best(ask, row, now, hurries=hurries)) is not None:
            taken = inst.stock.take(now, ask.client)
            self.refills.check(inst, now)
            if taken is None:
                self.instances.index.discard(inst)  # its tokens had become too old
                continue
            lease = self._enter(inst, *taken, ask, self.chooser.row_at(inst, ask, row), now)
            if lease is not None:
                self.chooser.remember_prefixes(inst, ask)
                self.instances.index.update(inst, now)
                return lease
        return None

    def some(self, ask: RouteRequest, count: int, now: float) -> list[Lease]:
        """Give up to count leases for requests like this one, on the instances with least work."""
        given: list[Lease] = []
        count = min(count, self.leases.left)
        allowance = self.leases.allowance
        row = self.estimates.row(ask)
        for inst, n in self.chooser.spread(ask, count, now):
            here = self.chooser.row_at(inst, ask, row)
            before = len(given)
            n = min(n, allowance.fit(ask.client, inst.room_of(ask.work, here), self.instances.hot, now))
            for token, lot in inst.stock.take_some(n, now, ask.client):
                lease = self._enter(inst, token, lot, ask, here, now)
                if lease is not None:
                    given.append(lease)
            self.refills.check(inst, now)
            if len(given) > before:
                self.chooser.remember_prefixes(inst, ask)
            self.instances.index.update(inst, now)
        return given

    def _enter(
        self, inst: ServingInstance, token: str, lot: TokenLot, ask: RouteRequest, row: Floats, now: float
    ) -> Lease | None:
        """Enter a lease; return None for a token that is leased already, since an instance may repeat one."""
        request_id = self.request_id(token)
        if request_id in self.leases:
            return None
        prompt_work = ask.prompt_tokens * self.estimates.prefill_weight
        lease = self.leases.give(inst, request_id, token, lot, ask, row, prompt_work, now)
        self.estimates.given(ask.work, row)
        return lease
