"""Who may import whom, and what a pure core may not touch: read from the source with `ast`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {p.stem for p in ROOT.glob("*.py")} | {
    "policies",
    "dispatch",
    "simulation",
    "remote",
    "localcloud",
    "bench",
    "tests",
}

# Beside each file or package, everything of ours it may import. What is missing here fails the test.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "profiles": {"errors"},
    "die_with_parent": set(),
    "steady_clock": set(),
    "private_files": {"errors"},
    "command_line": {"errors"},
    "ssh_keys": {"errors", "private_files"},
    "policies": {"errors", "policies"},
    "slo": set(),
    "compiled": set(),
    "model_timing": {"errors"},
    "demand": {"policies", "slo"},
    "ledger": {"demand"},
    "instance_states": {"profiles"},
    "dispatch": {"compiled", "dispatch", "model_timing", "slo"},
    "loadbalancer": {"dispatch", "model_timing", "slo"},
    "loopback": set(),
    "tls_pin": {"loopback"},
    "instance_messages": set(),
    "http_face": {"errors"},
    "vast_cli": {"errors", "loopback"},
    "vast": {"errors", "vast_cli"},
    "fleet_size": set(),
    "fleet_affinity": {"fleet_size"},
    "fleet_leases": {"fleet_affinity", "fleet_size"},
    "fleet_call": {"fleet_leases", "fleet_size", "fleet_wire"},
    "fleet_course": {"fleet_call", "fleet_leases", "fleet_wire", "tls_pin"},
    "fleet_transport": {
        "fleet_affinity",
        "fleet_call",
        "fleet_course",
        "fleet_leases",
        "fleet_size",
        "fleet_wire",
        "tls_pin",
    },
    "fleet_async": {"fleet_call", "fleet_course", "fleet_leases", "fleet_transport", "fleet_wire", "tls_pin"},
    "fleet_threads": {
        "fleet_call",
        "fleet_course",
        "fleet_leases",
        "fleet_transport",
        "fleet_wire",
        "tls_pin",
    },
    "fleet_client": {
        "fleet_async",
        "fleet_call",
        "fleet_course",
        "fleet_leases",
        "fleet_size",
        "fleet_threads",
    },
    "fleet_wire": set(),
    "gateway": {
        "command_line",
        "errors",
        "fleet_client",
        "fleet_course",
        "fleet_leases",
        "fleet_transport",
        "fleet_wire",
        "http_face",
        "private_files",
    },
    "instance_client": {"errors", "tls_pin"},
    "start_script": {"errors", "profiles"},
    "ssh_log": {"errors"},
    "fleet_keys": {"private_files", "ssh_keys"},
    "orders": {"errors", "profiles", "start_script", "vast"},
    "health": {"errors", "instance_client", "instance_states", "ssh_log"},
    "autoscaler": {
        "demand",
        "errors",
        "health",
        "instance_messages",
        "instance_states",
        "ledger",
        "model_timing",
        "orders",
        "policies",
        "profiles",
        "steady_clock",
        "vast",
    },
    "autoscaler_server": OURS
    - {
        "sim",
        "driver",
        "localcloud",
        "local_stack",
        "loadbalancer",
        "bench",
        "simulation",
        "tests",
        "remote",
    },
    "loadbalancer_server": {
        "command_line",
        "dispatch",
        "errors",
        "http_face",
        "instance_client",
        "instance_messages",
        "loadbalancer",
        "model_timing",
        "private_files",
        "slo",
        "steady_clock",
        "tls_pin",
    },
    "report": {"slo"},
    "tuner": {"autoscaler", "demand", "die_with_parent", "policies", "slo"},
    "local_stack": {"die_with_parent", "errors", "localcloud", "private_files", "profiles"},
    "driver": {"errors", "fleet_client", "instance_client", "profiles", "report"},
    "sim": {
        "command_line",
        "driver",
        "errors",
        "fleet_client",
        "local_stack",
        "loopback",
        "private_files",
        "profiles",
        "report",
        "simulation",
    },
    "remote": {"remote"},
    # In virtual time the real autoscaler and loadbalancer run against localcloud's model of the cloud.
    "simulation": {
        "autoscaler",
        "command_line",
        "compiled",
        "demand",
        "dispatch",
        "errors",
        "health",
        "instance_states",
        "ledger",
        "loadbalancer",
        "localcloud",
        "model_timing",
        "orders",
        "policies",
        "profiles",
        "report",
        "simulation",
        "slo",
        "tuner",
        "vast",
    },
    "localcloud": {
        "command_line",
        "die_with_parent",
        "errors",
        "http_face",
        "localcloud",
        "model_timing",
        "private_files",
        "profiles",
        "remote",
        "simulation",
        "ssh_keys",
    },
}

# Decision cores: the part above `# --- outside world ---` does no I/O and reads no clock.
PURE = (
    "loadbalancer.py",
    "dispatch",
    "model_timing.py",
    "fleet_size.py",
    "fleet_affinity.py",
    "fleet_leases.py",
    "fleet_call.py",
    "fleet_course.py",
    "demand.py",
    "policies",
    "localcloud/model.py",
    "simulation/engines.py",
    "simulation/timing.py",
    "simulation/figures.py",
    "simulation/fluid.py",
    "simulation/capacity.py",
    "slo.py",
    "report.py",
)
WORLDLY = {"os", "socket", "subprocess", "threading", "asyncio", "time", "requests", "aiohttp", "sqlite3"}


def files() -> list[Path]:
    found = list(ROOT.glob("*.py"))
    for package in ("policies", "simulation", "remote", "localcloud"):
        found += (ROOT / package).rglob("*.py")
    return sorted(found)


def imported(tree: ast.AST) -> set[str]:
    """The first parts of all module names imported anywhere in the tree."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_import_of_ours_is_an_arrow_of_the_design(path: Path) -> None:
    unit = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert unit in ALLOWED, f"{unit} has no line in ALLOWED: say what it may import"
    extra = (imported(ast.parse(path.read_text())) & OURS) - ALLOWED[unit]
    assert not extra, f"{path.relative_to(ROOT)} imports {', '.join(sorted(extra))}"


def test_localcloud_takes_only_the_timing_class_from_the_simulation() -> None:
    for path in (ROOT / "localcloud").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("simulation"):
                assert node.module == "simulation.timing", path


def pure_files() -> list[Path]:
    found: list[Path] = []
    for name in PURE:
        path = ROOT / name
        found += path.rglob("*.py") if path.is_dir() else [path]
    return found


@pytest.mark.parametrize("path", pure_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_pure_core_imports_nothing_that_reaches_the_world(path: Path) -> None:
    source = path.read_text().split("# --- outside world ---")[0]
    assert not imported(ast.parse(source)) & WORLDLY


def test_the_part_of_the_autoscaler_above_the_line_reads_no_clock_and_opens_nothing() -> None:
    """autoscaler.py imports threads and clocks for the loop below its line; above it none is used."""
    source = (ROOT / "autoscaler.py").read_text().split("# --- outside world ---")[0]
    used = {
        node.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not used & (WORLDLY | {"queue", "secrets"})
