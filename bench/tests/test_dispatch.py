"""The dispatch comparison: what it is run on, what it says of what came out."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.dispatch import __main__, cells
from bench.dispatch.cells import (
    A100,
    COME,
    RTX_4090,
    DispatchCell,
    carry_out,
    cut,
    fleet_of,
    lengths,
    requests_of,
    saturated,
    told_wrong,
)
from bench.dispatch.report import tables
from bench.dispatch.rules.registry import RULES
from bench.dispatch.runs import Comparison, runs_of
from bench.dispatch.targets import judged
from process.errors import ConfigError
from simulation.traces.request import Request


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of 400 requests like the real ones, a second apart."""
    where = tmp_path_factory.mktemp("traces")
    rng = random.Random(4)
    for name, file in cells.TRACES.items():
        rows = ["arrival_s,prompt_tokens,output_tokens" + (",session" if name == "mooncake" else "")]
        for n in range(400):
            row = f"{n + rng.random():.3f},{rng.randint(20, 2500)},{rng.randint(5, 300)}"
            rows.append(row + (f",{rng.randint(0, 60)}" if name == "mooncake" else ""))
        (where / file).write_text("\n".join(rows) + "\n")
    return where


@pytest.fixture
def cell(directory: Path) -> DispatchCell:
    return DispatchCell("main", "conv", "mixed", 0.8, servers=4, requests=400, directory=directory)


# -- the world -------------------------------------------------------------------------------------------


def test_a_request_that_the_smallest_memory_cannot_hold_is_cut_its_answer_last() -> None:
    assert cut(1_000, 200, 15_500) == (1_000, 200)
    assert cut(20_000, 200, 15_500) == (15_300, 200)
    assert cut(20_000, 20_000, 15_500) == (7_750, 7_750)


def test_a_server_serves_what_it_does_with_somebody_always_waiting(directory: Path) -> None:
    log = directory / cells.TRACES["conv"]
    requests_s, tokens_s = saturated(log, 400, A100, 53_700)
    slow_s, _ = saturated(log, 400, RTX_4090, 15_500)
    assert 0.5 * requests_s < slow_s < requests_s
    mean = sum(r.output_tokens for r in lengths(log, 400)) / 400
    assert tokens_s == pytest.approx(requests_s * mean, rel=0.15)


def test_a_mixed_fleet_has_as_many_of_each_and_load_is_a_share_of_what_they_serve(cell: DispatchCell) -> None:
    fleet = fleet_of(replace(cell, servers=8))
    assert len({t.name for t in fleet.timings}) == 4
    assert fleet.timings[:4] == fleet.timings[4:]
    assert fleet.arrivals_s == pytest.approx(0.8 * sum(fleet.requests_s))
    come, shortened = requests_of(cell, fleet_of(cell))
    assert (len(come), shortened) == (400, 0)
    assert len(come) / come[-1].at == pytest.approx(0.4 * sum(fleet.requests_s), rel=0.1)


LOG = [Request(float(n // 2), 100 + n, 10 + n, n % 7) for n in range(400)]


def by(how: str, rate: float = 4.0, seed: int = 0) -> Sequence[tuple[float, int, int, int]]:
    return list(COME[how](LOG, rate, random.Random(seed)))


@pytest.mark.parametrize("how", COME)
def test_whatever_comes_comes_in_order_at_the_rate_and_the_same_for_a_seed(how: str) -> None:
    come = by(how)
    times = [one[0] for one in come]
    assert times == sorted(times)
    assert len(come) / times[-1] == pytest.approx(4.0, rel=0.25)
    assert by(how) == come
    assert by(how, seed=1) != come or how == "log"


def test_poisson_has_all_lengths_in_another_order_and_the_log_has_its_own() -> None:
    poisson, log = by("poisson"), by("log")
    lengths = [(r.prompt_tokens, r.output_tokens) for r in LOG]
    assert [one[1:3] for one in log] == lengths
    assert [one[1:3] for one in poisson] != lengths
    assert sorted(one[1:3] for one in poisson) == lengths


def test_sessions_stay_whole_with_the_pauses_they_had() -> None:
    """Half as many a second: about half of the sessions, each with all of its requests."""
    of: dict[int, list[float]] = {}
    for at, _, _, session in by("sessions", rate=1.0):
        of.setdefault(session, []).append(at)
    whole = [[r.at_s for r in LOG if r.session == n] for n in range(7)]
    for times in of.values():
        assert len(times) in {len(one) for one in whole}
        assert times[-1] - times[0] == pytest.approx(whole[0][-1] - whole[0][0], abs=5.0)


def test_wrong_constants_are_off_by_up_to_30_percent_each_and_limits_are_right() -> None:
    told = told_wrong(A100, random.Random(1))
    ratios = [getattr(told, name) / getattr(A100, name) for name in "abcdef"]
    assert all(0.7 <= ratio <= 1.3 for ratio in ratios)
    assert len({round(ratio, 6) for ratio in ratios}) == 6
    assert replace(told, **{name: getattr(A100, name) for name in "abcdef"}) == A100


# -- runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["ours", "ours+hold", "ours+lane", "clairvoyant", "dynamo+hold"])
def test_a_run_is_the_same_again(cell: DispatchCell, rule: str) -> None:
    line, again = carry_out(cell, rule), carry_out(cell, rule)
    del line["seconds"], again["seconds"]
    assert again == line
    assert line["requests"] == 360
    json.dumps(line)


def test_repeats_are_the_mean_of_seeds(cell: DispatchCell) -> None:
    each = [carry_out(replace(cell, seed=n), "random")["first_mean"] for n in (3, 4)]
    both = carry_out(replace(cell, seed=3, repeats=2), "random")
    assert both["first_mean"] == pytest.approx(sum(each) / 2)
    assert (both["load"], both["fresh"], both["balancers"]) == (0.8, False, 1)


def test_who_knows_everything_is_better_than_chance(cell: DispatchCell) -> None:
    assert carry_out(cell, "clairvoyant")["j"] < 0.9 * carry_out(cell, "random")["j"]


def test_the_parts_of_the_comparison_are_the_cells_that_their_names_say(cell: DispatchCell) -> None:
    def runs(*sets: str) -> list[tuple[DispatchCell, str]]:
        rules = ("ours", "clairvoyant", "epp")
        return runs_of(Comparison(("conv", "mooncake"), ("equal",), (0.6, 0.9), sets, rules, cell))

    assert [(c.trace, c.load, rule) for c, rule in runs("main")][:4] == [
        ("conv", 0.6, "ours"),
        ("conv", 0.6, "clairvoyant"),
        ("conv", 0.6, "epp"),
        ("conv", 0.9, "ours"),
    ]
    assert len(runs("main")) == 12
    assert {(c.fresh, c.balancers) for c, _ in runs("fresh")} == {(True, 1)}
    assert {(c.fresh, c.balancers) for c, _ in runs("four")} == {(False, 4)}
    assert [(c.load, rule) for c, rule in runs("overload")] == [
        (1.05, rule)
        for rule in ("ours", "ours+hold", "clairvoyant", "clairvoyant+hold", "epp", "epp+hold", "ours+lane")
    ]
    assert [(c.unknown, c.from_s, rule) for c, rule in runs("unknown")][:3] == [
        (True, 600.0, "ours"),
        (False, 600.0, "ours"),
        (False, 600.0, "clairvoyant"),
    ]


# -- what is said ----------------------------------------------------------------------------------------


def line(rule: str, first: float, whole: float, **cell: Any) -> dict[str, Any]:
    """What a run gave; all quantiles as the mean."""
    figures = {f"first_{q}": first for q in ("mean", "p50", "p95", "p99")}
    figures |= {f"whole_{q}": whole for q in ("mean", "p50", "p95", "p99")}
    usual = {"set": "main", "trace": "conv", "fleet": "equal", "load": 0.8, "unknown": False}
    more = {"servers": 8, "requests": 900, "cut": 5, "j": whole + 10.0 * first, "rule": rule}
    return {**usual, **more, **figures, **cell}


def test_a_target_is_met_by_its_ratio_to_the_clairvoyant_or_to_the_best_of_the_others() -> None:
    found = judged(
        [
            line("ours", 1.02, 9.8),
            line("clairvoyant", 1.0, 9.0),
            line("dynamo", 1.5, 10.0),
            line("epp", 1.2, 11.0),
        ]
    )
    assert [(one["ratio"], one["most"], one["met"]) for one in found] == [
        (pytest.approx(1.02), 1.02, True),
        (pytest.approx(0.98), 0.985, True),
    ]
    assert "first token over CL" in found[0]["target"]
    assert "whole over BP" in found[1]["target"]


def test_what_was_not_told_right_is_measured_against_what_was() -> None:
    cell = {"set": "unknown"}
    lines = [line("ours", 1.1, 10.0, unknown=True, **cell), line("ours", 1.0, 10.0, **cell)]
    assert [(round(one["ratio"], 6), one["met"]) for one in judged(lines)] == [(1.1, False), (1.0, True)]


def test_in_overload_those_of_the_others_that_hold_count_too() -> None:
    cell = {"set": "overload", "load": 1.05}
    lines = [
        line("ours+hold", 2.0, 9.0, **cell),
        line("clairvoyant", 1.0, 8.0, **cell),
        line("epp", 3.0, 10.0, **cell),
        line("epp+hold", 1.9, 9.5, **cell),
    ]
    assert [one["met"] for one in judged(lines)] == [False, False, True]


def test_the_table_shows_means_ratios_and_targets() -> None:
    lines = [line("ours", 1.0, 9.0), line("clairvoyant", 0.5, 8.0), line("epp", 2.0, 10.0)]
    text = tables(lines, full=True)
    rows = [row.split() for row in text.splitlines()]
    assert (
        "conv, 8 servers equal, reports 1 s old; 900 scored, 5 of all cut to fit the smallest memory" in text
    )
    assert ["ours", "1.000", "9.00", "1.46"] in rows  # (9 + 10) / (8 + 5)
    assert ["llm-d", "EPP", "2/2/3", "2.000", "10.00", "2.31"] in rows
    assert ["ours", "/", "CL", "2.000", "1.125", "1.462"] in rows
    assert ["ours", "/", "BP", "0.500", "0.900", "0.633"] in rows
    assert ["CL", "/", "BP", "0.250", "0.800", "0.433"] in rows
    assert "targets: 1 of 2 met" in text


def test_the_command_prints_tables_and_writes_figures_and_pictures(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (
        "--only conv --fleets equal --loads 0.5,0.8 --rules ours,clairvoyant,vast --requests 120 --workers 1"
    )
    where = f"--traces {directory} --json {tmp_path}/out/b.json --plots {tmp_path}/plots"
    monkeypatch.setattr(sys, "argv", ["bench.dispatch", *told.split(), *where.split()])
    __main__.main()
    said = capsys.readouterr().out
    assert "conv, 8 servers equal, reports 1 s old, four loadbalancers" in said
    assert "ours + hold, late lane" in said
    written = json.loads((tmp_path / "out" / "b.json").read_text())
    assert {run["set"] for run in written["runs"]} == {"main", "fresh", "four", "overload", "unknown"}
    assert all(isinstance(one["met"], bool) for one in written["targets"])
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names >= {f"{name}-conv-equal.png" for name in ("main", "fresh", "four", "overload")}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--only nobody", "known are conv, code, mooncake"),
        ("--rules best", "known are ours"),
        ("--loads much", "wanted numbers"),
        ("--loads 7", "wanted 0.01 to 3"),
        ("--arrivals soon", "known are usual, poisson"),
        ("--traces /nowhere", "cannot be read"),
        ("--workers 0", "wanted 1 to 64"),
    ],
)
def test_wrong_flags_are_refused(flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.dispatch", "--workers", "1", *flags.split()])
    with pytest.raises(ConfigError, match=said):
        __main__.main()


def test_all_rules_of_the_issue_are_there() -> None:
    assert len([entry for entry in RULES.values() if entry.peer and entry.listed]) == 11


def test_what_was_run_before_with_the_same_settings_need_not_be_run_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(flags: str) -> list[tuple[str, float]]:
        told = f"--traces {directory} --only conv --fleets equal --loads 0.5 --sets main --workers 1"
        monkeypatch.setattr(sys, "argv", ["bench.dispatch", *told.split(), *flags.split()])
        __main__.main()
        runs = json.loads((tmp_path / "b.json").read_text())["runs"]
        return [(one["rule"], one["first_mean"]) for one in runs]

    file = f"--json {tmp_path}/b.json"
    first = run(f"--rules clairvoyant,vast --requests 120 {file}")
    both = run(f"--rules random,vast --requests 120 --with {tmp_path}/b.json {file}")
    assert [rule for rule, _ in both] == ["clairvoyant", "random", "vast"]
    assert set(first) < set(both)
    with pytest.raises(ConfigError, match="was run with"):
        run(f"--rules random --requests 130 --with {tmp_path}/b.json {file}")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ConfigError, match="--with"):
        run(f"--rules random --requests 120 --with {tmp_path}/b.json {file}")
