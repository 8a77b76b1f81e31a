"""The gateway's own figures for Prometheus: what its programs asked and were told, no instance's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from fleet_client.reply import HttpReply

FIRST_BYTE_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper ends of the buckets by which times to the first byte of an answer are counted, seconds."""


class GatewayMetrics:
    """The figures of one gateway process, which GET /metrics shows."""

    def __init__(self) -> None:
        """Start with all figures at zero."""
        self.registry = registry = CollectorRegistry()
        self.open = Gauge(
            "gateway_open_requests", "Requests whose answers are not complete.", registry=registry
        )
        self._answered = Counter(
            "gateway_answers_total", "Answers that began, by their status.", ["status"], registry=registry
        )
        self.broken = Counter(
            "gateway_broken_answers_total", "Answers of instances that broke off.", registry=registry
        )
        self._setbacks = Counter(
            "gateway_setbacks_total", "Instances that failed a request, by how.", ["why"], registry=registry
        )
        self.first_byte = Histogram(
            "gateway_first_byte_seconds",
            "From a request to the first byte of an instance's answer.",
            buckets=FIRST_BYTE_S,
            registry=registry,
        )

    def answered(self, status: int) -> None:
        """Count an answer to a program, by its status."""
        self._answered.labels(str(status)).inc()

    def setback(self, why: str) -> None:
        """Count an instance that failed a request. why: how, in one word."""
        self._setbacks.labels(why).inc()

    def page(self, accept: str) -> HttpReply:
        """Return the page of all figures, in the format that the asker's Accept header wants."""
        encode, content_type = choose_encoder(accept)
        body = encode(self.registry)
        headers = [(b"Content-Type", content_type.encode("latin-1")), (b"Content-Length", b"%d" % len(body))]
        return HttpReply(200, headers, body=body)
