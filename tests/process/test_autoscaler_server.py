"""The autoscaler's face: what it tells whom, what it refuses, and its errands on a cloud that is quick."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import TestResponse

import autoscaler_server
from autoscaler_server import REPLAY, create_app
from engine.profiles import get_profile
from engine.slo import Slo
from fleet.alarms import AFTER_S
from fleet.arrivals import Arrived
from fleet.commands import Destroy, Performed, Reply
from fleet.demand import Demand
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.instance_messages import BURST
from fleet.journal import Entries
from fleet.outside import process
from fleet.outside.config import AutoscalerConfig, local_cloud_key
from fleet.outside.destroy_fleet import destroy_fleet
from fleet.outside.engine_log import EngineLog
from fleet.outside.hot_set_push import HotSetPush
from fleet.outside.ledger import Ledger
from fleet.outside.market_view import MarketView
from fleet.outside.operator_acts import OperatorActs
from fleet.outside.prepare import prepare
from fleet.outside.replay_process import ReplayProcess
from fleet.outside.ssh_log import READY_LINE
from fleet.outside.tuner import Tuner
from fleet.outside.turns import Autoscaler
from fleet.outside.what_if_runs import WhatIfRuns
from fleet.states import State
from policies import POLICIES, Busy, Fixed, Traffic, make_policy
from policies.objective import Objective
from process.errors import CloudError, ConfigError, InstanceError
from remote.boot import make_certificate
from remote.speaker import signed
from tests.commands import run_command
from tests.fleet_world import FakeVast, World, make_offer
from tests.messages import hot_set
from tests.paths import ROOT
from tests.ports import free_port
from tests.unit.fleet.test_notifier import SECRET as HOOK_SECRET
from tests.unit.fleet.test_notifier import hook
from tests.waiting import wait_for
from tests.web_server import wait_until
from vast.rows import Offer, Row
from web.answers import Problem
from web.app import MAX_BODY
from web.keys import AccessKeys
from web.messages.busy import LOADBALANCER, MAX_BUSY_BODY
from web.messages.hot_set import HotSet, HotTiming
from web.page_files import KINDS
from web.signatures import instance_key

CONTROL, OPERATOR = "control-" + "c" * 32, "operator-" + "o" * 32
SECRET = "master-secret-of-"

REPORT: dict[str, Any] = {
    "loadbalancer": "lb1",
    "hot_epoch": "e1",
    "hot_version": 3,
    "busy": 0.5,
    "demand": 0.5,
    "held": 0,
    "held_work": 0.0,
    "arrivals": 10,
    "arrived_work": 1000.0,
    "instances": {
        "1001": {"unfinished": 1, "work": 90.0, "working_s": 2.5, "throughput_work_s": 500.0, "failures": 0}
    },
}


TRAFFIC: dict[str, Any] = {
    "prompt_tokens": 3000,
    "output_tokens": 700.0,
    "in_flight": 4,
    "late": 2,
    "held_prompt_tokens": 500,
    "oldest_wait_s": 1.5,
    "turned_late": 7,
    "first_token_s": 3.0,
    "prompt_token_s": 0.002,
    "late_bound_s": 60.0,
}

TUNED: dict[str, Any] = {
    "at": 500.0,
    "goal": 0.99,
    "level": {"k": 1.5, "pool": 3},
    "hours": 24.0,
    "requests": 1000,
    "curve": [{"met": 0.99, "usd_day": 20.0, "k": 1.5}, {"met": 0.999, "usd_day": 30.0, "k": 2.5}],
    "chosen": {"met": 0.992, "usd_day": 21.0, "k": 1.5},
}


NO_RUN = (sys.executable, "-c", "import sys; sys.exit('no run here')")


def master_token(label: str) -> str:
    return SECRET + label


class StubSsh:
    """An instance's ssh that prints the same log whatever is asked, or cannot be reached."""

    log = f"Welcome!\nFLEET-BEGIN\nloading\n50 %\n{READY_LINE}\nFLEET-END\n"

    def run(self, label: str, host: str, port: int, command: str, timeout_s: float) -> str:
        """As SshLog has it."""
        assert (label, host, "model.log" in command, timeout_s > 0) == (label, host, True, True)
        if port == 0:
            raise InstanceError("ssh does not answer")
        return self.log


class Face:
    """The app over a world with so many hot instances; the clock is the world's and stands still."""

    def __init__(
        self,
        ledger: Ledger,
        directory: Path,
        hot: int = 2,
        operator: frozenset[str] = frozenset(),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.world = World().with_pool(hot=hot, total=hot + 1)
        self.cloud = FakeVast(lambda: [c.row() for c in self.world.contracts.values()])
        self.scaler = Autoscaler(
            self.world.fleet,
            Busy(),
            Demand("e1"),
            self.cloud,  # type: ignore[arg-type]
            self.cloud,  # type: ignore[arg-type]
            ledger,
            lambda: self.world.now,
        )
        self.scaler.turn()
        self.nudged = 0
        (directory / "level.json").write_text(json.dumps(TUNED))
        self.tuner = Tuner(self.scaler, directory, ReplayProcess(REPLAY))
        app = create_app(
            self.scaler,
            AccessKeys(CONTROL, operator=operator, names=names or {}),
            5.0,
            master_token,
            self._count_nudge,
            self.tuner,
            acts=OperatorActs.of(
                self.scaler,
                directory / "audit.jsonl",
                tuner=self.tuner,
                engine_log=EngineLog(self.scaler, StubSsh()),  # type: ignore[arg-type]
                market=MarketView(self.scaler, lambda _: Performed(Reply.DONE, offers=(make_offer(1),))),
                what_if=WhatIfRuns(self.scaler, NO_RUN),
            ),
        )
        self.app = app
        self.client = app.test_client()

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> TestResponse:
        """One request. An instance does not show its key, it signs with it."""
        if path == "/ready" and key is not None:
            body = more["data"] if "data" in more else json.dumps(more["json"])
            header = {"Authorization": signed(key, path, body.encode())}
            return self.client.open(path, method=method, headers=header, data=body)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.client.open(path, method=method, headers=headers, **more)

    def say_ready(self, said: dict[str, Any]) -> TestResponse:
        """A hot instance says how it is."""
        return self.ask("POST", "/ready", instance_key(master_token(self.hot_label)), json=said)

    def _count_nudge(self) -> None:
        self.nudged += 1

    @property
    def hot_label(self) -> str:
        """Of one hot instance."""
        return next(i.label for i in self.world.fleet if i.state is State.HOT)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


@pytest.fixture
def face(ledger: Ledger, tmp_path: Path) -> Face:
    return Face(ledger, tmp_path)


# -- who may call what ------------------------------------------------------------------------------------

ROUTES: list[tuple[str, str, Any, str]] = [
    ("GET", "/instances", None, "operator"),
    ("GET", "/hot", None, "control"),
    ("POST", "/busy", REPORT, "control"),
    ("POST", "/ready", {"state": "ready", "boot_id": "b", "number": 1}, "instance"),
    ("GET", "/decisions", None, "operator"),
    ("GET", "/costs", None, "operator"),
    ("PUT", "/manage", {"manage": False}, "operator"),
    ("PUT", "/policy", {"name": "fixed", "params": {"hot": 2}}, "operator"),
    ("GET", "/metrics", None, "operator"),
    ("GET", "/policy/curve", None, "operator"),
    ("GET", "/overview", None, "operator"),
    ("GET", "/history", None, "operator"),
    ("GET", "/log?instance=1002", None, "operator"),
    ("GET", "/market", None, "operator"),
    ("GET", "/what-if", None, "operator"),
    ("POST", "/instances/1002/drain", None, "operator"),
    ("POST", "/machines/101/ban", {"hours": 2}, "operator"),
    ("POST", "/machines/101/forgive", None, "operator"),
]


PROBLEM = set(Problem.__struct_fields__)

OPEN = {"/health", "/openapi.json", "/", *(f"/page/{name}" for name in KINDS)}
"""Anyone may ask them: the page's files have nothing of the fleet in them."""


@pytest.mark.parametrize(("method", "path", "body", "who"), ROUTES, ids=[r[1] for r in ROUTES])
def test_each_protected_route_lets_its_caller_in_and_refuses_every_other(
    ledger: Ledger, tmp_path: Path, method: str, path: str, body: Any, who: str
) -> None:
    face = Face(ledger, tmp_path, operator=frozenset({OPERATOR}))
    of_instance = instance_key(master_token(face.hot_label))
    good = {"operator": {OPERATOR, CONTROL}, "control": {CONTROL}, "instance": {of_instance}}[who]
    for key in (
        None,
        "",
        "wrong",
        CONTROL[:-1],
        CONTROL,
        OPERATOR,
        of_instance,
        master_token(face.hot_label),
    ):
        answer = face.ask(method, path, key, json=body)
        if key in good:
            assert answer.status_code == 200, answer.text
        else:
            assert answer.status_code == 401, f"{who} route with {key}: {answer.text}"
            assert answer.get_json()["error"] == "unauthorized"
    twice = [("Authorization", f"Bearer {k}") for k in ("wrong", *good)]
    assert face.client.open(path, method=method, headers=twice, json=body).status_code == 401


PLAYS: list[tuple[str, str, Any, int]] = [
    ("POST", "/what-if", {}, 409),
    ("GET", "/what-if/now.html", None, 404),
]
"""Operators' routes that have nothing to answer with yet."""


@pytest.mark.parametrize(("method", "path", "body", "status"), PLAYS, ids=["ask", "report"])
def test_what_is_played_in_virtual_time_is_for_operators_only(
    ledger: Ledger, tmp_path: Path, method: str, path: str, body: Any, status: int
) -> None:
    face = Face(ledger, tmp_path, operator=frozenset({OPERATOR}))
    for key in (None, "wrong", master_token(face.hot_label)):
        assert face.ask(method, path, key, json=body).status_code == 401
    assert face.ask(method, path, OPERATOR, json=body).status_code == status


def test_a_question_is_answered_in_the_background(face: Face) -> None:
    at = int(face.world.now) - 100
    arrived = [Arrived(at + n, 1, 100.0, 300.0) for n in range(60)]
    face.scaler.ledger.add_counts({}, arrived, face.world.now)
    assert face.ask("POST", "/what-if", json={"goal": 2}).status_code == 400
    assert face.ask("POST", "/what-if", json={"goal": 0.5}).get_json()["state"] in ("running", "failed")
    wait_until(lambda: face.ask("GET", "/what-if").get_json()["state"] == "failed", "the run to end")
    assert face.ask("GET", "/what-if").get_json()["message"] == "no run here"


def test_every_route_there_is_stands_in_the_table_above(face: Face) -> None:
    there = {
        (
            method,
            rule.replace("<id:instance_id>/<act>", "1002/drain")
            .replace("<id:machine_id>", "101")
            .replace("<which>", "now"),
        )
        for rule, methods in ((r.rule, r.methods or set()) for r in face.app.url_map.iter_rules())
        for method in methods - {"HEAD", "OPTIONS"}
    }
    assert there == {(method, path.partition("?")[0]) for method, path, _, _ in [*ROUTES, *PLAYS]} | {
        ("GET", path) for path in OPEN
    }


def test_without_operator_keys_the_operators_routes_are_open_and_the_others_are_not(face: Face) -> None:
    """That is for loopback only: `serve` refuses another address without keys."""
    for method, path, body, who in ROUTES:
        assert face.ask(method, path, json=body).status_code == (200 if who == "operator" else 401), path


def test_no_answer_but_the_hot_set_holds_a_secret(face: Face) -> None:
    of_instance = instance_key(master_token(face.hot_label))
    keys = {"control": CONTROL, "instance": of_instance}
    for method, path, body, who in [*ROUTES, ("GET", "/health", None, "anyone")]:
        if path != "/hot":
            answer = face.ask(method, path, keys.get(who), json=body)
            assert answer.status_code == 200
            assert not any(secret in answer.text for secret in (CONTROL, SECRET, of_instance)), path


# -- what is told -----------------------------------------------------------------------------------------


def test_the_hot_set_is_what_a_loadbalancer_must_know(face: Face) -> None:
    said = face.ask("GET", "/hot", CONTROL).get_json()
    first = next(i for i in face.world.fleet.serving())
    assert {k: v for k, v in said.items() if k != "instances"} == {
        "epoch": "e1",
        "version": face.world.fleet.hot_version,
        "model": "vllm-13",
        "prefill_weight": 0.1,
        "max_model_len": 4096,
        "expected_output_tokens": 180.0,
        "expected_hot_s": None,
    }
    assert len(said["instances"]) == 2
    timing = get_profile("vllm-13").timing_on(first.gpu_name, first.num_gpus)
    assert said["instances"][0] == {
        "id": first.id,
        "state": "hot",
        "address": f"http://127.0.0.1:{22000 + (first.id or 0)}",
        "auth_url": f"http://127.0.0.1:{21000 + (first.id or 0)}",
        "master_token": SECRET + first.label,
        "throughput_work_s": 950.0,
        "capacity_work": 5700.0,
        "certificate": None,
        "timing": msgspec.to_builtins(HotTiming.of(timing)),
    }
    parsed = hot_set(said).instances[0].timing
    assert parsed is not None
    assert parsed.timing() == replace(timing, name="told")


def test_the_hot_set_is_not_told_before_the_fleet_is_known(ledger: Ledger, tmp_path: Path) -> None:
    face = Face(ledger, tmp_path)
    again = Autoscaler(
        face.world.new_set(),
        Fixed(2, 3),
        Demand("e2"),
        face.cloud,  # type: ignore[arg-type]
        face.cloud,  # type: ignore[arg-type]
        ledger,
        face.scaler.clock,
    )
    client = create_app(again, AccessKeys(CONTROL), 5.0, master_token).test_client()
    bearer = {"Authorization": f"Bearer {CONTROL}"}
    assert client.get("/hot", headers=bearer).status_code == 503
    again.turn()
    answer = client.get("/hot", headers=bearer)
    assert (answer.status_code, answer.get_json()["error"]) == (503, "not_ready")
    for order in again.checks_due():
        again.judge(HealthCheck(order.label, face.world.now, Verdict.PASSED, "ok"))
    assert len(client.get("/hot", headers=bearer).get_json()["instances"]) == 2


def test_a_report_is_taken_in_and_answered_with_the_version_of_the_hot_set(face: Face) -> None:
    answer = face.ask("POST", "/busy", CONTROL, json=REPORT)
    assert answer.get_json() == {
        "hot_epoch": "e1",
        "hot_version": face.world.fleet.hot_version,
        "expected_hot_s": None,
        "odd": None,
    }
    assert (face.scaler.demand.demand, face.scaler.demand.arrivals) == (0.5, 10)
    assert next(i for i in face.world.fleet if i.id == 1001).throughput_work_s == 500.0


def test_a_report_on_thousands_of_instances_is_no_over_long_body(face: Face) -> None:
    one = REPORT["instances"]["1001"]
    large = {**REPORT, "instances": {str(n): one for n in range(2000)}}
    assert len(json.dumps(large)) > MAX_BODY
    assert face.ask("POST", "/busy", CONTROL, json=large).status_code == 200
    assert face.ask("POST", "/busy", CONTROL, data=b" " * (MAX_BUSY_BODY + 1)).status_code == 413


def test_what_a_loadbalancer_says_of_the_traffic_is_taken_in(face: Face) -> None:
    said = {**REPORT, "held": 3, "held_work": 90.0, "traffic": TRAFFIC}
    face.ask("POST", "/busy", CONTROL, json=said)
    more = {**TRAFFIC, "prompt_tokens": 3300, "output_tokens": 770.0}
    said |= {"arrivals": 11, "arrived_work": 1100.0, "traffic": more}
    assert face.ask("POST", "/busy", CONTROL, json=said).status_code == 200
    demand = face.scaler.demand
    assert demand.traffic == Traffic(1, 300, 70.0, 100.0, 4, 3, 90.0, 500, 1.5)
    assert (demand.slo, demand.late_bound_s) == (Slo(3.0, 0.002), 60.0)


def test_what_arrived_and_what_was_worked_is_in_the_ledger_before_costs_are_told(
    face: Face, tmp_path: Path
) -> None:
    face.ask("POST", "/busy", CONTROL, json=REPORT)
    later = {**REPORT, "arrivals": 12, "arrived_work": 1200.0}
    later["instances"] = {"1001": {**REPORT["instances"]["1001"], "working_s": 4.0}}
    face.ask("POST", "/busy", CONTROL, json=later)
    assert face.ask("GET", "/costs").status_code == 200
    second = int(face.world.now)
    assert face.scaler.ledger.arrived(0.0, 1e9) == [Arrived(second, 2.0, 200.0, 0.0)]
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as file:
        assert file.execute("SELECT SUM(seconds) FROM worked").fetchone() == (4.0,)


def test_the_curve_says_what_each_level_would_have_cost_yesterday(face: Face) -> None:
    face.scaler.set_policy(Objective(goal=0.99))
    face.tuner.policy_was_set()
    said = face.ask("GET", "/policy/curve").get_json()
    assert said["policy"] == {
        **{"goal": 0.99, "k": 1.5, "pool": 3, "fast_s": 300.0, "slow_s": 1800.0, "slow_share": 0.8},
        **{"hold_s": 60.0, "drain_s": 40.0, "pool_headroom": 1.2, "min_hot": 1},
    }
    assert {name: said[name] for name in ("at", "goal", "hours", "requests")} == {
        "at": 500.0,
        "goal": 0.99,
        "hours": 24.0,
        "requests": 1000,
    }
    assert (said["curve"], said["chosen"]) == (TUNED["curve"], TUNED["chosen"])


def test_without_a_curve_it_is_said_why(face: Face, tmp_path: Path) -> None:
    tuner = Tuner(face.scaler, tmp_path / "none", ReplayProcess(REPLAY))
    client = create_app(face.scaler, AccessKeys(CONTROL), 5.0, master_token, tuner=tuner).test_client()
    answer = client.get("/policy/curve")
    assert (answer.status_code, answer.get_json()["error"]) == (404, "no_curve")
    assert answer.get_json()["message"] == "the policy is busy, which has no goal"
    face.scaler.set_policy(Objective())
    assert "20 minutes" in client.get("/policy/curve").get_json()["message"]


def test_a_goal_that_was_put_is_the_policys_and_gets_the_level_known_for_it(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "objective", Objective)
    answer = face.ask("PUT", "/policy", json={"name": "objective", "params": {"goal": 0.99}})
    assert answer.get_json()["params"]["goal"] == 0.99
    assert face.scaler.policy == Objective(goal=0.99, k=1.5, pool=3)
    answer = face.ask("PUT", "/policy", json={"name": "objective", "params": {"goal": 0.999}})
    assert face.scaler.policy == Objective(goal=0.999)
    wrong = face.ask("PUT", "/policy", json={"name": "objective", "params": {"goal": 2}})
    assert (wrong.status_code, wrong.get_json()["message"][:7]) == (400, "params:")


def test_what_an_instance_says_brings_its_next_check_forward(face: Face) -> None:
    face.world.fleet.checks_due(face.world.now)
    assert face.world.fleet.checks_due(face.world.now) == []
    said = {"state": "failed", "why": "no such model", "boot_id": "b", "number": 7}
    assert face.say_ready(said).get_json() == {"label": face.hot_label}
    assert face.nudged == 1
    assert [order.label for order in face.world.fleet.checks_due(face.world.now)] == [face.hot_label]
    assert face.world.fleet[face.hot_label].state is State.HOT
    assert face.say_ready(said).status_code == 409, "heard before"
    assert face.say_ready({**said, "number": 6}).status_code == 409
    assert face.say_ready({**said, "boot_id": "c", "number": 1}).status_code == 200
    assert face.say_ready({**said, "number": 8}).status_code == 409, "of a boot that is over"


def test_a_word_brings_the_certificate_that_clients_are_given_from_then_on(
    face: Face, tmp_path: Path
) -> None:
    make_certificate(str(tmp_path))
    pem = (tmp_path / "tls.crt").read_text()
    version = face.scaler.instances.hot_version
    said = {"state": "ready", "boot_id": "b", "number": 7, "certificate": pem}
    assert face.say_ready(said).status_code == 200
    i = face.scaler.instances[face.hot_label]
    assert (i.certificate, i.address is not None and i.address[:8]) == (pem, "https://")
    assert face.scaler.instances.hot_version == version + 1, "loadbalancers are told"
    assert face.say_ready({**said, "number": 8}).status_code == 200
    assert face.scaler.instances.hot_version == version + 1, "once"
    older = {"state": "ready", "boot_id": "b", "number": 9}
    assert face.say_ready(older).status_code == 200
    assert i.certificate == pem, "an auth_server of an older start script says none"


@pytest.mark.parametrize("pem", ["x", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused_and_nothing_is_taken_in(face: Face, pem: str) -> None:
    said = {"state": "ready", "boot_id": "b", "number": 7, "certificate": pem}
    answer = face.say_ready(said)
    assert (answer.status_code, "certificate" in answer.get_json()["message"]) == (400, True)
    assert face.scaler.instances[face.hot_label].certificate is None
    assert face.say_ready({**said, "certificate": ""}).status_code == 200, "its number is not used up"


def test_an_instance_that_says_too_much_is_refused_and_not_logged(
    face: Face, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    statuses = [
        face.say_ready({"state": "loading", "boot_id": "b", "number": n, "why": "7 %"}).status_code
        for n in range(100)
    ]
    assert Counter(statuses) == {200: BURST, 429: 100 - BURST}
    assert len([r for r in caplog.records if "says: " in r.getMessage()]) == 1
    assert face.nudged == BURST


@pytest.mark.parametrize("what", ["body", "path", "key", "none", "bearer"])
def test_what_no_instance_has_signed_is_not_heard(face: Face, what: str) -> None:
    body = json.dumps({"state": "ready", "boot_id": "b", "number": 1})
    key = instance_key(master_token(face.hot_label))
    header = {
        "body": signed(key, "/ready", body.encode() + b" "),
        "path": signed(key, "/report", body.encode()),
        "key": signed(instance_key("another"), "/ready", body.encode()),
        "none": "",
        "bearer": f"Bearer {key}",
    }[what]
    answer = face.client.post("/ready", data=body, headers={"Authorization": header})
    assert (answer.status_code, face.nudged) == (401, 0)


def test_instances_shows_each_with_its_state_since_why_price_and_address_and_what_went(face: Face) -> None:
    said = face.ask("GET", "/instances").get_json()
    assert [i["state"] for i in said["instances"]].count("hot") == 2
    assert {"id", "label", "machine_id", "since", "why", "price_usd_h", "address"} <= set(
        said["instances"][0]
    )
    assert (said["manage"], said["gone"]) == (True, [])


def test_decisions_show_what_was_seen_wanted_ordered_and_what_failed(face: Face) -> None:
    face.scaler.set_policy(Fixed(0, 3))
    face.world.now += 5
    face.scaler.turn()
    face.cloud.listing_error = CloudError("vastai show instances: expected JSON, got nothing")
    face.scaler.turn()
    said = face.ask("GET", "/decisions").get_json()
    outage, decided, *_ = said["decisions"]
    assert outage["notes"][-1] == "vastai show instances: expected JSON, got nothing"
    assert (decided["seen"]["hot"], decided["targets"]["hot"]) == (2, 0)
    assert [c["do"] for c in decided["commands"]] == ["drain", "drain"]
    assert all(c["label"] and c["why"] for c in decided["commands"])
    assert said["failures"] == []
    face.cloud.listing_error, face.cloud.error = None, RuntimeError("x")
    face.scaler.destroy("a person asked")
    face.scaler.perform_next()
    (failure,) = face.ask("GET", "/decisions").get_json()["failures"]
    assert (failure["do"], failure["reply"]) == ("destroy", "unknown")


def test_costs_are_dollars_by_state_and_what_is_being_spent(face: Face) -> None:
    face.world.now += 3600
    said = face.ask("GET", "/costs").get_json()
    assert said["usd"]["total"] == pytest.approx(sum(v for k, v in said["usd"].items() if k != "total"))
    assert said["usd"]["hot_idle"] > 0.7
    assert said["budget_left_usd_h"] == pytest.approx(10.0 - said["committed_usd_h"])
    narrow = face.ask("GET", f"/costs?from={face.world.now - 60}&to={face.world.now}").get_json()
    assert narrow["usd"]["total"] < said["usd"]["total"] / 20


def test_health_is_open_and_says_how_old_the_last_good_turn_is(face: Face) -> None:
    assert face.ask("GET", "/health").get_json() == {"status": "ok", "last_good_turn_age_s": 0.0}
    face.world.now += 61
    face.cloud.listing_error = CloudError("vastai show instances: 500")
    face.scaler.turn()
    answer = face.ask("GET", "/health")
    assert (answer.status_code, answer.get_json()["last_good_turn_age_s"]) == (503, 61.0)
    assert "vastai show instances: 500" in answer.get_json()["message"]


def test_health_names_the_loadbalancer_whose_reports_are_not_understood(face: Face) -> None:
    bearer = {"Authorization": f"Bearer {CONTROL}"}
    for _ in range(40):
        assert face.ask("POST", "/busy", CONTROL, json=REPORT).status_code == 200
        deaf = face.client.post("/busy", headers=bearer | {LOADBALANCER: "lb2"}, data=b'{"odd')
        assert deaf.status_code == 400
        face.world.now += 1.0
    face.scaler.turn()
    answer = face.ask("GET", "/health")
    assert (answer.status_code, answer.get_json()["error"]) == (503, "no_reports")
    assert answer.get_json()["message"].endswith("loadbalancers that are there: lb2")


def test_a_fixed_policy_that_is_told_no_total_destroys_nothing(face: Face) -> None:
    answer = face.ask("PUT", "/policy", json={"name": "fixed", "params": {"hot": 1}})
    assert answer.get_json() == {"name": "fixed", "params": {"hot": 1}}
    assert not [c for c in face.scaler.turn().commands if isinstance(c, Destroy)]
    assert len(face.world.fleet) == 3


def test_manage_and_policy_are_what_was_put(face: Face) -> None:
    assert face.ask("PUT", "/manage", json={"manage": False}).get_json() == {"manage": False}
    assert face.world.fleet.manage is False
    answer = face.ask("PUT", "/policy", json={"name": "busy", "params": {"min_hot": 2, "aim": 0.5}})
    assert answer.get_json()["params"]["min_hot"] == 2
    assert face.scaler.policy == Busy(min_hot=2, aim=0.5)


def test_metrics_are_prometheus_text(face: Face) -> None:
    text = face.ask("GET", "/metrics").text
    assert 'autoscaler_instances{state="hot"} 2.0\n' in text
    assert 'autoscaler_spent_dollars_total{on="hot_idle"}' in text
    families = list(text_string_to_metric_families(text))
    assert all(f.name.startswith("autoscaler_") and f.documentation for f in families)
    assert {f.type for f in families} == {"gauge", "counter", "histogram"}


def test_metrics_count_how_long_starts_and_loads_took(face: Face) -> None:
    now = face.world.now
    durations = [("boot", now, 70.0), ("boot", now, 90.0), ("load", now, 900.0), ("destroyed", now, 20.0)]
    before = face.ask("GET", "/metrics").text
    face.scaler.ledger.write(Entries(durations=durations))
    text = face.ask("GET", "/metrics").text
    added = {
        name: value - samples_of(before).get(name, 0.0)
        for name, value in samples_of(text).items()
        if value != samples_of(before).get(name, 0.0)
    }
    assert added["autoscaler_start_seconds_sum vllm-13"] == 160.0
    assert added["autoscaler_start_seconds_bucket 120.0 vllm-13"] == 2.0
    assert "autoscaler_start_seconds_bucket 60.0 vllm-13" not in added
    assert added["autoscaler_load_seconds_count vllm-13"] == 1.0
    assert added["autoscaler_order_seconds_sum destroy"] == 20.0


def test_the_age_of_the_last_good_turn_counts_from_the_start_before_there_was_one(face: Face) -> None:
    face.scaler.last_good_turn = None
    face.world.now += 5.0
    assert "autoscaler_last_good_turn_age_seconds 5.0\n" in face.ask("GET", "/metrics").text


def samples_of(text: str) -> dict[str, float]:
    """Each sample of a metrics page, by its name and labels."""
    return {
        " ".join((s.name, *s.labels.values())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


# -- what is refused --------------------------------------------------------------------------------------


def wrong_report(**changed: Any) -> str:
    return json.dumps({**REPORT, **changed})


def wrong_instance(**changed: Any) -> str:
    return wrong_report(instances={"1001": {**REPORT["instances"]["1001"], **changed}})


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", "/busy", "", "body"),
        ("POST", "/busy", "{", "body"),
        ("POST", "/busy", "[1]", "body"),
        ("POST", "/busy", "{}", "loadbalancer"),
        ("POST", "/busy", wrong_report(busy=-0.1), "busy"),
        ("POST", "/busy", wrong_report(busy=True), "busy"),
        ("POST", "/busy", wrong_report(demand="1"), "demand"),
        ("POST", "/busy", wrong_report(demand=1e300), "demand"),
        ("POST", "/busy", '{"loadbalancer": "x", "busy": NaN}', "body"),
        ("POST", "/busy", wrong_report(held=1.5), "held"),
        ("POST", "/busy", wrong_report(arrivals=-1), "arrivals"),
        ("POST", "/busy", wrong_report(loadbalancer="x" * 65), "loadbalancer"),
        ("POST", "/busy", wrong_report(instances=[]), "instances"),
        ("POST", "/ready", "{}", "state"),
        ("POST", "/ready", '{"state": "hot"}', "state"),
        ("POST", "/ready", '{"state": "ready", "why": 5}', "why"),
        ("POST", "/ready", json.dumps({"state": "ready", "why": "x" * 301}), "why"),
        ("POST", "/ready", json.dumps({"state": "ready", "certificate": 5}), "certificate"),
        ("PUT", "/manage", "{}", "manage"),
        ("PUT", "/manage", '{"manage": "yes"}', "manage"),
        ("PUT", "/manage", '{"manage": 1}', "manage"),
        ("PUT", "/policy", "{}", "name"),
        ("PUT", "/policy", '{"name": "none"}', "name"),
        ("PUT", "/policy", '{"name": 5}', "name"),
        ("PUT", "/policy", '{"name": "busy", "params": []}', "params"),
        ("PUT", "/policy", '{"name": "busy", "params": {"speed": 1}}', "params"),
        ("PUT", "/policy", '{"name": "busy", "params": {"aim": "1"}}', "params"),
        ("PUT", "/policy", '{"name": "busy", "params": {"aim": -1}}', "params"),
        ("PUT", "/policy", '{"name": "busy", "params": {"aim": 0}}', "params"),
        ("PUT", "/policy", '{"name": "busy", "params": {"min_hot": 1.5}}', "params"),
        ("PUT", "/policy", '{"name": "fixed", "params": {"hot": 1' + "0" * 400 + "}}", "params"),
        ("GET", "/costs?from=x", None, "from"),
        ("GET", "/costs?from=-1", None, "from"),
        ("GET", "/costs?to=nan", None, "to"),
        ("GET", "/costs?to=1e999", None, "to"),
    ],
)
def test_a_bad_request_is_answered_400_with_the_field_named(
    face: Face, method: str, path: str, body: str | None, field: str
) -> None:
    key = {"/busy": CONTROL, "/ready": instance_key(master_token(face.hot_label))}.get(path)
    answer = face.ask(method, path, key, data=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.get_json()) == PROBLEM
    assert answer.get_json()["message"].startswith(f"{field}: ")
    assert face.scaler.policy == Busy()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (wrong_report(instances={"x": {}}), "instances"),
        (wrong_report(instances={"-1": {}}), "instances"),
        (wrong_report(instances={"9" * 30: {}}), "instances"),
        (wrong_report(instances={"1001": 5}), "instances[...]"),
        (wrong_instance(unfinished=-1), "instances[...].unfinished"),
        (wrong_instance(working_s="2"), "instances[...].working_s"),
        (wrong_instance(throughput_work_s=-5), "instances[...].throughput_work_s"),
        (wrong_instance(failures=None), "instances[...].failures"),
        (wrong_instance().replace("2.5", "1e999"), "instances[...].working_s"),
        (wrong_report(traffic=[]), "traffic"),
        (wrong_report(traffic={}), "traffic.prompt_tokens"),
        (wrong_report(traffic={**TRAFFIC, "in_flight": -1}), "traffic.in_flight"),
        (wrong_report(traffic={**TRAFFIC, "late": 1.5}), "traffic.late"),
        (wrong_report(traffic={**TRAFFIC, "first_token_s": 0}), "traffic.first_token_s"),
        (wrong_report(traffic={**TRAFFIC, "late_bound_s": -1}), "traffic.late_bound_s"),
    ],
)
def test_what_is_odd_in_a_report_is_left_out_and_named(face: Face, body: str, field: str) -> None:
    """One odd value makes the autoscaler deaf to no loadbalancer, which learns what is left out."""
    answer = face.ask("POST", "/busy", CONTROL, data=body)
    assert answer.status_code == 200, answer.text
    assert answer.get_json()["odd"].startswith(f"{field}: ")
    assert face.ask("POST", "/busy", CONTROL, json=REPORT).get_json()["odd"] is None


@pytest.mark.parametrize("name", ["x", "-1", "9" * 30, "\u0661\u0662"])
def test_a_row_whose_name_is_no_id_is_left_out_and_the_others_are_heard(face: Face, name: str) -> None:
    before = {i.id: i.throughput_work_s for i in face.world.fleet}
    row = REPORT["instances"]["1001"]
    said = wrong_report(instances={"1001": row, name: row})
    assert face.ask("POST", "/busy", CONTROL, data=said).status_code == 200
    assert {i.id: i.throughput_work_s for i in face.world.fleet} == before | {1001: 500.0}


def test_a_report_of_a_newer_loadbalancer_may_say_more(face: Face) -> None:
    said = {**REPORT, "more": 1, "traffic": {**TRAFFIC, "more": 1}}
    assert face.ask("POST", "/busy", CONTROL, json=said).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/page/nothing.js", 404),
        ("GET", "/hot/", 404),
        ("POST", "/hot", 405),
        ("GET", "/busy", 405),
        ("DELETE", "/instances", 405),
        ("POST", "/manage", 405),
    ],
)
def test_unknown_routes_and_methods_are_answered_in_json(
    face: Face, method: str, path: str, status: int
) -> None:
    answer = face.ask(method, path, CONTROL, json={})
    assert answer.status_code == status
    assert set(answer.get_json()) == PROBLEM


@pytest.mark.parametrize("path", ["/manage", "/policy"])
def test_an_over_long_body_is_refused(face: Face, path: str) -> None:
    answer = face.ask("PUT", path, data=b" " * (MAX_BODY + 1))
    assert (answer.status_code, set(answer.get_json())) == (413, PROBLEM)


def test_no_body_however_odd_is_a_fault_of_ours(face: Face) -> None:
    """Every JSON value in the place of every field of every body."""
    odd: list[object] = [
        None,
        True,
        -1,
        0,
        1.5,
        1e308,
        10**400,
        "",
        "x",
        "\0",
        "\ud800",
        [],
        [[]],
        {},
        {"": {}},
        "9" * 5000,
    ]
    of_instance = instance_key(master_token(face.hot_label))
    for method, path, body, who in ROUTES:
        if body is None:
            continue
        key = {"control": CONTROL, "instance": of_instance}.get(who)
        for value in odd:
            for sent in [value, *({**body, name: value} for name in body)]:
                answer = face.ask(method, path, key, data=json.dumps(sent))
                assert answer.status_code in (200, 400), (path, sent, answer.text)


# -- flags and keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"port": 0}, "--port 0: wanted 1 to 65535"),
        ({"max_instances": 0}, "--max-instances 0"),
        ({"max_dollars_per_hour": -1.0}, "--max-dollars-per-hour -1"),
        ({"max_dollars_per_hour": float("nan")}, "--max-dollars-per-hour nan"),
        ({"poll_interval_s": 0.0}, "--poll-interval-s 0"),
        ({"check_timeout_s": 0.0}, "--check-timeout-s 0"),
        ({"speedup": 0.5}, "--speedup 0.5"),
        ({"speedup": 2.0}, "--speedup is for --local"),
        ({"replay_every_s": -1.0}, "--replay-every-s -1: wanted 0 to 86400"),
        ({"label": ""}, "--label ''"),
        ({"label": "a/b"}, "--label 'a/b'"),
        ({"label": "my fleet"}, "--label 'my fleet'"),
        ({"label": ".."}, "--label '..'"),
        ({"label": "x" * 65}, "--label"),
        ({"loadbalancer": ("localhost:8200",)}, "--loadbalancer 'localhost:8200'"),
        ({"loadbalancer": ("http://h:8200/hot",)}, "--loadbalancer"),
        ({"loadbalancer": ("http://h:x",)}, "--loadbalancer"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag_and_what_was_wanted(
    wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as e:
        AutoscalerConfig(**wrong).checked()
    assert str(e.value).startswith(named)


def test_a_policys_given_parameters_are_taken_literally_and_its_own_follow_the_speed() -> None:
    assert make_policy(POLICIES, "busy", {}, 10.0) == Busy(remove_after_s=30.0)
    assert make_policy(POLICIES, "busy", {"remove_after_s": 20.0}, 10.0) == Busy(remove_after_s=20.0)
    for name, params in (
        ("none", {}),
        ("busy", {"x": 1.0}),
        ("busy", {"min_hot": 1.5}),
        ("busy", {"aim": 2.0}),
    ):
        with pytest.raises(ConfigError):
            make_policy(POLICIES, name, params)


def test_a_goal_is_short_for_the_policy_that_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "objective", Objective)
    configs: list[AutoscalerConfig] = []
    monkeypatch.setattr(autoscaler_server, "serve", configs.append)

    def policy(*flags: str) -> object:
        autoscaler_server.main(list(flags))
        return configs[-1].make_policy()

    assert policy("--goal", "0.999") == Objective(goal=0.999)
    assert policy("--policy", "objective", "--policy-param", "goal=0.999") == Objective(goal=0.999)
    assert policy("--goal", "0.99", "--policy-param", "min_hot=2") == Objective(goal=0.99, min_hot=2)
    assert policy() == Objective()
    for wrong, said in (
        (("--goal", "2"), "policy objective: goal 2: wanted 0.5 to"),
        (("--goal", "nan"), "policy parameter goal nan"),
        (("--goal", "0.9", "--policy", "busy"), "--goal and --policy busy"),
        (("--goal", "0.9", "--policy-param", "goal=0.8"), "--goal and --policy-param goal"),
    ):
        with pytest.raises(ConfigError) as e:
            policy(*wrong)
        assert str(e.value).startswith(said)


def test_the_help_of_every_flag_names_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for command in ([], ["prepare"], ["destroy-fleet"]):
        with pytest.raises(SystemExit):
            autoscaler_server.main([*command, "--help"])
        shown[" ".join(command)] = capsys.readouterr().out
    wanted = {
        *("--model", "--manage", "--no-manage", "--max-instances", "--max-dollars-per-hour", "--label"),
        *("--poll-interval-s", "--operator-key-file", "--host", "--port", "--policy", "--local"),
    }
    assert wanted <= set(re.findall(r"--[a-z-]+", shown[""]))
    assert "vllm-13, vllm-70" in " ".join(shown[""].split())
    for text in shown.values():
        for flag in text.partition("options:\n")[2].split("\n  -")[2:]:
            assert "default" in flag, flag


def test_the_key_of_a_local_cloud_is_its_own_and_never_the_operators(tmp_path: Path) -> None:
    """A key of the paid service must not reach whatever listens on a loopback port."""
    vast = {"VAST_API_KEY": "real-key-of-the-paid-service"}
    with pytest.raises(ConfigError, match="python -m localcloud` makes it"):
        local_cloud_key(vast, tmp_path)
    file = tmp_path / ".local" / "state" / "autoscaler-py" / "localcloud" / "api.key"
    file.parent.mkdir(parents=True)
    file.write_text("k" * 32 + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        local_cloud_key(vast, tmp_path)
    file.chmod(0o600)
    assert local_cloud_key(vast, tmp_path) == "k" * 32
    assert local_cloud_key({**vast, "LOCALCLOUD_API_KEY": "env"}, tmp_path) == "env"
    with pytest.raises(ConfigError):
        local_cloud_key({"XDG_STATE_HOME": str(tmp_path / "elsewhere")}, tmp_path)
    file.write_text("")
    with pytest.raises(ConfigError):
        local_cloud_key({}, tmp_path)


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--port", "many"], "--port many: wanted a whole number"),
        (["--model", "vllm-9000", "--local"], "unknown model 'vllm-9000': known are gemma-3-12b, "),
        (["--port", "TAKEN"], "cannot listen on 127.0.0.1:TAKEN: Address already in use"),
        (["--host", "0.0.0.0"], "listening on 0.0.0.0:8100 needs keys"),
        (["--port", "FREE"], "no Vast.ai API key"),
        (["--port", "FREE", "--local"], "no key of the local cloud"),
        (["prepare", "--count", "0"], "--count 0: wanted 1 to 8"),
        (["prepare"], "the following arguments are required: --count"),
        (["destroy-fleet", "--local", "--cloud-url", "https://10.0.0.1:443"], "loopback"),
        (["destroy-fleet", "--local", "--cloud-url", "http://127.0.0.1:FREE"], "the cloud cannot be used"),
        (["--port", "FREE", "--operator-key-file", "/nonexistent"], "key file /nonexistent cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_an_operator_gets_wrong_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_port: int, argv: list[str], says: str
) -> None:
    argv = [a.replace("TAKEN", str(taken_port)).replace("FREE", str(free_port())) for a in argv]
    for name in [n for n in os.environ if n.startswith(("VAST_", "XDG_", "LOCALCLOUD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if "--cloud-url" in argv:
        monkeypatch.setenv("LOCALCLOUD_API_KEY", "x" * 32)
    ended = run_command("autoscaler_server.py", autoscaler_server.main, *argv)
    assert ended.status == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert says.replace("TAKEN", str(taken_port)) in ended.err
    assert "x" * 32 not in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("command", "text", "says"),
    [
        ([], "max-instance = 4", "max-instance is not known; the nearest name is max-instances"),
        ([], "port = 0", "port = 0: wanted 1 to 65535"),
        ([], "count = 2", "count is not known"),  # an order, no setting
        (["prepare", "--count", "9"], "max-instances = 4\nport = 8100", "--count 9: wanted 1 to 4"),
        (["destroy-fleet"], "yes = true", "yes is not known"),
        (["destroy-fleet"], "speedup = 2\nmanage = false", "--speedup is for --local only"),
    ],
)
def test_one_file_is_for_all_commands_and_its_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], text: str, says: str
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AUTOSCALER_CONFIG", str(file))
    ended = run_command("autoscaler_server.py", autoscaler_server.main, *command)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1), ended.err
    assert says in ended.err


def test_the_process_says_what_is_wrong_in_one_line_and_exits_2(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "autoscaler_server.py", "--no-such-flag"],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("autoscaler_server.py: unrecognized arguments: --no-such-flag")


# -- prepare and destroy-fleet ----------------------------------------------------------------------------


class QuickCloud:
    """Boots, stops and destroys at the next listing. lies: empty listings to come; holds: nothing boots."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.offers = [replace(make_offer(n), host_id=n) for n in range(1, 9)]
        self.lies = 0
        self.holds = False
        self.created: list[str] = []
        self.start_scripts: list[str] = []

    def __call__(self, settings: object) -> "QuickCloud":
        return self

    def check_key(self) -> None: ...
    def register_ssh_key(self, key: str) -> None: ...

    def attach_ssh_key(self, instance_id: int, key: str) -> None: ...

    def list_instances(self, label_prefix: str | None = None) -> list[Row]:
        shown = [self._row(i, **r) for i, r in self.rows.items()]
        for r in self.rows.values():
            if r["intended"] == "stopped":
                r["status"] = "exited"
            elif not self.holds:
                r["status"] = "running"
        if self.lies > 0:
            self.lies -= 1
            return []
        return [row for row in shown if (row.label or "").startswith(label_prefix or "")]

    def _row(self, id: int, label: str, status: str | None, intended: str) -> Row:
        ports = {22: 1, 3000: 2, 8000: 3} if status == "running" else {}
        return Row(
            id=id,
            machine_id=id,
            label=label,
            actual_status=status,
            intended_status=intended,
            cur_state=intended,
            status_msg=None,
            public_ip="127.0.0.1",
            ports=ports,
            ssh_host=None,
            ssh_port=None,
            gpu_name="RTX 4090",
            num_gpus=1,
            dph_base=0.3,
            dph_total=0.4,
            storage_usd_h=0.01,
            price_now_usd_h=0.4 if status == "running" else 0.01,
            start_date=0.0,
            end_date=None,
            image=None,
        )

    def search_offers(self, query: str, storage_gb: float) -> list[Offer]:
        return self.offers

    def create(self, offer_id: int, *, label: str, onstart: str, **more: object) -> int:
        self.start_scripts.append(onstart)
        self.offers = [o for o in self.offers if o.id != offer_id]
        self.rows[offer_id] = {"label": label, "status": None, "intended": "running"}
        self.created.append(label)
        return offer_id

    def start(self, instance_id: int) -> None:
        self.rows[instance_id]["intended"] = "running"

    def stop(self, instance_id: int) -> None:
        self.rows[instance_id]["intended"] = "stopped"

    def destroy(self, instance_id: int) -> None:
        self.rows.pop(instance_id, None)


class AlwaysWell:
    """A health checker that finds every instance well and idle."""

    def __init__(
        self,
        client: object,
        ssh: object,
        token: object,
        model: str,
        timeout_s: float,
        clock: Callable[[], float],
        *,
        long_prompt: str,
        **kind: bool,
    ) -> None:
        assert long_prompt
        assert kind.keys() <= {"chats", "pooling"}
        self.clock = clock

    async def check(self, order: HealthCheckOrder) -> HealthCheck:
        return HealthCheck(order.label, self.clock(), Verdict.PASSED, "well", 0)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> QuickCloud:
    made = QuickCloud()
    monkeypatch.setattr(process, "Vast", made)
    monkeypatch.setattr(process, "HealthChecker", AlwaysWell)
    monkeypatch.setenv("LOCALCLOUD_API_KEY", "k" * 32)
    return made


def quick(tmp_path: Path, **more: Any) -> AutoscalerConfig:
    return AutoscalerConfig(
        state_dir=tmp_path / "state",
        local=True,
        speedup=1000.0,
        poll_interval_s=0.5,
        check_boot_every_s=0.5,
        check_hot_every_s=0.5,
        **more,
    )


def test_prepare_ends_when_what_it_rented_is_loaded_and_stopped(
    tmp_path: Path, cloud: QuickCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hot for a moment is not prepared: the last one would be left running, and nobody would stop it."""
    prepare(quick(tmp_path), 2)
    assert [r["intended"] for r in cloud.rows.values()] == ["stopped", "stopped"]
    assert all(r["label"].startswith("fleet/") for r in cloud.rows.values())
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 instances are stopped with vllm-13 on their disks."
    assert out[-2].startswith("prepared 2 of 2: 2 cold")
    prepare(quick(tmp_path), 1)
    assert len(cloud.rows) == 3
    with pytest.raises(ConfigError, match="3 are loaded already, and --max-instances is 3"):
        prepare(quick(tmp_path, max_instances=3), 1)


def test_what_prepare_rents_reports_to_the_autoscaler_that_serves_it(
    tmp_path: Path, cloud: QuickCloud
) -> None:
    """The address is in the start script for good, and one file is for all commands."""
    file = tmp_path / "fleet.toml"
    file.write_text(f"""
        local = true
        speedup = 1000
        poll-interval-s = 0.5
        state-dir = "{tmp_path / "state"}"
        port = 9000
        tls-cert = "autoscaler.pem"
        tls-key = "autoscaler.key"
    """)
    autoscaler_server.main(["prepare", "--count", "1", "--config", str(file)])
    assert len(cloud.start_scripts) == 1
    assert "FLEET_READY_URL=https://127.0.0.1:9000/ready\n" in cloud.start_scripts[0]


def test_prepare_that_is_interrupted_says_what_is_still_rented_and_goes_on_when_called_again(
    tmp_path: Path, cloud: QuickCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.holds = True

    def interrupt() -> None:
        limit = time.monotonic() + 20
        while len(cloud.created) < 2 and time.monotonic() < limit:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as e:
        prepare(quick(tmp_path), 2)
    assert e.value.code == 130
    out = capsys.readouterr().out
    for label in cloud.created:
        assert f"({label})" in out
    cloud.holds = False
    prepare(quick(tmp_path), 2)
    assert len(cloud.rows) == 2
    assert [r["intended"] for r in cloud.rows.values()] == ["stopped", "stopped"]


def test_destroy_fleet_asks_and_ends_what_carries_the_label_and_nothing_else(
    tmp_path: Path, cloud: QuickCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    for id, label in ((1, "fleet/a"), (2, "fleet/b"), (3, "fleet2/c"), (4, "mine")):
        cloud.rows[id] = {"label": label, "status": "running", "intended": "running"}

    def eof(question: str) -> str:
        raise EOFError

    destroy_fleet(quick(tmp_path), ask=lambda question: "n")
    with pytest.raises(ConfigError, match="--yes"):
        destroy_fleet(quick(tmp_path), ask=eof)
    assert set(cloud.rows) == {1, 2, 3, 4}
    questions: list[str] = []
    destroy_fleet(quick(tmp_path), ask=lambda question: questions.append(question) or "y")  # type: ignore[func-returns-value]
    assert "destroy these 2 instances" in questions[0]
    assert set(cloud.rows) == {3, 4}
    destroy_fleet(quick(tmp_path), ask=None)
    assert "nothing is rented with the label fleet/…" in capsys.readouterr().out


def test_destroy_fleet_does_not_believe_an_empty_listing_that_comes_after_a_full_one(
    tmp_path: Path, cloud: QuickCloud
) -> None:
    cloud.rows[1] = {"label": "fleet/a", "status": "running", "intended": "running"}
    destroy, tries = cloud.destroy, list[int]()

    def lost_at_first(instance_id: int) -> None:
        tries.append(instance_id)
        if len(tries) == 1:
            raise CloudError("no answer")
        destroy(instance_id)

    cloud.destroy = lost_at_first  # type: ignore[method-assign]

    def yes(question: str) -> str:
        cloud.lies = 4
        return "y"

    destroy_fleet(quick(tmp_path), ask=yes)
    assert cloud.rows == {}


def test_two_autoscalers_do_not_run_on_one_fleet(tmp_path: Path, cloud: QuickCloud) -> None:
    first = process.AutoscalerProcess(quick(tmp_path))
    try:
        with pytest.raises(ConfigError, match="another autoscaler runs"):
            process.AutoscalerProcess(quick(tmp_path))
    finally:
        first.close()
    process.AutoscalerProcess(quick(tmp_path)).close()


def test_a_ledger_that_cannot_be_used_is_said_in_one_line(tmp_path: Path, cloud: QuickCloud) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "ledger.sqlite").mkdir()
    with pytest.raises(ConfigError, match=r"ledger\.sqlite cannot be used"):
        process.AutoscalerProcess(quick(tmp_path))


def test_a_process_tells_people_what_is_wrong_and_shows_the_url_nowhere(
    tmp_path: Path, cloud: QuickCloud, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(AFTER_S, "not_well", 0.0)
    monkeypatch.setattr(cloud, "credit", lambda: -5.0, raising=False)
    caplog.set_level(logging.DEBUG)
    with hook() as service:
        running = process.AutoscalerProcess(quick(tmp_path, notify=(service.url,)))
        running.start()
        try:
            wait_for("the message", lambda: service.got)
        finally:
            running.stop()
            running.close()
    (told,) = service.got
    assert told["title"] == "fleet fleet: not well: no credit"
    assert "-5.00 $" in told["message"]
    assert "people are told: not_well: no_credit begins" in caplog.text
    kept = b"".join(p.read_bytes() for p in (tmp_path / "state").rglob("*") if p.is_file())
    assert HOOK_SECRET not in caplog.text
    assert HOOK_SECRET.encode() not in kept


@pytest.mark.alone
def test_a_loadbalancer_that_hangs_does_not_keep_another_from_being_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And one that refuses again and again is complained of once."""
    told: list[bytes] = []
    refused: list[bytes] = []

    async def run() -> None:
        def answering(status: bytes, heard: list[bytes]) -> Callable[..., Any]:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while head := await reader.readuntil(b"\r\n\r\n"):
                    length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
                    heard.append(head + await reader.readexactly(length))
                    writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

            async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    await answer(reader, writer)
                writer.close()

            return quiet

        good = await asyncio.start_server(answering(b"200 OK", told), "127.0.0.1", 0)
        other = await asyncio.start_server(answering(b"401 No", refused), "127.0.0.1", 0)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            ports = [s.getsockname()[1] for s in (silent, other.sockets[0], good.sockets[0])]
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            task = asyncio.create_task(HotSetPush(lambda: 0, lambda: hot, urls, CONTROL).run())
            begun = time.monotonic()
            while (not told or len(refused) < 3) and time.monotonic() < begun + 20:
                await asyncio.sleep(0.01)
            assert time.monotonic() - begun < 2.5, "it waited for the one that hangs, which takes 3 s"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        good.close()
        other.close()

    hot = HotSet("e1", 0, "vllm-13", 0.1, 180.0, None, ())
    asyncio.run(run())
    assert b"PUT /hot" in told[0]
    assert b'"version":0,' in told[0]
    assert [r.getMessage().partition(" refused")[1] for r in caplog.records if "401" in r.getMessage()] == [
        " refused"
    ]


def test_the_beginning_of_an_engines_log_is_shown_until_it_was_ready(face: Face) -> None:
    said = face.ask("GET", "/log?instance=1002").get_json()
    assert said == {"lines": ["loading", "50 %", READY_LINE], "ready": True}
    assert face.ask("GET", "/log?instance=4711").status_code == 404
    found = next(i for i in face.world.fleet if i.id == 1002)
    found.ssh = ("127.0.0.1", 0)
    answer = face.ask("GET", "/log?instance=1002")
    assert (answer.status_code, answer.get_json()["error"]) == (502, "no_log")


def test_acts_have_the_name_of_the_key_else_its_hash(ledger: Ledger, tmp_path: Path) -> None:
    face = Face(ledger, tmp_path, operator=frozenset({OPERATOR}), names={OPERATOR: "anna"})
    face.ask("PUT", "/manage", OPERATOR, json={"manage": False})
    face.ask("POST", "/machines/101/forgive", CONTROL)
    first, second = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (first["who"], first["did"]) == ("anna", "manage: off")
    assert second["who"].startswith("key-")
    assert CONTROL not in second["who"]
