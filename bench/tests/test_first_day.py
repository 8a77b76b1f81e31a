"""The first day: its commands are those of the page, and its clairvoyant knows what it should."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.first_day.acts import ACTS
from bench.first_day.documented import documented_steps
from bench.first_day.ideal import DayPlayed, ideal_usd
from process.errors import ConfigError

DRAW = random.Random(1)
DAY = DayPlayed(
    profile="vllm-13",
    speedup=60.0,
    gpu_name="RTX 3090",
    num_gpus=1,
    usd_h=0.2,
    stopped_usd_h=0.01,
    download_usd=0.06,
    arrived=tuple(sorted((DRAW.uniform(0.0, 600.0), 300, 180) for _ in range(300))),
)


def test_the_commands_are_those_of_the_page(tmp_path: Path) -> None:
    steps = documented_steps()
    assert steps["What it would cost"].shell[0].startswith("python autoscaler_server.py plan ")
    assert [command.split()[1] for command in steps["Serve"].shell] == [
        "autoscaler_server.py",
        "loadbalancer_server.py",
        "gateway.py",
    ]
    assert "tools=[weather]" in steps["Ask"].python
    (tmp_path / "page.md").write_text("# nothing here\n")
    with pytest.raises(LookupError):
        documented_steps(tmp_path / "page.md")


def test_every_act_says_what_happens() -> None:
    assert all(act.__doc__ for act in ACTS)


def test_the_clairvoyant_pays_for_one_machine_all_day_and_its_load() -> None:
    found = ideal_usd(DAY)
    assert found["machines"] == 1
    assert found["serving_usd"] == pytest.approx(0.2 * 600.0 / 3600.0, rel=0.01)
    assert found["loading_usd"] == pytest.approx((600.0 / 3600.0 * 0.2 + 0.06) / 60.0)
    assert found["free_serving_usd"] < found["serving_usd"]


def test_more_requests_cost_it_more_machines() -> None:
    crowd = tuple(sorted((DRAW.uniform(0.0, 600.0), 300, 180) for _ in range(6000)))
    found = ideal_usd(replace(DAY, arrived=crowd))
    assert found["machines"] > 2
    assert found["usd"] > 2.0 * ideal_usd(DAY)["usd"]
    with pytest.raises(ConfigError, match="no request"):
        ideal_usd(replace(DAY, arrived=()))
