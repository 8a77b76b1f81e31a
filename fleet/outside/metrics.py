"""The autoscaler's figures as a page for Prometheus."""

from fleet.outside.turns import Autoscaler
from fleet.states import State


def metrics_text(scaler: Autoscaler) -> str:
    """Return `GET /metrics`: instances by state, demand, burn rate, dollars so far, age of the last turn."""
    now = scaler.clock()
    scaler.write_counts()
    costs = scaler.ledger.costs(0.0, now)
    with scaler.lock:
        states = dict.fromkeys(State, 0)
        for i in scaler.instances:
            states[i.state] += 1
        burn = sum(i.price_usd_h for i in scaler.instances)
        demand, busy, held = scaler.demand.demand, scaler.demand.busy, scaler.demand.held
        arrivals = scaler.demand.arrivals
    lines = ["# TYPE autoscaler_instances gauge"]
    lines += [f'autoscaler_instances{{state="{s}"}} {n}' for s, n in states.items()]
    single: list[tuple[str, str, float]] = [
        ("autoscaler_demand_instances", "gauge", demand),
        ("autoscaler_busy_instances", "gauge", busy),
        ("autoscaler_held_requests", "gauge", held),
        ("autoscaler_arrivals_total", "counter", arrivals),
        ("autoscaler_burn_usd_per_hour", "gauge", burn),
        ("autoscaler_last_good_turn_age_seconds", "gauge", now - (scaler.last_good_turn or 0.0)),
    ]
    for name, kind, value in single:
        lines += [f"# TYPE {name} {kind}", f"{name} {value:.9g}"]
    lines.append("# TYPE autoscaler_spent_usd_total counter")
    for kind in ("hot_working", "hot_idle", "loading", "stopped", "lost"):
        lines.append(f'autoscaler_spent_usd_total{{on="{kind}"}} {getattr(costs, kind):.9g}')
    return "\n".join(lines) + "\n"
