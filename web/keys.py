"""The keys of a server, by who may call what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AccessKeys:
    """Keys of one server. With no client or operator key those routes are open: for loopback only.

    control: shared by autoscaler and loadbalancer; it opens the operator's routes, too.
    """

    control: str
    clients: frozenset[str] = frozenset()
    operator: frozenset[str] = frozenset()

    def for_control(self) -> frozenset[str]:
        """Return the keys of routes between autoscaler and loadbalancer."""
        return frozenset({self.control})

    def for_clients(self) -> frozenset[str]:
        """Return the keys of the clients' routes; none: open."""
        return self.clients

    def for_operator(self) -> frozenset[str]:
        """Return the keys of the operator's routes; none: open."""
        return self.operator | {self.control} if self.operator else frozenset()
