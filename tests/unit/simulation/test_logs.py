"""Every published format is read, every mistake is named with its line, and bursts stay bursts."""

import gzip
import itertools
import json
import logging
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from process.errors import ConfigError
from simulation.traces import logs
from simulation.traces.logs import scaled, spread_ticks, tiled
from simulation.traces.reading import read
from simulation.traces.request import ReadNotes, Request

COMPACT = "arrival_s,prompt_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURSTGPT_2 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def file(tmp_path: Path, text: str | bytes, name: str = "log.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mooncake(*rows: tuple[float, int, list[int]]) -> str:
    """JSON lines of (timestamp in ms, prompt tokens, hash_ids)."""
    return "".join(
        json.dumps({"timestamp": at, "input_length": prompt, "output_length": 5, "hash_ids": ids}) + "\n"
        for at, prompt, ids in rows
    )


# -- formats ---------------------------------------------------------------------------------------------


def test_the_compact_format_begins_at_0_with_and_without_sessions(tmp_path: Path) -> None:
    path = file(tmp_path, COMPACT + "10.5,100,20\n11,7,1\n")
    assert list(read(path)) == [Request(0.0, 100, 20, -1), Request(0.5, 7, 1, -1)]
    path = file(tmp_path, "arrival_s,prompt_tokens,output_tokens,client\r\n0,100,20,39\r\n0,7,1,14\r\n")
    assert list(read(path)) == [Request(0.0, 100, 20, 39), Request(0.0, 7, 1, 14)]
    path = file(tmp_path, "arrival_s,prompt_tokens,output_tokens,session\n0,1,1,\n0,1,1,-1\n0,1,1,0\n")
    assert [r.session for r in read(path)] == [-1, -1, 0]


def test_columns_may_stand_in_any_order_beside_others_and_in_quotes(tmp_path: Path) -> None:
    path = file(tmp_path, '"output_tokens",who,"arrival_s","prompt_tokens"\n20,"a, b","1.5",100\n\n3,_,2,7')
    assert list(read(path)) == [Request(0.0, 100, 20, -1), Request(0.5, 7, 3, -1)]


def test_a_mark_that_says_utf_8_at_the_begin_is_passed_over(tmp_path: Path) -> None:
    for text in (COMPACT + "0,7,5\n", mooncake((0, 7, []))):
        assert list(read(file(tmp_path, "\ufeff" + text))) == [Request(0.0, 7, 5, -1)]


def test_the_azure_logs_of_2023_and_2024(tmp_path: Path) -> None:
    path = file(tmp_path, AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    first, second = read(path)
    assert first == Request(0.0, 374, 44, -1)
    assert second.at_s == pytest.approx(4.314579)
    path = file(
        tmp_path,
        AZURE + "2024-05-10 23:59:59.009930+00:00,2162,5\n2024-05-11 00:00:01+00:00,2399,6\n",
    )
    assert [r.at_s for r in read(path)] == pytest.approx([0.0, 1.99007])
    path = file(tmp_path, AZURE + "2023-11-16 18:15:46,374,44\n2023-11-16 19:15:46,396,109\n")
    assert [r.at_s for r in read(path)] == [0.0, 3600.0]


def test_burstgpt_without_the_requests_that_failed_which_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file(
        tmp_path,
        BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "50,GPT-4,0,0,0,Conversation log\n118,GPT-4,417,276,693,API log\n",
    )
    left_out = ReadNotes()
    with caplog.at_level(logging.INFO, "autoscaler"):
        assert list(read(path, left_out)) == [Request(0.0, 472, 18, -1), Request(113.0, 417, 276, -1)]
    assert left_out.failed == 2
    assert caplog.messages == [f"{path}: 2 requests that failed there are left out"]


def test_burstgpt_of_2025_has_sessions_by_name_in_conversations_only(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        BURSTGPT_2 + "19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log\n"
        "19440161.0,d5983bf9-4b48,2,ChatGPT,36,29,65,Conversation log\n"
        "19440192.0,1722ac82-0a46,9,GPT-4,1400,30,1430,Conversation log\n"
        "19440192.0,,9,GPT-4,7,3,10,API log\n",
    )
    one, other, one_again, none = read(path)
    assert [r.at_s for r in (one, other, one_again, none)] == [0.0, 51.0, 82.0, 82.0]
    assert one.session == one_again.session != other.session
    assert min(one.session, other.session) > 10**12 > none.session == -1


def test_mooncake_spreads_its_ticks_and_knows_who_shares_a_prefix(tmp_path: Path) -> None:
    path = file(tmp_path, mooncake((0, 6758, [0, 1]), (0, 7322, [7, 8]), (3000, 1, [0, 9]), (3000, 2, [])))
    a, b, c, d = read(path)
    assert [r.prompt_tokens for r in (a, b, c, d)] == [6758, 7322, 1, 2]
    assert 0.0 == a.at_s < b.at_s < c.at_s < d.at_s < 6.0
    assert [r.session for r in (a, b, c, d)] == [0, 7, 0, -1]
    assert list(read(path)) == [a, b, c, d]


def test_ticks_that_are_a_little_short_do_not_put_anybody_before_an_earlier_one(tmp_path: Path) -> None:
    """As published they are 2.999 to 3.001 s apart; with as many in each, a whole tick would cross."""
    path = file(tmp_path, mooncake(*((n * 2999, 1 + n, [n]) for n in range(40) for _ in range(100))))
    found = list(read(path))
    assert [r.prompt_tokens for r in found] == [1 + n for n in range(40) for _ in range(100)]
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(found))
    assert len({r.at_s for r in found}) == 4000
    # Uniformly: as many in the first half of the ticks as in the second.
    assert sum((r.at_s + 0.015) % 2.999 < 1.4995 for r in found) == pytest.approx(2000, abs=150)


def test_a_mooncake_log_with_times_to_the_millisecond_stays_as_it_is(tmp_path: Path) -> None:
    """Its synthetic_trace is such a one."""
    path = file(tmp_path, mooncake((40, 1, [1]), (277, 2, [2]), (3040, 3, [3]), (9040, 4, [4])))
    assert [r.at_s for r in read(path)] == pytest.approx([0.0, 0.237, 3.0, 9.0])


def test_gzip_is_known_by_its_bytes_whatever_the_name(tmp_path: Path) -> None:
    packed = gzip.compress((COMPACT + "0,1,1\n").encode()) + gzip.compress(b"1,2,2\n")  # as cat makes it
    for name in ("log", "log.csv", "log.gz"):
        assert list(read(file(tmp_path, packed, name))) == [Request(0.0, 1, 1, -1), Request(1.0, 2, 2, -1)]
    assert list(read(file(tmp_path, COMPACT + "0,1,1\n", "log.gz"))) == [Request(0.0, 1, 1, -1)]


def test_what_comes_before_a_mistake_is_given_first(tmp_path: Path) -> None:
    for bad in (b"2,x,1\n", b"2,\xff,1\n"):
        requests = read(file(tmp_path, (COMPACT + "0,1,1\n1,1,1\n").encode() + bad))
        assert [next(requests), next(requests)] == [Request(0.0, 1, 1, -1), Request(1.0, 1, 1, -1)]
        with pytest.raises(ConfigError, match="line 4: "):
            next(requests)


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    for _ in read(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_length_of_a_log(tmp_path: Path) -> None:
    def log(rows: int) -> Path:
        text = "".join(f"{n},a-{n},1,GPT-4,900,100,1000,Conversation log\n" for n in range(rows))
        return file(tmp_path, gzip.compress((BURSTGPT_2 + text).encode(), 1))

    assert peak_bytes(log(30_000)) < peak_bytes(log(6_000)) + 100_000


# -- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "line 1: the column output_tokens is missing"),
        ("TIMESTAMP,ContextTokens\n0,1\n", "line 1: the column GeneratedTokens is missing"),
        (BURSTGPT.replace("Timestamp", "When") + "5,a,1,1,2,x\n", "line 1: the column Timestamp is missing"),
        ("0,1,1\n1,1,1\n", "line 1: wanted the header arrival_s,prompt_tokens,output_tokens or that of Az"),
        ("\n" + COMPACT + "0,1,1\n", "line 1: wanted the header"),
        (COMPACT + "0,1,1\nx,1,1\n", "line 3: arrival_s: wanted seconds, got 'x'"),
        (COMPACT + "nan,1,1\n", "line 2: arrival_s: wanted seconds, got 'nan'"),
        (COMPACT + "0,1,1\ninf,1,1\n", "line 3: arrival_s: wanted seconds, got 'inf'"),
        (COMPACT + "1_0,1,1\n", "line 2: arrival_s: wanted seconds, got '1_0'"),
        (COMPACT + "1700000000000,1,1\n", "line 2: arrival_s: wanted at most 1e+12 s, got 1.7e+12"),
        (COMPACT + "0,1.5,1\n", "line 2: prompt_tokens: wanted a whole number of tokens, got '1.5'"),
        (COMPACT + "0,1_0,1\n", "line 2: prompt_tokens: wanted a whole number of tokens, got '1_0'"),
        (COMPACT + "0,,1\n", "line 2: prompt_tokens: wanted a whole number of tokens, got ''"),
        (COMPACT + "0,1,many\n", "line 2: output_tokens: wanted a whole number of tokens, got 'many'"),
        (COMPACT + "0,0,1\n", "line 2: prompt_tokens: wanted 1 to 10,000,000 tokens, got 0"),
        (COMPACT + "0,1,0\n", "line 2: output_tokens: wanted 1 to 10,000,000 tokens, got 0"),
        (COMPACT + "0,1,-3\n", "line 2: output_tokens: wanted 1 to 10,000,000 tokens, got -3"),
        (COMPACT + "0,1,10000001\n", "line 2: output_tokens: wanted 1 to 10,000,000 tokens, got 10000001"),
        (COMPACT + "0,1,1\n\n5,1,1\n4,1,1\n", "line 5: arrival_s: its time is 1 s before that of the row"),
        (COMPACT + "0,1,1\n5e9,1,1\n", "line 3: arrival_s: its time is over 1e+09 s after the first"),
        (COMPACT + "0,1\n", "line 2: wanted 3 columns, got 2"),
        (COMPACT + "0,1,1,1\n", "line 2: wanted 3 columns, got 4"),
        (COMPACT + '0,"1,1\n1,1,1\n', "line 2: wanted 3 columns, got a quote that is not closed"),
        (COMPACT, "line 1: there are no requests in it"),
        (COMPACT + "\n\n", "there are no requests in it"),
        ("", "line 1: there are no requests in it"),
        (gzip.compress(b"", mtime=0), "line 1: there are no requests in it"),
        (b"\xff\xfe\x00", "line 1: wanted UTF-8 text, got the byte 0xff"),
        ((COMPACT + "0,1,1\n" * 40_000).encode() + b"0,\xe9,1\n", "line 40002: wanted UTF-8 text"),
        (COMPACT + "0," + "1" * 2_000_000, "line 2: wanted a line of at most 1,048,576 bytes, it is longer"),
        (AZURE + "yesterday,1,1\n", "line 2: TIMESTAMP: wanted a date and time, got 'yesterday'"),
        (AZURE + "2023-11-16 18:15:46,0,1\n", "line 2: ContextTokens: wanted 1 to 10,000,000 tokens, got 0"),
        (BURSTGPT + "5,a,-1,0,0,x\n", "line 2: Request tokens: wanted 1 to 10,000,000 tokens, got -1"),
        (BURSTGPT + "x,a,0,0,0,x\n", "line 2: Timestamp: wanted seconds, got 'x'"),
        (BURSTGPT + "5,a,1,0,1,x\n" * 3, "line 4: there are no requests in it: 3 failed where it was made"),
        ('{"timestamp": 0, "input_length": 5}\n', "line 1: output_length is missing"),
        (
            '{"timestamp": "a", "input_length": 5, "output_length": 1}\n',
            "line 1: timestamp: wanted a time, got",
        ),
        (
            '{"timestamp": NaN, "input_length": 5, "output_length": 1}\n',
            "line 1: timestamp: wanted a time, got",
        ),
        (
            f'{{"timestamp": 1{"0" * 400}, "input_length": 5, "output_length": 1}}',
            "line 1: timestamp: wanted",
        ),
        ('{"timestamp": 0, "input_length": 5.5, "output_length": 1}\n', "line 1: input_length: wanted a who"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1}\n', "line 1: input_length: wanted a wh"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 0}\n', "line 1: output_length: wanted 1 to"),
        (mooncake((0, 1, [])) + "[]\n", "line 2: wanted a JSON object, got '[]'"),
        ('{"a":' + "[" * 100_000, "line 1: wanted a JSON object"),
        (mooncake((9, 1, []), (5, 1, [])), "line 2: timestamp: its time is 4 s before that of the row"),
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
    assert len(str(refused.value)) < len(str(path)) + 200


def test_a_gzip_cut_short_gives_what_can_be_unpacked_and_names_the_line_after_it(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n % 97 + 1},{n % 89 + 1}\n" for n in range(5000))
    packed = gzip.compress((COMPACT + rows).encode())
    for kept in (packed[:-1], packed[:-9], packed[: len(packed) // 2]):
        counted = itertools.count()
        with pytest.raises(ConfigError, match="the gzip is cut short or damaged") as refused:
            list(zip(read(file(tmp_path, kept)), counted, strict=False))
        got = next(counted)
        assert f"line {got + 2}:" in str(refused.value)  # the header, and the line that is cut
        assert got > 0.8 * 5000 * len(kept) / len(packed)


def test_a_gzip_whose_checksum_is_wrong_is_damaged(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress((COMPACT + "0,1,1\n").encode()))
    packed[-5] ^= 1
    with pytest.raises(ConfigError, match="line 3: the gzip is cut short or damaged"):
        list(read(file(tmp_path, bytes(packed))))


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ConfigError, match=f"^{path}: cannot be read: "):
            list(read(path))


# -- repeats ---------------------------------------------------------------------------------------------


def bursty(seconds: int, seed: int = 1) -> list[Request]:
    """Quiet, and for one minute of ten with many; each a session of its own."""
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


def in_order(requests: list[Request]) -> bool:
    return requests[0].at_s >= 0.0 and all(a.at_s <= b.at_s for a, b in itertools.pairwise(requests))


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5, 10.0])
def test_scaling_keeps_totals_order_and_bursts(factor: float) -> None:
    log = bursty(20_000)
    found = list(scaled(log, factor, 5.0, random.Random(2)))
    assert len(found) == pytest.approx(factor * len(log), rel=0.05)
    assert in_order(found)
    assert len({r.session for r in found}) == len(found)
    if factor >= 1.0:
        # Each minute's count is multiplied: the variance by the square. A Poisson process has 1 at any rate.
        assert dispersion(found) == pytest.approx(factor * dispersion(log), rel=0.15)
        assert set(log) <= set(found)  # the first copy stays as it was
    else:
        assert set(found) < set(log)


def test_twice_itself_is_the_log_again_moved_by_no_more_than_the_jitter() -> None:
    log = [Request(100.0 * n, n + 1, 1, n) for n in range(200)]
    found = list(scaled(log, 2.0, 5.0, random.Random(1)))
    pairs = itertools.groupby(sorted(found, key=lambda r: r.prompt_tokens), key=lambda r: r.prompt_tokens)
    moved = [r.at_s - log[n - 1].at_s for n, two in pairs for r in two if r not in log]
    assert len(moved) == 200
    assert -5.0 <= min(moved) < -3.0
    assert 3.0 < max(moved) <= 5.0


def test_copies_at_the_begin_are_neither_before_0_nor_heaped_there() -> None:
    log = [Request(n / 10, 1, 1, -1) for n in range(1000)]
    counts = Counter(int(r.at_s) for r in scaled(log, 10.0, 5.0, random.Random(1)))
    assert counts[0] == pytest.approx(100, abs=35)
    assert sum(r.at_s == 0.0 for r in scaled(log, 10.0, 5.0, random.Random(1))) == 1


def test_a_factor_of_1_is_the_log_and_the_same_seed_the_same_repeats() -> None:
    log = bursty(2000)
    assert list(scaled(log, 1.0, 5.0, random.Random(1))) == log
    assert list(scaled(log, 0.0, 5.0, random.Random(1))) == []
    one, same, other = (list(scaled(log, 2.5, 5.0, random.Random(seed))) for seed in (1, 1, 2))
    assert one == same != other


def test_the_requests_of_a_session_stay_together_in_each_copy() -> None:
    log = [Request(float(n), 1, 1, n % 3) for n in range(300)]
    sizes = Counter(r.session for r in scaled(log, 4.0, 5.0, random.Random(1)))
    assert sorted(sizes.values()) == [100] * 12
    none = [Request(float(n), 1, 1, -1) for n in range(10)]
    assert {r.session for r in scaled(none, 4.0, 5.0, random.Random(1))} == {-1}


def test_repeats_of_repeats_are_sessions_of_their_own() -> None:
    log = [Request(float(n), 1, 1, n) for n in range(50)]
    rng = random.Random(1)
    assert len({r.session for r in scaled(scaled(log, 3.0, 5.0, rng), 3.0, 5.0, rng)}) == 450


def test_scaling_and_tiling_take_no_more_than_they_need() -> None:
    def endless() -> Iterator[Request]:
        return (Request(n / 2, 1, 1, -1) for n in itertools.count())

    rng = random.Random(1)
    assert len(list(itertools.islice(scaled(endless(), 3.0, 5.0, rng), 1000))) == 1000
    assert len(list(itertools.islice(spread_ticks(endless(), 0.5, rng), 1000))) == 1000
    factors = logs.HOUR_FACTORS["burstgpt"]
    assert len(list(itertools.islice(tiled(endless, 1e6, factors, rng), 1000))) == 1000


@pytest.mark.parametrize(
    ("factor", "jitter_s"), [(-0.5, 5.0), (float("nan"), 5.0), (float("inf"), 5.0), (2.0, -1.0)]
)
def test_a_factor_or_jitter_that_is_none_is_refused_before_anything_is_read(
    factor: float, jitter_s: float
) -> None:
    with pytest.raises(ValueError, match="wanted 0 or more"):
        scaled([], factor, jitter_s, random.Random(1))


# -- tiles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", logs.HOUR_FACTORS.values(), ids=logs.HOUR_FACTORS)
def test_the_published_profiles_are_24_hours_with_a_mean_of_1(factors: tuple[float, ...]) -> None:
    assert len(factors) == 24
    assert sum(factors) / 24 == pytest.approx(1.0, abs=0.002)


def hour_of_requests(path: Path) -> Path:
    rng = random.Random(1)
    times = sorted(rng.uniform(0.0, 3000.0) for _ in range(1500))
    rows = "".join(f"{at:.3f},10,10,{n // 10}\n" for n, at in enumerate(times))
    path.write_text("arrival_s,prompt_tokens,output_tokens,session\n" + rows)
    return path


def test_tiles_follow_the_daily_profile_and_end_with_the_last_day(tmp_path: Path) -> None:
    path = hour_of_requests(tmp_path / "log.csv")
    factors = logs.HOUR_FACTORS["burstgpt"]
    found = list(tiled(path, 2.0, factors, random.Random(3)))
    assert in_order(found)
    assert 2 * 86_400 - 60.0 < found[-1].at_s < 2 * 86_400
    by_hour = Counter(int(r.at_s // 3600) % 24 for r in found)
    mean = sum(by_hour.values()) / 24
    for hour, factor in enumerate(factors):
        assert by_hour[hour] / mean == pytest.approx(factor, abs=0.12)
    assert max(Counter(r.session for r in found).values()) <= 10  # no tile or copy goes on with a session
    assert found == list(tiled(lambda: read(path), 2.0, factors, random.Random(3)))


def test_a_copy_is_not_moved_beyond_the_end() -> None:
    log = [Request(n / 10, 1, 1, -1) for n in range(1000)]
    found = list(tiled(lambda: log, 0.05, [0.5, 1.5] * 12, random.Random(1)))
    assert 0.05 * 86_400 - 1.0 < found[-1].at_s < 0.05 * 86_400


def test_what_cannot_be_tiled_is_said() -> None:
    factors = logs.HOUR_FACTORS["burstgpt"]
    one = [Request(0.0, 1, 1, -1)]
    for log in ([], one, one * 3):
        with pytest.raises(ConfigError, match="cannot be tiled"):
            list(tiled(lambda log=log: log, 1.0, factors, random.Random(3)))  # type: ignore[misc]
    for wrong in (factors[:23], [2.0] * 24, [-1.0, 3.0] * 12):
        with pytest.raises(ValueError, match="hour_factors: wanted"):
            tiled(lambda: one, 1.0, wrong, random.Random(3))
    with pytest.raises(ValueError, match="days: wanted"):
        tiled(lambda: one, 0.0, factors, random.Random(3))


# -- ticks and bins --------------------------------------------------------------------------------------


def test_rounded_times_are_spread_within_their_tick_or_up_to_the_next_moment() -> None:
    log = [Request(3.0 * (n // 5), n + 1, 1, n) for n in range(500)]
    found = list(spread_ticks(log, 3.0, random.Random(1)))
    assert [r._replace(at_s=0.0) for r in found] == [r._replace(at_s=0.0) for r in log]
    assert all(0.0 <= b.at_s - a.at_s < 3.0 for a, b in zip(log, found, strict=True))
    assert len({r.at_s for r in found}) == 500
    assert in_order(list(spread_ticks(log, 100.0, random.Random(1))))
    assert list(spread_ticks([], 3.0, random.Random(1))) == []


def test_it_is_known_how_much_of_a_log_was_read_unless_it_is_read_as_a_whole(tmp_path: Path) -> None:
    notes = ReadNotes()
    rows = read(file(tmp_path, COMPACT + "".join(f"{n},100,20\n" for n in range(40_000))), notes)
    shares = [notes.read_share for n, _ in enumerate(rows) if n % 10_000 == 0]
    assert shares == sorted(shares, key=lambda share: share or 0.0)
    assert shares[0] is not None
    assert 0.0 < shares[0] < 0.5
    assert notes.read_share == 1.0
    document = json.dumps([{"timestamp": 1000 * n, "input_length": 5, "output_length": 5} for n in range(9)])
    next(read(file(tmp_path, document, "log.json"), notes))
    assert notes.read_share is None
