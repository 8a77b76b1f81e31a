"""Find attributes that are written from outside the class that owns them.

A foreign write is an assignment, `+=` or `del` of `x.attr` where some class of the project declares attr, and
x is neither self or cls, nor a module, nor a local that the same function just made. Just made means that all
bindings of the local in that function are calls of a class, or of a method of a class (`Lease.parse(...)`).
What numba compiles is left out: there x is a row of an array. Types are not looked at, so an attribute of a
library's object counts when a class of the project has one of that name, unless it is in OF_LIBRARIES.
"""

import ast
import re
from collections.abc import Collection, Iterator

MADE = re.compile(r"(cls|[\w.]*\b_*[A-Z]\w*)[\w.]*\(")
"""A value that was just made: a call of a class, or of a method of a class."""

OF_LIBRARIES = {"node.names"}
"""Attributes of objects that are not ours: the names of an ast.ImportFrom."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _targets(node: ast.AST) -> list[ast.expr]:
    """Return what an assignment of the form `a = b = value` or `a: type = value` binds."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def declared(tree: ast.Module) -> Iterator[str]:
    """Yield the attributes that classes declare in their bodies or set on self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (t.id for line in node.body for t in _targets(line) if isinstance(t, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from {node.attr} if ast.unparse(node.value) == "self" else ()


def writes_of_others(tree: ast.Module, modules: Collection[str]) -> Iterator[ast.Attribute]:
    """Yield every attribute that is written of something that is not self, a module, or just made."""
    imports = (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))
    names = ((n, alias) for n in imports for alias in n.names)
    ours = {
        alias.asname or alias.name
        for n, alias in names
        if isinstance(n, ast.Import) or f"{n.module}.{alias.name}" in modules
    } | {"self", "cls"}
    for scope in (n for n in ast.walk(tree) if isinstance(n, ast.Module | Function)):
        if any(ast.unparse(d) == "njit" for d in getattr(scope, "decorator_list", [])):
            continue
        nodes = list(_own_nodes(scope))
        made = {
            id(t)
            for n in nodes
            for t in _targets(n)
            if MADE.match(ast.unparse(getattr(n, "value", None) or t))
        }
        stored = [n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        bound = {n.id for n in stored if id(n) not in made} | {n.arg for n in nodes if isinstance(n, ast.arg)}
        allowed = ours | {n.id for n in stored} - bound
        written = (
            n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store | ast.Del)
        )
        foreign = (n for n in written if ast.unparse(n.value) not in allowed)
        yield from (n for n in foreign if ast.unparse(n) not in OF_LIBRARIES)


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function or module without those of functions inside it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        yield from () if isinstance(child, Function) else _own_nodes(child)
