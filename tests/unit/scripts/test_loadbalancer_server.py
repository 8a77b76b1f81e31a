"""The loadbalancer's routes: what they answer, what they refuse and whom they let in."""

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

import loadbalancer_server
from bench.route.stub_fleet import certificate
from dispatch.route_request import QueuedRequest, RouteRefused, RouteRequest
from engine.slo import Slo
from fleet_client import tls_pins
from fleet_client.listening import bind_socket
from loadbalancer_server import LoadBalancerConfig, create_app
from process.errors import ConfigError
from tests.commands import Exited, run_command
from tests.loadbalancer_app import (
    CERTIFIED,
    CLIENT,
    CONTROL,
    HOT,
    INSTANCE,
    OPERATOR,
    LoadBalancerApp,
    TwoInstances,
)
from tests.messages import hot_set, load_report
from tests.unit.fleet_client.test_trace_context import PARENT, TRACE
from web.direct import DirectRoutes
from web.keys import AccessKeys
from web.messages.decoding import BadField, decode
from web.messages.leases import LeaseAnswer, LeaseBatch
from web.messages.reports import LoadReport


def test_a_lease_holds_what_a_client_needs() -> None:
    app = LoadBalancerApp()
    app.stock()
    answer = app.client.post("/route", json={"prompt_tokens": 100, "max_tokens": 50})
    assert answer.status_code == 200
    assert answer.get_json() == {
        "address": "http://127.0.0.7:8000",
        "token": "token-0000000000000399",
        "request_id": "0000000000000399",
        "instance_id": 7,
        "model": "vllm-13",
        "expires_at": 1_700_000_060.0,
        "expires_in_s": 60.0,
        "first_token_s": 0.1,
    }


def test_with_nothing_hot_the_answer_says_when_to_come_again() -> None:
    app = LoadBalancerApp()
    app.service.hot_set(hot_set({**HOT, "instances": [], "expected_hot_s": 42.3}))
    answer = app.client.post("/route", json={"prompt_tokens": 100})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "43")
    said = answer.get_json()
    assert (said["error"], said["retry_after_s"]) == ("nothing_hot", 42.3)


def test_a_client_is_told_whether_anybody_hears_that_an_instance_is_wanted() -> None:
    app = LoadBalancerApp()

    def message(**said: Any) -> str:
        return str(app.client.post("/route", json={"prompt_tokens": 100, **said}).get_json()["message"])

    assert message() == (
        "no instance is hot; no autoscaler has answered since the loadbalancer started, its operator must "
        "start one; wait_s would let it wait; ask again in 30 s"
    )
    app.service.hot_set(hot_set({**HOT, "instances": []}))
    told = "no instance is hot; the autoscaler has been told; "
    assert message() == told + "wait_s would let it wait; ask again in 30 s"
    assert message(wait_s=0.01) == told + "the request waited 0.01 s; ask again in 30 s"
    heard = app.service.clock()
    app.service.clock = lambda: heard + 61.0
    assert "; the autoscaler has not answered for 61 s, its operator must see to it; " in message()


def test_with_all_busy_the_answer_says_so() -> None:
    app = LoadBalancerApp()
    app.stock()
    assert app.client.post("/route", json={"work": 1000}).status_code == 200
    answer = app.client.post("/route", json={"work": 500})
    assert (answer.status_code, answer.get_json()["error"]) == (503, "all_busy")
    assert answer.get_json()["message"].endswith("not to be used; wait_s would let it wait; ask again in 5 s")
    assert answer.headers["Retry-After"] == "5"
    held = app.client.post("/route", json={"work": 500, "wait_s": 0.01}).get_json()
    assert held["message"].endswith("not to be used; the request waited 0.01 s; ask again in 5 s")


def test_a_client_may_say_how_its_lease_ended_and_say_it_twice() -> None:
    app = LoadBalancerApp()
    app.stock()
    lease = app.client.post("/route", json={"work": 1000}).get_json()
    for _ in range(2):
        done = {"request_id": lease["request_id"], "outcome": "failed", "why": "not_started"}
        answer = app.client.post("/done", json=done)
        assert (answer.status_code, answer.get_json()) == (200, {})
    assert app.balancer.usage(app.service.clock()).instances[7].failures == 1
    assert app.client.post("/route", json={"work": 1000}).status_code == 200


def test_a_lease_says_when_its_first_token_is_expected() -> None:
    app = LoadBalancerApp()
    app.stock()
    said = {"prompt_tokens": 500, "max_tokens": 50}
    leases = [app.client.post("/route", json=said).get_json() for _ in range(2)]
    assert [lease["first_token_s"] for lease in leases] == [0.5, 1.0], "the second is read after the first"


def test_a_client_asks_which_instances_answer_nothing_any_more() -> None:
    app = LoadBalancerApp()

    def out() -> Any:
        return app.client.post("/well", json={"instances": [7, 8]}).get_json()["out"]

    assert out() == {}, "without a hot set nothing is known"
    app.stock()
    assert out() == {"8": "not_hot"}
    app.client.post("/route", json={"work": 500})

    def poll(report: LoadReport | None) -> None:
        app.clock.now += 1.0
        (asked,) = app.balancer.polls(app.clock.now)
        app.balancer.complete_poll(asked, report, app.clock.now)

    for _ in range(2):
        poll(None)
        assert out() == {"8": "not_hot"}
    poll(None)
    assert out() == {"7": "silent", "8": "not_hot"}
    poll(load_report(model_up=False))
    assert out() == {"7": "model_down", "8": "not_hot"}
    poll(load_report())
    assert out() == {"8": "not_hot"}
    assert app.client.post("/well", json={"instances": list(range(257))}).status_code == 400
    assert app.client.post("/well", json={"instances": ["7"]}).status_code == 400


def test_priority_is_a_right_of_the_key() -> None:
    """High counts as normal for a key that may not ask for it; without keys all may."""
    low, plain, high = ("low-" + "l" * 32, "plain-" + "p" * 32, "high-" + "h" * 32)
    app = LoadBalancerApp(frozenset({low, plain, high}), priorities={low: "low", high: "high"})
    asked: list[int] = []

    def request(ask: RouteRequest, *_: object) -> RouteRefused:
        asked.append(ask.priority)
        return RouteRefused("all_busy", 1.0)

    def ask(app: LoadBalancerApp, key: str | None) -> list[int]:
        app.balancer.request = request  # type: ignore[method-assign, assignment]
        asked.clear()
        for priority in ("high", "normal", "low", None):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            app.client.post("/route", json={"work": 10, "priority": priority}, headers=headers)
        return list(asked)

    assert ask(app, high) == [0, 1, 2, 1]
    assert ask(app, plain) == [1, 1, 2, 1]
    assert ask(app, low) == [2, 2, 2, 2]
    assert ask(LoadBalancerApp(), None) == [0, 1, 2, 1]


def test_an_instance_that_is_out_is_told_in_one_line_each_time(caplog: pytest.LogCaptureFixture) -> None:
    app = LoadBalancerApp()
    app.stock()
    inst = app.balancer.instances.by_id[7]
    for _ in range(2):
        app.service.tell_out(7)
        assert not inst.reports.budget.take(10**6, app.clock.now)
        for _ in range(3):
            app.service.tell_out(7)
        app.clock.now += 31.0
    lines = [r.message for r in caplog.records if "is out" in r.message]
    assert (
        lines == ["instance 7 is out for 30 s: it reported 1000000 events in a report, of 65536 at most"] * 2
    )


def test_how_a_lease_ended_is_taken_from_the_client_that_was_given_it_and_from_no_other() -> None:
    """Two clients by their keys: one ends, fails or gives back the other's lease, and nothing happens."""
    other = "other-" + "o" * 32
    app = LoadBalancerApp(frozenset({CLIENT, other}))
    app.stock()

    def post(key: str, path: str, **said: object) -> Any:
        return app.client.post(path, json=said, headers={"Authorization": f"Bearer {key}"})

    lease = post(CLIENT, "/route", work=10).get_json()
    for outcome in ("finished", "failed", "unused"):
        done = {"request_id": lease["request_id"], "outcome": outcome, "why": "wrong_certificate"}
        answer = post(other, "/done", **done)
        assert (answer.status_code, answer.get_json()) == (200, {}), "nor is it told whose it is"
    now = app.service.clock()
    assert (app.balancer.leases.ends, app.balancer.usage(now).instances[7].failures) == ({}, 0)
    post(CLIENT, "/done", request_id=lease["request_id"], outcome="finished")
    assert app.balancer.leases.ends == {"finished": 1}


def test_what_a_client_says_that_met_nobody_is_looked_into_and_not_believed() -> None:
    app = LoadBalancerApp()
    app.stock()
    for why in ("no_connection", "no_tls", "wrong_certificate", "bad_address") * 3:
        lease = app.client.post("/route", json={"work": 10}).get_json()
        done = {"request_id": lease["request_id"], "outcome": "failed", "why": why}
        app.client.post("/done", json=done)
        for poll in app.balancer.polls(app.service.clock()):
            assert poll.address_too
            app.balancer.complete_poll(poll, load_report(), app.service.clock(), reached=True)
        assert app.balancer.instances.by_id[7].circuit.state.value == "closed"
    assert app.balancer.describe(app.service.clock())["unheard_clients"] == 0, (
        "one instance that is met once is one false claim"
    )


def test_clients_say_how_fast_answers_came_and_who_is_slow_is_shown() -> None:
    app = TwoInstances()
    app.stock()
    for n in range(24):
        app.clock.now += 1.0
        lease = app.route(avoid=[7 + n % 2])[1]
        first_s = 9.0 if lease["instance_id"] == 7 else 0.2
        told = {"request_id": lease["request_id"], "first_s": first_s, "rest_s": 0.1, "pieces": 9}
        assert app.client.post("/pace", json={"answers": [told]}).get_json() == {}
        app.client.post("/done", json={"request_id": lease["request_id"], "outcome": "finished"})
    app.balancer.tick(app.clock.now)
    rows = {row["id"]: row["slow"] for row in app.client.get("/status").get_json()["instances"]}
    assert rows[7].startswith("its answers begin after 9.0 s")
    assert rows[8] is None
    assert app.client.post("/pace", json={"answers": [told | {"first_s": -1.0}]}).status_code == 400
    assert app.client.post("/pace", json={"answers": [told] * 65}).status_code == 400


def test_a_wait_that_was_given_up_counts_as_what_it_lasted() -> None:
    app = TwoInstances()
    app.stock()
    for _ in range(8):
        slow, well = (app.route(avoid=[one])[1] for one in (8, 7))
        app.clock.now += 12.0
        gave_up = {"request_id": slow["request_id"], "outcome": "failed", "why": "first_byte"}
        app.client.post("/done", json=gave_up)
        app.balancer.instances.by_id[7].circuit.finished("")  # as if others were served there
        told = {"request_id": well["request_id"], "first_s": 0.2, "rest_s": 0.1, "pieces": 9}
        app.client.post("/pace", json={"answers": [told]})
        app.client.post("/done", json={"request_id": well["request_id"], "outcome": "finished"})
        app.balancer.tick(app.clock.now)
    slow_now = app.balancer.instances.by_id[7].circuit.slow
    assert slow_now is not None
    assert slow_now.startswith("its answers begin after 12.0 s")


def test_status_and_metrics_show_the_instances_and_no_secret() -> None:
    app = LoadBalancerApp()
    app.stock()
    lease = app.client.post("/route", json={"work": 500}).get_json()
    app.client.post("/done", json={"request_id": lease["request_id"], "outcome": "finished"})
    status = app.client.get("/status")
    metrics = app.client.get("/metrics")
    row = status.get_json()["instances"][0]
    assert (row["id"], row["state"], row["unfinished"], row["capacity_work"]) == (7, "hot", 0, 1000.0)
    assert status.get_json()["ends"] == {"finished": 1}
    assert 'loadbalancer_lease_ends_total{how="finished"} 1.0\n' in metrics.text
    assert "loadbalancer_leases_total 1.0\n" in metrics.text
    assert 'loadbalancer_instance_tokens_in_stock{instance="7"} 399.0\n' in metrics.text
    assert all(f.name.startswith("loadbalancer_") for f in text_string_to_metric_families(metrics.text))
    for text in (status.text, metrics.text):
        assert "master-secret" not in text
        assert "token-0" not in text


def test_prompt_tokens_are_told_to_what_decides_who_is_late() -> None:
    app = LoadBalancerApp()
    app.stock()
    app.client.post("/route", json={"prompt_tokens": 1000, "max_tokens": 50})
    now = app.service.clock()
    assert app.balancer.usage(now).traffic.prompt_tokens == 1000
    assert app.balancer.instances.by_id[7].read_at == now + 1.0


def test_status_and_metrics_show_who_is_late() -> None:
    app = LoadBalancerApp()
    app.stock()
    now = app.service.clock()
    app.client.post("/route", json={"work": 1000})
    app.balancer.request(RouteRequest(210.0), 5.0, None, now)
    app.balancer.request(RouteRequest(10.0), 5.0, None, now)
    status = app.client.get("/status").get_json()
    assert (status["held"], status["held_late"], status["turned_late"]) == (2, 1, 1)
    metrics = app.client.get("/metrics").text
    name = "loadbalancer_held_late_requests"
    assert f"# TYPE {name} gauge\n{name} 1.0\n" in metrics
    name = "loadbalancer_turned_late_requests_total"
    assert f"# TYPE {name} counter\n{name} 1.0\n" in metrics


def test_a_lease_is_answered_as_an_encoder_would_put_it() -> None:
    fleet = TwoInstances()
    fleet.stock()
    for _ in range(4):
        answer = fleet.client.post("/route", json={"work": 10.0})
        assert answer.data == msgspec.json.encode(decode(answer.data, LeaseAnswer))
    answer = fleet.client.post("/route", json={"work": 10.0, "count": 30})
    assert answer.data == msgspec.json.encode(decode(answer.data, LeaseBatch))


def test_a_batch_is_so_many_leases_and_each_certificate_once() -> None:
    fleet = TwoInstances()
    fleet.stock()
    status, said = fleet.route(count=32)
    assert status == 200
    assert list(said) == ["leases", "certificates"]
    assert len(said["leases"]) == 32
    assert said["certificates"] == {
        "8": {
            "certificate": certificate(),
            "public_key_sha256": tls_pins.public_key_sha256(certificate()),
        }
    }
    _, single = fleet.route(avoid=[8])
    for lease in said["leases"]:
        assert lease.keys() == single.keys()
        assert lease["address"] == {7: INSTANCE, 8: CERTIFIED}[lease["instance_id"]]["address"]
    assert len({lease["token"] for lease in said["leases"]}) == 32
    assert [sum(x["instance_id"] == i for x in said["leases"]) for i in (7, 8)] == [16, 16]
    assert fleet.balancer.usage(fleet.service.clock()).arrivals == 33


def test_a_batch_is_fewer_when_there_is_room_for_fewer_and_503_when_there_is_none() -> None:
    fleet = TwoInstances()
    fleet.stock()
    status, said = fleet.route(work=400.0, count=64)
    assert (status, len(said["leases"])) == (200, 4), "two each"
    status, said = fleet.route(work=400.0, count=64)
    assert (status, said["error"]) == (503, "all_busy")


def test_a_batch_of_one_is_a_batch_and_none_of_it_goes_where_it_must_not() -> None:
    fleet = TwoInstances()
    fleet.stock()
    status, said = fleet.route(count=1)
    assert (status, len(said["leases"])) == (200, 1)
    status, said = fleet.route(count=40, avoid=[8])
    assert (status, {x["instance_id"] for x in said["leases"]}, said["certificates"]) == (200, {7}, {})


def test_a_batch_ends_as_its_leases_do() -> None:
    fleet = TwoInstances()
    fleet.stock()
    _, said = fleet.route(count=20)
    for lease in said["leases"]:
        fleet.client.post("/done", json={"request_id": lease["request_id"], "outcome": "unused"})
    assert fleet.balancer.usage(fleet.service.clock()).traffic.in_flight == 0
    assert fleet.balancer.leases.ends == {"unused": 20}


def test_the_hints_of_a_request_are_what_the_balancer_is_asked() -> None:
    fleet = TwoInstances()
    fleet.stock()
    asked: list[RouteRequest] = []

    def refuse(ask: RouteRequest, *_: object) -> RouteRefused:
        asked.append(ask)
        return RouteRefused("all_busy", 1.0)

    fleet.balancer.request = refuse  # type: ignore[method-assign, assignment]
    hashes = ["0123456789abcdef", "f" * 32]
    fleet.route(affinity=hashes, priority="high", avoid=[3])
    fleet.route(priority="low")
    fleet.route()
    assert [(a.affinity, a.priority, a.avoid, a.client) for a in asked] == [
        (tuple(hashes), 0, frozenset({3}), "127.0.0.1"),
        ((), 2, frozenset(), "127.0.0.1"),
        ((), 1, frozenset(), "127.0.0.1"),
    ]


def test_a_client_that_uses_none_of_its_leases_is_told_so_while_others_ask() -> None:
    """Of two clients by their keys: the one that has more than half of what may be given gets 429."""
    other = "other-" + "o" * 32
    fleet = TwoInstances(frozenset({CLIENT, other}))
    fleet.stock()

    def route(key: str, work: float) -> Any:
        return fleet.client.post("/route", json={"work": work}, headers={"Authorization": f"Bearer {key}"})

    assert route(other, 10.0).status_code == 200
    assert [route(CLIENT, 190.0).status_code for _ in range(6)] == [200] * 6
    answer = route(CLIENT, 190.0)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    said = answer.get_json()
    assert (said["error"], said["retry_after_s"]) == ("too_many_unused", 1.0)
    assert said["message"].startswith("6 leases with the room of 1.1 instances")
    assert route(other, 190.0).status_code == 200
    metrics = fleet.client.get("/metrics", headers={"Authorization": f"Bearer {CONTROL}"}).text
    assert "loadbalancer_too_many_unused_requests_total 1.0\n" in metrics


def test_a_prompt_that_the_model_can_never_take_is_refused_at_once_and_is_no_demand() -> None:
    """The model takes 4,096 tokens; beyond twice that no estimate of a client is wrong by."""
    fleet = TwoInstances()
    fleet.stock(max_model_len=4096)
    said = {"prompt_tokens": 1_666_000, "max_tokens": 50, "wait_s": 60.0}
    answer = fleet.client.post("/route", json=said)
    assert answer.status_code == 400
    assert answer.get_json()["error"] == "prompt_too_long"
    assert "4096 tokens" in answer.get_json()["message"]
    assert "Retry-After" not in answer.headers
    status = fleet.client.get("/status", headers={"Authorization": f"Bearer {CONTROL}"}).get_json()
    shown = ("arrivals", "arrived_work", "held", "demand", "refused", "prompt_too_long")
    assert [status[name] for name in shown] == [0, 0.0, 0, 0.0, 0, 1]


def test_what_the_model_may_take_is_left_to_the_engine_and_counts_no_more_than_it_can_read() -> None:
    """An estimate may be twice too long, and each of several prompts may be as long as the model takes."""
    fleet = TwoInstances()
    fleet.stock(max_model_len=1000)
    for said, work in (({"prompt_tokens": 2000}, 300.0), ({"prompt_tokens": 2500, "prompts": 3}, 450.0)):
        before = fleet.balancer.describe(fleet.service.clock())["arrived_work"]
        answer = fleet.client.post("/route", json=said)
        assert answer.status_code == 200, answer.get_json()
        after = fleet.balancer.describe(fleet.service.clock())["arrived_work"]
        assert after - before == pytest.approx(work)
    fleet = TwoInstances()
    fleet.stock()  # an older autoscaler does not say what the model takes
    assert fleet.client.post("/route", json={"prompt_tokens": 2_000_000}).status_code == 200


def test_beyond_the_bound_of_those_held_the_answer_says_when_the_line_will_be_served() -> None:
    """Two instances of 100 work/s that are full, and 300 work that waits."""
    fleet = TwoInstances()
    fleet.balancer.queue.most = 3
    fleet.stock()
    now = fleet.service.clock()
    for _ in range(2):
        assert fleet.route(work=1000.0)[0] == 200
    ask = RouteRequest(100.0, client="127.0.0.1")
    for _ in range(3):
        assert isinstance(fleet.balancer.request(ask, 60.0, None, now), QueuedRequest)
    answer = fleet.client.post("/route", json={"work": 100.0, "wait_s": 60})
    assert (answer.status_code, answer.get_json()["error"]) == (503, "all_busy")
    assert answer.headers["Retry-After"] == "3", "1 s until there is room and 1.5 s for those before"
    fleet.balancer.expect_hot(1.0, now)
    assert fleet.client.post("/route", json={"work": 100.0, "wait_s": 60}).headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("", "body"),
        ("nonsense", "body"),
        ("[]", "body"),
        ('{"prompt_tokens": NaN}', "body"),
        ("{}", "prompt_tokens"),
        ('{"max_tokens": 5}', "prompt_tokens"),
        ('{"prompt_tokens": -1}', "prompt_tokens"),
        ('{"prompt_tokens": 1.5}', "prompt_tokens"),
        ('{"prompt_tokens": "5"}', "prompt_tokens"),
        ('{"prompt_tokens": true}', "prompt_tokens"),
        ('{"prompt_tokens": 1e999}', "prompt_tokens"),
        ('{"prompt_tokens": 99999999999}', "prompt_tokens"),
        ('{"prompt_tokens": 5, "max_tokens": 0}', "max_tokens"),
        ('{"prompt_tokens": 5, "max_tokens": [1]}', "max_tokens"),
        ('{"work": -1}', "work"),
        ('{"work": 0}', "work"),
        ('{"work": 1e300}', "work"),
        ('{"work": 1' + "0" * 400 + "}", "work"),
        ('{"work": "much"}', "work"),
        ('{"work": 5, "prompt_tokens": 5}', "work"),
        ('{"work": 5, "wait_s": -1}', "wait_s"),
        ('{"work": 5, "wait_s": 601}', "wait_s"),
        ('{"work": 5, "avoid": 3}', "avoid"),
        ('{"work": 5, "avoid": ["3"]}', "avoid[0]"),
        ('{"work": 5, "avoid": [1, -3]}', "avoid[1]"),
        ('{"work": 5, "avoid": [' + "1," * 64 + "1]}", "avoid"),
        ('{"work": 5, "avoid": {"3": 1}}', "avoid"),
        ('{"work": 5, "avoid": [9007199254740993]}', "avoid[0]"),
        ('{"work": 5, "wait_s": "60"}', "wait_s"),
        ('{"work": 5, "wait_s": true}', "wait_s"),
        ('{"work": 5, "wait_s": -0.001}', "wait_s"),
        ('{"work": 5, "affinity": {}}', "affinity"),
        ('{"work": 5, "affinity": "a plain text"}', "affinity"),
        ('{"work": 5, "affinity": ["0123456789abcdef", 5]}', "affinity[1]"),
        ('{"work": 5, "affinity": ["0123456"]}', "affinity[0]"),
        ('{"work": 5, "affinity": ["0123456789ABCDEF"]}', "affinity[0]"),
        ('{"work": 5, "affinity": ["once upon a time"]}', "affinity[0]"),
        ('{"work": 5, "affinity": ["01234567\\n"]}', "affinity[0]"),
        ('{"work": 5, "affinity": ["' + "0" * 33 + '"]}', "affinity[0]"),
        ('{"work": 5, "affinity": [' + '"01234567",' * 256 + '"01234567"]}', "affinity"),
        ('{"work": 5, "affinity": ' + "[" * 900 + "]" * 900 + "}", "affinity[0]"),
        ('{"work": 5, "priority": "urgent"}', "priority"),
        ('{"work": 5, "priority": 0}', "priority"),
        ('{"work": 5, "priority": ["high"]}', "priority"),
        ('{"work": 5, "count": 0}', "count"),
        ('{"work": 5, "count": 65}', "count"),
        ('{"work": 5, "count": 1.0}', "count"),
        ('{"work": 5, "count": true}', "count"),
        ('{"work": 5, "count": "1"}', "count"),
        ('{"work": 5, "count": 1e9}', "count"),
        ('{"work": 5, "colour": "blue"}', "colour"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_named(body: str, field: str) -> None:
    answer = LoadBalancerApp().client.post("/route", data=body)
    said = answer.get_json()
    assert (answer.status_code, said["error"]) == (400, "bad_request")
    assert said["message"].startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("{}", "request_id"),
        ('{"request_id": "x"}', "outcome"),
        ('{"request_id": "x", "outcome": "perfect"}', "outcome"),
        ('{"request_id": 5, "outcome": "finished"}', "request_id"),
        ('{"request_id": "", "outcome": "finished"}', "request_id"),
        ('{"request_id": "x", "outcome": "failed", "why": 5}', "why"),
        ('{"request_id": "x", "outcome": "failed", "why": "a prompt"}', "why"),
        ('{"request_id": "x", "outcome": "failed", "tokens": 5}', "tokens"),
    ],
)
def test_a_wrong_end_is_refused_with_the_field_named(body: str, field: str) -> None:
    answer = LoadBalancerApp().client.post("/done", data=body)
    assert answer.status_code == 400
    assert answer.get_json()["message"].startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": -1}, "version"),
        ({"epoch": 5}, "epoch"),
        ({"expected_output_tokens": 0}, "expected_output_tokens"),
        ({"instances": {}}, "instances"),
        ({"instances": [5]}, "instances[0]"),
        ({"instances": [{**INSTANCE, "id": "7"}]}, "instances[0].id"),
        ({"instances": [{**INSTANCE, "state": "cold"}]}, "instances[0].state"),
        ({"instances": [{**INSTANCE, "address": "ftp://10.0.0.7"}]}, "instances[0].address"),
        ({"instances": [{**INSTANCE, "capacity_work": 0}]}, "instances[0].capacity_work"),
        ({"instances": [INSTANCE, {**INSTANCE, "throughput_work_s": -1}]}, "instances[1].throughput_work_s"),
        ({"instances": [INSTANCE, INSTANCE]}, "instances[1].id"),
    ],
)
def test_a_wrong_hot_set_is_refused_whole_with_the_field_named(change: dict[str, Any], field: str) -> None:
    app = LoadBalancerApp()
    answer = app.client.put("/hot", json={**HOT, **change}, headers={"Authorization": f"Bearer {CONTROL}"})
    assert answer.status_code == 400
    assert answer.get_json()["message"].startswith(f"{field}: ")
    assert app.balancer.instances.hot == 0


def test_a_complaint_about_a_hot_set_shows_no_master_token() -> None:
    with pytest.raises(BadField) as refused:
        hot_set({**HOT, "instances": [{**INSTANCE, "id": "master-secret-is-elsewhere", "address": 5}]})
    assert "m" * 20 not in str(refused.value)
    with pytest.raises(BadField) as refused:
        hot_set({**HOT, "instances": [INSTANCE, INSTANCE]})
    assert "master-secret" not in str(refused.value)


def test_a_hot_set_of_a_thousand_is_taken_and_nobody_else_may_send_so_much() -> None:
    app = LoadBalancerApp()
    many = {**HOT, "instances": [{**INSTANCE, "id": i} for i in range(1000)]}
    answer = app.client.put("/hot", json=many, headers={"Authorization": f"Bearer {CONTROL}"})
    name = app.service.name
    assert answer.get_json() == {"taken": True, "epoch": "e1", "version": 1, "loadbalancer": name}
    assert app.balancer.instances.hot == 1000
    assert app.client.post("/route", data=b" " * 65_537).status_code == 413


def test_an_old_hot_set_is_answered_with_what_is_known() -> None:
    app = LoadBalancerApp()
    bearer = {"Authorization": f"Bearer {CONTROL}"}
    app.client.put("/hot", json={**HOT, "version": 5}, headers=bearer)
    answer = app.client.put("/hot", json={**HOT, "version": 4, "instances": []}, headers=bearer)
    name = app.service.name
    assert answer.get_json() == {"taken": False, "epoch": "e1", "version": 5, "loadbalancer": name}
    assert app.balancer.instances.hot == 1


PROTECTED = [
    ("POST", "/route", CLIENT, {"work": 5}),
    ("POST", "/done", CLIENT, {"request_id": "x", "outcome": "unused"}),
    ("POST", "/pace", CLIENT, {"answers": []}),
    ("POST", "/well", CLIENT, {"instances": [7]}),
    ("GET", "/model", CLIENT, None),
    ("PUT", "/hot", CONTROL, HOT),
    ("GET", "/status", OPERATOR, None),
    ("GET", "/metrics", OPERATOR, None),
]


@pytest.mark.parametrize(("method", "path", "key", "body"), PROTECTED, ids=[p[1] for p in PROTECTED])
def test_every_protected_route_refuses_the_wrong_caller(
    method: str, path: str, key: str, body: dict[str, Any] | None
) -> None:
    app = LoadBalancerApp(frozenset({CLIENT}), frozenset({OPERATOR}))
    app.stock()
    allowed = {key, CONTROL} if key == OPERATOR else {key}
    for who in (None, "", "Bearer", "Bearer wrong", *(f"Bearer {k}" for k in (CONTROL, CLIENT, OPERATOR))):
        headers = {} if who is None else {"Authorization": who}
        answer = app.client.open(path, method=method, json=body, headers=headers)
        let_in = who is not None and who.removeprefix("Bearer ") in allowed
        assert answer.status_code == (200 if let_in else 401), who


def test_every_route_is_protected_or_known_to_be_open() -> None:
    """A route that is added must be added to the list above, or be open on purpose."""
    app = create_app(LoadBalancerApp().service, AccessKeys(CONTROL))
    paths = {rule.rule for rule in app.url_map.iter_rules()} | DirectRoutes.of(app).by_path.keys()
    assert paths == {p[1] for p in PROTECTED} | {"/health", "/openapi.json", "/report"}


def test_without_keys_clients_and_operator_are_let_in_but_nobody_may_set_the_hot_set() -> None:
    app = LoadBalancerApp()
    assert app.client.get("/status").status_code == 200
    assert app.client.post("/route", json={"work": 5}).status_code == 503
    assert app.client.put("/hot", json=HOT).status_code == 401


def test_health_is_open_and_says_little() -> None:
    app = LoadBalancerApp(frozenset({CLIENT}), frozenset({OPERATOR}))
    answer = app.client.get("/health")
    assert (answer.status_code, answer.get_json()) == (200, {"status": "ok", "hot": 0})


def test_the_state_refuses_a_second_thread() -> None:
    app = LoadBalancerApp()
    app.stock()
    found: list[BaseException] = []

    def other() -> None:
        try:
            app.service.balancer  # noqa: B018
        except RuntimeError as e:
            found.append(e)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"port": 0}, "--port 0: wanted 1 to 65535"),
        ({"lease_s": 0.5}, "--lease-s 0.5: wanted 1 to 600"),
        ({"lease_s": float("nan")}, "--lease-s nan"),
        ({"max_held": -1}, "--max-held -1: wanted 0 to 100000"),
        ({"poll_interval_s": 0.0}, "--poll-interval-s 0: wanted 0.1 to 60"),
        ({"max_unused": 0}, "--max-unused 0: wanted 1 to 200000"),
        ({"late_bound_s": -1.0}, "--late-bound-s -1: wanted 0 to 86400"),
        ({"late_bound_s": float("nan")}, "--late-bound-s nan"),
        ({"first_token_s": 0.0}, "--first-token-s 0: wanted 0.001 to 3600"),
        ({"prompt_token_s": 2.0}, "--prompt-token-s 2: wanted 0 to 1"),
        ({"autoscaler": "127.0.0.1:8100"}, "--autoscaler"),
        ({"autoscaler": "http://127.0.0.1:99999"}, "--autoscaler"),
        ({"autoscaler": "http://127.0.0.1/path"}, "--autoscaler"),
        ({"autoscaler": "ftp://127.0.0.1"}, "--autoscaler"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_range(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LoadBalancerConfig(**change).checked()
    assert str(refused.value).startswith(said)


def test_the_flags_of_the_late_lane_are_what_the_balancer_is_made_with() -> None:
    parse = loadbalancer_server.parser().parse_args
    config = LoadBalancerConfig(**vars(parse([]))).checked()
    assert (config.late_lane, config.late_bound_s, config.slo) == (True, 300.0, Slo())
    given = ["--no-late-lane", "--late-bound-s", "60", "--first-token-s", "1", "--prompt-token-s", "0.002"]
    config = LoadBalancerConfig(**vars(parse(given))).checked()
    assert (config.late_lane, config.late_bound_s, config.slo) == (False, 60.0, Slo(1.0, 0.002))
    one_line = loadbalancer_server.make_balancer(config)
    assert (one_line.queue.late_bound_s, one_line.slo) == (None, Slo(1.0, 0.002))
    assert loadbalancer_server.make_balancer(LoadBalancerConfig(late_bound_s=60.0)).queue.late_bound_s == 60.0


def run(*flags: str) -> Exited:
    """How the command ends with these flags."""
    return run_command("loadbalancer_server.py", loadbalancer_server.main, *flags)


def test_a_wrong_flag_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        ended = run("--port", port, "--state-dir", str(tmp_path / "state"))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(f"loadbalancer_server.py: cannot listen on 127.0.0.1:{port}: ")
    ended = run("--host", "0.0.0.0", "--state-dir", str(tmp_path / "state"))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "needs keys" in ended.err


def test_help_shows_each_setting_with_its_default() -> None:
    ended = run("--help")
    assert ended.status == 0
    for name in LoadBalancerConfig.__dataclass_fields__:
        flag = "--" + name.removesuffix("_file").replace("_", "-")
        assert flag in ended.out
    assert "seconds after which a lease that was not started is void (1 to 600; default 60)" in " ".join(
        ended.out.split()
    )


@pytest.mark.parametrize(
    ("value", "said"), [(PARENT, f" trace {TRACE} failed"), ("the quick fox", " failed")]
)
def test_the_log_of_a_failed_request_has_the_id_of_its_trace_beside_its_own(
    value: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = LoadBalancerApp()
    app.stock()
    lease = app.client.post("/route", json={"work": 10.0}, headers={"traceparent": value}).get_json()
    app.client.post(
        "/done", json={"request_id": lease["request_id"], "outcome": "failed", "why": "broke_off"}
    )
    assert f"a client's request {lease['request_id']}{said}: broke_off" in caplog.text
    assert "quick" not in caplog.text
