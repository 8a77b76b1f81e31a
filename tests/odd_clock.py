"""Run one of our programs on a clock that can be set, or that has slept, without touching this computer's.

    python -m tests.odd_clock FILE (SCRIPT | -m MODULE) ARGUMENTS

FILE has two numbers of seconds: by how much the wall clock was set, and for how long the computer slept.
While it sleeps CLOCK_BOOTTIME and the wall clock go on, and CLOCK_MONOTONIC does not.
"""

import runpy
import sys
import time
from pathlib import Path

_time, _clock_gettime = time.time, time.clock_gettime


def set_clock(file: Path, set_by_s: float = 0.0, slept_s: float = 0.0) -> None:
    """Let the programs on that file's clock see it set, and the computer to have slept, from now on."""
    new = file.with_suffix(".new")
    new.write_text(f"{set_by_s} {slept_s}")
    new.replace(file)


def _run(file: Path, program: list[str]) -> None:
    def read() -> tuple[float, float]:
        set_by_s, slept_s = file.read_text().split()
        return float(set_by_s), float(slept_s)

    def odd_time() -> float:
        return _time() + sum(read())

    def odd_gettime(clock: int) -> float:
        return _clock_gettime(clock) + (read()[1] if clock == time.CLOCK_BOOTTIME else 0.0)

    time.time, time.clock_gettime = odd_time, odd_gettime
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    _run(Path(sys.argv[1]), sys.argv[2:])
