"""Failures that clients report of all instances: which to contact at once, which clients to believe.

Clients' words alone may open the circuit breakers of a bounded share of the instances
(dispatch/circuit_breaker.py); an instance in doubt is contacted before all others.
"""

from collections.abc import Collection
from itertools import islice

from dispatch.circuit_breaker import CircuitState
from dispatch.client_votes import ClientVotes
from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.lease import Lease

WORD_SHARE = 0.1
"""Share of the hot instances, and at least one, that may be avoided at a time on clients' words, as
max_ejection_percent of Envoy's outlier detection; of a single instance none, since nobody is helped then.
Clients that find more of them broken, which our own contact does not confirm, are more likely broken
themselves."""


class InstanceFailures:
    """Which instances are in doubt or avoided on clients' words, and which clients are believed."""

    def __init__(self, instances: HotInstances) -> None:
        """Start without failures. instances: those that failures will be reported of."""
        self.votes = ClientVotes()
        self._instances = instances
        self._on_word: set[int] = set()  # avoided on clients' words, or have been
        self._in_doubt: dict[int, None] = {}  # to be contacted at once

    def record_client_failure(
        self,
        inst: ServingInstance,
        lease: Lease,
        now: float,
        *,
        blame: bool = True,
        missed: bool = False,
        seen: bool = False,
    ) -> None:
        """Take in that the request of a lease failed at an instance.

        blame: whether it may be the instance's fault. missed: its client met nobody there, or somebody else.
        seen: the instance itself says so of the answer, not the client.
        """
        if not (seen or self.votes.counts(lease.client, now)):
            return
        if not blame:
            inst.circuit.record_harmless_failure()
            return
        self._on_word = {i for i in self._on_word if self._is_avoided(i)}
        on_word = inst.id in self._on_word or len(self._on_word) < self._most_on_word()
        inst.circuit.record_client_failure(
            lease.client, now, on_word=on_word, missed=missed, seen=seen, probe=lease.request_id
        )
        if inst.circuit.state is CircuitState.OPEN:
            self._on_word.add(inst.id)
        self._ask_at_once(inst)

    def _most_on_word(self) -> float:
        hot = self._instances.hot
        return max(1.0, WORD_SHARE * hot) if hot > 1 else 0.0

    def hold_back(self, inst: ServingInstance, why: str, now: float) -> bool:
        """Give an instance single requests only, since clients say that it is slow; False: not one more.

        It is one of those that may be avoided on clients' words.
        """
        self._on_word = {i for i in self._on_word if self._is_avoided(i)}
        if inst.id not in self._on_word and len(self._on_word) >= self._most_on_word():
            return False
        self._on_word.add(inst.id)
        inst.circuit.hold_back(why, inst.boot_id, now)
        return True

    def held_back(self) -> list[ServingInstance]:
        """Return the instances that are held back because they are slow."""
        found = (self._instances.by_id.get(i) for i in self._on_word)
        return [inst for inst in found if inst is not None and inst.circuit.slow is not None]

    def record_finished(self, inst: ServingInstance, request_id: str, now: float) -> None:
        """Take in that an instance answered a request in full."""
        self._contradict(inst.circuit.finished(request_id), now)

    def record_contact(self, inst: ServingInstance, asked_at: float, now: float, *, reached: bool) -> None:
        """Take in a good load report of an instance. asked_at: when it was asked for, epoch seconds.

        reached: whether the address that clients use answered, too.
        """
        self._contradict(inst.circuit.record_healthy_report(asked_at, now, reached=reached), now)

    def record_sure_failure(self, inst: ServingInstance, now: float) -> None:
        """Take in that the loadbalancer itself saw an instance fail."""
        for client in inst.circuit.trip(now):
            self.votes.confirm(client)

    def _contradict(self, clients: Collection[str], now: float) -> None:
        for client in clients:
            self.votes.contradict(client, now)

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
        if inst is None:
            return False
        return inst.circuit.state is not CircuitState.CLOSED or inst.circuit.slow is not None

    def _ask_at_once(self, inst: ServingInstance) -> None:
        if inst.circuit.to_ask:
            self._in_doubt[inst.id] = None
