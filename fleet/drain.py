"""Draining: how an instance is taken out of service without breaking off a request.

    hot ──Drain──► draining ──Stop──► stopping ──► cold
                      │  ▲
                      │  └── the hot set says so to the loadbalancers: no new work from then on
                      └──Undrain──► hot, when it is needed again

An instance is drained when it says itself, in a health check made after the drain began, that it works on
nothing, and when no lease is out for it: every loadbalancer knows the hot set in which it drains and counts
none. Where no loadbalancer reports, it must say so after the last lease can have expired. After
`Deadlines.draining_s` it is stopped even if it is busy.
"""

from collections.abc import Iterable

from fleet.commands import Stop
from fleet.deadlines import Deadlines
from fleet.demand import Demand
from fleet.instance import Instance
from fleet.states import State


def drained(instances: Iterable[Instance], demand: Demand, lease_s: float) -> frozenset[str]:
    """Return the labels of the draining instances on which there certainly is and will be no request.

    lease_s: seconds for which a lease that was given before the drain may still be used.
    """
    return frozenset(
        i.label for i in instances if i.state is State.DRAINING and _is_drained(i, demand, lease_s)
    )


def _is_drained(i: Instance, demand: Demand, lease_s: float) -> bool:
    if i.id is None or i.in_flight != 0 or i.in_flight_at < i.since:
        return False
    if demand.reporting:
        return demand.no_lease_on(i.id, i.drain_version)
    return i.in_flight_at - i.since > lease_s


def end_of_drain(i: Instance, id: int, is_drained: bool, deadlines: Deadlines, now: float) -> Stop | None:
    """Return the order that ends an instance's drain; None while the drain goes on. id: the instance's."""
    if now - i.since > deadlines.draining_s:
        return Stop(i.label, id, f"still busy {deadlines.draining_s:.0f} s after the drain began")
    return Stop(i.label, id, "its last request has ended") if is_drained else None


def drain_order(hot: Iterable[Instance]) -> list[Instance]:
    """Return the hot instances in the order in which they are to be drained.

    Idle ones come before busy ones, then the dearest for its throughput comes first.
    """
    return sorted(hot, key=lambda i: (bool(i.in_flight), -i.usd_per_work, i.label))
