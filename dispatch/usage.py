"""How busy one loadbalancer is, for the autoscaler and for an operator: work, arrivals, waiting requests."""

from typing import Any

from dispatch.circuit_breaker import CircuitState
from dispatch.client_paces import ClientPaces
from dispatch.demand_counter import DemandCounter
from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.instance_failures import InstanceFailures
from dispatch.lease_book import LeaseBook
from dispatch.request_queue import RequestQueue
from web.messages.busy import MAX_INSTANCES, MAX_WORK, BusyReport, InstanceUse, TrafficReport


def measure(
    name: str,
    instances: HotInstances,
    queue: RequestQueue,
    demand: DemandCounter,
    leases: LeaseBook,
    paces: ClientPaces,
    now: float,
) -> BusyReport:
    """Return the busy report of a loadbalancer, for the autoscaler. name: of the loadbalancer.

    Sums that rounding took below 0 are given as 0.
    """
    slo = paces.slo
    uses: dict[int, InstanceUse] = {}
    shares = 0.0
    for inst in instances:
        # What others are said to have there counts as far as the machine can hold it.
        work = max(0.0, min(inst.work(now), max(inst.capacity, inst.leased_work)))
        # Draining instances count with what they have: the work is there, and more like it will come.
        shares += work / inst.capacity
        uses[inst.id] = InstanceUse(
            len(inst.leases),
            min(work, MAX_WORK),
            inst.working_s(now),
            inst.throughput,
            inst.circuit.failures,
            inst.reports.budget.reason(now),
            inst.circuit.slow,
        )
    excess, refused = demand.waiting(queue.work_by_client(), now, instances.typical_capacity, instances.hot)
    held_work = max(0.0, queue.work - excess)
    waiting = held_work + refused
    hot_set = instances.hot_set
    return BusyReport(
        loadbalancer=name,
        hot_epoch=hot_set.epoch if hot_set else None,
        hot_version=hot_set.version if hot_set else None,
        busy=min(float(instances.hot), shares),
        demand=min(MAX_INSTANCES, shares + waiting / instances.typical_capacity),
        held=queue.held,
        held_work=min(held_work, MAX_WORK),
        arrivals=demand.arrivals,
        arrived_work=demand.work,
        instances=uses,
        traffic=TrafficReport(
            prompt_tokens=demand.prompt_tokens,
            output_tokens=max(0.0, demand.output_tokens),
            in_flight=len(leases),
            late=queue.late,
            held_prompt_tokens=queue.prompt_tokens,
            oldest_wait_s=queue.oldest_wait_s(now),
            turned_late=queue.turned_late,
            first_token_s=slo.first_token_s,
            prompt_token_s=slo.prompt_token_s,
            late_bound_s=queue.late_bound_s,
            held_by_priority=(queue.held_of[0], queue.held_of[1], queue.held_of[2]),
        ),
        answers=paces.times.report(),
    )


def describe(
    usage: BusyReport,
    instances: HotInstances,
    leases: LeaseBook,
    demand: DemandCounter,
    failures: InstanceFailures,
) -> dict[str, Any]:
    """Return the figures of the whole loadbalancer that an operator may see in GET /status: no tokens."""
    hot_set = instances.hot_set
    return {
        "hot_epoch": usage.hot_epoch,
        "hot_version": usage.hot_version,
        "model": hot_set.model if hot_set else "",
        "busy": round(usage.busy, 4),
        "demand": round(usage.demand, 4),
        "held": usage.held,
        "held_work": round(usage.held_work, 1),
        "held_late": usage.traffic.late,
        "turned_late": usage.traffic.turned_late,
        "oldest_wait_s": round(usage.traffic.oldest_wait_s, 3),
        "arrivals": usage.arrivals,
        "arrived_work": round(usage.arrived_work, 1),
        "routed": leases.given,
        "refused": demand.refused,
        "too_many_unused": leases.allowance.refused,
        "prompt_too_long": demand.impossible,
        "unheard_clients": failures.votes.unheard,
        "ends": dict(leases.ends),
    }


def describe_instance(inst: ServingInstance, now: float) -> dict[str, Any]:
    """Return the figures of one instance that an operator may see in GET /status: no tokens."""
    work = inst.work(now)
    return {
        "id": inst.id,
        "state": inst.spec.state,
        "address": inst.spec.address,
        "unfinished": len(inst.leases),
        "work": round(work, 1),
        "capacity_work": round(inst.capacity, 1),
        "seconds_to_drain": round(work / inst.throughput, 3),
        "throughput_work_s": round(inst.throughput, 1),
        "throughput_measured": inst.measured,
        "running": inst.reports.running,
        "waiting": inst.reports.waiting,
        "tokens_in_stock": inst.stock.size,
        "reports_pushed": inst.reports.pushes,
        "failures": inst.circuit.failures,
        "out": inst.reports.budget.reason(now),
        "slow": inst.circuit.slow,
        "avoided": inst.circuit.state is CircuitState.OPEN,
        "circuit": inst.circuit.state.value,
        "working_s": round(inst.working_s(now), 1),
    }
