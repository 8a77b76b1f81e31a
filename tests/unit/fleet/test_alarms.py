"""What people are told of without asking, and when: fleet/alarms.py."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from fleet.alarms import AFTER_S, CLEAR_S, MOST_KINDS, AlarmFacts, Alarms, Notice, wrong_now

WELL = AlarmFacts(hot=2, demand=1.0, in_time=1.0, goal=0.99, usd_h=1.0, limit_usd_h=10.0, loadbalancers=0)
CALM_S = 600.0
BAD: dict[str, dict[str, Any]] = {
    "not_well: no_credit": {"reasons": {"no_credit": "the account is empty"}},
    "no_hot_instance": {"hot": 0},
    "below_goal": {"in_time": 0.98},
    "near_dollar_limit": {"usd_h": 9.1},
    "create_loop": {"created": 6},
    "machine_does_not_go_away": {"staying": ["fleet/a"]},
    "loadbalancer_silent": {"heard": 1, "loadbalancers": 2},
}


def told(alarms: Alarms, facts: AlarmFacts, from_s: float, to_s: float) -> list[tuple[float, str, bool]]:
    """What is told while the facts stay as they are, looked at each second."""
    found: list[Notice] = []
    for second in range(int(from_s), int(to_s)):
        found += alarms.settle(facts, float(second))
    return [(n.at, n.kind, n.begins) for n in found]


def facts(**bad: Any) -> AlarmFacts:
    return replace(WELL, **bad)


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_is_told_once_when_it_begins_and_once_when_it_is_over(kind: str) -> None:
    alarms, bad = Alarms(CALM_S), facts(**BAD[kind])
    assert list(wrong_now(bad)) == [kind]
    assert told(alarms, WELL, 0, 10) == []
    after_s = AFTER_S.get(kind.partition(":")[0], 0.0)
    assert told(alarms, bad, 10, 3000) == [(10 + after_s, kind, True)]
    assert told(alarms, WELL, 3000, 9000) == [(3000 + CLEAR_S, kind, False)]


def test_what_is_wrong_for_a_moment_is_not_told() -> None:
    alarms = Alarms(CALM_S)
    for begin in range(0, 2000, 200):
        assert told(alarms, facts(hot=0), begin, begin + 100) == []
        assert told(alarms, WELL, begin + 100, begin + 200) == []


def test_what_comes_and_goes_is_told_no_more_than_once_in_the_calm_time() -> None:
    alarms, at = Alarms(CALM_S), []
    for begin in range(0, 7200, 180):
        at += told(alarms, facts(created=6), begin, begin + 90)
        at += told(alarms, WELL, begin + 90, begin + 180)
    assert 2 < len(at) <= 7200 / CALM_S + 1
    assert all(later[0] - one[0] >= CALM_S for one, later in pairwise(at))
    assert [begins for _, _, begins in at] == [n % 2 == 0 for n in range(len(at))]


def test_an_end_that_falls_into_the_calm_time_is_told_after_it() -> None:
    alarms = Alarms(CALM_S)
    assert told(alarms, facts(created=6), 0, 10) == [(0.0, "create_loop", True)]
    assert told(alarms, WELL, 10, 2000) == [(CALM_S, "create_loop", False)]


def test_an_idle_fleet_that_has_nothing_hot_is_well() -> None:
    assert wrong_now(facts(hot=0, demand=0.0, held=0)) == {}
    assert wrong_now(facts(in_time=None)) == wrong_now(facts(in_time=0.1, goal=None)) == {}


def test_a_local_cloud_that_is_faster_is_judged_as_much_sooner() -> None:
    assert told(Alarms(0.0, speedup=60.0), facts(hot=0), 0, 20) == [(5.0, "no_hot_instance", True)]


def test_turns_in_which_the_limits_are_in_the_way_are_told_when_they_are_many_of_late() -> None:
    """deploy/alerts.yml: more than ten in a quarter of an hour."""
    alarms = Alarms(0.0)
    found = [n for second in range(60) for n in alarms.settle(facts(clamped=second), float(second))]
    assert [(n.at, n.kind, n.begins) for n in found] == [(11.0, "limits_in_the_way", True)]
    assert told(alarms, facts(clamped=59), 60, 3000) == [(49 + 900 + CLEAR_S, "limits_in_the_way", False)]
    slow = Alarms(0.0)
    assert [n for s in range(9000) for n in slow.settle(facts(clamped=s // 100), float(s))] == []


def test_a_restart_tells_nothing_twice_and_tells_the_end() -> None:
    before = Alarms(CALM_S)
    told(before, facts(created=6), 0, 10)
    after = Alarms(CALM_S)
    after.restore({k: (float(at), str(text)) for k, (at, text) in before.told().items()}, 20.0)
    assert told(after, facts(created=6), 20, 2000) == []
    (over,) = [n for s in range(2000, 2100) for n in after.settle(WELL, float(s))]
    assert (over.at, over.begins, over.text) == (
        2000 + CLEAR_S,
        False,
        wrong_now(facts(created=6))["create_loop"],
    )
    assert after.told() == {}


def test_texts_of_others_are_one_line_and_kinds_are_few() -> None:
    alarms = Alarms(0.0)
    (notice,) = alarms.settle(facts(staying=["a\nb\x1b[31m" * 500]), 0.0)
    assert "\n" not in notice.text
    assert "\x1b" not in notice.text
    assert len(notice.text) <= 600
    many = {f"r{n}": "" for n in range(200)}
    found = [n for s in range(100) for n in alarms.settle(facts(reasons=many), float(s))]
    assert len(found) <= MOST_KINDS
