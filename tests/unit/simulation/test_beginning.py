"""What a run in virtual time begins with, and what of it counts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from engine.profiles import PROFILES
from fleet.limits import Limits
from policies import Busy, Fixed, Objective, Policy
from simulation.traces.request import Request
from simulation.virtual.beginning import LOOK_S, Beginning, begin, longest_start_s
from simulation.virtual.cloud import deep_market
from simulation.virtual.setting import Setting
from simulation.virtual.virtual_fleet import simulate

A100 = tuple(m for m in deep_market() if m.gpu_name == "A100 SXM4")
SETTING = Setting(profile=PROFILES["vllm-13"], machines=A100, seed=1)


def steady(rate: float, seconds: float, from_s: float = 0.0) -> Iterator[Request]:
    """Requests at equal distances."""
    return (Request(from_s + n / rate, 300, 180, -1) for n in range(int(seconds * rate)))


def begun(
    requests: Iterator[Request],
    policy: Policy | None = None,
    setting: Setting = SETTING,
    **flags: Any,
) -> tuple[Setting, Beginning, list[Request]]:
    given = {"hot": None, "pool": None, "lead_in_s": None, "score_from_s": None} | flags
    told, found, all_of_it = begin(setting, policy or Objective(), requests, **given)
    return told, found, list(all_of_it)


def test_it_begins_with_what_the_policy_keeps_under_the_first_quarter_of_an_hour() -> None:
    """At goal 0.99 the objective keeps twice what the load needs hot, and a fifth more loaded."""
    told, found, _ = begun(steady(20.0, 1800.0))
    assert found.offered == pytest.approx(20.0 * 210.0 / 1720.0, rel=0.15)
    assert found.hot == told.hot == 5
    assert found.pool == told.pool == 6
    assert not found.too_small
    assert begun(steady(20.0, 1800.0), Fixed(3, 7))[1].hot == 3
    busy = begun(steady(20.0, 1800.0), Busy())[1]
    assert (busy.hot, busy.pool) == (4, 5)


def test_the_pool_is_for_the_busiest_minutes() -> None:
    late = [*steady(5.0, 600.0), *steady(40.0, 300.0, 600.0), *steady(5.0, 900.0, 900.0)]
    found = begun(iter(late))[1]
    assert found.busiest == pytest.approx(2.4 * found.offered, rel=0.05)
    assert found.pool >= 2.0 * found.busiest > found.hot


def test_its_first_quarter_of_an_hour_is_played_once_before_and_the_trace_stays_whole() -> None:
    told, found, played = begun(steady(2.0, 1800.0))
    assert found.lead_in_s == told.lead_in_s == LOOK_S
    assert [r.at_s for r in played if r.at_s >= 0.0] == [n / 2.0 for n in range(3600)]
    assert [r.at_s for r in played if r.at_s < 0.0] == [n / 2.0 - LOOK_S for n in range(1800)]
    assert played == sorted(played)


def test_what_counts_begins_after_the_longest_start_and_a_short_trace_counts_for_the_most_part() -> None:
    assert 100.0 < longest_start_s(SETTING) <= 120.0
    assert begun(steady(2.0, 1800.0))[1].score_from_s == longest_start_s(SETTING)
    assert begun(steady(2.0, 100.0))[1].score_from_s == pytest.approx(25.0, abs=0.5)
    assert begun(steady(2.0, 100.0))[1].lead_in_s == pytest.approx(99.5)


def test_of_a_trace_of_one_moment_everything_counts() -> None:
    found, played = begun(iter([Request(0.0, 100, 50, -1)] * 3))[1:]
    assert (found.score_from_s, found.lead_in_s, len(played)) == (0.0, 0.0, 3)
    assert "its first 1 s offer" in found.report()["sentences"][0]


def test_flags_give_the_beginning_that_was_usual_before() -> None:
    told, found, played = begun(steady(20.0, 1800.0), hot=1, pool=4, score_from_s=0.0)
    assert told == replace(SETTING, hot=1, pool=4)
    assert played == list(steady(20.0, 1800.0))
    assert found.lead_in_s == 0.0
    assert begun(steady(20.0, 1800.0), lead_in_s=60.0)[1].lead_in_s == 60.0
    assert begun(steady(20.0, 1800.0), hot=8)[1].pool == 8


def test_a_fleet_that_begins_too_small_says_so_in_one_sentence() -> None:
    small = begun(steady(20.0, 1800.0), hot=1, pool=4, score_from_s=0.0)[1]
    said = [s for s in small.report()["sentences"] if "too small" in s]
    assert len(said) == 1
    assert "2.1 instances' worth" in small.report()["sentences"][0]
    assert not any("too small" in s for s in begun(steady(20.0, 1800.0))[1].report()["sentences"])


def test_it_begins_within_the_limits() -> None:
    few = replace(SETTING, limits=Limits(max_instances=3, max_usd_h=1000.0))
    cheap = replace(SETTING, limits=Limits(max_instances=100, max_usd_h=2.0))
    assert begun(steady(40.0, 1000.0), setting=few)[1].pool == 3
    assert begun(steady(40.0, 1000.0), setting=cheap)[1].pool == 2
    assert begun(steady(40.0, 1000.0), setting=replace(SETTING, machines=()))[1].pool == 0


def test_only_what_arrives_in_the_counted_part_is_in_the_figures() -> None:
    told, found, played = begun(steady(4.0, 1000.0))
    out = simulate(told, Objective(), played)
    assert out.audit["requests"] == len(played) == 7_600
    assert out.requests == out.completed == sum(r.at_s >= found.score_from_s for r in played)
    assert out.over_time.samples[0].at_s >= 0.0
    assert out.missed == 0
