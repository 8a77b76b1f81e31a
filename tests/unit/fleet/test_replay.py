"""What a replay is asked, and which of its answers are believed."""

import json
from dataclasses import replace
from typing import Any

import pytest

from engine.slo import Slo
from fleet.arrivals import Arrived
from fleet.replay import BadReply, ReplayDay, parse_reply, request_of
from policies import Capacity
from policies.objective import Objective

REPLY: dict[str, Any] = {
    "level": {"k": 1.7, "fast_s": 200.0, "slow_s": 3600.0, "slow_share": 0.7, "hold_s": 90.0, "pool": 4},
    "curve": [
        {"met": 0.95, "usd_day": 10.0, "k": 1.2},
        {"met": 0.991, "usd_day": 14.0, "k": 1.7},
        {"met": 0.999, "usd_day": 20.0, "k": 2.4},
    ],
    "misses": 0.009,
    "usd_day": 13.9,
    "reached": True,
}
CHOSEN = {"met": 0.991, "usd_day": 13.9, "k": 1.7, "reached": 1.0}


DAY = ReplayDay(
    goal=0.99,
    arrived=[Arrived(100, 2.0, 400.0, 1000.0), Arrived(103, 1.0, 1050.0, 9500.0)],
    until=105,
    slo=Slo(),
    prefill_weight=0.1,
    capacity=Capacity(950.0, 4.75, 28.5, 10_000.0),
    start_s=(60.0, 120.0),
    load_s=600.0,
    running_usd_h=0.4,
    stopped_usd_h=0.01,
    late_lane=True,
    max_instances=8,
)


def test_a_request_has_a_value_for_every_second_from_the_first_arrival_to_the_end() -> None:
    """A prompt of 9,500 tokens may wait 2 s + 9.5 s, but takes a second to read."""
    asked = request_of(DAY)
    assert asked["bins"] == {
        "work": [400.0, 0.0, 0.0, 1050.0, 0.0],
        "requests": [2.0, 0.0, 0.0, 1.0, 0.0],
        "limit_s": pytest.approx([2.447, 2.0, 2.0, 10.5, 2.0], abs=1e-3),
    }
    del asked["bins"]
    assert asked == {
        "goal": 0.99,
        "capacity": {"work_s": 950.0, "requests_s": 4.75, "concurrency": 28.5, "kv_tokens": 10_000.0},
        "start_s": [60.0, 120.0],
        "load_s": 600.0,
        "running_usd_h": 0.4,
        "stopped_usd_h": 0.01,
        "late_lane": True,
        "max_instances": 8,
        "seed": 1,
        "margin": 0.8,
    }


def test_the_objective_of_the_loadbalancer_is_the_one_that_is_replayed() -> None:
    asked = request_of(replace(DAY, slo=Slo(5.0, 0.0)))
    assert asked["bins"]["limit_s"] == pytest.approx([4.947, 5.0, 5.0, 4.0, 5.0], abs=1e-3)
    hopeless = request_of(replace(DAY, slo=Slo(0.5, 0.0)))
    assert hopeless["bins"]["limit_s"][3] == 0.0


def test_a_reply_is_a_level_and_a_curve() -> None:
    level, curve, chosen = parse_reply(json.dumps(REPLY).encode(), Objective())
    assert (level, curve, chosen) == (REPLY["level"], REPLY["curve"], CHOSEN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"level": None}, "wanted an object with level and curve"),
        ({"level": {}}, "level.k: is missing"),
        ({"level": {"k": 0}}, "level.k: is missing"),
        ({"level": {"k": "2"}}, "level.k '2': wanted numbers"),
        ({"level": {"k": True}}, "level.k True: wanted numbers"),
        ({"level": {"k": float("nan")}}, "level.k nan: wanted numbers"),
        ({"level": {"k": 1e9}}, "level: k 1e+09: wanted 0 to 100"),
        ({"level": {"k": 2.0, "pool": 1.5}}, "level: pool 1.5: wanted a whole number"),
        ({"level": {"k": 2.0, "goal": 0.5}}, "level.goal 0.5: wanted numbers, of k"),
        ({"level": {"k": 2.0, "settled_at": 1.0}}, "level.settled_at 1.0: wanted numbers, of k"),
        ({"level": {"k": 2.0, "min_hot": 99}}, "level.min_hot 99: wanted numbers, of k"),
        ({"curve": []}, "curve: wanted a list of points"),
        ({"curve": None}, "curve: wanted a list of points"),
        ({"misses": None}, "misses, usd_day and reached: wanted"),
        ({"reached": 1}, "misses, usd_day and reached: wanted"),
        ({"curve": [{"met": 1.0}]}, "curve[0]: wanted met, usd_day and k"),
        ({"curve": [{"met": 1.0, "usd_day": "1", "k": 1.0}]}, "curve[0]: wanted numbers"),
    ],
)
def test_a_reply_that_no_policy_could_have_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadReply) as e:
        parse_reply(json.dumps({**REPLY, **change}).encode(), Objective())
    assert str(e.value).startswith(said)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'"level"'])
def test_what_is_no_reply_at_all_is_refused(raw: bytes) -> None:
    with pytest.raises(BadReply):
        parse_reply(raw, Objective())
