"""Every published format is read, every mistake is named with its line, and bursts stay bursts."""

import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import ConfigError
from simulation import synthetic, traces
from simulation.synthetic import Synthetic
from simulation.traces import Request, read, scaled, spread_ticks, tiled

COMPACT = "arrival_s,prompt_tokens,output_tokens\n"


def file(tmp_path: Path, text: str | bytes, name: str = "log.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- formats ---------------------------------------------------------------------------------------------


def test_the_compact_format_with_and_without_sessions(tmp_path: Path) -> None:
    path = file(tmp_path, COMPACT + "10.5,100,20\n11,7,1\n")
    assert list(read(path)) == [Request(0.0, 100, 20, -1), Request(0.5, 7, 1, -1)]
    path = file(tmp_path, "arrival_s,prompt_tokens,output_tokens,client\r\n0,100,20,39\r\n0,7,1,14\r\n")
    assert list(read(path)) == [Request(0.0, 100, 20, 39), Request(0.0, 7, 1, 14)]


def test_the_azure_logs_of_2023_and_2024(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    )
    first, second = read(path)
    assert first == Request(0.0, 374, 44, -1)
    assert second.at_s == pytest.approx(4.314579)
    path = file(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n",
    )
    assert [r.at_s for r in read(path)] == pytest.approx([0.0, 0.99007])


def test_burstgpt_without_the_requests_that_failed(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n",
    )
    assert list(read(path)) == [Request(0.0, 472, 18, -1), Request(113.0, 417, 276, -1)]
    path = file(
        tmp_path,
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,a-b,1,ChatGPT,472,18,490,Conversation log\n6,a-b,1,ChatGPT,472,18,490,Conversation log\n",
    )
    one, other = read(path)
    assert one.session == other.session >= 0


def test_mooncake_spreads_its_ticks_and_knows_who_shares_a_prefix(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]},
        {"timestamp": 0, "input_length": 7322, "output_length": 490, "hash_ids": [7, 8]},
        {"timestamp": 3000, "input_length": 100, "output_length": 5, "hash_ids": [0, 9]},
    ]
    path = file(tmp_path, "\n".join(map(json.dumps, lines)) + "\n", "log.jsonl")
    a, b, c = read(path)
    assert (a.prompt_tokens, b.prompt_tokens, c.prompt_tokens) == (6758, 7322, 100)
    assert a.at_s == 0.0
    assert 0.0 < b.at_s < 3.0
    assert 0.0 < c.at_s - b.at_s < 6.0
    assert a.session == c.session != b.session
    assert list(read(path)) == [a, b, c]


def test_gzip_is_known_by_its_bytes_and_reading_is_lazy(tmp_path: Path) -> None:
    path = file(tmp_path, gzip.compress((COMPACT + "0,1,1\n1,1,1\n2,x,1\n").encode()), "log")
    requests = read(path)
    assert [next(requests), next(requests)] == [Request(0.0, 1, 1, -1), Request(1.0, 1, 1, -1)]
    with pytest.raises(ConfigError, match="line 4: prompt_tokens"):
        next(requests)


# -- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "line 1: the column output_tokens is missing"),
        (COMPACT + "0,1,1\nx,1,1\n", "line 3: arrival_s: wanted seconds, got 'x'"),
        (COMPACT + "nan,1,1\n", "line 2: arrival_s: wanted seconds, got 'nan'"),
        (COMPACT + "0,1.5,1\n", "line 2: prompt_tokens: wanted a whole number of tokens, got '1.5'"),
        (COMPACT + "0,1,many\n", "line 2: output_tokens: wanted a whole number of tokens, got 'many'"),
        (COMPACT + "0,0,1\n", "line 2: prompt_tokens: wanted 1 to 10,000,000 tokens, got 0"),
        (COMPACT + "0,1,-3\n", "line 2: output_tokens: wanted 1 to 10,000,000 tokens, got -3"),
        (COMPACT + "0,1,99999999\n", "line 2: output_tokens: wanted 1 to 10,000,000 tokens, got 99999999"),
        (COMPACT + "0,1,1\n5,1,1\n4,1,1\n", "line 4: its time is 1 s before that of the row before it"),
        (COMPACT + "0,1,1\n5e9,1,1\n", "line 3: its time is over 1e+09 s after the first"),
        (COMPACT + "0,1\n", "line 2: wanted 3 columns, got 2"),
        (COMPACT, "line 1: there are no requests in it"),
        ("", "line 1: there are no requests in it"),
        (b"\xff\xfe\x00", "line 1: wanted UTF-8 text"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: TIMESTAMP: wanted a date"),
        ('{"timestamp": 0, "input_length": 5}\n', "line 1: output_length is missing"),
        ('{"timestamp": "a", "input_length": 5, "output_length": 1}\n', "line 1: timestamp: wanted milli"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n[]\n', "line 2: wanted a JSON object"),
        (gzip.compress((COMPACT + "0,1,1\n" * 5000).encode())[:60], "gzip is cut short or damaged"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_and_what_is_wrong(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        list(read(path))
    assert str(refused.value).startswith(f"{path}: line ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            list(read(path))


# -- repeats, tiles, ticks -------------------------------------------------------------------------------


def bursty(seconds: int, seed: int = 1) -> list[Request]:
    """Quiet, and now and then a minute with many."""
    rng = random.Random(seed)
    found: list[Request] = []
    at = 0.0
    while at < seconds:
        at += rng.expovariate(5.0 if int(at // 60) % 10 == 3 else 0.2)
        found.append(Request(at, 10, 10, len(found)))
    return found


def dispersion(requests: list[Request]) -> float:
    """Variance over mean of the counts per minute; 1 for a Poisson process."""
    counts = Counter(int(r.at_s // 60) for r in requests)
    values = [counts[n] for n in range(max(counts) + 1)]
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5, 10.0])
def test_scaling_keeps_order_and_bursts(factor: float) -> None:
    log = bursty(60_000)
    found = list(scaled(log, factor, 5.0, random.Random(2)))
    assert len(found) == pytest.approx(factor * len(log), rel=0.05)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(found))
    assert found[0].at_s >= 0.0
    if factor > 1.0:
        # Repeats make peaks higher in proportion; a Poisson process of that rate would stay at 1.
        assert dispersion(found) > 0.8 * factor * dispersion(log)
        assert len({r.session for r in found}) == len(found)


def test_scaling_is_lazy() -> None:
    endless = (Request(float(n), 1, 1, -1) for n in itertools.count())
    assert len(list(itertools.islice(scaled(endless, 3.0, 5.0, random.Random(1)), 1000))) == 1000


def test_tiles_follow_the_daily_profile_and_go_on_for_as_long_as_asked() -> None:
    rng = random.Random(1)
    log = [Request(rng.uniform(0, 3000), 10, 10, -1) for _ in range(3000)]
    log.sort()
    factors = traces.HOUR_FACTORS["burstgpt"]
    found = list(tiled(lambda: log, 2.0, factors, random.Random(3)))
    assert found[-1].at_s == pytest.approx(2 * 86_400, abs=60.0)
    by_hour = Counter(int(r.at_s // 3600) % 24 for r in found)
    mean = sum(by_hour.values()) / 24
    for hour, factor in enumerate(factors):
        assert by_hour[hour] / mean == pytest.approx(factor, abs=0.12)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(found))
    with pytest.raises(ConfigError, match="cannot be tiled"):
        next(tiled(lambda: log[:1], 1.0, factors, random.Random(3)))


def test_rounded_times_are_spread_within_their_tick() -> None:
    log = [Request(3.0 * (n // 5), n + 1, 1, -1) for n in range(500)]
    found = list(spread_ticks(log, 3.0, random.Random(1)))
    assert [r.prompt_tokens for r in found] == [r.prompt_tokens for r in log]
    assert all(0.0 <= b.at_s - a.at_s < 3.0 for a, b in zip(log, found, strict=True))
    assert len({r.at_s for r in found}) == 500


# -- made-up traffic -------------------------------------------------------------------------------------


def some(**changes: float) -> list[Request]:
    return list(synthetic.requests(Synthetic(**changes), seed=4))


def test_made_up_traffic_has_the_rate_and_the_lengths_that_were_asked_for() -> None:
    spec = Synthetic(days=2.0, rate=1.0)
    found = list(synthetic.requests(spec, seed=4))
    assert len(found) / (2 * 86_400) == pytest.approx(1.0, rel=0.05)
    prompts = sorted(r.prompt_tokens for r in found)
    assert sum(prompts) / len(prompts) == pytest.approx(spec.prompt, rel=0.03)
    assert prompts[int(0.95 * len(prompts))] == pytest.approx(spec.prompt_p95, rel=0.05)
    assert found == list(synthetic.requests(spec, seed=4))
    assert found != list(synthetic.requests(spec, seed=5))


def test_bursts_make_it_bursty_and_the_swing_makes_the_day() -> None:
    flat = some(swing=0.0, bursts=0.0, days=0.5)
    assert dispersion(flat) == pytest.approx(1.0, abs=0.2)
    assert dispersion(some(swing=0.0, bursts=4.0, height=5.0, days=0.5)) > 5.0
    by_hour = Counter(int(r.at_s // 3600) for r in some(bursts=0.0, swing=1.0, rate=5.0))
    factors = traces.HOUR_FACTORS["servegen_m-small"]
    assert by_hour[20] / by_hour[5] == pytest.approx(factors[20] / factors[5], rel=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate=0", "rate 0: wanted 0.0001 to 100000"),
        ("speed=3", "wanted name=number"),
        ("rate", "wanted name=number"),
        ("rate=fast", "rate: wanted a number, got 'fast'"),
        ("prompt=100,prompt_p95=50", "prompt_p95 50: wanted over the mean"),
        ("prompt=100,prompt_p95=5000", "which is as far as a log-normal goes"),
        ("bursts=100,burst_s=60", "leave no rest"),
    ],
)
def test_what_is_no_traffic_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        synthetic.parse(text)


def test_parameters_are_read_from_the_flag() -> None:
    assert synthetic.parse("") == Synthetic()
    assert synthetic.parse("days=2,rate=1.5") == Synthetic(days=2.0, rate=1.5)


def endless() -> Iterator[Request]:
    return synthetic.requests(Synthetic(days=366.0, rate=1000.0), 1)


def test_a_year_can_be_begun_without_being_made() -> None:
    assert len(list(itertools.islice(endless(), 10))) == 10
