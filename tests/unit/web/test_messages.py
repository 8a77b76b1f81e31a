"""What our processes say is what the structs say."""

import json
from typing import Any

import msgspec
import pytest

from dispatch.route_request import RouteRequest
from engine.slo import Slo
from tests.loadbalancer_app import LoadBalancerApp
from web.messages.busy import FIRST_TOKEN_BOUNDS_S, TOKEN_BOUNDS_S, WHOLE_BOUNDS_S, BusyReport
from web.messages.decoding import BadField, decode
from web.messages.reports import PushedReport


def test_the_busy_report_is_json_that_says_it_all() -> None:
    app = LoadBalancerApp()
    app.stock()
    app.client.post("/route", json={"work": 500})
    said = json.loads(msgspec.json.encode(app.balancer.usage(app.service.clock(), app.service.name)))
    assert said == {
        "loadbalancer": app.service.name,
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
            "held_by_priority": [0, 0, 0],
        },
        "answers": {
            "first_token": [0] * (len(FIRST_TOKEN_BOUNDS_S) + 1),
            "token": [0] * (len(TOKEN_BOUNDS_S) + 1),
            "whole": [0] * (len(WHOLE_BOUNDS_S) + 1),
            "late": 0,
        },
        "instances": {
            "7": {"unfinished": 1, "work": 500.0, "working_s": 0.0, "throughput_work_s": 100.0, "failures": 0}
        },
    }


def test_the_busy_report_of_a_loadbalancer_that_knows_nothing_is_json_too() -> None:
    said = json.loads(msgspec.json.encode(LoadBalancerApp().balancer.usage(0.0, "lb")))
    assert (said["hot_epoch"], said["instances"], said["demand"]) == (None, {}, 0.0)


def test_the_autoscaler_understands_the_busy_report_and_also_one_of_an_older_loadbalancer() -> None:
    app = LoadBalancerApp()
    app.stock()
    app.client.post("/route", json={"prompt_tokens": 1000, "max_tokens": 50})
    app.balancer.request(RouteRequest(900.0, None, (), 100), 5.0, None, app.service.clock())
    raw = msgspec.json.encode(app.balancer.usage(app.service.clock(), "lb"))
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
