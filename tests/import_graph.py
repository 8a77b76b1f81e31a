"""The modules of a checkout and which of them import which, read from the source with `ast`.

A unit is a script at the top, a package, or a part of a package that has import rules of its own.
"""

import ast
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

PARTS = (
    "dispatch.outside",
    "fleet.outside",
    "vast.errors",
    "vast.rows",
    "web.messages",
    "web.replay_guard",
    "web.signatures",
)
"""Parts of packages that are units of their own."""

SKIPPED = {"build", "docs", "deploy"}
"""Directories at the top without modules of the project."""


def modules_of(root: Path) -> dict[str, Path]:
    """Return every Python file of a checkout by its dotted name."""
    tops = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in SKIPPED]
    files = sorted([*root.glob("*.py"), *(f for top in tops for f in top.rglob("*.py"))])
    return {_module_name(path.relative_to(root)): path for path in files}


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """Return the unit that a module belongs to."""
    inside = (part for part in PARTS if module == part or module.startswith(part + "."))
    return next(inside, module.split(".")[0])


def imports_of(module: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield those of the modules that one of them imports anywhere in it, or runs with `-m`."""
    path = modules[module]
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Tuple | ast.List):
            texts = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
            found = [str(b) for a, b in pairwise(texts) if a == "-m"]
        else:
            continue
        for name in found:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                yield name


def arrows(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return, for each unit, the other units that its files import."""
    graph: dict[str, set[str]] = {}
    for module in modules:
        unit = unit_of(module)
        graph.setdefault(unit, set()).update({unit_of(m) for m in imports_of(module, modules)} - {unit})
    return graph
