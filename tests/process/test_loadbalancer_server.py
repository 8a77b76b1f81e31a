"""The loadbalancer's face: what it refuses, whom it lets in, and the whole process on real sockets."""

import asyncio
import hashlib
import hmac
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

import loadbalancer_server
from bench.route.stub_fleet import StubHttp, StubInstance, certificate
from dispatch.outside.background import CLOCKWORK_S, QUIET_S, BackgroundTasks
from dispatch.outside.hot_set import HotSetReader
from dispatch.outside.service import LoadBalancerService
from dispatch.route_request import QueuedRequest, RouteRefused, RouteRequest
from dispatch.token_refills import Refill
from engine.slo import Slo
from fleet_client import tls_pins
from fleet_client.listening import allow_many_files, bind_socket
from loadbalancer import LoadBalancer
from loadbalancer_server import LoadBalancerConfig, create_app
from process.errors import ConfigError
from tests.asgi_client import AsgiClient
from tests.messages import hot_set, token_batch
from tests.paths import ROOT
from tests.ports import free_port
from web.direct import DirectRoutes
from web.keys import AccessKeys
from web.messages.busy import BusyReport
from web.messages.decoding import BadField, decode
from web.messages.hot_set import HotSet
from web.messages.leases import LeaseAnswer, LeaseBatch
from web.messages.reports import PushedReport
from web.signatures import name_and_key

CONTROL, CLIENT, OPERATOR = "control-" + "c" * 32, "client-" + "u" * 32, "operator-" + "o" * 32

INSTANCE: dict[str, Any] = {
    "id": 7,
    "state": "hot",
    "address": "http://127.0.0.7:8000",
    "auth_url": "http://127.0.0.7:3000",
    "master_token": "master-secret",
    "throughput_work_s": 100.0,
    "capacity_work": 1000.0,
}
HOT: dict[str, Any] = {
    "epoch": "e1",
    "version": 1,
    "model": "vllm-13",
    "prefill_weight": 0.1,
    "expected_output_tokens": 200.0,
    "expected_hot_s": None,
    "instances": [INSTANCE],
}


def wait_until(true: Callable[[], object], what: str, limit_s: float = 30.0) -> None:
    """Return when it is; fail when it is not in time."""
    limit = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < limit, f"waited {limit_s:g} s for: {what}"
        time.sleep(0.01)


class Counter:
    """A face with a clock that stands still, one hot instance and tokens for it."""

    def __init__(self, clients: frozenset[str] = frozenset(), operator: frozenset[str] = frozenset()) -> None:
        self.balancer = LoadBalancer(random.Random(1), lambda token: token[-16:])
        self.desk = LoadBalancerService(self.balancer, lambda: 1_700_000_000.0)
        self.client = AsgiClient(create_app(self.desk, AccessKeys(CONTROL, clients, operator)))

    def stock(self) -> None:
        """Make the instance hot and give it tokens."""
        self.desk.hot_set(hot_set(HOT))
        for refill in self.balancer.refills(self.desk.clock()):
            tokens = [f"token-{n:016d}" for n in range(refill.count)]
            self.balancer.complete_refill(refill, token_batch(tokens), self.desk.clock())


# -- what a client is answered ---------------------------------------------------------------------------


def test_a_lease_holds_what_a_client_needs() -> None:
    counter = Counter()
    counter.stock()
    answer = counter.client.post("/route", json={"prompt_tokens": 100, "max_tokens": 50})
    assert answer.status_code == 200
    assert answer.get_json() == {
        "address": "http://127.0.0.7:8000",
        "token": "token-0000000000000399",
        "request_id": "0000000000000399",
        "instance_id": 7,
        "model": "vllm-13",
        "expires_at": 1_700_000_060.0,
        "expires_in_s": 60.0,
    }


def test_with_nothing_hot_the_answer_says_when_to_come_again() -> None:
    counter = Counter()
    counter.desk.hot_set(hot_set({**HOT, "instances": [], "expected_hot_s": 42.3}))
    answer = counter.client.post("/route", json={"prompt_tokens": 100})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "43")
    said = answer.get_json()
    assert (said["error"], said["retry_after_s"]) == ("nothing_hot", 42.3)


def test_with_all_busy_the_answer_says_so() -> None:
    counter = Counter()
    counter.stock()
    assert counter.client.post("/route", json={"work": 1000}).status_code == 200
    answer = counter.client.post("/route", json={"work": 500})
    assert (answer.status_code, answer.get_json()["error"]) == (503, "all_busy")
    assert answer.headers["Retry-After"] == "5"


def test_a_client_may_say_how_its_lease_ended_and_say_it_twice() -> None:
    counter = Counter()
    counter.stock()
    lease = counter.client.post("/route", json={"work": 1000}).get_json()
    for _ in range(2):
        done = {"request_id": lease["request_id"], "outcome": "failed", "why": "not_started"}
        answer = counter.client.post("/done", json=done)
        assert (answer.status_code, answer.get_json()) == (200, {})
    assert counter.balancer.usage(counter.desk.clock()).instances[7].failures == 1
    assert counter.client.post("/route", json={"work": 1000}).status_code == 200


def test_status_and_metrics_show_the_instances_and_no_secret() -> None:
    counter = Counter()
    counter.stock()
    lease = counter.client.post("/route", json={"work": 500}).get_json()
    counter.client.post("/done", json={"request_id": lease["request_id"], "outcome": "finished"})
    status = counter.client.get("/status")
    metrics = counter.client.get("/metrics")
    row = status.get_json()["instances"][0]
    assert (row["id"], row["state"], row["unfinished"], row["capacity_work"]) == (7, "hot", 0, 1000.0)
    assert status.get_json()["ends"] == {"finished": 1}
    assert 'loadbalancer_lease_ends_total{how="finished"} 1\n' in metrics.text
    assert "loadbalancer_routed_total 1\n" in metrics.text
    assert 'loadbalancer_instance_tokens_in_stock{instance="7"} 399\n' in metrics.text
    assert all(
        line.startswith(("# TYPE loadbalancer_", "loadbalancer_")) for line in metrics.text.splitlines()
    )
    for text in (status.text, metrics.text):
        assert "master-secret" not in text
        assert "token-0" not in text


def test_the_busy_report_is_json_that_says_it_all() -> None:
    counter = Counter()
    counter.stock()
    counter.client.post("/route", json={"work": 500})
    said = json.loads(msgspec.json.encode(counter.balancer.usage(counter.desk.clock(), counter.desk.name)))
    assert said == {
        "loadbalancer": counter.desk.name,
        "hot_epoch": "e1",
        "hot_version": 1,
        "busy": 0.5,
        "demand": 0.5,
        "held": 0,
        "held_work": 0.0,
        "arrivals": 1,
        "arrived_work": 500.0,
        "traffic": {
            "prompt_tokens": 0,
            "output_tokens": 500.0,
            "in_flight": 1,
            "late": 0,
            "held_prompt_tokens": 0,
            "oldest_wait_s": 0.0,
            "turned_late": 0,
            "first_token_s": 2.0,
            "prompt_token_s": 0.001,
            "late_bound_s": 300.0,
        },
        "instances": {
            "7": {"unfinished": 1, "work": 500.0, "working_s": 0.0, "throughput_work_s": 100.0, "failures": 0}
        },
    }


def test_the_busy_report_of_a_loadbalancer_that_knows_nothing_is_json_too() -> None:
    said = json.loads(msgspec.json.encode(Counter().balancer.usage(0.0, "lb")))
    assert (said["hot_epoch"], said["instances"], said["demand"]) == (None, {}, 0.0)


def test_the_autoscaler_understands_the_busy_report_and_also_one_of_an_older_loadbalancer() -> None:
    counter = Counter()
    counter.stock()
    counter.client.post("/route", json={"prompt_tokens": 1000, "max_tokens": 50})
    counter.balancer.request(RouteRequest(900.0, None, (), 100), 5.0, None, counter.desk.clock())
    raw = msgspec.json.encode(counter.balancer.usage(counter.desk.clock(), "lb"))
    report = decode(raw, BusyReport)
    assert (report.traffic.prompt_tokens, report.traffic.output_tokens) == (1100, 50.0 + 890.0)
    assert (report.traffic.in_flight, report.held, report.held_work) == (1, 1, 900.0)
    assert (report.traffic.held_prompt_tokens, report.traffic.late_bound_s) == (100, 300.0)
    assert report.traffic.slo == Slo()
    assert report.instances[7].throughput_work_s == 100.0
    said = json.loads(raw)
    del said["traffic"]
    older = decode(json.dumps(said).encode(), BusyReport)
    assert (older.arrivals, older.traffic.in_flight, older.held_work) == (2, 1, 900.0)
    assert older.traffic.late_bound_s is None, "it has one line"


def test_prompt_tokens_are_told_to_what_decides_who_is_late() -> None:
    counter = Counter()
    counter.stock()
    counter.client.post("/route", json={"prompt_tokens": 1000, "max_tokens": 50})
    now = counter.desk.clock()
    assert counter.balancer.usage(now).traffic.prompt_tokens == 1000
    assert counter.balancer.instances.by_id[7].read_at == now + 1.0


def test_status_and_metrics_show_who_is_late() -> None:
    counter = Counter()
    counter.stock()
    now = counter.desk.clock()
    counter.client.post("/route", json={"work": 1000})
    counter.balancer.request(RouteRequest(210.0), 5.0, None, now)
    counter.balancer.request(RouteRequest(10.0), 5.0, None, now)
    status = counter.client.get("/status").get_json()
    assert (status["held"], status["held_late"], status["turned_late"]) == (2, 1, 1)
    metrics = counter.client.get("/metrics").text
    assert "# TYPE loadbalancer_held_late gauge\nloadbalancer_held_late 1\n" in metrics
    assert "# TYPE loadbalancer_turned_late_total counter\nloadbalancer_turned_late_total 1\n" in metrics


# -- the clockwork -------------------------------------------------------------------------------------


def looks_in(
    seconds: float, stir: Callable[[LoadBalancerService], None], monkeypatch: pytest.MonkeyPatch
) -> int:
    """How often the clockwork asks for refills in so long; stir is called every 10 ms."""
    counter = Counter()
    looks: list[float] = []

    def refills(now: float) -> list[Refill]:
        looks.append(now)
        return []

    monkeypatch.setattr(counter.balancer, "refills", refills)

    async def run() -> None:
        work = asyncio.create_task(BackgroundTasks(counter.desk, "http://127.0.0.1:1", "k" * 32).clockwork())
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            await asyncio.sleep(0.01)
            stir(counter.desk)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    asyncio.run(run())
    return len(looks)


@pytest.mark.alone
def test_the_clockwork_looks_seldom_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 <= looks_in(1.0, lambda _: None, monkeypatch) <= 1.0 / QUIET_S + 2


@pytest.mark.alone
def test_the_clockwork_looks_often_while_somebody_asks_and_not_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = looks_in(1.0, lambda desk: desk.activity.set(), monkeypatch)
    assert 2.0 / QUIET_S < looks <= 1.0 / CLOCKWORK_S + 2


@pytest.mark.alone
def test_the_clockwork_looks_often_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(desk: LoadBalancerService) -> None:
        if not desk.balancer.queue.held:
            desk.balancer.request(RouteRequest(10.0), 60.0, None, desk.clock())

    assert looks_in(1.0, hold, monkeypatch) > 2.0 / QUIET_S


@pytest.mark.parametrize(
    "happens",
    [
        lambda counter: counter.client.post("/route", json={"work": 10}),
        lambda counter: counter.client.post("/done", json={"request_id": "x", "outcome": "failed"}),
        lambda counter: counter.desk.hot_set(hot_set(HOT)),
    ],
    ids=["route", "done", "hot"],
)
def test_what_may_be_followed_by_errands_wakes_the_clockwork(happens: Callable[["Counter"], object]) -> None:
    counter = Counter()
    assert not counter.desk.activity.is_set()
    happens(counter)
    assert counter.desk.activity.is_set()


# -- batches, priorities, hints --------------------------------------------------------------------------

CERTIFIED = {**INSTANCE, "id": 8, "address": "https://127.0.0.8:8000"}


class Fleet(Counter):
    """The same with several instances, of which the second has a certificate."""

    def stock(self, **more: Any) -> None:
        """Make them hot and give them tokens."""
        self.desk.hot_set(
            hot_set({**HOT, "instances": [INSTANCE, {**CERTIFIED, "certificate": certificate()}]})
        )
        for refill in self.balancer.refills(self.desk.clock()):
            tokens = [f"token-{1000 * refill.instance_id + n:016d}" for n in range(refill.count)]
            self.balancer.complete_refill(refill, token_batch(tokens), self.desk.clock())

    def route(self, **said: Any) -> tuple[int, Any]:
        """POST /route."""
        answer = self.client.post("/route", json={"work": 10.0, **said})
        return answer.status_code, answer.get_json()


def test_a_lease_is_answered_as_an_encoder_would_put_it() -> None:
    fleet = Fleet()
    fleet.stock()
    for _ in range(4):
        answer = fleet.client.post("/route", json={"work": 10.0})
        assert answer.data == msgspec.json.encode(decode(answer.data, LeaseAnswer))
    answer = fleet.client.post("/route", json={"work": 10.0, "count": 30})
    assert answer.data == msgspec.json.encode(decode(answer.data, LeaseBatch))


def test_a_batch_is_so_many_leases_and_each_certificate_once() -> None:
    fleet = Fleet()
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
    assert fleet.balancer.usage(fleet.desk.clock()).arrivals == 33


def test_a_batch_is_fewer_when_there_is_room_for_fewer_and_503_when_there_is_none() -> None:
    fleet = Fleet()
    fleet.stock()
    status, said = fleet.route(work=400.0, count=64)
    assert (status, len(said["leases"])) == (200, 4), "two each"
    status, said = fleet.route(work=400.0, count=64)
    assert (status, said["error"]) == (503, "all_busy")


def test_a_batch_of_one_is_a_batch_and_none_of_it_goes_where_it_must_not() -> None:
    fleet = Fleet()
    fleet.stock()
    status, said = fleet.route(count=1)
    assert (status, len(said["leases"])) == (200, 1)
    status, said = fleet.route(count=40, avoid=[8])
    assert (status, {x["instance_id"] for x in said["leases"]}, said["certificates"]) == (200, {7}, {})


def test_a_batch_ends_as_its_leases_do() -> None:
    fleet = Fleet()
    fleet.stock()
    _, said = fleet.route(count=20)
    for lease in said["leases"]:
        fleet.client.post("/done", json={"request_id": lease["request_id"], "outcome": "unused"})
    assert fleet.balancer.usage(fleet.desk.clock()).traffic.in_flight == 0
    assert fleet.balancer.leases.ends == {"unused": 20}


def test_the_hints_of_a_request_are_what_the_balancer_is_asked() -> None:
    fleet = Fleet()
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
    fleet = Fleet(frozenset({CLIENT, other}))
    fleet.stock()

    def route(key: str, work: float) -> Any:
        return fleet.client.post("/route", json={"work": work}, headers={"Authorization": f"Bearer {key}"})

    assert route(other, 10.0).status_code == 200
    assert [route(CLIENT, 190.0).status_code for _ in range(6)] == [200] * 6
    answer = route(CLIENT, 190.0)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    said = answer.get_json()
    assert (said["error"], said["retry_after_s"]) == ("too_many_unused", 1.0)
    assert said["message"].startswith("6 leases of 1140 work")
    assert route(other, 190.0).status_code == 200
    metrics = fleet.client.get("/metrics", headers={"Authorization": f"Bearer {CONTROL}"}).text
    assert "loadbalancer_too_many_unused_total 1\n" in metrics


def test_beyond_the_bound_of_those_held_the_answer_says_when_the_line_will_be_served() -> None:
    """Two instances of 100 work/s that are full, and 300 work that waits."""
    fleet = Fleet()
    fleet.balancer.queue.most = 3
    fleet.stock()
    now = fleet.desk.clock()
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


# -- what is refused -------------------------------------------------------------------------------------


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
    answer = Counter().client.post("/route", data=body)
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
    answer = Counter().client.post("/done", data=body)
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
    counter = Counter()
    answer = counter.client.put(
        "/hot", json={**HOT, **change}, headers={"Authorization": f"Bearer {CONTROL}"}
    )
    assert answer.status_code == 400
    assert answer.get_json()["message"].startswith(f"{field}: ")
    assert counter.balancer.instances.hot == 0


def test_a_complaint_about_a_hot_set_shows_no_master_token() -> None:
    with pytest.raises(BadField) as refused:
        hot_set({**HOT, "instances": [{**INSTANCE, "id": "master-secret-is-elsewhere", "address": 5}]})
    assert "m" * 20 not in str(refused.value)
    with pytest.raises(BadField) as refused:
        hot_set({**HOT, "instances": [INSTANCE, INSTANCE]})
    assert "master-secret" not in str(refused.value)


def test_a_hot_set_of_a_thousand_is_taken_and_nobody_else_may_send_so_much() -> None:
    counter = Counter()
    many = {**HOT, "instances": [{**INSTANCE, "id": i} for i in range(1000)]}
    answer = counter.client.put("/hot", json=many, headers={"Authorization": f"Bearer {CONTROL}"})
    assert answer.get_json() == {"taken": True, "epoch": "e1", "version": 1}
    assert counter.balancer.instances.hot == 1000
    assert counter.client.post("/route", data=b" " * 65_537).status_code == 413


def test_an_old_hot_set_is_answered_with_what_is_known() -> None:
    counter = Counter()
    bearer = {"Authorization": f"Bearer {CONTROL}"}
    counter.client.put("/hot", json={**HOT, "version": 5}, headers=bearer)
    answer = counter.client.put("/hot", json={**HOT, "version": 4, "instances": []}, headers=bearer)
    assert answer.get_json() == {"taken": False, "epoch": "e1", "version": 5}
    assert counter.balancer.instances.hot == 1


def read(reader: HotSetReader, said: dict[str, Any]) -> HotSet:
    """The hot set in that body."""
    return asyncio.run(reader.read(json.dumps(said).encode()))


def test_of_a_hot_set_only_what_has_changed_is_read_anew() -> None:
    reader = HotSetReader()
    many = [{**INSTANCE, "id": i} for i in range(100)]
    first = read(reader, {**HOT, "instances": many})
    assert first == hot_set({**HOT, "instances": many})
    changed = [*many[:50], {**many[50], "capacity_work": 7.0}, *many[60:]]
    second = read(reader, {**HOT, "version": 2, "instances": changed})
    same = [one for one in second.instances if one is first.instances[one.id]]
    assert [len(second.instances), len(same)] == [91, 90]
    assert second.instances[50].capacity_work == 7.0


def test_a_hot_set_that_is_wrong_leaves_what_was_read_before() -> None:
    reader = HotSetReader()
    first = read(reader, HOT)
    for change, field in (
        ({"instances": [{**INSTANCE, "id": 9}, {**INSTANCE, "state": "warm"}]}, r"instances\[1\].state"),
        ({"instances": [[{}]]}, r"instances\[0\]"),
        ({"instances": [[]]}, r"instances\[0\]"),
        ({"instances": None}, "instances"),
        ({"instances": [{**INSTANCE, "certificate": "none"}]}, r"instances\[0\].certificate"),
    ):
        with pytest.raises(BadField, match=f"^{field}: "):
            read(reader, {**HOT, **change})
    with pytest.raises(BadField, match=r"^instances: is missing"):
        read(reader, {name: value for name, value in HOT.items() if name != "instances"})
    assert read(reader, {**HOT, "colour": "blue"}).instances[0] is first.instances[0]


def test_while_a_hot_set_of_thousands_is_read_others_are_answered() -> None:
    many = [{**INSTANCE, "id": i} for i in range(5000)]
    raw = json.dumps({**HOT, "instances": many}).encode()

    async def turns() -> int:
        """Turns of the loop while it is read."""
        found = 0
        reading = asyncio.ensure_future(HotSetReader().read(raw))
        while not reading.done():
            found += 1
            await asyncio.sleep(0)
        assert len(reading.result().instances) == 5000
        return found

    assert asyncio.run(turns()) > 8


# -- who may -----------------------------------------------------------------------------------------------

PROTECTED = [
    ("POST", "/route", CLIENT, {"work": 5}),
    ("POST", "/done", CLIENT, {"request_id": "x", "outcome": "unused"}),
    ("PUT", "/hot", CONTROL, HOT),
    ("GET", "/status", OPERATOR, None),
    ("GET", "/metrics", OPERATOR, None),
]


@pytest.mark.parametrize(("method", "path", "key", "body"), PROTECTED, ids=[p[1] for p in PROTECTED])
def test_every_protected_route_refuses_the_wrong_caller(
    method: str, path: str, key: str, body: dict[str, Any] | None
) -> None:
    counter = Counter(frozenset({CLIENT}), frozenset({OPERATOR}))
    counter.stock()
    allowed = {key, CONTROL} if key == OPERATOR else {key}
    for who in (None, "", "Bearer", "Bearer wrong", *(f"Bearer {k}" for k in (CONTROL, CLIENT, OPERATOR))):
        headers = {} if who is None else {"Authorization": who}
        answer = counter.client.open(path, method=method, json=body, headers=headers)
        let_in = who is not None and who.removeprefix("Bearer ") in allowed
        assert answer.status_code == (200 if let_in else 401), who


def test_every_route_is_protected_or_known_to_be_open() -> None:
    """A route that is added must be added to the list above, or be open on purpose."""
    app = create_app(Counter().desk, AccessKeys(CONTROL))
    paths = {rule.rule for rule in app.url_map.iter_rules()} | DirectRoutes.of(app).by_path.keys()
    assert paths == {p[1] for p in PROTECTED} | {"/health", "/report"}


def test_without_keys_clients_and_operator_are_let_in_but_nobody_may_set_the_hot_set() -> None:
    counter = Counter()
    assert counter.client.get("/status").status_code == 200
    assert counter.client.post("/route", json={"work": 5}).status_code == 503
    assert counter.client.put("/hot", json=HOT).status_code == 401


def test_health_is_open_and_says_little() -> None:
    counter = Counter(frozenset({CLIENT}), frozenset({OPERATOR}))
    answer = counter.client.get("/health")
    assert (answer.status_code, answer.get_json()) == (200, {"status": "ok", "hot": 0})


def test_the_state_refuses_a_second_thread() -> None:
    counter = Counter()
    counter.stock()
    found: list[BaseException] = []

    def other() -> None:
        try:
            counter.desk.balancer  # noqa: B018
        except RuntimeError as e:
            found.append(e)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(found) == 1


# -- the command line ------------------------------------------------------------------------------------


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


def run(*flags: str) -> tuple[int, str]:
    """Exit code and stderr of the process with these flags."""
    done = subprocess.run(
        [sys.executable, "loadbalancer_server.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    return done.returncode, done.stderr or done.stdout


def test_a_wrong_flag_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        code, said = run("--port", port, "--state-dir", str(tmp_path / "state"))
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"loadbalancer_server.py: cannot listen on 127.0.0.1:{port}: ")
    code, said = run("--host", "0.0.0.0", "--state-dir", str(tmp_path / "state"))
    assert (code, said.count("\n")) == (2, 1)
    assert "needs keys" in said


def test_help_shows_each_setting_with_its_default() -> None:
    code, said = run("--help")
    assert code == 0
    for name in LoadBalancerConfig.__dataclass_fields__:
        flag = "--" + name.removesuffix("_file").replace("_", "-")
        assert flag in said
    assert "seconds after which a lease that was not started is void (default 60)" in " ".join(said.split())


# -- the whole, on real sockets --------------------------------------------------------------------------


class StubFleet:
    """Stub instances and a stub autoscaler on real sockets, in a thread."""

    def __init__(self, count: int) -> None:
        self.instances: list[StubInstance] = []
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._count = count
        self.port = 0
        self._thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        servers = []
        for number in range(self._count):
            instance = StubInstance(number, free_port())
            self.instances.append(instance)
            servers.append(
                await self.loop.create_server(
                    lambda i=instance: StubHttp(self.instances, i),  # type: ignore[misc]
                    "127.0.0.1",
                    instance.port,
                )
            )
        servers.append(await self.loop.create_server(lambda: StubHttp(self.instances, None), "127.0.0.1", 0))
        self.port = servers[-1].sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        for server in servers:
            server.close()

    def __enter__(self) -> "StubFleet":
        self._thread.start()
        self._ready.wait(20.0)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20.0)
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


class Process:
    """A running loadbalancer."""

    def __init__(self, port: int, process: "subprocess.Popen[str]", state_dir: Path) -> None:
        self.port = port
        self.process = process
        self.control = state_dir / "control.key"

    def call(self, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        """One request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20.0)
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def status(self) -> Any:
        """GET /status, or None while the process does not listen."""
        try:
            return self.call("GET", "/status")[1]
        except OSError:
            return None


@contextmanager
def loadbalancer(autoscaler_port: int, state_dir: Path, *flags: str) -> Iterator[Process]:
    """A loadbalancer process; it must end by itself on SIGTERM."""
    port = free_port()
    command = ["--port", str(port), "--autoscaler", f"http://127.0.0.1:{autoscaler_port}"]
    with subprocess.Popen(
        [sys.executable, "loadbalancer_server.py", *command, "--state-dir", str(state_dir), *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    ) as process:
        made = Process(port, process, state_dir)
        try:
            wait_until(made.status, "the loadbalancer to listen")
            yield made
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=20.0)
        assert code == 0


def test_a_loadbalancer_finds_its_fleet_serves_it_and_learns_how_requests_end(tmp_path: Path) -> None:
    with (
        StubFleet(3) as fleet,
        loadbalancer(fleet.port, tmp_path / "state", "--poll-interval-s", "0.2") as it,
    ):
        wait_until(lambda: len([i for i in it.status()["instances"] if i["in_queue"]]) == 3, "tokens")
        leases = [it.call("POST", "/route", {"prompt_tokens": 10, "max_tokens": 20}) for _ in range(6)]
        assert {status for status, _ in leases} == {200}
        assert {x["instance_id"] for _, x in leases} == {0, 1, 2}
        for _, lease in leases[1:]:
            fleet.loop.call_soon_threadsafe(
                fleet.instances[lease["instance_id"]].started, lease["request_id"], time.monotonic()
            )
        wait_until(lambda: it.status()["ends"] == {"finished": 5}, "the ends to be reported")
        assert sum(i["unfinished"] for i in it.status()["instances"]) == 1
        unused = {"request_id": leases[0][1]["request_id"], "outcome": "unused"}
        assert it.call("POST", "/done", unused) == (200, {})
        assert sum(i["unfinished"] for i in it.status()["instances"]) == 0
        assert it.control.stat().st_mode & 0o777 == 0o600


def test_those_who_wait_are_served_when_an_instance_becomes_hot_and_told_at_the_end(tmp_path: Path) -> None:
    """Nobody answers on the autoscaler's port: the hot set comes by PUT."""
    with StubFleet(1) as fleet, loadbalancer(free_port(), tmp_path / "state") as it:
        answers: list[tuple[int, Any]] = []

        def wait(work: float) -> None:
            answers.append(it.call("POST", "/route", {"work": work, "wait_s": 60}))

        threads = [threading.Thread(target=wait, args=(10.0,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        wait_until(lambda: it.status()["held"] == 20, "20 to wait")
        assert it.status()["demand"] > 0.0
        gone = http.client.HTTPConnection("127.0.0.1", it.port, timeout=20.0)
        gone.request("POST", "/route", json.dumps({"work": 10.0, "wait_s": 60}))
        wait_until(lambda: it.status()["held"] == 21, "the 21st to wait")
        gone.close()
        wait_until(lambda: it.status()["held"] == 20, "the 21st to be forgotten")
        hot = {
            **HOT,
            "instances": [{**INSTANCE, "auth_url": f"http://127.0.0.1:{fleet.instances[0].port}"}],
        }
        key = it.control.read_text().strip()
        assert it.call("PUT", "/hot", hot, key)[0] == 200
        for thread in threads:
            thread.join(20.0)
        assert [status for status, _ in answers] == [200] * 20
        assert len({lease["token"] for _, lease in answers}) == 20
        last = threading.Thread(target=wait, args=(5000.0,))
        last.start()
        wait_until(lambda: it.status()["held"] == 1, "the last to wait")
        it.process.send_signal(signal.SIGTERM)
        last.join(20.0)
        assert (answers[-1][0], answers[-1][1]["error"]) == (503, "shutting_down")


@pytest.mark.alone
def test_an_instance_that_does_not_answer_delays_nobody(tmp_path: Path) -> None:
    """Its port takes connections and never says a word; the other instance serves meanwhile."""
    with (
        bind_socket("127.0.0.1", 0) as silent,
        StubFleet(1) as fleet,
        loadbalancer(free_port(), tmp_path / "state") as it,
    ):
        hot = {
            **HOT,
            "instances": [
                {**INSTANCE, "id": 1, "auth_url": f"http://127.0.0.1:{silent.getsockname()[1]}"},
                {**INSTANCE, "id": 2, "auth_url": f"http://127.0.0.1:{fleet.instances[0].port}"},
            ],
        }
        assert it.call("PUT", "/hot", hot, it.control.read_text().strip())[0] == 200
        wait_until(lambda: any(i["in_queue"] for i in it.status()["instances"]), "tokens of the other")
        begun = time.monotonic()
        answers = [it.call("POST", "/route", {"work": 1.0}) for _ in range(40)]
        assert {(status, lease["instance_id"]) for status, lease in answers} == {(200, 2)}
        assert time.monotonic() - begun < 4.0, "a refill that hangs takes 5 s"


# -- five thousand who wait ------------------------------------------------------------------------------


class Waiting(asyncio.Protocol):
    """One connection on which a request waits; everything that comes back is kept."""

    def __init__(self, body: bytes) -> None:
        self.got = b""
        self._body = body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        head = b"POST /route HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % len(self._body) + self._body)

    def data_received(self, data: bytes) -> None:
        self.got += data


def memory_mb(pid: int) -> float:
    """What that process has in memory, at most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def held_status(port: int) -> dict[str, Any]:
    """GET /status without blocking this loop."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    raw = await reader.read()
    writer.close()
    said: dict[str, Any] = json.loads(raw.partition(b"\r\n\r\n")[2])
    return said


async def until(true: Callable[[], Awaitable[object]], what: str, limit_s: float = 60.0) -> None:
    """Return when it is."""
    limit = time.monotonic() + limit_s
    while not await true():
        assert time.monotonic() < limit, f"waited {limit_s:g} s for: {what}"
        await asyncio.sleep(0.05)


@pytest.mark.alone
def test_five_thousand_wait_in_one_process_and_a_replaced_hot_set_loses_none_and_answers_none_twice(
    tmp_path: Path,
) -> None:
    """Real connections of all classes; 200 clients go away; the hot set changes while others are served."""
    allow_many_files()
    fleet_size, many, away = 16, 5000, 200

    def hot(version: int, start: int) -> dict[str, Any]:
        members = [
            {
                **INSTANCE,
                "id": i.number,
                "auth_url": f"http://127.0.0.1:{i.port}",
                "throughput_work_s": 1e5,
                "capacity_work": 1e6,
            }
            for i in (fleet.instances[(start + n) % fleet_size] for n in range(6))
        ]
        return {**HOT, "version": version, "instances": members}

    async def run(it: Process, key: str) -> None:
        loop = asyncio.get_running_loop()

        async def holds(n: int) -> bool:
            return bool((await held_status(it.port))["held"] == n)

        async def put(version: int, start: int) -> None:
            status, said = await asyncio.to_thread(it.call, "PUT", "/hot", hot(version, start), key)
            assert (status, said["taken"]) == (200, True)

        clients: list[Waiting] = []
        for n in range(many):
            body = json.dumps({"work": 1.0, "wait_s": 90, "priority": ("high", "normal", "low")[n % 3]})
            _, client = await loop.create_connection(
                lambda body=body: Waiting(body.encode()),  # type: ignore[misc]
                "127.0.0.1",
                it.port,
            )
            clients.append(client)
        await until(lambda: holds(many), "all to be held")
        status = await held_status(it.port)
        assert status["demand"] > 0.0
        code, said = await asyncio.to_thread(it.call, "POST", "/route", {"work": 1.0, "wait_s": 90})
        assert (code, said["error"]) == (503, "nothing_hot"), "beyond the bound"
        assert said["retry_after_s"] >= 1.0
        for client in clients[:: many // away]:
            client.transport.close()
        await until(lambda: holds(many - away), "those who went away to be forgotten")
        stay = [c for n, c in enumerate(clients) if n % (many // away)]
        for version in range(1, 9):
            await put(version, 2 * version)
            await asyncio.sleep(0.1)

        async def all_answered() -> bool:
            return all(b"\r\n\r\n" in c.got for c in stay)

        await until(all_answered, "all to be answered")
        await asyncio.sleep(0.3)
        leases = []
        for client in stay:
            assert client.got.count(b"HTTP/1.1 ") == 1
            head, _, payload = client.got.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            leases.append(json.loads(payload))
        assert len({lease["token"] for lease in leases}) == many - away
        assert len({lease["request_id"] for lease in leases}) == many - away
        for client in stay:
            client.transport.close()
        assert memory_mb(it.process.pid) < 500.0
        assert await holds(0)

    with (
        StubFleet(fleet_size) as fleet,
        loadbalancer(free_port(), tmp_path / "state", "--max-held", str(many)) as it,
    ):
        begun = time.monotonic()
        asyncio.run(run(it, it.control.read_text().strip()))
        print(f"took {time.monotonic() - begun:.1f} s, {memory_mb(it.process.pid):.0f} MB")


def pushed(said: dict[str, Any]) -> PushedReport:
    """The report in that body."""
    return decode(json.dumps(said).encode(), PushedReport)


def test_sizes_of_other_requests_than_those_that_started_are_refused() -> None:
    said = {
        "boot_id": "b",
        "number": 1,
        "after": 0,
        "seq": 1,
        "missed": False,
        "started": ["0" * 16],
        "ended": [],
        "model_up": True,
    }
    assert pushed(said).started_bytes == (), "of an older instance"
    assert pushed({**said, "started_bytes": [4102]}).started_bytes == [4102]
    for wrong in ([], [1, 2], [-1], [2**33], [True], ["7"]):
        with pytest.raises(BadField, match=r"^started_bytes"):
            pushed({**said, "started_bytes": wrong})


@pytest.mark.alone
def test_a_report_that_an_instance_pushes_wakes_who_waits(tmp_path: Path) -> None:
    """A request has ended there: the next one is given its place before any poll is due."""
    with (
        StubFleet(1) as fleet,
        loadbalancer(free_port(), tmp_path / "state", "--poll-interval-s", "60") as it,
    ):
        instance = fleet.instances[0]
        member = {**INSTANCE, "auth_url": f"http://127.0.0.1:{instance.port}", "throughput_work_s": 1.0}
        key = it.control.read_text().strip()
        assert it.call("PUT", "/hot", {**HOT, "instances": [member]}, key)[0] == 200
        wait_until(lambda: any(i["in_queue"] for i in it.status()["instances"]), "tokens")
        _, first = it.call("POST", "/route", {"work": 1000.0})
        took: list[float] = []

        def wait() -> None:
            assert it.call("POST", "/route", {"work": 1000.0, "wait_s": 60})[0] == 200
            took.append(time.perf_counter())

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: it.status()["held"] == 1, "one to wait")
        said = {
            "boot_id": instance.boot_id,
            "number": 1,
            "after": 0,
            "seq": 2,
            "missed": False,
            "started": [first["request_id"]],
            "ended": [{"id": first["request_id"], "status": "finished", "output_tokens": 5}],
            "model_up": True,
        }
        raw = json.dumps(said).encode()
        begun = time.perf_counter()
        name, secret = name_and_key(member["master_token"])
        signature = hmac.new(secret.encode(), b"/report " + raw, hashlib.sha256).hexdigest()
        connection = http.client.HTTPConnection("127.0.0.1", it.port, timeout=20.0)
        connection.request("POST", "/report", raw, {"Authorization": f"Fleet {name}:{signature}"})
        assert connection.getresponse().status == 200
        connection.close()
        thread.join(20.0)
        assert took[0] - begun < 0.5, "2 ms here"
