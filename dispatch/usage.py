"""How much is going on, for the autoscaler: work, arrivals, and the requests that wait."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dispatch.demand_counter import DemandCounter
from dispatch.hot_instances import HotInstances
from dispatch.request_queue import RequestQueue


class InstanceUse(NamedTuple):
    """One instance's part of Usage; working_s and failures are cumulative."""

    unfinished: int
    work: float
    working_s: float
    throughput_work_s: float
    failures: int


@dataclass(frozen=True)
class Usage:
    """What the autoscaler must know. What has arrived or turned late is cumulative; demand counts all.

    arrived_output_tokens: as expected when the requests came. late: held requests that are in the late lane.
    """

    busy: float
    demand: float
    held: int
    held_work: float
    arrivals: int
    arrived_work: float
    instances: Mapping[int, InstanceUse]
    arrived_prompt_tokens: int = 0
    arrived_output_tokens: float = 0.0
    in_flight: int = 0
    late: int = 0
    held_prompt_tokens: int = 0
    oldest_wait_s: float = 0.0
    turned_late: int = 0


def measure(
    instances: HotInstances, queue: RequestQueue, demand: DemandCounter, in_flight: int, now: float
) -> Usage:
    """Return how much is going on now."""
    uses: dict[int, InstanceUse] = {}
    shares = 0.0
    for inst in instances:
        work = inst.work(now)
        # Draining instances count with what they have: the work is there, and more like it will come.
        shares += work / inst.capacity
        uses[inst.id] = InstanceUse(
            len(inst.leases), work, inst.working_s(now), inst.throughput, inst.circuit.failures
        )
    unserved = queue.work + demand.refused_work(now)
    return Usage(
        busy=min(float(instances.hot), shares),
        demand=shares + unserved / instances.typical_capacity,
        held=queue.held,
        held_work=queue.work,
        arrivals=demand.arrivals,
        arrived_work=demand.work,
        instances=uses,
        arrived_prompt_tokens=demand.prompt_tokens,
        arrived_output_tokens=demand.output_tokens,
        in_flight=in_flight,
        late=queue.late,
        held_prompt_tokens=queue.prompt_tokens,
        oldest_wait_s=queue.oldest_wait_s(now),
        turned_late=queue.turned_late,
    )
