"""A process's figures as a page for Prometheus, in the format that the asker's Accept header wants.

The figures are read when they are asked for: a collector yields metric families of prometheus-client, whose
exposition writes them. Names hold the unit (`_seconds`, `_dollars`, `_total`); docs/operating.md lists them.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from web.answers import PageAnswer

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def metrics_page(collector: Collector, accept: str) -> PageAnswer:
    """Return the answer of GET /metrics. accept: the asker's Accept header."""
    registry = CollectorRegistry()
    registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return PageAnswer(encode(registry), content_type.encode("latin-1"))


def gauge(name: str, says: str, value: float) -> Family:
    """Return a metric for Prometheus that goes up and down. says: what it means."""
    return GaugeMetricFamily(name, says, value)


def counter(name: str, says: str, value: float) -> Family:
    """Return a metric for Prometheus that only grows while the process lives; its name ends in _total."""
    return CounterMetricFamily(name, says, value)


def labelled(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    says: str,
    label: str,
    values: Iterable[tuple[str, float]],
) -> Family:
    """Return a metric for Prometheus with one figure for each value of a label, (value, figure) in values."""
    family = kind(name, says, labels=(label,))
    for value, figure in values:
        family.add_metric((value,), figure)
    return family


def histogram(
    name: str,
    says: str,
    bounds: Sequence[float],
    counts: Mapping[str, tuple[Sequence[int], float]],
    label: str = "",
    always: Mapping[str, str] | None = None,
) -> Family:
    """Return a histogram of durations for Prometheus, for each value of a label.

    bounds: upper ends of the buckets, seconds, ascending. counts: label's value -> (durations in each bucket,
    and last those above the highest bound; the sum of all in seconds); without a label its one key is "".
    always: further labels, with one value each.
    """
    fixed = dict(always or {})
    family = HistogramMetricFamily(name, says, labels=(*fixed, *((label,) if label else ())))
    ends = [*(str(bound) for bound in bounds), "+Inf"]
    for value, (in_buckets, sum_s) in counts.items():
        buckets = list(zip(ends, accumulate(in_buckets), strict=True))
        family.add_metric((*fixed.values(), *((value,) if label else ())), buckets, sum_s)
    return family
