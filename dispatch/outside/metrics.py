"""The loadbalancer's status as a page for Prometheus."""

from collections.abc import Mapping
from typing import Any

FIGURES = (
    ("busy", "gauge", "busy"),
    ("demand", "gauge", "demand"),
    ("held", "gauge", "held"),
    ("held_work", "gauge", "held_work"),
    ("held_late", "gauge", "held_late"),
    ("turned_late_total", "counter", "turned_late"),
    ("oldest_wait_seconds", "gauge", "oldest_wait_s"),
    ("arrivals_total", "counter", "arrivals"),
    ("arrived_work_total", "counter", "arrived_work"),
    ("routed_total", "counter", "routed"),
    ("refused_total", "counter", "refused"),
    ("too_many_unused_total", "counter", "too_many_unused"),
)
"""Name, kind, and field of the status."""

INSTANCE_FIGURES = (
    ("unfinished", "gauge", "unfinished"),
    ("work", "gauge", "work"),
    ("capacity_work", "gauge", "capacity_work"),
    ("throughput_work_s", "gauge", "throughput_work_s"),
    ("tokens_in_stock", "gauge", "tokens_in_stock"),
    ("working_seconds_total", "counter", "working_s"),
    ("failures_total", "counter", "failures"),
)
"""The same, of each instance of the status."""


def metrics_text(status: Mapping[str, Any], hot: int) -> str:
    """Return `GET /metrics` in Prometheus' text format. status: the answer of GET /status."""
    lines: list[str] = []
    for name, kind, key in FIGURES:
        lines += [f"# TYPE loadbalancer_{name} {kind}", f"loadbalancer_{name} {status[key]:.9g}"]
    lines += ["# TYPE loadbalancer_hot gauge", f"loadbalancer_hot {hot}"]
    lines.append("# TYPE loadbalancer_lease_ends_total counter")
    lines += [f'loadbalancer_lease_ends_total{{how="{how}"}} {n}' for how, n in status["ends"].items()]
    for name, kind, key in INSTANCE_FIGURES:
        lines.append(f"# TYPE loadbalancer_instance_{name} {kind}")
        lines += [
            f'loadbalancer_instance_{name}{{instance="{i["id"]}"}} {i[key]:.9g}' for i in status["instances"]
        ]
    return "\n".join(lines) + "\n"
