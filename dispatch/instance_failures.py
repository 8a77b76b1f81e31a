"""Failures that clients report of all instances: which instances to ask at once, which clients to believe.

One client alone may open the circuit breakers of a few instances only (dispatch/circuit_breaker.py); an
instance in doubt is asked for a load report before all others.
"""

from itertools import islice

from dispatch.circuit_breaker import CircuitState
from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.lease import Lease

ALONE_SHARE = 0.1
"""Share of the hot instances, and at least one, that may be avoided by one client's reports alone. A client
that finds more of them broken, which no other client and no load report confirms, is more likely broken
itself."""


class InstanceFailures:
    """Which instances are in doubt, and which are avoided because of one client's reports alone."""

    def __init__(self, instances: HotInstances) -> None:
        """Start without failures. instances: those that failures will be reported of."""
        self._instances = instances
        self._by_client: set[int] = set()  # avoided by one client's reports alone, or have been
        self._in_doubt: dict[int, None] = {}  # to be asked for a report at once

    def record_client_failure(
        self, inst: ServingInstance, lease: Lease, now: float, *, blame: bool = True, weight: int = 1
    ) -> None:
        """Take in that a lease's request failed at the instance, as its client or the instance's report says.

        blame: whether that may be the instance's fault. weight: how many failures it counts for.
        """
        if not blame:
            inst.circuit.record_harmless_failure()
            return
        self._by_client = {i for i in self._by_client if self._is_avoided(i)}
        alone = inst.id in self._by_client or len(self._by_client) < max(
            1.0, ALONE_SHARE * self._instances.hot
        )
        inst.circuit.record_client_failure(
            lease.client, now, alone=alone, probe=lease.request_id, weight=weight
        )
        if inst.circuit.state is CircuitState.OPEN:
            self._by_client.add(inst.id)
        self._ask_at_once(inst)

    def record_failed_refill(self, inst: ServingInstance, now: float) -> None:
        """Doubt the instance, because it gave no tokens when asked for some."""
        inst.circuit.doubt(now)
        self._ask_at_once(inst)

    def to_ask(self, most: int) -> list[ServingInstance]:
        """Return up to `most` instances in doubt to ask for a report now, but none that is already asked."""
        out: list[ServingInstance] = []
        for instance_id in list(islice(self._in_doubt, most)):
            del self._in_doubt[instance_id]
            inst = self._instances.by_id.get(instance_id)
            if inst is None or inst.boot_id is None or not inst.circuit.to_ask:
                continue
            if inst.reports.polling:
                self._in_doubt[instance_id] = None  # that report was asked for before
            else:
                out.append(inst)
        return out

    def _is_avoided(self, instance_id: int) -> bool:
        inst = self._instances.by_id.get(instance_id)
        return inst is not None and inst.circuit.state is not CircuitState.CLOSED

    def _ask_at_once(self, inst: ServingInstance) -> None:
        if inst.circuit.to_ask:
            self._in_doubt[inst.id] = None
