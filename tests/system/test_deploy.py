"""What is shipped for Prometheus, Grafana and systemd fits what there is; their own tools check it."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

import autoscaler_server
import loadbalancer_server
from dispatch.outside import service
from dispatch.outside.metrics import LoadBalancerMetrics
from fleet_client import gateway
from loadbalancer import LoadBalancer
from tests.paths import ROOT
from tests.process.test_autoscaler_server import Face, ledger
from tests.system.test_docs import metric_names
from web.keys import AccessKeys

__all__ = ["ledger"]

DEPLOY = ROOT / "deploy"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="make test-deploy installs promtool")


def promtool(*words: str, page: str | None = None) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *words], cwd=DEPLOY, input=page, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


@pytest.fixture
def there(face: Face) -> set[str]:
    """The names of all metrics."""
    desk = service.LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    desk.confirm_hot_set()
    there = metric_names(asyncio.run(LoadBalancerMetrics.read(desk)))
    page = face.ask("GET", "/metrics").text
    return there | set(re.findall(r"^# TYPE (\w+)", page, re.M))


def unknown(said: str, there: set[str]) -> set[str]:
    """Metrics that a text names and that are not there."""
    named = set(re.findall(r"\b(?:autoscaler|loadbalancer)_[a-z_]+", said)) - {"autoscaler_server"}
    assert len(named) >= 10
    return {n for n in named if n not in there and re.sub("_(count|bucket|sum)$", "", n) not in there}


def test_every_metric_that_an_alert_names_exists(there: set[str]) -> None:
    assert unknown((DEPLOY / "alerts.yml").read_text(), there) == set()


# -- the board -------------------------------------------------------------------------------------------

BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def test_every_metric_that_the_board_names_exists(there: set[str]) -> None:
    texts = [*EXPRESSIONS, *(v.get("definition", "") for v in BOARD["templating"]["list"])]
    assert unknown("\n".join(texts), there) == set()


def test_the_board_shows_what_the_page_shows() -> None:
    shown = " ".join(EXPRESSIONS)
    for metric in (
        *("autoscaler_instances", "autoscaler_demand_instances", "loadbalancer_waiting_requests"),
        *("autoscaler_burn_dollars_per_hour", "autoscaler_spent_dollars_total", "autoscaler_not_well"),
        *("autoscaler_start_seconds_bucket", "autoscaler_load_seconds_bucket"),
        *("loadbalancer_first_token_seconds_bucket", "loadbalancer_token_seconds_bucket"),
        "loadbalancer_answer_seconds_bucket",
    ):
        assert metric in shown, metric


def test_the_boards_panels_lie_beside_each_other() -> None:
    places: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        places |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


@needs_promtool
def test_promtool_can_read_each_expression_of_the_board(tmp_path: Path) -> None:
    rules = [
        {"record": f"board:{n}", "expr": expr.replace("$__rate_interval", "5m")}
        for n, expr in enumerate(EXPRESSIONS)
    ]
    (tmp_path / "board.yml").write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "board.yml"))


# -- systemd's units -------------------------------------------------------------------------------------

UNITS = ("fleet-autoscaler.service", "fleet-loadbalancer.service", "fleet-gateway.service")
ANALYZE = shutil.which("systemd-analyze")
needs_analyze = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is absent (Debian: systemd)")
MOST_EXPOSED = 2.0
"""What systemd-analyze security may give, of 10: it calls 2 and less OK."""


def analyze(*words: str) -> str:
    assert ANALYZE is not None
    done = subprocess.run([ANALYZE, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they are where the checkout is in this place."""
    for name in (*UNITS, "fleet-gateway.socket"):
        text = (DEPLOY / name).read_text().replace("/opt/fleet/.venv/bin/fleet-gateway", sys.executable)
        text = text.replace("/opt/fleet/.venv/bin/python", sys.executable).replace("/opt/fleet", str(ROOT))
        (tmp_path / name).write_text(text)
    return tmp_path


@needs_analyze
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: str, units: Path) -> None:
    said = analyze("verify", "--man=no", str(units / unit))
    assert unit.partition(".")[0] not in said, said


@needs_analyze
@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_hardened(unit: str, units: Path) -> None:
    threshold = str(round(MOST_EXPOSED * 10))
    analyze("security", "--offline=true", "--no-pager", f"--threshold={threshold}", str(units / unit))


@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_says_when_it_is_ready_and_has_a_watchdog(unit: str) -> None:
    text = (DEPLOY / unit).read_text()
    assert "\nType=notify\n" in text
    assert "\nWatchdogSec=" in text


@pytest.mark.parametrize(
    ("unit", "parser"),
    [
        ("fleet-autoscaler.service", lambda: autoscaler_server.parser()),
        ("fleet-loadbalancer.service", lambda: loadbalancer_server.parser()),
        ("fleet-gateway.service", lambda: gateway.parser()),
    ],
)
def test_the_flags_in_a_units_command_exist(unit: str, parser: Any, tmp_path: Path) -> None:
    (command,) = re.findall(r"^ExecStart=(.*)", (DEPLOY / unit).read_text(), re.M)
    (tmp_path / "autoscaler.toml").write_text("max-instances = 4\n")
    words = command.replace("%d", str(tmp_path)).replace("%S", str(tmp_path)).split()
    given = words[1 if words[0].endswith("gateway") else 2 :]
    parser().parse_args(["serve", *given] if "autoscaler" in unit else given)


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", (DEPLOY / "alerts.yml").read_text()))
    fired = re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n", (DEPLOY / "alerts_test.yml").read_text())
    assert alerts == set(fired)


@pytest.fixture
def face(ledger: object, tmp_path: Path) -> Face:
    return Face(ledger, tmp_path)  # type: ignore[arg-type]


@needs_promtool
def test_promtool_finds_nothing_wrong_with_rules_and_their_tests() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_autoscalers_page(face: Face) -> None:
    promtool("check", "metrics", page=face.ask("GET", "/metrics").text)


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_loadbalancers_page() -> None:
    from urllib.request import urlopen

    from tests.web_server import served

    desk = service.LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    desk.confirm_hot_set()
    with served(loadbalancer_server.create_app(desk, AccessKeys("c" * 32))) as port:
        page = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    promtool("check", "metrics", page=page)
