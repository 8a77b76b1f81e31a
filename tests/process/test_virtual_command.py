"""`sim.py --virtual` as a user has it: one command, the same report byte for byte, mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sim
from process.errors import ConfigError
from simulation.virtual import command
from tests.paths import ROOT

SMALL = "synthetic:days=0.02,rate=4,prompt=300,prompt_p95=900,output=150,output_p95=350"


def run(tmp_path: Path, *flags: str) -> tuple[int, bytes]:
    out = tmp_path / "report.json"
    status = sim.main(["--virtual", "--trace", SMALL, "--seed", "3", "--quiet", "--json", str(out), *flags])
    return status, out.read_bytes()


def test_the_same_flags_give_the_same_report_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, first = run(tmp_path, "--replay-every-s", "600")
    printed = capsys.readouterr().out
    assert status == 0
    assert run(tmp_path, "--replay-every-s", "600") == (0, first)
    assert capsys.readouterr().out == printed
    report = json.loads(first)
    assert report["engine"] == "virtual time, simulated machines"
    assert report["requests"]["completed"] == report["requests"]["sent"] > 1000
    assert report["curve"]["curve"], "after twenty minutes the last ones were replayed"
    assert "yesterday     would have cost a day" in printed
    assert "in time" in printed
    assert "requests ended once each" in printed


def test_the_late_lane_can_be_turned_off_and_every_report_shows_the_waits(tmp_path: Path) -> None:
    """Seven minutes of six times what one instance can do."""
    overload = ("--trace", SMALL.replace("days=0.02", "days=0.005"), "--rate-scale", "6")
    flags = (
        *overload,
        "--policy",
        "fixed",
        "--policy-param",
        "hot=1",
        "--gpu",
        "RTX 3090",
        "--lead-in-s",
        "0",
    )
    lane = json.loads(run(tmp_path, *flags)[1])["objective"]
    line = json.loads(run(tmp_path, *flags, "--no-late-lane")[1])["objective"]
    assert lane["late_lane"] > 0
    assert line["late_lane"] is None
    assert lane["late_wait_s"]["max"] > 0
    assert line["late_wait_s"]["max"] > 0
    assert lane["met_share"] >= line["met_share"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    run(tmp_path, "--plot", str(path), "--policy", "busy")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(path.read_bytes()) > 10_000


def test_the_report_is_a_page_too_and_it_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.html"
    run(tmp_path, "--html", str(path))
    assert f"the report as a page: {path.as_uri()}" in capsys.readouterr().err
    page = path.read_text()
    assert page.count("<script") == 3
    assert '"over_time":{"requests":{"width_s":' in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "needs --trace FILE"),
        (("--trace", "synthetic:rate=x"), "synthetic rate: wanted a number"),
        (("--trace", SMALL, "--rate-scale", "0"), "--rate-scale 0: wanted 0.001 to"),
        (("--trace", SMALL, "--policy", "best"), "unknown policy 'best'"),
        (("--trace", SMALL, "--goal", "2"), "goal 2"),
        (("--trace", SMALL, "--profile", "gpt"), "unknown model 'gpt'"),
        (("--trace", SMALL, "--gpu", "TPU"), "--gpu 'TPU': no machine"),
        (("--trace", SMALL, "--hazards", "dies=1"), "--hazards dies=1: 'dies=1': wanted name=number"),
        (("--trace", SMALL, "--hazards", "outbid_h=1"), "only interruptible instances are outbid"),
        (("--trace", SMALL, "--pool", "999"), "--pool 999: wanted 0 to 200"),
        (("--trace", SMALL, "--json", "/no/where.json"), "--json /no/where.json: there is no directory /no"),
        (("--trace", SMALL, "--html", "/no/where.html"), "--html /no/where.html: there is no directory /no"),
        (("--trace", SMALL, "--seed", "-1"), "--seed -1: wanted 0 to"),
        (("--trace", SMALL, "--what"), "unrecognized arguments: --what"),
    ],
)
def test_a_wrong_flag_is_refused_with_name_and_range(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        command.main(["--virtual", "--quiet", *flags])
    assert said in str(refused.value)


def test_a_wrong_trace_is_one_line_and_status_2(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,10\n2,10,10\n1,10,10\n")
    ran = subprocess.run(
        [sys.executable, "sim.py", "--virtual", "--trace", str(path), "--quiet"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=100,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert (
        ran.stderr == f"sim.py: {path}: line 4: arrival_s: its time is 1 s before that of the row before it\n"
    )


def test_hazards_cost_money_and_no_request(tmp_path: Path) -> None:
    report = json.loads(run(tmp_path, "--hazards", "dies_h=4,no_gpu=0.3", "--pool", "8", "--hot", "3")[1])
    assert report["requests"]["failed"] == 0
    assert report["requests"]["retried"] > 0
    assert report["requests"]["setbacks_by_kind"]["broken_off"] > 0


# -- its parts -------------------------------------------------------------------------------------------
