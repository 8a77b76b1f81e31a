"""Machine code is kept on disk, and never runs when anything it was made of has changed."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

from process import compiled
from tests.paths import ROOT

PACKAGES = ("bench", "dispatch", "engine", "fleet", "policies", "process", "simulation")


def covered() -> set[Path]:
    """The files whose change makes all machine code old."""
    return {path for pattern in compiled.SOURCES for path in ROOT.glob(pattern)}


def imported(path: Path) -> set[Path]:
    """Our own files that a file takes names from."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add((ROOT / node.module.replace(".", "/")).with_suffix(".py"))
    return {file for file in found if file.exists()}


def test_all_that_is_compiled_and_all_that_it_uses_is_in_the_digest() -> None:
    """Of a class that is imported for its type, or for what is called before, nothing is compiled in."""
    files = [f for d in PACKAGES for f in (ROOT / d).rglob("*.py")]
    using = [f for f in files if "import njit" in f.read_text()]
    assert len(using) > 3
    needed = set(using).union(*(imported(f) for f in using))
    types_only = {ROOT / "engine" / "timing.py"}
    assert needed - covered() <= types_only


def test_make_compiles_anew_when_any_of_it_has_changed() -> None:
    """Else the first loadbalancer after a change would take ten seconds to start."""
    (named,) = re.findall(r"^\$\(COMPILED\): \$\(READY\) (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert re.sub(r"\$\(wildcard (.*)\)", r"\1", named).split() == list(compiled.SOURCES)


PROGRAM = """
import sys; sys.path.insert(0, {root!r})
from dispatch.two import call
print(call(1.0))
"""


def test_a_constant_that_another_file_compiled_in_is_seen_to_have_changed(tmp_path: Path) -> None:
    """numba alone goes on with the old machine code: the file of the caller is what it was."""
    for folder in ("process", "dispatch"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "process" / "compiled.py", tmp_path / "process")
    one, two = tmp_path / "dispatch" / "one.py", tmp_path / "dispatch" / "two.py"
    head = "from process.compiled import njit\n"
    one.write_text(f"{head}MOST = 1.0\n@njit\ndef most(x: float) -> float:\n    return x + MOST\n")
    two.write_text(
        f"{head}from dispatch.one import most\n@njit\ndef call(x: float) -> float:\n    return most(x)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}

    def said() -> str:
        program = PROGRAM.format(root=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
        )
        return done.stdout.strip()

    assert said() == "2.0"
    kept = list((tmp_path / "build" / "numba").rglob("*.nbc"))
    assert len(kept) == 2
    one.write_text(one.read_text().replace("MOST = 1.0", "MOST = 5.0"))
    assert said() == "6.0"
    assert set(kept) < set((tmp_path / "build" / "numba").rglob("*.nbc"))


def test_what_was_kept_long_ago_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "", raising=False)
    for name, age_s in (("old", 2.0 * compiled.KEPT_S), ("lately", 60.0)):
        (tmp_path / name).mkdir()
        at = time.time() - age_s
        os.utime(tmp_path / name, (at, at))
    compiled.keep_in(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lately"]
    assert getattr(numba.config, "CACHE_DIR") == str(tmp_path / "new")  # noqa: B009 (untyped)


def test_a_cache_that_others_delete_at_the_same_time_stops_nobody(tmp_path: Path) -> None:
    """A directory that is gone between being listed and being looked at."""
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from process import compiled
print(compiled.keep_in(Path({str(tmp_path / "new")!r})))
"""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == str(tmp_path / "new")
