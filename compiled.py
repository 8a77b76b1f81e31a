"""`njit`: a function that numba turns into machine code the first time it is called, and keeps on disk.

One place, because numba is untyped and because its cache must never be what stops us: where no cache
directory can be written (a read-only image, a full home) the function is compiled anew in each process,
which takes seconds, and nothing else changes. A compiled function is still the plain Python function it
was written as: numba keeps that as its `py_func`.

dispatch/ uses it, because a choice runs eight model servers forward: 25 µs, plain Python takes a hundred
times as long; simulation/ and bench/ use it for weeks of traffic. What is not compiled is seldom called.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def njit(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, compiled at its first call; from the cache on disk where there is one.

    It holds no lock of the interpreter while it runs. Division by zero gives inf or nan as in numpy and
    an index out of range is not noticed, so callers check what they pass.
    """
    jit: Callable[..., Any] = numba.njit
    try:
        compiled = jit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # numba 0.68: "cannot cache function ...: no locator available for file ..."
        compiled = jit(function, nogil=True, error_model="numpy")
    return cast("Callable[P, R]", compiled)
