"""The loadbalancer's page for Prometheus: waits and lives of leases, and pages for other formats."""

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dispatch.duration_histogram import DurationHistogram
from dispatch.route_request import RouteRequest
from tests.loadbalancer_app import HOT, LoadBalancerApp
from tests.messages import hot_set
from web.answers import JsonAnswer
from web.direct import Held


def stocked() -> LoadBalancerApp:
    """An app whose instance is hot and has tokens."""
    app = LoadBalancerApp()
    app.stock()
    return app


def figures(app: LoadBalancerApp) -> dict[tuple[str, str], float]:
    """The samples of the page by name and labels."""
    return {
        (s.name, ",".join(value for _, value in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(app.client.get("/metrics").text)
        for s in family.samples
    }


def test_an_end_belongs_to_its_bucket_and_what_is_longer_to_the_last() -> None:
    histogram = DurationHistogram((1.0, 10.0))
    for seconds in (0.0, 1.0, 1.1, 10.0, 11.0):
        histogram.add(seconds)
    assert (histogram.counts, histogram.sum_s) == ([2, 2, 1], 23.1)


def test_a_wait_is_counted_from_the_request_to_its_lease() -> None:
    app = stocked()
    first = app.client.post("/route", json={"work": 1000}).get_json()  # fills the instance
    assert isinstance(app.service.route(RouteRequest(500.0), 60.0), Held)
    app.clock.now += 2.0
    app.client.post("/done", json={"request_id": first["request_id"], "outcome": "finished"})
    found = figures(app)
    waits = {le: found["loadbalancer_wait_seconds_bucket", f"{le},leased"] for le in ("0.01", "1.0", "3.0")}
    assert waits == {"0.01": 1.0, "1.0": 1.0, "3.0": 2.0}
    assert found["loadbalancer_wait_seconds_sum", "leased"] == 2.0
    assert found["loadbalancer_lease_wait_seconds_sum", "vllm-13,normal"] == 2.0
    assert found["loadbalancer_lease_wait_seconds_count", "vllm-13,high"] == 0.0
    assert found["loadbalancer_wait_seconds_count", "refused"] == 0.0
    assert found["loadbalancer_route_seconds_count", ""] == 1.0  # the other one waited


def test_a_refusal_counts_the_time_that_its_request_waited() -> None:
    app = stocked()
    app.client.post("/route", json={"work": 1000})
    held = app.service.route(RouteRequest(500.0), 5.0)
    assert isinstance(held, Held)
    answer = app.service.route(RouteRequest(500.0), 0.0)
    assert isinstance(answer, JsonAnswer)
    assert answer.status == 503
    app.clock.now += 5.0
    assert held.late().status == 503
    found = figures(app)
    assert found["loadbalancer_wait_seconds_sum", "refused"] == 5.0
    assert found["loadbalancer_wait_seconds_count", "refused"] == 2.0


def test_a_lease_is_counted_by_how_it_ended_and_how_long_it_lasted() -> None:
    app = stocked()
    lease = app.client.post("/route", json={"work": 100}).get_json()
    app.clock.now += 4.0
    app.client.post("/done", json={"request_id": lease["request_id"], "outcome": "finished"})
    found = figures(app)
    assert found["loadbalancer_lease_seconds_bucket", "finished,3.0"] == 0.0
    assert found["loadbalancer_lease_seconds_bucket", "finished,10.0"] == 1.0
    assert found["loadbalancer_lease_seconds_sum", "finished"] == 4.0
    assert found["loadbalancer_lease_seconds_count", "lost"] == 0.0


def test_how_long_ago_the_autoscaler_was_heard_is_absent_before_the_first_time() -> None:
    app = LoadBalancerApp()
    assert "heard_age" not in app.client.get("/metrics").text
    app.service.hot_set(hot_set(HOT))
    assert "loadbalancer_autoscaler_heard_age_seconds 0.0\n" in app.client.get("/metrics").text


def test_every_figure_says_what_it_is_and_openmetrics_is_written_for_who_wants_it() -> None:
    app = stocked()
    families = list(text_string_to_metric_families(app.client.get("/metrics").text))
    assert all(f.documentation and f.type in ("gauge", "counter", "histogram") for f in families)
    wanted = "application/openmetrics-text; version=1.0.0"
    answer = app.client.get("/metrics", headers={"Accept": wanted})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    theirs = {f.name for f in openmetrics.text_string_to_metric_families(answer.text)}  # type: ignore[no-untyped-call]
    assert theirs == {f.name for f in families}
