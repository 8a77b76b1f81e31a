"""Logs as others write them are read, what was assumed is said, and a refusal names its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from process.errors import ConfigError
from simulation.traces.reading import read
from simulation.traces.request import ReadNotes, Request
from simulation.traces.time_units import recognise

Found = tuple[list[float], list[tuple[int, int]], list[int], list[str]]


def found(tmp_path: Path, text: str | bytes, unit: str = "auto", name: str = "log") -> Found:
    """(times, lengths, sessions numbered from 0 in the order they come, notes) of a log."""
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    notes = ReadNotes()
    requests = list(read(path, notes, unit))
    numbers: dict[int, int] = {-1: -1}
    sessions = [numbers.setdefault(r.session, len(numbers) - 1) for r in requests]
    return [r.at_s for r in requests], [r[1:3] for r in requests], sessions, notes.lines


def refusal(tmp_path: Path, text: str, name: str = "log") -> str:
    with pytest.raises(ConfigError) as refused:
        found(tmp_path, text, name=name)
    return str(refused.value).removeprefix(f"{tmp_path / name}: ")


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(at: float, **more: Any) -> dict[str, Any]:
    return {"timestamp": at, "input_length": 100, "output_length": 10, **more}


# -- the unit of times ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([0.0, 1.5, 3.25], "s"),
        ([61.114, 61.2], "s"),
        ([0, 0, 1, 1, 2, 4], "s"),
        ([0, 3000, 6000], "ms"),
        ([27_482, 30_535], "ms"),
        ([0], "ms"),
        ([0, 350_000, 910_000], "us"),
        ([0, 350_000_000, 910_000_000], "ns"),
        ([1_700_000_000, 1_700_000_001], "s"),
        ([1_700_000_000.25, 1_700_000_001.5], "s"),
        ([1_700_000_000_000, 1_700_000_000_001], "ms"),
        ([1_700_000_000_000_000], "us"),
        ([1_700_000_000_000_000_000], "ns"),
    ],
)
def test_the_unit_of_json_lines_is_recognised(times: list[float], unit: str) -> None:
    assert recognise(times, default="ms")[0] == unit


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([0, 1, 2], "s"),
        ([0, 100, 200], "s"),
        ([0, 350_000, 700_000], "us"),
        ([0, 3000, 9000], "ms"),
        ([0], "s"),
    ],
)
def test_the_unit_of_tables_is_recognised(times: list[float], unit: str) -> None:
    assert recognise(times, default="s")[0] == unit


def test_seconds_in_json_lines_are_no_milliseconds_and_it_is_said(tmp_path: Path) -> None:
    """They were read as a trace a thousand times as dense, without a word."""
    at, _, _, notes = found(tmp_path, lines(*(row(n * 0.5 + 0.25) for n in range(100))))
    assert at[-1] == pytest.approx(49.5)
    assert notes == ["timestamp is taken as seconds: they have fractions (--time-unit)"]
    at, _, _, notes = found(tmp_path, lines(*(row(n // 2) for n in range(100))))
    assert 49.0 <= at[-1] < 52.0
    assert "as milliseconds they would be 2,020 requests a second" in notes[0]


@pytest.mark.parametrize(("unit", "end"), [("s", 9000.0), ("ms", 9.0), ("us", 0.009), ("ns", 9e-6)])
def test_the_unit_that_is_told_goes_before_what_is_recognised(tmp_path: Path, unit: str, end: float) -> None:
    at, _, _, notes = found(tmp_path, lines(row(0), row(9000)), unit)
    assert at[-1] == pytest.approx(end)
    assert "as --time-unit says" in notes[0]
    at, *_ = found(tmp_path, "timestamp,input_tokens,output_tokens\n0,1,1\n9000,1,1\n", unit)
    assert at[-1] == pytest.approx(end)


def test_a_name_that_says_its_unit_needs_no_note(tmp_path: Path) -> None:
    for name, end in (
        ("arrival_ms", 9.0),
        ("timestamp_s", 9000.0),
        ("start_ns", None),
        ("arrival_time_ms", None),
    ):
        if end is not None:
            at, _, _, notes = found(tmp_path, f"{name},prompt_tokens,output_tokens\n0,1,1\n9000,1,1\n")
            assert (at[-1], notes) == (end, [])
    at, *_ = found(
        tmp_path, lines({"arrival_ms": 0, "isl": 1, "osl": 2}, {"arrival_ms": 2.5, "isl": 1, "osl": 2})
    )
    assert at == pytest.approx([0.0, 0.0025])


# -- published and written by tools --------------------------------------------------------------------


def test_qwen_bailian_has_seconds_and_chats_that_go_on(tmp_path: Path) -> None:
    def chat(id: int, parent: int, at: float, turn: int) -> dict[str, Any]:
        return row(at, chat_id=id, parent_chat_id=parent, type="text", turn=turn, hash_ids=[1, 2])

    log = lines(chat(159, -1, 61, 1), chat(160, -1, 62, 1), chat(165, 159, 90, 2), chat(170, 165, 120, 3))
    at, _, sessions, notes = found(tmp_path, log)
    assert at == pytest.approx([0.0, 1.0, 29.0, 59.0])
    assert sessions == [0, 1, 0, 0]
    assert "seconds: each row has a chat_id or a turn" in notes[0]


def test_the_four_files_of_mooncake(tmp_path: Path) -> None:
    """Older trace and conversation with ticks, tool agents, and times to the millisecond."""
    ticks = lines(row(0, hash_ids=[0, 1]), row(0, hash_ids=[0, 7]), row(3000, hash_ids=[]))
    at = found(tmp_path, ticks)[0]
    assert 0.0 == at[0] < at[1] < at[2] <= 3.0
    exact = lines(row(0, hash_ids=[46]), row(277, hash_ids=[46]), row(3040.0, hash_ids=[9]))
    at, lengths, sessions, _ = found(tmp_path, exact)
    assert at == pytest.approx([0.0, 0.277, 3.04])
    assert (lengths, sessions) == ([(100, 10)] * 3, [0, 0, 1])


def test_azure_of_2024_and_with_more_columns(tmp_path: Path) -> None:
    log = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.5+00:00,1,2162,5\n"
    assert found(tmp_path, log + "2024-10-15 00:00:01+00:00,0,9,6\n")[:2] == ([0.0, 0.5], [(2162, 5), (9, 6)])


def test_what_pandas_writes(tmp_path: Path) -> None:
    """An index without a name, floats since one value was missing, other headers, rows 1 ms out of order."""
    log = ",timestamp,input_tokens,output_tokens,session_id\n0,5.001,472.0,18.0,a\n1,5.0,10.0,2.0,b\n"
    log += "2,9.5,1.0,1.0,a\n"
    at, lengths, sessions, notes = found(tmp_path, log)
    assert at == pytest.approx([0.0, 0.001, 4.5])
    assert lengths == [(10, 2), (472, 18), (1, 1)]
    assert sessions == [0, 1, 1]
    assert notes == [
        "timestamp is taken as seconds: they have fractions (--time-unit)",
        "1 rows stood a little too early or late and are put in order",
    ]
    records = json.dumps([row(5.0), row(4.0), row(7.5)], indent=2)
    assert found(tmp_path, records)[0] == [0.0, 1.0, 3.5]


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_other_separators(tmp_path: Path, separator: str) -> None:
    log = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,7,2\n1.25,8,3\n".replace(",", separator)
    assert found(tmp_path, log)[:2] == ([0.0, 0.75], [(7, 2), (8, 3)])


def test_aiperf_sessions_with_delays(tmp_path: Path) -> None:
    log = lines(
        {"session_id": "a", "timestamp": 1000, "input_length": 10, "output_length": 5},
        {"session_id": "a", "delay": 5000, "input_length": 20, "output_length": 5},
        {"session_id": "b", "timestamp": 2000, "input_length": 30, "output_length": 5},
        {"session_id": "b", "delay": 1000.5, "input_length": 40, "output_length": 5},
    )
    at, lengths, sessions, notes = found(tmp_path, log)
    assert at == pytest.approx([0.0, 1.0, 2.0005, 5.0])
    assert [prompt for prompt, _ in lengths] == [10, 30, 40, 20]
    assert sessions == [0, 1, 1, 0]
    assert any("delays count from" in note for note in notes)
    lost = lines({"session_id": "c", "delay": 5, "input_length": 1, "output_length": 1})
    assert refusal(tmp_path, lost).startswith("line 1: timestamp is missing: the first row of a session")


def test_texts_count_by_their_length(tmp_path: Path) -> None:
    log = lines({"timestamp": 0, "text_input": "x" * 400, "output_length": 5})
    _, lengths, _, notes = found(tmp_path, log)
    assert lengths == [(100, 5)]
    assert "tokens of text_input are counted by its text, one for 4 bytes" in notes


def record(at_ns: int, prompt: int, output: int, error: object = None, **metadata: Any) -> dict[str, Any]:
    metrics = {
        "input_sequence_length": {"value": prompt, "unit": "tokens"},
        "output_sequence_length": {"value": float(output), "unit": "tokens"},
    }
    told = {"request_start_ns": at_ns, "was_cancelled": False, "conversation_id": "s1", **metadata}
    return {"metadata": told, "metrics": metrics, "error": error}


def test_records_of_aiperf(tmp_path: Path) -> None:
    """In the order in which they ended; those that failed are left out and counted."""
    base = 1_759_000_000_000_000_000
    log = lines(
        record(base + 5_000_000_000, 550, 60),
        record(base, 500, 700),
        record(base + 1, 1, 1, error={"code": 500}),
        record(base + 2, 1, 1, was_cancelled=True),
    )
    at, lengths, sessions, notes = found(tmp_path, log)
    assert at == pytest.approx([0.0, 5.0], abs=1e-5)
    assert (lengths, sessions) == ([(500, 700), (550, 60)], [0, 0])
    assert notes == ["2 requests that failed there are left out"]
    broken = lines(record(base, 1, 1) | {"metrics": {}})
    assert refusal(tmp_path, broken) == "line 1: metrics.input_sequence_length.value is missing"


def guidellm(*successful: dict[str, Any]) -> dict[str, Any]:
    groups = {"successful": list(successful), "incomplete": [{}], "errored": []}
    return {"metadata": {"version": 1}, "args": {}, "benchmarks": [{"requests": groups}]}


@pytest.mark.parametrize("indent", [None, 2])
def test_reports_of_guidellm(tmp_path: Path, indent: int | None) -> None:
    older = {"start_time": 1745e6 + 3.5, "prompt_tokens": 128, "output_tokens": 64}
    newer = {
        "info": {"timings": {"request_start": 1745e6}},
        "input_metrics": {"text_tokens": 256},
        "output_metrics": {"text_tokens": 32},
    }
    at, lengths, _, notes = found(tmp_path, json.dumps(guidellm(older, newer), indent=indent))
    assert (at, lengths) == ([0.0, 3.5], [(256, 32), (128, 64)])
    assert "1 requests that failed there are left out" in notes
    broken = json.dumps(guidellm(older, {"start_time": 1745e6, "prompt_tokens": 1}))
    assert (
        refusal(tmp_path, broken) == "line 1: benchmarks[0].requests.successful[1]: output_length is missing"
    )
    assert refusal(tmp_path, '{\n"a": 1\n}').startswith("line 1: benchmarks is missing")


TALK = [{"from": "human", "value": "q" * 40}, {"from": "gpt", "value": "a" * 80}]


def test_conversations_like_sharegpt_with_times(tmp_path: Path) -> None:
    """Each answer is a request whose prompt is all that was said before it."""
    two = {"id": "x", "conversations": TALK * 2, "timestamp": "2023-04-09 00:00:00+00:00"}
    one = {"id": "y", "conversations": TALK, "timestamp": "2023-04-09 00:00:10+00:00"}
    for text in (json.dumps([two, one]), lines(two, one)):
        at, lengths, sessions, notes = found(tmp_path, text)
        assert at == [0.0, 10.0, 60.0]
        assert lengths == [(10, 20), (10, 20), (40, 20)]
        assert sessions == [0, 1, 0]
        assert "turns without a time come 60 s after the one before" in notes
    other = {
        "conversation_id": "z",
        "conversation": [
            {"role": "system", "content": "s" * 4},
            {"role": "user", "content": "q" * 40, "timestamp": 1682352382.0},
            {"role": "assistant", "content": "a" * 80, "timestamp": 1682352390.0},
            {"role": "user", "content": [{"type": "text", "text": "q" * 40}], "timestamp": 1682352400.0},
            {"role": "assistant", "content": "a" * 80},
        ],
    }
    at, lengths, *_ = found(tmp_path, lines(other))
    assert (at, lengths) == ([0.0, 18.0], [(11, 20), (41, 20)])


# -- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            lines(row(0), row(1000) | {"input_length": "x"}),
            "line 2: input_length: wanted a whole number of tok",
        ),
        (lines(row(0), {"timestamp": 5, "text_input": "abc"}), "line 2: output_length is missing"),
        (
            lines(row(0.5), row(9.5), row(4.5)),
            "line 3: timestamp: its time is 5 s before that of the row bef",
        ),
        (lines({"id": 1, "conversations": TALK}), "line 1: timestamp is missing: of the conversation, or of"),
        (
            lines(row(0), {"timestamp": "noon", "isl": 1, "osl": 1}),
            "line 2: timestamp: wanted a time, got 'noon'",
        ),
        (json.dumps([row(0), 7]), "line 1: wanted a JSON object, got 7"),
        (
            "[\n" + json.dumps(row(0)) + ",\n" + json.dumps(row(1) | {"output_length": -1}) + "]",
            "line 3: output_l",
        ),
        ("[\n" + json.dumps(row(0)) + ",\n{x", "line 3: wanted a JSON object, got '{x'"),
        ("[]", "line 1: there are no requests in it"),
        (
            "timestamp,input_tokens,output_tokens\n0,nan,1\n",
            "line 2: input_tokens: wanted a whole number of tok",
        ),
        (
            "timestamp,input_tokens,output_tokens\n0,1.5,1\n",
            "line 2: input_tokens: wanted a whole number of tok",
        ),
        (
            "timestamp,input_tokens,output_tokens\n0,,1\n",
            "line 2: input_tokens: wanted a whole number of tokens",
        ),
        ("timestamp,input_tokens,output_tokens\n0,1,1\n1,1\n", "line 3: wanted 3 columns, got 2"),
        (
            "timestamp,input_tokens\n0,1\n",
            "line 1: the column output_tokens is missing; there are timestamp, inp",
        ),
        (
            "arrival_s,prompt_tokens,output_tokens\n9,1,1\n8.4,1,1\n",
            "line 3: arrival_s: its time is 0.6 s bef",
        ),
        ("date,input_tokens,output_tokens\nsoon,1,1\n", "line 2: date: wanted a date and time, got 'soon'"),
    ],
)
def test_a_refusal_names_the_line_and_the_reason(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


def test_a_document_may_be_packed(tmp_path: Path) -> None:
    assert found(tmp_path, gzip.compress(json.dumps([row(0), row(3000)]).encode()))[0] == [0.0, 3.0]


def test_rows_before_a_mistake_are_given_first(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(lines(row(0), row(3000)) + "{\n")
    requests = read(path)
    assert [next(requests)] == [Request(0.0, 100, 10, -1)]
    with pytest.raises(ConfigError, match="line 3: wanted a JSON object"):
        list(requests)


def test_a_log_that_is_read_again_says_it_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(lines(row(0.25), row(1.5)))
    notes = ReadNotes()
    first, second = list(read(path, notes)), list(read(path, notes))
    assert first == second
    assert len(notes.lines) == 1
