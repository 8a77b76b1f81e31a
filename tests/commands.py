"""Commands run in the process of the test: what they print and how they exit, without the time of a start."""

import functools
import gc
import io
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from fleet_client.flags import run_main


@dataclass(frozen=True)
class Exited:
    """How a command ended. err has its log too, as that of a process has."""

    status: object
    out: str
    err: str


def run_command(program: str, main: Callable[[list[str]], Any], *argv: str) -> Exited:
    """Run the main function of the program with these arguments until it exits."""
    out, err = io.StringIO(), io.StringIO()
    root, log = logging.getLogger(), logging.StreamHandler(err)
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a process that ends closes what it has opened
        status = None
        try:
            with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", [program, *argv]):
                run_main(functools.partial(main, list(argv)))
        except SystemExit as end:
            status = end.code
        finally:
            root.removeHandler(log)
            root.setLevel(level)
        gc.collect()
    return Exited(status, out.getvalue(), err.getvalue())
