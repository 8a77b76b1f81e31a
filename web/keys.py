"""The access keys of a server, by who may call which routes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AccessKeys:
    """The access keys of one server. Without client or operator keys their routes are open: on loopback only.

    control: shared by autoscaler and loadbalancer; it opens the operator's routes, too. priorities: the
    highest that a client key may ask for, names: of operators' keys, where their lines in the files say so.
    """

    control: str
    clients: frozenset[str] = frozenset()
    operator: frozenset[str] = frozenset()
    priorities: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def for_control(self) -> frozenset[str]:
        """Return the keys that open the routes between autoscaler and loadbalancer."""
        return frozenset({self.control})

    def for_clients(self) -> frozenset[str]:
        """Return the keys that open the clients' routes; if there are none, everybody may call them."""
        return self.clients

    def for_operator(self) -> frozenset[str]:
        """Return the keys that open the operator's routes; if there are none, everybody may call them."""
        return self.operator | {self.control} if self.operator else frozenset()
