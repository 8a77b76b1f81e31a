"""Which part may import which, and what a pure part may not touch: read from the source with `ast`.

A unit is a script at the top, a package, or a part of a package that has rules of its own (`fleet.outside`).
docs/architecture.md explains the rules.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.paths import ROOT

PURE_NEEDS = {"process.errors", "process.compiled"}

ALLOWED: dict[str, set[str]] = {
    # below everything
    "fleet_client": set(),
    "remote": set(),
    "process": {"fleet_client"},
    # pure
    "engine": PURE_NEEDS,
    "policies": PURE_NEEDS,
    "web.messages": PURE_NEEDS | {"engine"},
    "vast.rows": PURE_NEEDS,
    "web.signatures": set(),
    "dispatch": PURE_NEEDS | {"engine", "web.messages"},
    "fleet": PURE_NEEDS | {"engine", "policies", "vast.rows", "web.messages", "web.signatures"},
    # chapters
    "loadbalancer": PURE_NEEDS | {"dispatch", "engine", "web.messages"},
    "autoscaler": PURE_NEEDS | {"fleet", "engine", "policies", "vast.rows", "web.messages"},
    "instance_client": {"fleet_client", "process", "web.messages"},
    # the outside world
    "web": {"fleet_client", "process", "web.messages"},
    "vast": {"fleet_client", "process", "vast.rows"},
    "dispatch.outside": {
        "dispatch",
        "engine",
        "fleet_client",
        "instance_client",
        "loadbalancer",
        "process",
        "web",
        "web.messages",
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
        "vast.rows",
        "web",
        "web.messages",
        "web.signatures",
    },
    "localcloud": {"engine", "fleet_client", "process", "remote", "web"},
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
    "web.signatures",
    "vast.rows",
    "dispatch",
    "fleet",
    "loadbalancer",
    "autoscaler",
)
"""Units that do no I/O and read no clock: their methods take `now` and return values."""

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

SKIPPED = {"build", "docs", "deploy"}


def files() -> list[Path]:
    """Every Python file of the project."""
    tops = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in SKIPPED]
    return sorted([*ROOT.glob("*.py"), *(f for top in tops for f in top.rglob("*.py"))])


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def unit_of(module: str) -> str:
    """The unit a module belongs to: the longest name in the table that it begins with."""
    names = [n for n in {*ALLOWED, *ANYTHING} if module == n or module.startswith(n + ".")]
    return max(names, key=len, default=module.split(".")[0])


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports anywhere in it, or runs with `-m`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Tuple | ast.List):
            texts = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
            found = [str(b) for a, b in pairwise(texts) if a == "-m"]
        else:
            continue
        for name in found:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


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
    wrong = {m for m in imports(MODULES[module]) if unit_of(m) in ANYTHING or not allowed(unit, m)}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def arrows() -> dict[str, set[str]]:
    """Unit -> the units that its files import."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        unit = unit_of(module)
        graph.setdefault(unit, set()).update(unit_of(m) for m in imports(path) if unit_of(m) != unit)
    return graph


def test_no_two_units_import_each_other_directly_or_through_others() -> None:
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as e:
        pytest.fail(f"a cycle: {' -> '.join(e.args[1])}")


def test_every_line_of_the_table_is_about_something_that_is_there() -> None:
    units = {unit_of(module) for module in MODULES}
    assert set(ALLOWED) <= units
    for unit, theirs in ALLOWED.items():
        assert all(name in units or name in MODULES for name in theirs), unit


@pytest.mark.parametrize("module", sorted(m for m in MODULES if unit_of(m) in PURE))
def test_a_pure_part_imports_nothing_that_reaches_the_world(module: str) -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert not names & WORLDLY
