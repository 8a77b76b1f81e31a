"""Made-up traffic has the rate, the day, the bursts and the lengths that were asked for."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from process.errors import ConfigError
from simulation.traces import synthetic
from simulation.traces.logs import HOUR_FACTORS
from simulation.traces.request import Request
from simulation.traces.synthetic import Synthetic

FLAT = Synthetic(days=0.5, swing=0.0, bursts=0.0)


def counts(requests: list[Request], every_s: float) -> list[int]:
    found = Counter(int(r.at_s // every_s) for r in requests)
    return [found[n] for n in range(max(found) + 1)]


def dispersion(requests: list[Request]) -> float:
    """Variance over mean of the counts per minute; 1 for a Poisson process."""
    values = counts(requests, 60.0)
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean


def test_times_ascend_from_midnight_to_the_end_of_the_last_day() -> None:
    found = list(synthetic.requests(Synthetic(days=0.1), seed=4))
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(found))
    assert 0.0 < found[0].at_s < 60.0
    assert 8640.0 - 60.0 < found[-1].at_s < 8640.0
    assert {r.session for r in found} == {-1}


def test_the_same_seed_gives_the_same() -> None:
    one, same, other = (list(synthetic.requests(Synthetic(days=0.05), seed)) for seed in (4, 4, 5))
    assert one == same != other


def test_a_year_can_be_begun_without_being_made() -> None:
    endless = synthetic.requests(Synthetic(days=366.0, rate=1000.0), 1)
    assert len(list(itertools.islice(endless, 10))) == 10


@pytest.mark.parametrize(
    "spec",
    [
        FLAT,
        Synthetic(days=1.0, bursts=0.0, rate=1.0),
        Synthetic(days=2.0, rate=0.5),
        replace(FLAT, bursts=3200.0, burst_s=1.0, height=10.0),  # gaps of an eighth of a second
        replace(FLAT, bursts=60.0, burst_s=20.0, height=100.0),
    ],
    ids=["flat", "day", "bursts", "short-gaps", "high"],
)
def test_the_mean_rate_is_what_was_asked_for_whatever_the_bursts(spec: Synthetic) -> None:
    found = sum(1 for _ in synthetic.requests(spec, seed=3))
    assert found / (spec.days * 86_400.0) == pytest.approx(spec.rate, rel=0.06)


def test_it_begins_in_a_burst_as_often_as_at_any_other_time() -> None:
    """Else the first minutes of every run would be quieter, or louder, than the rest."""
    spec = Synthetic(days=0.001, rate=2.0, swing=0.0, bursts=10.0, burst_s=60.0, height=10.0)
    found = sum(1 for seed in range(400) for _ in synthetic.requests(spec, seed))
    assert found / (400 * 86.4) == pytest.approx(2.0, rel=0.15)


def test_lengths_have_the_mean_and_the_95th_percentile_that_were_asked_for() -> None:
    spec = replace(FLAT, rate=1.0, prompt=2000.0, prompt_p95=7000.0, output=200.0, output_p95=500.0)
    found = list(synthetic.requests(spec, seed=4))
    for tokens, mean, p95 in (
        (sorted(r.prompt_tokens for r in found), 2000.0, 7000.0),
        (sorted(r.output_tokens for r in found), 200.0, 500.0),
    ):
        assert sum(tokens) / len(tokens) == pytest.approx(mean, rel=0.04)
        assert tokens[int(0.95 * len(tokens))] == pytest.approx(p95, rel=0.04)
        assert tokens[0] >= 1
        # A log-normal's median is below its mean by exp(s²/2).
        assert tokens[len(tokens) // 2] < 0.85 * mean


def test_a_length_is_at_least_one_token_and_at_most_what_may_be_asked_for() -> None:
    rng = random.Random(1)
    assert {synthetic._length(rng, (-50.0, 0.1)), synthetic._length(rng, (50.0, 0.1))} == {1, 100_000}


def test_without_bursts_it_is_a_poisson_process() -> None:
    found = list(synthetic.requests(FLAT, seed=4))
    assert dispersion(found) == pytest.approx(1.0, abs=0.2)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(found)]
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1.0), abs=0.01)


def test_bursts_come_as_often_last_as_long_and_are_as_high_as_was_asked_for() -> None:
    """With 300 requests/s in a burst and 3 otherwise, a second shows which it is in."""
    spec = Synthetic(days=0.5, rate=12.9, swing=0.0, bursts=6.0, burst_s=20.0, height=100.0)
    per_second = counts(list(synthetic.requests(spec, seed=9)), 1.0)
    in_burst = [n > 60 for n in per_second]
    bursts = [len(list(run)) for burst, run in itertools.groupby(in_burst) if burst]
    assert len(bursts) / 12 == pytest.approx(6.0, rel=0.25)
    assert sum(bursts) / len(bursts) == pytest.approx(20.0, rel=0.35)
    usual = 12.9 / (1 + 6 * 20 / 3600 * 99)
    quiet = [n for n, burst in zip(per_second, in_burst, strict=True) if not burst]
    assert sum(quiet) / len(quiet) == pytest.approx(usual, rel=0.1)
    loud = sorted(n for n, burst in zip(per_second, in_burst, strict=True) if burst)
    assert loud[len(loud) // 2] == pytest.approx(100 * usual, rel=0.1)


def test_bursts_make_it_burstier_than_poisson_in_proportion_to_the_rate() -> None:
    slow, fast = (
        dispersion(list(synthetic.requests(replace(FLAT, bursts=4.0, rate=rate), seed=4)))
        for rate in (0.5, 4.0)
    )
    assert slow > 2.0
    assert (fast - 1.0) / (slow - 1.0) == pytest.approx(8.0, rel=0.5)


@pytest.mark.parametrize("swing", [0.0, 1.0, 2.0])
def test_the_swing_makes_the_day(swing: float) -> None:
    by_hour = counts(list(synthetic.requests(Synthetic(bursts=0.0, swing=swing, rate=2.0), seed=1)), 3600.0)
    mean = sum(by_hour) / 24
    for came, factor in zip(by_hour, HOUR_FACTORS["servegen_m-small"], strict=True):
        assert came / mean == pytest.approx(1.0 + swing * (factor - 1.0), abs=0.06)


# -- from the command line -------------------------------------------------------------------------------


def test_parameters_are_read_from_the_flag_and_the_rest_are_the_defaults() -> None:
    assert synthetic.parse("") == Synthetic()
    assert synthetic.parse("days=2,rate=1.5") == Synthetic(days=2.0, rate=1.5)
    assert synthetic.parse(" height = 5 , bursts=2e0,") == Synthetic(height=5.0, bursts=2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate=0", "synthetic rate 0: wanted 0.0001 to 100000"),
        ("days=400", "synthetic days 400: wanted 0.001 to 366"),
        ("swing=-1", "synthetic swing -1: wanted 0 to 2"),
        ("height=0.5", "synthetic height 0.5: wanted 1 to 100"),
        ("output=0", "synthetic output 0: wanted 1 to 100000"),
        ("speed=3", "synthetic 'speed=3': wanted name=number with a name of days, rate, swing, bursts,"),
        ("rate", "synthetic 'rate': wanted name=number"),
        ("rate=fast", "synthetic rate: wanted a number, got 'fast'"),
        ("rate=", "synthetic rate: wanted a number, got ''"),
        ("rate=nan", "synthetic rate: wanted a number, got 'nan'"),
        ("rate=inf", "synthetic rate: wanted a number, got 'inf'"),
        ("rate=1,rate=2", "synthetic rate: wanted once, got 1 and '2'"),
        ("prompt=100,prompt_p95=50", "synthetic prompt_p95 50: wanted over the mean, 100"),
        ("prompt=100,prompt_p95=5000", "at most 386.8, which is as far as a log-normal goes"),
        ("bursts=100,burst_s=60", "synthetic bursts 100: wanted at most 54 an hour of 60 s; more leave no"),
    ],
)
def test_what_is_no_traffic_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        synthetic.parse(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
