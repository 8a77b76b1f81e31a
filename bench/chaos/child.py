"""Run one of our programs as a child of the campaign: without a fix that is named, and with its loop watched.

    python -m bench.chaos.child [--undo NAME] [--holds FILE] PROGRAM.py [flags]

--holds: whenever the event loop's thread has used more than HOLD_S of processor between two ticks of a timer,
a line goes there. Processor time, not time of the wall: other processes of this machine do not count.
"""

import argparse
import asyncio
import os
import runpy
import sys
import time
from pathlib import Path

import uvloop

from bench.chaos.undo import undo

HOLD_S = 0.02
"""Seconds of processor from which on a hold is written down."""

TICK_S = 0.01
"""Seconds between two looks: what is found is at most so much less than what one callback took."""


def watch_loop(path: Path) -> None:
    """Have every event loop that is made from now on write its holds to that file."""
    make = uvloop.new_event_loop

    def watched() -> asyncio.AbstractEventLoop:
        loop = make()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        used = time.thread_time()

        def tick() -> None:
            nonlocal used
            now = time.thread_time()
            if now - used > HOLD_S:
                os.write(file, f"{os.getpid()} {time.monotonic():.3f} {now - used:.4f}\n".encode())
            used = now
            loop.call_later(TICK_S, tick)

        def begin() -> None:
            nonlocal used
            used = time.thread_time()  # what was imported before the loop ran held nobody up
            tick()

        loop.call_soon(begin)
        return loop

    uvloop.new_event_loop = watched  # type: ignore[assignment]


def main() -> None:
    """Become the program."""
    parser = argparse.ArgumentParser(prog="bench.chaos.child", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--undo", default=None)
    parser.add_argument("--holds", type=Path, default=None)
    parser.add_argument("program")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    said = parser.parse_args()
    if said.undo is not None:
        undo(said.undo)
    if said.holds is not None:
        watch_loop(said.holds)
    sys.argv = [said.program, *said.flags]
    runpy.run_path(said.program, run_name="__main__")


if __name__ == "__main__":
    main()
