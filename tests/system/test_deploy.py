"""What is shipped for Prometheus fits what our pages say; promtool checks it where it is there."""

import asyncio
import re
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest

from dispatch.outside import service
from dispatch.outside.metrics import LoadBalancerMetrics
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


def test_every_metric_that_an_alert_names_exists(face: Face) -> None:
    desk = service.LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    desk.confirm_hot_set()
    there = metric_names(asyncio.run(LoadBalancerMetrics.read(desk)))
    page = face.ask("GET", "/metrics").text
    there |= set(re.findall(r"^# TYPE (\w+)", page, re.M))
    rules = (DEPLOY / "alerts.yml").read_text()
    named = set(re.findall(r"\b(?:autoscaler|loadbalancer)_[a-z_]+", rules)) - {"autoscaler_server"}
    assert len(named) >= 10
    assert {n for n in named if n not in there and n.removesuffix("_count") not in there} == set()


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

    import loadbalancer_server
    from tests.web_server import served

    desk = service.LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    desk.confirm_hot_set()
    with served(loadbalancer_server.create_app(desk, AccessKeys("c" * 32))) as port:
        page = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    promtool("check", "metrics", page=page)
