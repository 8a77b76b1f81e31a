"""Fetching tokens from instances: which of them run low, and what to do with their answers."""

from dataclasses import dataclass, field
from itertools import islice

from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.instance_failures import InstanceFailures
from dispatch.lease_book import LeaseBook
from web.messages.hot_set import HotInstance
from web.messages.reports import TokenBatch

TOKEN_LIFE_S = 5.0
"""Least seconds that fetched tokens must live: with less they would be renewed all the time."""

REFILL_DRY, REFILL_LOW = 20, 4
"""Most refills begun in one call, of instances without tokens and of those with few: each is about 0.6 ms of
processor in which nothing is answered."""

REFILL_LOOK = 4 * (REFILL_DRY + REFILL_LOW)
"""Instances looked at in one call, those longest in want first: a thousand may run low in the same second."""


@dataclass(frozen=True)
class Refill:
    """An order to fetch `count` tokens from an instance, and then to call LoadBalancer.complete_refill."""

    spec: HotInstance = field(repr=False)
    count: int

    @property
    def instance_id(self) -> int:
        """The id of the instance to ask."""
        return self.spec.id


@dataclass(slots=True, eq=False)
class TokenRefills:
    """The instances whose stocks of tokens run low, and the fetching of new tokens for them."""

    instances: HotInstances
    leases: LeaseBook
    failures: InstanceFailures
    _low: dict[int, None] = field(init=False, default_factory=dict)  # ids, those longest in want first

    def check(self, inst: ServingInstance, now: float) -> None:
        """Note an instance whose stock of tokens runs low, so that `begin` refills it."""
        if not inst.draining and inst.stock.is_low(now):
            self._low[inst.id] = None

    def forget(self, inst: ServingInstance) -> None:
        """Fetch no more tokens from an instance that has left."""
        self._low.pop(inst.id, None)

    def begin(self, now: float) -> list[Refill]:
        """Return the refills to make now; each counts as under way until `complete` is called for it.

        Instances that came together run low together, so a few are refilled in one call, more of those
        without tokens.
        """
        dry: list[ServingInstance] = []
        low: list[ServingInstance] = []
        for instance_id in list(islice(self._low, REFILL_LOOK)):
            inst = self.instances.by_id[instance_id]
            if inst.draining or not inst.stock.is_low(now):
                del self._low[instance_id]  # it has been filled since
            elif now >= inst.stock.retry_at:
                (low if inst.stock.size else dry).append(inst)
            else:  # it failed lately: the others first
                del self._low[instance_id]
                self._low[instance_id] = None
        out: list[Refill] = []
        for inst in dry[:REFILL_DRY] + low[:REFILL_LOW]:
            del self._low[inst.id]
            out.append(Refill(inst.spec, inst.stock.begin_refill(now)))
        return out

    def complete(self, refill: Refill, batch: TokenBatch | None, now: float) -> None:
        """Take in the tokens of a refill, all with the same life from now; None: the refill failed."""
        inst = self.instances.same(refill.spec)
        if inst is None:
            return
        inst.stock.end_refill()
        if batch is None or not batch.tokens or batch.expires_in_s < TOKEN_LIFE_S:
            inst.stock.postpone_refill(now)
            self.failures.record_failed_refill(inst, now)
        else:
            if inst.boot_id != batch.boot_id:
                self.reboot(inst, batch.boot_id, batch.load.seq, now)
            inst.stock.refill(batch.tokens, batch.expires_in_s, now)
        self.check(inst, now)
        self.instances.index.update(inst, now)

    def reboot(self, inst: ServingInstance, boot_id: str, seq: int, now: float) -> None:
        """Begin another boot of an instance: the tokens and requests of the old one are lost.

        seq: number of the last event of the new boot.
        """
        self.leases.lose_all(inst, now)
        inst.reboot(boot_id, seq, now)
        self.check(inst, now)
