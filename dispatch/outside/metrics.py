"""The loadbalancer's page of figures for Prometheus, GET /metrics."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dispatch.duration_histogram import DurationHistogram
from dispatch.outside.service import LoadBalancerService
from web.metrics import Family, counter, gauge, histogram, labelled

FIGURES = (
    ("busy_instances", "Instances' worth of capacity that is in use.", "busy"),
    ("demand_instances", "The same without a cap, with waiting and refused requests.", "demand"),
    ("held_requests", "Requests that wait for a lease.", "held"),
    ("held_work_tokens", "Their work, in output-token equivalents.", "held_work"),
    ("held_late_requests", "Those of them that cannot be in time any more.", "held_late"),
    ("turned_late_requests_total", "Requests that turned late while they waited.", "turned_late"),
    ("oldest_wait_seconds", "How long the request has waited that came first.", "oldest_wait_s"),
    ("arrived_requests_total", "Requests for a lease, each counted once.", "arrivals"),
    ("arrived_work_tokens_total", "Their work, in output-token equivalents.", "arrived_work"),
    ("leases_total", "Leases given.", "routed"),
    ("refused_requests_total", "Requests that got no lease, because no instance had room.", "refused"),
    ("too_many_unused_requests_total", "Requests of clients that hoard leases.", "too_many_unused"),
)
"""Name (a counter where it ends in _total), meaning, and field of GET /status."""

INSTANCE_FIGURES = (
    ("unfinished_leases", "Leases of the instance that have not ended.", "unfinished"),
    ("work_tokens", "Their work that is left, in output-token equivalents.", "work"),
    ("capacity_work_tokens", "Work that the instance may hold.", "capacity_work"),
    ("throughput_work_tokens_per_second", "Work that it does when it is full.", "throughput_work_s"),
    ("tokens_in_stock", "Single-use tokens that wait to be leased.", "tokens_in_stock"),
    ("working_seconds_total", "Seconds with at least one lease.", "working_s"),
    ("failures_total", "Failures seen by the loadbalancer or told by clients.", "failures"),
)
"""The same, of each instance of the status."""

PRIORITY_NAMES = ("high", "normal", "low")

ANSWER_FIGURES = (
    ("first_token_seconds", "From the request for a lease until the first part of its answer."),
    ("token_seconds", "From one part of a streamed answer to the next, over the whole answer."),
    ("answer_seconds", "From the request for a lease until the end of its answer."),
)
"""Name and meaning of the histograms of answers, by what clients tell (POST /pace)."""

Row = tuple[float, ...]
"""Id of an instance, and its figures."""

Histograms = Mapping[str, tuple[Sequence[float], tuple[int, ...], float]]
"""Label -> bounds, counts and sum of a histogram."""


class LoadBalancerMetrics(Collector):
    """All figures of a loadbalancer at one moment; they may be written to a page in any thread."""

    def __init__(self, service: LoadBalancerService, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Copy the figures of a loadbalancer. head: its status; rows: the figures of each instance."""
        leases = service.balancer.leases
        self._head, self._rows = head, rows
        self._hot = service.balancer.instances.hot
        self._heard_age_s = None if service.heard_at is None else service.clock() - service.heard_at
        self._ends = dict(leases.ends)
        self._leased = _counted(dict(zip(PRIORITY_NAMES, service.leased_waits, strict=True)))
        self._waits = {"leased": _total(self._leased), **_counted({"refused": service.refused_waits})}
        self._route_times = _counted({"": service.route_times})
        self._lasted = _counted(leases.lasted)
        times, hot_set = service.balancer.paces.times, service.balancer.instances.hot_set
        self._model = hot_set.model if hot_set else ""
        self._answers = [
            (name, says, _counted(dict(zip(PRIORITY_NAMES, histograms, strict=True))))
            for (name, says), histograms in zip(
                ANSWER_FIGURES, (times.first_token, times.token, times.whole), strict=True
            )
        ]
        self._held_of = dict(zip(PRIORITY_NAMES, service.balancer.queue.held_of, strict=True))
        self._answers_late = times.late

    @classmethod
    async def read(cls, service: LoadBalancerService) -> "LoadBalancerMetrics":
        """Return the figures of now, read in slices, between which requests are answered."""
        head, rows = await service.described(_row)
        return cls(service, head, rows)

    def collect(self) -> Iterator[Family]:
        """Yield the figures of GET /status, and how long requests waited and leases lasted, to Prometheus."""
        for name, says, field in FIGURES:
            make = counter if name.endswith("_total") else gauge
            yield make(f"loadbalancer_{name}", says, self._head[field])
        yield gauge("loadbalancer_hot_instances", "Instances that may be given requests.", self._hot)
        if self._heard_age_s is not None:
            says = "Seconds since the autoscaler last said what is hot, or that it still is so."
            yield gauge("loadbalancer_autoscaler_heard_age_seconds", says, self._heard_age_s)
        says = "Leases that ended, by how."
        yield labelled(CounterMetricFamily, "loadbalancer_lease_ends_total", says, "how", self._ends.items())
        says = "From a request for a lease until it was answered with one or refused; 0 without waiting."
        yield _histogram("loadbalancer_wait_seconds", says, self._waits, "outcome")
        says = "From a request for a lease until it was given one; 0 without waiting."
        of_model = {"model": self._model}
        yield _histogram("loadbalancer_lease_wait_seconds", says, self._leased, "priority", of_model)
        says = "What POST /route took of the event loop, for requests that did not wait."
        yield _histogram("loadbalancer_route_seconds", says, self._route_times)
        says = "From a lease until its end was known, by how it ended."
        yield _histogram("loadbalancer_lease_seconds", says, self._lasted, "how")
        for name, says, told in self._answers:
            yield _histogram(f"loadbalancer_{name}", says, told, "priority", of_model)
        says = "Answers whose first part was not in time, by what clients tell."
        yield counter("loadbalancer_late_answers_total", says, self._answers_late)
        says = "Requests that wait for a lease, by priority."
        held = self._held_of.items()
        yield labelled(GaugeMetricFamily, "loadbalancer_waiting_requests", says, "priority", held)
        for n, (name, says, _) in enumerate(INSTANCE_FIGURES, start=1):
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            values = ((str(row[0]), row[n]) for row in self._rows)
            yield labelled(kind, f"loadbalancer_instance_{name}", says, "instance", values)


def _row(described: Mapping[str, Any]) -> Row:
    return (described["id"], *(described[field] for _, _, field in INSTANCE_FIGURES))


def _counted(of: Mapping[str, DurationHistogram]) -> Histograms:
    return {value: (h.bounds, tuple(h.counts), h.sum_s) for value, h in of.items()}


def _total(of: Histograms) -> tuple[Sequence[float], tuple[int, ...], float]:
    bounds, counts, sums = zip(*of.values(), strict=True)
    return bounds[0], tuple(map(sum, zip(*counts, strict=True))), sum(sums)


def _histogram(
    name: str, says: str, of: Histograms, label: str = "", always: Mapping[str, str] | None = None
) -> Family:
    bounds = next(iter(of.values()))[0]
    return histogram(name, says, bounds, {value: one[1:] for value, one in of.items()}, label, always)
