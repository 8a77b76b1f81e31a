"""`njit`: a function that numba turns into machine code the first time it is called, and keeps on disk.

One place, because numba is untyped and because its cache must never be what stops us: where no cache
directory can be written (a read-only image, a full home) the function is compiled anew in each process,
which takes seconds, and nothing else changes. A compiled function is still the plain Python function it
was written as: numba keeps that as its `py_func`.

numba looks at the file of a function only. What it calls and the constants it was compiled with may stand
in other files, so the machine code is kept under a digest of them all: after an update nothing old is run.

dispatch/ uses it, because a choice runs eight model servers forward: 20 µs, plain Python takes a hundred
times as long; simulation/ and bench/ use it for weeks of traffic. What is not compiled is seldom called.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")

ROOT = Path(__file__).parent.parent

SOURCES = (
    "process/compiled.py",
    "bench/policies/floor.py",
    "dispatch/*.py",
    "engine/*.py",
    "policies/*.py",
    "simulation/virtual/fluid/*.py",
)
"""What is compiled, and all that it takes constants or functions from (test_compiled.py)."""

KEPT_S = 7 * 86400.0
"""Machine code that was not written for so long, of other sources, is deleted."""


def _cache() -> Path:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return ROOT / "build" / "numba" / digest.hexdigest()[:16]


def keep_in(cache: Path) -> str:
    """Return the directory for numba's machine code: `cache`, or what NUMBA_CACHE_DIR says.

    Machine code of other versions that was not written for KEPT_S seconds is deleted.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return os.environ["NUMBA_CACHE_DIR"]
    numba.config.CACHE_DIR = str(cache)  # type: ignore[attr-defined]
    # Others may start and delete at the same time, and what cannot be looked at stays.
    with suppress(OSError):
        if not cache.exists():
            for old in cache.parent.iterdir():
                if time.time() - old.stat().st_mtime > KEPT_S:
                    shutil.rmtree(old, ignore_errors=True)
    return str(cache)


CACHE = keep_in(_cache())
"""The directory."""


def njit(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function compiled by numba, at its first call or from the cache on disk.

    It does not hold Python's global lock while it runs. Division by zero gives inf or nan as in numpy and an
    index out of range is not noticed, so callers check what they pass.
    """
    jit: Callable[..., Any] = numba.njit
    try:
        compiled = jit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # numba 0.68: "cannot cache function ...: no locator available for file ..."
        compiled = jit(function, nogil=True, error_model="numpy")
    return cast("Callable[P, R]", compiled)
