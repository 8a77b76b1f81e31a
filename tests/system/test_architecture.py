"""Which part may import which, and what a pure part may not touch: read from the source with `ast`.

tests/import_graph.py says what a unit is, docs/architecture.md explains the rules.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.import_graph import arrows, imports_of, modules_of, unit_of
from tests.paths import ROOT

PURE_NEEDS = {"process.errors", "process.compiled", "process.safe_text", "fleet_client.back_off"}

ALLOWED: dict[str, set[str]] = {
    # below everything
    "fleet_client": set(),
    "remote": set(),
    "process": {"fleet_client"},
    # pure
    "engine": PURE_NEEDS,
    "policies": PURE_NEEDS,
    "web.messages": PURE_NEEDS | {"engine"},
    "vast.errors": PURE_NEEDS,
    "vast.rows": PURE_NEEDS | {"vast.errors"},
    "web.signatures": set(),
    "web.replay_guard": set(),
    "dispatch": PURE_NEEDS | {"engine", "web.messages"},
    "fleet": PURE_NEEDS | {"engine", "policies", "vast.rows", "web.messages", "web.replay_guard"},
    # chapters
    "loadbalancer": PURE_NEEDS | {"dispatch", "engine", "web.messages"},
    "autoscaler": PURE_NEEDS | {"fleet", "engine", "policies", "vast.rows", "web.messages"},
    "instance_client": {"fleet_client", "process", "web.messages"},
    # the outside world
    "web": {"fleet_client", "process", "web.messages"},
    "vast": {"fleet_client", "process", "vast.errors", "vast.rows"},
    "dispatch.outside": {
        "dispatch",
        "engine",
        "fleet_client",
        "instance_client",
        "loadbalancer",
        "process",
        "web",
        "web.messages",
        "web.replay_guard",
        "web.signatures",
    },
    "fleet.outside": {
        "autoscaler",
        "engine",
        "fleet",
        "fleet_client",
        "instance_client",
        "policies",
        "process",
        "vast",
        "vast.errors",
        "vast.rows",
        "web",
        "web.messages",
        "web.replay_guard",
        "web.signatures",
    },
    "localcloud": {"engine", "fleet_client", "process", "remote", "web", "web.messages"},
    # In virtual time the real autoscaler and loadbalancer run against localcloud's model of the cloud.
    "simulation": {
        "autoscaler",
        "dispatch",
        "engine",
        "fleet",
        "fleet.outside.ledger",
        "fleet.outside.process",
        "fleet.outside.tuner",
        "fleet.outside.turns",
        "fleet_client",
        "instance_client",
        "loadbalancer",
        "localcloud",
        "policies",
        "process",
        "vast.rows",
        "web.messages",
        "web.page_bundle",
    },
    # what the terminals run
    "autoscaler_server": {
        "autoscaler",
        "engine",
        "fleet",
        "fleet.outside",
        "fleet_client",
        "policies",
        "process",
        "simulation.virtual.replay",  # by name: the tuner runs it as a process
        "web",
        "web.messages",
        "web.replay_guard",
        "web.signatures",
    },
    "loadbalancer_server": {
        "dispatch",
        "dispatch.outside",
        "engine",
        "fleet_client",
        "instance_client",
        "loadbalancer",
        "process",
        "web",
        "web.messages",
        "web.replay_guard",
        "web.signatures",
    },
    "sim": {"engine", "fleet_client", "process", "simulation"},
    "gateway": {"fleet_client"},
}
"""Beside each unit, what it may import beside itself: units, or single modules of them."""

ANYTHING = {"bench", "tests"}
"""Units that may import all; no other unit may import these."""

PURE = (
    "engine",
    "policies",
    "web.messages",
    "web.replay_guard",
    "web.signatures",
    "vast.errors",
    "vast.rows",
    "dispatch",
    "fleet",
    "loadbalancer",
    "autoscaler",
)
"""Units that do no I/O and read no clock: their methods take `now` and return values."""

CLOUD_MODEL = {
    f"localcloud.{name}"
    for name in (
        *(
            "account",
            "catalogue",
            "charges",
            "contract",
            "cloud",
            "durations",
            "effects",
            "faults",
            "hub",
            "images",
            "machines",
            "offers",
        ),
        *(
            "orders",
            "phases",
            "query",
            "realism",
            "regions",
            "rental",
            "rental_state",
            "renters",
            "rows",
            "ssh_logins",
        ),
    )
}
"""The pure modules of localcloud: virtual time runs on them."""

WORLDLY = {
    "aiohttp",
    "asyncio",
    "os",
    "pathlib",
    "queue",
    "requests",
    "secrets",
    "socket",
    "sqlite3",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
}

MODULES = modules_of(ROOT)


def allowed(unit: str, module: str) -> bool:
    """Whether a file of the unit may import the module."""
    theirs = unit_of(module)
    return theirs in (unit, *ALLOWED[unit]) or module in ALLOWED[unit]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_import_of_ours_is_an_arrow_of_the_table(module: str) -> None:
    """A package that the table does not know fails here."""
    unit = unit_of(module)
    if unit in ANYTHING:
        return
    assert unit in ALLOWED, f"{unit} has no line in ALLOWED: say what it may import"
    wrong = {m for m in imports_of(module, MODULES) if unit_of(m) in ANYTHING or not allowed(unit, m)}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_two_units_import_each_other_directly_or_through_others() -> None:
    try:
        TopologicalSorter(arrows(MODULES)).prepare()
    except CycleError as e:
        pytest.fail(f"a cycle: {' -> '.join(e.args[1])}")


def test_every_line_of_the_table_is_about_something_that_is_there() -> None:
    units = {unit_of(module) for module in MODULES}
    assert set(ALLOWED) <= units
    for unit, theirs in ALLOWED.items():
        assert all(name in units or name in MODULES for name in theirs), unit


@pytest.mark.parametrize("module", sorted(CLOUD_MODEL))
def test_the_cloud_model_imports_only_itself(module: str) -> None:
    assert set(imports_of(module, MODULES)) <= CLOUD_MODEL | PURE_NEEDS | {"engine.profiles"}


@pytest.mark.parametrize(
    "module", sorted(CLOUD_MODEL | {m for m in MODULES if unit_of(m) in PURE} | {"fleet_client.back_off"})
)
def test_a_pure_part_imports_nothing_that_reaches_the_world(module: str) -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert not names & WORLDLY
