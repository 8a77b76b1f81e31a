"""The report: figures by hand, the keys that others rely on, and a table that fits a terminal."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fleet.history import NAMES
from simulation import report_table
from simulation.outcomes_over_time import MOST_SHOWN, OutcomesOverTime
from simulation.report import COMPLETED, FAILURES, Record, RunCosts, RunInfo, Sample, build
from simulation.report_table import WIDTH, chart, table
from web.messages.decoding import BadField, decode

COSTS: dict[str, Any] = {
    "usd": {
        "total": 0.5,
        "hot_working": 0.3,
        "hot_idle": 0.1,
        "loading": 0.06,
        "stopped": 0.04,
        "lost": 0.0,
        "traffic": 0.0,
    },
    "usd_if_all_hot": 1.5,
    "utilisation": 0.75,
    "starts": 2,
    "stops": 1,
    "creates": 3,
    "destroys": 0,
    "order_to_hot_s": [10.0, 30.0],
}
RECORDS = [
    Record(0.0, 0.001, COMPLETED, 0.01, 0.5, 2.5, 100, 21, leases=1),
    Record(
        1.0,
        0.003,
        COMPLETED,
        0.03,
        1.5,
        3.5,
        300,
        11,
        leases=2,
        setbacks=Counter(broken_off=1),
        refusals=Counter(all_busy=2),
    ),
    Record(2.0, 0.002, "timeout", 0.02, None, 120.0, leases=1),
]
SAMPLES = [
    Sample(0.0, {"hot": 1, "cold": 2}, 0.5, 0.3),
    Sample(1.0, {"hot": 1, "starting": 1, "cold": 1}, 0.9, 1.7),
    Sample(2.0, {"hot": 2, "cold": 1}, 0.9, 1.2),
]


def costs_of(said: dict[str, Any]) -> RunCosts:
    return decode(json.dumps(said).encode(), RunCosts)


def run(**other: Any) -> RunInfo:
    given: dict[str, Any] = {
        "engine": "local cloud, paced engine",
        "local": True,
        "model": "vllm-13",
        "seed": 7,
        "streaming": True,
        "started_at": 1000.0,
        "duration_s": 10.0,
        "interrupted": False,
        "settings": {"rounds": 10},
        "cpu_share": 0.02,
        "ends_untold": 0,
    }
    return RunInfo(**{**given, **other})


def whole(**other: Any) -> dict[str, Any]:
    return build(run(**other), RECORDS, SAMPLES, costs_of(COSTS))


def test_requests_are_counted_by_what_became_of_them() -> None:
    assert whole()["requests"] == {
        "sent": 3,
        "completed": 2,
        "failed": 1,
        "retried": 1,
        "failed_by_kind": {"timeout": 1},
        "setbacks_by_kind": {"broken_off": 1},
        "route_refusals_by_kind": {"all_busy": 2},
    }


def test_tokens_and_latencies_are_of_completed_requests() -> None:
    found = whole()
    assert found["tokens"] == {"prompt": 400, "output": 32}
    # One of three kept the objective: the second was slow, the third failed.
    assert found["throughput"] == {
        "requests_s": 0.2,
        "output_tokens_s": 3.2,
        "total_tokens_s": pytest.approx(43.2),
        "goodput_requests_s": 0.1,
    }
    means = {name: found["latency_s"][name]["mean"] for name in ("route", "ttft", "tpot", "e2e")}
    # per output token: (2.5 - 0.5) / 20 = 0.1 and (3.5 - 1.5) / 10 = 0.2
    assert means == pytest.approx({"route": 0.02, "ttft": 1.0, "tpot": 0.15, "e2e": 3.0})


def test_each_figure_is_named_as_by_vllm_bench_and_defined_in_one_line() -> None:
    text = table(whole())
    for name in ("TTFT", "TPOT", "ITL", "E2EL", "goodput", "std"):
        lines = [line for line in text.splitlines() if line.startswith(f"{name:20}")]
        assert len(lines) == 1, name
        assert not lines[0].endswith("…"), name
    assert "TTFT first token          1.000     0.5000" in text


def test_dollars_are_per_completed_request_and_per_token_given() -> None:
    found = whole()
    assert found["cost_usd"] == {**COSTS["usd"], "if_all_hot": 1.5}
    assert found["cost"] == {
        "usd_per_1k_requests": pytest.approx(250.0),
        "usd_per_1m_output_tokens": pytest.approx(15_625.0),
        "utilisation": 0.75,
        "why_unknown": None,
    }


def test_scaling_has_counts_times_and_states_over_time() -> None:
    scaling = whole()["scaling"]
    assert {k: scaling[k] for k in ("starts", "stops", "creates", "destroys", "most_hot")} == {
        "starts": 2,
        "stops": 1,
        "creates": 3,
        "destroys": 0,
        "most_hot": 2,
    }
    assert (scaling["order_to_hot_s"]["count"], scaling["order_to_hot_s"]["mean"]) == (2, 20.0)
    assert scaling["over_time"][1] == {
        "at_s": 1.0,
        "usd_h": 0.9,
        "demand": 1.7,
        "instances": {"hot": 1, "starting": 1, "cold": 1},
    }


@pytest.mark.parametrize("costs", [COSTS, None], ids=["costs known", "costs unknown"])
def test_the_keys_that_others_rely_on_are_there(costs: dict[str, Any] | None) -> None:
    known = costs_of(costs) if costs else None
    found = json.loads(json.dumps(build(run(), RECORDS, SAMPLES, known, "not there")))
    spread_keys = {"mean", "std", "p50", "p90", "p95", "p99", "max"}
    wanted = {
        "requests": {"sent", "completed", "failed", "retried"},
        "throughput": {"requests_s", "output_tokens_s"},
        "cost_usd": {"total", "hot_working", "hot_idle", "loading", "stopped", "if_all_hot"},
        "cost": {"usd_per_1k_requests", "usd_per_1m_output_tokens", "utilisation"},
        "scaling": {"starts", "stops", "creates", "destroys", "order_to_hot_s", "over_time"},
        "latency_s": {"route", "ttft", "tpot", "itl", "e2e"},
        "tokens": {"prompt", "output"},
    }
    for part, keys in wanted.items():
        assert keys <= set(found[part]), part
    for latency in wanted["latency_s"]:
        assert set(found["latency_s"][latency]) == spread_keys
    assert (found["engine"], found["seed"]) == ("local cloud, paced engine", 7)


def test_a_run_without_an_autoscaler_says_why_there_are_no_costs() -> None:
    found = build(run(), RECORDS, [], None, "it did not answer")
    assert set(found["cost_usd"].values()) == {None}
    assert found["cost"]["why_unknown"] == "it did not answer"
    assert "not known: it did not answer" in table(found)


# -- what the autoscaler says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("usd", None, "usd: wanted"),
        ("usd", {"total": 1.0}, "usd.hot_working: is missing"),
        ("usd_if_all_hot", "1", "usd_if_all_hot: wanted"),
        ("starts", 1.5, "starts: wanted"),
        ("stops", True, "stops: wanted"),
        ("order_to_hot_s", None, "order_to_hot_s: wanted"),
        ("order_to_hot_s", [None], r"order_to_hot_s\[0\]: wanted"),
        ("utilisation", float("nan"), "not JSON"),
    ],
)
def test_costs_that_make_no_sense_are_named(field: str, value: object, why: str) -> None:
    with pytest.raises(BadField, match=why):
        costs_of({**COSTS, field: value})


def test_a_fleet_that_was_never_hot_has_no_utilisation() -> None:
    assert costs_of({**COSTS, "utilisation": None}).utilisation is None


# -- for people ----------------------------------------------------------------------------------------


def test_the_table_fits_a_terminal_and_says_what_answered() -> None:
    lines = table(whole(settings={f"setting{n}": "x" * 20 for n in range(9)})).splitlines()
    assert max(len(line) for line in lines) <= WIDTH
    assert lines[0] == "vllm-13 on local cloud, paced engine, 10.0 s, seed 7"
    assert lines[1].startswith("No GPU was used")
    assert "3 sent   2 completed   1 failed   1 retried" in "\n".join(lines)
    assert "$1.5000 with every instance hot all the time (3.00 times as much)" in "\n".join(lines)


def test_all_settings_are_shown() -> None:
    shown = " ".join(table(whole(settings={f"setting{n}": "x" * 20 for n in range(9)})).split())
    assert all(f"setting{n} " in shown for n in range(9))


def test_the_table_says_where_tokens_and_times_come_from() -> None:
    text = table(whole())
    assert "400 in   32 out   as the model servers counted" in text
    assert "order to hot 20.000 s mean, 30.000 s at most" in text


def test_each_kind_of_failure_is_explained_and_all_of_them_fit() -> None:
    many = Counter(dict.fromkeys(FAILURES, 10**9))
    records = [Record(0.0, 0.0, kind, setbacks=many.copy()) for kind in FAILURES]
    lines = table(build(run(), records, SAMPLES, costs_of(COSTS))).splitlines()
    for kind, what in FAILURES.items():
        assert any(line.endswith(f"1 {kind}: {what}") for line in lines), kind
    assert max(len(line) for line in lines) <= WIDTH
    assert sum(line.startswith("failed") for line in lines) == 1


def test_huge_figures_and_long_names_fit_too() -> None:
    records = [Record(0.0, 3e4, COMPLETED, 1e5, 2e5, 3e5, 10**12, 10**12, leases=1)] * 3
    costs = costs_of({**COSTS, "usd": {**COSTS["usd"], "total": 9e9, "lost": 5e8}, "usd_if_all_hot": 9e12})
    text = table(build(run(model="m" * 90, engine="e" * 90), records, SAMPLES, costs))
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert "failed" in text, "money lost on machines that failed is shown"


def test_an_empty_run_has_a_table_too() -> None:
    text = table(build(run(duration_s=0.0), [], [], costs_of({**COSTS, "order_to_hot_s": []})))
    assert "0 sent" in text
    assert "nothing became hot in the run" in text


def test_without_streaming_there_is_no_goodput() -> None:
    assert whole(streaming=False)["throughput"]["goodput_requests_s"] is None


def test_an_interrupted_run_and_one_not_streamed_say_so() -> None:
    text = table(whole(interrupted=True, streaming=False))
    assert "interrupted" in text.splitlines()[0]
    assert "not streamed" in text


NO_REQUESTS = {"width_s": 1.0, "in_time": [], "late": [], "failed": []}


def fleet_columns(**columns: list[float]) -> dict[str, Any]:
    """Columns as of GET /history, of as many points as are given; the others are 0."""
    count = len(next(iter(columns.values())))
    rest = {name: [0.0] * count for name in NAMES}
    return {"from": 0.0, "to": float(count), **rest, "at_s": [n + 1.0 for n in range(count)], **columns}


def test_the_chart_stacks_what_there_was_of_each_state() -> None:
    over_time = {"fleet": None, "requests": NO_REQUESTS}
    lines = chart([replace(s, at_s=s.at_s * 1.1) for s in SAMPLES], over_time, 3.0)
    assert [line[14:] for line in lines[1:4]] == ["...", ".+#", "###"]
    assert "demand 1.70 instances' worth, with what waits" in lines[-2]


def test_the_chart_shows_load_offered_what_waits_served_and_late_apart() -> None:
    """The backlog is no load: 300 requests that wait do not make the offered load of two a larger one."""
    over_time = {
        "fleet": fleet_columns(offered=[1.0, 2.0, 0.0], held=[0.0, 300.0, 150.0]),
        "requests": {"width_s": 1.0, "in_time": [8, 2, 0], "late": [0, 4, 0], "failed": [0, 2, 0]},
    }
    found = chart(SAMPLES, over_time, 3.0)
    assert [line[14:] for line in found[4:8]] == ["▄█ ", " █▄", "█▆ ", " ▆ "]
    assert [line[:12].strip() for line in found[4:8]] == ["offered", "waiting", "served", "late"]
    said = " ".join(" ".join(found[9:]).split())
    assert said.startswith("at most 2.00 instances' worth offered 300 requests waiting")
    assert "8 served and 6 late or failed of those that came in 1 s" in said


def test_requests_are_counted_over_time_by_when_they_were_due() -> None:
    assert whole()["over_time"]["requests"] == {
        "width_s": 1.0,
        "in_time": [1, 0, 0],
        "late": [0, 1, 0],
        "failed": [0, 0, 1],
    }
    assert build(run(streaming=False), RECORDS, [], None)["over_time"]["requests"]["late"] == [0, 0, 0]


def test_counts_over_time_take_little_memory_and_lose_nothing() -> None:
    found = OutcomesOverTime()
    for n in range(100_000):
        found.add(0.3 * n, failed=n % 10 == 0, late=n % 10 == 1)
    columns = found.columns()
    assert len(columns["late"]) <= MOST_SHOWN
    assert [sum(columns[name]) for name in ("in_time", "late", "failed")] == [80_000, 10_000, 10_000]
    assert columns["width_s"] * len(columns["late"]) >= 30_000 - 0.3
    assert columns["late"][0] == pytest.approx(columns["width_s"] / 3.0, rel=0.02)


def test_a_short_run_has_the_ends_of_its_axis_apart() -> None:
    over_time = {"fleet": None, "requests": NO_REQUESTS}
    assert "0 s 3 s" in " ".join(chart(SAMPLES, over_time, 3.0)[-3].split())


def test_a_large_fleet_has_a_chart_of_bounded_height() -> None:
    lines_of = [Sample(float(n), {"hot": 500, "cold": 3}, 1.0, 400.0) for n in range(300)]
    columns = fleet_columns(offered=[400.0] * 300)
    lines = chart(lines_of, {"fleet": columns, "requests": NO_REQUESTS}, 300.0)
    assert len(lines) <= report_table.CHART_ROWS + 8
    assert max(len(line) for line in lines) <= WIDTH
    assert "instances a row" in lines[0]
