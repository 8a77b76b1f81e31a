"""What an operator asks of the last day: the log and the flags of the run, and what is read of its report."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sim
from fleet.arrivals import Arrived
from fleet.outside.ledger import Ledger
from fleet.outside.what_if_runs import WhatIfRefused, WhatIfRuns
from fleet.what_if import FleetNow, flags_of, log_of, requests_of, summary_of
from policies import Busy, Fixed, Objective, Policy
from simulation.traces.reading import read
from tests.commands import run_command
from tests.unit.fleet.test_turns import Loop
from tests.web_server import wait_until
from web.messages.operator import WhatIfBody


def now(policy: Policy) -> FleetNow:
    return FleetNow("vllm-13", policy, 8, 10.0, late_lane=True)


def test_the_log_has_a_row_for_each_request_with_the_work_that_came() -> None:
    arrived = [Arrived(1000, 2, 60.0, 200.0), Arrived(1003, 0.4, 10.0, 40.0), Arrived(1004, 0.6, 15.0, 60.0)]
    rows = list(log_of(arrived, prefill_weight=0.1))[1:]
    assert rows == ["0.0000,100,20\n", "0.5000,100,20\n", "4.0000,100,15\n"]


def test_the_log_is_one_that_sim_reads(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    path.write_text("".join(log_of([Arrived(1000 + n, 3, 300.0, 900.0) for n in range(50)], 0.05)))
    assert len(list(read(path))) == 150


@pytest.mark.parametrize(
    ("policy", "asked", "flags"),
    [
        (Objective(goal=0.98, k=2.5, pool=4), None, ["--goal=0.98"]),
        (Objective(goal=0.98), WhatIfBody(goal=0.999), ["--goal=0.999"]),
        (Busy(min_hot=2), None, ["--policy=busy", "--policy-param=min_hot=2"]),
        (Busy(), WhatIfBody(policy="fixed", params={"hot": 3}), ["--policy=fixed", "--policy-param=hot=3"]),
        (Fixed(3, 5), None, ["--policy=fixed", "--policy-param=hot=3", "--policy-param=total=5"]),
    ],
)
def test_the_policy_is_the_one_there_is_or_the_one_asked_for(
    policy: Policy, asked: WhatIfBody | None, flags: list[str]
) -> None:
    assert flags_of(now(policy), asked)[4:] == flags


def test_limits_and_gpu_are_those_asked_for_else_the_fleets() -> None:
    assert flags_of(now(Fixed(1)), None)[:3] == ["--profile=vllm-13", "--max-instances=8", "--max-usd-h=10"]
    asked = WhatIfBody(max_instances=3, max_dollars_per_hour=2.5, gpu="RTX 4090")
    assert flags_of(now(Fixed(1)), asked)[1:5] == [
        "--max-instances=3",
        "--max-usd-h=2.5",
        "--seed=1",
        "--gpu=RTX 4090",
    ]
    late = FleetNow("vllm-13", Fixed(1), 8, 10.0, late_lane=False)
    assert "--no-late-lane" in flags_of(late, None)


@pytest.mark.parametrize("asked", [None, WhatIfBody(goal=0.95, max_instances=3, gpu="RTX 4090")])
def test_sim_takes_the_flags_and_its_report_is_understood(tmp_path: Path, asked: WhatIfBody | None) -> None:
    trace, report = tmp_path / "day.csv", tmp_path / "report.json"
    arrived = [Arrived(1000 + n, 1, 150.0, 300.0) for n in range(300)]
    trace.write_text("".join(log_of(arrived, 0.05)))
    flags = flags_of(now(Objective(goal=0.98)), asked)
    done = run_command(
        "sim.py", sim.main, "--virtual", f"--trace={trace}", f"--json={report}", "--quiet", *flags
    )
    assert not done.status, done.err
    found = summary_of(report.read_bytes())
    assert 0.0 <= found["met"] <= 1.0
    assert found["usd_day"] > 0.0
    assert found["ttft_s"]["p50"] > 0.0


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"duration_s": "x"}'])
def test_what_is_no_report_is_said_so(raw: bytes) -> None:
    with pytest.raises(ValueError, match="no report"):
        summary_of(raw)


# -- the runs ------------------------------------------------------------------------------------------

REPORT: dict[str, Any] = {
    "duration_s": 43_200.0,
    "objective": {"met_share": 0.99},
    "cost_usd": {"total": 5.0},
    "requests": {"sent": 100, "failed": 0},
    "latency_s": {"ttft": {"p50": 0.1, "p95": 0.2, "p99": 0.3}, "e2e": {"p50": 1.0, "p95": 2.0, "p99": 3.0}},
    "scaling": {"most_hot": 2, "starts": 1},
    "cost": {"utilisation": 0.5},
}

PLAYS = f"""
import sys
said = dict(flag.split("=", 1) for flag in sys.argv[1:] if "=" in flag)
open(said["--json"], "w").write({json.dumps(REPORT)!r})
open(said["--html"], "w").write("<title>" + " ".join(sys.argv[1:]) + "</title>")
"""
"""A stand-in for sim.py --virtual."""

HANGS, FAILS = "import time; time.sleep(600)", "import sys; sys.exit('the market has no such GPU')"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    made = Loop(ledger)
    at = int(made.scaler.clock()) - 100
    ledger.add_counts({}, [Arrived(at + n, 1, 100.0, 300.0) for n in range(60)], made.scaler.clock())
    yield made
    ledger.close()


def runs(loop: Loop, program: str) -> WhatIfRuns:
    return WhatIfRuns(loop.scaler, (sys.executable, "-c", program))


def test_both_sides_are_played_with_the_same_log_and_shown(loop: Loop) -> None:
    found = runs(loop, PLAYS)
    assert found.state() == {"state": "none"}
    found.ask(WhatIfBody(max_instances=3))
    wait_until(lambda: found.state()["state"] != "running", "both runs to end")
    state = found.state()
    assert (state["state"], state["asked"]) == ("done", {"max_instances": 3})
    assert state["sides"]["then"]["usd_day"] == 10.0
    pages = [found.page(side) or b"" for side in ("now", "then")]
    assert b"--max-instances=3" not in pages[0]
    assert b"--max-instances=3" in pages[1]
    assert found.page("else") is None


def test_one_question_is_answered_at_a_time_and_ends_with_the_process(loop: Loop) -> None:
    found = runs(loop, HANGS)
    found.ask(WhatIfBody())
    with pytest.raises(WhatIfRefused, match="not answered yet"):
        found.ask(WhatIfBody())
    found.stop()
    wait_until(lambda: found.state()["state"] == "failed", "the run to end")
    with pytest.raises(WhatIfRefused):
        found.ask(WhatIfBody())


def test_a_run_that_fails_says_why_and_another_may_follow(loop: Loop) -> None:
    found = runs(loop, FAILS)
    for _ in range(2):
        found.ask(WhatIfBody(gpu="none"))
        wait_until(lambda: found.state()["state"] != "running", "the run to end")
        assert found.state()["message"] == "the market has no such GPU"


def test_without_arrivals_nothing_is_played(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "other.sqlite")
    with pytest.raises(WhatIfRefused, match="0 requests are known"):
        runs(Loop(ledger), PLAYS).ask(WhatIfBody())
    ledger.close()


def test_the_requests_of_a_second_are_those_of_the_ledger() -> None:
    rows = [(10, 2.0, 2 * (0.1 * 300 + 180), 600.0), (12, 0.5, 105.0, 150.0), (13, 0.5, 105.0, 150.0)]
    found = requests_of((Arrived(*row) for row in rows), 0.1)
    assert tuple(found) == ((0.0, 300, 180), (0.5, 300, 180), (3.0, 300, 180))
