"""The loadbalancer's page for Prometheus: waits and lives of leases, and pages for other formats."""

from collections.abc import Callable

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dispatch.duration_histogram import DurationHistogram
from dispatch.outside.service import LoadBalancerService
from dispatch.route_request import RouteRequest
from tests.loadbalancer_app import HOT, LoadBalancerApp
from tests.messages import hot_set
from web.direct import Held


class MovingApp(LoadBalancerApp):
    """The same with a clock that the test moves."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_700_000_000.0
        self.service = self.moving(LoadBalancerService)
        self.stock()

    def moving(self, make: Callable[..., LoadBalancerService]) -> LoadBalancerService:
        """Return a service whose clock is `now`, and serve that one."""
        service = make(self.balancer, lambda: self.now)
        self.client = self.client_of(service)
        return service

    def figures(self) -> dict[tuple[str, str], float]:
        """Return the samples of the page by name and label."""
        text = self.client.get("/metrics").text
        return {
            (s.name, ",".join(s.labels.values())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }


def test_an_end_belongs_to_its_bucket_and_what_is_longer_to_the_last() -> None:
    histogram = DurationHistogram((1.0, 10.0))
    for seconds in (0.0, 1.0, 1.1, 10.0, 11.0):
        histogram.add(seconds)
    assert (histogram.counts, histogram.sum_s) == ([2, 2, 1], 23.1)


def test_a_wait_is_counted_from_the_request_to_its_lease() -> None:
    app = MovingApp()
    first = app.client.post("/route", json={"work": 1000}).get_json()  # fills the instance
    assert isinstance(app.service.route(RouteRequest(500.0), 60.0), Held)
    app.now += 2.0
    app.client.post("/done", json={"request_id": first["request_id"], "outcome": "finished"})
    found = app.figures()
    waits = {le: found["loadbalancer_wait_seconds_bucket", f"leased,{le}"] for le in ("0.01", "1.0", "3.0")}
    assert waits == {"0.01": 1.0, "1.0": 1.0, "3.0": 2.0}
    assert found["loadbalancer_wait_seconds_sum", "leased"] == 2.0
    assert found["loadbalancer_wait_seconds_count", "refused"] == 0.0
    assert found["loadbalancer_route_seconds_count", ""] == 1.0  # the other one waited


def test_a_refusal_counts_the_time_that_its_request_waited() -> None:
    app = MovingApp()
    app.client.post("/route", json={"work": 1000})
    held = app.service.route(RouteRequest(500.0), 5.0)
    assert isinstance(held, Held)
    app.now += 5.0
    assert held.late().status == 503
    assert app.client.post("/route", json={"work": 500}).status_code == 503
    found = app.figures()
    assert found["loadbalancer_wait_seconds_sum", "refused"] == 5.0
    assert found["loadbalancer_wait_seconds_count", "refused"] == 2.0


def test_a_lease_is_counted_by_how_it_ended_and_how_long_it_lasted() -> None:
    app = MovingApp()
    lease = app.client.post("/route", json={"work": 100}).get_json()
    app.now += 4.0
    app.client.post("/done", json={"request_id": lease["request_id"], "outcome": "finished"})
    found = app.figures()
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
    app = MovingApp()
    families = list(text_string_to_metric_families(app.client.get("/metrics").text))
    assert all(f.documentation and f.type in ("gauge", "counter", "histogram") for f in families)
    wanted = "application/openmetrics-text; version=1.0.0"
    answer = app.client.get("/metrics", headers={"Accept": wanted})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    theirs = {f.name for f in openmetrics.text_string_to_metric_families(answer.text)}
    assert theirs == {f.name for f in families}
