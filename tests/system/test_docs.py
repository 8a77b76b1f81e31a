"""README and docs/ are true: each flag, route, make target, link and file they name exists."""

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
from prometheus_client.registry import Collector, CollectorRegistry

import autoscaler_server
import loadbalancer_server
import sim
from dispatch.outside import service
from dispatch.outside.metrics import LoadBalancerMetrics
from fleet.outside.metrics import AutoscalerMetrics
from fleet.outside.operator_commands import ACT, REACH, SHOW, SWITCH
from fleet_client import gateway
from fleet_client.gateway_metrics import GatewayMetrics
from loadbalancer import LoadBalancer
from localcloud import __main__ as localcloud_main
from localcloud.api import create_app as cloud_app
from localcloud.cloud import Cloud
from localcloud.machines import MACHINES
from localcloud.world import World
from tests import flags_page
from tests.commands import run_command
from tests.paths import ROOT
from web.direct import DirectRoutes
from web.keys import AccessKeys

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
DOCS = "\n".join(PAGES.values())
OPERATING = ROOT / "docs" / "operating.md"


COMMANDS: dict[str, tuple[Callable[[list[str]], object], tuple[str, ...]]] = {
    "autoscaler_server.py": (
        autoscaler_server.main,
        ("serve", "plan", "profile", "prepare", "destroy-fleet", "secrets", *SHOW, *REACH, *ACT, *SWITCH),
    ),
    "loadbalancer_server.py": (loadbalancer_server.main, ("",)),
    "sim.py": (sim.main, ("",)),
    "sim.py --virtual": (sim.main, ("--virtual",)),
    "localcloud": (localcloud_main.main, ("",)),
    "gateway.py": (gateway.main, ("",)),
}
"""The main function of each program, and what its --help is asked of."""


def flags_of(program: str) -> set[str]:
    """All long flags that a program and its commands tell of, without --help."""
    main, commands = COMMANDS[program]
    with patch.dict(os.environ, COLUMNS="1000"):  # so that no flag is cut at the end of a line
        told = [run_command(program, main, *command.split(), "--help") for command in commands]
    return {flag for one in told for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", one.out)} - {
        "--help"
    }


FLAGS = {program: flags_of(program) for program in COMMANDS}
OTHERS = {"--help", "--raw", "--pinnedpubkey", "--http", "--no-deps", "--only", "--keep", "--list"}
OTHERS |= {"--runner", "--reasoning-parser", "--write", "--preload"}  # vLLM's, of tests.clients, gunicorn's
OTHERS |= {"--enable-auto-tool-choice", "--tool-call-parser"}  # in what vLLM says
OTHERS |= {"--charges", "--limit"}  # of vastai


@pytest.mark.parametrize("program", list(FLAGS))
def test_every_flag_is_in_the_docs(program: str) -> None:
    missing = {flag for flag in FLAGS[program] if not re.search(rf"{re.escape(flag)}(?![\w-])", DOCS)}
    assert missing == set()


def test_the_page_of_flags_is_made_from_their_declarations() -> None:
    assert flags_page.PAGE.read_text() == flags_page.page(), "run `make flags`"


def test_every_flag_in_the_docs_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", DOCS))
    assert named <= set.union(*FLAGS.values()) | OTHERS


def routes(app: Any) -> set[str]:
    """METHOD /path of every route."""
    found = set()
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:id:)?(\w+)>", lambda m: "ID" if "id" in m[1] else m[1].upper(), rule.rule)
        found |= {f"{method} {path}" for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    for path, methods in DirectRoutes.of(app).by_path.items():
        found |= {f"{method} {path}" for method in methods}
    return found


def test_every_route_is_in_the_docs(tmp_path: Path) -> None:
    scaler = autoscaler_server.create_app(
        MagicMock(),
        AccessKeys("c" * 16),
        5.0,
        str,
    )
    desk = service.LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    balancer = loadbalancer_server.create_app(desk, AccessKeys("c" * 16))
    world = World(Cloud(MACHINES, Random(1)), tmp_path / "cloud", "paced")
    ours = {r for r in routes(cloud_app(world, "k" * 16)) if "/localcloud/" in r}
    world.stop()
    for route in routes(scaler) | routes(balancer) | ours:
        assert f"`{route}`" in DOCS, route


def metric_names(collector: Collector | CollectorRegistry) -> set[str]:
    """The names of what a metrics page has, a counter's with _total."""
    return {f.name + "_total" * (f.type == "counter") for f in collector.collect()}


def test_every_metric_is_in_the_docs_and_every_one_in_the_docs_exists() -> None:
    """With an idea for an alert in its row."""
    desk = service.LoadBalancerService(LoadBalancer(Random(1), str), lambda: 0.0)
    desk.confirm_hot_set()
    scaler = MagicMock()
    scaler.ledger.durations.return_value = []
    names = metric_names(asyncio.run(LoadBalancerMetrics.read(desk))) | metric_names(
        AutoscalerMetrics(scaler)
    )
    names |= metric_names(GatewayMetrics().registry)
    rows = re.findall(r"^\| `(\w+)(?:\{\w+\})?` \| [^|]+ \| [^|]+ \|$", PAGES[OPERATING], re.M)
    assert sorted(rows) == sorted(names)


def test_every_make_target_in_the_docs_exists_and_every_benchmark_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", DOCS, re.M))
    assert named <= targets
    assert {t for t in targets if t.startswith("bench")} <= named


def test_the_readme_names_every_script_and_every_package() -> None:
    tops = {p.name for p in ROOT.glob("*.py")} | {f"{p.parent.name}/" for p in ROOT.glob("*/__init__.py")}
    assert {top for top in tops - {"bench/", "tests/"} if top not in README} == set()


def test_the_readme_can_be_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in PAGES])
def test_every_link_leads_somewhere(page: str) -> None:
    text = PAGES[ROOT / page]
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), target


def named_files(text: str) -> set[str]:
    """Paths of ours with a folder in them, as code, docs and docstrings name them."""
    tops = "|".join([p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")])
    return set(re.findall(rf"(?<![\w/.-])((?:{tops})/[\w/.-]*\w\.(?:py|md|svg|dot|json|toml))\b", text))


def test_every_file_that_a_page_or_a_source_names_exists() -> None:
    files = [*PAGES, ROOT / "DECISIONS.md", ROOT / "Makefile", *ROOT.glob("*.py")]
    files += [f for p in ROOT.glob("*/__init__.py") for f in p.parent.rglob("*.py")]
    missing = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in named_files(file.read_text())
        if not (ROOT / name).exists() and not name.startswith("build/")
    }
    assert missing == set()


def test_every_dependency_has_its_reason() -> None:
    decisions = (ROOT / "DECISIONS.md").read_text()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name = line.partition("==")[0]
            assert name in decisions or name.startswith("types-"), name


def test_no_placeholder_was_left() -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|SIM_OUTPUT|ROUTE|BENCH|TURN)\b", DOCS)
